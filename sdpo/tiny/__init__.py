"""The embedded default: a miniature Stable Diffusion 1.5 and pictures whose quality can be read from their pixels."""

from pathlib import Path

BASE = Path(__file__).parent / "base"  # in diffusers' format
