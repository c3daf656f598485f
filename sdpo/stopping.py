"""Stopping early: signals of a scheduler or a user, data that end the run, and updates that came to nothing."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from sdpo.batch import Batch, collate
from sdpo.checkpoint import BEGIN_ANEW, list_checkpoints, save_checkpoint, set_aside, step_of
from sdpo.command import InputError
from sdpo.data import STOP_SIGNALS, PairDataset, micro_batch_places
from sdpo.step import Run, Skipped, compute_loss

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
        for other in self.earlier:  # SIGHUP comes twice: from the shell, and when the shell ends
            signal.signal(other, signal.SIG_IGN if other == signal.SIGHUP else signal.SIG_DFL)
        if self.accelerator.is_local_main_process:
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nstopping once this update is made and saved; a second signal stops at once\n")

    def agreed(self) -> int:
        """Number of the signal that any rank received, 0 if none did; every rank calls this."""
        if self.accelerator.num_processes == 1:
            return self.received
        received = torch.tensor([self.received], device=self.accelerator.device)
        return int(self.accelerator.gather(received).max())


class DataError(InputError):
    """The data of this rank or another end the run; every rank raises it before the same update."""


class MicroBatches:
    """This rank's micro-batches, for as long as its data give any.

    If a rank simply stopped, the others would wait for it. It goes on with noise that is not a number instead: every
    rank then skips the update, and `check` ends the run on all of them. Not under DeepSpeed, which skips nothing.
    """

    def __init__(self, run: Run, batches: Iterator[Batch]):
        """Loads the first one; raises DataError, on every rank, where some rank has none."""
        self.run, self.batches = run, batches
        self.error: InputError | None = None  # of this rank's data
        self.unreadable: set[str] = set()  # what was reported of each pair
        self.waiting = self.last = self._load()
        if error := self._first_error():
            raise DataError(error)

    def __iter__(self) -> MicroBatches:
        return self

    def __next__(self) -> Batch:
        """The next one.

        Where the data end: DataError in a single process, noise that is not a number on one of several ranks, or under
        DeepSpeed the InputError itself, for which the others wait in vain.
        """
        batch, self.waiting = self.waiting or self._load(), None
        if batch is None:
            if self.run.accelerator.num_processes == 1:
                raise DataError(str(self.error)) from self.error
            if self.run.accelerator.distributed_type == DistributedType.DEEPSPEED:
                raise self.error
            return dataclasses.replace(self.last, noise=torch.full_like(self.last.noise, math.nan))
        self.last = batch
        return batch

    def _load(self) -> Batch | None:
        """The next one, if there is any; None from then on where the data end."""
        if self.error:
            return None
        try:
            batch = next(self.batches, None)
            if batch:
                self._count_unreadable(batch.unreadable, self.run.config.max_unreadable_images)
        except InputError as error:
            self.error = error
            return None
        return batch

    def _count_unreadable(self, reports: list[str], limit: int) -> None:
        """Report pairs that were replaced because an image could not be read; raises InputError past the limit."""
        for report in reports:
            if report not in self.unreadable:
                log.error(f"unreadable, always replaced by another pair: {report}")
                self.unreadable.add(report)
        if len(self.unreadable) > limit:
            raise InputError(
                f"{len(self.unreadable)} unreadable pairs, more than --max_unreadable_images {limit}; "
                f"the last: {reports[-1]}"
            )

    def _first_error(self) -> str:
        """What ends the data of the first rank where they end, empty if they do on none; every rank calls this."""
        return next(filter(None, gather_object([str(self.error or "")])), "")

    def check(self, skipped: Skipped | None) -> None:
        """Raises DataError, after taking back an update that was skipped because of some rank's data."""
        if skipped is None:  # what one rank skips, all do
            return
        if error := self._first_error():
            self.run.step -= 1
            self.run.meter.skipped -= 1
            raise DataError(error)


class Skips:
    """Updates that were skipped: each is reported with its pairs, and too many in a row end the run.

    Every rank calls `note`, which may write a checkpoint.
    """

    def __init__(self, run: Run, dataset: PairDataset):
        self.run, self.dataset = run, dataset
        self.in_a_row = self.in_total = 0
        self.began_at = run.step
        self.last_made = run.step  # updates up to the last one that was not skipped

    def note(self, skipped: Skipped | None) -> None:
        """Take in the outcome of an update; raises InputError for one skipped too many in a row.

        A checkpoint is written before, unless the weights are broken.
        """
        if skipped is None:
            self.in_a_row = 0
            self.last_made = self.run.step
            return
        scaler = self.run.accelerator.scaler
        config = self.run.config
        overflow = scaler is not None and not math.isfinite(skipped.grad_norm)  # fp16 is still looking for its scale
        finding_scale = overflow and scaler.get_scale() > 1
        self.in_a_row += not finding_scale
        self.in_total += not finding_scale
        report = f"update {self.run.step} skipped: {self._describe(skipped)}"
        if not finding_scale or not all(map(math.isfinite, skipped.losses)):
            log.error(report)
        if self.in_a_row >= config.max_skipped_updates:
            raise InputError(f"{self.in_a_row} updates in a row skipped, the last: {report}. {self._conclude()}")

    def _conclude(self) -> str:
        """Write a checkpoint, or see to it that none holds broken weights; returns what that means and what to do."""
        run, fix = self.run, "lower --learning_rate, or try --mixed_precision bf16 or no"
        if run.config.skip_grad_norm_above:
            fix = f"raise --skip_grad_norm_above, {fix}"
        if self._weights_are_sound():
            folder = save_checkpoint(run, prune=False)
            return f"{folder} holds the last good state. Look at these pairs, {fix}; then --resume_with_changes"
        broken = f"The weights after update {self.last_made} give no finite loss on its own pairs either"
        if self.last_made == self.began_at:
            return f"{broken}, and this run began with them: {fix}, or go on from others with --resume_from_checkpoint"
        if run.accelerator.is_main_process:
            found = list_checkpoints(run.config.output_dir)
            later = [path for path in found if step_of(path) >= self.last_made]
            set_aside(later, "broken", "holds weights that give no finite loss")
        run.accelerator.wait_for_everyone()
        wanted = run.config.resume_from_checkpoint
        earlier = [wanted] if wanted not in (*BEGIN_ANEW, "latest") else list_checkpoints(run.config.output_dir)
        goes_on = f"goes on from {earlier[-1]}, with --resume_with_changes" if earlier else "begins again"
        return f"{broken}, so they are not kept: {fix}; the same command then {goes_on}"

    @torch.compiler.set_stance("force_eager")
    @torch.no_grad()
    def _weights_are_sound(self) -> bool:
        """Whether the pairs of the last update that was made still have a finite loss on every rank."""
        run = self.run
        step = max(self.last_made - 1, 0)
        losses = []
        for micro in range(run.plan.accumulation):
            places = micro_batch_places(run.plan, run.accelerator.process_index, step, micro)
            batch = collate([self.dataset[place] for place in places])
            losses.append(compute_loss(run, batch.to(run.accelerator.device))[0])
        return bool(run.accelerator.gather(torch.stack(losses)).isfinite().all())

    def sum_up(self) -> None:
        """Say at the end what was skipped since the start or the last resume."""
        if self.in_total:
            last = f", the last {self.in_a_row} among them: the one before may have broken the weights"
            ending = last if self.in_a_row and self.last_made else ""
            tried = self.run.step - self.began_at
            log.warning(f"CAUTION: {self.in_total} of {tried} updates were skipped{ending}")

    def _describe(self, skipped: Skipped) -> str:
        bad = [micro for micro, loss in enumerate(skipped.losses) if not math.isfinite(loss)]
        micros = bad or range(len(skipped.losses))
        rank = self.run.accelerator.process_index
        places = [
            place for micro in micros for place in micro_batch_places(self.run.plan, rank, self.run.step - 1, micro)
        ]
        rows = ", ".join(str(self.dataset.row(place)) for place in places[:SHOWN_ROWS])
        more = f" and {len(places) - SHOWN_ROWS} more" if len(places) > SHOWN_ROWS else ""
        limit = self.run.config.skip_grad_norm_above
        above = f" (--skip_grad_norm_above is {limit:g})" if limit and not bad else ""
        losses = f"losses of {len(bad)} micro-batches not finite" if bad else "losses finite"
        return f"gradient norm {skipped.grad_norm:g}{above}, {losses}, rows {rows}{more} of {self.dataset.pairs.source}"
