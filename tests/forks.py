"""Processes that are forks of one that has imported everything: they begin in milliseconds instead of seconds."""

import multiprocessing.forkserver
import os
import runpy
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["recording", "eval_generate", "conftest"])


def start(target, *arguments):
    """A process that calls a function of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the server finds the modules
        multiprocessing.forkserver.ensure_running()
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def run_script(script, flags, environment, log):
    """What a process does that runs a script of ours: with an environment, all that it says goes to a file."""
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(script), *map(str, flags)]
    with open(log, "wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    runpy.run_path(str(script), run_name="__main__")


@contextmanager
def started_on_ranks(ranks, script, flags, folder):
    """A script's processes on CPU ranks, as launchers start them, each with its log in a folder; none is left after."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": ROOT}
    processes = []
    try:
        for rank in range(ranks):
            own = {name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            process = start(run_script, script, list(flags), os.environ | own, Path(folder, f"rank-{rank}.log"))
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def finish(processes, seconds=300):
    """Exit codes, negative for signals; None for those that have not ended in time, which are killed."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes
