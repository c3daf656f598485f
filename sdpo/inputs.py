"""From a batch of pairs to what the denoiser sees: the one path that training and held-out measurement share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo.batch import Batch
from sdpo.families import Conditioning, Family


@dataclass
class Inputs:
    """Inputs of the denoiser for the members of B pairs, winners first, and the targets of its prediction.

    For sft, which has only winners, every tensor has B rows instead of 2B.
    """

    noisy: Tensor  # (2B, C, h, w)
    timesteps: Tensor  # (2B,)
    conditioning: Conditioning  # each (2B, ...)
    target: Tensor  # (2B, C, h, w)

    def to(self, device: torch.device | str) -> Inputs:
        """The same inputs on another device."""
        conditioning = {name: value.to(device) for name, value in self.conditioning.items()}
        return Inputs(self.noisy.to(device), self.timesteps.to(device), conditioning, self.target.to(device))


def normalise(pixels: Tensor) -> Tensor:
    """Pixels of 0 to 255 as the VAE takes them, in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def make_inputs(family: Family, batch: Batch) -> Inputs:
    """Encode a batch on the family's device; both members of a pair get the same noise, timestep and caption."""
    members = len(batch.posterior_noise) // len(batch.captions)
    moments, texts = batch.moments, batch.texts
    if moments is None:  # not from a latent cache
        moments, texts = family.encode_moments(normalise(batch.pixels)), family.encode_texts(batch.captions)
    latents = family.sample_posterior(moments, batch.posterior_noise)
    conditioning = family.condition(texts, family.image_size(latents.shape[-1]))

    def for_each_member(x: Tensor) -> Tensor:  # (B, ...) -> (members * B, ...)
        return torch.cat([x] * members)

    timesteps, noise = for_each_member(family.timesteps(batch.uniform)), for_each_member(batch.noise)
    perturbed = None if batch.input_noise is None else for_each_member(batch.input_noise)
    noisy, target = family.add_noise(latents, noise, timesteps, perturbed)
    conditioning = {name: for_each_member(value) for name, value in conditioning.items()}
    return Inputs(noisy, timesteps, conditioning, target)
