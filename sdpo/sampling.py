"""Images from a UNet: Euler steps with classifier-free guidance, the same loop for every family."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from sdpo.families import Conditioning, Family

GUIDANCE = {
    "standard": lambda cond, uncond, scale: uncond + scale * (cond - uncond),
    "official": lambda cond, uncond, scale: cond + scale * (cond - uncond),  # its 7.5 is 8.5 in the standard convention
}


def draw_noise(shape: tuple[int, ...], seeds: Iterable[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal noise (N, *shape), row i from a generator on the device seeded with the i-th seed.

    A seed means other numbers on a CPU than on a GPU, and in bf16 than in fp32.
    """
    draws = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    return randn_tensor((len(draws), *shape), generator=draws, device=device, dtype=dtype)


def encode_guided(family: Family, captions: list[str], height: int, width: int, dtype: torch.dtype) -> Conditioning:
    """Conditioning of 2 N rows: N captions, then N empty ones."""
    count = len(captions)
    rows = torch.tensor([*range(count), *[count] * count], device=family.device)
    encoded = family.encode_captions([*captions, ""], height, width)
    return {name: value[rows].to(dtype) for name, value in encoded.items()}


@torch.no_grad()
def sample(
    family: Family,
    unet: nn.Module,
    captions: list[str],
    noise: Tensor,
    steps: int,
    guidance_scale: float,
    convention: str = "standard",
) -> np.ndarray:
    """Images (N, H, W, 3) uint8 for N captions from standard normal `noise` (N, C, h, w), guided away from "".

    Guidance and latents have the dtype of `noise`, officially the UNet's own.
    Images are decoded one at a time, which bounds the memory. Raises FloatingPointError where pixels are not finite.
    """
    scheduler = family.sampler()
    scheduler.set_timesteps(steps, device=family.device)
    height, width = (family.image_size(side) for side in noise.shape[-2:])
    conditioning = encode_guided(family, captions, height, width, unet.dtype)
    latents = noise.to(family.device) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        inputs = scheduler.scale_model_input(latents, timestep).repeat(2, 1, 1, 1).to(unet.dtype)
        prediction = family.predict(unet, inputs, timestep.expand(len(inputs)), conditioning).to(latents.dtype)
        guided = GUIDANCE[convention](*prediction.chunk(2), guidance_scale)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    pixels = torch.cat([family.decode_latents(row) for row in latents.float().split(1)])
    if not pixels.isfinite().all():
        raise FloatingPointError("an image has pixels that are not finite")
    pixels = (pixels / 2 + 0.5).clamp(0, 1) * 255
    return pixels.round().permute(0, 2, 3, 1).byte().cpu().numpy()  # NCHW => NHWC
