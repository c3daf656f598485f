"""Checkpoints that are either whole or absent.

checkpoint-{step}/ holds unet.pth (plain fp32 state dict), unet_ema.pth, adapters by themselves if they are trained,
state.json (Run.state), accelerate's optimizer, schedule and scaler, the policy's shards under FSDP2 and DeepSpeed, and
files.json: size and sha256 of all of these, written last. Data and random numbers are functions of the step:
accelerate's random states are saved, but nothing depends on them.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn

from sdpo.adapters import adapted_layers, load_adapters, merge, save_adapters
from sdpo.command import NO_ROOM, InputError
from sdpo.config import TrainConfig
from sdpo.files import error_number, parse_json, read_text, sha256, sync, write_file, write_json
from sdpo.hub import load_fitting_state, load_weights
from sdpo.step import Run

ADAPTERS = "pytorch_lora_weights{}.safetensors"  # with an ending; without one, what diffusers looks for in a folder
BEGIN_ANEW = (None, "", "none")  # values of --resume_from_checkpoint
log = logging.getLogger(__name__)


@contextmanager
def writing_to(folder: str | Path) -> Iterator[None]:
    """Say in an InputError that the folder is full, and what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if (getattr(error, "errno", None) or error_number(error)) in NO_ROOM:
            reason = getattr(error, "strerror", None) or "a write failed"
            free = shutil.disk_usage(folder).free / 2**30
            left = (
                "the checkpoints already written are intact" if list_checkpoints(folder) else "no checkpoint is there"
            )
            raise InputError(
                f"{folder} cannot hold more ({reason}; {free:.3g} GiB free): free space there, lower "
                f"--checkpoints_total_limit or choose another --output_dir; {left}"
            ) from error
        raise


def save_state_dict(state: dict[str, Tensor], path: Path) -> None:
    """Write parameters as a plain fp32 state dict on the CPU."""
    state = {name: value.detach().float().cpu().contiguous() for name, value in state.items()}

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:  # given a path, torch would put its random name into the file
            torch.save(state, file)

    write_file(path, write)


def save_policy(accelerator: Accelerator, policy: nn.Module, folder: Path, ending: str = "") -> dict[str, Tensor]:
    """Write unet{ending}.pth, with adapters merged into it, and these by themselves; every rank calls this.

    Returns what unet{ending}.pth holds, nothing on other processes.
    """
    state = accelerator.get_state_dict(policy)
    if not accelerator.is_main_process:
        return {}
    merged = merge(state)
    save_state_dict(merged, folder / f"unet{ending}.pth")
    save_adapters(state, folder / ADAPTERS.format(ending))
    return merged


def save_average(run: Run, folder: Path) -> None:
    """Write the averaged weights as save_policy does, with the ending _ema; every rank calls this."""
    with run.average.in_place():
        save_policy(run.accelerator, run.policy, folder, "_ema")


def load_average(run: Run, folder: Path) -> None:
    """Take the averaged weights from what save_average wrote; raises InputError if there is none, or it does not fit.

    Every rank calls this.
    """
    if not (folder / "unet_ema.pth").is_file():
        raise InputError(f"{folder} has no unet_ema.pth: it was trained without --use_ema; resume without it")
    if adapted_layers(run.average.model):
        with run.average.in_place():
            load_adapters(run.average.model, folder / ADAPTERS.format("_ema"))
    else:
        run.average.load(load_fitting_state(run.average.model, folder / "unet_ema.pth"))


def register_hooks(accelerator: Accelerator, policy: nn.Module) -> None:
    """Have accelerate keep the policy as save_policy does: in place of its own copy, or beside an engine's shards."""

    def save(models, weights, folder):
        save_policy(accelerator, policy, Path(folder))
        weights.clear()

    def load(models, folder):
        for model in map(accelerator.unwrap_model, models):  # none under FSDP and DeepSpeed: these put back shards
            if adapted_layers(model):
                load_adapters(model, Path(folder, ADAPTERS.format("")))
            else:
                load_weights(model, Path(folder, "unet.pth"))
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(run: Run, prune: bool = True) -> Path:
    """Write checkpoint-{step}; every rank calls this. The folder has its name only when it is complete and on the disk.

    New errors of the reference are kept before; older checkpoints beyond --checkpoints_total_limit are removed then,
    unless `prune` is False. Raises InputError, and leaves these as they were, if it cannot be written.
    """
    accelerator = run.accelerator
    config = run.config
    if run.reference_errors:
        run.reference_errors.write(run.step)
    state = run.state() | {"prune": prune}
    folder = Path(config.output_dir, f"checkpoint-{run.step}")
    partial = folder.with_name(folder.name + ".partial")
    try:
        with writing_to(config.output_dir):
            accelerator.save_state(str(partial))
            if run.average:
                save_average(run, partial)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_json(partial / "state.json", state)
                seal(partial)
                put_in_place(partial, folder)
                if prune:
                    remove_older(config, folder)
            accelerator.wait_for_everyone()
    except BaseException:
        if accelerator.is_main_process:  # no other rank: it might delete from what the main process moves into place
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def seal(folder: Path) -> None:
    """Put every file on the disk, then files.json with the size in bytes and the sha256 of each."""
    files = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / "files.json", files)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole: every file as files.json has it."""
    try:
        files = json.loads((folder / "files.json").read_text())
        known = {Path(folder, name): (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return "files.json is missing: it was not finished, or another trainer wrote it"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "files.json cannot be read"
    for name in ("state.json", "unet.pth"):
        if folder / name not in known:
            return f"files.json does not list {name}"
    for path, (size, _) in known.items():
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes instead of {size}"
    for path, (_, digest) in known.items():
        if sha256(path) != digest:
            return f"{path.name} has changed since it was written (sha256 differs)"
    return None


def misplaced(folder: Path) -> str | None:
    """What is wrong with the number in the name of an undamaged checkpoint, or None: it is that of its updates."""
    try:
        step = read_state(folder)["step"]
    except InputError as error:
        return str(error)
    return None if step_of(folder) == step else f"it is of update {step} and has been renamed"


def put_in_place(partial: Path, folder: Path) -> None:
    """Give a complete checkpoint its name; one that had it before, from an abandoned or damaged run, goes then."""
    removed = folder.with_name(folder.name + ".removed")
    if os.path.lexists(folder):  # also as a link to a disk that is not there
        os.replace(folder, removed)
    os.replace(partial, folder)
    sync(folder.parent)
    delete(removed)


def remove(folder: Path) -> None:
    """Take away the name of a checkpoint, then its files, so that half of it is never taken for a checkpoint."""
    removed = folder.with_name(folder.name + ".removed")
    os.replace(folder, removed)
    sync(folder.parent)
    delete(removed)


def delete(removed: Path) -> None:
    """Delete the files of a checkpoint that has lost its name, or the link or file that it was, if there are any."""
    if removed.is_symlink() or removed.is_file():
        removed.unlink()
    shutil.rmtree(removed, ignore_errors=True)


def remove_remains(output_dir: str | Path) -> None:
    """Delete what a crash while writing or removing a checkpoint has left."""
    for ending in ("partial", "removed"):
        for path in Path(output_dir).glob(f"checkpoint-*.{ending}"):
            delete(path)


def remove_older(config: TrainConfig, newest: Path) -> None:
    """Remove the oldest checkpoints up to the newest one beyond --checkpoints_total_limit.

    Those of more updates are of another run.
    """
    found = list_checkpoints(newest.parent)
    if config.checkpoints_total_limit and newest in found:
        for path in found[: found.index(newest) + 1][: -config.checkpoints_total_limit]:
            remove(path)


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints in a folder, whole or not, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Updates made when a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def choose_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means.

    Raises InputError if it is damaged, if none is whole, or if there are some and none is wanted.
    """
    wanted = config.resume_from_checkpoint
    if wanted in BEGIN_ANEW:
        if found := list_checkpoints(config.output_dir):
            raise InputError(
                f"--resume_from_checkpoint {wanted}: {found[-1]} would later be taken for one of the new run: choose "
                "another --output_dir, or delete the checkpoints there"
            )
        return None
    if wanted == "latest":
        return newest_whole(config.output_dir)
    places = (Path(wanted), Path(config.output_dir, Path(wanted).name))
    path = next((place for place in places if place.is_dir()), None)
    wrong = damage(path) if path else "no such folder"
    if wrong:
        raise InputError(
            f"--resume_from_checkpoint {wanted}: not a checkpoint of this trainer, or a damaged one ({wrong}). "
            f"Use 'latest', or 'none' to begin anew{start_from(path)}"
        )
    return path


def start_from(checkpoint: Path | None) -> str:
    """What to do with a folder that is not a checkpoint, if it holds weights at least."""
    weights = checkpoint / "unet.pth" if checkpoint else None
    return f", or start a new run from its weights with --unet_init {weights}" if weights and weights.is_file() else ""


def newest_whole(folder: str | Path) -> Path | None:
    """The newest undamaged checkpoint, None if there are none at all; InputError if there are only damaged ones."""
    found = list_checkpoints(folder)
    wrong = {}
    for path in reversed(found):
        reason = damage(path) or misplaced(path)
        if reason is None:
            return path
        wrong[path] = reason
        log.warning(f"CAUTION: {path} is damaged and not used: {reason}")
    if found:
        newest = found[-1]
        raise InputError(
            f"--resume_from_checkpoint latest: none of the {len(found)} checkpoints in {folder} is whole "
            f"({newest.name}: {wrong[newest]}); delete them to start again, or choose another --output_dir"
            f"{start_from(newest)}"
        )
    return None


def set_aside(paths: list[Path], ending: str, why: str) -> None:
    """Rename checkpoints, so that `latest` does not mean them; earlier ones of that name stay."""
    for path in paths:
        numbers = itertools.count(2)
        aside = path.with_name(f"{path.name}.{ending}")
        while aside.exists():
            aside = path.with_name(f"{path.name}.{ending}-{next(numbers)}")
        os.replace(path, aside)
        log.warning(f"CAUTION: {path} {why}, and is now {aside.name}")


def read_state(checkpoint: Path) -> dict:
    """state.json of a checkpoint: what Run.state gave; raises InputError for anything else."""
    path = checkpoint / "state.json"
    fix = "remove the checkpoint, or resume from another one"
    state = parse_json(read_text(path), path, fix)
    kinds = {"step": int, "seed": int, "config": dict, "plan": dict, "data": str, "base": dict, "meter": dict}
    known = isinstance(state, dict) and all(type(state.get(key)) is kind for key, kind in kinds.items())
    if not known or min(state["step"], state["seed"]) < 0:
        raise InputError(
            f"{path} does not hold step and seed, both 0 or more, config, plan, data, base and meter; {fix}"
        )
    counts = [state["meter"].get(name) for name in ("made", "skipped")]
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise InputError(f"{path} does not hold the numbers of updates made and skipped; {fix}")
    sums = state["meter"].get("sums")
    numbers = isinstance(sums, dict) and all(isinstance(values, list) for values in sums.values())
    if not numbers or not all(isinstance(x, int | float) for values in sums.values() for x in values):
        raise InputError(f"{path} does not hold the meter's sums as lists of numbers; {fix}")
    if not all(isinstance(value, int | float) for value in state["plan"].values()):
        raise InputError(f"{path} does not hold the plan as numbers; {fix}")
    return state
