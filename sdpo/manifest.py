"""The two files that describe a run's images: the manifest and the scores per image. Needs the standard library only.

The manifest is the official JSON list of {"prompt", "gen_image_path", "raw_image_path", "metadata"}. Scores are JSON
lines, {"image", "prompt", "PickScore": ..., "models": {"PickScore": ...}, "sha256"}: `image` is the manifest's own
spelling of the path, `models` (optional) says which weights gave a score, `sha256` (optional) is that of the image
file. Lines about the same image and prompt complete each other.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

from sdpo.command import InputError
from sdpo.files import is_text, locked, parse_json, read_text, sha256, write_json, write_text

# Name of a metric in files -> row of sdpo.scorers.SCORERS; the official ones first, in the order of their console lines
METRICS = {
    "PickScore": "pickscore",
    "HPSv2": "hpsv2",
    "Aesthetics": "aesthetics",
    "CLIP": "clip",
    "ImageReward": "imagereward",
    "HPSv2.1": "hpsv21",
    "Pixels": "pixels",
}
OFFICIAL_METRICS = ("PickScore", "HPSv2", "CLIP", "Aesthetics", "ImageReward")  # in the order of summary.json
ABOUT_A_ROW = {"image", "prompt", "models", "sha256"}  # keys of a row of scores that are not metrics
# Keys of an entry by which images of two runs should not differ
MADE_WITH = ("seed", "guidance", "cfg", "steps", "noise", "dtype", "latents_dtype", "base", "device", "height", "width")
MAX_SCORE = 1e100
SAME_SCORE = 0.01  # scores of one model may differ by this, or this share of them, where they were computed twice
log = logging.getLogger(__name__)

Scores = dict[tuple[str, str], dict[str, Any]]  # rows by (image, prompt)


@dataclass(frozen=True)
class Entry:
    """One image of a manifest."""

    prompt: str
    image: str  # as the manifest spells it; the first one where there are several
    path: Path  # absolute; need not exist
    where: str  # manifest and entry number, for messages
    made_with: dict[str, Any] = field(default_factory=dict, compare=False)  # of MADE_WITH, what the manifest has

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the entry's scores."""
        return self.image, self.prompt


# The manifest


def write_manifest(path: str | Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write the official format, whole or not at all.

    Each entry needs `prompt` and `gen_image_path`; `raw_image_path` and `metadata` are added where absent and further
    keys are kept.
    """
    empty = {"prompt": None, "gen_image_path": None, "raw_image_path": "", "metadata": {}}  # in the official order
    write_json(Path(path), [empty | entry for entry in entries])


def read_manifest(path: str | Path) -> list[Entry]:
    """Entries of a manifest in file order; images need not exist (see require_images).

    Raises InputError for a file that is not a manifest, an entry without prompt or image, and a relative image path
    that leads out of both the working directory and the manifest's folder.
    """
    if not str(path):
        raise InputError("the name of a manifest is empty; give the .json file beside the folder of images")
    path = Path(path)
    rows = enumerate(_read_list(path))
    entries = [_parse_entry(row, path, f"{path}, entry {number} (counted from 0)") for number, row in rows]
    moved = [entry for entry in entries if _is_moved(entry) and entry.path.parent.name != path.stem]
    if moved:  # nor is the folder called like the manifest, as official ones are
        log.warning(
            f"CAUTION: {path}: {len(moved)} of {len(entries)} images are read from other folders than it says, the "
            f"first from {moved[0].path}: make sure that they are its own"
        )
    return entries


def _is_moved(entry: Entry) -> bool:
    """Whether an image is there, but not under the whole path that the manifest has."""
    parts = Path(entry.image).parts
    return ".." not in parts and entry.path.parts[-len(parts) :] != parts and os.path.isfile(entry.path)


def _read_list(path: Path) -> list:
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the manifest, the .json file beside the folder of images")
    rows = parse_json(read_text(path), path, "generate again, or give the right file")
    if not isinstance(rows, list):
        raise InputError(f"{path} is not a JSON list of entries; give a manifest, not a summary or config")
    if not rows:
        raise InputError(f"{path} is an empty list; generate its images first")
    return rows


def _parse_entry(row: Any, manifest: Path, where: str) -> Entry:
    if not isinstance(row, dict):
        raise InputError(f'{where}: not an object; write {{"prompt": ..., "gen_image_path": ...}}')
    prompt, images = row.get("prompt"), row.get("gen_image_path")
    if not is_text(prompt) or not prompt.strip():
        raise InputError(f'{where}: has no text under "prompt"; add the prompt or remove the entry')
    images = images if isinstance(images, list) else [images]
    image = next((image for image in images if image), None)
    if not isinstance(image, str) or not _is_path(image):
        raise InputError(f'{where}: has no path under "gen_image_path"; add the image\'s path or remove the entry')
    made_with = {name: row[name] for name in MADE_WITH if name in row}
    return Entry(prompt, image, _resolve(image, manifest, where), where, made_with)


def _is_path(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _resolve(image: str, manifest: Path, where: str) -> Path:
    """Absolute path of an entry's image: the first of these that is a file, or else the second.

    1. in the folder of the manifest's name beside it, where official images are
    2. the path as seen from the manifest's folder
    3. from the working directory, as official manifests are written
    4. from the manifest's folder with leading folders left out, for folders that were moved; never the image's own
       folder, since other images may now be where these were
    """
    parts, folder = Path(image).parts, manifest.parent
    kept = range(1 if ".." in parts else max(1, len(parts) - 1))
    beside = [os.path.abspath(Path(folder, *parts[n:])) for n in kept]
    own = [os.path.abspath(Path(folder, *parts[-2:]))] if parts[-2:-1] == (manifest.stem,) else []
    path = Path(next(filter(os.path.isfile, [*own, beside[0], os.path.abspath(image), *beside]), beside[0]))
    roots = os.getcwd(), os.path.abspath(folder)
    if not os.path.isabs(image) and not any(path.is_relative_to(root) for root in roots):
        raise InputError(
            f"{where}: image {image} leads out of the working directory and of the manifest's folder; "
            "write an absolute path if that is meant"
        )
    return path


def require_images(entries: Sequence[Entry], why: str = "") -> None:
    """Raises InputError, naming the first and counting the rest, if images do not exist; `why` says who needs them."""
    missing = [entry for entry in entries if not os.path.isfile(entry.path)]  # Path.is_file raises for long names
    if missing:
        first = missing[0]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        why = f", and {why}" if why else ""
        raise InputError(
            f"{first.where}: image {first.image}{more} is neither in the working directory nor in the manifest's "
            f"folder{why}; generate it again or correct gen_image_path"
        )


# Scores per image


def read_scores(path: str | Path) -> Scores:
    """Rows of a score file by (image, prompt), one each, lines merged in file order; none if there is no file.

    A line with another `sha256` than the earlier ones of its image replaces them, and a score of another model the one
    before. A last line cut off by a crash is not a line. Raises InputError for any other line that is not a row of
    scores, and for one that contradicts those before it.
    """
    rows: Scores = {}
    for number, line in _whole_lines(Path(path)):
        where = f"{path}, line {number}"
        row = _parse_row(line, where)
        key = row["image"], row["prompt"]
        if wrong := _contradiction(rows.get(key, {}), row):
            raise InputError(f"{where}: {wrong}; delete the line that is wrong")
        rows[key] = _merge(rows.get(key, {}), row)
    return rows


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not _is_whole(lines[-1]) and lines[-1].lstrip().startswith(b"{"):
        lines.pop()
    yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _is_whole(line: bytes) -> bool:
    """Whether a last line was written to its end: a line feed, or the closing brace of an object, was reached."""
    try:
        return line.endswith(b"\n") or isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse_row(line: bytes, where: str) -> dict[str, Any]:
    fix = "delete the line and its image will be scored again"
    row = parse_json(line, where, fix)
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("image", "prompt")):
        raise InputError(f'{where}: not an object with "image" and "prompt"; {fix}')
    models = row.get("models", {})
    if not isinstance(models, dict) or not all(isinstance(model, str) for model in models.values()):
        raise InputError(f'{where}: "models" is not an object of metric and model; {fix}')
    if not isinstance(row.get("sha256", ""), str):
        raise InputError(f'{where}: "sha256" is not a text; {fix}')
    for metric in row.keys() - ABOUT_A_ROW:
        check_score(row[metric], f"{where}: {metric} of {row['image']}", fix)
    return row


def check_score(value: Any, what: str, fix: str = "look at the image and score it again") -> None:
    """Raises InputError unless a score is a finite number, and small enough for sums of squares."""
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(value) <= MAX_SCORE:
        raise InputError(f"{what} is {value!r:.40}, not a finite number; {fix}")


def _contradiction(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What two rows about one image say differently, beyond what other machines round; empty if nothing."""
    if old.get("sha256") != new.get("sha256"):
        return ""
    models = old.get("models", {}), new.get("models", {})
    for metric in (old.keys() & new.keys()) - ABOUT_A_ROW:
        one, other = old[metric], new[metric]
        same_model = models[0].get(metric) == models[1].get(metric)
        if same_model and not math.isclose(one, other, rel_tol=SAME_SCORE, abs_tol=SAME_SCORE):
            return f"{metric} of {new['image']} is {other}, and {one} in an earlier line"
    return ""


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    if "sha256" in old and "sha256" in new and old["sha256"] != new["sha256"]:
        return new  # the image is another one
    models = {metric: model for metric, model in old.pop("models", {}).items() if metric not in new}
    models |= new.pop("models", {})
    return {**old, **new, **({"models": models} if models else {})}


def append_scores(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows in a single write, after removing a last line that a crash cut off.

    Raises InputError, before anything is written, for a row that read_scores would refuse.
    """
    path = Path(path)
    lines = [json.dumps(row) + "\n" for row in rows]
    for line in lines:
        _parse_row(line.encode(), f"new row of {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path), path.open("ab+") as file:
        size, last = file.seek(0, os.SEEK_END), _last_line(file)
        if last and not _is_whole(last):
            file.truncate(size - len(last))
        glue = "\n" if last and _is_whole(last) else ""
        file.write((glue + "".join(lines)).encode())


def _last_line(file: BinaryIO, block: int = 2**16) -> bytes:
    """What a file holds after its last line feed, read from its end."""
    start, tail = file.seek(0, os.SEEK_END), b""
    while start and b"\n" not in tail:
        end, start = start, max(0, start - block)
        file.seek(start)
        tail = file.read(end - start) + tail
    return tail[tail.rfind(b"\n") + 1 :]


def compact_scores(path: str | Path) -> None:
    """Rewrite a score file with one row per image, whole or not at all; others that append wait."""
    path = Path(path)
    with locked(path):
        write_text(path, "".join(json.dumps(row) + "\n" for row in read_scores(path).values()))


def match_scores(entries: Iterable[Entry], scores: Scores) -> Scores:
    """The rows that there are for entries.

    Where the image exists and its row has a sha256, that must be the image's: it has not changed since. A row of the
    same prompt and content counts whatever its spelling of the path.
    """
    contents = {(row["prompt"], row["sha256"]): row for row in scores.values() if "sha256" in row}
    matched = {}
    changed = []
    for entry in entries:
        row = scores.get(entry.key)
        if os.path.isfile(entry.path) and (row is None or "sha256" in row) and contents:
            digest = sha256(entry.path)
            if row is None or row["sha256"] != digest:
                same = contents.get((entry.prompt, digest))
                if row is not None and same is None:
                    changed.append(entry.image)
                row = same
        if row is not None:
            matched[entry.key] = row
    if changed:
        log.warning(
            f"CAUTION: {len(changed)} images have changed since they were scored, the first {changed[0]}: those scores "
            "do not count"
        )
    return matched


def find_score(entry: Entry, scores: Scores, metric: str, model: str | None = None) -> float | None:
    """An entry's score, or None if there is none or the row says that another model than `model` gave it."""
    row = scores.get(entry.key, {})
    other = model is not None and row.get("models", {}).get(metric, model) != model
    return None if other else row.get(metric)
