"""Preference pairs: read, checked, selected, set aside."""

from __future__ import annotations

import csv
import dataclasses
import glob
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import HfFileSystem, snapshot_download
from PIL import Image

from sdpo.command import InputError
from sdpo.config import TrainConfig
from sdpo.files import brief, is_text, parse_json, read_text, write_json
from sdpo.images import decode
from sdpo.rng import draw

IMAGES = ("jpg_0", "jpg_1")
IMAGE_TYPES = (
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_large_string),
    *(pa.types.is_struct, pa.types.is_null),
)
log = logging.getLogger("data")
LABELS_ABOUT = b"sdpo"  # key of the JSON object in a label file that says what it was made from


# Reading


def read_table(config: TrainConfig, split: str, folder: str | None = None) -> datasets.Dataset:
    """One split of the configured data, or of another local folder, images undecoded; other splits are not read.

    `config` is train.py's or that of relabel, whose flags of the data are the same. Raises InputError for data that is
    not there or cannot be read.
    """
    source = folder or config.dataset_name or config.train_data_dir
    path = Path(source)
    if not path.exists() and (folder or not config.dataset_name):
        raise InputError(f"data folder {source} does not exist")
    if path.suffix == ".parquet" and path.is_file():
        raise InputError(f"{source} is a file: give the folder that holds it")
    pair_file = find_pair_file(path)
    if pair_file:
        refuse_split(pair_file, split)
        return read_pair_file(pair_file, config.caption_column)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return undecoded(read_saved(path, split))
        return undecoded(read_split(source, None if folder else config.dataset_config_name, split, config.cache_dir))
    except InputError:
        raise
    except Exception as error:  # datasets, pyarrow and the hub each have errors of their own
        cause, fault = error.__cause__ or error, None
        if not getattr(cause, "errno", None):  # of the system, not of the files' content
            files = sorted(path.rglob("*.parquet"))
            fault = find_fault([file for file in files if split in str(file.relative_to(path))] or files)
        fix = fault or "give a local folder, or a hub data set where the hub can be reached"
        raise InputError(f"cannot read pairs from {source!r} ({brief(cause)}); {fix}") from error


def find_fault(files: list[Path]) -> str | None:
    """What to do about the first parquet file that is damaged or unlike the first one; None if none is."""
    for file in files:
        try:
            content, first = pq.ParquetFile(file), pq.ParquetFile(files[0]).schema_arrow
            differing = set(content.schema_arrow) ^ set(first)  # fields: name and type
            if differing:
                name = min(field.name for field in differing)
                return f"{file} has another column {name} than {files[0]}: write both alike, or move one away"
            if not content.metadata.num_rows:
                return f"{file} has no rows: replace or remove it"
            for _ in content.iter_batches(batch_size=64):  # a damaged page shows when it is read
                pass
        except PermissionError as error:
            return f"{file} cannot be read ({error.strerror}): correct its permissions"
        except Exception:  # pyarrow has many
            return f"{file} is damaged: replace or remove it"
    return None


def read_split(source: str, name: str | None, split: str, cache_dir: str | None) -> datasets.Dataset:
    """A split of a hub data set or of a folder of parquet, arrow or similar files; fetches only its own files.

    Where the hub cannot be reached, the files that an earlier call fetched are read.
    """
    call = hashlib.sha256(json.dumps([source, name, split]).encode()).hexdigest()[:16]
    fetched = Path(cache_dir or datasets.config.HF_DATASETS_CACHE, "sdpo", f"{call}.json")
    try:
        builder = datasets.load_dataset_builder(source, name, cache_dir=cache_dir)
    except Exception as error:  # the hub's, the network's, the files' own
        if not fetched.is_file():
            raise
        log.warning(f"CAUTION: {source} cannot be looked up ({brief(error)}): what was fetched earlier is read")
        kind, files = json.loads(fetched.read_text(encoding="utf-8"))
        return datasets.load_dataset(kind, data_files={split: files}, split=split, cache_dir=cache_dir)
    splits = builder.config.data_files
    if not splits:  # a data set with a loading scheme of its own
        return datasets.load_dataset(source, name, split=split, cache_dir=cache_dir)
    if split not in splits:
        raise no_such_split(source, split, splits)
    files = fetch_files(list(splits[split]))
    if files != list(splits[split]):
        write_json(fetched, [builder.name, files])
    return datasets.load_dataset(builder.name, data_files={split: files}, split=split, cache_dir=cache_dir)


def fetch_files(files: list[str]) -> list[str]:
    """Local paths of data files; those on the hub are downloaded, unless they are in its cache."""
    if not all(file.startswith("hf://") for file in files):
        return files
    places = [HfFileSystem().resolve_path(file) for file in files]
    first, names = places[0], [place.path_in_repo for place in places]
    where = {"repo_type": first.repo_type, "revision": first.revision}
    folder = snapshot_download(first.repo_id, allow_patterns=[glob.escape(name) for name in names], **where)
    return [str(Path(folder, name)) for name in names]


def no_such_split(source: str | Path, split: str, splits: Iterable[str]) -> InputError:
    """The error for a split that a data set does not have."""
    return InputError(f"{source} has no split {split!r}; it has {', '.join(map(str, splits))}: choose one of them")


def refuse_split(source: Path, split: str) -> None:
    """Raises InputError where a source without splits is asked for another one than the default."""
    if split != "train":
        raise InputError(
            f"{source} has no splits, so split {split!r} cannot be read: "
            "use --split train, and --validation_data_dir in place of --validation_split"
        )


def find_pair_file(path: Path) -> Path | None:
    """The JSONL or CSV file of caption, winner, loser that `path` is or holds, if any; InputError for several."""
    if path.is_file() and path.suffix in (".jsonl", ".csv"):
        return path
    found = sorted([*path.glob("*.jsonl"), *path.glob("*.csv")]) if path.is_dir() else []
    found = [file for file in found if not describes_images(file)]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise InputError(f"{path} holds several pair files ({names}): name one of them as --train_data_dir")
    return found[0] if found else None


def describes_images(file: Path) -> bool:
    """Whether this is the file of an image folder, single images with their captions, as `datasets` reads it."""
    if file.stem != "metadata":
        return False
    with open(file, "rb") as content:
        return b"file_name" in content.readline()


def read_pair_file(file: Path, caption_column: str) -> datasets.Dataset:
    """Rows of a JSONL or CSV file in Pick-a-Pic columns, image paths relative to it; InputError names a bad row."""
    columns = (caption_column, "winner", "loser")
    captions, winners, losers = [], [], []
    for number, record in read_records(file):
        where = f"{file} row {number}"
        missing = [name for name in columns if record.get(name) is None or (record[name] == "" and name != columns[0])]
        if missing:
            raise InputError(
                f"{where}: {', '.join(missing)} missing; every row needs {', '.join(columns)} "
                f"(move {file.name} away if it is no list of pairs)"
            )
        if None in record:  # where csv puts what has no column
            raise InputError(f"{where}: more values than columns; put captions that hold commas in double quotes")
        for name, paths in (("winner", winners), ("loser", losers)):
            if not isinstance(record[name], str):
                raise InputError(f"{where}: {name} is {record[name]!r:.200}, but must be the path of an image")
            paths.append(str(file.parent / record[name]))
            if not os.path.isfile(paths[-1]):  # Path.is_file raises for long names
                raise InputError(f"{where}: image {paths[-1]} does not exist; paths are relative to {file.name}")
        if winners[-1] == losers[-1]:
            raise InputError(f"{where}: winner and loser are the same image, {winners[-1]}; correct or remove the row")
        check_captions([record[caption_column]], caption_column, str(file), first=number)
        captions.append(record[caption_column])
    if not captions:
        raise InputError(f"{file} has no rows; write one per pair: {', '.join(columns)}")
    if any(isinstance(caption, list) for caption in captions):
        captions = [as_list(caption) for caption in captions]
    labels = [1.0] * len(captions)
    return datasets.Dataset.from_dict({caption_column: captions, "jpg_0": winners, "jpg_1": losers, "label_0": labels})


def read_records(file: Path) -> list[tuple[int, dict]]:
    """(row number, object) of a JSONL file, rows being lines, or of a CSV file; InputError names a row that is none."""
    text = read_text(file)
    if file.suffix == ".csv":
        try:
            return list(enumerate(csv.DictReader(io.StringIO(text, newline=""), strict=True), 1))
        except csv.Error as error:
            raise InputError(f"{file} is not valid CSV ({error}); write it anew, or as JSONL") from error
    fix = 'write {"caption": ..., "winner": ..., "loser": ...}'
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            records.append((number, parse_json(line, f"{file} row {number}", fix)))
            if not isinstance(records[-1][1], dict):
                raise InputError(f"{file} row {number} is not a JSON object; {fix}")
    return records


def read_saved(path: Path, split: str) -> datasets.Dataset:
    """A folder written by save_to_disk; of a DatasetDict only the split's own folder is opened."""
    index = path / "dataset_dict.json"
    if not index.is_file():
        table = datasets.load_from_disk(str(path))
        if str(table.split) != split:
            refuse_split(path, split)
        return table
    splits = parse_json(read_text(index), index, "save the data set again")["splits"]
    if split not in splits:
        raise no_such_split(path, split, splits)
    return datasets.load_from_disk(str(path / split))


def undecoded(table: datasets.Dataset) -> datasets.Dataset:
    """All columns as Python has them, images as bytes or paths, so that filters and workers decide what is decoded."""
    table = table.with_format(None)
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


# Selecting


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
        return [decode(row[name], self.min_side) for name in columns[:members]], as_list(row[self.caption_column])

    def fingerprint(self) -> str:
        """SHA-256 over captions, rows and winners; images are not looked at."""
        chosen = self.rows.astype("int64").tobytes() + self.first_won.tobytes()
        return hashlib.sha256(hash_captions(self.captions()).encode() + chosen).hexdigest()

    def describe(self) -> dict:
        """Rows of the table, and SHA-256 of its captions and of the sizes of its images.

        Notices rows that were added, removed, moved or edited; not an image replaced by another one of the same size.
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
        }

    def select(self, keep: np.ndarray) -> Pairs:
        """The pairs at these indices or in this mask."""
        return dataclasses.replace(self, rows=self.rows[keep], first_won=self.first_won[keep])


def blocks(table: datasets.Dataset, columns: Iterable[str]) -> Iterator[pa.Table]:
    """10,000 rows at a time of some columns as they are on file, images undecoded."""
    slim = table.select_columns(list(columns)).with_format("arrow")
    for start in range(0, len(table), 10_000):
        yield slim[start : start + 10_000]


def measure_images(values: pa.ChunkedArray) -> np.ndarray:
    """Sizes (n,) in bytes of encoded images or of image files; -1 where there is neither."""
    if pa.types.is_struct(values.type):
        sizes = measure_images(pc.struct_field(values, "bytes"))
        absent = sizes < 0
        return np.where(absent, measure_images(pc.struct_field(values, "path")), sizes) if absent.any() else sizes
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return np.array([os.path.getsize(path) if path and os.path.isfile(path) else -1 for path in values.to_pylist()])
    if pa.types.is_null(values.type):
        return np.full(len(values), -1)
    return pc.fill_null(pc.binary_length(values).cast(pa.int64()), -1).to_numpy()


def column(table: datasets.Dataset, name: str, rows: np.ndarray | None = None) -> list:
    """Values of one column without touching the others; raises InputError for text that is not UTF-8."""
    table = table.select_columns([name])
    try:
        return (table if rows is None else table.select(rows))[:][name]
    except UnicodeDecodeError as error:
        for row in range(len(table)):
            try:
                table[row]
            except UnicodeDecodeError:
                break
        raise InputError(f"row {row}: {name} is not UTF-8 text ({error.reason}): correct or remove the row") from error


def as_list(caption: str | list[str]) -> list[str]:
    """The captions of a row, which may hold one or a list of them."""
    return caption if isinstance(caption, list) else [caption]


def load_pairs(config: TrainConfig, split: str, folder: str | None = None) -> tuple[Pairs, list[str]]:
    """The usable pairs of a split and what was dropped; raises InputError naming columns or rows that do not fit."""
    table = read_table(config, split, folder)
    source = f"{folder or config.dataset_name or config.train_data_dir} ({split})"
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
        raise InputError(f"{source}: no pair is left after the filters ({'; '.join(notes)})")
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
    needed = [config.caption_column, *columns]
    if columns == IMAGES and not path:
        needed.append("label_0")
    if config.dreamlike_pairs_only:
        needed += ["model_0", "model_1"]
    check_columns(table, needed, config.caption_column, columns, source)
    if columns != IMAGES:
        return np.ones(len(table))
    if path:
        return read_label_file(path, column(table, config.caption_column), source)
    return read_labels(column(table, "label_0"), source)


def check_columns(
    table: datasets.Dataset, needed: list[str], caption_column: str, image_columns: tuple[str, ...], source: str
) -> None:
    """Raises InputError for a column that is missing, and for captions and images that cannot be any."""
    missing = [name for name in needed if name not in table.column_names]
    if missing and missing[0].startswith("model_"):
        raise InputError(f"{source}: column {missing[0]} missing: drop --dreamlike_pairs_only")
    if missing:
        raise InputError(
            f"{source}: column {', '.join(missing)} missing (it has {', '.join(table.column_names)}); "
            "rename columns to Pick-a-Pic's caption, jpg_0, jpg_1, label_0, or give --caption_column"
        )
    check_captions(column(table, caption_column), caption_column, source)
    for name in image_columns:
        check_images(table, name, source)


def check_rows_have_images(pairs: Pairs, limit: int) -> None:
    """Raises InputError if more than `limit` of the pairs' rows have no image in one of the columns."""
    for name in pairs.columns:
        absent = np.concatenate([lacks_image(block[name]) for block in blocks(pairs.table, pairs.columns)])
        rows = pairs.rows[absent[pairs.rows]]
        if len(rows) > limit:
            raise InputError(
                f"{pairs.source} row {rows[0]}: {name} is empty; {len(rows)} such row(s) in all, more than "
                f"--max_unreadable_images {limit}: fill them in or remove them"
            )


def lacks_image(values: pa.ChunkedArray) -> np.ndarray:
    """Mask (n,) of the rows that have neither an encoded image nor a path."""
    if not pa.types.is_struct(values.type):
        return values.is_null().to_numpy()
    parts = [pc.struct_field(values, field.name) for field in values.type if field.name in ("bytes", "path")]
    return np.logical_and.reduce([part.is_null().to_numpy() for part in parts])


def name_dreamlike(table: datasets.Dataset, name: str, source: str) -> np.ndarray:
    """Mask of the rows whose column names a dreamlike model; raises InputError naming the first row without a name."""
    models = column(table, name)
    for row, model in enumerate(models):
        if not isinstance(model, str):
            raise InputError(f"{source} row {row}: {name} is {model!r}; fill it in or drop --dreamlike_pairs_only")
    return np.array(["dream" in model for model in models], bool)


def check_captions(captions: list, name: str, source: str, first: int = 0) -> None:
    """Raises InputError naming the first row whose caption is neither a text nor a list of texts."""
    for row, caption in enumerate(captions, first):
        options = caption if isinstance(caption, list) and caption else [caption]
        if not all(map(is_text, options)):
            raise InputError(f"{source} row {row}: {name} is {caption!r:.200}, but must be a text or a list of texts")


def check_images(table: datasets.Dataset, name: str, source: str) -> None:
    """Raises InputError unless a column can hold images: encoded, as paths, or as records of both."""
    kind = table.features.arrow_schema.field(name).type
    if not any(is_kind(kind) for is_kind in IMAGE_TYPES):
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
            f"{source} row {wrong[0]}: label_0 is {labels[wrong[0]]}, but must be 1 (jpg_0 won), 0 (jpg_1 won) "
            f"or 0.5 (tie); {len(wrong)} such row(s) in all: correct or remove them"
        )
    return values


def read_label_file(path: Path, captions: list, source: str) -> np.ndarray:
    """Labels (rows,) that `python -m sdpo.relabel` wrote for rows with these captions, as far as the file says it.

    Raises InputError for a file of other data or none at all.
    """
    try:
        table = pq.read_table(path)
        labels = table["label_0"].to_pylist()
        numbers = table["row"].to_pylist() if "row" in table.column_names else list(range(len(labels)))
        about = json.loads((table.schema.metadata or {}).get(LABELS_ABOUT, b"{}"))
        rows, made_for = len(captions), about.get("captions")
    except Exception as error:  # pyarrow has many
        raise InputError(
            f"cannot read labels from {path} ({brief(error)}); make it with python -m sdpo.relabel"
        ) from error
    if len(labels) != rows:
        raise InputError(
            f"{path} has labels of {len(labels):,} rows, but {source} has {rows:,} rows: "
            "make it again from this data with python -m sdpo.relabel"
        )
    if numbers != list(range(rows)):
        raise InputError(f"{path} does not have its rows in the order of the data: sort them by row")
    if made_for not in (None, hash_captions(captions)):
        raise InputError(
            f"{path} was made for other captions, or another order of them, than {source} has: "
            "make it again from this data with python -m sdpo.relabel"
        )
    return read_labels(labels, str(path))


def hash_captions(captions: list) -> str:
    """SHA-256 of a caption column."""
    return hashlib.sha256(json.dumps(captions).encode()).hexdigest()


def as_number(label: object) -> float:
    """A label as a float, nan if it is none."""
    try:
        return float(label)
    except (TypeError, ValueError):
        return float("nan")


def split_by_prompt(pairs: Pairs, held_out: int, seed: int) -> tuple[Pairs, Pairs]:
    """(training pairs, `held_out` pairs), no caption on both sides; raises InputError if none are left to train on."""
    captions = [set(options) for options in pairs.captions()]
    by_caption: dict[str, list[int]] = {}
    for index, options in enumerate(captions):
        for caption in options:
            by_caption.setdefault(caption, []).append(index)
    taken: set[str] = set()
    chosen: list[int] = []  # pairs all of whose captions are taken
    for index in draw(seed, "held-out").permutation(len(pairs)):
        if len(chosen) >= held_out:
            break
        added = captions[index] - taken
        taken |= added
        touched = {i for caption in added for i in by_caption[caption]}
        chosen += sorted(i for i in touched if captions[i] <= taken)
    rest = np.array([i for i, options in enumerate(captions) if not options & taken], int)
    if len(chosen) < held_out or not len(rest):
        raise InputError(
            f"--validation_pairs {held_out} leaves nothing to train on: {pairs.source} has {len(pairs)} pairs "
            f"over {len(by_caption)} captions, and a caption is never on both sides; use fewer or --validation_data_dir"
        )
    return pairs.select(rest), pairs.select(np.array(sorted(chosen[:held_out])))


def prepare_pairs(config: TrainConfig, seed: int) -> tuple[Pairs, Pairs | None, list[str]]:
    """(training pairs, held-out pairs or None, sentences for the console) as the config asks.

    Labels of a choice model are made first. Raises InputError for data that cannot be used or does not suffice.
    """
    labelled = []
    if config.choice_model:
        from sdpo.relabel import RelabelConfig, relabel  # the scorers need open_clip, which training does not

        labelled = [relabel(RelabelConfig.of(config))]
    pairs, notes = load_pairs(config, config.split)
    notes, held_out = labelled + notes, None
    if config.validation_split or config.validation_data_dir:
        split = config.validation_split or "train"
        trained, other = (
            place and (find_pair_file(Path(place)) or Path(place)).resolve()
            for place in (config.dataset_name or config.train_data_dir, config.validation_data_dir)
        )
        if other == trained and split == config.split:
            raise InputError(
                f"--validation_data_dir {config.validation_data_dir} holds the pairs trained on: name another folder "
                "or --validation_split, or use --validation_pairs"
            )
        held_out, more = load_pairs(config, split, config.validation_data_dir)
        notes += more
        held_out = draw_subset(held_out, config.validation_pairs or None, seed, "held-out")
        notes.append(f"held out {len(held_out):,} pairs")
    elif config.validation_pairs:
        everything = len(pairs)
        pairs, held_out = split_by_prompt(pairs, config.validation_pairs, seed)
        unused = everything - len(pairs) - len(held_out)
        notes.append(
            f"held out {len(held_out):,} pairs by prompt"
            + (f" ({unused:,} more share their captions and are left out)" if unused else "")
        )
    pairs = draw_subset(pairs, config.max_train_samples, seed, "max-train-samples")
    for part in (pairs, held_out):
        if part is not None:
            check_rows_have_images(part, config.max_unreadable_images)
    return pairs, held_out, notes


def draw_subset(pairs: Pairs, count: int | None, seed: int, stream: str) -> Pairs:
    """`count` of the pairs, drawn, in their order; all of them if there are no more or no count is given."""
    if count is None or count >= len(pairs):
        return pairs
    return pairs.select(np.sort(draw(seed, stream).permutation(len(pairs))[:count]))
