"""What is measured while training: computed on the device, reduced over ranks when logged, kept in metrics.jsonl."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from sdpo.command import InputError
from sdpo.files import write_text
from sdpo.losses import PairTerms

log = logging.getLogger(__name__)


@torch.no_grad()
def pair_metrics(terms: PairTerms) -> dict[str, Tensor]:
    """Scalars of one micro-batch, left on the device; docs/metrics.md explains them.

    As officially, a margin of exactly 0 does not count as accurate; of held-out pairs it counts one half.
    """
    drop_w, drop_l = terms.reference_error_w - terms.error_w, terms.reference_error_l - terms.error_l  # (B,)
    scale = terms.loser_scale
    accuracy = (terms.margin > 0).float().mean()
    return {
        # the official code's
        "model_mse_unaccumulated": (terms.error_w.mean() + terms.error_l.mean()) / 2,
        "ref_mse_unaccumulated": (terms.reference_error_w.mean() + terms.reference_error_l.mean()) / 2,
        "implicit_acc_accumulated": accuracy,
        "avg_win_diff_loss": -drop_w.mean(),
        "avg_lose_diff_loss": -drop_l.mean(),
        "avg_lose_l_scale": scale.mean(),
        # more about the safeguard
        "lambda/min": scale.min(),
        "lambda/share_below_1": (scale < 1).float().mean(),
        "residual_cosine": F.cosine_similarity(terms.residual_w.flatten(1), terms.residual_l.flatten(1)).mean(),
        # TRL's
        "rewards/chosen": terms.beta / 2 * drop_w.mean(),
        "rewards/rejected": terms.beta / 2 * drop_l.mean(),
        "rewards/accuracies": accuracy,
        "rewards/margins": terms.margin.mean(),
    }


class Meter:
    """Averages of scalars over micro-steps, updates and ranks, minima for names in /min; one transfer per reduction."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums: dict[str, Tensor] = {}  # over updates, of this rank; minima for names in /min
        self.made = self.skipped = 0  # updates

    def add(self, micro_steps: list[dict[str, Tensor]]) -> None:
        """Take in the scalars of an update's micro-steps without leaving the device."""
        for name in micro_steps[0]:
            values = torch.stack([scalars[name].float() for scalars in micro_steps])
            if name.endswith("/min"):
                self.sums[name] = torch.minimum(self.sums.get(name, values[0]), values.min())
            else:
                self.sums[name] = self.sums.get(name, 0) + values.mean()
        self.made += 1

    def reduce(self) -> dict[str, float]:
        """Values over all ranks since the last reduction, on every rank, and the number of updates skipped."""
        figures = {
            name: values.min() if name.endswith("/min") else (values / self.made).mean()
            for name, values in self._gather().items()
        }
        skipped = self.skipped
        self.sums, self.made, self.skipped = {}, 0, 0
        return {name: value.item() for name, value in figures.items()} | {"skipped_updates": skipped}

    def state(self) -> dict[str, Any]:
        """What was taken in since the last reduction, for a checkpoint; every rank calls this."""
        sums = {name: values.tolist() for name, values in self._gather().items()}
        return {"sums": sums, "made": self.made, "skipped": self.skipped}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what state() gave; where the number of ranks has changed, all take their mean or minimum."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        for name, values in state["sums"].items():
            values = torch.tensor(values, device=self.accelerator.device)
            reduced = values.min() if name.endswith("/min") else values.mean()
            self.sums[name] = values[rank] if len(values) == ranks else reduced
        self.made, self.skipped = state["made"], state["skipped"]

    def _gather(self) -> dict[str, Tensor]:
        """Sums of every rank (processes,) on the CPU, by name; one transfer."""
        if not self.sums:
            return {}
        ranks = self.accelerator.gather(torch.stack(list(self.sums.values()))[None]).cpu()  # (processes, names)
        return dict(zip(self.sums, ranks.unbind(1), strict=True))


class MetricsLog:
    """Appends a JSON object per logged step or measurement to {folder}/metrics.jsonl; the trackers get it too.

    Figures that are not finite are null there.
    """

    def __init__(self, accelerator: Accelerator, folder: str | Path, first_step: int):
        self.accelerator, self.path = accelerator, Path(folder, "metrics.jsonl")
        if accelerator.is_main_process:
            if first_step and not self.path.exists() and any(self.path.parent.glob("checkpoint-*")):
                log.warning(f"CAUTION: {self.path} is gone: it will lack the first {first_step} updates")
            rows = read_rows(self.path) if first_step and self.path.exists() else ()
            keep = [f"{line}\n" for line, row in rows if int(row["step"]) <= first_step]
            write_text(self.path, "".join(keep))  # what was logged after the checkpoint will be logged again

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log finished numbers under the number of updates made so far; nothing where there are none."""
        if not values:
            return
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **without_nan(values)}) + "\n")


def without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with None in place of numbers that are not finite, which JSON does not have."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}


def read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(line, its object) of the lines that are whole; others, which a crash may leave, are named and left out."""
    for number, line in enumerate(path.read_bytes().decode(errors="replace").split("\n"), 1):
        try:
            row = json.loads(line)
            if not 0 <= int(row["step"]) < 2**63:
                raise ValueError("no number of updates")
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
            if line:
                log.warning(f"CAUTION: {path}, line {number} is damaged and left out")
        else:
            yield line, row


def read_metrics(folder: str | Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric from a run's metrics.jsonl, nan where it was not finite; InputError for no number."""
    path = Path(folder, "metrics.jsonl")
    found = []
    for line, row in read_rows(path):
        if name in row:
            value = math.nan if row[name] is None else row[name]
            number = isinstance(value, int | float) and not abs(value) > sys.float_info.max
            if not number or (name.endswith("_se") and value < 0):  # a standard error
                raise InputError(f"{path}: {name} in the line {line:.80} cannot be {value!r:.40}: remove the line")
            found.append((int(row["step"]), float(value)))
    return found
