"""Make the images of the evaluation prompts from a UNet, score them, and sum up the scores.

Run with `accelerate launch eval_generate.py ...` or one of scripts/eval/test_*.sh; `python eval_generate.py --help`
lists the flags. The same command run again makes what is missing.
"""

from __future__ import annotations

import logging
from pathlib import Path

import diffusers
import transformers
from accelerate import Accelerator

from sdpo.config import parse_flags, run_command
from sdpo.generation import EvalConfig, generate
from sdpo.report import write_report
from sdpo.scoring import ScoringOptions, score_manifest, split_pairs
from sdpo.summary import summarise, write_summary
from sdpo.winrates import collect_run


def start_accelerator() -> Accelerator:
    """Accelerate, and console logging on rank 0."""
    accelerator = Accelerator()
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(format="%(message)s", level=level, force=True)
    for name in ("httpx", "accelerate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)  # what fails in the end is said once, by InputError
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    return accelerator


def score(config: EvalConfig, manifests: dict[str, Path], side: int, device: str) -> None:
    """Score every group's images of `side` pixels in the chosen metrics; summary and report go beside the manifests."""
    metrics = [metric for metric in config.metrics if metric != "none"]
    sources = dict(split_pairs(config.weights, "--weights"))
    options = ScoringOptions(sources, config.score_dtype, device, config.score_batch_size)
    groups = {group: score_manifest(path, metrics, options) for group, path in manifests.items()}
    folder = next(iter(manifests.values())).parent
    if metrics:
        logging.info(write_summary(summarise(groups, metrics), folder, side))
    runs = [collect_run(group, entries, scores, metrics) for group, (entries, scores) in groups.items()]
    report = write_report(folder / "report.html", runs, title=config.unet_path)
    logging.info(f"report         {report}")


def main(arguments: list[str] | None = None) -> dict[str, Path]:
    """Generate and score as the command line says; returns the manifest's path by group."""
    config = parse_flags(EvalConfig, __doc__.splitlines()[0], "python eval_generate.py", arguments)
    accelerator = start_accelerator()
    manifests, side = generate(config, accelerator)
    main_process, device = accelerator.is_main_process, str(accelerator.device)
    accelerator.end_training()  # one process scores, the others need not wait for it
    if main_process:
        for path in manifests.values():
            logging.info(f"manifest       {path}")
        score(config, manifests, side, device)
    return manifests


if __name__ == "__main__":
    run_command(main)
