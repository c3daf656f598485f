"""A batch of pairs as tensors: what loading leaves and training begins with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo.families import Conditioning


@dataclass
class Batch:
    """B pairs as tensors; image tensors of 2B rows hold all winners, then all losers, for sft only B winners."""

    pixels: Tensor | None  # (2B, 3, H, W) uint8; None where the pairs come from a latent cache
    moments: Tensor | None  # (2B, 2, C, h, w), mean and std of the posteriors, from a latent cache
    texts: Conditioning | None  # each (B, ...), outputs of the text encoders for the captions, from a latent cache
    captions: list[str]  # B
    noise: Tensor  # (B, C, h, w), shared by the pair
    input_noise: Tensor | None  # (B, C, h, w), what noises the model's input in place of noise, if that is perturbed
    posterior_noise: Tensor  # (2B, C, h, w), for sampling the latents
    reference_error: Tensor | None  # (2B,) of the reference, where an earlier run has computed it
    uniform: Tensor  # (B,) in [0, 1), for drawing the timestep that the pair shares
    unreadable: list[str]  # why images could not be read, for which others were drawn

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the batch, by name."""
        values = vars(self) | (self.texts or {})
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        """Size of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by the data loader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        def apply(value):
            if isinstance(value, dict):
                return {name: function(tensor) for name, tensor in value.items()}
            return function(value) if isinstance(value, Tensor) else value

        return Batch(**{name: apply(value) for name, value in vars(self).items()})


def collate(samples: list[dict]) -> Batch:
    """Stack samples, winners first; they have pixels, or moments and texts."""
    by_member = {name: stack(samples, name, 1) for name in ("pixels", "moments", "posterior_noise", "reference_error")}
    texts = [s["texts"] for s in samples if "texts" in s]
    return Batch(
        **{name: None if value is None else value.flatten(0, 1) for name, value in by_member.items()},
        noise=stack(samples, "noise"),
        input_noise=stack(samples, "input_noise"),
        texts={name: stack(texts, name) for name in texts[0]} if texts else None,
        captions=[s["caption"] for s in samples],
        uniform=torch.tensor([s["uniform"] for s in samples], dtype=torch.float32),
        unreadable=[text for s in samples for text in s["unreadable"]],
    )


def stack(samples: list[dict], name: str, dim: int = 0) -> Tensor | None:
    """One entry of all samples, stacked along a new dimension; None where they do not have it."""
    values = [sample.get(name) for sample in samples]
    return None if values[0] is None else torch.stack(values, dim)
