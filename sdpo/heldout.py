"""Errors on held-out pairs, with noise and timesteps fixed for the whole run: is the winner in fact preserved?"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from sdpo.batch import collate
from sdpo.data import PairDataset
from sdpo.families import Family
from sdpo.files import write_file
from sdpo.inputs import Inputs, make_inputs
from sdpo.losses import sample_error
from sdpo.pairs import as_prompts
from sdpo.ranks import together

HELD_OUT_FILE = "heldout.parquet"  # in a run's output folder: the errors measured last, a row per pair
STEP = b"sdpo_step"  # key of its metadata: updates made when they were
MEMBERS = ("winner", "loser")
PROGRESS_AFTER = 5  # seconds
PREFIXES = {"policy": "heldout", "average": "heldout_ema"}  # model -> prefix of its figures in metrics.jsonl
log = logging.getLogger(__name__)


class HeldOutPairs:
    """This rank's shares of the held-out pairs, encoded, on the CPU, and the reference's errors.

    Measuring is a forward pass per share.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        family: Family,
        dataset: PairDataset,
        batch_size: int,
        reference: nn.Module,
    ):
        self.accelerator, self.family, self.count = accelerator, family, len(dataset.pairs)
        self.captions = [options[0] for options in dataset.pairs.captions()]  # the one that each is measured with
        self.shares: list[tuple[slice, Inputs]] = []  # places among the pairs, and their inputs
        errors, unreadable = together(lambda: self._encode(dataset, batch_size, reference))
        self.reference_errors = self._gather(errors)  # (pairs, 2)
        self.readable = accelerator.gather(unreadable[None]).sum(0).cpu() == 0  # (pairs,)

    def _encode(self, dataset: PairDataset, batch_size: int, reference: nn.Module) -> tuple[list[Tensor], Tensor]:
        """Fill this rank's shares; returns the reference's errors (2B,) on each, and (pairs,) 1 where unreadable."""
        device, ranks = self.accelerator.device, self.accelerator.num_processes
        starts = range(0, self.count, batch_size)
        errors = []
        unreadable = torch.zeros(self.count, dtype=torch.long, device=device)
        # Every rank makes as many passes, because ranks that share out the weights gather them together
        numbers = range(self.accelerator.process_index, math.ceil(len(starts) / ranks) * ranks, ranks)
        for number in self._showing_progress(numbers, "encoding held-out pairs"):
            start = starts[number % len(starts)]
            places = slice(start, min(start + batch_size, self.count))
            samples = [dataset[0, index] for index in range(self.count)[places]]
            for index, sample in enumerate(samples, start):
                if sample["unreadable"]:  # another pair stands in for it
                    log.error(f"unreadable, not measured on: {sample['unreadable'][0]}")
                    unreadable[index] = 1
            inputs = make_inputs(self.family, collate(samples).to(device))
            self.shares.append((places, inputs.to("cpu")))
            errors.append(self._errors(reference, inputs))
        return errors, unreadable

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # for a last batch of another shape, and alike for averaged weights
    def _errors(self, unet: nn.Module, inputs: Inputs) -> Tensor:
        with self.accelerator.autocast():
            prediction = self.family.predict(unet, inputs.noisy, inputs.timesteps, inputs.conditioning)
        return sample_error(prediction, inputs.target)  # (2B,)

    def _gather(self, errors: list[Tensor]) -> Tensor:
        """Errors (2B,) on every rank's shares as (pairs, 2) of winner and loser, float64 on the CPU."""
        values = torch.full((self.count, 2), torch.nan, device=self.accelerator.device)  # nan where it has no share
        for (places, _), error in zip(self.shares, errors, strict=True):
            values[places] = torch.stack(error.chunk(2), 1)
        ranks = self.accelerator.gather(values[None])  # (processes, pairs, 2)
        return ranks.nanmedian(0).values.cpu().double()  # a pair that several ranks measured has one value

    def measure(self, unet: nn.Module) -> Tensor:
        """Errors of a UNet on winner and loser of every pair, (pairs, 2) float64 on the CPU; every rank calls this."""
        shares = self._showing_progress(self.shares, "measuring held-out pairs")
        return self._gather([self._errors(unet, inputs.to(self.accelerator.device)) for _, inputs in shares])

    def _showing_progress(self, steps: Sequence, what: str) -> Iterable:
        """The steps, with a progress bar on the main process where they take long."""
        hidden = self.accelerator.process_index > 0
        return tqdm(steps, desc=what, unit="batch", delay=PROGRESS_AFTER, leave=False, disable=hidden)

    def figures(self, errors: Tensor, beta: float) -> dict[str, float]:
        """What `figures_of` says of errors (pairs, 2) minus the reference's, on the pairs that could be read."""
        change = (errors - self.reference_errors)[self.readable]
        return figures_of(change, prompt_ids(self._readable_captions()), beta)

    def _readable_captions(self) -> list[str]:
        return [caption for caption, there in zip(self.captions, self.readable, strict=True) if there]

    def write(self, path: Path, step: int, errors: dict[str, Tensor]) -> None:
        """Write errors (pairs, 2) by model and those of the reference as parquet, a row per pair that could be read."""
        columns = {"pair": torch.arange(self.count)[self.readable].numpy(), "caption": self._readable_captions()}
        for name, values in {"reference": self.reference_errors, **errors}.items():
            for member, error in zip(MEMBERS, values[self.readable].unbind(1), strict=True):
                columns[f"{name}_{member}_error"] = error.numpy()
        table = pa.table(columns).replace_schema_metadata({STEP: str(step)})
        write_file(path, lambda partial: pq.write_table(table, partial))


def prompt_ids(captions: Sequence[str]) -> Tensor:
    """A number for each caption (n,) int64, the same where they are one prompt."""
    prompts = [prompt for (prompt,) in as_prompts([[caption] for caption in captions])]
    return torch.from_numpy(np.unique(prompts, return_inverse=True)[1])


def figures_of(change: Tensor, prompts: Tensor, beta: float) -> dict[str, float]:
    """Mean change (pairs, 2) of winner and loser error against the reference's, margin and margin accuracy.

    With standard errors as mean_of has them; `prompts` (pairs,) are prompt_ids. A margin of exactly 0 counts one half.
    """
    margin = -beta / 2 * (change[:, 0] - change[:, 1])
    accuracy = torch.where(margin.isnan(), margin, (margin > 0).double() + (margin == 0).double() / 2)
    return {
        **mean_of("winner_error_change", change[:, 0], prompts),
        **mean_of("loser_error_change", change[:, 1], prompts),
        **mean_of("margin", margin, prompts),
        **mean_of("margin_accuracy", accuracy, prompts),
    }


def mean_of(name: str, values: Tensor, prompts: Tensor) -> dict[str, float]:
    """Mean of values (n,) as `name` and, where there are several prompts (n,), its error clustered by them as _se."""
    error = clustered_error(values, prompts)
    return {name: values.mean().item(), **({} if error is None else {f"{name}_se": error})}


def clustered_error(values: Tensor, clusters: Tensor) -> float | None:
    """Standard error of the mean of values (n,) that are independent only where their clusters (n,) of int64 differ.

    A jackknife that leaves out a cluster at a time (Efron 1982), which also holds where sizes are very unequal. With
    each value in a cluster of its own it is the usual one; None for a single cluster.
    """
    _, clusters, sizes = clusters.unique(return_inverse=True, return_counts=True)
    count = len(sizes)
    if count < 2:
        return None
    sums = values.new_zeros(count).index_add_(0, clusters, values - values.mean())
    shifts = sums / (len(values) - sizes)  # of the mean, where a cluster is left out
    return ((count - 1) / count * shifts.square().sum()).sqrt().item()
