"""What the training benchmark lets compete: runs as train.py sets them up, by flags that differ, and the baseline."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

from benchmarks.architectures import Base
from benchmarks.baseline import OfficialLoop
from sdpo.arithmetic import recompute
from sdpo.batch import Batch
from sdpo.config import Plan, TrainConfig
from sdpo.families import Family
from sdpo.inputs import make_inputs, normalise
from sdpo.losses import sample_error
from sdpo.memory import checkpoint_units, choose_checkpointing
from sdpo.rng import draw, normal
from sdpo.step import AUTOCAST, Run, build_run, update
from sdpo.tiny import pictures

CHOSEN: dict[tuple[TrainConfig, bool], dict[str, bool]] = {}  # units recomputed, by run


def give_back_memory() -> None:
    """Free what nobody refers to, on the device too; measuring free memory depends on it."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def cache_latents(run: Run, batch: Batch) -> Batch:
    """The batch as it comes from a latent cache; the encoders are taken off the device."""
    family, device = run.family, run.accelerator.device
    moments = family.encode_moments(normalise(batch.pixels.to(device))).cpu()
    texts = {name: value.cpu() for name, value in family.encode_texts(batch.captions).items()}
    for model in (family.vae, *family.text_encoders):
        model.cpu()
    give_back_memory()
    cached = dataclasses.replace(batch, pixels=None, moments=moments, texts=texts)
    return cached.pin_memory() if device.type == "cuda" else cached


def know_reference(run: Run, batch: Batch) -> Batch:
    """The batch with errors of the reference as an earlier run leaves them; the reference is given up."""
    inputs = make_inputs(run.family, batch.to(run.accelerator.device))
    with run.accelerator.autocast(), torch.no_grad():
        prediction = run.family.predict(run.reference, inputs.noisy, inputs.timesteps, inputs.conditioning)
    known = sample_error(prediction, inputs.target).cpu()
    run.reference = None
    give_back_memory()
    return dataclasses.replace(batch, reference_error=known.pin_memory() if torch.cuda.is_available() else known)


def choose_activations(run: Run, batch: Batch) -> Batch:
    """Compute as few activations again as fit into the memory, as train.py does; chosen in the first turn only."""
    chosen = CHOSEN.setdefault((run.config, run.reference is None), {})
    if not chosen:
        choose_checkpointing(run, batch)
        chosen |= {name: unit.gradient_checkpointing for name, unit in checkpoint_units(run.policy).items()}
    run.policy.enable_gradient_checkpointing(recompute)
    for name, unit in checkpoint_units(run.policy).items():
        unit.gradient_checkpointing = chosen[name]
    return batch


def unfuse_optimizer(run: Run, batch: Batch) -> Batch:
    """The kernels that torch chooses for AdamW when it is not asked for fused ones."""
    for group in run.optimizer.param_groups:
        group |= {"fused": None, "foreach": None}
    return batch


def attend_by(processor: type, run: Run, batch: Batch) -> Batch:
    """Attention as this class of diffusers computes it, for policy and reference."""
    for unet in (run.policy, run.reference):
        unet.set_attn_processor(processor())
    return batch


def hold_reference_in_fp32(run: Run, batch: Batch) -> Batch:
    """The reference's weights as the policy's: cast at every use."""
    run.reference.float()
    return batch


def fetch_figures(run: Run, batch: Batch) -> Batch:
    """Seven figures fetched from the device in every micro-step, as the official loop does."""
    backward = run.accelerator.backward

    def fetch_and_backward(loss: Tensor) -> None:
        for _ in range(7):
            run.accelerator.gather(loss.detach()).item()
        backward(loss)

    run.accelerator.backward = fetch_and_backward
    return batch


@dataclass(frozen=True)
class Variant:
    """Flags that differ from the default, and what is changed in a run before its first update."""

    flags: dict[str, Any] = field(default_factory=dict)
    changes: tuple[Callable[[Run, Batch], Batch], ...] = ()
    on_gpu: dict[str, Any] | None = None  # flags there, if they are others


CPU_GIB = 4.0  # of activations, where there is no device memory to go by
AUTO = {"gradient_checkpointing": "auto"}
CHANNELS_LAST = {"channels_last": True}
GRAPHS = {"latent_cache": "of random pairs", "cuda_graphs": True}
FAST = {"flags": AUTO | CHANNELS_LAST, "on_gpu": AUTO | GRAPHS}
FULL = {"gradient_checkpointing": "full"}
COMPILED = {name: flags | CHANNELS_LAST | {"compile": True} for name, flags in FAST.items()}
VARIANTS = {
    "baseline": Variant(),  # of which only the flags count
    "default": Variant(),
    "fast": Variant(changes=(cache_latents, choose_activations), **FAST),
    "fast, known reference": Variant(changes=(cache_latents, know_reference, choose_activations), **FAST),
    "fast, compiled": Variant(changes=(cache_latents, choose_activations), **COMPILED),
    # the same graphs in little memory
    "compiled, full checkpointing": Variant(
        changes=(cache_latents,), **{name: flags | FULL for name, flags in COMPILED.items()}
    ),
    # one change each
    "cached latents": Variant(changes=(cache_latents,)),
    "known reference": Variant(changes=(know_reference,)),
    "channels last": Variant(CHANNELS_LAST),
    "CUDA graphs": Variant(changes=(cache_latents,), on_gpu=GRAPHS),  # to be compared with cached latents
    "fused attention": Variant(changes=(partial(attend_by, AttnProcessor2_0),)),
    "unfused attention": Variant(changes=(partial(attend_by, AttnProcessor),)),
    "reference in fp32": Variant(changes=(hold_reference_in_fp32,)),
    "figures fetched": Variant(changes=(fetch_figures,)),
    "unfused AdamW": Variant(changes=(unfuse_optimizer,)),
    "Adafactor": Variant({"optimizer": "adafactor"}),
    "AdamW in 8 bits": Variant({"optimizer": "adamw8bit"}),
    "averaged weights": Variant({"use_ema": True}),
    "full checkpointing": Variant(FULL),
}


def make_batch(family: Family, config: TrainConfig) -> Batch:
    """Random pairs as a loader leaves them: uint8 pixels, captions and noise on the host."""
    pairs, size = config.train_batch_size, config.resolution
    shape = family.latent_shape(size)
    noise = normal(0, "benchmark-noise", (0,), (pairs, *shape))
    pixels = draw(0, "benchmark-pixels").integers(0, 256, (2 * pairs, 3, size, size), dtype=np.uint8)
    batch = Batch(
        pixels=torch.from_numpy(pixels),
        moments=None,
        texts=None,
        captions=[spec.caption for spec in itertools.islice(itertools.cycle(pictures.HELD_OUT), pairs)],
        noise=noise,
        input_noise=None,
        reference_error=None,
        posterior_noise=normal(0, "benchmark-posterior", (0,), (2 * pairs, *shape)),
        uniform=torch.from_numpy(draw(0, "benchmark-timestep").random(pairs, dtype=np.float32)),
        unreadable=[],
    )
    return batch.pin_memory() if torch.cuda.is_available() else batch


class OurLoop:
    """A run as train.py sets it up, fed with one host batch."""

    def __init__(self, config: TrainConfig, family: Family, variant: Variant):
        self.config, self.family = config, family
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, kwargs_handlers=[AUTOCAST], step_scheduler_with_optimizer=False
        )
        self.run = build_run(config, self.accelerator, family, Plan.of(config, 1, pairs=config.max_train_steps), seed=0)
        batch = make_batch(family, config)
        for change in variant.changes:
            batch = change(self.run, batch)
        self.run.prepare()
        self.policy, self.reference, self.optimizer = self.run.policy, self.run.reference, self.run.optimizer
        self.batches = itertools.repeat(batch)
        self.first_margin: float | None = None  # of the first update, whose policy and reference are equal

    def take_micro_steps(self, number: int) -> None:
        """Make updates of so many micro-steps from now on."""
        self.run.plan = dataclasses.replace(self.run.plan, accumulation=number)
        self.accelerator.gradient_accumulation_steps, self.accelerator.step = number, 0

    @property
    def warm(self) -> bool:
        """Whether the updates to come do the same work as the last one."""
        return self.run.recorded is None or bool(self.run.recorded.recordings)

    def update(self) -> None:
        """One optimizer step, and its figures fetched once."""
        if update(self.run, self.batches) is not None:
            raise RuntimeError("an update was skipped: random weights gave a loss or gradient that is not finite")
        figures = self.run.meter.reduce()
        if self.first_margin is None:
            self.first_margin = figures["rewards/margins"]


def build(base: Base, name: str, device: torch.device) -> OurLoop | OfficialLoop:
    """A contestant with fresh models; what the one before it left is given back first."""
    give_back_memory()
    torch.compiler.reset()  # its limit of variants of a function is not for models that come and go
    torch.manual_seed(0)
    variant = VARIANTS[name]
    on_gpu = device.type == "cuda" and variant.on_gpu is not None
    flags = dict(variant.on_gpu if on_gpu else variant.flags)
    if flags.get("gradient_checkpointing") == "auto":  # within a budget, or else what is free on the GPU
        flags["activation_memory"] = CPU_GIB if device.type == "cpu" else None
    config, family = base.config(**flags), base.build(device)
    if name == "baseline":
        return OfficialLoop(config, family, make_batch(family, config))
    return OurLoop(config, family, variant)
