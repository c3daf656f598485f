"""The official loop's work, in our own words: what the training benchmark compares with.

Per micro-step: images and captions are encoded, everything random is drawn on the device, the frozen parts run with all
weights in the training precision, and seven figures are gathered and fetched from the device. The policy has fp32
weights under autocast, the optimizer is torch's with its own choice of kernels, attention is what diffusers uses by
default, nothing is compiled. Token ids and normalised fp32 images come ready from the data loader.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor

from sdpo.batch import Batch
from sdpo.config import TrainConfig
from sdpo.families import Family
from sdpo.hub import DTYPES
from sdpo.losses import scale_gradient


class OfficialLoop:
    """Models, optimizer and one host batch that serves every micro-step."""

    warm = True  # every update does the same work

    def __init__(self, config: TrainConfig, family: Family, batch: Batch):
        self.config, self.family = config, family
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.gradient_accumulation_steps
        )
        device, self.dtype = self.accelerator.device, DTYPES[config.mixed_precision]
        family.to(device, self.dtype)
        family.vae.disable_slicing()
        unet = family.load_unet().to(device).train()
        self.reference = copy.deepcopy(unet).requires_grad_(False).to(self.dtype)
        if family.gradient_checkpointing == "full":
            unet.enable_gradient_checkpointing()
        decay = {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
        adafactor = {"clip_threshold": 1.0, "scale_parameter": False, "relative_step": False}
        optimizer = (
            transformers.Adafactor(unet.parameters(), **decay, **adafactor)
            if family.optimizer == "adafactor"
            else torch.optim.AdamW(unet.parameters(), betas=(0.9, 0.999), eps=1e-8, **decay)
        )
        schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=500)
        self.policy, self.optimizer, self.schedule = self.accelerator.prepare(unet, optimizer, schedule)
        self.pixels = batch.pixels.float() / 127.5 - 1  # (2B, 3, H, W), winners first
        self.captions, self.tokens = batch.captions, family.tokenize(batch.captions)
        family.tokenize = lambda captions: self.tokens
        if device.type == "cuda":
            self.pixels = self.pixels.pin_memory()

    def take_micro_steps(self, number: int) -> None:
        """Make updates of so many micro-steps from now on."""
        self.accelerator.gradient_accumulation_steps, self.accelerator.step = number, 0

    def update(self) -> None:
        """One optimizer step over the accumulated micro-batches."""
        for _ in range(self.accelerator.gradient_accumulation_steps):
            self.micro_step()

    def micro_step(self) -> None:
        """Encode, predict twice, fetch the figures, differentiate; step where the accumulation ends."""
        with self.accelerator.accumulate(self.policy):
            noisy, noise, timesteps, conditioning = self.make_inputs()
            prediction = self.family.predict(self.policy, noisy, timesteps, conditioning)
            with torch.no_grad():
                reference = self.family.predict(self.reference, noisy, timesteps, conditioning).to(self.dtype)
            loss = self.log(*self.loss(prediction, reference, noise))
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def make_inputs(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """(noised latents, noise, timesteps, conditioning) of 2B samples in the training precision."""
        family, pairs = self.family, len(self.captions)
        pixels = self.pixels.to(self.accelerator.device, self.dtype, non_blocking=True)
        latents = family.vae.encode(pixels).latent_dist.sample() * family.vae.config.scaling_factor
        noise = torch.randn_like(latents[:pairs]).repeat(2, 1, 1, 1)
        steps = family.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (pairs,), device=latents.device).repeat(2)
        conditioning = family.encode_captions(self.captions, self.config.resolution)
        conditioning = {name: torch.cat([x, x]).to(self.dtype) for name, x in conditioning.items()}
        return family.scheduler.add_noise(latents, noise, timesteps), noise, timesteps, conditioning

    def loss(self, prediction: Tensor, reference: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Diffusion-DPO with the safeguard: (loss, six figures)."""
        residual_w, residual_l = (prediction - target).chunk(2)
        error_w, error_l = (r.square().mean((1, 2, 3)) for r in (residual_w, residual_l))  # each (B,)
        reference_w, reference_l = (reference - target).square().mean((1, 2, 3)).chunk(2)
        with torch.no_grad():
            gradient_w, gradient_l = (2 * r / r.numel() for r in (residual_w, residual_l))
            ww, wl = gradient_w.square().sum(), (gradient_w * gradient_l).sum()
            limit = ((1 - self.config.winner_preserving_mu) * ww / (wl + 1e-9)).clamp(0, 1)
            scale = torch.where(wl > 0, limit, torch.ones_like(limit))
        margin = (error_w - scale_gradient(error_l, scale)) - (reference_w - reference_l)
        inside = -self.config.beta_dpo / 2 * margin  # (B,)
        errors = (error_w + error_l).mean() / 2, (reference_w + reference_l).mean() / 2
        drops = (error_w - reference_w).mean(), (error_l - reference_l).mean()
        return -F.logsigmoid(inside).mean(), *errors, *drops, (inside > 0).float().mean(), scale

    def log(self, loss: Tensor, *figures: Tensor) -> Tensor:
        """Fetch every figure, averaged over the ranks, from the device; returns the loss."""
        self.figures = [self.accelerator.gather(x.detach()).float().mean().item() for x in (loss, *figures)]
        return loss
