"""The processes of a run: whether they found each other, how long they wait, what the main one does for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from sdpo.command import InputError

T = TypeVar("T")
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # while the main process fetches and prepares data


def check_ranks(accelerator: Accelerator) -> None:
    """Raises InputError where a launcher started processes that did not join: each would do the whole work alone."""
    started = int(os.environ.get("WORLD_SIZE") or 1) if "LOCAL_RANK" in os.environ else 1  # as launchers set both
    if started != accelerator.num_processes:
        raise InputError(
            f"{started} processes were started, but {accelerator.num_processes} found each other, as where there are "
            "fewer GPUs: start one process per GPU, or set ACCELERATE_USE_CPU=true to run them on the CPU"
        )


def on_main(accelerator: Accelerator | PartialState, function: Callable[[], T]) -> T:
    """What the function returns on the main process, on every rank; its InputError is raised on every rank, too."""
    answer: list = [None, None]  # result, what is wrong
    if accelerator.is_main_process:
        try:
            answer[0] = function()
        except InputError as error:
            answer[1] = str(error)
    result, wrong = broadcast_object_list(answer)
    if wrong:
        raise InputError(wrong)
    return result
