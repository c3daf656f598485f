"""Errors on held-out pairs, with noise and timesteps fixed for the whole run: is the winner in fact preserved?"""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdpo.batch import collate
from sdpo.data import PairDataset
from sdpo.families import Family
from sdpo.inputs import Inputs, make_inputs
from sdpo.losses import sample_error
from sdpo.pairs import as_prompts
from sdpo.ranks import together

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
        prompts = [options[0] for options in as_prompts(dataset.pairs.captions())]
        self.caption_ids = torch.from_numpy(np.unique(prompts, return_inverse=True)[1])  # (pairs,)
        self.shares: list[tuple[slice, Inputs, Tensor]] = []  # places, their inputs, errors (2B,) of the reference
        unreadable = together(lambda: self._encode(dataset, batch_size, reference))
        self.readable = accelerator.gather(unreadable[None]).sum(0).cpu() == 0  # (pairs,)

    def _encode(self, dataset: PairDataset, batch_size: int, reference: nn.Module) -> Tensor:
        """Fill this rank's shares; 1 where one of its pairs is unreadable, else 0, (pairs,)."""
        device, ranks = self.accelerator.device, self.accelerator.num_processes
        starts = range(0, self.count, batch_size)
        unreadable = torch.zeros(self.count, dtype=torch.long, device=device)
        # Every rank makes as many passes, because ranks that share out the weights gather them together
        for number in range(self.accelerator.process_index, math.ceil(len(starts) / ranks) * ranks, ranks):
            start = starts[number % len(starts)]
            places = slice(start, min(start + batch_size, self.count))
            samples = [dataset[0, index] for index in range(self.count)[places]]
            for index, sample in enumerate(samples, start):
                if sample["unreadable"]:  # another pair stands in for it
                    log.error(f"unreadable, not measured on: {sample['unreadable'][0]}")
                    unreadable[index] = 1
            inputs = make_inputs(self.family, collate(samples).to(device))
            self.shares.append((places, inputs.to("cpu"), self._errors(reference, inputs)))
        return unreadable

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # for a last batch of another shape, and alike for averaged weights
    def _errors(self, unet: nn.Module, inputs: Inputs) -> Tensor:
        with self.accelerator.autocast():
            prediction = self.family.predict(unet, inputs.noisy, inputs.timesteps, inputs.conditioning)
        return sample_error(prediction, inputs.target)  # (2B,)

    def measure(self, unet: nn.Module, beta: float, name: str) -> dict[str, float]:
        """Mean change of winner and loser error against the reference's, margin and margin accuracy, by metric name.

        Where there are several captions, with standard errors clustered by them. A margin of exactly 0 counts one half.
        """
        # change of (winner, loser) error; nan where this rank has no share
        values = torch.full((self.count, 2), torch.nan, device=self.accelerator.device)
        for places, inputs, reference in self.shares:
            change = self._errors(unet, inputs.to(self.accelerator.device)) - reference
            values[places] = torch.stack(change.chunk(2), 1)
        ranks = self.accelerator.gather(values[None])  # (processes, pairs, 2), nan where a rank has no share
        change = ranks.nanmedian(0).values.cpu().double()  # a pair that several ranks measured has one value
        change = change[self.readable]
        margin = -beta / 2 * (change[:, 0] - change[:, 1])
        accuracy = torch.where(margin.isnan(), margin, (margin > 0).double() + (margin == 0).double() / 2)
        figures = {
            "winner_error_change": change[:, 0],
            "loser_error_change": change[:, 1],
            "margin": margin,
            "margin_accuracy": accuracy,
        }
        result = {}
        for key, value in figures.items():
            result[f"{name}/{key}"] = value.mean().item()
            if (error := clustered_error(value, self.caption_ids[self.readable])) is not None:
                result[f"{name}/{key}_se"] = error
        return result


def clustered_error(values: Tensor, clusters: Tensor) -> float | None:
    """Standard error of the mean of values (n,) that are independent only where their clusters (n,) of int64 differ.

    That of independent values if each has a cluster of its own; None if there is only one (Liang and Zeger 1986).
    """
    present, clusters = clusters.unique(return_inverse=True)
    count = len(present)
    if count < 2:
        return None
    sums = values.new_zeros(count).index_add_(0, clusters, values - values.mean())
    return (count / (count - 1) * sums.square().sum()).sqrt().item() / len(values)
