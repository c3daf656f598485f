"""Prompt groups: the official three, fetched once from a pinned commit; two of our own; and any file.

A file is a JSON list or JSON lines of prompts or objects with `prompt`, or a text with a prompt per line.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pooch

from sdpo.command import InputError
from sdpo.files import brief, is_text, parse_json, read_text, sha256
from sdpo.tiny import pictures

SOURCE = "https://raw.githubusercontent.com/AIDC-AI/Diffusion-SDPO/84fb241c1b89705a247da8b0d6047798ca49830d/prompts"
FOLDER = Path(__file__).resolve().parents[1] / "prompts"
OFFICIAL = {  # group: sha256 of its JSON file
    "papv2": "531f3ca923035b5f17dbcbc60a7d7dfa476219e59b0e99617bb3f0afabf5663b",
    "hpsv2": "417a2ce00b3307780402c1d27528a0e41ed26651384687bbf3aa06c4c7e559fd",
    "partiprompts": "b11d46a91c4202461d6d1df69da0b9af5070851403574de6efd6736ccad22291",
}
TINY_REPEATS = 4
FIX = "write it as JSON"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One entry of a group; what a manifest repeats of it."""

    text: str
    negative: str = ""  # kept for the record: sampling is always guided away from the empty caption
    raw_image_path: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


# The groups


def fetch_official(group: str) -> list[Prompt]:
    """Prompts of an official group, downloaded on first use and checked; raises InputError where that fails."""
    path = FOLDER / f"{group}.json"
    url = f"{SOURCE}/{group}.json"
    digest = OFFICIAL[group]
    if not path.exists():
        pooch.get_logger().setLevel(logging.WARNING)
        try:
            pooch.retrieve(url, known_hash=f"sha256:{digest}", fname=path.name, path=FOLDER)
        except (OSError, ValueError) as error:  # the network or the disk failed; the sha256 differs
            raise InputError(
                f"cannot fetch the prompts of {group}: download {url} where the network can be reached "
                f"and put it at {path} ({brief(error)})"
            ) from error
        log.info(f"fetched        {path} from {url}, sha256 as pinned")
    if sha256(path) != digest:
        raise InputError(
            f"{path} is not the official file (sha256 {digest[:12]}...): remove it to have it fetched, "
            "or rename it and give it with --test_json"
        )
    return read_prompts(path)


GROUPS = {
    **{group: partial(fetch_official, group) for group in OFFICIAL},
    "smoke": lambda: read_prompts(FOLDER / "smoke.json"),  # written for this project
    # captions the tiny base was not trained on, several times each: 20 pictures would hardly tell two models apart
    "tiny": lambda: [Prompt(spec.caption) for spec in pictures.HELD_OUT for _ in range(TINY_REPEATS)],
}


# Files


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a .json, .jsonl or .txt file in file order; raises InputError naming file and entry."""
    path = Path(path)
    if path.suffix not in READERS:
        raise InputError(f"{path}: prompts are read from {', '.join(READERS)} files")
    try:
        rows = list(READERS[path.suffix](path, read_text(path)))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); groups known by name: {', '.join(GROUPS)}"
        ) from error
    if not rows:
        raise InputError(f"{path} holds no prompts")
    return [parse_prompt(row, where) for where, row in rows]


def _read_json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    rows = parse_json(text, path, FIX)
    if not isinstance(rows, list):
        raise InputError(f'{path} is not a JSON list; write [{{"prompt": ...}}, ...]')
    yield from ((f"{path}, entry {number} (counted from 0)", row) for number, row in enumerate(rows))


def _read_lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    lines = enumerate(text.split("\n"), 1)  # splitlines() would also split at separators inside a prompt
    yield from ((f"{path}, line {number}", line) for number, line in lines if line.strip())


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    yield from ((where, parse_json(line, where, FIX)) for where, line in _read_lines(path, text))


def _read_txt(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if _is_json(text) or _is_json(text.strip().partition("\n")[0]):
        raise InputError(f"{path} holds JSON: let its name end in .json, or in .jsonl for an object per line")
    yield from ((where, line.strip()) for where, line in _read_lines(path, text))


def _is_json(text: str) -> bool:
    """Whether a text is a JSON object or list."""
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".txt": _read_txt}


def parse_prompt(row: Any, where: str) -> Prompt:
    """A prompt from a string or an object with `prompt`; raises InputError, saying where, for anything else."""
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise InputError(f'{where}: has no text under "prompt"; write {{"prompt": "..."}} or remove it')
    prompt = Prompt(
        row["prompt"], row.get("neg_prompt") or "", row.get("raw_image_path") or "", row.get("metadata") or {}
    )
    if not (isinstance(prompt.negative, str) and isinstance(prompt.raw_image_path, str)):
        raise InputError(f'{where}: "neg_prompt" and "raw_image_path" must be text')
    if not isinstance(prompt.metadata, dict):
        raise InputError(f'{where}: "metadata" must be an object')
    try:
        json.dumps(prompt.metadata, allow_nan=False)
    except ValueError:
        raise InputError(f'{where}: "metadata" holds NaN or Infinity, which are not JSON; write null') from None
    if not is_text(prompt.text):
        raise InputError(f"{where}: the prompt holds an unpaired surrogate, which is not a character; correct it")
    return prompt
