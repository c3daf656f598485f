"""What a run is made of, and one update of it: micro-batches to losses to gradients to weights."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType
from diffusers.models.attention_processor import AttnProcessor
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sdpo.adapters import add_adapters
from sdpo.arithmetic import compile_blocks, fuses_attention, recompute, to_channels_last, track_attention
from sdpo.average import AveragedWeights
from sdpo.batch import Batch
from sdpo.command import InputError
from sdpo.config import Plan, TrainConfig
from sdpo.families import Family, hold_matmul_weights
from sdpo.graphs import RecordedSteps
from sdpo.hub import DTYPES
from sdpo.inputs import make_inputs
from sdpo.losses import PAIR_LOSSES, PairTerms, pair_terms, sample_error, sft
from sdpo.metrics import Meter, pair_metrics
from sdpo.optimizers import OPTIMIZERS, optimizer_name

if TYPE_CHECKING:  # the benchmark trains without the packages that data on file need
    from sdpo.references import ReferenceErrors

# A pass uses every weight once, so autocast gains nothing by keeping its copies until the end of the pass
AUTOCAST = AutocastKwargs(cache_enabled=False)
REFERENCE_ERROR = "reference_error"  # among what is measured on a micro-batch
NO_EFFECT = "no effect"  # in place of a flag's value
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)  # engines that may share out weights over ranks


@dataclass
class Run:
    """Everything one training run is made of."""

    config: TrainConfig
    accelerator: Accelerator
    family: Family
    plan: Plan
    seed: int
    policy: nn.Module  # fp32 weights; wrapped by accelerate once `prepare` has run
    reference: nn.Module | None  # frozen; None where nothing is compared with it
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    meter: Meter
    average: AveragedWeights | None = None  # of the policy, once that is prepared
    recorded: RecordedSteps | None = None  # micro-steps as CUDA graphs, once the policy is prepared
    data_fingerprint: str = ""  # Pairs.fingerprint of what it trains on
    base_fingerprints: dict[str, str] = field(default_factory=dict)  # Family.describe of what it begins with
    reference_errors: ReferenceErrors | None = None  # the reference's errors, kept for other runs
    prompts: list[str] = field(default_factory=list)  # to sample images of when held-out errors are measured
    step: int = 0  # updates made or skipped

    def state(self) -> dict[str, Any]:
        """What a checkpoint says about the run besides weights and optimizer; every rank calls this."""
        return {
            "step": self.step,
            "seed": self.seed,
            "data": self.data_fingerprint,
            "base": self.base_fingerprints,
            "config": effective_settings(self.config, self.family),
            "plan": dataclasses.asdict(self.plan),
            "meter": self.meter.state(),
        }

    def prepare(self) -> None:
        """Let accelerate wrap what it has to, policy, optimizer and schedule; set up recording and averaging."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.accelerator.deepspeed_plugin.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": self.config.train_batch_size,
                "gradient_accumulation_steps": self.plan.accumulation,
                "gradient_clipping": self.config.max_grad_norm,
            }
        parts = self.accelerator.prepare(self.policy, self.optimizer, self.schedule)
        self.policy, self.optimizer, self.schedule = parts
        if self.config.cuda_graphs:
            self.recorded = RecordedSteps(functools.partial(micro_step, self), self.accelerator.device)
        if self.config.use_ema:
            self.average = AveragedWeights(self.accelerator.unwrap_model(self.policy), self.config.ema_decay)

    @property
    def resolution(self) -> int:
        """Side of the square training images in pixels."""
        return self.config.resolution or self.family.resolution

    @property
    def sharded(self) -> bool:
        """Whether ranks have to run the policy together."""
        return self.accelerator.distributed_type in SHARDING


def build_run(
    config: TrainConfig,
    accelerator: Accelerator,
    family: Family,
    plan: Plan,
    seed: int,
    reference_errors: ReferenceErrors | None = None,
) -> Run:
    """A run before its first update, not yet prepared; InputError for a UNet or optimizer that cannot be used."""
    accelerator.gradient_accumulation_steps = plan.accumulation
    compares = config.method != "sft" and not (reference_errors and reference_errors.complete)
    policy, reference = build_models(config, family, accelerator, with_reference=compares or config.holds_out)
    if config.lora_rank:
        add_adapters(policy, family.adapted, config.lora_rank, seed)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[optimizer_name(config, family)].build(trained, config, plan.learning_rate)
    lengths = {"num_warmup_steps": config.lr_warmup_steps, "num_training_steps": plan.steps}
    schedule = get_scheduler(config.lr_scheduler, optimizer, **lengths)
    return Run(
        config=config,
        accelerator=accelerator,
        family=family,
        plan=plan,
        seed=seed,
        policy=policy,
        reference=reference,
        optimizer=optimizer,
        schedule=schedule,
        meter=Meter(accelerator),
        reference_errors=reference_errors,
    )


def build_models(
    config: TrainConfig, family: Family, accelerator: Accelerator, with_reference: bool
) -> tuple[nn.Module, nn.Module | None]:
    """(policy in fp32, frozen reference or None), on the device; raises InputError for a UNet with dropout.

    Where adapters are to be trained, the two share all weights.
    """
    dtype = DTYPES[accelerator.mixed_precision]
    family.to(accelerator.device, dtype)
    unet = family.load_unet(config.unet_init).to(accelerator.device)
    if any(module.p for module in unet.modules() if isinstance(module, nn.Dropout)):
        raise InputError("the UNet has dropout, which tells policy and reference apart: set it to 0 in its config.json")
    if config.channels_last:
        to_channels_last(unet)
    if not fuses_attention(accelerator.device, dtype):
        unet.set_attn_processor(AttnProcessor())  # several operations, with the scores in memory
    unet.eval()  # without dropout the same, but in training ResNet blocks copy channels-last inputs
    reference = None
    if with_reference:
        shared = {id(weight): weight for weight in unet.parameters()} if config.lora_rank else {}
        reference = copy.deepcopy(unet, shared).requires_grad_(False)  # a memo: what it holds is not copied
        if not (config.compile or config.lora_rank):  # compiled, both run one graph, which casts weights in fp32
            hold_matmul_weights(reference, dtype)
    if (config.gradient_checkpointing or family.gradient_checkpointing) == "full":
        unet.enable_gradient_checkpointing(recompute)
    set_up_passes = compile_blocks if config.compile else track_attention
    for model in (unet, reference):
        if model is not None:
            set_up_passes(model)
    return unet, reference


def effective_settings(config: TrainConfig, family: Family) -> dict[str, Any]:
    """Values by flag: aliases and "auto" resolved, NO_EFFECT in place of flags that have none."""
    optimizer = optimizer_name(config, family)
    settled = {
        "sft": False,
        "train_method": config.method,
        "use_adafactor": False,
        "optimizer": optimizer,
        "dspo_form": dspo_form(config, family),
        "resolution": config.resolution or family.resolution,
    }
    return dataclasses.asdict(config) | settled | dict.fromkeys(config.idle(optimizer), NO_EFFECT)


def dspo_form(config: TrainConfig, family: Family) -> str:
    """The form of dspo that the config asks for."""
    return family.dspo_form if config.dspo_form == "auto" else config.dspo_form


def loss_name(config: TrainConfig, family: Family) -> str:
    """Row of PAIR_LOSSES that the config asks for, or sft."""
    return f"dspo-{dspo_form(config, family)}" if config.method == "dspo" else config.method


def pair_loss(config: TrainConfig, family: Family) -> Callable[[PairTerms], Tensor]:
    """The loss that the config asks for, as a function of the terms alone."""
    loss = PAIR_LOSSES[loss_name(config, family)]
    options = {argument: getattr(config, setting) for argument, setting in loss.options.items()}
    return functools.partial(loss.function, **options)


def compute_loss(run: Run, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """(mean loss of a micro-batch, its metrics): policy and reference see the same inputs under the same autocast.

    Errors of the reference that are to be kept for other runs, (2B,), are among the metrics as REFERENCE_ERROR.
    """
    config, family = run.config, run.family
    inputs = make_inputs(family, batch)
    reference = None
    with run.accelerator.autocast():
        if config.method != "sft" and batch.reference_error is None:  # before the policy, while no activations are kept
            with torch.no_grad():
                reference = family.predict(run.reference, inputs.noisy, inputs.timesteps, inputs.conditioning)
        prediction = family.predict(run.policy, inputs.noisy, inputs.timesteps, inputs.conditioning)
    if config.method == "sft":
        loss = sft(prediction, inputs.target).mean()
        return loss, {"train_loss": loss.detach()}
    mu = config.winner_preserving_mu if config.use_winner_preserving else None
    scaling = {"mu": mu, "per_pair": config.winner_preserving_per == "pair", "constant": config.constant_loser_scale}
    reference_error = batch.reference_error
    if config.official_reference_errors:
        low = DTYPES[config.mixed_precision]
        reference_error = (
            sample_error(reference.to(low), inputs.target.to(low)) if reference is not None else reference_error.to(low)
        )
    terms = pair_terms(
        prediction, reference, inputs.target, config.beta_dpo, reference_error=reference_error, **scaling
    )
    loss = pair_loss(config, family)(terms).mean()
    values = {"train_loss": loss.detach(), **pair_metrics(terms)}
    if run.reference_errors and reference is not None:
        values[REFERENCE_ERROR] = torch.cat([terms.reference_error_w, terms.reference_error_l])
    return loss, values


def micro_step(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Add the gradient of a micro-batch on the device to the policy's; returns what compute_loss measures."""
    loss, values = compute_loss(run, batch)
    one_or_nan = 1 + 0 * loss.detach()  # nan for a loss that is not finite: every rank's gradient shows it
    run.accelerator.backward(loss * one_or_nan)
    return values


@dataclass(frozen=True)
class Skipped:
    """An update that was not made: its gradient's norm, and the losses of this rank's micro-batches."""

    grad_norm: float
    losses: list[float]


def update(run: Run, micro_batches: Iterator[Batch]) -> Skipped | None:
    """Add up the gradients of the micro-batches, then let optimizer, schedule and average step once.

    If a loss or gradient of any rank is not finite, or the gradient's norm is above --skip_grad_norm_above, every rank
    leaves weights, optimizer, schedule and average as they are, and what was skipped is returned; None of an update
    that was made. To see that, the host waits for the device once. DeepSpeed's engine steps by itself and skips
    nothing.
    """
    measured: list[dict[str, Tensor]] = []
    device = run.accelerator.device
    for _ in range(run.plan.accumulation):
        batch = next(micro_batches)
        with run.accelerator.accumulate(run.policy):
            values = run.recorded(batch) if run.recorded else micro_step(run, batch.to(device))
            if REFERENCE_ERROR in values:
                run.reference_errors.add(run.step, values.pop(REFERENCE_ERROR))
            measured.append(values)
    limit = run.config.max_grad_norm or float("inf")
    norm = run.accelerator.clip_grad_norm_(run.policy.parameters(), limit)
    # DeepSpeed's is a float
    norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm, device=device)
    made = make_step(run, norm)
    in_place = run.recorded or isinstance(run.policy, DistributedDataParallel)  # a recording's own, or DDP's views
    run.optimizer.zero_grad(set_to_none=not in_place)
    run.step += 1
    if not made:
        run.meter.skipped += 1
        return Skipped(norm.item(), [values["train_loss"].item() for values in measured])
    run.meter.add([values | {"grad_norm": norm} for values in measured])
    run.schedule.step()
    if run.average:
        run.average.update()
    return None


def make_step(run: Run, norm: Tensor) -> bool:
    """Let the optimizer step unless the gradient's norm forbids it; returns whether it did."""
    if run.accelerator.distributed_type == DistributedType.DEEPSPEED:
        return True  # its engine stepped at the end of the backward pass
    norm, scaler = norm.item(), run.accelerator.scaler
    if not math.isfinite(norm) or norm > (run.config.skip_grad_norm_above or math.inf):
        if scaler is not None:  # in fp16
            scaler.update()  # ends what clipping began, and lowers the scale where the gradient overflowed
        return False
    run.optimizer.step()
    return True
