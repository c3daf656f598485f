"""A stand-in for CUDA graphs: a recording notes every operation and undoes its effects, a replay repeats them on the
same tensors. As on a GPU, what is read from the device while recording is an error, and numbers of the host are frozen.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


def tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class Tape(TorchDispatchMode):
    """What torch.cuda.CUDAGraph does, on a CPU."""

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.replays = [], {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write:
                for tensor in tensors(value):
                    self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def undo(self):
        for tensor, value in self.before.values():
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.operations:
            for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage()._cdata != new.untyped_storage()._cdata:  # neither a view nor in place
                    old.copy_(new)


@contextmanager
def capture(tape, **_):
    with tape:
        yield
    tape.undo()


@contextmanager
def cuda_graphs():
    """torch.cuda's graphs and streams within this block; gives the tapes that were made."""
    tapes, stream = [], SimpleNamespace(wait_stream=lambda other: None)

    def graph():
        tapes.append(Tape())
        return tapes[-1]

    fakes = {
        "CUDAGraph": graph, "graph": capture, "Stream": lambda *_: stream,
        "current_stream": lambda *_: stream, "stream": lambda _: nullcontext(),
    }  # fmt: skip
    patches = [patch.object(torch.cuda, name, fake) for name, fake in fakes.items()]
    for change in patches:
        change.start()
    try:
        yield tapes
    finally:
        for change in patches:
            change.stop()
