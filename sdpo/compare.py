"""Compare training runs by their errors on the same held-out pairs: `python -m sdpo.compare --out DIR NAME=RUN ...`.

RUN is an output folder of train.py, whose run may still go on: what was measured last counts. Leaves table.md,
table.json and errors.png in DIR. The winner's error is also compared pair by pair with that of the first run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from sdpo.command import InputError, Parser, parse_assignments, run_command, show
from sdpo.files import brief, parse_json, read_text, write_json, write_text
from sdpo.heldout import HELD_OUT_FILE, MEMBERS, PREFIXES, STEP, figures_of, mean_of, prompt_ids
from sdpo.metrics import read_metrics, without_nan

log = logging.getLogger(__name__)
WEIGHTS = {"policy": "raw", "average": "averaged"}  # models as the table calls them
SAME_REFERENCE = 0.05  # errors of the reference may differ by this share, as in another precision
ROUNDING = 1e-3  # more than this is pointed out
WITHOUT_INFLUENCE = ("output_dir", "logging_dir", "cache_dir", "latent_cache", "reference_cache")
COLUMNS = {  # heading -> key of a row, factor, digits
    "updates": ("updates", 1, 0),
    "Δ winner error x 1e3": ("winner_error_change", 1e3, 2),
    "Δ loser error x 1e3": ("loser_error_change", 1e3, 2),
    "margin accuracy": ("margin_accuracy", 1, 3),
    "winner error minus first run's x 1e3": ("winner_error_difference", 1e3, 2),
    "mean lambda": ("lambda", 1, 2),
}


@dataclass(frozen=True)
class Measured:
    """What a run measured last on its held-out pairs."""

    label: str
    folder: Path
    settings: dict[str, Any]  # flags and plan, as in config.json
    updates: int  # made when it was measured
    pairs: np.ndarray  # (n,) int, numbers of the pairs that could be read
    captions: np.ndarray  # (n,) str
    errors: dict[str, Tensor]  # (n, 2) of winner and loser, by model: reference, policy and, with --use_ema, average

    def select(self, pairs: np.ndarray) -> Measured:
        """What it measured on these pairs, which it has."""
        keep = np.searchsorted(self.pairs, pairs)
        errors = {model: values[torch.from_numpy(keep)] for model, values in self.errors.items()}
        return replace(self, pairs=pairs, captions=self.captions[keep], errors=errors)


def read_run(label: str, folder: Path) -> Measured:
    """What an output folder of train.py holds; raises InputError for one without held-out errors."""
    path, config = folder / HELD_OUT_FILE, folder / "config.json"
    if not path.is_file() or not config.is_file():
        raise InputError(f"{folder} is no run that measured held-out pairs: train it with --validation_pairs")
    try:
        table = pq.read_table(path)
        check_table(table)
        updates = int(table.schema.metadata[STEP])
        table = table.sort_by("pair")
        errors = {
            model: torch.stack([torch.tensor(table[f"{model}_{member}_error"].to_numpy()) for member in MEMBERS], 1)
            for model in ("reference", *PREFIXES)
            if model != "average" or f"{model}_{MEMBERS[0]}_error" in table.column_names
        }
        pairs, captions = table["pair"].to_numpy().astype(int), np.array(table["caption"].to_pylist(), str)
    except Exception as error:  # pyarrow has many
        raise InputError(f"{path} is not one of train.py, or damaged ({brief(error)}): measure again") from error
    content = parse_json(read_text(config), config, "train again")
    try:
        settings = content["config"] | content["plan"]
        beta, every = settings["beta_dpo"], settings.get("logging_steps", 1)
        known = isinstance(beta, float) and 0 < beta < math.inf and type(every) is int and 0 < every < 2**63
    except (TypeError, KeyError):
        known = False
    if not known:
        raise InputError(f"{config} does not have the settings and plan of a run: train again")
    if not all(values.isfinite().all() for values in errors.values()):
        log.warning(f"CAUTION: errors in {path} are not finite, as those of broken weights are")
    return Measured(label, folder, settings, updates, pairs, captions, errors)


def check_table(table: pa.Table) -> None:
    """Raises ValueError for held-out errors that no run has written."""
    if any(column.null_count for column in table.columns):
        raise ValueError("values are missing")
    if table.num_rows and not (pa.types.is_integer(table["pair"].type) and pa.types.is_string(table["caption"].type)):
        raise ValueError("pair and caption are not numbers and texts")
    if len(pc.unique(table["pair"])) < table.num_rows:
        raise ValueError("a pair twice")


def read_runs(named: dict[str, str]) -> list[Measured]:
    """Runs by label, on the pairs that all of them could read; InputError unless they were measured on the same."""
    first, *others = runs = [read_run(label, Path(folder)) for label, folder in named.items()]
    fix = "compare runs of the same base and data with the same resolution, held-out pairs and --validation_seed"
    pairs = first.pairs
    for run in others:
        pairs = np.intersect1d(pairs, run.pairs)
    if not len(pairs):
        raise InputError(f"{', '.join(named)} have no held-out pair in common: {fix}")
    first, *others = runs = [run.select(pairs) for run in runs]
    for run in others:
        if (differ := first.captions != run.captions).any():
            number, one, other = (str(values[differ][0]) for values in (pairs, first.captions, run.captions))
            raise InputError(
                f"{first.label} and {run.label} were measured on other pairs, the first pair {number} of {one!r:.80} "
                f"and {other!r:.80}: {fix}"
            )
        ours, theirs = first.errors["reference"], run.errors["reference"]
        if not torch.allclose(ours, theirs, rtol=SAME_REFERENCE, atol=0, equal_nan=True):
            raise InputError(
                f"{first.label} and {run.label} were not measured alike: errors of their references differ: {fix}"
            )
        if not torch.allclose(ours, theirs, rtol=ROUNDING, atol=0, equal_nan=True):
            shares = (theirs / ours - 1).abs().nan_to_num(0, 0)
            log.warning(
                f"CAUTION: errors of the references of {first.label} and {run.label} differ by up to "
                f"{shares.max():.2%}: differences of that order between these runs mean nothing"
            )
    return runs


def describe(run: Measured, first: Measured) -> list[dict[str, Any]]:
    """A row {run, weights, updates, figures...} for the raw and, if there are any, the averaged weights of a run."""
    rows = []
    prompts = prompt_ids(run.captions)
    logged = [(step, value) for step, value in read_metrics(run.folder, "avg_lose_l_scale") if step <= run.updates]
    for model in (model for model in PREFIXES if model in run.errors):
        change = run.errors[model] - run.errors["reference"]
        row = {"run": run.label, "weights": WEIGHTS[model], "updates": run.updates}
        row |= figures_of(change, prompts, run.settings["beta_dpo"])
        if run is not first or model != "policy":
            difference = run.errors[model][:, 0] - first.errors["policy"][:, 0]
            row |= mean_of("winner_error_difference", difference, prompts)
        if logged:  # sft has none
            steps, scales = zip(*logged, strict=True)  # each a mean over the updates since the last one
            weights = count_updates(steps, run.settings.get("logging_steps", steps[0]))
            row["lambda"] = float(np.average(scales, weights=weights))
        rows.append(row)
    return rows


def count_updates(steps: Sequence[int], logging_steps: int) -> np.ndarray:
    """How many updates each log line is a mean over, by its step; a run that went on from elsewhere begins later."""
    return np.diff([max(0, steps[0] - logging_steps), *steps]).clip(1)


def differing_settings(runs: Sequence[Measured]) -> list[str]:
    """A line per setting that is not the same in all runs."""
    names = {name: None for run in runs for name in run.settings if name not in WITHOUT_INFLUENCE}
    lines = []
    for name in names:
        values = [run.settings.get(name) for run in runs]
        if any(value != values[0] for value in values):
            lines.append(f"{name}: " + ", ".join(f"{run.label} {v}" for run, v in zip(runs, values, strict=True)))
    return lines


def write_table(rows: Sequence[dict[str, Any]], path: Path, columns: dict[str, tuple[str, float, int]]) -> str:
    """Write rows with a label and kind of weights as a Markdown table, and return it; columns are as in COLUMNS."""

    def cell(row: dict[str, Any], key: str, factor: float, digits: int) -> str:
        if key not in row:
            return ""
        spread = f" ± {row[f'{key}_se'] * factor:.{digits}f}" if f"{key}_se" in row else ""
        sign = "+" if key.endswith(("_change", "_difference")) else ""
        return f"{row[key] * factor:{sign}.{digits}f}{spread}"

    lines = ["| run | weights | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = [cell(row, *column) for column in columns.values()]
        label = " ".join(row["run"].split()).replace("|", "\\|")
        lines.append(" | ".join([f"| {label}", row["weights"], *cells]) + " |")
    write_text(path, "\n".join(lines) + "\n")
    return "\n".join(lines)


def draw_errors(runs: Sequence[Measured], path: Path) -> None:
    """The paper's Figure 1: held-out errors of winner and loser minus the reference's, over updates, raw weights."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True, layout="constrained")
    for axis, member in zip(axes, MEMBERS, strict=True):
        for run in runs:
            points = read_metrics(run.folder, f"heldout/{member}_error_change")
            errors = [value for _, value in read_metrics(run.folder, f"heldout/{member}_error_change_se")]
            spread = {"yerr": errors, "capsize": 2} if len(errors) == len(points) else {}  # none of a single prompt
            updates, changes = np.array(points).reshape(-1, 2).T
            label = " " + run.label.replace("$", r"\$")  # matplotlib leaves out names that begin with _
            axis.errorbar(updates, changes, label=label, marker="o", markersize=3, **spread)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set(title=f"{member} error minus reference (held-out pairs)", xlabel="updates")
        axis.set_yscale("symlog", linthresh=1e-3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def open_runs(command: str, about: str, arguments: list[str] | None) -> tuple[list[Measured], Path]:
    """The runs that a command line names, and the folder of the results, which is made."""
    parser = Parser(command, about)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="label and output folder of a run of train.py")
    parser.add_argument("--out", required=True, help="folder of the results")
    args = parser.parse_args(arguments)
    if not args.out:
        raise InputError("--out is empty: name a folder")
    runs = read_runs(parse_assignments(args.runs, "run"))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    return runs, Path(args.out)


def write_results(runs: Sequence[Measured], rows: list[dict[str, Any]], columns: dict, out: Path) -> None:
    """Write table.json, table.md and errors.png into a folder, and show the table; columns are as in COLUMNS."""
    draw_errors(runs, out / "errors.png")
    write_json(out / "table.json", list(map(without_nan, rows)))
    show(write_table(rows, out / "table.md", columns))


def main(arguments: list[str] | None = None) -> None:
    """Compare as the command line says."""
    runs, out = open_runs("python -m sdpo.compare", __doc__, arguments)
    write_results(runs, [row for run in runs for row in describe(run, runs[0])], COLUMNS, out)
    show("\n" + "\n".join(["settings that differ:", *differing_settings(runs)]))
    pairs, captions = len(runs[0].pairs), len(prompt_ids(runs[0].captions).unique())
    show(f"\n{pairs} held-out pairs of {captions} captions, over which ± is one standard error")
    show(f"table and chart: table.md and errors.png in {out}")


if __name__ == "__main__":
    run_command(main)
