"""Images from a UNet: Euler steps with classifier-free guidance, the same loop for every family."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor, nn

from sdpo.families import StableDiffusion

GUIDANCE = {
    "standard": lambda cond, uncond, scale: uncond + scale * (cond - uncond),
    "official": lambda cond, uncond, scale: cond + scale * (cond - uncond),  # its 7.5 is 8.5 in the standard convention
}


@torch.no_grad()
def sample(
    family: StableDiffusion,
    unet: nn.Module,
    captions: list[str],
    noise: Tensor,
    steps: int,
    guidance_scale: float,
    convention: str = "standard",
) -> np.ndarray:
    """Images (N, H, W, 3) uint8 for N captions from standard normal `noise` (N, C, h, w), guided away from ""."""
    scheduler = EulerDiscreteScheduler.from_config(family.scheduler.config)
    scheduler.set_timesteps(steps, device=family.device)
    resolution = noise.shape[-1] * 2 ** (len(family.vae.config.block_out_channels) - 1)
    conditioning = family.encode_captions(captions + [""] * len(captions), resolution)
    latents = noise.to(family.device) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        inputs = scheduler.scale_model_input(latents, timestep).repeat(2, 1, 1, 1)
        cond, uncond = family.predict(unet, inputs, timestep.expand(len(inputs)), conditioning).chunk(2)
        latents = scheduler.step(GUIDANCE[convention](cond, uncond, guidance_scale), timestep, latents).prev_sample
    pixels = (family.decode_latents(latents) / 2 + 0.5).clamp(0, 1) * 255
    return pixels.round().permute(0, 2, 3, 1).byte().cpu().numpy()  # NCHW => NHWC
