"""Text and JSON that users give: read, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdpo.config import InputError


def brief(error: Exception) -> str:
    """The first sentence of an error's message, after the error's name where the message is empty or a mere word."""
    line = (str(error).strip().splitlines() or [""])[0].split(". ")[0][:300]
    return line if " " in line else f"{type(error).__name__} {line}".strip()


def read_text(path: str | Path) -> str:
    """A file's text without its byte order mark; raises InputError unless it is UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def parse_json(text: str | bytes, where: str | Path, fix: str) -> Any:
    """The value of a JSON text; raises InputError, saying where and what to do, if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of too many digits; of nesting
        raise InputError(f"{where}: not valid JSON ({brief(error)}); {fix}") from None


def is_text(value: Any) -> bool:
    """Whether a value is a text of characters; JSON may hold halves of surrogate pairs, which are none."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
