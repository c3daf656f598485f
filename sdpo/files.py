"""Files: users' text and JSON are read or refused in one sentence, ours are written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sdpo.command import InputError

log = logging.getLogger(__name__)
PARTIAL = f"*.{'[0-9a-f]' * 8}.partial"  # pattern of the names that files have until they are whole

FULL = ("inline_container", "iostream error")  # what torch.save says of a full disk, without an OSError


def brief(error: Exception) -> str:
    """The first sentence of an error's message, after the error's name where the message is empty or a mere word."""
    line = (str(error).strip().splitlines() or [""])[0].split(". ")[0][:300]
    return line if " " in line else f"{type(error).__name__} {line}".strip()


def read_text(path: str | Path) -> str:
    """A file's text without its byte order mark; raises InputError unless it is UTF-8."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    before, nul, _ = text.partition("\0")
    if nul:  # as in UTF-16, which without a byte order mark may be UTF-8 too
        line = before.count("\n") + 1
        raise InputError(f"{path} is not UTF-8 text (line {line} holds NUL); save it as UTF-8, or correct the line")
    return text


def parse_json(text: str | bytes, where: str | Path, fix: str) -> Any:
    """The value of a JSON text; raises InputError, saying where and what to do, if it is none."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text  # json would guess at UTF-16 and UTF-32
        return json.loads(text, object_pairs_hook=_refuse_doubles)
    except (ValueError, RecursionError) as error:  # bad JSON or UTF-8, a huge number; nested too deep
        raise InputError(f"{where}: not valid JSON ({brief(error)}); {fix}") from None


def _refuse_doubles(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of which Python would keep the last value of a key; raises ValueError for a key twice."""
    value = dict(items)
    if len(value) < len(items):
        names = [name for name, _ in items]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return value


def can_be_written(folder: str | Path) -> bool:
    """Whether files can be written into a folder, which need not exist yet."""
    path = Path(folder).absolute()
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def is_text(value: Any) -> bool:
    """Whether a value is a text of characters; JSON may hold halves of surrogate pairs, which are none."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def sha256(path: str | Path) -> str:
    """Hex digest of a file's content, which is read once in a process unless the file changes."""
    about = os.stat(path)
    return _sha256_of_state(path, about.st_ino, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=2**16)
def _sha256_of_state(path: str | Path, *_state: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identify_source(source: str) -> str:
    """Text that identifies a source of weights: a local file or folder by SHA-256 of its content, others by name."""
    path = Path(source)
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
        content = "".join(f"{name} {sha256(files[name])}\n" for name in sorted(files) if not name.startswith("."))
        return f"sha256:{hashlib.sha256(content.encode(errors='surrogateescape')).hexdigest()[:16]}"
    return f"sha256:{sha256(path)[:16]}" if path.is_file() else source


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep out other processes that lock the same path, where there are locks; not to be nested for one path."""
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            warn_of_no_locks(path, error)
        yield


@contextmanager
def alone(lock: Path, busy: str) -> Iterator[None]:
    """Hold a lock file until the end; raises InputError(busy) where another process holds it."""
    with open(lock, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which loader workers do not inherit
        except (BlockingIOError, PermissionError):
            raise InputError(busy) from None
        except OSError as error:
            warn_of_no_locks(lock, error)
        yield


def warn_of_no_locks(path: Path, error: OSError) -> None:
    """Warn of a file system without locks."""
    log.warning(f"CAUTION: {path} cannot be locked ({error.strerror}): let no other command write there")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, write: Callable[[Path], object], replace: bool = True) -> None:
    """Let `write` make the file under a name of its own and move it into place, so that it is never seen half written.

    Several processes may write the same file; the last one's stays, or the first one's if it is not to be replaced.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # as PARTIAL has it
    try:
        write(partial)
        sync(partial)
        if replace:
            os.replace(partial, path)
        else:
            put_first(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)  # on a full disk it would take the room
        if number := error_number(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        if isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = str(path)  # which a full disk does not say
        raise
    sync(path.parent)


def error_number(error: BaseException) -> int | None:
    """errno of an error of the disk that torch or safetensors tells in words only; None for any other error."""
    if isinstance(error, OSError):
        return None
    if found := re.search(r"I/O error: .*os error (\d+)", str(error)):
        return int(found[1])
    return errno.ENOSPC if any(words in str(error) for words in FULL) else None


def remove_abandoned(folder: Path) -> None:
    """Remove what writers that were killed left half written: files that have not grown for an hour."""
    for path in folder.glob(PARTIAL):
        with suppress(OSError):  # another process may be first
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def put_first(partial: Path, path: Path) -> None:
    """Give a file its name unless another has it; the other stays then."""
    try:
        os.link(partial, path)
    except OSError:  # another process was first, or the file system has no links
        if not path.exists():
            os.replace(partial, path)
    partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, replace: bool = True) -> None:
    """Write a text file, and the folder for it, as write_file does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"), replace)


def write_json(path: Path, value: Any, replace: bool = True) -> None:
    """Write a JSON file as write_text does, indented like the official tools' files."""
    write_text(path, json.dumps(value, indent=2), replace)
