"""One update: micro-batches to losses to gradients to weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sdpo.batch import Batch
from sdpo.config import Plan, TrainConfig
from sdpo.families import StableDiffusion
from sdpo.inputs import make_inputs
from sdpo.losses import PAIR_LOSSES, pair_terms, sft
from sdpo.metrics import Meter, pair_metrics


@dataclass
class Run:
    """Everything one training run is made of."""

    config: TrainConfig
    accelerator: Accelerator
    family: StableDiffusion
    plan: Plan
    seed: int
    unet: nn.Module  # the policy: fp32 weights, prepared by accelerate
    reference: nn.Module | None  # frozen; None where nothing is compared with it
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    step: int = 0  # updates made


def compute_loss(run: Run, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """(mean loss of a micro-batch, its metrics): policy and reference see the same inputs under the same autocast."""
    config, family = run.config, run.family
    inputs = make_inputs(family, batch)
    with run.accelerator.autocast():
        prediction = family.predict(run.unet, inputs.noisy, inputs.timesteps, inputs.conditioning)
    if config.method == "sft":
        loss = sft(prediction, inputs.target).mean()
        return loss, {"train_loss": loss}
    with run.accelerator.autocast(), torch.no_grad():
        reference = family.predict(run.reference, inputs.noisy, inputs.timesteps, inputs.conditioning)
    mu = config.winner_preserving_mu if config.use_winner_preserving else None
    scaling = {"mu": mu, "per_pair": config.winner_preserving_per == "pair", "constant": config.constant_loser_scale}
    terms = pair_terms(prediction, reference, inputs.target, config.beta_dpo, **scaling)
    form = family.dspo_form if config.dspo_form == "auto" else config.dspo_form
    method = f"dspo-{form}" if config.method == "dspo" else config.method
    loss = PAIR_LOSSES[method](terms, config.beta_dpo, config.dmpo_alpha).mean()
    return loss, {"train_loss": loss, **pair_metrics(terms, config.beta_dpo)}


def update(run: Run, micro_batches: Iterator[Batch], meter: Meter) -> None:
    """One optimizer step over the accumulated micro-batches, the schedule's and the average's."""
    for _ in range(run.plan.accumulation):
        batch = next(micro_batches)
        meter.count_unreadable(batch.unreadable, run.config.max_unreadable_images)
        with run.accelerator.accumulate(run.unet):
            loss, values = compute_loss(run, batch.to(run.accelerator.device))
            run.accelerator.backward(loss)
            if run.accelerator.sync_gradients:
                limit = run.config.max_grad_norm or float("inf")
                values["grad_norm"] = run.accelerator.clip_grad_norm_(run.unet.parameters(), limit)
            run.optimizer.step()
            run.optimizer.zero_grad()
        meter.add(values)
    run.schedule.step()
    if run.ema:
        run.ema.update_parameters(run.accelerator.unwrap_model(run.unet))
    run.step += 1
