"""Summaries of scores: statistics by hand, official console lines, files."""

import csv
import json
from pathlib import Path

import pytest

from sdpo.manifest import Entry
from sdpo.summary import format_summary, summarise, write_summary


def run(group, **metrics):
    """Entries of a group and their scores."""
    count = len(next(iter(metrics.values())))
    entries = [Entry(f"prompt {i}", f"{group}/{i}.png", Path(f"{group}/{i}.png"), "") for i in range(count)]
    rows = [{"image": e.image, "prompt": e.prompt} for e in entries]
    for metric, values in metrics.items():
        for row, value in zip(rows, values, strict=True):
            row |= {} if value is None else {metric: value}
    return entries, {entry.key: row for entry, row in zip(entries, rows, strict=True)}


GROUPS = {
    "papv2": run("papv2", CLIP=[0.25, 0.35], PickScore=[0.2, 0.21414], Aesthetics=[5.0, 7.0]),
    "hpsv2": run("hpsv2", PickScore=[0.5, None], CLIP=[0.1, 0.2], Aesthetics=[1.0, 2.0]),
}
METRICS = ("CLIP", "Aesthetics", "PickScore")


def test_means_and_standard_errors():
    rows = summarise(GROUPS, METRICS)
    assert [(row["group"], row["metric"]) for row in rows[:3]] == [
        ("papv2", m) for m in ("PickScore", "Aesthetics", "CLIP")
    ]
    aesthetics, single = rows[1], rows[3]
    assert (aesthetics["mean"], aesthetics["n"]) == (6.0, 2)
    assert aesthetics["standard_error"] == pytest.approx(1.0)  # sample deviation sqrt 2 over sqrt 2
    assert single == {"group": "hpsv2", "metric": "PickScore", "mean": 0.5, "standard_error": None, "n": 1}


def test_official_lines():
    lines = format_summary(summarise(GROUPS, METRICS)).splitlines()
    assert "FinalResults PickScore for papv2 : 0.2071" in lines
    assert "FinalResults AesScore for papv2 : 6.0000" in lines
    assert "FinalResults CLIPScore for hpsv2 : 0.1500" in lines
    assert "| Prompt | Predictor | Score |" in lines
    assert "| papv2 | CLIPScore | 0.3000 |" in lines


def test_files(tmp_path):
    rows = summarise(GROUPS, METRICS)
    text = write_summary(rows, tmp_path, 512)
    assert json.loads((tmp_path / "summary.json").read_text()) == rows
    table = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [float(row["mean"]) for row in table] == [row["mean"] for row in rows]
    assert (tmp_path / "joint_test_512.log").read_text() == text + "\n"
