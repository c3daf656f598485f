"""Speed of the latent cache: `python benchmarks/cache.py` writes synthetic pairs and reads them in random order.

Entries have the size of SD1.5 at 512 pixels: moments of 4 x 64 x 64 in bf16, two images, two orientations, and captions
of 77 x 768, 14 pairs to a caption as in Pick-a-Pic. "samples" draw the noise of training too, "noise" does so alone.
CPU time counts all processes; on a machine with other work it says more than pairs per second.
Results go to benchmarks/results/cache-cpu.json. It needs 5 GiB of disk for 20,000 pairs, which are removed at the end.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.environment import environment
from sdpo.batch import collate
from sdpo.cache import CachedPairs, cut
from sdpo.data import PairDataset, Transform
from sdpo.files import write_json
from sdpo.pairs import IMAGES, Pairs
from sdpo.rng import normal
from sdpo.shards import SHARD_BYTES, Shards

LATENT, TEXT = (4, 64, 64), (77, 768)
PAIRS_PER_CAPTION = 14
BATCH = 16


def write_cache(folder: Path, count: int) -> tuple[CachedPairs, float]:
    """A cache of random numbers, and the seconds it takes to open it."""
    captions = [f"caption {i}" for i in range(-(-count // PAIRS_PER_CAPTION))]
    table = datasets.Dataset.from_dict(
        {"caption": [captions[i % len(captions)] for i in range(count)]} | {name: [b""] * count for name in IMAGES}
    )
    pairs = Pairs(table, np.arange(count), np.arange(count) % 2 == 0, IMAGES, "caption", "synthetic")
    images, texts = Shards(folder / "images", {}), Shards(folder / "captions", {})
    draw = torch.Generator().manual_seed(0)
    for shards, names, tensor, shape in (
        (images, list(range(count)), "moments", (len(IMAGES), 2, 2, *LATENT)),
        (texts, captions, "encoder_hidden_states", TEXT),
    ):
        shards.create()
        rows = SHARD_BYTES // (2 * int(np.prod(shape)))
        for part in tqdm(cut(names, rows), desc=f"writing {shards.folder.name}", unit="file"):
            values = torch.randn(64, *shape, generator=draw).bfloat16().repeat(-(-len(part) // 64), *[1] * len(shape))
            shards.write(part, {tensor: values[: len(part)].contiguous()}, {})
    began = time.perf_counter()
    for shards in (images, texts):
        shards.scan()
    return CachedPairs(pairs, images, texts), time.perf_counter() - began


def drop_page_cache(folder: Path) -> None:
    """Have the system forget the cache's files, so that they are read from the disk again."""
    for path in folder.glob("*/*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Readings(Dataset):
    """What a batch takes from the cache for a pair: moments of one orientation and the caption's encoding."""

    def __init__(self, pairs: CachedPairs):
        self.pairs = pairs

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """{"moments": (2, 2, C, h, w), and the tensors of the caption}."""
        images, (caption,) = self.pairs.load(index, 2)
        return {"moments": torch.stack([image[index % 2] for image in images]), **self.pairs.encode(caption)}


def load(dataset: Dataset, places: list, workers: int, gather: Callable) -> int:
    """One pass over the places, in batches; returns their number."""
    for _ in DataLoader(dataset, batch_sampler=cut(places, BATCH), num_workers=workers, collate_fn=gather):
        pass
    return len(places)


def draw_noise(places: list) -> int:
    """The draws of noise alone, as PairDataset makes them; returns the number of places."""
    for place in places:
        normal(0, "noise", place, LATENT)
        normal(0, "posterior", place, (2, *LATENT))
    return len(places)


def cpu_time() -> float:
    """Seconds of CPU that this process and its finished children have used."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def measure(task: Callable[[], int]) -> tuple[float, float]:
    """(pairs per second, CPU milliseconds per pair) of a task that returns its pairs."""
    cpu, began = cpu_time(), time.perf_counter()
    count = task()
    return count / (time.perf_counter() - began), 1000 * (cpu_time() - cpu) / count


def measure_all(pairs: CachedPairs, folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Median pairs per second and CPU milliseconds per pair by what is done."""
    count = len(pairs)
    order = np.random.default_rng(0).permutation(count).tolist()
    readings = Readings(pairs)
    samples = PairDataset(pairs, Transform(512, flip=True), LATENT, 0, "train", BATCH)
    places = [divmod(i, BATCH) for i in range(count)]
    tasks = {
        "read, 1 process": lambda: load(readings, order, 0, default_collate),
        "read, 2 workers": lambda: load(readings, order, 2, default_collate),
        "noise, 1 process": lambda: draw_noise(places[:2000]),
        "samples, 1 process": lambda: load(samples, places[:4000], 0, collate),
        "samples, 2 workers": lambda: load(samples, places, 2, collate),
    }
    drop_page_cache(folder)
    figures = {"read from disk, 2 workers": [measure(tasks["read, 2 workers"])]}
    for _ in range(repeats):
        for name, task in tasks.items():
            figures.setdefault(name, []).append(measure(task))
    names = ("pairs_per_second", "cpu_ms_per_pair")
    return {task: dict(zip(names, np.median(values, 0).tolist(), strict=True)) for task, values in figures.items()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pairs", type=int, default=20_000, help="entries of the cache")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--folder", type=Path, help="where the cache is written for the time of the run")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        pairs, seconds = write_cache(Path(name), args.pairs)
        size = sum(path.stat().st_size for path in Path(name).glob("*/*.safetensors"))
        tasks = measure_all(pairs, Path(name), args.repeats)
    results = environment("cpu", "safetensors") | {
        "load_average": os.getloadavg(),
        "pairs": args.pairs,
        "bytes": size,
        "batch": BATCH,
    }
    results |= {"seconds_to_open": seconds, "tasks": tasks}
    print(f"{args.pairs:,} pairs, {size / 2**30:.3g} GiB, opened in {seconds:.3f} s")
    for task, row in tasks.items():
        print(
            f"  {task:>26}  {row['pairs_per_second']:9,.0f} pairs/s  {row['cpu_ms_per_pair']:6.3f} ms of CPU per pair"
        )
    path = args.out / "cache-cpu.json"
    write_json(path, results)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
