"""A stand-in for a GPU: tensors that say they are on "cuda", live in host memory and refuse to meet others.

Forward passes run on it, with the precision that autocast chooses on a GPU; backward passes need a driver.
"""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MIB = 2**20
FREE, ALLOCATED, PEAK = 40 * MIB, 1 * MIB, 3 * MIB  # bytes, whatever is done
aten = torch.ops.aten
MEET = (aten._to_copy.default, aten.copy_.default, aten.index.Tensor)  # what takes tensors of several devices


class OnGpu(Tensor):
    """A tensor "on cuda:0" with its numbers in `host`."""

    @staticmethod
    def __new__(cls, host):
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, host.shape, device="cuda:0", **layout)
        tensor.host = host
        return tensor

    def __repr__(self, **_):
        return f"on a GPU: {self.host}"

    def __deepcopy__(self, memo):
        copied = OnGpu(self.host.detach().clone())
        is_weight = isinstance(self, torch.nn.Parameter)
        memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if is_weight else copied
        return memo[id(self)]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """Compute on the host; what comes of tensors on the GPU, or is made there, is there too."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, OnGpu)]
    strangers = [x for x in tensors if not isinstance(x, OnGpu) and x.dim()]
    if there and strangers and func not in MEET:
        raise RuntimeError(f"{func} of tensors on several devices, not on cuda: {[tuple(x.shape) for x in strangers]}")
    goes = kwargs.get("device")
    to_gpu = goes is not None and torch.device(goes).type == "cuda"
    stays = isinstance(args[0], OnGpu) if func is aten.copy_.default else bool(there) and goes is None
    on_host = {"device": torch.device("cpu")} if to_gpu else {}
    on_host |= {"pin_memory": False} if "pin_memory" in kwargs else {}
    args, kwargs = tree_map(lambda x: x.host if isinstance(x, OnGpu) else x, (args, kwargs | on_host))
    out = func(*args, **kwargs)
    if not to_gpu and not stays:
        return out
    same = {id(x.host): x for x in there}  # what an operation in place returns
    return tree_map(lambda x: (same[id(x)] if id(x) in same else OnGpu(x)) if isinstance(x, Tensor) else x, out)


class Dispatch(TorchDispatchMode):
    """Takes in what no argument says is on the GPU: tensors made there or copied to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Names(TorchFunctionMode):
    """Spells the device "cuda:0": without a number torch would ask the driver for the current one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def spell(x):
            is_device = isinstance(x, (str, torch.device)) and str(x) == "cuda"
            return torch.device("cuda:0") if is_device else x

        if func is torch.device and len(args) > 1:  # its number is said
            return func(*args, **kwargs)
        args, kwargs = tuple(map(spell, args)), {name: spell(x) for name, x in (kwargs or {}).items()}
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == "cuda":
            return func(*args, **kwargs | {"device": "cpu"}).to(device)  # which torch does without asking a mode
        return func(*args, **kwargs)


class HostGenerator:
    """torch.Generator, whose numbers are those of the CPU for either device."""

    kind = torch.Generator

    def __new__(cls, device="cpu"):
        return cls.kind("cpu")


@contextmanager
def gpu():
    """One GPU within this block."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    torch._C._ensureCUDADeviceGuardSet()  # as FakeTensorMode does: no driver is asked for streams
    answers = {
        "_lazy_init": None, "is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
        "is_bf16_supported": True, "empty_cache": None, "reset_peak_memory_stats": None, "manual_seed_all": None,
        "mem_get_info": (FREE, 24 * 2**30), "memory_allocated": ALLOCATED, "max_memory_allocated": PEAK,
        "get_device_name": "stand-in",
    }  # fmt: skip
    patches = [patch.object(torch.cuda, name, lambda *_, value=value: value) for name, value in answers.items()]
    patches += [
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch, "Generator", HostGenerator),
        patch.object(Tensor, "pin_memory", lambda tensor, *_: tensor),
    ]
    swap = torch.__future__.get_swap_module_params_on_conversion()
    for change in patches:
        change.start()
    try:
        torch.__future__.set_swap_module_params_on_conversion(True)  # weights become tensors of another class
        with Names(), Dispatch():
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
        for change in patches:
            change.stop()
