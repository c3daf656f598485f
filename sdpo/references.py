"""Errors of the reference, kept for runs that show it the same samples: `train.py --reference_cache DIR`.

What the reference is shown is a function of data, base model, seed, step and position. Runs that differ in loss, beta,
safeguard, learning rate or optimizer therefore get the same errors from it: the first one writes them down, two numbers
per pair, and the others read them bit for bit and do without the reference's forward pass.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from sdpo.config import Plan, TrainConfig
from sdpo.families import Family
from sdpo.pairs import Pairs
from sdpo.ranks import on_main
from sdpo.shards import Shards, refuse_changes, refuse_damaged

FLAGS = (  # that decide what the reference is shown, or how its numbers are rounded
    "random_crop", "no_hflip", "shared_flip", "draft_decoding", "proportion_empty_prompts",
    "noise_offset", "input_perturbation",
    "train_batch_size", "official_reference_errors", "mixed_precision", "allow_tf32", "compile", "channels_last",
)  # fmt: skip
ARITHMETIC = 3  # raised whenever this code gives the reference other numbers for the same key
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnownErrors:
    """Errors of the reference that were on file when the run began; what loader workers get."""

    shards: Shards
    places: dict[int, tuple[int, int]]  # update: file, row in it

    def read(self, step: int, position: int) -> Tensor | None:
        """Errors (2,) of winner and loser at a position in the global batch; None if they are not on file."""
        place = self.places.get(step)
        return None if place is None else self.shards.read(place)["errors"][position]


class ReferenceErrors:
    """Errors of the reference by update: those that are on file, and this run's until they are."""

    def __init__(self, shards: Shards, accelerator: Accelerator, plan: Plan):
        self.shards, self.accelerator, self.plan = shards, accelerator, plan
        self.known = KnownErrors(shards, dict(shards.places))
        self.new: dict[int, list[Tensor]] = {}  # update: (2B,) per micro-step of this rank, winners first

    def claim(self) -> None:
        """Make the folder these errors' own, for this run will begin; every rank calls this.

        Raises InputError where another run was first.
        """
        on_main(self.accelerator, self.shards.create)

    @property
    def complete(self) -> bool:
        """Whether the errors of every update of the run are on file."""
        return self.covered == self.plan.steps

    @property
    def covered(self) -> int:
        """Updates of the run whose errors are on file."""
        return sum(step < self.plan.steps for step in self.known.places)

    def add(self, step: int, errors: Tensor) -> None:
        """Take in the errors (2B,) of this rank's next micro-step, winners first."""
        self.new.setdefault(step, []).append(errors)

    def write(self, made: int) -> None:
        """Put what was taken in of the first `made` updates on file; every rank calls this.

        Training goes on without them if that fails.
        """
        steps = sorted(step for step in self.new if step < made)
        if not steps:
            return
        own = torch.stack([torch.stack(self.new[step]) for step in steps])  # (steps, micro-steps, 2B)
        ranks = self.accelerator.gather(own[None]).cpu().unflatten(-1, (2, -1))  # (ranks, steps, micro-steps, 2, B)
        # as data.py deals them out
        errors = ranks.permute(1, 2, 0, 4, 3).reshape(len(steps), self.plan.global_batch, 2)
        if self.accelerator.is_main_process:
            try:
                self.shards.write(steps, {"errors": errors.contiguous()}, {})
            except OSError as error:
                log.warning(
                    f"CAUTION: errors of {len(steps)} updates are not kept, for {self.shards.folder} takes no more "
                    f"({error.strerror or error}); the run goes on"
                )
        self.new = {}


def open_references(
    config: TrainConfig, accelerator: Accelerator, family: Family, plan: Plan, seed: int, pairs: Pairs
) -> ReferenceErrors | None:
    """The errors in --reference_cache, None without that flag; every rank calls this.

    Raises InputError for errors of other samples or another reference, and for damaged files.
    """
    if not config.reference_cache:
        return None
    key = on_main(accelerator, lambda: make_key(config, accelerator, family, plan, seed, pairs))
    shards = Shards(Path(config.reference_cache), key, "--reference_cache")
    refuse_changes([shards])
    shards.scan()
    refuse_damaged(shards.files)
    references = ReferenceErrors(shards, accelerator, plan)
    log.info(
        f"reference      errors of {references.covered:,} of {plan.steps:,} updates are in {config.reference_cache}"
    )
    return references


def make_key(
    config: TrainConfig, accelerator: Accelerator, family: Family, plan: Plan, seed: int, pairs: Pairs
) -> dict:
    """All that the errors depend on, down to rounding."""
    device = accelerator.device
    return {
        **family.describe(config.unet_init),
        "seed": seed,
        "pairs per update": plan.global_batch,
        "resolution": config.resolution or family.resolution,
        **{f"--{name}": getattr(config, name) for name in FLAGS},
        "latents": f"of --latent_cache in {config.latent_cache_dtype}" if config.latent_cache else "encoded",
        "captions, rows and labels": pairs.fingerprint(),
        **pairs.describe(),
        "arithmetic": ARITHMETIC,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        **{
            name: version(name) for name in ("diffusers", "transformers", "tokenizers", "ftfy", "pillow", "torchvision")
        },
    }
