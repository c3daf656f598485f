"""What the scores of a run say: mean, standard error and count per group and metric, on the console and on file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from sdpo.files import write_json, write_text
from sdpo.manifest import Entry, Scores, find_score

OFFICIAL_NAMES = {"Aesthetics": "AesScore", "CLIP": "CLIPScore"}  # as the official console lines spell them
ORDER = ("PickScore", "HPSv2", "Aesthetics", "CLIP", "ImageReward")  # of the official console lines


def summarise(groups: Mapping[str, tuple[Sequence[Entry], Scores]], metrics: Sequence[str]) -> list[dict]:
    """A row {group, metric, mean, standard_error, n} per group and metric, official metrics first, in their order."""
    ordered = [*(name for name in ORDER if name in metrics), *(name for name in metrics if name not in ORDER)]
    rows = []
    for group, (entries, scores) in groups.items():
        for metric in ordered:
            values = [score for entry in entries if (score := find_score(entry, scores, metric)) is not None]
            error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            mean = fmean(values) if values else None
            rows.append({"group": group, "metric": metric, "mean": mean, "standard_error": error, "n": len(values)})
    return rows


def format_summary(rows: Sequence[dict]) -> str:
    """The table, then the official `FinalResults` lines and their Markdown table; unscored metrics are left out."""
    rows = [row for row in rows if row["n"]]
    lines = [f"{'group':<16}{'metric':<14}{'mean':>10}{'std. error':>12}{'n':>7}"]
    for row in rows:
        error = "" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
        lines.append(f"{row['group']:<16}{row['metric']:<14}{row['mean']:>10.4f}{error:>12}{row['n']:>7}")
    named = [(row["group"], OFFICIAL_NAMES.get(row["metric"], row["metric"]), f"{row['mean']:.4f}") for row in rows]
    lines += ["", *(f"FinalResults {name} for {group} : {mean}" for group, name, mean in named)]
    lines += ["", "| Prompt | Predictor | Score |", "|---|---|---|"]
    lines += [f"| {group} | {name} | {mean} |" for group, name, mean in named]
    return "\n".join(lines)


def write_summary(rows: Sequence[dict], folder: str | Path, size: int | str) -> str:
    """Write summary.json, summary.csv and joint_test_{size}.log into a folder; returns the console text."""
    folder, text, table = Path(folder), format_summary(rows), io.StringIO()
    writer = csv.DictWriter(table, ["group", "metric", "mean", "standard_error", "n"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_json(folder / "summary.json", rows)
    write_text(folder / "summary.csv", table.getvalue())
    write_text(folder / f"joint_test_{size}.log", text + "\n")
    return text
