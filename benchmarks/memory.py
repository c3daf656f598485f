"""Memory that training takes on a GPU, computed without one: `python benchmarks/memory.py`.

Prints the table of docs/performance.md: weights, gradients and optimizer state from the number of parameters,
activations as sdpo/memory.py counts them. With cached latents, without averaged weights, in bf16. Compiled blocks are
counted as on a CPU: they keep no results of norms, which are what a GPU has in another precision.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.architectures import BASES
from benchmarks.counting import like_a_gpu
from sdpo.adapters import add_adapters
from sdpo.inputs import Inputs
from sdpo.memory import choose_units, planned_memory

ROWS = (
    *(("sd15", "adamw", 0, pairs) for pairs in (1, 4, 8)),
    ("sd15", "adamw8bit", 0, 8),
    *(("sdxl", "adafactor", 0, pairs) for pairs in (1, 4, 8)),
    ("sdxl", "adamw8bit", 0, 4),
    ("sdxl", "adamw", 0, 4),
    ("sd15", "adamw", 64, 8),
    *(("sdxl", "adamw", 64, pairs) for pairs in (1, 4)),
)
COLUMNS = (
    "base, optimizer", "pairs per GPU", "before activations",
    "activations, none recomputed", "all recomputed", "total", "total with --compile",
)  # fmt: skip
NAMES = {"sd15": "SD1.5", "sdxl": "SDXL", "adamw": "AdamW", "adamw8bit": "AdamW in 8 bits", "adafactor": "Adafactor"}


def gibibytes(name: str, optimizer: str, rank: int, pairs: int, compiled: bool) -> tuple[float, float, float]:
    """(weights, gradients and optimizer state; activations if all are recomputed; if none are), GiB.

    With a rank above 0, of adapters.
    """
    flags = {"mixed_precision": "bf16", "optimizer": optimizer, "train_batch_size": pairs, "compile": compiled}
    config = BASES[name].config(**flags, lora_rank=rank)
    family = BASES[name].build("meta")
    unet, shape = family.load_unet(), family.latent_shape(config.resolution)
    if rank:
        add_adapters(unet, family.adapted, rank, 0)
    run = SimpleNamespace(config=config, family=family, policy=unet, reference=unet)  # as far as planned_memory looks
    conditioning = family.encode_captions([""] * 2 * pairs, config.resolution)
    with FakeTensorMode():
        noisy = torch.empty(2 * pairs, *shape, device="cpu" if compiled else "cuda")
    inputs = Inputs(noisy, torch.empty(2 * pairs), conditioning, noisy)
    kept = [choose_units(family, unet, inputs, torch.bfloat16, budget, compiled)[1] for budget in (0, float("inf"))]
    return tuple(size / 2**30 for size in (sum(planned_memory(run).values()), *kept))


def main() -> None:
    """Print the table."""
    print("| " + " | ".join(COLUMNS) + " |\n|---" + "|---:" * (len(COLUMNS) - 1) + "|")
    for name, optimizer, rank, pairs in ROWS:
        with like_a_gpu():
            before, least, most = gibibytes(name, optimizer, rank, pairs, compiled=False)
        figures = [f"{size:.1f}" for size in (before, most, least)]
        totals = [(before + least, before + most)]
        if not rank:  # adapters are not compiled
            before, least, most = gibibytes(name, optimizer, rank, pairs, compiled=True)
            totals.append((before + least, before + most))
        figures += [f"{low:.1f} to {high:.1f}" for low, high in totals]
        figures += ["-"] * (len(COLUMNS) - 2 - len(figures))
        adapters = f", adapters of rank {rank}" if rank else ""
        row = (f"{NAMES[name]}, {NAMES[optimizer]}{adapters}", str(pairs), *figures)
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
