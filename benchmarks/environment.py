"""Where and when a benchmark ran, and by which command."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def environment(device: str | torch.device, *packages: str) -> dict[str, Any]:
    """Device, cores, date, command, and versions of torch and the named packages."""
    device = torch.device(device)
    versions = {name: version(name) for name in ("torch", *packages)} | {"python": platform.python_version()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    threads = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} " if "OMP_NUM_THREADS" in os.environ else ""
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"{threads}python {script} {shlex.join(sys.argv[1:])}".strip(),
        "device": device.type,
        "name": name,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
