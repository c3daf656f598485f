"""The latent cache: outputs of VAE and text encoders for the training data, on disk; `python -m sdpo.cache ...`.

The command takes the flags of train.py and fills `--latent_cache`; train.py itself does so on first use. Either makes
what is missing only, so a command that was cut off continues when it is run again. docs/design.md says what is kept.
"""

from __future__ import annotations

import itertools
import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from sdpo.command import InputError, flag, parse_flags, run_command, within_memory
from sdpo.config import TrainConfig
from sdpo.console import start_console
from sdpo.data import Transform, check_shared_memory, start_loading
from sdpo.families import Conditioning, Family, load_family
from sdpo.hub import DTYPES
from sdpo.images import decode_column
from sdpo.inputs import normalise
from sdpo.pairs import Pairs, prepare_pairs
from sdpo.ranks import check_precision, join_ranks, main_first, on_main, together
from sdpo.shards import SHARD_BYTES, Shards, read_key, refuse_changes, refuse_damaged

log = logging.getLogger(__name__)


# What a cache is made from


def make_keys(config: TrainConfig, family: Family, tables: dict[str, Pairs]) -> dict[str, dict]:
    """Keys of the captions and of the images of each table: all that the stored numbers depend on."""
    prints = family.fingerprints()
    dtype = DTYPES[config.mixed_precision]
    keys = {
        "captions": {
            "text encoders": prints["text encoders"],
            "computed in": str(dtype).removeprefix("torch."),
            "stored in": config.latent_cache_dtype,
        }
    }
    for name, pairs in tables.items():
        flips = name == "images" and not config.no_hflip
        keys[name] = {
            "VAE": prints["VAE"],
            "computed in": str(family.vae_dtype(dtype)).removeprefix("torch."),
            "stored in": config.latent_cache_dtype,
            "resolution": config.resolution or family.resolution,
            "crop": "centre",
            "JPEGs decoded": "reduced" if pairs.min_side else "whole",
            "flips": flips or read_key(Path(config.latent_cache, name)).get("flips", False),  # unused flips do no harm
            **pairs.describe(),
        }
    return keys


# Reading


class CachedPairs:
    """Pairs that are read from a cache; stands in for Pairs in a PairDataset."""

    def __init__(self, pairs: Pairs, images: Shards, captions: Shards):
        """Raises InputError where the cache lacks a pair."""
        self.images, self.texts, self.source, self.rows = images, captions, pairs.source, pairs.rows
        self.unreadable = images.notes
        if lacking := sum(row not in images.places for row in pairs.rows.tolist()):
            raise InputError(
                f"{images.folder} lacks {lacking:,} pairs that were just made: "
                "on several machines --latent_cache must lie on a disk that they share"
            )
        self.places = np.array([images.places[row] for row in pairs.rows.tolist()])  # (n, 2): file, row in it
        of_columns = np.arange(len(pairs.columns))
        self.order = np.where(pairs.first_won[:, None], of_columns, of_columns[::-1])  # (n, columns), winner first
        self.text_places = captions.places
        same = {text: text for text in self.text_places}  # a text that many pairs have is in memory once
        self._captions = [[same[text] for text in options] for options in pairs.captions()]

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self) -> list[list[str]]:
        """The captions that each pair may be shown with."""
        return self._captions

    def load(self, index: int, members: int) -> tuple[list[Tensor], list[str]]:
        """Moments (orientations, 2, C, h, w) of the first `members` of (winner, loser), and the captions.

        Raises OSError for an image that could not be read when the cache was made.
        """
        order = self.order[index, :members].tolist()
        for image in order:
            reason = self.unreadable.get(f"{self.rows[index]} {image}")
            if reason is not None:
                raise OSError(reason)
        moments = self.images.read(self.places[index])["moments"]  # (columns, orientations, 2, C, h, w)
        return [moments[image] for image in order], self._captions[index]

    def encode(self, caption: str) -> Conditioning:
        """Outputs of the text encoders for a caption, without a batch dimension."""
        return self.texts.read(self.text_places[caption])


# Making


class ImageRows(Dataset):
    """Images of rows of a table as the transform makes them."""

    def __init__(self, pairs: Pairs, resolution: int):
        self.pairs, self.transform = pairs, Transform(resolution)

    def __getitem__(self, row: int) -> tuple[Tensor, dict[str, str]]:
        """Pixels (columns, 3, H, W) uint8, black where unreadable, and what is unreadable: {"row column": why}."""
        values = self.pairs.table[row]
        unreadable = {}
        images = []
        for number, name in enumerate(self.pairs.columns):
            try:
                images.append(decode_column(values, name, self.pairs.min_side))
            except InputError:  # the machine's fault, not the image's
                raise
            except ValueError as error:
                unreadable[f"{row} {number}"] = str(error)
                images.append(Image.new("RGB", (1, 1)))
        return torch.stack([self.transform.crop_and_flip(image, mirrored=False) for image in images]), unreadable


def collate_rows(rows: list[tuple[Tensor, dict]]) -> tuple[Tensor, dict[str, str]]:
    """Pixels (B, columns, 3, H, W) and what is unreadable in any of the rows."""
    pixels, unreadable = zip(*rows, strict=True)
    return torch.stack(pixels), dict(itertools.chain(*(texts.items() for texts in unreadable)))


@dataclass
class Work:
    """Rows that one folder of the cache lacks."""

    shards: Shards
    names: list[int | str]
    pairs: Pairs | None  # None: captions

    def row_bytes(self, family: Family) -> int:
        """Size of one row."""
        key = self.shards.key
        if self.pairs:
            values = math.prod((len(self.pairs.columns), 1 + key["flips"], 2, *family.latent_shape(key["resolution"])))
        else:
            values = sum(tensor.numel() for tensor in family.encode_texts([""]).values())
        return values * DTYPES[key["stored in"]].itemsize

    def share(self, row_bytes: int, accelerator: Accelerator) -> list[list[int | str]]:
        """Names in each file that this rank writes; ranks take files by turns, in the last round some get none."""
        files = cut(self.names, max(1, SHARD_BYTES // row_bytes))
        rank, ranks = accelerator.process_index, accelerator.num_processes
        return [turn[rank] if rank < len(turn) else [] for turn in cut(files, ranks)]


def cut(items: list, size: int) -> list[list]:
    """The list in pieces of `size`, the last one shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def encode_images(family: Family, work: Work, batches: list[list[int]], workers: int) -> Iterator:
    """({"moments": (n, columns, orientations, 2, C, h, w)}, what is unreadable) for each batch of rows.

    Raises InputError for too little shared memory and for killed workers.
    """
    side = work.shards.key["resolution"]
    images = ImageRows(work.pairs, side)
    check_shared_memory(workers, max(map(len, batches), default=0) * len(work.pairs.columns) * 3 * side**2)
    loader = DataLoader(images, batch_sampler=batches, collate_fn=collate_rows, num_workers=workers)
    for pixels, unreadable in start_loading(loader):
        yield {"moments": encode_pixels(family, pixels, work.shards.key["flips"])}, unreadable


def encode_pixels(family: Family, pixels: Tensor, flips: bool) -> Tensor:
    """Moments (B, columns, orientations, 2, C, h, w) of pixels (B, columns, 3, H, W), upright, then mirrored."""
    images = pixels.flatten(0, 1).to(family.device)
    oriented = [images, images.flip(-1)] if flips else [images]
    moments = torch.stack([family.encode_moments(normalise(images)) for images in oriented], 1)
    return moments.unflatten(0, pixels.shape[:2])


def make(config: TrainConfig, accelerator: Accelerator, family: Family, work: Work) -> None:
    """Encode and write what is missing; ranks wait for each other after each round of files.

    Raises InputError on every rank where one has more unreadable images than --max_unreadable_images.
    """
    if accelerator.is_main_process:
        work.shards.create()
    accelerator.wait_for_everyone()
    share = work.share(work.row_bytes(family), accelerator)
    batch = config.train_batch_size if work.pairs else 64
    batches = [piece for names in share for piece in cut(names, batch)]
    if work.pairs:
        encoded = encode_images(family, work, batches, config.dataloader_num_workers)
    else:
        encoded = ((family.encode_texts(texts), {}) for texts in batches)
    dtype = DTYPES[work.shards.key["stored in"]]
    unreadable = dict(work.shards.notes)  # those of an earlier command count, too
    progress = tqdm(
        desc=f"caching {work.shards.folder.name}",
        unit="pair" if work.pairs else "text",
        total=sum(map(len, share)),  # of this rank
        disable=not accelerator.is_local_main_process,
    )

    def make_file(names: list[int | str]) -> None:
        parts = []
        notes = {}
        for piece in cut(names, batch):
            tensors, texts = next(encoded)
            parts.append({name: tensor.to(dtype).cpu() for name, tensor in tensors.items()})
            notes |= texts
            progress.update(len(piece))
        unreadable.update(notes)
        refuse_unreadable(unreadable, config.max_unreadable_images, work.pairs)
        if names:
            work.shards.write(names, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, notes)

    with progress:
        for names in share:
            together(partial(make_file, names))


def refuse_unreadable(unreadable: dict[str, str], limit: int, pairs: Pairs | None) -> None:
    """Raises InputError where more images are unreadable than a run may replace."""
    if len(unreadable) > limit:
        place, why = list(unreadable.items())[-1]
        raise InputError(
            f"{len(unreadable)} unreadable images, more than --max_unreadable_images {limit}; "
            f"the last: {pairs.source} row {place.split()[0]}: {why}; check the data"
        )


def fill(config: TrainConfig, accelerator: Accelerator, works: list[Work]) -> None:
    """Make the missing rows, after saying how large they are.

    Raises InputError where the disk is too small, or the base's parts do not work together.
    """
    family = load_family(**config.base).to(accelerator.device, DTYPES[config.mixed_precision])
    family.try_out(family.load_unet(config.unet_init).to(accelerator.device))
    sizes = [len(work.names) * work.row_bytes(family) / 2**30 for work in works]  # GiB
    for work, size in zip(works, sizes, strict=True):
        unit = "pairs" if work.pairs else "texts"
        log.info(f"to cache       {len(work.names):,} {unit}, {size:.3g} GiB, in {work.shards.folder}")
    folder = Path(config.latent_cache).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free / 2**30
    if sum(sizes) > free:
        raise InputError(
            f"--latent_cache {folder} needs {sum(sizes):.3g} GiB more, but its disk has {free:.3g} GiB free: "
            "name another folder, or train without it"
        )
    for work in works:
        make(config, accelerator, family, work)


def open_cache(
    config: TrainConfig, accelerator: Accelerator, pairs: Pairs, held_out: Pairs | None
) -> tuple[CachedPairs, CachedPairs | None]:
    """(training pairs, held-out pairs) read from --latent_cache, after making what it lacks; every rank calls this.

    VAE and text encoders are loaded only where something is missing, and dropped again. Raises InputError for a cache
    that was made from something else.
    """
    used = [("images", pairs)]
    if held_out is not None:
        used.append(("images" if held_out.table is pairs.table else "held-out", held_out))
    tables = dict(reversed(used))  # pairs of one table share a folder
    stores = open_stores(config, accelerator, tables)
    wanted = {"captions": {""}}
    for name, part in used:
        wanted["captions"].update(itertools.chain(*part.captions()))
        wanted.setdefault(name, set()).update(part.rows.tolist())
    works = []
    for name, names in wanted.items():
        stores[name].scan()
        if missing := sorted(names - stores[name].places.keys()):
            works.append(Work(stores[name], missing, tables.get(name)))
    works.sort(key=lambda work: work.pairs is None)  # images first, of which some may be unreadable
    if works:
        fill(config, accelerator, works)
        torch.cuda.empty_cache()
        for work in works:
            work.shards.scan()
    for name in tables:
        if notes := stores[name].notes:
            log.warning(
                f"CAUTION: {len(notes)} images could not be read when {stores[name].folder} was made; "
                "their pairs are replaced by others"
            )
    cached = [CachedPairs(part, stores[name], stores["captions"]) for name, part in used]
    return cached[0], None if held_out is None else cached[1]


def open_stores(config: TrainConfig, accelerator: Accelerator, tables: dict[str, Pairs]) -> dict[str, Shards]:
    """The folders of the cache by name, none of them made from something else; every rank calls this."""
    keys = on_main(accelerator, lambda: make_keys(config, load_family(**config.base, encoders=False), tables))
    stores = {name: Shards(Path(config.latent_cache, name), key) for name, key in keys.items()}
    refuse_changes(list(stores.values()))
    return stores


# The command


@dataclass(frozen=True)
class CacheConfig(TrainConfig):
    """Flags of `python -m sdpo.cache`: those of train.py, of which data and model matter."""

    verify: bool = flag(False, "read the whole cache and compare its checksums")

    def _conflicts(self) -> Iterator[tuple[object, str]]:
        yield not self.latent_cache, "--latent_cache is missing: name the folder to fill"
        yield from super()._conflicts()


def verify(folder: Path, accelerator: Accelerator) -> None:
    """Read every file of a cache, dealt out to the ranks; raises InputError naming those that are damaged."""
    paths = sorted(folder.glob("*/*.safetensors"))
    share = paths[accelerator.process_index :: accelerator.num_processes]
    progress = tqdm(share, desc="verifying", unit="file", disable=not accelerator.is_local_main_process)
    together(lambda: refuse_damaged(progress))
    log.info(f"verified       {len(paths):,} files")


def check_base(config: CacheConfig) -> None:
    """Raises InputError for a base that cannot be loaded, before data are fetched and labelled."""
    load_family(**config.base, encoders=False).load_unet(config.unet_init)


def main(arguments: list[str] | None = None) -> None:
    """Fill a cache as the command line says."""
    config = parse_flags(CacheConfig, "python -m sdpo.cache", __doc__, arguments)
    check_precision(config.mixed_precision)
    accelerator = join_ranks()
    start_console(accelerator.is_main_process)
    if not config.verify:  # which is mostly of caches that are complete
        on_main(accelerator, lambda: check_base(config))
    pairs, held_out, notes = main_first(accelerator, lambda: prepare_pairs(config, config.seed or 0))
    for line in notes:
        log.info(line)
    with within_memory("try a smaller --train_batch_size or --resolution; what was written is kept"):
        open_cache(config, accelerator, pairs, held_out)
    if config.verify:
        verify(Path(config.latent_cache), accelerator)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
