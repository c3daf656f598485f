"""What is measured while training: computed on the device, reduced over ranks when logged, kept in metrics.jsonl."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from sdpo.config import InputError
from sdpo.losses import PairTerms

log = logging.getLogger(__name__)


@torch.no_grad()
def pair_metrics(terms: PairTerms, beta: float) -> dict[str, Tensor]:
    """Scalars of one micro-batch, left on the device: official names where there are some, TRL's for rewards."""
    drop_w, drop_l = terms.reference_error_w - terms.error_w, terms.reference_error_l - terms.error_l  # (B,)
    ww, ll, wl = (
        sum_product(a, b)
        for a, b in (
            (terms.residual_w, terms.residual_w),
            (terms.residual_l, terms.residual_l),
            (terms.residual_w, terms.residual_l),
        )
    )
    scale = terms.loser_scale
    accuracy = (terms.margin > 0).float().mean()
    return {
        "model_mse_unaccumulated": (terms.error_w.mean() + terms.error_l.mean()) / 2,
        "ref_mse_unaccumulated": (terms.reference_error_w.mean() + terms.reference_error_l.mean()) / 2,
        "implicit_acc_accumulated": accuracy,
        "avg_win_diff_loss": -drop_w.mean(),
        "avg_lose_diff_loss": -drop_l.mean(),
        "avg_lose_l_scale": scale.mean(),
        "lambda/min": scale.min(),
        "lambda/share_below_1": (scale < 1).float().mean(),
        "residual_cosine": (wl / (ww * ll).sqrt().clamp_min(1e-30)).mean(),
        "rewards/chosen": beta / 2 * drop_w.mean(),
        "rewards/rejected": beta / 2 * drop_l.mean(),
        "rewards/accuracies": accuracy,
        "rewards/margins": terms.margin.mean(),
    }


def sum_product(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample's tensors: (B, ...) -> (B,)."""
    return (a * b).flatten(1).sum(1)


class Meter:
    """Averages of scalars over micro-steps and ranks, minima for names in /min; one transfer per reduction."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.sums, self.counts, self.unreadable = accelerator, {}, {}, 0

    def count_unreadable(self, reports: list[str], limit: int) -> None:
        """Report pairs that were replaced because an image could not be read; raises InputError past the limit."""
        for report in reports:
            log.error(f"unreadable, replaced by another pair: {report}")
        self.unreadable += len(reports)
        if self.unreadable > limit:
            raise InputError(
                f"{self.unreadable} unreadable pairs, more than --max_unreadable_images {limit}; "
                f"the last: {reports[-1]}"
            )

    def add(self, values: dict[str, Tensor]) -> None:
        """Take in scalars without leaving the device."""
        for name, value in values.items():
            value = value.detach().float()
            if name not in self.sums:
                self.sums[name], self.counts[name] = value, 1
            else:
                self.sums[name] = (
                    torch.minimum(self.sums[name], value) if name.endswith("/min") else self.sums[name] + value
                )
                self.counts[name] += 1

    def reduce(self) -> dict[str, float]:
        """Values over all ranks since the last reduction, on every rank."""
        names = list(self.sums)
        if not names:  # every update was skipped
            return {}
        local = torch.stack([self.sums[name] / (1 if name.endswith("/min") else self.counts[name]) for name in names])
        ranks = self.accelerator.gather(local[None]).cpu()  # (processes, names)
        self.sums, self.counts = {}, {}
        return {
            name: (ranks[:, i].min() if name.endswith("/min") else ranks[:, i].mean()).item()
            for i, name in enumerate(names)
        }


class MetricsLog:
    """Appends a JSON object per logged step to {folder}/metrics.jsonl and gives the same numbers to the trackers."""

    def __init__(self, accelerator: Accelerator, folder: str | Path, first_step: int):
        self.accelerator, self.path = accelerator, Path(folder, "metrics.jsonl")
        if accelerator.is_main_process:
            keep = [line for line in self._lines() if json.loads(line)["step"] <= first_step] if first_step else []
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(keep))
            os.replace(partial, self.path)  # what was logged after the checkpoint will be logged again

    def _lines(self) -> list[str]:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [line for line in lines if line.endswith("\n")]  # a line cut off by a crash is not one

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log finished numbers under the number of updates made so far."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(folder: str | Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric from a run's metrics.jsonl."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[name]) for row in rows if name in row]
