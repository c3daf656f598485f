"""The cross-check's verdict, on scores made up for both sides."""

import json
import math
import sys

import pytest
from PIL import Image

from scripts.eval import check_scorers
from scripts.eval.check_scorers import SMALL, STORED, deviation, main, package_scores
from sdpo.command import InputError

KINDS = {"HPSv2": [SMALL, STORED], "ImageReward": [STORED]}


def test_deviation_is_the_largest_one():
    assert deviation([1.0, -2.0, 0.5], [1.0, -2.5, 0.25]) == (0.5, 1.0)  # 0.5 of 2.5; 0.25 of 0.25
    assert math.isnan(deviation([1.0, math.nan, 2.0], [1.0, 1.0, 2.0])[0])
    with pytest.raises(ValueError, match="3 scores against 1"):
        deviation([1.0, 1.0, 1.0], [1.0])


@pytest.mark.parametrize(
    ("metric", "kind", "error", "agree"),
    [
        ("HPSv2", SMALL, 9e-6, True),
        ("HPSv2", SMALL, -1.1e-5, False),
        ("HPSv2", SMALL, math.nan, False),
        ("HPSv2", STORED, 0.01, True),  # only shown
        ("HPSv2", STORED, math.nan, False),
        ("ImageReward", STORED, 9e-5, True),
        ("ImageReward", STORED, 1.1e-4, False),
    ],
)
def test_verdict(metric, kind, error, agree, tmp_path, monkeypatch, capsys):
    for i in range(3):
        Image.new("RGB", (64, 40)).save(tmp_path / f"{i}.png")
    rows = [{"prompt": f"p{i}", "gen_image_path": f"{i}.png"} for i in range(3)]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    seen = []

    def scores(name, rows, *_):
        assert [prompt for _, prompt in rows] == ["p0", "p1"] * len(KINDS[name])
        seen.append([Image.open(image).size for image, _ in rows])
        return [0.2, 0.3] * len(KINDS[name])

    def off_in_one(name, rows, *_):
        values = scores(name, rows)
        if name == metric:
            values[2 * KINDS[name].index(kind) + 1] += error
        return values

    monkeypatch.setattr(check_scorers, "our_scores", scores)
    monkeypatch.setattr(check_scorers, "package_scores", off_in_one)
    assert main([str(tmp_path / "m.json"), "--images", "2", "--reference_python", "none"]) is agree
    assert ("DIFFER" in capsys.readouterr().out) is not agree
    assert seen == 2 * [[(224, 224)] * 2 + [(64, 40)] * 2] + 2 * [[(64, 40)] * 2]  # HPSv2 twice, then ImageReward


STAND_IN = """#!{python} -S
import json, sys
key, source, target, part = sys.argv[-4:]
assert (key, part) == ("hpsv2", "checkpoint={weights}")
with open(source) as rows, open(target, "w") as scores:
    json.dump([len(prompt) for _, prompt in json.load(rows)], scores)
"""


def test_the_package_is_asked_by_its_own_interpreter(tmp_path):
    python, weights = tmp_path / "python", tmp_path / "hps.pt"
    weights.touch()
    python.write_text(STAND_IN.format(python=sys.executable, weights=weights))
    python.chmod(0o755)
    rows = [("a.png", "p"), ("b.png", "pq")]
    assert package_scores("HPSv2", rows, {"hpsv2.checkpoint": str(weights)}, str(python)) == [1, 2]


def test_a_damaged_image_is_one_sentence(tmp_path):
    Image.new("RGB", (64, 40)).save(tmp_path / "0.png")
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    (tmp_path / "m.json").write_text(json.dumps([{"prompt": "p", "gen_image_path": "0.png"}]))
    with pytest.raises(InputError, match=r"image .*0\.png cannot be read: .*; make it again"):
        main([str(tmp_path / "m.json"), "--reference_python", "none"])
    with pytest.raises(InputError, match="--images must be at least 1, got 0"):
        main([str(tmp_path / "m.json"), "--reference_python", "none", "--images", "0"])
