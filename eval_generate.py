"""Make the images of the evaluation prompts from a UNet, score them, and sum up the scores.

Run with `accelerate launch eval_generate.py ...` or one of scripts/eval/test_*.sh; `python eval_generate.py --help`
lists the flags. The same command run again makes what is missing.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sdpo.command import parse_flags, run_command, show
from sdpo.console import start_console
from sdpo.generation import EvalConfig, find_groups, generate, prepare
from sdpo.ranks import join_ranks, on_main
from sdpo.report import write_report
from sdpo.scoring import ScoringOptions, add_earlier, score_groups, try_scoring
from sdpo.summary import summarise, write_summary
from sdpo.winrates import collect_run

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> dict[str, Path]:
    """Generate and score as the command line says; returns the manifest's path by group."""
    config = parse_flags(EvalConfig, "python eval_generate.py", __doc__, arguments)
    accelerator = join_ranks()
    metrics = config.score_metrics
    device = str(accelerator.device)
    options = ScoringOptions(metrics, config.sources, config.score_dtype, device, config.score_batch_size)
    options.check()
    start_console(accelerator.is_main_process)
    run = prepare(config, accelerator)
    if any(run.missing.values()):  # before hours of making images
        prompts = {str(run.folder(name)): [prompt.text for prompt in group] for name, group in run.prompts.items()}
        on_main(accelerator, lambda: try_scoring(options, run.output, prompts, (run.height, run.width)))
    manifests = generate(run)
    for path in manifests.values():
        log.info(f"manifest       {path}")
    groups = score_groups(manifests, options, accelerator)
    if accelerator.is_main_process:
        add_earlier(groups, find_groups(run), options)
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
