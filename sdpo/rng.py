"""Randomness as a function of (seed, stream, position), so that a resumed or re-split run draws the same numbers."""

from __future__ import annotations

import zlib

import numpy as np


def draw(seed: int, stream: str, *position: int) -> np.random.Generator:
    """An independent generator for one purpose at one place, e.g. draw(seed, "noise", step, position)."""
    return np.random.default_rng([seed, zlib.crc32(stream.encode()), *position])


def normal(seed: int, stream: str, position: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 array of `shape`."""
    return draw(seed, stream, *position).standard_normal(shape, dtype=np.float32)
