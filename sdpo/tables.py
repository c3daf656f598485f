"""Tables of rows as they are on file: found, fetched and read whatever their form, images undecoded."""

from __future__ import annotations

import csv
import errno
import glob
import hashlib
import io
import itertools
import json
import logging
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import HfFileSystem, snapshot_download

from sdpo.command import NO_ROOM, InputError
from sdpo.config import TrainConfig
from sdpo.files import brief, is_text, parse_json, read_text, write_json
from sdpo.images import read_content

IMAGE_FIELDS = ("bytes", "path")  # of the image records of datasets
SAVED_WITH = ("dataset_dict.json", "dataset_info.json", "state.json", "metadata.jsonl")  # what describes data
SAMPLED = 64  # rows by whose images a change of all of them is noticed
FOOTER = 2**16  # bytes at the end of a parquet file, its footer or most of it
STREAM_END = bytes.fromhex("ffffffff00000000")  # of Arrow's format for streams
SAVE_AGAIN = "save the data set again with save_to_disk"
LARGE_COPY = 0.5  # GiB, from which on it is said that data are copied
NUMBERED = re.compile(r"(.*)-\d+-of-(\d+)(?:-[0-9a-f]+)?\.\w+")  # as train-00000-of-00645-b66ac786bf6fb553.parquet
BINARY = (pa.types.is_binary, pa.types.is_large_binary)
OUTCOME = {"winner": "jpg_0", "loser": "jpg_1"}  # image columns of data without labels, and what they are read as
# Column: types in a first file to which `datasets` would cast what other files have there
MISREAD = {"label_0": (pa.types.is_boolean,)} | dict.fromkeys([*OUTCOME, *OUTCOME.values()], BINARY)
CONFIGS = re.compile(r"(?:Config name is missing|BuilderConfig .* not found)[^\[]*(\[.*?\])")  # what `datasets` says
log = logging.getLogger(__name__)


def data_source(config: TrainConfig, folder: str | None = None) -> str:
    """Where the data are: another local folder, else the configured hub id or folder."""
    return folder or config.dataset_name or config.train_data_dir


def read_table(config: TrainConfig, split: str, folder: str | None = None) -> datasets.Dataset:
    """One split of the configured data, or of another local folder, images undecoded; other splits are not read.

    `config` is train.py's or that of relabel, whose flags of the data are the same. Raises InputError for data that is
    not there or cannot be read.
    """
    source = data_source(config, folder)
    path = Path(source)
    if not path.name and path.exists():  # ".", which datasets does not take
        source = str(path.resolve())
        path = Path(source)
    if not path.exists() and (folder or not config.dataset_name):
        raise InputError(f"data folder {source} does not exist")
    pair_file = find_pair_file(path)
    if pair_file:
        refuse_split(pair_file, split)
        if shards := list_shards(path):
            log.warning(
                f"CAUTION: {pair_file} is read, and {len(shards)} Parquet or Arrow files beside it are not, the first "
                f"{shards[0]}"
            )
        return read_pair_file(pair_file, config.caption_column)
    if path.is_file():
        raise InputError(f"{source} is a file, but neither .jsonl nor .csv: give the folder that holds it")
    try:
        if is_saved(path):
            return labelled(undecoded(read_saved(path, split)))
        name = None if folder else config.dataset_config_name
        return labelled(undecoded(read_split(source, name, split, config.cache_dir)))
    except InputError:
        raise
    except Exception as error:  # datasets, pyarrow and the hub each have errors of their own
        cause = error.__cause__ or error
        reason = brief(cause).partition(" with any supported extension")[0]  # of which a long list follows
        raise InputError(
            f"cannot read pairs from {source!r} ({reason}); {find_fix(cause, path, split, config.cache_dir)}"
        ) from error


def find_fix(cause: Exception, path: Path, split: str, cache_dir: str | None) -> str:
    """What to do where the data at a path, or the copy that `datasets` makes of them, cannot be read."""
    copy = cache_dir or datasets.config.HF_DATASETS_CACHE
    if configs := CONFIGS.search(str(cause)):
        return f"give one of its configs as --dataset_config_name: {configs[1]:.300}"
    if type(cause).__module__.startswith("yaml."):
        return f"{path / 'README.md'} does not begin with valid YAML: correct or remove it"
    if type(cause) is FileNotFoundError and not cause.errno and (path / "README.md").is_file():
        return f"{path / 'README.md'} chooses files that are not there: correct or remove it"
    if not path.exists():
        return "give a local folder, or a hub data set where the hub can be reached"
    number = getattr(cause, "errno", None)
    place = os.path.abspath(getattr(cause, "filename", None) or path)
    about_copy = os.path.commonpath([place, os.path.abspath(copy)]) in (place, os.path.abspath(copy))
    unusable = (errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)
    if number in (*NO_ROOM, errno.EROFS) or (number in unusable and about_copy):
        return f"their copy is made in {copy}: name a folder that can be written, with room, as --cache_dir"
    if path.is_dir() and not any(path.iterdir()):
        return "it is empty: give the folder that holds them"
    files = list_shards(path)
    fault = find_fault([file for file in files if split in str(file.relative_to(path))] or files)
    fault = fault or find_json_fault([file for name in SAVED_WITH for file in sorted(path.rglob(name))])
    otherwise = SAVE_AGAIN if is_saved(path) else f"delete their copy in {copy} if that is damaged"
    return fault or f"look at the files there, or {otherwise}"


def list_shards(folder: Path) -> list[Path]:
    """Parquet and Arrow files in a folder that `datasets` may read, links to nothing included."""
    found = [path for ending in ("parquet", "arrow") for path in folder.rglob(f"*.{ending}")]
    visible = [path for path in found if not any(part[0] in "._" for part in path.relative_to(folder).parts)]
    return sorted(visible)


def find_fault(files: list[Path]) -> str | None:
    """What to do about the first shard that is damaged or unlike the first one; None if none is."""
    for file in files:
        try:
            schema, batches = open_shard(file)
            if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
                return f"{file} has more than one column {twice[0]}: keep one"
            differing = set(schema) ^ set(open_shard(files[0])[0])  # fields: name and type
            if differing:
                name = min(field.name for field in differing)
                return f"{file} has another column {name} than {files[0]}: write both alike, or move one away"
            if not sum(batch.num_rows for batch in batches):  # a damaged page shows when it is read
                return f"{file} has no rows: replace or remove it"
        except PermissionError as error:
            return f"{file} cannot be read ({error.strerror}): correct its permissions"
        except Exception as error:  # pyarrow has many
            return f"{file} is damaged, or not what its name says ({brief(error)}): replace or remove it"
    return None


def find_json_fault(files: list[Path]) -> str | None:
    """What to do about the first JSON or JSONL file that is none."""
    for file in files:
        try:
            lines = read_text(file).split("\n") if file.suffix == ".jsonl" else [read_text(file)]
            for number, line in enumerate(lines, 1):
                parse_json(line or "{}", f"{file}, line {number}" if len(lines) > 1 else file, "write it again")
        except InputError as error:
            return str(error)
    return None


def open_shard(file: Path) -> tuple[pa.Schema, Iterable[pa.RecordBatch]]:
    """Schema and rows of a parquet or Arrow file; raises what pyarrow does."""
    if file.suffix == ".parquet":
        content = pq.ParquetFile(file)
        return content.schema_arrow, content.iter_batches(batch_size=64)
    mapped = pa.memory_map(str(file))
    try:
        content = pa.ipc.open_stream(mapped)
        return content.schema, content
    except pa.ArrowInvalid:  # the other of its two formats
        content = pa.ipc.open_file(mapped)
        return content.schema, (content.get_batch(number) for number in range(content.num_record_batches))


def refuse_cut_off(file: str) -> None:
    """Raises InputError for an Arrow stream without its end: one cut off between two batches reads as whole."""
    with open(file, "rb") as content:
        begin, size = content.read(6), content.seek(0, os.SEEK_END)
        content.seek(max(0, size - len(STREAM_END)))
        end = content.read()
    if begin != b"ARROW1" and end != STREAM_END:  # the other format cannot be read without its footer
        raise InputError(
            f"{file} has no end, so it may be cut off: fetch or write it again, or delete it if it is a copy"
        )


def check_shards(folder: Path, files: list[str], in_splits: Iterable[str]) -> None:
    """Warn of shards in a folder that are in no split, and of numbered ones among a split's `files` that are not there.

    Raises InputError for Arrow files that are cut off, and for columns of several types where `datasets` would take
    them for the first file's: labels that are booleans there, so that ties would be wins, and images that are bytes
    there and paths elsewhere.
    """
    known = set(map(os.path.realpath, in_splits))
    others = [path for path in list_shards(folder) if not path.exists() or os.path.realpath(path) not in known]
    if others and not (folder / "README.md").is_file():  # which may choose files on purpose
        log.warning(
            f"CAUTION: {len(others)} files in {folder} are not read, the first {others[0]}: by their names they are in "
            "no split, or they are links to nothing"
        )
    caution_missing(files)
    kinds: dict[str, dict[pa.DataType, str]] = defaultdict(dict)  # by column: its types, with the first file of each
    for file in files:
        for field in open_shard(Path(file))[0]:
            kinds[field.name].setdefault(field.type, file)
        if file.endswith(".arrow"):
            refuse_cut_off(file)
    for name, misread in MISREAD.items():
        alike = [any(is_kind(kind) for is_kind in misread) for kind in kinds[name]]
        if any(alike[:1]) and not all(alike):
            said = ", ".join(f"{kind} in {file}" for kind, file in kinds[name].items())
            raise InputError(f"{name} has several types ({said}): write all files alike")


def caution_missing(files: Iterable[str]) -> None:
    """Warn of numbered files that are not among these."""
    numbered = [match for match in map(NUMBERED.fullmatch, set(files)) if match]
    for (name, count), there in Counter(match.groups() for match in numbered).items():
        if there < int(count):
            log.warning(f"CAUTION: of {name}-*-of-{count} only {there} files are there")


def refuse_other_kind(source: Path, kind: str) -> None:
    """Raises InputError for a folder with Parquet or Arrow files that is read as another kind of data."""
    shards = [path for path in list_shards(source) if path.stem != "metadata"] if source.is_dir() else []
    if shards and not (source / "README.md").is_file():  # which may choose files on purpose
        raise InputError(
            f"{source} is read as {kind}, as most of its files are, and so without {shards[0].name}: move either away"
        )


def read_split(source: str, name: str | None, split: str, cache_dir: str | None) -> datasets.Dataset:
    """A split of a hub data set or of a folder of parquet, arrow or similar files; fetches only its own files.

    Where the hub cannot be reached, the files that an earlier call fetched are read. Raises InputError for a split that
    is not there and for names that cannot be read; other errors are those of the libraries.
    """
    if Path(source).exists() and re.search(r"[*?\[\]\n]|::", os.path.realpath(source)):
        raise InputError(
            f"data folder {source!r}: datasets takes *, ?, [, ] and :: in its path for patterns, and no line breaks; "
            "rename it"
        )
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
    files = fetch_files(list(splits[split]), cache_dir)
    if builder.name not in ("parquet", "arrow"):
        refuse_other_kind(Path(source), builder.name)
    copy = None  # the name that datasets gives it, by paths and times
    if files != list(splits[split]):
        write_json(fetched, [builder.name, files])
    elif builder.name in ("parquet", "arrow") and Path(source).is_dir():
        check_shards(Path(source), files, itertools.chain(*splits.values()))
        copy = identify(files)
    with showing_progress(files if builder.name == "parquet" else [], cache_dir):
        table = datasets.load_dataset(builder.name, copy, data_files={split: files}, split=split, cache_dir=cache_dir)
    for file in table.cache_files:  # a loss of power may have cut off the copy
        refuse_cut_off(file["filename"])
    return table


def identify(files: list[str]) -> str:
    """A name for the copy that `datasets` makes of files, from their content as far as it is quick to read.

    These are sizes, footers, which sum up every column, and of parquet files the labels.
    """
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            size = content.seek(0, os.SEEK_END)
            content.seek(max(0, size - FOOTER))
            digest.update(str(size).encode() + content.read())
        if file.endswith(".parquet"):
            labels = pq.read_table(file, columns=[name for name in pq.read_schema(file).names if name == "label_0"])
            digest.update(str(labels.to_pydict()).encode())
    return digest.hexdigest()[:16]


@contextmanager
def showing_progress(files: list[str], cache_dir: str | None) -> Iterator[None]:
    """Say that much data are copied, with the progress bars of `datasets`, on the main process."""
    size = sum(os.path.getsize(file) for file in files if os.path.isfile(file)) / 2**30
    if size < LARGE_COPY or not log.isEnabledFor(logging.INFO):
        yield
        return
    cache = cache_dir or datasets.config.HF_DATASETS_CACHE
    log.info(f"data           {size:.3g} GiB, of which datasets makes a copy in {cache} unless it has one")
    datasets.utils.logging.enable_progress_bar()
    try:
        yield
    finally:
        datasets.utils.logging.disable_progress_bar()


def fetch_files(files: list[str], cache_dir: str | None) -> list[str]:
    """Local paths of data files; those on the hub are downloaded to `cache_dir` or HF_HOME, unless they are there."""
    if not all(file.startswith("hf://") for file in files):
        return files
    places = [HfFileSystem().resolve_path(file) for file in files]
    first = places[0]
    names = [place.path_in_repo for place in places]
    where = {"repo_type": first.repo_type, "revision": first.revision}
    patterns = [glob.escape(name) for name in names]
    folder = snapshot_download(first.repo_id, allow_patterns=patterns, cache_dir=cache_dir, **where)
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
    found = [file for file in found if file.is_file() and not file.name.startswith(".") and not describes_images(file)]
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
                f"{where}: {', '.join(missing)} missing, it has {', '.join(map(repr, record)):.200}; every row needs "
                f"{', '.join(columns)} (move {file.name} away if it is not a list of pairs)"
            )
        if None in record:  # where csv puts what has no column
            raise InputError(f"{where}: more values than columns; put captions that hold commas in double quotes")
        for name, paths in (("winner", winners), ("loser", losers)):
            if not isinstance(record[name], str):
                raise InputError(f"{where}: {name} is {record[name]!r:.200}, but must be the path of an image")
            paths.append(str(file.parent / record[name]))
            if not os.path.isfile(paths[-1]):  # Path.is_file raises for long names
                raise InputError(f"{where}: image {paths[-1]} does not exist; paths are relative to {file.name}")
        if "label_0" in record:  # as `labelled` has it
            raise InputError(f"{where}: winner and loser say which image won, and so does label_0: remove that")
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
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            names = Counter(reader.fieldnames or ())
            rows = list(enumerate(reader, 1))
        except csv.Error as error:
            raise InputError(f"{file} is not valid CSV ({error}); write it again, or as JSONL") from error
        if twice := [name for name, count in names.items() if name and count > 1]:
            raise InputError(f"{file} has more than one column {twice[0]!r}: keep one")
        return rows
    fix = 'write {"caption": ..., "winner": ..., "loser": ...}'
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            records.append((number, parse_json(line, f"{file} row {number}", fix)))
            if not isinstance(records[-1][1], dict):
                raise InputError(f"{file} row {number} is not a JSON object; {fix}")
    return records


def is_saved(path: Path) -> bool:
    """Whether a folder is one written by save_to_disk."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def read_saved(path: Path, split: str) -> datasets.Dataset:
    """A folder written by save_to_disk, of a DatasetDict only one split; InputError if it is missing or cut off."""
    index, saved = path / "dataset_dict.json", path
    if index.is_file():
        content = parse_json(read_text(index), index, SAVE_AGAIN)
        splits = content.get("splits") if isinstance(content, dict) else None
        if not splits or not isinstance(splits, list):
            raise InputError(f"{index} does not list the splits: {SAVE_AGAIN}")
        if split not in splits:
            raise no_such_split(path, split, splits)
        saved = path / split
    table = datasets.load_from_disk(str(saved))
    if saved == path and str(table.split) != split:
        refuse_split(path, split)
    files = [file["filename"] for file in table.cache_files]
    caution_missing(files)
    for file in files:
        refuse_cut_off(file)
    return table


def undecoded(table: datasets.Dataset) -> datasets.Dataset:
    """All columns as Python has them, images as bytes or paths, so that filters and workers decide what is decoded.

    Raises InputError for labels as a ClassLabel column: its integers are indices of class names, not the labels.
    """
    table = table.with_format(None)
    for name, feature in table.features.items():
        if isinstance(feature, datasets.ClassLabel) and name == "label_0":
            names = ", ".join(feature.names)
            raise InputError(
                f"column {name} numbers classes ({names}): write 1 (jpg_0 won), 0 (jpg_1 won) or 0.5 (tie) as numbers"
            )
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def labelled(table: datasets.Dataset) -> datasets.Dataset:
    """A table with images in columns winner and loser in Pick-a-Pic's columns; any other as it is.

    Raises InputError where there are labels as well.
    """
    names = set(table.column_names)
    if not OUTCOME.keys() <= names or set(OUTCOME.values()) & names:
        return table
    if "label_0" in names:
        raise InputError("columns winner and loser say which image won, and so does label_0: remove that")
    log.info("data           columns winner and loser are read as jpg_0, which won, and jpg_1")
    return table.rename_columns(OUTCOME).add_column("label_0", [1.0] * len(table))


# Columns


def column(table: datasets.Dataset, name: str, rows: np.ndarray | None = None, source: str = "data") -> list:
    """Values of one column without touching the others; raises InputError for text that is not UTF-8."""
    table = table.select_columns([name])
    try:
        values = table[:][name]  # all of them: `datasets` gathers rows one by one
        return values if rows is None else [values[row] for row in rows.tolist()]
    except UnicodeDecodeError as error:
        for row in range(len(table)):
            try:
                table[row]
            except UnicodeDecodeError:
                break
        raise InputError(
            f"{source} row {row}: {name} is not UTF-8 text ({error.reason}): correct or remove the row"
        ) from error


def as_list(caption: str | list[str]) -> list[str]:
    """The captions of a row, which may hold one or a list of them."""
    return caption if isinstance(caption, list) else [caption]


def check_captions(captions: list, name: str, source: str, first: int = 0) -> None:
    """Raises InputError naming the first row whose caption is neither a text nor a list of texts."""
    for row, caption in enumerate(captions, first):
        options = caption if isinstance(caption, list) and caption else [caption]
        if not all(map(is_text, options)):
            raise InputError(f"{source} row {row}: {name} is {caption!r:.200}, but must be a text or a list of texts")


def blocks(table: datasets.Dataset, columns: Iterable[str]) -> Iterator[pa.Table]:
    """10,000 rows at a time of some columns as they are on file, images undecoded."""
    return table.select_columns(list(columns)).with_format("arrow").iter(10_000)


def measure_images(values: pa.ChunkedArray) -> np.ndarray:
    """Sizes (n,) in bytes of encoded images or of image files; -1 where there is neither."""
    if pa.types.is_struct(values.type):
        sizes = np.full(len(values), -1)
        for field in IMAGE_FIELDS:
            if values.type.get_field_index(field) >= 0 and (sizes < 0).any():
                sizes = np.where(sizes < 0, measure_images(pc.struct_field(values, field)), sizes)
        return sizes
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return np.array([measure_file(path) if path else -1 for path in values.to_pylist()])
    if pa.types.is_null(values.type):
        return np.full(len(values), -1)
    return pc.fill_null(pc.binary_length(values).cast(pa.int64()), -1).to_numpy()


def measure_file(path: str) -> int:
    """Size of a file in bytes; -1 where there is none."""
    try:
        about = os.stat(path)
    except (OSError, ValueError):  # a path may hold NUL
        return -1
    return about.st_size if stat.S_ISREG(about.st_mode) else -1


def hash_images(table: datasets.Dataset, columns: Iterable[str], rows: np.ndarray) -> str:
    """SHA-256 over the content of the images of SAMPLED of these rows, spread evenly, or of all if there are fewer."""
    digest = hashlib.sha256()
    for contents in read_sample(table, columns, rows):
        for content in contents:
            digest.update(content)
    return digest.hexdigest()


def read_sample(table: datasets.Dataset, columns: Iterable[str], rows: np.ndarray) -> Iterator[list[bytes]]:
    """The encoded images of SAMPLED of these rows, spread evenly, or of all if there are fewer, by column."""
    for place in np.linspace(0, len(rows) - 1, min(SAMPLED, len(rows))).astype(int):
        values = table[int(rows[place])]
        yield [read_content(values[name]) for name in columns]


def hash_captions(captions: list) -> str:
    """SHA-256 of a caption column."""
    return hashlib.sha256(json.dumps(captions).encode()).hexdigest()
