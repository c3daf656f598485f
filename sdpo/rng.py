"""Randomness as a function of (seed, stream, position), so that a resumed or re-split run draws the same numbers."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor


def draw(seed: int, stream: str, *position: int) -> np.random.Generator:
    """An independent generator for one purpose at one place, e.g. draw(seed, "noise", step, position).

    Every call for one stream gives as many numbers: NumPy takes a missing one for 0, so (1,) and (1, 0) draw alike.
    """
    return np.random.default_rng([seed, zlib.crc32(stream.encode()), *position])


def normal(seed: int, stream: str, position: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Standard normal fp32 tensor of `shape`, on the CPU."""
    return torch.from_numpy(draw(seed, stream, *position).standard_normal(shape, dtype=np.float32))
