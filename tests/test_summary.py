"""Summaries of scores: statistics by hand, official console lines, files."""

import csv
import json
from pathlib import Path

import pytest

from sdpo.manifest import Entry
from sdpo.summary import format_summary, summarise, write_summary
from sdpo.winrates import ScoredRun


def run(group, **scores):
    """A group with scores."""
    count = len(next(iter(scores.values())))
    entries = [Entry(f"prompt {i}", f"{group}/{i}.png", Path(f"{group}/{i}.png"), "") for i in range(count)]
    return ScoredRun(group, entries, scores)


GROUPS = [
    run("papv2", CLIP=[0.25, 0.35], PickScore=[0.2, 0.21414], Aesthetics=[5.0, 7.0]),
    run("hpsv2", CLIP=[0.15], PickScore=[0.5], Aesthetics=[1.0]),
]


def test_means_and_standard_errors():
    rows = summarise(GROUPS)
    assert [(row["group"], row["metric"]) for row in rows[:3]] == [
        ("papv2", m) for m in ("PickScore", "Aesthetics", "CLIP")
    ]
    aesthetics, single = rows[1], rows[3]
    assert (aesthetics["mean"], aesthetics["n"]) == (6.0, 2)
    assert aesthetics["standard_error"] == pytest.approx(1.0)  # sample deviation sqrt 2 over sqrt 2
    assert single == {"group": "hpsv2", "metric": "PickScore", "mean": 0.5, "standard_error": None, "n": 1}


def test_official_lines():
    lines = format_summary(summarise(GROUPS)).splitlines()
    rows = [line.split() for line in lines[1 : lines.index("")]]
    assert rows[1:4] == [
        ["papv2", "Aesthetics", "6.0000", "1.0000", "2"],
        ["papv2", "CLIP", "0.3000", "0.0500", "2"],
        ["hpsv2", "PickScore", "0.5000", "1"],  # a single score has no error
    ]
    assert "FinalResults PickScore for papv2 : 0.2071" in lines
    assert "FinalResults AesScore for papv2 : 6.0000" in lines
    assert "FinalResults CLIPScore for hpsv2 : 0.1500" in lines
    assert "| Prompt | Predictor | Score |" in lines
    assert "| papv2 | CLIPScore | 0.3000 |" in lines
    named = [line.split()[1:4:2] for line in lines if line.startswith("FinalResults")]
    metrics = ["PickScore", "AesScore", "CLIPScore"]
    assert named == [[metric, group] for group in ("papv2", "hpsv2") for metric in metrics]


def test_files(tmp_path):
    rows = summarise(GROUPS)
    text = write_summary(rows, tmp_path, 512)
    assert json.loads((tmp_path / "summary.json").read_text()) == rows
    table = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [float(row["mean"]) for row in table] == [row["mean"] for row in rows]
    assert b"\r" not in (tmp_path / "summary.csv").read_bytes()
    assert (tmp_path / "joint_test_512.log").read_text() == text + "\n"
