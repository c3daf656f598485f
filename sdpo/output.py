"""The output folder of a run: kept from other runs, checked, and tidied of what they left."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdpo.checkpoint import ADAPTERS, list_checkpoints, read_state, remove_older, remove_remains, set_aside, step_of
from sdpo.command import InputError
from sdpo.config import TrainConfig
from sdpo.files import PARTIAL, alone, can_be_written
from sdpo.heldout import HELD_OUT_FILE
from sdpo.step import Run

RESULTS = (
    "unet.pth", "unet_ema.pth", ADAPTERS.format(""), ADAPTERS.format("_ema"), "unet", "config.json", "metrics.jsonl",
    HELD_OUT_FILE, "validation",
)  # fmt: skip
OWN_FILES = ("model_index.json", *RESULTS)  # all that a run writes by name, but for the parts of its pipeline
EVALUATED = (  # what an evaluation of a run's weights leaves beside them
    "*_seed*cfg", "*_seed*cfg.json*", "*_seed*cfg.zip", "scores.*", "summary.json", "summary.csv", "joint_test_*.log",
    "report.html", "eval-*",
)  # fmt: skip
log = logging.getLogger(__name__)


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder, and remove what a killed one left half written.

    Raises InputError if there is another one. Every rank enters this, the first one speaks for all.
    """
    if "LOCAL_RANK" in os.environ and os.environ.get("RANK", "0") != "0":  # as launchers set both
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    busy = f"another run is in {folder}: wait until it ends, or choose another --output_dir"
    with alone(Path(folder, ".lock"), busy):
        for path in Path(folder).glob(PARTIAL):
            own = path.name.startswith("labels_") or path.name.rsplit(".", 2)[0] in OWN_FILES
            if own and path.is_file():  # others may be those of an evaluation that goes on
                path.unlink()
        remove_remains(folder)
        yield


def tidy_output(run: Run, checkpoint: Path | None) -> None:
    """Move what is of another run in the output folder out of the way, and finish the removals that a killed run began.

    `checkpoint` is what the run goes on from, None if it starts from the base.
    """
    config = run.config
    if not run.accelerator.is_main_process:
        return
    if checkpoint is None or checkpoint.parent.resolve() != Path(config.output_dir).resolve():
        set_results_aside(Path(config.output_dir), config.logging_dir, anew=checkpoint is None)
        return
    if config.resume_from_checkpoint != "latest":
        found = list_checkpoints(config.output_dir)  # one of as many updates is there if the resumed one was set aside
        later = [path for path in found if step_of(path) >= run.step and path.resolve() != checkpoint.resolve()]
        set_aside(later, "abandoned", "was not written before the one resumed from")
    if read_state(checkpoint).get("prune"):
        remove_older(config, checkpoint)


def check_places(config: TrainConfig, parts: list[str]) -> None:
    """Raises InputError where the model cannot be written: over another one, or where names are taken.

    Nor may the tracker's files take the place of what else is in the folder.
    """
    folder = Path(config.output_dir)
    own = folder.resolve()
    logs = os.path.normpath(os.path.join(config.logging_dir, config.tracker_project_name))
    name = os.path.relpath(os.path.realpath(folder / logs), own).split(os.sep)[0]
    if name in (*parts, *OWN_FILES) or re.fullmatch(r"(checkpoint|earlier)-\d+", name):
        raise InputError(f"--logging_dir: {logs} would be in the place of something else: name another folder")
    if config.report_to in ("tensorboard", "all") and not can_be_written(folder / logs):
        raise InputError(f"--logging_dir: {folder / logs} cannot be written: name another folder")
    if own.name in parts and (own.parent / "model_index.json").is_file():
        raise InputError(f"--output_dir {folder} is a part of the model in {own.parent}: name another folder")
    if other := find_other_model(folder):
        raise InputError(f"{other} is not of a run of train.py, which would write over it: name another --output_dir")
    places = [folder / name for name in parts]
    in_the_way = [place for place in places if place.is_symlink() or (place.exists() and not can_be_written(place))]
    in_the_way += [place for name in OWN_FILES if "." in name and (place := folder / name).is_dir()]
    if in_the_way:
        raise InputError(
            f"{in_the_way[0]} is in the way of the trained model, a link, or cannot be written: move it, or choose "
            "another --output_dir"
        )


def find_other_model(folder: Path) -> Path | None:
    """The file that describes a model, or a part of one, in a folder without anything that a run of train.py leaves."""
    left = ("unet.pth", "metrics.jsonl", HELD_OUT_FILE, "checkpoint-*", "earlier-*")
    if any(any(folder.glob(pattern)) for pattern in left):
        return None
    with suppress(OSError, ValueError, AttributeError, RecursionError):  # not there, or not a run's
        if {"config", "plan"} <= json.loads((folder / "config.json").read_text(encoding="utf-8")).keys():
            return None
    return next((path for name in ("model_index.json", "config.json") if (path := folder / name).is_file()), None)


def set_results_aside(folder: Path, logging_dir: str, anew: bool) -> None:
    """Move what a run left in a folder, and what evaluations of its weights left beside them, into earlier-N there.

    The other parts of its pipeline stay, to be written over. Where the next run starts from the base (`anew`), that is
    done only if this one had ended.
    """
    own_logs = [logging_dir] if re.fullmatch(r"[\w-]+", logging_dir) else []  # a folder of the output folder's own
    names = (*RESULTS, *own_logs)
    results = [folder / name for name in names if (folder / name).exists()] + list_checkpoints(folder)
    if not results or (anew and folder / "unet.pth" not in results):
        return
    evaluated = {path for pattern in EVALUATED for path in folder.glob(pattern)}
    number = next(number for number in itertools.count(1) if not (folder / f"earlier-{number}").exists())
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for path in dict.fromkeys([*results, *sorted(evaluated)]):  # each once, also where --logging_dir is called eval-*
        os.replace(path, aside / path.name)
    log.warning(f"CAUTION: {folder} held the results of another run, which are now in {aside}")


def space_cautions(folder: str | Path, sizes: dict[str, int]) -> list[str]:
    """Warnings of what will not fit into a folder; `sizes` are bytes by what takes them."""
    free = shutil.disk_usage(folder).free
    return [
        f"{folder} has {free / 2**30:.3g} GiB free and {what} takes about {size / 2**30:.3g} GiB: "
        "free space there or choose another --output_dir"
        for what, size in sizes.items()
        if free < size
    ]
