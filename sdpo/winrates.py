"""Win rates of one run's images over another's, with intervals and tests, on scores alone: no torch, no images.

Images are paired by prompt. Files and rules are the official ones. Added to summary.json are, in each metric's row,
`win_rate_ci95`, `sign_test_p`, `sign_test_p_holm`, `mean_difference` and `mean_difference_ci95`, and beside the rows
`pairing` (by what, prompts without a partner, settings by which the images differ, whether images of a run share their
noise) and `bootstrap`; to the files of a metric's pairs `prompt_b`, where the prompts differ.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy import stats

from sdpo.command import InputError
from sdpo.files import write_json
from sdpo.manifest import MADE_WITH, OFFICIAL_METRICS, Entry, Scores, check_score, find_score

TIE_FOR_A = {"half": 0.5, "loss_for_a": 0.0}  # what a tie counts by ties policy
RESAMPLES = 9999  # of the bootstrap
FEW_PAIRS = 50  # below which its intervals are too narrow
SHOWN = 10  # dropped prompts on the console

Interval = tuple[float, float]


@dataclass(frozen=True)
class ScoredRun:
    """A manifest's entries and their scores under the label of the model that made the images."""

    label: str
    entries: Sequence[Entry]
    scores: Mapping[str, Sequence[float]]  # by metric, each (len(entries),)

    def __post_init__(self):
        for metric, values in self.scores.items():
            for entry, value in zip(self.entries, values, strict=True):
                check_score(value, f"{entry.where}: {metric} of {entry.image}")


@dataclass(frozen=True)
class Comparison:
    """Win rates of run A over run B: the contents of the output folder."""

    summary: dict[str, Any]  # summary.json
    details: dict[str, dict[str, Any]]  # by metric, pair_{metric}.json


def collect_run(label: str, entries: Sequence[Entry], scores: Scores, metrics: Sequence[str]) -> ScoredRun:
    """A run from score rows (sdpo.manifest.read_scores); raises InputError if an entry has no score."""
    table = {}
    for metric in metrics:
        found = [find_score(entry, scores, metric) for entry in entries]
        missing = [entry for entry, score in zip(entries, found, strict=True) if score is None]
        if missing:
            raise InputError(
                f"{label} has no {metric} for {len(missing)} of {len(entries)} images, the first is "
                f"{missing[0].image} ({missing[0].where}); score the manifest first"
            )
        table[metric] = [float(score) for score in found]  # ties are between floats
    return ScoredRun(label, entries, table)


def in_order(metrics: Iterable[str], first: Sequence[str]) -> list[str]:
    """Metrics, those of `first` in its order and then all others."""
    return sorted(metrics, key=lambda metric: first.index(metric) if metric in first else len(first))


def check_labels(labels: Sequence[str]) -> None:
    """Raises InputError unless the labels of runs can name folders and tell winners apart."""
    for label in labels:
        if not label.strip(" .") or any(c in "/\\" or not c.isprintable() for c in label) or len(label.encode()) > 60:
            raise InputError(
                f"label {label!r} cannot name an output folder; use up to 60 letters, digits, dots and dashes, "
                "and no path separators"
            )
        if label == "tie":
            raise InputError("label 'tie' is what a draw is called in the results; choose another label")
    if len(set(labels)) < len(labels):
        raise InputError(f"labels must differ, got {', '.join(labels)}; give each run its own")
    folders = [f"{a}_vs_{b}" for a, b in combinations(labels, 2)]
    if len(set(folders)) < len(folders):
        raise InputError(f"results of two pairs of {', '.join(labels)} would have the same folder; choose other labels")


# Pairing


def pair_by_prompt(prompts_a: Sequence[str], prompts_b: Sequence[str]) -> list[tuple[int, int]]:
    """Places (i, j) of equal prompts, sorted by prompt; the n-th of a repeated prompt goes with the other's n-th."""
    places_a, places_b = _places(prompts_a), _places(prompts_b)
    common = sorted(places_a.keys() & places_b.keys())
    return [pair for prompt in common for pair in zip(places_a[prompt], places_b[prompt], strict=False)]


def _places(prompts: Sequence[str]) -> dict[str, list[int]]:
    places = defaultdict(list)
    for place, prompt in enumerate(prompts):
        places[prompt].append(place)
    return places


def pair_by_index(prompts_a: Sequence[str], prompts_b: Sequence[str]) -> list[tuple[int, int]]:
    """Places (i, i) in file order, whatever the prompts, to the end of the shorter file."""
    return [(place, place) for place in range(min(len(prompts_a), len(prompts_b)))]


PAIRINGS = {"prompt": pair_by_prompt, "index": pair_by_index}


def pair_runs(a: ScoredRun, b: ScoredRun, pair_by: str = "prompt") -> list[tuple[int, int]]:
    """Places of the pairs' members among the entries of two runs, by a row of PAIRINGS.

    Raises InputError if no prompt is common.
    """
    pairs = PAIRINGS[pair_by](*([entry.prompt for entry in run.entries] for run in (a, b)))
    if not pairs:
        raise InputError(
            f"{a.label} and {b.label} have no prompt in common ({a.entries[0].where}: {a.entries[0].prompt!r:.200}; "
            f"{b.entries[0].where}: {b.entries[0].prompt!r:.200}); generate both from the same prompts, "
            "or give --pair_by index to pair them in file order"
        )
    return pairs


# Statistics of one metric


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of values (n,) and its standard error (sample deviation over the root of n); None for a single value."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927).

    `successes` may be fractional: a tie is a success of one half in a full trial. The variance of such a trial is
    p (1 - p) - ties / (4 trials), less than a coin's, so with ties the interval is on the wide, safe side.
    """
    z = stats.norm.ppf(0.5 + confidence / 2)
    p, shrink = successes / trials, 1 + z**2 / trials
    centre = (p + z**2 / (2 * trials)) / shrink
    half = z / shrink * np.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def sign_test(wins_a: int, wins_b: int) -> float:
    """Two-sided exact p-value of "A and B win equally often" on pairs that are not ties; 1 if all are."""
    decided = wins_a + wins_b
    return float(stats.binomtest(wins_a, decided).pvalue) if decided else 1.0


def bootstrap_interval(differences: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval | None:
    """95 % percentile interval of the mean of score differences A - B, (n,), pairs resampled; None for one pair."""
    if len(differences) < 2:
        return None
    interval = stats.bootstrap(
        (np.asarray(differences),), np.mean, n_resamples=resamples, batch=500, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down procedure (Holm 1979), in the given order."""
    p, order = np.asarray(p_values), np.argsort(p_values)
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(corrected, 1).tolist()


# Comparison


def compare(a: ScoredRun, b: ScoredRun, *, ties: str = "half", pair_by: str = "prompt", seed: int = 0) -> Comparison:
    """Win rates of A over B on every metric.

    ties: what a tie counts for A, a row of TIE_FOR_A; pair_by: a row of PAIRINGS; seed: of the bootstrap. Raises
    InputError for labels that cannot be used, runs that were not scored alike and runs without a common prompt.
    """
    check_labels([a.label, b.label])
    if a.scores.keys() != b.scores.keys():
        only = ", ".join(sorted(a.scores.keys() ^ b.scores.keys()))
        raise InputError(f"only one of {a.label} and {b.label} has {only}; score both with the same metrics")
    metrics = in_order(a.scores, OFFICIAL_METRICS)
    pairs = pair_runs(a, b, pair_by)
    details = {metric: _detail(a, b, pairs, metric, ties) for metric in metrics}
    rows = [_summary_row(metric, detail, seed) for metric, detail in details.items()]
    for row, p in zip(rows, holm([row["sign_test_p"] for row in rows]), strict=True):
        row["sign_test_p_holm"] = p
    rates, sizes = ([row[key] for row in rows] for key in ("win_rate_a_over_b", "total_pairs"))
    averages = {
        "macro_win_rate_a_over_b": fmean(rates),
        "micro_win_rate_a_over_b": fmean(rates, sizes),
    }
    summary = {
        "pair": {"model_a": a.label, "model_b": b.label, "ties_policy": ties},
        "metrics": rows,
        "averages": averages,
        "pairing": {
            "by": pair_by,
            **_dropped(a, b, pairs),
            "differing": _differing(a, b, pairs),
            "share_noise": _share_noise(a.entries) and _share_noise(b.entries),
        },
        "bootstrap": {"resamples": RESAMPLES, "seed": seed},
    }
    return Comparison(summary, details)


def _detail(a: ScoredRun, b: ScoredRun, pairs: list[tuple[int, int]], metric: str, ties: str) -> dict[str, Any]:
    """Content of pair_{metric}.json."""
    results = []
    for index, (i, j) in enumerate(pairs):
        entry_a, entry_b, score_a, score_b = a.entries[i], b.entries[j], a.scores[metric][i], b.scores[metric][j]
        winner = "tie" if score_a == score_b else a.label if score_a > score_b else b.label
        result = {
            "pair_index": index,
            "prompt": entry_a.prompt,
            "image_a": entry_a.image,
            "image_b": entry_b.image,
            "score_a": float(score_a),
            "score_b": float(score_b),
            "winner": winner,
        }
        if entry_a.prompt != entry_b.prompt:
            result["prompt_b"] = entry_b.prompt
        results.append(result)
    wins_a, wins_b, tied = (sum(r["winner"] == winner for r in results) for winner in (a.label, b.label, "tie"))
    return {
        "model_a": a.label,
        "model_b": b.label,
        "total_pairs": len(results),
        "wins_a": wins_a,
        "wins_b": wins_b,
        "ties": tied,
        "win_rate_a_over_b": (wins_a + TIE_FOR_A[ties] * tied) / len(results),
        "mean_score_a": fmean(r["score_a"] for r in results),
        "mean_score_b": fmean(r["score_b"] for r in results),
        "ties_policy": ties,
        "results": results,
    }


def _summary_row(metric: str, detail: dict[str, Any], seed: int) -> dict[str, Any]:
    """A metric's row of summary.json: the official keys, then ours; the Holm correction follows when all are known."""
    differences = [r["score_a"] - r["score_b"] for r in detail["results"]]
    successes = detail["wins_a"] + TIE_FOR_A[detail["ties_policy"]] * detail["ties"]
    return {
        "metric": metric,
        "mean_a": detail["mean_score_a"],
        "mean_b": detail["mean_score_b"],
        **{key: detail[key] for key in ("win_rate_a_over_b", "wins_a", "wins_b", "ties", "total_pairs")},
        "win_rate_ci95": wilson_interval(successes, detail["total_pairs"]),
        "sign_test_p": sign_test(detail["wins_a"], detail["wins_b"]),
        "sign_test_p_holm": None,
        "mean_difference": fmean(differences),
        "mean_difference_ci95": bootstrap_interval(differences, seed),
    }


def _dropped(a: ScoredRun, b: ScoredRun, pairs: list[tuple[int, int]]) -> dict[str, list[str]]:
    """Prompts of entries that have no partner, in file order."""
    used_a, used_b = (set(places) for places in zip(*pairs, strict=True))
    return {
        "dropped_a": [entry.prompt for i, entry in enumerate(a.entries) if i not in used_a],
        "dropped_b": [entry.prompt for j, entry in enumerate(b.entries) if j not in used_b],
    }


def _differing(a: ScoredRun, b: ScoredRun, pairs: list[tuple[int, int]]) -> dict[str, int]:
    """How many pairs' manifests have other values of a setting of MADE_WITH; without zeros."""
    both = [(a.entries[i].made_with, b.entries[j].made_with) for i, j in pairs]
    counts = {name: sum(name in x and name in y and x[name] != y[name] for x, y in both) for name in MADE_WITH}
    return {name: count for name, count in counts.items() if count}


def _share_noise(entries: Sequence[Entry]) -> bool:
    """Whether several images began with one noise, as the official code has it, whose manifests do not say so."""
    return len(entries) > 1 and all(entry.made_with.get("noise", "shared") == "shared" for entry in entries)


# Several runs


def compare_all(runs: Sequence[ScoredRun], **options: Any) -> list[Comparison]:
    """Comparisons of every two of several runs, the earlier one as A; options as in compare."""
    check_labels([run.label for run in runs])
    return [compare(a, b, **options) for a, b in combinations(runs, 2)]


def win_matrix(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Win rates of row over column: {"labels", "ties_policy", "metrics": {metric: {"win_rate", "p_holm"}}}.

    Each matrix is a list of rows with None on the diagonal. p_holm is the sign test's p-value, corrected for all the
    metrics and comparisons of the matrix together.
    """
    labels = list(dict.fromkeys(c.summary["pair"][side] for side in ("model_a", "model_b") for c in comparisons))
    cells = [(c, row) for c in comparisons for row in c.summary["metrics"]]
    metrics: dict[str, Any] = {}
    for (comparison, row), p in zip(cells, holm([row["sign_test_p"] for _, row in cells]), strict=True):
        empty = {name: [[None] * len(labels) for _ in labels] for name in ("win_rate", "p_holm")}
        matrices = metrics.setdefault(row["metric"], empty)
        pair = comparison.summary["pair"]
        i, j = labels.index(pair["model_a"]), labels.index(pair["model_b"])
        wins_b = row["wins_b"] + TIE_FOR_A[pair["ties_policy"]] * row["ties"]
        matrices["win_rate"][i][j], matrices["win_rate"][j][i] = row["win_rate_a_over_b"], wins_b / row["total_pairs"]
        matrices["p_holm"][i][j] = matrices["p_holm"][j][i] = p
    return {"labels": labels, "ties_policy": comparisons[0].summary["pair"]["ties_policy"], "metrics": metrics}


# Files and console


def write_comparison(comparison: Comparison, outdir: str | Path, now: datetime | None = None) -> Path:
    """Write {outdir}/{label_a}_vs_{label_b}_{MMDD-HHMMSS}/, whole or not at all, and return that folder.

    Raises InputError if another command is first to give its results that name.
    """
    pair = comparison.summary["pair"]
    folder = stamped_path(Path(outdir, f"{pair['model_a']}_vs_{pair['model_b']}"), "", now)
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        for metric, detail in comparison.details.items():
            write_json(partial / f"pair_{metric.lower()}.json", detail)
        write_json(partial / "summary.json", comparison.summary)
        refuse_existing(folder)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def stamped_path(stem: Path, suffix: str, now: datetime | None) -> Path:
    """{stem}_{MMDD-HHMMSS}{suffix}, stamped with `now`, by default the first free second from now on."""
    while True:
        path = stem.with_name(f"{stem.name}_{now or datetime.now():%m%d-%H%M%S}{suffix}")
        if now or not path.exists():
            return path
        time.sleep(0.1)


def refuse_existing(path: Path) -> None:
    """Raises InputError where results of the same second are."""
    if path.exists():
        raise InputError(f"{path} exists already; run the same command again for a new time stamp")


def write_matrix(matrix: dict[str, Any], outdir: str | Path, now: datetime | None = None) -> Path:
    """Write {outdir}/matrix_{MMDD-HHMMSS}.json and return its path; raises InputError as write_comparison does."""
    path = stamped_path(Path(outdir, "matrix"), ".json", now)
    refuse_existing(path)
    write_json(path, matrix)
    return path


def list_cautions(comparison: Comparison) -> list[str]:
    """What a reader of the figures should know: repeated prompts, mere ties, other settings, shared noise."""
    results = next(iter(comparison.details.values()))["results"]
    cautions = []
    if (prompts := len({" ".join(result["prompt"].lower().split()) for result in results})) < len(results):
        cautions.append(f"only {prompts} prompts are distinct, but intervals and p count pairs as independent")
    for side in "ab":
        if (images := len({result[f"image_{side}"] for result in results})) < len(results):
            cautions.append(f"the images of {side.upper()} are only {images} different ones")
    if len(results) < FEW_PAIRS:
        cautions.append(f"of {len(results)} pairs the interval of the mean difference, a bootstrap's, is too narrow")
    if all(detail["ties"] == detail["total_pairs"] for detail in comparison.details.values()):
        cautions.append("every pair is a tie in every metric: make sure that A and B are not the same images")
    for name, count in comparison.summary["pairing"]["differing"].items():
        cautions.append(f"the images of {count} pairs were made with another {name} for A than for B")
    if comparison.summary["pairing"]["share_noise"]:
        cautions.append(
            "all images of a run began with the same noise: intervals and p are over prompts, for this noise only, and "
            "another seed may differ by more; make images with --noise per-prompt to speak of the model"
        )
    return cautions


def format_comparison(comparison: Comparison) -> str:
    """Console text: a table in percent with a row per metric, and how many images were dropped, with some prompts."""
    summary = comparison.summary
    pair, pairing, averages = (summary[key] for key in ("pair", "pairing", "averages"))
    head = ["metric", "win rate", "95 % interval", "wins/ties/losses", "p", "p (Holm)", "mean A", "mean B", "A - B",
            "95 % interval"]  # fmt: skip
    lines = [
        f"A = {pair['model_a']}, B = {pair['model_b']}: {summary['metrics'][0]['total_pairs']} pairs by "
        f"{pairing['by']}, ties policy {pair['ties_policy']}",
        *_align([head, *map(show_row, summary["metrics"])]),
        f"average over metrics: macro {averages['macro_win_rate_a_over_b']:.1%}, "
        f"micro {averages['micro_win_rate_a_over_b']:.1%}",
    ]
    lines += [f"CAUTION: {text}" for text in list_cautions(comparison)]
    for label, dropped in ((pair["model_a"], pairing["dropped_a"]), (pair["model_b"], pairing["dropped_b"])):
        if dropped:
            lines.append(f"{label}: {len(dropped)} without a partner dropped (all listed in summary.json):")
            lines += [f"  {prompt!r:.200}" for prompt in dropped[:SHOWN]]
    return "\n".join(lines)


def show_row(row: dict[str, Any]) -> list[str]:
    """The figures of a metric's row of summary.json as text, a column each."""
    low, high = row["win_rate_ci95"]
    spread = row["mean_difference_ci95"]
    return [
        row["metric"],
        f"{row['win_rate_a_over_b']:.1%}",
        f"{low:.1%} to {high:.1%}",
        f"{row['wins_a']}/{row['ties']}/{row['wins_b']}",
        f"{row['sign_test_p']:.2g}",
        f"{row['sign_test_p_holm']:.2g}",
        f"{row['mean_a']:.4f}",
        f"{row['mean_b']:.4f}",
        f"{row['mean_difference']:+.4f}",
        "{:+.4f} to {:+.4f}".format(*spread) if spread else "-",
    ]


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def format_matrix(matrix: dict[str, Any]) -> str:
    """Console text: for each metric, how often the run of a row beats that of a column, in percent."""

    def cell(rate: float | None, p: float | None) -> str:
        return "-" if rate is None else f"{'*' if p < 0.05 else ''}{rate:.1%}"

    lines = []
    for metric, matrices in matrix["metrics"].items():
        rows = [[metric, *matrix["labels"]]]
        for label, *values in zip(matrix["labels"], matrices["win_rate"], matrices["p_holm"], strict=True):
            rows.append([label, *map(cell, *values)])
        lines += [*_align(rows), ""]
    return "\n".join([*lines, "* p < 0.05, sign test without ties, Holm-corrected over all runs and metrics here"])
