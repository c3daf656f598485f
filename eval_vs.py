"""Win rates of one run's images over another's, per metric, with intervals and tests; of several runs, a matrix.

Scores are read from scores.jsonl beside each manifest and computed only where they are missing.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path
from tempfile import NamedTemporaryFile

from sdpo.command import InputError, Parser, parse_assignments, run_command, show
from sdpo.report import write_report
from sdpo.scoring import add_flags, caution_others_are_there, check_models, complete_scores, plan_scores, read_flags
from sdpo.winrates import (
    PAIRINGS,
    ScoredRun,
    check_labels,
    collect_run,
    compare_all,
    format_comparison,
    format_matrix,
    pair_runs,
    win_matrix,
    write_comparison,
    write_matrix,
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The official flags, and ours for further runs, metrics and weights."""
    parser = Parser("python eval_vs.py", __doc__)
    parser.add_argument("--json_a", required=True, help="manifest of run A")
    parser.add_argument("--json_b", required=True, help="manifest of run B")
    parser.add_argument("--label_a", required=True, help="name of run A in the results")
    parser.add_argument("--label_b", required=True, help="name of run B in the results")
    parser.add_argument(
        "--more", nargs="*", action="extend", default=[], metavar="LABEL=JSON", help="further runs, for a matrix"
    )
    parser.add_argument("--outdir", default="output/vs_eval", help="folder of the results; output/vs_eval by default")
    parser.add_argument("--ties_as_loss_for_a", action="store_true", help="a tie counts zero for A, not one half")
    parser.add_argument(
        "--pair_by", choices=PAIRINGS, default="prompt", help="how images of two runs are paired; by prompt by default"
    )
    add_flags(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Score what is missing, compare every pair of runs, write and print the results."""
    args = parse_arguments(arguments)
    named = [(args.label_a, args.json_a), (args.label_b, args.json_b), *parse_assignments(args.more, "--more").items()]
    check_labels([label for label, _ in named])
    if not args.outdir:
        raise InputError("--outdir is empty: name a folder or leave the flag out")
    options = read_flags(args)
    # what cannot be scored, paired or written is found before hours of scoring
    pending = {label: plan_scores(manifest, options) for label, manifest in named}
    caution_others_are_there(pending.values(), options)
    check_models({label: plan.expected(options) for label, plan in pending.items()}, options.metrics)
    unscored = [ScoredRun(label, plan.entries, {}) for label, plan in pending.items()]
    for a, b in combinations(unscored, 2):
        pair_runs(a, b, args.pair_by)  # raises for runs that cannot be paired
    Path(args.outdir).mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=args.outdir):  # raises where nothing can be written
        pass
    scored = complete_scores(pending, options)
    runs = [collect_run(label, *pair, options.metrics) for label, pair in scored.items()]
    ties = "loss_for_a" if args.ties_as_loss_for_a else "half"
    comparisons = compare_all(runs, ties=ties, pair_by=args.pair_by)
    folders = [write_comparison(comparison, args.outdir) for comparison in comparisons]
    said = [f"{format_comparison(c)}\nwritten to {folder}\n" for c, folder in zip(comparisons, folders, strict=True)]
    page = folders[0] / "report.html"  # beside the only comparison
    if len(runs) > 2:
        matrix = win_matrix(comparisons)
        path = write_matrix(matrix, args.outdir)
        said.append(f"{format_matrix(matrix)}\nwritten to {path}\n")
        page = path.with_name(path.stem.replace("matrix", "report") + ".html")
    said.append(f"report: {write_report(page, runs, comparisons)}")
    show("\n".join(said))


if __name__ == "__main__":
    run_command(main)
