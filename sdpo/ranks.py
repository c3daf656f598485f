"""The processes of a run: whether they found each other, how long they wait, what the main one does for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from sdpo.command import InputError, explain
from sdpo.files import brief

T = TypeVar("T")
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # while the main process fetches and prepares data


def check_precision(name: str) -> None:
    """Raises InputError for a --mixed_precision that this machine does not support."""
    if name == "fp16" and not torch.cuda.is_available():
        raise InputError("--mixed_precision fp16 (the default) needs a GPU: use --mixed_precision no or bf16 here")


def join_ranks(**options: Any) -> Accelerator:
    """The accelerator of this process, with the others that a launcher started; options are Accelerator's.

    Raises InputError for what cannot be used of the environment that a launcher made or has left.
    """
    numbers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    fix = "start with torchrun, accelerate or our launchers, or unset what they have left"
    for name in numbers:
        if not os.environ.get(name, "0").isdecimal():
            raise InputError(f"{name}={os.environ[name]} in the environment is not a number: {fix}")
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if rank >= ranks:
        raise InputError(f"RANK={rank} in the environment is not below WORLD_SIZE={ranks}: {fix}")
    try:
        accelerator = Accelerator(kwargs_handlers=[PATIENCE, *options.pop("kwargs_handlers", [])], **options)
    except ImportError as error:  # DeepSpeed is configured but not installed
        raise InputError(f"the launcher's configuration needs another package: {brief(error)}") from error
    except (ValueError, RuntimeError) as error:
        raise InputError(f"the launcher's settings cannot be used ({brief(error)}): {fix}") from error
    check_ranks(accelerator)
    return accelerator


def check_ranks(accelerator: Accelerator) -> None:
    """Raises InputError where a launcher started processes that did not join: each would do the whole work alone."""
    launched = "LOCAL_RANK" in os.environ or "RANK" in os.environ  # as launchers set them
    started = int(os.environ.get("WORLD_SIZE", 1)) if launched else 1
    if started != accelerator.num_processes:
        raise InputError(
            f"{started} processes were started, but {accelerator.num_processes} found each other, as where there are "
            "fewer GPUs: start one process per GPU, or set ACCELERATE_USE_CPU=true to run them on the CPU"
        )


def on_main(accelerator: Accelerator | PartialState, function: Callable[[], T]) -> T:
    """What the function returns on the main process, on every rank; its InputError is raised on every rank, too."""
    answer: list = [None, ""]  # result, what is wrong
    if accelerator.is_main_process:
        answer = _call(function)
    result, wrong = broadcast_object_list(answer)
    if wrong:
        raise InputError(wrong)
    return result


def together(function: Callable[[], T]) -> T:
    """What the function returns on this rank; the InputError of the first rank that has one is raised on every rank.

    Ranks must not wait for each other within the function.
    """
    result, wrong = _call(function)
    if first := next(filter(None, gather_object([wrong])), ""):
        raise InputError(first)
    return result


def main_first(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """As `together`, but the main process goes first, so that the others find what it has fetched or prepared."""
    main = accelerator.is_main_process
    result = together(lambda: function() if main else None)
    return together(lambda: result if main else function())


def _call(function: Callable[[], T]) -> list:
    """[what the function returns, what is wrong with what the user gave]."""
    try:
        return [function(), ""]
    except InputError as error:
        return [None, str(error)]
    except OSError as error:
        if not (wrong := explain(error)):
            raise
        return [None, wrong]
