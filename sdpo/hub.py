"""Single files from the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download

from sdpo.config import InputError


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fetch(repository: str, name: str, **options: str | None) -> Path:
    """A file of a hub repository, downloaded once; raises InputError where that fails."""
    try:
        return Path(hf_hub_download(repository, name, **options))
    except Exception as error:  # connection, cache, access and naming errors have no ancestor in common
        raise InputError(
            f"cannot fetch {name} of {repository}: {first_line(error)} "
            "Download it where the hub can be reached and give its path."
        ) from error
