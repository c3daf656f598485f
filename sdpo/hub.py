"""Single files from the hub, and the tensors in weights files."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import InitProcessGroupKwargs
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from sdpo.config import InputError
from sdpo.files import brief

PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # of ranks, while the first one fetches and prepares data


def fetch(repository: str, name: str, **options: str | None) -> Path:
    """A file of a hub repository, downloaded once; raises InputError where that fails."""
    try:
        return Path(hf_hub_download(repository, name, **options))
    except Exception as error:  # connection, cache, access and naming errors have no ancestor in common
        raise InputError(
            f"cannot fetch {name} of {repository} ({brief(error)}); "
            "download it where the hub can be reached and give its path"
        ) from error


def load_tensors(path: str | Path) -> Any:
    """What a .safetensors or torch file holds, on the CPU; raises InputError where it is damaged or holds code."""
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile, pickle and safetensors each have errors of their own
        raise InputError(
            f"{path} cannot be read as weights ({brief(error)}); download it again, or give a state dict by torch.save"
        ) from error
