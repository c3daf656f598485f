"""A batch of pairs as tensors: what loading leaves and training begins with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """B pairs as tensors; image tensors hold all winners, then all losers."""

    pixels: Tensor  # (2B, 3, H, W) uint8
    captions: list[str]  # B
    noise: Tensor  # (B, C, h, w), shared by the pair
    input_noise: Tensor  # (B, C, h, w), what noises the model's input: noise, plus the perturbation if any
    posterior: Tensor  # (2B, C, h, w), for sampling the latents
    uniform: Tensor  # (B,) in [0, 1), for drawing the timestep that the pair shares
    unreadable: list[str]

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        return Batch(
            **{
                name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in vars(self).items()
            }
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by the data loader)."""
        return Batch(
            **{name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        )


def collate(samples: list[dict]) -> Batch:
    """Stack samples, winners first."""
    by_member = {name: torch.stack([s[name] for s in samples], 1).flatten(0, 1) for name in ("pixels", "posterior")}
    shared = {name: torch.stack([s[name] for s in samples]) for name in ("noise", "input_noise")}
    return Batch(
        **by_member,
        **shared,
        captions=[s["caption"] for s in samples],
        uniform=torch.tensor([s["uniform"] for s in samples], dtype=torch.float32),
        unreadable=[text for s in samples for text in s["unreadable"]],
    )
