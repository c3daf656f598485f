"""Stopping early: signals of a scheduler or a user, and updates that came to nothing."""

from __future__ import annotations

import logging
import math
import os
import signal
from contextlib import suppress

import torch
from accelerate import Accelerator

from sdpo.checkpoint import list_checkpoints, save_checkpoint
from sdpo.command import InputError
from sdpo.data import STOP_SIGNALS, PairDataset, micro_batch_places
from sdpo.step import Run, Skipped

SHOWN_ROWS = 16  # of a skipped update, on the console
log = logging.getLogger(__name__)


class StopRequest:
    """Within this context the first of STOP_SIGNALS is noted, a second SIGTERM or SIGINT has its usual effect."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.received, self.earlier = accelerator, 0, {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                self.earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.received = number
        for other in self.earlier:  # of SIGHUP there are two: the shell sends one, and its end another
            signal.signal(other, signal.SIG_IGN if other == signal.SIGHUP else signal.SIG_DFL)
        if self.accelerator.is_local_main_process:
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping after this update, with a checkpoint; a second signal stops at once\n")

    def agreed(self) -> int:
        """Number of the signal that any rank received, 0 if none did; every rank calls this."""
        if self.accelerator.num_processes == 1:
            return self.received
        received = torch.tensor([self.received], device=self.accelerator.device)
        return int(self.accelerator.gather(received).max())


class Skips:
    """Updates that were skipped: each is reported with its pairs, and too many in a row end the run.

    Every rank calls `note`, which may write a checkpoint.
    """

    def __init__(self, run: Run, dataset: PairDataset):
        self.run, self.dataset, self.in_a_row, self.in_all = run, dataset, 0, 0

    def note(self, skipped: Skipped | None) -> None:
        """Take in the outcome of an update; raises InputError, after a checkpoint, for one too many in a row."""
        if skipped is None:
            self.in_a_row = 0
            return
        scaler = self.run.accelerator.scaler
        config = self.run.config
        overflow = scaler is not None and not math.isfinite(skipped.grad_norm)  # of fp16, while its scale is found
        finding_scale = overflow and scaler.get_scale() > 1
        self.in_a_row += not finding_scale
        self.in_all += not finding_scale
        report = f"update {self.run.step} skipped: {self._describe(skipped)}"
        if not finding_scale or not all(map(math.isfinite, skipped.losses)):
            log.error(report)
        if self.in_a_row < config.max_skipped_updates:
            return
        folder = save_checkpoint(self.run, prune=False)
        earlier = list_checkpoints(folder.parent)[:-1]
        raise InputError(
            f"{self.in_a_row} updates in a row skipped, the last: {report}. {folder} holds the weights that the last "
            "update left. Look at these pairs, lower --learning_rate, or try --mixed_precision bf16 or no; then "
            "--resume_with_changes"
            + (f", with --resume_from_checkpoint {earlier[-1]} if that update broke the weights" if earlier else "")
        )

    def sum_up(self) -> None:
        """Say at the end what was skipped since the start or the last resume."""
        if self.in_all:
            last = f", the last {self.in_a_row} among them: the one before may have broken the weights"
            ending = last if self.in_a_row else ""
            log.warning(f"CAUTION: {self.in_all} of {self.run.step} updates were skipped{ending}")

    def _describe(self, skipped: Skipped) -> str:
        bad = [micro for micro, loss in enumerate(skipped.losses) if not math.isfinite(loss)]
        micros = bad or range(len(skipped.losses))
        rank = self.run.accelerator.process_index
        places = [
            place for micro in micros for place in micro_batch_places(self.run.plan, rank, self.run.step - 1, micro)
        ]
        rows = ", ".join(str(self.dataset.row(place)) for place in places[:SHOWN_ROWS])
        more = f" and {len(places) - SHOWN_ROWS} more" if len(places) > SHOWN_ROWS else ""
        losses = f"losses of {len(bad)} micro-batches not finite" if bad else "losses finite"
        return f"gradient norm {skipped.grad_norm:g}, {losses}, rows {rows}{more} of {self.dataset.pairs.source}"
