"""Make the images of the evaluation prompts from a UNet, score them, and sum up the scores.

Run with `accelerate launch eval_generate.py ...` or one of scripts/eval/test_*.sh; `python eval_generate.py --help`
lists the flags. The same command run again makes what is missing.
"""

from __future__ import annotations

import logging
from pathlib import Path

from accelerate import Accelerator

from sdpo.command import InputError, parse_flags, run_command, show
from sdpo.console import start_console
from sdpo.generation import EvalConfig, find_groups, generate, prepare
from sdpo.manifest import read_scores
from sdpo.ranks import PATIENCE, check_ranks
from sdpo.report import write_report
from sdpo.scoring import (
    Scored,
    ScoringOptions,
    check_models,
    read_complete,
    score_manifest,
    score_share,
    take_in_shares,
)
from sdpo.summary import summarise, write_summary
from sdpo.winrates import collect_run

log = logging.getLogger(__name__)


def score(
    manifests: dict[str, Path], metrics: list[str], options: ScoringOptions, accelerator: Accelerator
) -> dict[str, Scored]:
    """Entries and scores by group in the metrics, on the main process; every rank computes a share of them."""
    if accelerator.num_processes > 1:
        for path in manifests.values():
            if accelerator.is_main_process:
                take_in_shares(path.parent / "scores.jsonl")
            accelerator.wait_for_everyone()
            score_share(path, metrics, options, accelerator.process_index, accelerator.num_processes)
            accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return {}
    return {group: score_manifest(path, metrics, options) for group, path in manifests.items()}


def add_earlier(
    groups: dict[str, Scored], manifests: dict[str, Path], metrics: list[str], options: ScoringOptions
) -> None:
    """Add groups that earlier commands made and scored alike; those that cannot be are named."""
    for group, path in manifests.items():
        if group in groups:
            continue
        try:
            if not (scored := read_complete(path, metrics, options)):
                continue
            check_models({**groups, group: scored}, metrics)
        except InputError as error:
            log.warning(f"CAUTION: {group} is left out of the summary: {error}")
        else:
            groups[group] = scored


def main(arguments: list[str] | None = None) -> dict[str, Path]:
    """Generate and score as the command line says; returns the manifest's path by group."""
    config = parse_flags(EvalConfig, __doc__.splitlines()[0], "python eval_generate.py", arguments)
    accelerator, metrics = Accelerator(kwargs_handlers=[PATIENCE]), config.score_metrics
    check_ranks(accelerator)
    options = ScoringOptions(config.sources, config.score_dtype, str(accelerator.device), config.score_batch_size)
    options.check(metrics)
    start_console(accelerator.is_main_process)
    run = prepare(config, accelerator)
    with accelerator.main_process_first():
        if any(run.missing.values()) and accelerator.is_main_process:  # before hours of making images
            options.try_out(metrics)
            read_scores(run.output / "scores.jsonl")
    manifests = generate(run)
    for path in manifests.values():
        log.info(f"manifest       {path}")
    groups = score(manifests, metrics, options, accelerator)
    if accelerator.is_main_process:
        check_models(groups, metrics)
        add_earlier(groups, find_groups(run), metrics, options)
        runs = [collect_run(group, *scored, metrics) for group, scored in groups.items()]
        if metrics:
            size = run.height if run.height == run.width else run.size
            show(write_summary(summarise(runs), run.output, size))
        report = write_report(run.output / "report.html", runs, title=config.unet_path)
        log.info(f"report         {report}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return manifests


if __name__ == "__main__":
    run_command(main)
