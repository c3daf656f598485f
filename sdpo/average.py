"""Averaged weights: kept beside a model's own, split over ranks as these are, and put in their place to be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedWeights:
    """Exponential moving average of the trained weights of a prepared model, beginning with their present values."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.average = get_ema_multi_avg_fn(decay)
        self.values = [own.detach().clone() for own in self._weights()]  # of this rank, in the model's order

    @torch.no_grad()
    def update(self) -> None:
        """Move by the share 1 - decay towards the model's weights."""
        self.average(self.values, self._weights(), None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the model has the averaged weights; every rank enters it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def load(self, state: dict[str, Tensor]) -> None:
        """Take the averaged weights from a state dict of the whole model; every rank calls this."""
        # slow to import, and only a run that resumes needs it
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        with self.in_place():
            set_model_state_dict(self.model, state, options=StateDictOptions(full_state_dict=True))

    @torch.no_grad()
    def _swap(self) -> None:
        for own, value in zip(self._weights(), self.values, strict=True):
            kept = own.clone()
            own.copy_(value)
            value.copy_(kept)

    def _weights(self) -> list[Tensor]:
        """This rank's part of the weights, where there are parts."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass may have left it whole, and the next would use that
        trained = (p for p in self.model.parameters() if p.requires_grad)
        return [p.to_local() if isinstance(p, DTensor) else p for p in trained]
