"""What the scores of a run say: mean, standard error and count per group and metric, on the console and on file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from sdpo.files import write_json, write_text
from sdpo.manifest import METRICS
from sdpo.winrates import ScoredRun, in_order, mean_and_error

OFFICIAL_NAMES = {"Aesthetics": "AesScore", "CLIP": "CLIPScore"}  # as the official console lines spell them


def summarise(groups: Sequence[ScoredRun]) -> list[dict]:
    """A row {group, metric, mean, standard_error, n} per group and metric, official metrics first, in their order."""
    rows = []
    for group in groups:
        for metric in in_order(group.scores, list(METRICS)):
            mean, error = mean_and_error(group.scores[metric])
            n = len(group.entries)
            rows.append({"group": group.label, "metric": metric, "mean": mean, "standard_error": error, "n": n})
    return rows


def format_summary(rows: Sequence[dict]) -> str:
    """The table, then the official `FinalResults` lines and their Markdown table."""
    width = max([16, *(len(row["group"]) + 2 for row in rows)])
    lines = [f"{'group':<{width}}{'metric':<14}{'mean':>10}{'std. error':>12}{'n':>7}"]
    for row in rows:
        error = "" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
        lines.append(f"{row['group']:<{width}}{row['metric']:<14}{row['mean']:>10.4f}{error:>12}{row['n']:>7}")
    named = [(row["group"], OFFICIAL_NAMES.get(row["metric"], row["metric"]), f"{row['mean']:.4f}") for row in rows]
    lines += ["", *(f"FinalResults {name} for {group} : {mean}" for group, name, mean in named)]
    lines += ["", "| Prompt | Predictor | Score |", "|---|---|---|"]
    lines += [f"| {group} | {name} | {mean} |" for group, name, mean in named]
    return "\n".join(lines)


def write_summary(rows: Sequence[dict], folder: str | Path, size: int | str) -> str:
    """Write summary.json, summary.csv and joint_test_{size}.log into a folder; returns the console text."""
    folder = Path(folder)
    text = format_summary(rows)
    table = io.StringIO()
    writer = csv.DictWriter(table, ["group", "metric", "mean", "standard_error", "n"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_json(folder / "summary.json", rows)
    write_text(folder / "summary.csv", table.getvalue())
    write_text(folder / f"joint_test_{size}.log", text + "\n")
    return text
