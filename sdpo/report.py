"""A page to look at: report.html with summaries, charts and a gallery of a run or of comparisons of runs.

One file that opens from disk without a network; only the images, referenced relative to it, lie outside. Prompts are
untrusted: they reach the page as escaped JSON and are shown as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from sdpo.command import InputError
from sdpo.files import write_text
from sdpo.summary import summarise
from sdpo.winrates import Comparison, ScoredRun, list_cautions, show_row

TEMPLATE = Path(__file__).with_name("report.html")
BINS = 30  # of a histogram
COLOURS = 6  # of runs in the template, --s0 to --s5
WIDTH, HEIGHT = 320, 130  # of a histogram, in SVG units


def write_report(
    path: str | Path, runs: Sequence[ScoredRun], comparisons: Sequence[Comparison] = (), title: str = ""
) -> Path:
    """Write the page of one or several runs, whole or not at all, and return its path.

    The title is the runs' labels by default. The gallery shows the pairs of each comparison or, if there are none, the
    images of each run. Images need not exist. Raises InputError if there is no run, or a comparison is of a run that is
    not among them.
    """
    path = Path(os.path.abspath(path))
    if not runs:
        raise InputError("a report needs at least one run; give a manifest with scores")
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    labels = [run.label for run in runs]
    scored = any(run.scores for run in runs)
    if comparisons:
        views = [_pair_view(comparison, runs, path.parent) for comparison in comparisons]
    else:
        views = [_run_view(run, number, path.parent) for number, run in enumerate(runs)]
    parts = {
        # the only script that the page may run
        "script": f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        # the name of a file need not be text
        "title": escape((title or " against ".join(labels)).encode("utf-8", "replace").decode()),
        "summary": "\n".join([_summary(runs), *map(_win_rates, comparisons), _histograms(runs)] if scored else []),
        "data": json.dumps({"views": views}, separators=(",", ":")).replace("<", "\\u003c"),
    }
    # one pass, so that a marker inside a prompt is not filled in
    page = re.sub(r"<!--slot:(\w+)-->", lambda slot: parts[slot[1]], template)
    write_text(path, page)
    return path


# Gallery


def _run_view(run: ScoredRun, place: int, folder: Path) -> dict[str, Any]:
    scores = zip(*run.scores.values(), strict=True) if run.scores else ((),) * len(run.entries)
    cards = [
        {"prompt": entry.prompt, "images": [_link(entry.path, folder)], "scores": [list(map(float, row))]}
        for entry, row in zip(run.entries, scores, strict=True)
    ]
    return {"labels": [run.label], "series": [place % COLOURS], "metrics": list(run.scores), "cards": cards}


def _pair_view(comparison: Comparison, runs: Sequence[ScoredRun], folder: Path) -> dict[str, Any]:
    labels = [comparison.summary["pair"][side] for side in ("model_a", "model_b")]
    places = [_place(label, runs) for label in labels]
    paths = [{entry.image: entry.path for entry in runs[place].entries} for place in places]
    cards = []
    for rows in zip(*(detail["results"] for detail in comparison.details.values()), strict=True):
        pair = rows[0]  # prompt and images are the same for every metric
        images = [_link(known[pair[f"image_{side}"]], folder) for side, known in zip("ab", paths, strict=True)]
        scores = [[row[f"score_{side}"] for row in rows] for side in "ab"]
        other = {"prompt_b": pair["prompt_b"]} if "prompt_b" in pair else {}
        cards.append({"prompt": pair["prompt"], **other, "images": images, "scores": scores})
    series = [place % COLOURS for place in places]
    return {"labels": labels, "series": series, "metrics": list(comparison.details), "cards": cards}


def _place(label: str, runs: Sequence[ScoredRun]) -> int:
    for place, run in enumerate(runs):
        if run.label == label:
            return place
    raise InputError(f"a comparison is of {label}, which is not among the report's runs; give all compared runs")


def _link(image: Path, folder: Path) -> str:
    """Address of an image relative to the page's folder, with everything but slashes quoted."""
    return quote(Path(os.path.relpath(image, folder)).as_posix(), errors="surrogateescape")


# Tables


def _table(caption: str, head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column names the rows; cells are text."""
    columns = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>\n<thead><tr>{columns}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _summary(runs: Sequence[ScoredRun]) -> str:
    order = _metrics(runs)
    rows = []
    for row in sorted(summarise(runs), key=lambda row: order.index(row["metric"])):
        error = "-" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
        rows.append((row["group"], row["metric"], f"{row['mean']:.4f}", error, str(row["n"])))
    table = _table("Scores per run and metric", ["run", "metric", "mean", "standard error", "n"], rows)
    return f'<section id="scores"><h2>Scores</h2><div class="panel">{table}</div></section>'


def _metrics(runs: Sequence[ScoredRun]) -> list[str]:
    return list(dict.fromkeys(metric for run in runs for metric in run.scores))


def _win_rates(comparison: Comparison) -> str:
    summary = comparison.summary
    a, b = summary["pair"]["model_a"], summary["pair"]["model_b"]
    policy = {"half": "a tie counts half", "loss_for_a": f"a tie counts zero for {a}"}[summary["pair"]["ties_policy"]]
    head = ["metric", "win rate", "95 % interval", "wins/ties/losses", "p (sign test)", "p (Holm, these metrics)",
            f"mean of {a}", f"mean of {b}", "mean difference", "95 % interval"]  # fmt: skip
    rows = list(map(show_row, summary["metrics"]))
    table = _table(f"{policy}; paired by {summary['pairing']['by']}", head, rows)
    dropped = "".join(
        f'<p class="hint">{escape(label)}: {len(prompts)} images without a partner left out</p>'
        for label, prompts in ((a, summary["pairing"]["dropped_a"]), (b, summary["pairing"]["dropped_b"]))
        if prompts
    )
    cautions = "".join(f'<p class="hint">{escape(text)}</p>' for text in list_cautions(comparison))
    title = f"Win rates of {escape(a)} over {escape(b)}"
    content = f"{table}{cautions}{dropped}{_win_bars(a, b, summary)}"
    return f'<section><h2>{title}</h2><div class="panel">{content}</div></section>'


# Charts


def _win_bars(a: str, b: str, summary: dict[str, Any]) -> str:
    """Bars of the win rates with 95 % intervals, a row of 30 units per metric, 0 to 100 % from x = 110 to 510."""
    rows = []
    bottom = 30 * len(summary["metrics"])
    for place, row in enumerate(summary["metrics"]):
        rate, (low, high) = row["win_rate_a_over_b"], row["win_rate_ci95"]
        middle, left, right = 30 * place + 15, 110 + 400 * low, 110 + 400 * high
        rows.append(
            f'<text x="102" y="{middle + 4}" text-anchor="end">{escape(row["metric"])}</text>'
            f'<rect class="bar" x="110" y="{middle - 9}" width="{400 * rate:.1f}" height="18"/>'
            f'<path class="whisker" d="M{left:.1f} {middle}H{right:.1f}M{left:.1f} {middle - 5}v10'
            f'M{right:.1f} {middle - 5}v10"/><text x="518" y="{middle + 4}">{rate:.1%}</text>'
        )
    ticks = "".join(
        f'<path class="{"half" if t == 50 else "rule"}" d="M{110 + 4 * t} 0V{bottom}"/>'
        f'<text x="{110 + 4 * t}" y="{bottom + 16}" text-anchor="middle">{t} %</text>'
        for t in (0, 25, 50, 75, 100)
    )
    name = escape(f"Win rates of {a} over {b} with 95 % intervals; the numbers are in the table above")
    return (
        f'<svg class="winbars" viewBox="0 0 570 {bottom + 22}" width="570" height="{bottom + 22}" role="img" '
        f'aria-label="{name}">{ticks}{"".join(rows)}</svg>'
    )


def _histograms(runs: Sequence[ScoredRun]) -> str:
    """A figure per metric, and the key of the runs' colours."""
    key = "".join(f'<li class="s{place % COLOURS}">{escape(run.label)}</li>' for place, run in enumerate(runs))
    figures = "\n".join(_histogram(metric, runs) for metric in _metrics(runs))
    return (
        "<section><h2>Distribution of scores</h2>"
        f'<ul class="key">{key}</ul><div class="charts">{figures}</div></section>'
    )


def _histogram(metric: str, runs: Sequence[ScoredRun]) -> str:
    """Outlines over common bins, each run's counts as a share of its images."""
    shown = [(place, run.scores[metric]) for place, run in enumerate(runs) if metric in run.scores]
    everything = np.concatenate([values for _, values in shown])
    low, high, largest = everything.min(), everything.max(), max(np.abs(everything).max(), 1)
    margin = largest / 2 if high - low < 1e-9 * largest else 0  # too close together for bins of their own
    edges = np.linspace(low - margin, high + margin, BINS + 1)
    shares = [np.histogram(values, edges)[0] / len(values) for _, values in shown]
    top = max(share.max() for share in shares)
    outlines = []
    for (place, _), share in zip(shown, shares, strict=True):
        steps = "".join(f"V{HEIGHT - 120 * height / top:.1f}h{WIDTH / BINS:.2f}" for height in share)
        outlines.append(f'<path class="series s{place % COLOURS}" d="M0 {HEIGHT}{steps}V{HEIGHT}z"/>')
    low, high = edges[0], edges[-1]
    name = escape(f"Histogram of {metric} from {low:.4g} to {high:.4g}; means are in the table of scores")
    return (
        f'<figure><figcaption>{escape(metric)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT + 20}" width="{WIDTH}" '
        f'height="{HEIGHT + 20}" role="img" aria-label="{name}"><path class="rule" d="M0 {HEIGHT}H{WIDTH}"/>'
        f'{"".join(outlines)}<text x="0" y="{HEIGHT + 16}">{low:.4g}</text><text x="{WIDTH}" y="{HEIGHT + 16}" '
        f'text-anchor="end">{high:.4g}</text><text x="{WIDTH / 2}" y="{HEIGHT + 16}" text-anchor="middle">highest bar '
        f"{top:.0%} of a run</text></svg></figure>"
    )
