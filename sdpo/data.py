"""From pairs to batches: what a batch holds depends on (seed, step, position) alone."""

from __future__ import annotations

import atexit
import errno
import functools
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from sdpo.batch import Batch, collate
from sdpo.command import InputError
from sdpo.config import Plan, TrainConfig
from sdpo.files import brief
from sdpo.rng import draw, normal

if TYPE_CHECKING:  # reading pairs needs packages that batches do not
    from sdpo.cache import CachedPairs
    from sdpo.pairs import Pairs
    from sdpo.references import KnownErrors

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SHARED_MEMORY = Path("/dev/shm")  # where loader workers put batches on Linux
PREFETCHED = 2  # batches that a worker prepares ahead, torch's default


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, pairs: int) -> np.ndarray:
    """Order in which one epoch visits the pairs, (pairs,)."""
    return draw(seed, "order", epoch).permutation(pairs)


@dataclass(frozen=True)
class Transform:
    """Resize the shorter side, crop to a square, flip; flips and random crops are drawn from generators."""

    resolution: int
    random_crop: bool = False
    flip: bool = False
    shared_flip: bool = False

    def __call__(
        self, images: list[Image.Image], crop_rng: np.random.Generator, flip_rng: np.random.Generator
    ) -> Tensor:
        """(len(images), 3, resolution, resolution) uint8."""
        flips = self.draw_flips(len(images), flip_rng)
        return torch.stack(
            [self.crop_and_flip(image, flip, crop_rng) for image, flip in zip(images, flips, strict=True)]
        )

    def draw_flips(self, count: int, rng: np.random.Generator) -> list[bool]:
        """Which of `count` images to mirror."""
        flips = rng.random(count) < 0.5
        if self.shared_flip:
            flips[:] = flips[0]
        return (flips & self.flip).tolist()

    def crop_and_flip(self, image: Image.Image, mirrored: bool, crop_rng: np.random.Generator | None = None) -> Tensor:
        """(3, resolution, resolution) uint8; a random crop needs its generator."""
        image = TF.resize(image, self.resolution, InterpolationMode.BILINEAR)
        if self.random_crop:
            left, top = (int(crop_rng.integers(length - self.resolution + 1)) for length in image.size)
            image = TF.crop(image, top, left, self.resolution, self.resolution)
        else:
            image = TF.center_crop(image, self.resolution)
        return TF.pil_to_tensor(TF.hflip(image) if mirrored else image)


@dataclass(frozen=True)
class PairDataset(Dataset):
    """Samples by (step, position in the global batch), everything random in them drawn for that place."""

    pairs: Pairs | CachedPairs
    transform: Transform
    latent_shape: tuple[int, int, int]
    seed: int
    stream: str  # "train": shuffled, any of several captions; "held-out": in order, the first caption
    global_batch: int
    members: int = 2  # 1: winners only
    empty_captions: float = 0.0
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    max_unreadable: int = 100  # pairs that other ones may stand in for
    references: KnownErrors | None = None

    def __getitem__(self, place: tuple[int, int]) -> dict:
        """One sample: what collate stacks into the fields of Batch, for the members of one pair."""
        images, captions, unreadable = self._load(place)
        noise = self._normal("noise", place, self.latent_shape)
        if self.noise_offset:
            noise = noise + self.noise_offset * self._normal("offset", place, (self.latent_shape[0], 1, 1))
        input_noise = None
        if self.input_perturbation:
            input_noise = noise + self.input_perturbation * self._normal("perturbation", place, self.latent_shape)
        caption = self._caption(captions, place)
        return {
            **self._encoded(images, caption, place),
            "reference_error": self.references.read(*place) if self.references else None,
            "caption": caption,
            "noise": noise,
            "input_noise": input_noise,
            "posterior_noise": self._normal("posterior", place, (self.members, *self.latent_shape)),
            "uniform": self._draw("timestep", place).random(),
            "unreadable": unreadable,
        }

    def _encoded(self, images: list[Image.Image] | list[Tensor], caption: str, place: tuple[int, int]) -> dict:
        """Pixels to encode, or moments and texts that are encoded already."""
        if isinstance(images[0], Image.Image):
            return {"pixels": self.transform(images, self._draw("crop", place), self._draw("flip", place))}
        flips = self.transform.draw_flips(len(images), self._draw("flip", place))
        moments = torch.stack([moments[int(flip)] for moments, flip in zip(images, flips, strict=True)])
        return {"moments": moments, "texts": self.pairs.encode(caption)}

    def row(self, place: tuple[int, int]) -> int:
        """Row of the pair at a place in the table that the pairs come from."""
        return int(self.pairs.rows[self._index(place)])

    def _draw(self, name: str, place: tuple[int, ...]) -> np.random.Generator:
        return draw(self.seed, f"{self.stream}-{name}", *place)

    def _normal(self, name: str, place: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
        return normal(self.seed, f"{self.stream}-{name}", place, shape)

    def _load(self, place: tuple[int, int]) -> tuple[list[Image.Image] | list[Tensor], list[str], list[str]]:
        """Images or moments and captions of the pair at a place or of one drawn instead, and what could not be read."""
        index = self._index(place)
        unreadable: list[str] = []
        while True:
            try:
                return *self.pairs.load(index, self.members), unreadable
            except (InputError, MemoryError):  # a damaged latent cache; the machine's fault
                raise
            except Exception as error:  # every decoder has errors of its own
                unreadable.append(f"{self.pairs.source} row {self.pairs.rows[index]}: {error}")
                if len(unreadable) > self.max_unreadable:
                    raise InputError(
                        f"no readable pair in {len(unreadable)} draw(s), more than --max_unreadable_images "
                        f"{self.max_unreadable}; the last: {unreadable[-1]}; check the data"
                    ) from error
                index = int(self._draw("replacement", (*place, len(unreadable))).integers(len(self.pairs)))

    def _index(self, place: tuple[int, int]) -> int:
        step, position = place
        epoch, offset = divmod(step * self.global_batch + position, len(self.pairs))
        return int(epoch_order(self.seed, epoch, len(self.pairs))[offset]) if self.stream == "train" else offset

    def _caption(self, options: list[str], place: tuple[int, int]) -> str:
        rng = self._draw("caption", place)
        if rng.random() < self.empty_captions:
            return ""
        return options[rng.integers(len(options)) if self.stream == "train" else 0]


def micro_batch_places(plan: Plan, rank: int, step: int, micro: int) -> list[tuple[int, int]]:
    """Places (step, position in the global batch) of one of a rank's micro-batches."""
    size = plan.global_batch // (plan.processes * plan.accumulation)
    start = (micro * plan.processes + rank) * size
    return [(step, start + i) for i in range(size)]


def deal_out(plan: Plan, rank: int, first_step: int) -> Iterator[list[tuple[int, int]]]:
    """Places of a rank's micro-batches: a global batch is dealt out micro-step by micro-step, rank by rank."""
    for step in range(first_step, plan.steps):
        for micro in range(plan.accumulation):
            yield micro_batch_places(plan, rank, step, micro)


def outlive_signals(worker: int) -> None:
    """Ignore stop signals in a loader worker: launchers signal every process, and a last update needs its pairs."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_workers() -> None:
    """Kill the loader workers that are left when the process ends.

    After an error there are some, and the interpreter would wait for ever for them to heed a SIGTERM.
    """
    for worker in multiprocessing.active_children():
        worker.kill()


def check_shared_memory(workers: int, batch_bytes: int) -> None:
    """Raises InputError where loader workers have too little memory to share: they would wait for ever."""
    if not workers or not SHARED_MEMORY.is_dir():
        return
    workers *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of all ranks on this machine
    there = shutil.disk_usage(SHARED_MEMORY).total
    needed = workers * PREFETCHED * batch_bytes
    if 0 < there < needed:  # 0 is without a limit
        raise InputError(
            f"{SHARED_MEMORY} has {there / 2**20:.0f} MiB, of which {workers} loader workers need "
            f"{needed / 2**20:.0f}: give the container more (docker run --shm-size=...), or lower "
            "--dataloader_num_workers"
        )


def start_loading(loader: DataLoader) -> Iterator:
    """The loader's batches, with its workers under way; where one is killed, the next batch raises InputError."""
    batches = iter(loader)
    if loader.num_workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises wherever it is, also within an update
        atexit.register(kill_workers)  # functions registered later are called earlier, so before those that wait
        return explain_failures(batches)
    return batches


def explain_failures(batches: Iterator) -> Iterator:
    """Batches that workers load; raises InputError where one of them is gone."""
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        if str(error).startswith("Caught "):  # in a worker, which torch reports as if it had happened here
            raise
        if "ancdata" in str(error) or getattr(error, "errno", None) == errno.EMFILE:
            raise InputError(
                "loader workers need more open files than allowed: raise the limit with `ulimit -n 65536`, or try "
                "fewer --dataloader_num_workers"
            ) from error
        raise InputError(
            f"a loader worker was killed ({brief(error)}), most likely for lack of memory: try fewer "
            "--dataloader_num_workers"
        ) from error


def train_batches(config: TrainConfig, dataset: PairDataset, plan: Plan, rank: int, first_step: int) -> Iterator[Batch]:
    """Micro-batches of this rank from `first_step` to the end of the run.

    Where they are drawn, InputError is raised for unreadable pairs beyond the limit and for killed workers.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=deal_out(plan, rank, first_step),
        collate_fn=collate,
        num_workers=config.dataloader_num_workers,
        worker_init_fn=outlive_signals,
        pin_memory=torch.cuda.is_available(),
    )
    return start_loading(loader)
