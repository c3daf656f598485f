"""Micro-steps recorded as CUDA graphs: the host launches each with one call in place of thousands.

With `--cuda_graphs` the host no longer has to keep up with the GPU. A graph repeats its kernels on the same memory, so
new tensors are copied into those it was recorded with, and gradients stay where they are from update to update.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from sdpo.batch import Batch

WARM_UP = 3  # micro-steps before a recording: kernels are compiled and chosen, memory is taken and given back

Step = Callable[[Batch], dict[str, Tensor]]  # a micro-step: from a batch on the device to what is measured on it


class Recording:
    """A micro-step as a CUDA graph, for batches whose tensors have the shapes of this one's."""

    def __init__(self, step: Step, batch: Batch, stream: torch.cuda.Stream):
        self.batch = batch
        self.graph = torch.cuda.CUDAGraph()
        # the loader's thread may allocate meanwhile
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.values = step(batch)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """What the step measures on a batch in host memory or on the device."""
        for own, new in zip(self.batch.tensors().values(), batch.tensors().values(), strict=True):
            own.copy_(new, non_blocking=True)
        self.graph.replay()
        return {name: value.clone() for name, value in self.values.items()}


class RecordedSteps:
    """A micro-step that is recorded after a few calls, for each set of shapes, and repeated from then on."""

    def __init__(self, step: Step, device: torch.device):
        self.step, self.device, self.stream = step, device, torch.cuda.Stream(device)
        self.calls: Counter[tuple] = Counter()  # made before the recording, by shapes
        self.recordings: dict[tuple, Recording] = {}

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """What the step measures on a batch in host memory."""
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.tensors().items())
        if shapes not in self.recordings:
            batch = batch.to(self.device)
            if self.calls[shapes] < WARM_UP:
                self.calls[shapes] += 1
                return self._on_the_side(batch)
            self.recordings[shapes] = Recording(self.step, batch, self.stream)
        return self.recordings[shapes](batch)

    def _on_the_side(self, batch: Batch) -> dict[str, Tensor]:
        """The step on the stream that will record it, where autograd and libraries keep what they set up."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            values = self.step(batch)
        current.wait_stream(self.stream)
        return values
