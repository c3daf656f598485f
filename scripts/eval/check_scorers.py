"""Compare our HPSv2 and ImageReward scores with those of the packages' own code, in fp32 on the CPU.

The package of HPSv2 resizes tensors and pads, we resize pictures and crop like the official evaluation. So its scores
are judged on copies of 224 x 224, which neither side resizes; those of the images as stored are only shown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageOps

from sdpo.command import InputError, Parser, parse_assignments, run_command
from sdpo.files import brief
from sdpo.images import decode
from sdpo.manifest import METRICS, read_manifest, require_images
from sdpo.scorers import SCORERS, load_scorers, locate, score_rows

STORED, SMALL = "as stored", "224 x 224"
TOLERANCES = {  # metric -> kind of images -> largest absolute deviation
    "HPSv2": {SMALL: 1e-5, STORED: math.inf},  # scores of about 0.27
    "ImageReward": {STORED: 1e-4},  # scores of about -2 to 2
}
MED_CONFIG = "THUDM/ImageReward:med_config.json"

Rows = list[tuple[str, str]]  # (image, prompt)


def deviation(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Largest absolute and largest relative deviation of N scores from N reference scores; NaN if one is."""
    ours, theirs = np.array(ours), np.array(theirs)  # each (N,)
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} scores against {len(theirs)}: both sides must score the same images")
    difference = np.abs(ours - theirs)
    return float(difference.max()), float((difference / np.abs(theirs)).max())


def our_scores(metric: str, rows: Rows, sources: dict[str, str]) -> list[float]:
    """Scores of sdpo.scorers."""
    key = METRICS[metric]
    return [row[key] for row in score_rows(rows, load_scorers([key], sources), batch_size=4)]


def package_scores(metric: str, rows: Rows, sources: dict[str, str], python: str) -> list[float]:
    """Scores of the metric's package, run by its own interpreter; raises InputError where it fails."""
    key = METRICS[metric]
    parts = {part: sources.get(f"{key}.{part}", source) for part, source in SCORERS[key].official.items()}
    parts["checkpoint"] = locate(parts["checkpoint"])
    if metric == "ImageReward":
        beside = Path(parts["checkpoint"]).with_name("med_config.json")
        parts["med_config"] = str(beside) if beside.is_file() else locate(MED_CONFIG)
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "rows.json"), Path(folder, "scores.json")
        source.write_text(json.dumps(rows))
        script = Path(__file__).with_name("reference_scores.py")
        command = [python, "-W", "ignore", script, key, source, target, *(f"{k}={v}" for k, v in parts.items())]
        if subprocess.run(command, stdout=sys.stderr, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}).returncode:
            raise InputError(f"the package of {metric} failed; what it says stands above")
        return json.loads(target.read_text())


def compare(metric: str, images: dict[str, Rows], sources: dict[str, str], python: str) -> bool:
    """Score with both sides, print a line per kind of images, and return whether they agree."""
    kinds = TOLERANCES[metric]
    rows = [row for kind in kinds for row in images[kind]]
    ours, theirs = (np.array(scores).reshape(len(kinds), -1) for scores in (  # each (kinds, N)
        our_scores(metric, rows, sources), package_scores(metric, rows, sources, python)
    ))  # fmt: skip
    agree = True
    for (kind, tolerance), a, b in zip(kinds.items(), ours, theirs, strict=True):
        absolute, relative = deviation(a, b)
        agree &= absolute <= tolerance  # False for NaN
        shown = f"tolerance {tolerance:g}" if tolerance < math.inf else "not judged: resized in another way"
        print(f"{metric:<12}{kind:<10}{len(a):>4}{np.ptp(b):>10.1e}{absolute:>10.1e}{relative:>10.1e}  {shown}")
    return agree


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The manifest, how much of it, and the weights."""
    parser = Parser("python scripts/eval/check_scorers.py", __doc__)
    parser.add_argument("manifest", help="the .json file beside a folder of images")
    parser.add_argument("--images", type=int, default=16, help="how many of them, from the first one on")
    parser.add_argument("--metrics", nargs="+", choices=TOLERANCES, default=list(TOLERANCES), help="what to compare")
    about = "local path or hub file; the med_config.json of imagereward.checkpoint is looked for beside it, then there"
    parser.add_argument("--weights", nargs="*", action="extend", default=[], metavar="METRIC.PART=SOURCE", help=about)
    parser.add_argument("--reference_python", required=True, help="interpreter that has the packages")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> bool:
    """Compare every metric on a manifest's first images, print the verdict and return whether all agree."""
    args = parse_arguments(arguments)
    sources = parse_assignments(args.weights, "--weights")
    if args.images < 1:
        raise InputError(f"--images must be at least 1, got {args.images}")
    entries = read_manifest(args.manifest)[: args.images]
    require_images(entries)
    images: dict[str, Rows] = {STORED: [(str(entry.path), entry.prompt) for entry in entries], SMALL: []}
    with TemporaryDirectory() as folder:
        for number, (path, prompt) in enumerate(images[STORED]):
            small = Path(folder, f"{number}.png")
            try:
                picture = decode(path)
            except Exception as error:  # every image format has errors of its own
                raise InputError(f"image {path} cannot be read: {brief(error)}; make it again") from error
            ImageOps.fit(picture, (224, 224), Image.Resampling.BICUBIC).save(small)
            images[SMALL].append((str(small), prompt))
        print(f"{'metric':<12}{'images':<10}{'n':>4}{'spread':>10}{'max |d|':>10}{'relative':>10}")
        agree = [compare(metric, images, sources, args.reference_python) for metric in args.metrics]
    print("our scores and the packages' agree" if all(agree) else "our scores and the packages' DIFFER")
    return all(agree)


if __name__ == "__main__":
    sys.exit(0 if run_command(main) else 1)
