"""Checkpoints that are either whole or absent, and resuming from them.

checkpoint-{step}/ holds unet.pth (plain fp32 state dict), unet_ema.pth, state.json (step, seed, config) and
accelerate's optimizer, schedule and scaler. Nothing about data or random numbers is needed: both are functions of the
step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sdpo.config import InputError, Plan, TrainConfig
from sdpo.families import load_weights
from sdpo.files import brief, parse_json, read_text


def write_file(path: Path, write) -> None:
    """Let `write` make the file under another name and move it into place, so that it is never seen half written."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def save_state_dict(state: dict[str, Tensor], path: Path) -> None:
    """Write parameters as a plain fp32 state dict on the CPU."""
    state = {name: value.detach().float().cpu().contiguous() for name, value in state.items()}
    write_file(path, lambda partial: torch.save(state, partial))


def register_hooks(accelerator: Accelerator, unet: nn.Module) -> None:
    """Have accelerate keep the policy in unet.pth instead of a second copy of its own."""

    def save(models, weights, folder):
        state = accelerator.get_state_dict(unet)
        if accelerator.is_main_process:
            save_state_dict(state, Path(folder, "unet.pth"))
        weights.clear()

    def load(models, folder):
        if models:  # FSDP and DeepSpeed put back their own shards
            load_weights(accelerator.unwrap_model(unet), Path(folder, "unet.pth"))
            models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(
    accelerator: Accelerator, config: TrainConfig, plan: Plan, ema: AveragedModel | None, step: int, seed: int
) -> Path:
    """Write checkpoint-{step}; every rank calls this. The folder has its name only when it is complete."""
    folder = Path(config.output_dir, f"checkpoint-{step}")
    partial = folder.with_name(folder.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        if ema is not None:
            save_state_dict(ema.module.state_dict(), partial / "unet_ema.pth")
        shape = {"config": dataclasses.asdict(config), "plan": dataclasses.asdict(plan)}
        state = {"step": step, "seed": seed, **shape}
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
        for old in (
            list_checkpoints(config.output_dir)[: -config.checkpoints_total_limit]
            if config.checkpoints_total_limit
            else []
        ):
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    found = [
        path
        for path in Path(folder).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal() and (path / "state.json").is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, if any; raises InputError if a folder is named that is none."""
    wanted = config.resume_from_checkpoint
    if wanted in (None, "", "none"):
        return None
    if wanted == "latest":
        found = list_checkpoints(config.output_dir)
        return found[-1] if found else None
    for path in (Path(wanted), Path(config.output_dir, Path(wanted).name)):
        if (path / "state.json").is_file() and (path / "unet.pth").is_file():
            return path
    raise InputError(
        f"--resume_from_checkpoint {wanted}: not a checkpoint of this trainer (state.json or unet.pth missing). "
        f"Use 'latest', or start a new run from its weights with --unet_init {wanted}/unet.pth"
    )


def read_state(checkpoint: Path) -> dict:
    """state.json of a checkpoint: step, seed, config and plan; raises InputError for anything else."""
    path, fix = checkpoint / "state.json", "remove the checkpoint, or resume from another one"
    state = parse_json(read_text(path), path, fix)
    kinds = {"step": int, "seed": int, "config": dict}
    known = isinstance(state, dict) and all(type(state.get(key)) is kind for key, kind in kinds.items())
    if not known or min(state["step"], state["seed"]) < 0:
        raise InputError(f"{path} does not hold step and seed, both 0 or more, and config; {fix}")
    plan = state.get("plan", {})
    if not isinstance(plan, dict) or not all(isinstance(value, int | float) for value in plan.values()):
        raise InputError(f"{path} does not hold the plan as numbers; {fix}")
    return state


# Flags that a resumed run may change: they decide where and how it runs, or only the order of summation
FREE = {
    *("output_dir", "logging_dir", "report_to", "tracker_project_name", "cache_dir"),
    *("resume_from_checkpoint", "resume_with_changes", "checkpointing_steps", "checkpoints_total_limit"),
    *("logging_steps", "validation_steps", "validation_prompts", "dataloader_num_workers"),
    *("max_unreadable_images", "max_skipped_updates"),
    *("gradient_checkpointing", "activation_memory", "compile", "channels_last"),
    *("gradient_accumulation_steps", "global_batch_size"),  # the plan says what they come to
}


def changed_settings(config: TrainConfig, plan: Plan, checkpoint: Path) -> list[str]:
    """What shapes the numbers of a run and differs from what the checkpoint was trained with."""
    then, now, free = read_state(checkpoint), dataclasses.asdict(config), {*FREE, "seed"}
    if config.lr_scheduler.startswith("constant"):
        free |= {"max_train_steps", "num_train_epochs"}
    if not config.use_winner_preserving or config.winner_preserving_per == "pair":
        free |= {"train_batch_size"}
    changes = [
        f"--{name} was {then['config'][name]!r}, is {value!r}"
        for name, value in now.items()
        if name not in free and name in then["config"] and then["config"][name] != value
    ]
    if config.seed is not None and config.seed != then["seed"]:
        changes.append(f"--seed was {then['seed']}, is {config.seed}")
    for name, what in {"global_batch": "the global batch", "pairs": "the number of pairs"}.items():
        old, new = then.get("plan", {}).get(name), getattr(plan, name)
        if old not in (None, new):
            changes.append(f"{what} was {old:,}, is {new:,}")
    return changes


def load_checkpoint(accelerator: Accelerator, ema: AveragedModel | None, checkpoint: Path) -> int:
    """Put a checkpoint into the prepared objects and return the number of updates it has seen."""
    try:
        accelerator.load_state(str(checkpoint))
    except InputError:
        raise
    except Exception as error:  # torch, pickle and the objects' own
        raise InputError(
            f"{checkpoint} cannot be resumed from ({brief(error)}); remove it, or resume from another one"
        ) from error
    if ema is not None:
        if not (checkpoint / "unet_ema.pth").is_file():
            raise InputError(f"{checkpoint} has no unet_ema.pth: it was trained without --use_ema; resume without it")
        load_weights(ema.module, checkpoint / "unet_ema.pth")
    return read_state(checkpoint)["step"]
