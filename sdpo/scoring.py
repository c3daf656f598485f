"""Scores of a manifest's images: read from scores.jsonl beside it, computed and kept there where they are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sdpo.config import InputError
from sdpo.manifest import (
    Entry,
    Scores,
    append_scores,
    drop_stale,
    find_score,
    image_digest,
    read_manifest,
    read_scores,
    require_images,
)

# Name of a metric in files -> row of sdpo.scorers.SCORERS
METRICS = {
    "PickScore": "pickscore",
    "HPSv2": "hpsv2",
    "Aesthetics": "aesthetics",
    "CLIP": "clip",
    "ImageReward": "imagereward",
    "Pixels": "pixels",
}


def split_pairs(texts: Sequence[str], flag: str) -> list[tuple[str, str]]:
    """(name, value) of NAME=VALUE texts; raises InputError for one without an equals sign."""
    for text in texts:
        if "=" not in text:
            raise InputError(f"{flag} {text}: expected NAME=VALUE")
    return [tuple(text.split("=", 1)) for text in texts]


def score_manifest(
    manifest: str | Path,
    metrics: Sequence[str],
    *,
    sources: Mapping[str, str] | None = None,
    device: str = "cpu",
    batch_size: int = 64,
) -> tuple[list[Entry], Scores]:
    """Entries of a manifest and their scores in `metrics` (names of METRICS), the missing ones computed and kept.

    Images are needed, and torch is imported, only if a score is missing. Rows are appended as they come, so a run that
    was cut off goes on where it was. Raises InputError for missing images, weights or unusable scores.
    """
    entries, path = read_manifest(manifest), Path(manifest).parent / "scores.jsonl"
    scores = drop_stale(entries, read_scores(path))
    todo: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        lacking = tuple(metric for metric in metrics if find_score(entry, scores, metric) is None)
        if lacking:
            todo.setdefault(lacking, []).append(entry)
    for lacking, missing in todo.items():
        require_images(missing)
        _compute(missing, lacking, path, sources, device, batch_size)
    return entries, read_scores(path)


def _compute(entries, metrics, path, sources, device, batch_size) -> None:
    from tqdm.auto import tqdm  # these need torch, which existing scores do not

    from sdpo.scorers import load_scorers, score_rows

    scorers = load_scorers([METRICS[metric] for metric in metrics], sources)
    rows = score_rows(((entry.path, entry.prompt) for entry in entries), scorers, device=device, batch_size=batch_size)
    for entry, row in zip(tqdm(entries, desc="scoring", unit="image"), rows, strict=True):
        values = {metric: row[METRICS[metric]] for metric in metrics}
        about = {"image": entry.image, "prompt": entry.prompt, "sha256": image_digest(entry.path)}
        append_scores(path, [{**about, **values}])
