"""Preference pairs: which rows of a table are used and which image of each won, checked, drawn, set aside."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sdpo.command import InputError
from sdpo.config import TrainConfig
from sdpo.files import brief
from sdpo.images import decode_column, image_source
from sdpo.rng import draw
from sdpo.tables import (
    BINARY,
    IMAGE_FIELDS,
    as_list,
    blocks,
    check_captions,
    column,
    data_source,
    find_pair_file,
    hash_captions,
    hash_images,
    measure_images,
    read_sample,
    read_table,
)

IMAGES = ("jpg_0", "jpg_1")
IMAGE_TYPES = (*BINARY, pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
MOST_ASIDE = 0.1  # share of the pairs that held-out captions may take from training, unless more are to be held out
LABELS_ABOUT = b"sdpo"  # key of the JSON object in a label file that says what it was made from


@dataclass(frozen=True)
class Pairs:
    """Rows of a table that are used, and which image of each won."""

    table: datasets.Dataset
    rows: np.ndarray  # (n,) int, row numbers in the table
    first_won: np.ndarray  # (n,) bool
    columns: tuple[str, ...]  # image columns: (jpg_0, jpg_1), or one column of single images for sft
    caption_column: str
    source: str
    min_side: int = 0  # side that JPEGs may be reduced to while they are decoded, pixels; 0: decode them whole

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self) -> list[list[str]]:
        """The captions that each pair may be shown with."""
        return [as_list(caption) for caption in column(self.table, self.caption_column, self.rows)]

    def load(self, index: int, members: int) -> tuple[list[Image.Image], list[str]]:
        """The first `members` of (winner, loser) as RGB images, and the captions; raises if an image is broken."""
        row = self.table[int(self.rows[index])]
        columns = self.columns if self.first_won[index] else self.columns[::-1]
        images = [decode_column(row, name, self.min_side) for name in columns[:members]]
        return images, as_list(row[self.caption_column])

    def fingerprint(self) -> str:
        """SHA-256 over captions, rows, winners and a sample of the images."""
        chosen = self.rows.astype("int64").tobytes() + self.first_won.tobytes()
        known = hash_captions(self.captions()) + hash_images(self.table, self.columns, self.rows)
        return hashlib.sha256(known.encode() + chosen).hexdigest()

    def describe(self) -> dict:
        """Rows of the table, and SHA-256 of its captions, of the sizes of its images and of a sample of these.

        Notices rows that were added, removed, moved or edited; not a few images replaced by others of the same size.
        """
        sizes = hashlib.sha256()
        for block in blocks(self.table, self.columns):
            for name in self.columns:
                sizes.update(measure_images(block[name]).tobytes())
        return {
            "rows of the data": len(self.table),
            "captions of the data": hash_captions(column(self.table, self.caption_column)),
            "image columns": list(self.columns),
            "image sizes of the data": sizes.hexdigest(),
            "sample of its images": hash_images(self.table, self.columns, np.arange(len(self.table))),
        }

    def select(self, keep: np.ndarray) -> Pairs:
        """The pairs at these indices or in this mask."""
        return dataclasses.replace(self, rows=self.rows[keep], first_won=self.first_won[keep])


def load_pairs(config: TrainConfig, split: str, folder: str | None = None) -> tuple[Pairs, list[str]]:
    """The usable pairs of a split and what was dropped; raises InputError naming columns or rows that do not fit."""
    table = read_table(config, split, folder)
    source = f"{data_source(config, folder)} ({split})"
    columns = choose_columns(config, table, source)
    labels_path = config.labels_path if split == config.split and not folder else None
    notes = [f"{source}: {len(table):,} rows" + (f", labels of {labels_path}" if labels_path else "")]
    labels = load_labels(config, table, columns, labels_path, source)
    keep = labels != 0.5
    if columns == IMAGES:
        notes.append(f"dropped {len(keep) - keep.sum():,} ties")
    if config.dreamlike_pairs_only:
        dreamlike = np.logical_and(*(name_dreamlike(table, name, source) for name in ("model_0", "model_1")))
        notes.append(f"dropped {(keep & ~dreamlike).sum():,} pairs that are not dreamlike")
        keep &= dreamlike
    if not keep.any():
        filters = "; ".join(notes)
        raise InputError(
            f"{source}: no pair is left after the filters ({filters}): correct the labels or drop a filter"
        )
    min_side = config.resolution if config.draft_decoding else 0
    rows, first_won = np.flatnonzero(keep), labels[keep] == 1
    return Pairs(table, rows, first_won, columns, config.caption_column, source, min_side), notes


def choose_columns(config: TrainConfig, table: datasets.Dataset, source: str) -> tuple[str, ...]:
    """Image columns to train on: jpg_0 and jpg_1 or, for sft, that of single images where the data have no pairs.

    Raises InputError for settings that do not go with single images.
    """
    names = table.column_names
    if config.method != "sft" or IMAGES[0] in names or config.image_column not in names:
        return IMAGES
    if config.holds_out:
        raise InputError(
            f"{source} has single images; held-out errors need pairs: "
            "drop --validation_pairs, --validation_split and --validation_data_dir"
        )
    if config.labels_path:
        raise InputError(f"{source} has single images, which need no labels: drop --choice_model and --labels_file")
    return (config.image_column,)


def load_labels(
    config: TrainConfig, table: datasets.Dataset, columns: tuple[str, ...], path: Path | None, source: str
) -> np.ndarray:
    """(rows,) 1 where the first image won, 0 where the second did, 0.5 for a tie; from a label file if there is one.

    All columns that training needs are checked before. Raises InputError naming columns or rows that do not fit.
    """
    more = ["label_0"] if columns == IMAGES and not path else []
    more += ["model_0", "model_1"] if config.dreamlike_pairs_only else []
    check_columns(table, config.caption_column, columns, source, more)
    if columns != IMAGES:
        return np.ones(len(table))
    if path:
        images = hash_images(table, IMAGES, np.arange(len(table)))
        return read_label_file(path, column(table, config.caption_column), source, images)
    return read_labels(column(table, "label_0"), source)


def check_columns(
    table: datasets.Dataset,
    caption_column: str,
    image_columns: tuple[str, ...],
    source: str,
    more: Iterable[str] = (),
) -> None:
    """Raises InputError if a column, one of `more` included, is missing or holds what cannot be captions or images."""
    missing = [name for name in (caption_column, *image_columns, *more) if name not in table.column_names]
    if missing and missing[0].startswith("model_"):
        raise InputError(f"{source}: column {missing[0]} missing: drop --dreamlike_pairs_only")
    if missing:
        raise InputError(
            f"{source}: column {', '.join(missing)} missing (it has {', '.join(table.column_names)}); "
            "rename columns to Pick-a-Pic's caption, jpg_0, jpg_1, label_0 or to caption, winner, loser, or give "
            "--caption_column, or list the pairs in a .jsonl or .csv file"
        )
    check_captions(column(table, caption_column, source=source), caption_column, source)
    for name in image_columns:
        check_images(table, name, source)


def check_rows_have_images(
    table: datasets.Dataset, columns: Iterable[str], rows: np.ndarray, source: str, limit: int
) -> None:
    """Raises InputError if more than `limit` of these rows have no image or an empty one in one of the columns."""
    for name in columns:
        sizes = np.concatenate([measure_images(block[name]) for block in blocks(table, [name])])
        lacking = rows[sizes[rows] <= 0]
        if len(lacking) > limit:
            path = image_source(table[int(lacking[0])][name])
            what = f"{path:.200} is {'empty' if os.path.isfile(path) else 'not a file'}" if path else "is empty"
            raise InputError(
                f"{source} row {lacking[0]}: {name} {what}; {len(lacking)} such row(s) in all, more than "
                f"--max_unreadable_images {limit}: fill them in or remove them"
            )


def caution_of_content(pairs: Pairs) -> Iterator[str]:
    """Sentences on captions that are empty, and on pairs of a sample whose two images are one."""
    options = pairs.captions()
    if blank := sum(not "".join(captions).strip() for captions in options):
        yield f"CAUTION: {blank:,} of {len(pairs):,} captions in {pairs.source} are empty"
    if pairs.columns != IMAGES:
        return
    sample = read_sample(pairs.table, IMAGES, pairs.rows)
    same = [first == second != b"" for first, second in sample]  # empty where it cannot be read
    if any(same):
        yield (
            f"CAUTION: in {sum(same)} of {len(same)} pairs looked at in {pairs.source}, {' and '.join(IMAGES)} are one "
            "image, from which nothing is learned"
        )


def name_dreamlike(table: datasets.Dataset, name: str, source: str) -> np.ndarray:
    """Mask of the rows whose column names a dreamlike model; raises InputError naming the first row without a name."""
    models = column(table, name, source=source)
    for row, model in enumerate(models):
        if not isinstance(model, str):
            raise InputError(f"{source} row {row}: {name} is {model!r}; fill it in or drop --dreamlike_pairs_only")
    return np.array(["dream" in model for model in models], bool)


def check_images(table: datasets.Dataset, name: str, source: str) -> None:
    """Raises InputError unless a column can hold images: encoded, as paths, or as records of both."""
    kind = table.features.arrow_schema.field(name).type
    kinds = [kind]
    if pa.types.is_struct(kind):
        kinds = [field.type for field in kind if field.name in IMAGE_FIELDS]
    if not kinds or not all(any(is_kind(one) for is_kind in IMAGE_TYPES) for one in kinds):
        raise InputError(
            f"{source}: column {name} holds {kind}, but must hold encoded images (bytes), their paths, or the image "
            "records of datasets: write the data again"
        )


def read_labels(labels: list, source: str) -> np.ndarray:
    """Labels as (n,) floats; raises InputError naming the first row whose label is not 0, 0.5 or 1."""
    values = np.array([as_number(label) for label in labels])
    wrong = np.flatnonzero(~np.isin(values, (0, 0.5, 1)))
    if len(wrong):
        raise InputError(
            f"{source} row {wrong[0]}: label_0 is {labels[wrong[0]]!s:.100}, but must be 1 (jpg_0 won), 0 (jpg_1 won) "
            f"or 0.5 (tie); {len(wrong)} such row(s) in all: correct or remove them"
        )
    return values


def read_label_file(path: Path, captions: list, source: str, images: str | None = None) -> np.ndarray:
    """Labels (rows,) that `python -m sdpo.relabel` wrote for rows with these captions, as far as the file says it.

    `images` is hash_images of all rows; where it is given, it has to be what the file says too. Raises InputError for a
    file of other data or none at all.
    """
    try:
        table = pq.read_table(path)
        labels = table["label_0"].to_pylist()
        numbers = table["row"].to_pylist() if "row" in table.column_names else list(range(len(labels)))
        about = json.loads((table.schema.metadata or {}).get(LABELS_ABOUT, b"{}"))
        rows = len(captions)
        made_for = about.get("captions")
        intact = "sha256" not in about or about["sha256"] == hash_labels(table)
    except Exception as error:  # pyarrow has many
        raise InputError(
            f"cannot read labels from {path} ({brief(error)}); make it with python -m sdpo.relabel"
        ) from error
    again = "make it again from this data with python -m sdpo.relabel"
    if len(labels) != rows:
        raise InputError(f"{path} has labels of {len(labels):,} rows, but {source} has {rows:,} rows: {again}")
    if numbers != list(range(rows)):
        raise InputError(f"{path} does not have its rows in the order of the data: sort them by row")
    if made_for not in (None, hash_captions(captions)):
        raise InputError(f"{path} was made for other captions, or another order of them, than {source} has: {again}")
    if images and about.get("images") not in (None, images):
        raise InputError(f"{path} was made for other images than {source} has: {again}")
    if not intact:
        raise InputError(
            f"{path} does not hold what python -m sdpo.relabel wrote (sha256): make it again, or, if that is meant, "
            "write it without its metadata"
        )
    return read_labels(labels, str(path))


def hash_labels(table: pa.Table) -> str:
    """SHA-256 over the columns of a label file."""
    columns = {name: table[name].to_pylist() for name in sorted(table.column_names)}
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest()


def as_number(label: object) -> float:
    """A label as a float, nan if it is none."""
    try:
        return float(label)
    except (TypeError, ValueError):
        return float("nan")


def as_prompts(captions: list[list[str]]) -> list[tuple[str, ...]]:
    """The captions of each pair as far as CLIP tells them apart, which ignores case and how wide spaces are."""
    return [tuple(dict.fromkeys(" ".join(caption.lower().split()) for caption in options)) for options in captions]


def split_by_prompt(pairs: Pairs, held_out: int, seed: int) -> tuple[Pairs, Pairs]:
    """(training pairs, `held_out` pairs), no prompt on both sides; raises InputError if none are left to train on.

    Pairs of one prompt are not independent, so each held-out pair has a prompt of its own, unless training would lose
    more than MOST_ASIDE of the pairs with these: then prompts of few pairs go first, and some give several.
    """
    options, rng = as_prompts(pairs.captions()), draw(seed, "held-out")
    aside, whole = choose_prompts(options, held_out, rng)
    rest = [index for index, prompts in enumerate(options) if aside.isdisjoint(prompts)]
    if len(whole) < held_out or not rest:
        prompts = len(set(itertools.chain(*options)))
        raise InputError(
            f"--validation_pairs {held_out} leaves nothing to train on: {pairs.source} has {len(pairs)} pairs "
            f"over {prompts} captions, and a caption is never on both sides; use fewer or --validation_data_dir"
        )
    turns: dict[int, int] = {}  # pair: how many of the same prompts come before it
    count: Counter = Counter()
    for index in rng.permutation(whole).tolist():
        turns[index] = count[options[index]]
        count[options[index]] += 1
    chosen = sorted(sorted(turns, key=turns.get)[:held_out])
    return pairs.select(np.array(rest)), pairs.select(np.array(chosen))


def choose_prompts(
    options: list[tuple[str, ...]], held_out: int, rng: np.random.Generator
) -> tuple[set[str], list[int]]:
    """(prompts to set aside, pairs that have no other), so that `held_out` of these may be measured on.

    `options` are the prompts of every pair. There are fewer pairs than wanted only where the data have no more.
    """
    by_prompt: dict[str, list[int]] = {}
    for index, prompts in enumerate(options):
        for prompt in prompts:
            by_prompt.setdefault(prompt, []).append(index)
    most_aside = max(held_out, MOST_ASIDE * len(options))
    names = list(by_prompt)
    order = [names[number] for number in rng.permutation(len(names))]
    order.sort(key=lambda name: len(by_prompt[name]) > most_aside / held_out)  # more than a fair share
    taken: set[str] = set()
    lost: set[int] = set()  # pairs with a prompt that is taken, which training cannot have
    whole: list[int] = []
    for name in order:
        if len(whole) >= held_out and (len(taken) >= held_out or len(lost) >= most_aside):
            break
        taken.add(name)
        lost.update(by_prompt[name])
        whole += [index for index in by_prompt[name] if taken.issuperset(options[index])]
    return taken, whole


def prepare_pairs(config: TrainConfig, seed: int) -> tuple[Pairs, Pairs | None, list[str]]:
    """(training pairs, held-out pairs or None, sentences for the console) as the config asks.

    Labels of a choice model are made first. Raises InputError for data that cannot be used or does not suffice.
    """
    notes = []
    if config.choice_model:
        from sdpo.relabel import RelabelConfig, relabel  # the scorers need open_clip, which training does not

        check_before_labelling(config)
        notes.append(relabel(RelabelConfig.of(config)))
    pairs, more = load_pairs(config, config.split)
    notes += more
    held_out = None
    if config.validation_split or config.validation_data_dir:
        held_out, more = load_held_out(config, pairs)
        notes += more
    elif config.validation_pairs:
        everything = len(pairs)
        pairs, held_out = split_by_prompt(pairs, config.validation_pairs, config.validation_seed)
        unused = everything - len(pairs) - len(held_out)
        notes.append(
            f"held out {describe_size(held_out)}"
            + (f" ({unused:,} more share their captions and are left out)" if unused else "")
        )
    pairs = draw_subset(pairs, config.max_train_samples, seed, "max-train-samples")
    for part in (pairs, held_out):
        if part is not None:
            check_rows_have_images(part.table, part.columns, part.rows, part.source, config.max_unreadable_images)
            notes += caution_of_content(part)
    return pairs, held_out, notes


def check_before_labelling(config: TrainConfig) -> None:
    """Raises InputError for data that could not be used once hours of scoring are spent."""
    if config.dreamlike_pairs_only:
        table, names = read_table(config, config.split), ("model_0", "model_1")
        source = f"{data_source(config)} ({config.split})"
        check_columns(table, config.caption_column, IMAGES, source, names)
        for name in names:
            name_dreamlike(table, name, source)
    if config.validation_data_dir or config.validation_split:
        refuse_trained_on(config)
        load_pairs(config, config.validation_split or "train", config.validation_data_dir)
    elif config.validation_pairs and config.validation_pairs >= (rows := len(read_table(config, config.split))):
        raise InputError(f"--validation_pairs {config.validation_pairs} leaves nothing of {rows:,} rows to train on")


def refuse_trained_on(config: TrainConfig) -> None:
    """Raises InputError where the pairs to hold out are those of the training split."""
    split = config.validation_split or "train"
    trained, other = (
        place and (find_pair_file(Path(place)) or Path(place)).resolve()
        for place in (data_source(config), config.validation_data_dir)
    )
    if other == trained and split == config.split:
        raise InputError(
            f"--validation_data_dir {config.validation_data_dir} holds the pairs trained on: name another folder "
            "or --validation_split, or use --validation_pairs"
        )


def load_held_out(config: TrainConfig, pairs: Pairs) -> tuple[Pairs, list[str]]:
    """(held-out pairs of another split or folder, sentences); raises InputError where that is what is trained on."""
    refuse_trained_on(config)
    held_out, notes = load_pairs(config, config.validation_split or "train", config.validation_data_dir)
    held_out = draw_subset(held_out, config.validation_pairs or None, config.validation_seed, "held-out")
    notes.append(f"held out {describe_size(held_out)}")
    trained_on = set(itertools.chain(*as_prompts(pairs.captions())))
    if shared := sum(not trained_on.isdisjoint(options) for options in as_prompts(held_out.captions())):
        notes.append(f"CAUTION: {shared:,} of them have captions of pairs that are trained on")
    if config.labels_path:
        notes.append(f"CAUTION: their winners are the data's own, those of training are from {config.labels_path}")
    return held_out, notes


def describe_size(pairs: Pairs) -> str:
    """How many pairs these are, and of how many captions, within which they are not independent."""
    captions = len({options[0] for options in as_prompts(pairs.captions())})
    counted = f"{captions:,} captions" if captions > 1 else "1 caption, so without standard errors"
    return f"{len(pairs):,} pairs of {counted}"


def draw_subset(pairs: Pairs, count: int | None, seed: int, stream: str) -> Pairs:
    """`count` of the pairs, drawn, in their order; all of them if there are no more or no count is given."""
    if count is None or count >= len(pairs):
        return pairs
    return pairs.select(np.sort(draw(seed, stream).permutation(len(pairs))[:count]))
