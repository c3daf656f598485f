"""Tensors on file: rows by name in files of bounded size, mapped into memory, that say what they are made from."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdpo.command import InputError
from sdpo.files import brief, parse_json, read_text, remove_abandoned, write_file, write_json
from sdpo.ranks import on_main

SHARD_BYTES = 2**29  # a file is no larger, unless one row is


class Shards:
    """Rows of tensors by name (an int or a text), in files of bounded size that are mapped into memory when read.

    index.json holds the key: what the rows are made from. Every file says which rows it has and the SHA-256 of its
    content, and has its name only when it is complete. A folder may lack rows, but never mixes keys.
    """

    def __init__(self, folder: Path, key: dict, flag: str = "--latent_cache"):
        """Rows made from `key` in a folder that a flag of the command line names."""
        self.folder, self.key, self.flag = folder, key, flag
        self.files: list[Path] = []
        self.places: dict[int | str, tuple[int, int]] = {}  # name of a row: file, row in it
        self.notes: dict[str, str] = {}  # what could not be made, by the name that the writer has for it: why not
        self.checksums: list[np.ndarray] = []  # of each file's rows
        self._mapped: dict[int, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict:
        return vars(self) | {"places": {}, "_mapped": {}}  # another process maps the files itself

    def create(self) -> None:
        """Write index.json, unless it is there; raises InputError if it says something else than the key."""
        if not (self.folder / "index.json").is_file():  # the folder may be one that can only be read
            write_json(self.folder / "index.json", {"key": self.key}, replace=False)
        refuse_changes([self])  # another command may have been first
        remove_abandoned(self.folder)

    @property
    def mark(self) -> str:
        """SHA-256 of the key, which every file has."""
        return hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()

    def scan(self) -> None:
        """Note where each row of the complete files is; raises InputError for a file that is damaged.

        The main process looks, so that ranks agree while others write; every rank calls this.
        """
        self.files, self.places, self.notes, self.checksums = on_main(PartialState(), self._find_rows)

    def _find_rows(self) -> tuple[list[Path], dict, dict, list[np.ndarray]]:
        files = sorted(self.folder.glob("*.safetensors"))
        places = {}
        notes = {}
        checksums = []
        for number, path in enumerate(files):
            about = read_about(path)
            if about["key"] != self.mark:
                raise InputError(f"{path} was made from something else than the files beside it: delete it")
            if path.stem != self._name_file(about["names"]):
                raise InputError(f"{path} is damaged (its name is not that of its rows): delete it to make it again")
            places |= {name: (number, row) for row, name in enumerate(about["names"])}
            notes |= about["notes"]
            checksums.append(np.array(about["crc32"], np.uint32))
        return files, places, notes, checksums

    def write(self, names: list[int | str], tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
        """Write one file of len(names) rows; every tensor is (len(names), ...)."""
        rows = [{key: tensor[row] for key, tensor in tensors.items()} for row in range(len(names))]
        about = {"names": names, "notes": notes, "crc32": list(map(checksum, rows)), "key": self.mark}
        about["header"] = hash_header(names, notes, {name: list(tensor.shape) for name, tensor in tensors.items()})
        about["sha256"] = hash_content(names, notes, tensors)
        path = self.folder / f"{self._name_file(names)}.safetensors"
        write_file(path, lambda partial: save_readable(tensors, partial, about, self.folder / "index.json"))

    def _name_file(self, names: list[int | str]) -> str:
        return hashlib.sha256(json.dumps([self.mark, names]).encode()).hexdigest()[:16]

    def read(self, place: tuple[int, int]) -> dict[str, Tensor]:
        """The tensors of one row, as views of the mapped file; raises InputError for a row that has changed."""
        number, row = place
        if number not in self._mapped:
            self._mapped[number] = load_file(self.files[number])
        tensors = {name: tensor[row] for name, tensor in self._mapped[number].items()}
        if checksum(tensors) != self.checksums[number][row]:
            raise InputError(
                f"{self.files[number]} is damaged (CRC-32 of row {row}): delete it and run the same command again, "
                "which makes it again"
            )
        return tensors


def checksum(row: dict[str, Tensor]) -> int:
    """CRC-32 over the bytes of a row's tensors."""
    value = 0
    for name in sorted(row):
        value = zlib.crc32(row[name].reshape(-1).view(torch.uint8).numpy(), value)
    return value


def is_intact(path: Path) -> bool:
    """Whether a file still has the content that was written."""
    try:
        about = read_about(path)
    except InputError:
        return False
    return hash_content(about["names"], about["notes"], load_file(path)) == about["sha256"]


def refuse_damaged(files: Iterable[Path]) -> None:
    """Raises InputError naming all files that no longer have the content that was written."""
    if damaged := [str(path) for path in files if not is_intact(path)]:
        raise InputError(f"damaged: {', '.join(damaged)}; delete and run the same command again")


def read_key(folder: Path) -> dict:
    """The key in a folder's index.json; empty for a new folder, InputError where files lack a readable index."""
    index = folder / "index.json"
    if not index.is_file() and not any(folder.glob("*.safetensors")):
        return {}
    fix = f"delete {folder} to make it again"
    content = parse_json(read_text(index), index, fix) if index.is_file() else None
    if not isinstance(content, dict) or not isinstance(content.get("key"), dict):
        raise InputError(f"{index} does not say what the files beside it are made from: {fix}")
    return content["key"]


def read_about(path: Path) -> dict:
    """What Shards.write says of the rows of a file; raises InputError where its header or length is wrong."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        if about["header"] != hash_header(about["names"], about["notes"], shapes):
            raise ValueError("its header has changed")
        rows = {shape[0] for shape in shapes.values()}
        described = rows == {len(set(about["names"]))} == {len(np.array(about["crc32"], np.uint32))}  # hashable names
        if not described or not isinstance(about["notes"], dict):
            raise ValueError("it does not describe its own rows")
        return {name: about[name] for name in ("names", "notes", "crc32", "sha256", "key", "header")}
    except (OSError, SafetensorError, TypeError, LookupError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path} is damaged ({brief(error)}): delete it and run the same command again, which makes it again"
        ) from error


def hash_header(names: list, notes: dict[str, str], shapes: dict[str, list[int]]) -> str:
    """SHA-256 over what a file says of its rows, and the names and shapes of its tensors."""
    return hashlib.sha256(json.dumps([names, notes, shapes], sort_keys=True).encode()).hexdigest()


def hash_content(names: list, notes: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, notes and the tensors' bytes."""
    digest = hashlib.sha256(json.dumps([names, notes]).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_readable(tensors: dict[str, Tensor], path: Path, about: dict, like: Path) -> None:
    """Write a safetensors file with the permissions of the file `like`."""
    save_file(tensors, path, {"about": json.dumps(about)})
    shutil.copymode(like, path)  # save_file lets nobody else read it


def refuse_changes(stores: Sequence[Shards]) -> None:
    """Raises InputError saying what changed where the folders of a flag hold rows of something else than their keys."""
    changes = []
    for shards in stores:
        then = read_key(shards.folder) or shards.key  # a new folder has none
        changes += [
            f"{shards.folder}: {name} was {shorten(then.get(name))}, is {shorten(value)}"
            for name, value in shards.key.items()
            if then.get(name) != value
        ]
    if changes:
        flag = stores[0].flag
        raise InputError(
            f"{flag} was made from something else: {'; '.join(changes)}. "
            f"Name another {flag}, or delete what is named here to make it again"
        )


def shorten(value: object) -> str:
    """A value of a key for the console: digests by their first 12 digits."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
