"""Compare runs on the tiny base model: what sdpo.compare does, and samples of every model with their scores.

`python -m sdpo.tiny.compare --out DIR NAME=RUN ...` takes output folders of train.py and leaves table.md, table.json,
errors.png and samples.png in DIR.
"""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

from sdpo.command import InputError, run_command, show
from sdpo.compare import COLUMNS, Measured, describe, open_runs, write_results
from sdpo.console import quiet_libraries
from sdpo.families import Family, load_family
from sdpo.heldout import mean_of, prompt_ids
from sdpo.hub import load_weights
from sdpo.rng import normal
from sdpo.sampling import sample
from sdpo.tiny import BASE, pictures

STEPS, GUIDANCE, PER_CAPTION = 20, 1.0, 8  # guidance 1: the conditional model itself, without help
PER_ROW = 20  # samples shown of a model
FILES = {"raw": "unet.pth", "averaged": "unet_ema.pth"}
SCORE_COLUMNS = {"sample score": ("score", 1, 3), "all correct": ("all_correct", 1, 2)}  # columns of the table
BEGINNING = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "unet_init")
ALIKE = (  # settings that runs to be compared have in common
    *BEGINNING, "dataset_name", "train_data_dir", "split", "labels_file",
    "choice_model", "choice_margin", "choice_weights", "dreamlike_pairs_only", "max_train_samples", "seed", "pairs",
    "validation_pairs", "validation_split", "validation_data_dir", "validation_seed", "global_batch", "steps",
)  # fmt: skip


def sample_pictures(family: Family, unet: torch.nn.Module) -> tuple[np.ndarray, list[str]]:
    """PER_CAPTION pictures of each held-out caption, (N, 32, 32, 3) uint8, from the same noise for every model."""
    captions = [spec.caption for spec in pictures.HELD_OUT for _ in range(PER_CAPTION)]
    shape = family.latent_shape(pictures.SIDE)
    noise = torch.stack([normal(0, "compare", (i,), shape) for i in range(len(captions))])
    return sample(family, unet, captions, noise, STEPS, GUIDANCE), captions


def evaluate(family: Family, weights: Path | None) -> tuple[dict[str, float], np.ndarray]:
    """Mean score, its standard error and the share of all-correct samples of one UNet, with its pictures."""
    unet = family.load_unet().eval()
    if weights:
        load_weights(unet, weights)
    images, captions = sample_pictures(family, unet)
    scores = np.array([pictures.score(image, caption) for image, caption in zip(images, captions, strict=True)])
    figures = mean_of("score", torch.from_numpy(scores), prompt_ids(captions))
    return {**figures, "all_correct": (scores == 1).mean()}, images


def refuse_unlike(runs: list[Measured]) -> None:
    """Raises InputError unless the runs ended, began with the tiny base and saw the same pairs in the same order."""
    first, *others = runs
    for run in runs:
        needed = [FILES["raw"], *([FILES["averaged"]] if "average" in run.errors else [])]
        if not all((run.folder / name).is_file() for name in needed):
            raise InputError(f"{run.folder} is no run that ended, with {' and '.join(needed)}: run its command again")
    for run in others:
        if differing := ", ".join(name for name in ALIKE if run.settings.get(name) != first.settings.get(name)):
            raise InputError(f"{first.label} and {run.label} differ in {differing}: compare runs that do not")
    base, *replaced = (first.settings.get(name) for name in BEGINNING)
    if any(replaced) or os.path.realpath(base or "") != os.path.realpath(BASE):
        raise InputError(f"{first.label} did not begin with the tiny base model in {BASE}: use python -m sdpo.compare")


def reading(rows: list[dict]) -> str:
    """A paragraph on what the table shows, from its own figures, and on what it does not show."""
    base, *raw = [row for row in rows if row["weights"] != "averaged"]
    sentences = [
        f"Every run started from the same tiny base model (sample score {base['score']:.3f}, "
        f"{base['all_correct']:.0%} of its pictures all-correct) and saw the same pairs in the same order. Errors are "
        "denoising errors on pairs whose captions were set aside, minus the base's; below zero beats the base."
    ]
    for row in raw:
        moves = (f"{member} error {row[f'{member}_error_change'] * 1e3:+.2f}e-3" for member in ("winner", "loser"))
        sentences.append(
            f"{row['run']}: {', '.join(moves)}, sample score changed by {row['score'] - base['score']:+.3f}."
        )
    averaged = {row["run"]: row["winner_error_change"] for row in rows if row["weights"] == "averaged"}
    better = sum(averaged[row["run"]] < row["winner_error_change"] for row in raw if row["run"] in averaged)
    if averaged:
        sentences.append(f"Averaging the weights lowered the winner's error in {better} of {len(averaged)} runs.")
    sentences.append(
        "A method whose winner error rises widens its margin only by losing the loser faster than the winner. This is "
        "one seed on 32 x 32 pictures: it shows the mechanism, it does not rank methods on real models, and the "
        "safeguard's own promise is about the training batch, to first order, not about held-out pairs."
    )
    return textwrap.fill(" ".join(sentences), 120)


def draw_samples(images: dict[str, np.ndarray], path: Path) -> None:
    """A row of pictures per model: the same captions and noise in each column."""
    figure, axes = plt.subplots(len(images), 1, figsize=(11, 0.75 * len(images)), layout="constrained")
    for axis, (name, pictures_of_model) in zip(np.atleast_1d(axes), images.items(), strict=True):
        axis.imshow(np.concatenate(list(pictures_of_model[::PER_CAPTION][:PER_ROW]), 1))
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Score the base and every run, raw and averaged weights."""
    runs, out = open_runs("python -m sdpo.tiny.compare", __doc__, arguments)
    refuse_unlike(runs)
    quiet_libraries()
    family = load_family(None, str(BASE))
    family.to(torch.device("cpu"), torch.float32)

    figures, images = evaluate(family, None)
    rows, grids = [{"run": "base", "weights": "", **figures}], {"base": images}
    for run in runs:
        for row in describe(run, runs[0]):
            figures, images = evaluate(family, run.folder / FILES[row["weights"]])
            rows.append(row | figures)
            grids[f"{run.label}, {row['weights']}"] = images
    write_results(runs, rows, COLUMNS | SCORE_COLUMNS, out)
    draw_samples(grids, out / "samples.png")
    show(f"\n{reading(rows)}\n\nTable, chart and samples: table.md, errors.png and samples.png in {out}")


if __name__ == "__main__":
    run_command(main)
