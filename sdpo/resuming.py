"""Resuming from a checkpoint: what must not have changed meanwhile, and what is put back into the run."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

from sdpo.checkpoint import load_average, read_state
from sdpo.command import InputError, is_of_machine
from sdpo.config import TrainConfig
from sdpo.families import Family
from sdpo.files import brief
from sdpo.losses import PAIR_LOSSES
from sdpo.optimizers import OPTIMIZERS, optimizer_name
from sdpo.step import NO_EFFECT, Run, effective_settings, loss_name

log = logging.getLogger(__name__)

# Flags that a resumed run may change: they decide where and how it runs, or only the order of summation
FREE = {
    "output_dir", "logging_dir", "report_to", "tracker_project_name", "cache_dir",
    "resume_from_checkpoint", "resume_with_changes", "checkpointing_steps", "checkpoints_total_limit",
    "logging_steps", "validation_steps", "validation_prompts", "dataloader_num_workers",
    "max_unreadable_images", "max_skipped_updates", "reference_cache",
    "gradient_checkpointing", "activation_memory", "compile", "channels_last", "cuda_graphs",
    "hub_model_id", "local_rank", "hard_skip_resume",  # without effect
    "gradient_accumulation_steps", "global_batch_size",  # the plan says what they come to
    # the fingerprints of base and data say what these come to
    "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "unet_init", "revision",
    "dataset_name", "dataset_config_name", "train_data_dir", "split", "labels_file",
}  # fmt: skip
# Flags that decide which pairs are not trained on
HELD_OUT_FLAGS = ("validation_pairs", "validation_seed", "validation_split", "validation_data_dir")


def resume(run: Run, checkpoint: Path) -> None:
    """Put a checkpoint into the run; InputError if settings that shape the run differ and that is not meant."""
    refuse_other_base(run, checkpoint)
    then = read_state(checkpoint)
    changes = changed_flags(run.config, run.family, then) + changed_inputs(run, then)
    if not run.config.resume_with_changes:
        refuse_other_settings(checkpoint, changes)
    for change in changes:
        log.warning(f"CAUTION: resuming with a change: {change}")
    load_checkpoint(run, checkpoint)
    if run.step > run.plan.steps:
        raise InputError(
            f"{checkpoint} is beyond the run's {run.plan.steps} updates: raise --max_train_steps, name an earlier "
            "checkpoint with --resume_from_checkpoint, or choose another --output_dir"
        )
    log.info(f"resumed        {checkpoint}, after {run.step} updates")
    if run.step and holds_out_otherwise(run.config, then["config"]):
        log.warning(f"CAUTION: pairs that are held out now may be among those of the first {run.step} updates")


def refuse_other_settings(checkpoint: Path, changes: list[str]) -> None:
    """Raises InputError if there are changes."""
    if changes:
        raise InputError(
            f"{checkpoint} was made with other settings, so this would be another run: {'; '.join(changes)}. Restore "
            "them, choose another --output_dir, or add --resume_with_changes"
        )


def refuse_other_rank(config: TrainConfig, checkpoint: Path) -> None:
    """Raises InputError where adapters have another rank than those of a checkpoint, also where a change is meant."""
    rank = read_state(checkpoint)["config"].get("lora_rank", 0)
    if rank != config.lora_rank:
        raise InputError(
            f"{checkpoint} was trained with --lora_rank {rank}: go on with that, or {start_anew(checkpoint)}"
        )


def refuse_other_base(run: Run, checkpoint: Path) -> None:
    """Raises InputError where adapters would go on with another UNet than theirs, also where a change is meant."""
    if run.config.lora_rank and read_state(checkpoint)["base"].get("UNet") != run.base_fingerprints["UNet"]:
        raise InputError(
            f"the adapters in {checkpoint} were trained on another UNet: go on with that, or {start_anew(checkpoint)}"
        )


def start_anew(checkpoint: Path) -> str:
    """What to do with a checkpoint that a run cannot go on from."""
    return f"start a new run from its weights with --unet_init {checkpoint}/unet.pth"


def holds_out_otherwise(config: TrainConfig, then: dict[str, Any]) -> bool:
    """Whether other pairs of the training data are held out than with the settings that a checkpoint says."""
    from_training = config.validation_pairs and not (config.validation_split or config.validation_data_dir)
    return bool(from_training) and any(then.get(name) != getattr(config, name) for name in HELD_OUT_FLAGS)


def comparable(name: str, value: Any) -> Any:
    """What must not change of a setting: whether a latent cache is there, the real path of held-out data, else all."""
    if name == "latent_cache":
        return bool(value)  # its index.json is compared with data and base at every start
    return os.path.realpath(value) if name == "validation_data_dir" and value else value


def changed_flags(config: TrainConfig, family: Family, then: dict[str, Any]) -> list[str]:
    """Flags that shape the numbers of a run and differ from what a checkpoint was trained with, by its state `then`."""
    now = effective_settings(config, family)
    free = {*FREE, "seed"}
    if config.lr_scheduler.startswith("constant"):
        free |= {"max_train_steps", "num_train_epochs"}
    pooled = config.preserves_winners and config.winner_preserving_per == "batch"
    loss = PAIR_LOSSES.get(loss_name(config, family))  # none of sft
    if not (pooled or (loss and loss.per_micro_batch)):  # each pair counts for itself
        free |= {"train_batch_size"}
    changes = [
        f"--{name} was {then['config'][name]!r}, is {value!r}"
        for name, value in now.items()
        if name not in free
        and NO_EFFECT not in (value, then["config"].get(name, NO_EFFECT))  # by another flag, which is named itself
        and comparable(name, then["config"][name]) != comparable(name, value)
    ]
    if config.seed is not None and config.seed != then["seed"]:
        changes.append(f"--seed was {then['seed']}, is {config.seed}")
    return changes


def changed_inputs(run: Run, then: dict[str, Any]) -> list[str]:
    """What differs of pairs, global batch and base from what a checkpoint was trained with, by its state `then`."""
    plan, changes = run.plan, []
    for name, what in {"global_batch": "the global batch", "pairs": "the number of pairs"}.items():
        old, new = then["plan"].get(name), getattr(plan, name)
        if old != new:
            changes.append(f"{what} was {old}, is {new}")
    if then["plan"].get("pairs") == plan.pairs and then["data"] != run.data_fingerprint:
        changes.append("captions, labels or images of the pairs trained on have changed")
    return changes + [
        f"the base's {name} has changed"
        for name, value in run.base_fingerprints.items()
        if then["base"].get(name) != value
    ]


def load_checkpoint(run: Run, checkpoint: Path) -> None:
    """Put a checkpoint into a prepared run; raises InputError if it does not fit."""
    state = read_state(checkpoint)
    own = [{name: value for name, value in group.items() if name != "params"} for group in run.optimizer.param_groups]
    try:
        run.accelerator.load_state(str(checkpoint))
        run.accelerator.step = 0  # micro-steps, of which this run may make another number per update
        run.meter.load(state["meter"])
        if run.accelerator.distributed_type != DistributedType.DEEPSPEED:
            refuse_other_optimizer(run, own, checkpoint)
            check_restored(run)
    except InputError:
        raise
    except Exception as error:  # torch, pickle and the objects' own
        if is_of_machine(error):
            raise
        raise InputError(
            f"{checkpoint} cannot be resumed from ({brief(error)}); remove it, or resume from another one"
        ) from error
    if run.average:
        load_average(run, checkpoint)
    if run.accelerator.distributed_type != DistributedType.DEEPSPEED:
        keep_settings(run, own)
    run.step = state["step"]


def refuse_other_optimizer(run: Run, own: list[dict], checkpoint: Path) -> None:
    """Raises InputError if the state that was put back is another optimizer's: its groups lack settings of `own`."""
    groups = run.optimizer.param_groups
    if any(settings.keys() - group.keys() for group, settings in zip(groups, own, strict=True)):
        raise InputError(
            f"{checkpoint} holds the state of another optimizer: go on with that one, or {start_anew(checkpoint)}"
        )


def check_restored(run: Run) -> None:
    """Raises ValueError for state that accelerate puts back without a look, and that would end the process later."""
    if type(run.schedule.scheduler.last_epoch) is not int:
        raise ValueError("the schedule's epoch is not a number")
    moments = OPTIMIZERS[optimizer_name(run.config, run.family)].moments
    for parameter, state in run.optimizer.state.items():
        if not state:
            continue
        for name in moments:
            if not is_like(state.get(name), parameter):
                raise ValueError(f"{name} of the optimizer does not have the shape of its parameter")
        if isinstance(state.get("step"), Tensor) and state["step"].numel() != 1:
            raise ValueError("the optimizer's step is not a number")


def is_like(value: Any, parameter: Tensor) -> bool:
    """Whether a value is a tensor of a parameter's shape with memory of its own for every element."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.layout != torch.strided:
        return False
    value = value.to_local() if isinstance(value, DTensor) else value
    return value.untyped_storage().nbytes() >= value.nbytes and 0 not in value.stride()


def keep_settings(run: Run, own: list[dict]) -> None:
    """Keep this run's own settings of optimizer and schedule, in place of the checkpoint's that were just restored."""
    groups, schedule = run.optimizer.param_groups, run.schedule.scheduler
    schedule.base_lrs = [run.plan.learning_rate] * len(groups)
    for group, settings, factor in zip(groups, own, schedule.lr_lambdas, strict=True):
        group.update(settings | {"lr": run.plan.learning_rate * factor(schedule.last_epoch)})
