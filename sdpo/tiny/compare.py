"""Compare runs on the tiny base model: sample, score, and write table, chart and pictures.

`python -m sdpo.tiny.compare --out DIR NAME=RUN ...` takes output folders of train.py and leaves table.md, table.json,
errors.png and samples.png in DIR.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

from sdpo.command import InputError, Parser, parse_assignments, run_command, show
from sdpo.console import quiet_libraries
from sdpo.families import Family, load_family
from sdpo.files import parse_json, read_text, write_json, write_text
from sdpo.heldout import clustered_error
from sdpo.hub import load_weights
from sdpo.metrics import read_metrics
from sdpo.rng import normal
from sdpo.sampling import sample
from sdpo.tiny import BASE, pictures

STEPS, GUIDANCE, PER_CAPTION = 20, 1.0, 8  # guidance 1: the conditional model itself, without help
WEIGHTS = {  # file, prefix of its held-out metrics
    "raw": ("unet.pth", "heldout"),
    "averaged": ("unet_ema.pth", "heldout_ema"),
}
ALIKE = (  # settings that runs to be compared have in common
    "pretrained_model_name_or_path", "unet_init", "dataset_name", "train_data_dir", "labels_file", "seed",
    "validation_pairs", "validation_seed", "global_batch", "steps",
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
    error = clustered_error(torch.from_numpy(scores), torch.from_numpy(np.unique(captions, return_inverse=True)[1]))
    return {"score": scores.mean(), "score_se": error, "all_correct": (scores == 1).mean()}, images


def refuse_unlike(runs: dict[str, Path]) -> None:
    """Raises InputError unless the runs began with one model and were shown the same pairs in the same order."""
    said = {}
    for name, run in runs.items():
        path = run / "config.json"
        try:
            settings = parse_json(read_text(path), path, "train again")
            said[name] = settings["config"] | settings["plan"]
        except (TypeError, KeyError):
            raise InputError(f"{path} does not have the settings and plan of a run: train again") from None
    first, *others = said
    for name in others:
        if differing := [key for key in ALIKE if said[name].get(key) != said[first].get(key)]:
            raise InputError(f"{first} and {name} differ in {', '.join(differing)}: compare runs that do not")


def held_out_figures(run: Path, prefix: str) -> dict[str, float]:
    """Last held-out figures of a run and its mean loser scale."""
    names = ("winner_error_change", "loser_error_change", "margin_accuracy")
    figures = {key: read_metrics(run, f"{prefix}/{key}")[-1][1] for name in names for key in (name, f"{name}_se")}
    if scales := [value for _, value in read_metrics(run, "avg_lose_l_scale")]:  # sft has none
        figures["lambda"] = float(np.mean(scales))
    return figures


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
            f"{row['method']}: {', '.join(moves)}, sample score changed by {row['score'] - base['score']:+.3f}."
        )
    averaged = {row["method"]: row["winner_error_change"] for row in rows if row["weights"] == "averaged"}
    better = sum(averaged[row["method"]] < row["winner_error_change"] for row in raw if row["method"] in averaged)
    if averaged:
        sentences.append(f"Averaging the weights lowered the winner's error in {better} of {len(averaged)} runs.")
    sentences.append(
        "A method whose winner error rises widens its margin only by losing the loser faster than the winner. This is "
        "one seed on 32 x 32 pictures: it shows the mechanism, it does not rank methods on real models, and the "
        "safeguard's own promise is about the training batch, to first order, not about held-out pairs."
    )
    return textwrap.fill(" ".join(sentences), 120)


def write_table(rows: list[dict], path: Path) -> str:
    """Write the rows as a Markdown table, errors in thousandths, and return it."""

    def cell(row: dict, key: str, factor: float, digits: int) -> str:
        if key not in row:
            return ""
        spread = f" ± {row[f'{key}_se'] * factor:.{digits}f}" if f"{key}_se" in row else ""
        return f"{row[key] * factor:{'+' if factor != 1 else ''}.{digits}f}{spread}"

    columns = {
        "Δ winner error x 1e3": ("winner_error_change", 1e3, 2),
        "Δ loser error x 1e3": ("loser_error_change", 1e3, 2),
        "margin accuracy": ("margin_accuracy", 1, 3),
        "mean lambda": ("lambda", 1, 2),
        "sample score": ("score", 1, 3),
        "all correct": ("all_correct", 1, 2),
    }
    lines = ["| method | weights | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = [cell(row, *column) for column in columns.values()]
        lines.append(f"| {row['method']} | {row['weights']} | " + " | ".join(cells) + " |")
    write_text(path, "\n".join(lines) + "\n")
    return "\n".join(lines)


def draw_errors(runs: dict[str, Path], path: Path) -> None:
    """The paper's Figure 1: held-out errors of winner and loser minus the reference's, over updates, raw weights."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True, layout="constrained")
    for axis, member in zip(axes, ("winner", "loser"), strict=True):
        for name, run in runs.items():
            points = read_metrics(run, f"heldout/{member}_error_change")
            errors = [value for _, value in read_metrics(run, f"heldout/{member}_error_change_se")]
            axis.errorbar(*zip(*points, strict=True), yerr=errors, label=name, marker="o", markersize=3, capsize=2)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set(title=f"{member} error minus reference (held-out pairs)", xlabel="updates")
        axis.set_yscale("symlog", linthresh=1e-3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_samples(images: dict[str, np.ndarray], path: Path, per_row: int = 20) -> None:
    """A row of pictures per model: the same captions and noise in each column."""
    figure, axes = plt.subplots(len(images), 1, figsize=(11, 0.75 * len(images)), layout="constrained")
    for axis, (name, pictures_of_model) in zip(np.atleast_1d(axes), images.items(), strict=True):
        axis.imshow(np.concatenate(list(pictures_of_model[::PER_CAPTION][:per_row]), 1))
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main() -> None:
    """Score the base and every run, raw and averaged weights."""
    parser = Parser("python -m sdpo.tiny.compare", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="label and output folder of a run of train.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    runs = {name: Path(folder) for name, folder in parse_assignments(args.runs, "run").items()}
    for run in runs.values():
        if not (run / "unet.pth").is_file() or not read_metrics(run, "heldout/margin_se"):
            raise InputError(f"{run} is no run that ended and had held-out pairs: train it with --validation_pairs")
    refuse_unlike(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    family = load_family(None, str(BASE))
    family.to(torch.device("cpu"), torch.float32)

    figures, images = evaluate(family, None)
    rows, grids = [{"method": "base", "weights": "", **figures}], {"base": images}
    for name, run in runs.items():
        for label, (file, prefix) in WEIGHTS.items():
            if (run / file).exists():
                figures, images = evaluate(family, run / file)
                rows.append({"method": name, "weights": label, **held_out_figures(run, prefix), **figures})
                grids[f"{name}, {label}"] = images
    write_json(args.out / "table.json", rows)
    show(write_table(rows, args.out / "table.md"))
    draw_errors(runs, args.out / "errors.png")
    draw_samples(grids, args.out / "samples.png")
    show(f"\n{reading(rows)}\n\nTable, chart and samples: table.md, errors.png and samples.png in {args.out}")


if __name__ == "__main__":
    run_command(main)
