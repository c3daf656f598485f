"""Scores of a manifest's images: read from scores.jsonl beside it, computed and kept there where they are missing.

`python -m sdpo.scoring MANIFEST.json` does that and prints their means, also for images that the official code made.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdpo.command import InputError, Parser, Size, check_limits, parse_assignments, run_command, show, within_memory
from sdpo.files import brief, identify_source, locked, sha256
from sdpo.manifest import (
    METRICS,
    OFFICIAL_METRICS,
    Entry,
    Scores,
    append_scores,
    compact_scores,
    find_score,
    match_scores,
    read_manifest,
    read_scores,
    require_images,
)
from sdpo.summary import format_summary, summarise
from sdpo.winrates import collect_run

if TYPE_CHECKING:  # scores that are there need no torch
    from accelerate import Accelerator

    from sdpo.scorers import Scorer

Scored = tuple[list[Entry], Scores]  # a manifest and its scores
Todo = dict[tuple[str, ...], list[Entry]]  # entries by the metrics that they lack
log = logging.getLogger(__name__)
SHARE = re.compile(r"scores\.rank\d+\.jsonl")  # a rank's scores until they are taken in
SCORES = "scores.jsonl"  # beside the manifests whose images they are of
OFFICIAL_MODEL = "official"  # a metric's own weights in fp32, in rows of scores


@dataclass(frozen=True)
class ScoringOptions:
    """Which scores are wanted, and how they are computed where they are missing."""

    metrics: Sequence[str]  # of METRICS
    sources: Mapping[str, str] = field(default_factory=dict)  # "metric.part" -> local path or hub reference
    dtype: str | None = None  # of the backbones, fp32 or bf16; None: fp32, and existing scores of either count
    device: str | None = None  # a GPU if there is one
    batch_size: Size = 64

    def __post_init__(self):
        check_limits(self)

    def check(self) -> None:
        """Raises InputError for sources that are no parts of the metrics or do not exist: before hours are spent."""
        if self.sources:
            from sdpo.scorers import check_parts  # slow to import, and not needed where all scores are there

            check_parts(self.sources, [METRICS[metric] for metric in self.metrics])

    def load(self, metrics: Sequence[str]) -> dict[str, Scorer]:
        """Scorers by row of METRICS, on the CPU; raises InputError for weights that cannot be used."""
        from sdpo.hub import DTYPES
        from sdpo.scorers import load_scorers

        return load_scorers([METRICS[metric] for metric in metrics], self.sources, DTYPES[self.dtype or "fp32"])

    def try_out(self) -> None:
        """Load the weights of each metric once; raises InputError where they are missing, damaged or out of reach."""
        for metric in self.metrics:
            self.load([metric])

    def model(self, metric: str) -> str:
        """What rows of scores say about the model of a metric: "official", or what differs from it."""
        prefix = METRICS[metric] + "."
        parts = [
            f"{name.removeprefix(prefix)}={identify_source(source)}"
            for name, source in sorted(self.sources.items())
            if name.startswith(prefix)
        ]
        parts += ["bf16"] if self.dtype == "bf16" else []
        return ", ".join(parts) or OFFICIAL_MODEL

    def accepts(self, metric: str) -> str | None:
        """The model that existing scores of a metric must be from; None, any one, if nothing was said about it."""
        said = self.dtype or any(name.startswith(METRICS[metric] + ".") for name in self.sources)
        return self.model(metric) if said else None


@dataclass(frozen=True)
class Pending:
    """A manifest, its scores, and which are missing."""

    entries: list[Entry]
    path: Path  # of its score file
    scores: Scores  # that are there
    todo: Todo

    def expected(self, options: ScoringOptions) -> Scored:
        """The entries, and for each, in place of scores, the model by metric that gave or will give them."""
        scores = {key: {"models": dict(row.get("models", {}))} for key, row in self.scores.items()}
        for lacking, missing in self.todo.items():
            coming = {metric: options.model(metric) for metric in lacking}
            for entry in missing:
                scores.setdefault(entry.key, {"models": {}})["models"] |= coming
        return self.entries, scores


def score_manifests(manifests: Mapping[str, str | Path], options: ScoringOptions) -> dict[str, Scored]:
    """Entries of manifests and their scores, the missing ones computed and kept.

    Images are needed, and torch is imported, only if a score is missing. Rows are appended as they come, so a run that
    was cut off goes on where it was. Raises InputError for missing images, weights or unusable scores.
    """
    return complete_scores({name: plan_scores(manifest, options) for name, manifest in manifests.items()}, options)


def plan_scores(manifest: str | Path, options: ScoringOptions) -> Pending:
    """What is there of a manifest's scores, what ranks of an earlier command left included, and which are missing.

    Raises InputError for what would stop computing them, but for weights.
    """
    take_in_shares(_beside(manifest))
    pending = _plan(manifest, options)
    if pending.todo:
        check_writable(pending.path)
    for lacking, missing in pending.todo.items():
        check_entries(missing, lacking)
    expected = pending.expected(options)
    for metric in options.metrics:
        find_model(*expected, metric, str(pending.path))
    return pending


def check_writable(path: Path) -> None:
    """Raises InputError unless scores can be appended to a file."""
    try:
        with locked(path):
            if path.exists():
                path.open("ab").close()
    except OSError as error:
        raise InputError(
            f"{path.parent} cannot be written ({error.strerror}), and scores are kept beside the manifest: "
            "copy it, with its images, to a folder that can be"
        ) from error


def check_entries(entries: Iterable[Entry], metrics: Iterable[str]) -> None:
    """Raises InputError for the first whose image is of no use, or that a metric cannot score for its prompt or size.

    Images are looked at as far as their headers and the checksums of PNGs go.
    """
    from sdpo.images import check_kind, refuse_errors_of_the_machine, verify

    for entry in entries:
        try:
            _, mode, size = verify(entry.path)
            check_kind(mode, size)
        except Exception as error:  # every image format has errors of its own
            refuse_errors_of_the_machine(error, f"image {entry.path}")
            raise InputError(
                f"{entry.where}: image {entry.path} cannot be scored: {brief(error)}; make it again or drop it"
            ) from error
        try:
            check_prompts(metrics, [entry.prompt], size[::-1])
        except InputError as error:
            raise InputError(f"{entry.where}: {error}; drop it, or score by other --metrics") from error


def check_prompts(metrics: Iterable[str], prompts: Iterable[str], size: tuple[int, int] | None = None) -> None:
    """Raises InputError for prompts, and a (height, width), of images that a metric cannot score."""
    from sdpo.scorers import SCORERS

    for metric in metrics:
        SCORERS[METRICS[metric]].check(prompts, size)


def complete_scores(pending: Mapping[str, Pending], options: ScoringOptions) -> dict[str, Scored]:
    """Compute and keep what is missing, return all; raises InputError for weights and images that cannot be used."""
    collected = _collect(pending.values())
    if len(collected) > 1:  # weights of later ones are tried out before hours of scoring
        lacking = set(itertools.chain(*collected))
        replace(options, metrics=[metric for metric in options.metrics if metric in lacking]).try_out()
    for lacking, missing in collected.items():
        _compute(missing, lacking, options)
    for path in {plan.path for plan in pending.values() if plan.todo}:
        compact_scores(path)
    scored = {}
    for name, plan in pending.items():
        scores = match_scores(plan.entries, read_scores(plan.path)) if plan.todo else plan.scores
        scored[name] = plan.entries, scores
        for metric in options.metrics:
            model = find_model(plan.entries, scores, metric, str(plan.path))
            if model not in (None, OFFICIAL_MODEL) and options.accepts(metric) is None:
                log.warning(
                    f"CAUTION: scores of {metric} in {plan.path} are not of the official model in fp32, but of {model}"
                )
    return scored


def read_complete(manifest: str | Path, options: ScoringOptions) -> Scored:
    """Entries of a manifest and their scores; raises InputError unless every image, as it is now, has all of them."""
    entries, path, scores = _read(manifest)
    if _missing(entries, scores, options):
        raise InputError(f"{path} has not all scores of {manifest} in {', '.join(options.metrics)}")
    return entries, scores


def score_share(manifests: Iterable[str | Path], options: ScoringOptions, rank: int, ranks: int) -> None:
    """Compute one rank's share of the missing scores into scores.rank{N}.jsonl, which plan_scores takes in."""
    pending = [_plan(manifest, options) for manifest in manifests]
    for lacking, missing in _collect(pending).items():
        share = [(path.with_name(f"scores.rank{rank}.jsonl"), entry) for path, entry in missing[rank::ranks]]
        if share:
            _compute(share, lacking, options, quiet=rank > 0)


def take_in_shares(path: Path) -> None:
    """Append what ranks left beside a score file to it, and remove their files; also after a run that was cut off."""
    for share in sorted(file for file in path.parent.iterdir() if SHARE.fullmatch(file.name)):
        with locked(share):
            append_scores(path, read_scores(share).values())
            compact_scores(path)
            share.unlink(missing_ok=True)  # another command may have taken it in meanwhile


def _beside(manifest: str | Path) -> Path:
    """The score file of a manifest."""
    return Path(manifest).parent / SCORES


def _read(manifest: str | Path) -> tuple[list[Entry], Path, Scores]:
    """Entries of a manifest, its score file, and the rows there that count for the images as they are."""
    entries, path = read_manifest(manifest), _beside(manifest)
    return entries, path, match_scores(entries, read_scores(path))


def _plan(manifest: str | Path, options: ScoringOptions) -> Pending:
    """What there is and what is missing; raises InputError where a score is missing and its image too."""
    entries, path, scores = _read(manifest)
    todo = _missing(entries, scores, options)
    for lacking, missing in todo.items():
        require_images(missing, f"{path} lacks its {', '.join(lacking)}")
    return Pending(entries, path, scores, todo)


def _missing(entries: Sequence[Entry], scores: Scores, options: ScoringOptions) -> Todo:
    """Entries by the metrics that they lack."""
    accepted = {metric: options.accepts(metric) for metric in options.metrics}
    todo = {}
    for entry in entries:
        lacking = tuple(m for m, model in accepted.items() if find_score(entry, scores, m, model) is None)
        if lacking:
            todo.setdefault(lacking, []).append(entry)
    return todo


def _collect(pending: Iterable[Pending]) -> dict[tuple[str, ...], list[tuple[Path, Entry]]]:
    """Score files and entries of all manifests by the metrics that they lack, each once; weights are loaded per key."""
    collected: dict[tuple[str, ...], dict[tuple, tuple[Path, Entry]]] = {}
    for plan in pending:
        for lacking, missing in plan.todo.items():
            collected.setdefault(lacking, {}).update({(plan.path, entry.key): (plan.path, entry) for entry in missing})
    return {lacking: list(entries.values()) for lacking, entries in collected.items()}


def find_model(entries: Sequence[Entry], scores: Scores, metric: str, where: str) -> str | None:
    """The model that gave all scores of a metric, None if no row says so; raises InputError for more than one."""
    models = {scores.get(entry.key, {}).get("models", {}).get(metric) for entry in entries} - {None}
    if len(models) > 1:
        raise InputError(
            f"{where}: scores of {metric} come from different models ({'; '.join(sorted(models))}); "
            "say which one with --weights or --score_dtype, or delete the file to score all images again"
        )
    return next(iter(models), None)


def _compute(
    entries: Sequence[tuple[Path, Entry]], metrics: Sequence[str], options: ScoringOptions, quiet: bool = False
) -> None:
    """Append scores of entries in the metrics to the score file of each."""
    from tqdm.auto import tqdm  # existing scores need none of these

    from sdpo.scorers import check_device, score_rows

    device = check_device(options.device)  # before weights are fetched
    scorers = options.load(metrics)
    images = ((entry.path, entry.prompt) for _, entry in entries)
    rows = score_rows(images, scorers, device=device, batch_size=options.batch_size)
    models = {metric: options.model(metric) for metric in metrics}
    progress = tqdm(entries, desc=f"scoring on {device}", unit="image", disable=quiet)
    fix = "score fewer images at a time, or with --score_dtype bf16; scores made so far are kept"
    with progress, within_memory(fix):
        for (path, entry), row in zip(progress, rows, strict=True):
            values = {metric: row[METRICS[metric]] for metric in metrics}
            about = {"image": entry.image, "prompt": entry.prompt, "sha256": sha256(entry.path)}
            append_scores(path, [{**about, **values, "models": models}])


def check_models(scored: Mapping[str, Scored], metrics: Sequence[str]) -> None:
    """Raises InputError if rows say that a metric's scores of two runs, by label, come from different models."""
    for metric in metrics:
        models = {label: find_model(*run, metric, f"scores of {label}") for label, run in scored.items()}
        known = {label: model for label, model in models.items() if model}
        if len(set(known.values())) > 1:
            said = ", ".join(f"{label}: {model}" for label, model in known.items())
            raise InputError(
                f"scores of {metric} come from different models ({said}); score all runs alike with --weights or "
                "--score_dtype"
            )


def caution_others_are_there(pending: Iterable[Pending], options: ScoringOptions) -> None:
    """Warn where wanted scores are missing and all images have those of metrics that are not wanted."""
    plans = list(pending)
    there = [
        metric
        for metric in METRICS
        if metric not in options.metrics
        and all(find_score(entry, plan.scores, metric) is not None for plan in plans for entry in plan.entries)
    ]
    if there and any(plan.todo for plan in plans):
        log.warning(
            f"CAUTION: scores of {', '.join(options.metrics)} are missing in part and will be computed; all images "
            f"have those of {', '.join(there)}: see --metrics"
        )


# Groups of prompts


def try_scoring(
    options: ScoringOptions, output: Path, prompts: Mapping[str, Sequence[str]], size: tuple[int, int]
) -> None:
    """Raises InputError for what would stop the scoring of images of a (height, width) that are still to be made.

    `prompts` are those of every folder of images in the folder `output`.
    """
    try:
        check_prompts(options.metrics, [prompt for group in prompts.values() for prompt in group], size)
        options.try_out()
    except InputError as error:
        raise InputError(f"{error}; or choose other --metrics (none: images alone); no image was made") from error
    path = output / SCORES
    if options.metrics:
        check_writable(path)
    take_in_shares(path)
    rows = read_scores(path).values()
    own = [row for row in rows if os.path.dirname(row["image"]) in prompts and os.path.isfile(row["image"])]
    for metric in options.metrics:
        there = {row.get("models", {}).get(metric) for row in own} - {None, options.model(metric)}
        if there and options.accepts(metric) is None:
            raise InputError(
                f"{path} has scores of {metric} by another model ({'; '.join(sorted(there))}) than images of this "
                "command would get: say which one with --weights or --score_dtype; no image was made"
            )


def score_groups(manifests: Mapping[str, Path], options: ScoringOptions, accelerator: Accelerator) -> dict[str, Scored]:
    """Entries and scores by group, on the main process; every rank computes a share of them.

    Raises InputError, before any is computed, where scores of a metric would come from different models.
    """
    from sdpo.ranks import on_main, together

    pending: dict[str, Pending] = {}  # on the main process

    def plan() -> None:
        pending.update({group: plan_scores(path, options) for group, path in manifests.items()})
        check_models({group: plan.expected(options) for group, plan in pending.items()}, options.metrics)

    on_main(accelerator, plan)
    if accelerator.num_processes > 1:
        rank, ranks = accelerator.process_index, accelerator.num_processes
        together(lambda: score_share(manifests.values(), options, rank, ranks))
        on_main(accelerator, plan)  # with the shares of all ranks
    return complete_scores(pending, options)


def add_earlier(groups: dict[str, Scored], manifests: Mapping[str, Path], options: ScoringOptions) -> None:
    """Add groups that earlier commands made and scored alike; those that cannot be are named."""
    for group, path in manifests.items():
        if group in groups:
            continue
        try:
            scored = read_complete(path, options)
            check_models({**groups, group: scored}, options.metrics)
        except InputError as error:
            log.warning(f"CAUTION: {group} is left out of the summary: {error}")
        else:
            groups[group] = scored


# The command


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which metrics are scored and how, for read_flags."""
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=list(OFFICIAL_METRICS),
        help="what to score; the official five by default, Pixels for the tiny base",
    )
    parser.add_argument("--device", help="where missing scores are computed: cpu, cuda, ...; on a GPU if there is one")
    parser.add_argument("--batch_size", type=int, default=64, help="images per step of a scorer; 64 by default")
    parser.add_argument(
        "--weights", nargs="*", action="extend", default=[], metavar="METRIC.PART=SOURCE", help="local path or hub file"
    )
    parser.add_argument("--score_dtype", choices=["fp32", "bf16"], help="of the scorers' backbones; fp32 by default")


def read_flags(args: argparse.Namespace) -> ScoringOptions:
    """Options of the flags of add_flags; raises InputError for those that cannot be used."""
    sources = parse_assignments(args.weights, "--weights")
    metrics = list(dict.fromkeys(args.metrics))
    options = ScoringOptions(metrics, sources, args.score_dtype, args.device, args.batch_size)
    options.check()
    return options


def main(arguments: list[str] | None = None) -> None:
    """Score manifests as the command line says and print the means."""
    parser = Parser("python -m sdpo.scoring", __doc__)
    parser.add_argument("manifests", nargs="+", metavar="MANIFEST.json", help="the file beside a folder of images")
    add_flags(parser)
    args = parser.parse_args(arguments)
    options = read_flags(args)
    scored = score_manifests({manifest: manifest for manifest in args.manifests}, options)
    runs = [collect_run(manifest, *run, options.metrics) for manifest, run in scored.items()]
    show(format_summary(summarise(runs)))


if __name__ == "__main__":
    run_command(main)
