"""Label pairs with a scorer: `python -m sdpo.relabel --train_data_dir DIR --metric pickscore --out labels.parquet`.

Both images of every row are scored once; `train.py --labels_file labels.parquet` trains on the labels. The file has a
row for every row of the data, with the columns row, score_0, score_1 (null for an image that cannot be read) and
label_0 (1: jpg_0 won, 0: jpg_1 won, 0.5: tie, or not to be judged), and in its metadata what it was made from. The same
command run again makes what is missing.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from sdpo.command import (
    InputError,
    Natural,
    NotNegative,
    Size,
    check_limits,
    flag,
    parse_assignments,
    parse_flags,
    refuse,
    run_command,
    show,
    within_memory,
)
from sdpo.config import CHOICE_MODELS, TrainConfig, check_texts, source_conflicts
from sdpo.console import start_console
from sdpo.files import alone, brief, can_be_written, identify_source, parse_json, read_text, write_file, write_text
from sdpo.images import image_source
from sdpo.manifest import check_score
from sdpo.pairs import IMAGES, LABELS_ABOUT, check_columns, check_rows_have_images, hash_labels
from sdpo.scorers import SCORERS, check_device, check_parts, load_scorers, score_rows
from sdpo.tables import as_list, column, data_source, hash_captions, hash_images, read_table

SCORE_COLUMNS = ("score_0", "score_1")  # columns of a label file
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RelabelConfig:
    """Flags of `python -m sdpo.relabel`; those of the data are train.py's and are read as there."""

    dataset_name: str | None = flag(None, "pairs in Pick-a-Pic columns: a hub id or a local folder")
    dataset_config_name: str | None = flag(None, "config of the data set on the hub")
    train_data_dir: str | None = flag(None, "local pairs, in any form that train.py reads")
    split: str = flag("train", "split to label")
    caption_column: str = flag("caption", "column of the caption; of a list of captions the first is scored")
    cache_dir: str | None = flag(None, "where data sets from the hub and copies of parquet files are kept")
    metric: str = flag("", f"scorer: {', '.join(CHOICE_MODELS)}")
    margin: NotNegative = flag(0.0, "pairs whose scores differ by this or less are ties")
    weights: list[str] = field(
        default_factory=list,
        metadata={"help": "METRIC.PART=SOURCE: local path or hub file of a scorer's part", "action": "extend"},
    )
    device: str | None = flag(None, "where scores are computed: cpu, cuda, cuda:1, ...; on a GPU if there is one")
    batch_size: Size = flag(64, "images per step of the scorer")
    max_unreadable_images: Natural = flag(100, "count up to this many rows with an unreadable image as ties, then stop")
    out: str = flag("labels.parquet", "label file to write")

    def __post_init__(self):
        check_limits(self)
        check_texts(self)
        refuse(source_conflicts(self.dataset_name, self.train_data_dir))
        if self.metric not in CHOICE_MODELS:
            raise InputError(f"--metric {self.metric!r}: choose from {', '.join(CHOICE_MODELS)}")
        if not Path(self.out).name or Path(self.out).is_dir():
            raise InputError(f"--out {self.out!r} is not the name of a file; give one for the labels")
        data = Path(self.train_data_dir or self.dataset_name)
        if data.exists() and data.resolve() in Path(self.out).resolve().parents:
            raise InputError(
                f"{self.out} would lie among the data in {data} and be read with them: choose another place for the "
                "labels: another --out, or for --choice_model of train.py another --output_dir"
            )

    @classmethod
    def of(cls, config: TrainConfig) -> RelabelConfig:
        """What --choice_model of train.py asks for."""
        names = ("dataset_name", "dataset_config_name", "train_data_dir", "split", "caption_column", "cache_dir")
        data = {name: getattr(config, name) for name in names}
        weights = [text for text in config.choice_weights.split(",") if text]
        parse_assignments(weights, "--choice_weights")  # so that errors have the name of train.py's flag
        choice = {"metric": config.choice_model, "margin": config.choice_margin, "weights": weights}
        choice["max_unreadable_images"] = config.max_unreadable_images
        return cls(**data, **choice, out=str(config.labels_path))

    @property
    def sources(self) -> dict[str, str]:
        """Replaced parts of scorers, as load_scorers takes them; raises InputError for a text without '='."""
        return parse_assignments(self.weights, "--weights")


class NamedBytes(io.BytesIO):
    """An encoded image that error messages can name."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name

    def __repr__(self):
        return self.name


def make_labels(scores: np.ndarray, margin: float) -> np.ndarray:
    """Labels (n,) of scores (n, 2): 1 where the first is higher, 0.5 where they differ by <= margin or one is nan."""
    difference = scores[:, 0] - scores[:, 1]
    return np.where(np.abs(difference) > margin, (difference > 0).astype(float), 0.5)


def relabel(config: RelabelConfig) -> str:
    """Score and label every row of the data into config.out, unless it is there already; returns a sentence about it.

    The file appears when it is complete; scores made so far are kept beside it and reused by the same command.
    Another margin needs no new scores. Raises InputError for data, weights and images that cannot be used, and for a
    file of something else.
    """
    check_parts(config.sources, [CHOICE_MODELS[config.metric]])
    out = Path(config.out)
    then = read_about(out)
    if out.exists() and not (isinstance(then, dict) and "margin" in then):
        raise InputError(f"--out {out} is there already and is not a label file: name another one")
    if not out.exists():
        check_device(config.device)
        if not can_be_written(out.parent):
            raise InputError(f"--out {out} cannot be written: name another file")
    source = f"{data_source(config)} ({config.split})"
    table = read_table(config, config.split)
    check_columns(table, config.caption_column, IMAGES, source)
    scored = describe_scores(config, table)
    kept = out.with_name(out.name + ".scores.jsonl")
    if out.exists():
        refuse_others(out, then, scored)
        scores = read_scored(out, then, len(table))
        if then["margin"] == config.margin:
            return f"labels by {config.metric} reused from {out}"
    else:
        check_rows_have_images(table, IMAGES, np.arange(len(table)), source, config.max_unreadable_images)
        out.parent.mkdir(parents=True, exist_ok=True)
        with alone(out.with_name(f".{out.name}.lock"), f"another command makes {out}: wait until it ends"):
            scores = score_table(config, table, scored, kept)
    labels = make_labels(scores, config.margin)
    about = {"source": source, "config": config.dataset_config_name, **scored, "margin": config.margin}
    first, second = (pa.array(values, from_pandas=True) for values in scores.T)  # nan as null
    labelled = pa.table([np.arange(len(scores)), first, second, labels], names=["row", *SCORE_COLUMNS, "label_0"])
    about["sha256"] = hash_labels(labelled)
    labelled = labelled.replace_schema_metadata({LABELS_ABOUT: json.dumps(about)})
    write_file(out, lambda partial: pq.write_table(labelled, partial))
    kept.unlink(missing_ok=True)
    return f"labels by {config.metric}: {len(labels):,} rows, {(labels == 0.5).sum():,} ties; written to {out}"


def describe_scores(config: RelabelConfig, table: datasets.Dataset) -> dict:
    """What scores of the data are made from, whatever the data are called."""
    return {
        "rows": len(table),
        "captions": hash_captions(column(table, config.caption_column)),
        "images": hash_images(table, IMAGES, np.arange(len(table))),
        "metric": config.metric,
        "weights": {name: identify_source(source) for name, source in config.sources.items()},
    }


def read_about(path: Path) -> dict | None:
    """What a label file says it was made from; None if there is no such file, or it does not say."""
    try:
        return json.loads(pq.read_schema(path).metadata[LABELS_ABOUT])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def refuse_others(out: Path, then: dict, scored: dict) -> None:
    """Raises InputError unless a label file, made from `then`, holds scores like these."""
    if changes := [name for name, value in scored.items() if then.get(name) != value]:
        raise InputError(
            f"--out {out} holds labels by {then.get('metric')} made from something else (other {', '.join(changes)}): "
            "name another file, or remove it"
        )


def read_scored(out: Path, about: dict, rows: int) -> np.ndarray:
    """Scores (rows, 2) that a label file holds beside its labels; raises InputError where it is damaged."""
    try:
        table = pq.read_table(out)
        scores = np.column_stack([table[name].to_numpy().astype(float) for name in SCORE_COLUMNS])
    except Exception as error:  # pyarrow has many
        raise InputError(f"{out} is damaged ({brief(error)}): remove it to score the data again") from error
    if len(scores) != rows:
        raise InputError(f"{out} has {len(scores):,} rows, the data {rows:,}: remove it to score the data again")
    if about.get("sha256") != hash_labels(table):
        raise InputError(f"{out} is damaged (sha256): remove it to score the data again")
    return scores


def score_table(config: RelabelConfig, table: datasets.Dataset, about: dict, kept: Path) -> np.ndarray:
    """Scores (rows, 2) of jpg_0 and jpg_1, nan for an unreadable image.

    Those in the file `kept` are reused, new ones appended to it. Raises InputError for too many unreadable images.
    """
    device = check_device(config.device)  # before weights are fetched
    scores = read_kept(kept, about)
    if len(scores) > len(table):
        raise InputError(f"{kept} has {len(scores):,} rows, the data {len(table):,}: remove the file")
    lines = [json.dumps(row) + "\n" for row in (about, *scores)]
    write_text(kept, "".join(lines))  # without a line that was cut off
    unreadable = sum(None in row for row in scores)
    name = CHOICE_MODELS[config.metric]
    captions = column(table, config.caption_column)
    SCORERS[name].check(as_list(caption)[0] for caption in captions)
    scorers = load_scorers([name], config.sources)
    images = iterate_images(table, config.caption_column, len(scores))
    results = score_rows(images, scorers, batch_size=config.batch_size, device=device, tolerant=True)
    progress = tqdm(desc=config.metric, unit="pair", initial=len(scores), total=len(table))
    with progress, kept.open("a") as file, within_memory("use a smaller --batch_size; scores made so far are kept"):
        for pair in zip(results, results, strict=True):
            errors = [result for result in pair if isinstance(result, InputError)]
            for error in errors:
                log.warning(f"CAUTION: {error}; its row counts as a tie")
            unreadable += bool(errors)
            if errors and unreadable > config.max_unreadable_images:  # not kept, so that the same command stops again
                raise InputError(
                    f"{unreadable} rows have unreadable images, more than --max_unreadable_images "
                    f"{config.max_unreadable_images}; the last: {errors[-1]}; remove {kept} once they are repaired"
                )
            scores.append([None if isinstance(result, InputError) else result[name] for result in pair])
            file.write(json.dumps(scores[-1]) + "\n")
            file.flush()
            progress.update()
    return np.array(scores, float).reshape(-1, 2)


def read_kept(kept: Path, about: dict) -> list[list[float | None]]:
    """Scores that an earlier run left, up to a line cut off; raises InputError for other lines and other labels'."""
    text = read_text(kept) if kept.is_file() else ""
    lines = enumerate(text.split("\n")[:-1], 1)
    rows = [parse_json(line, f"{kept}, line {number}", "remove the file") for number, line in lines]
    if text and rows[:1] != [about]:
        raise InputError(f"{kept} does not hold scores of these pairs by this model: name another --out, or remove it")
    for number, row in enumerate(rows[1:], 2):
        if not isinstance(row, list) or len(row) != 2:
            raise InputError(f"{kept}, line {number}: not the scores of two images; remove the file")
        for score in (score for score in row if score is not None):
            check_score(score, f"{kept}, line {number}: a score")
    return rows[1:]


def iterate_images(table: datasets.Dataset, caption_column: str, first: int) -> Iterator[tuple[str | io.BytesIO, str]]:
    """(image, prompt) of jpg_0 and jpg_1 of each row from `first` on."""
    table = table.select_columns([*IMAGES, caption_column])
    for number in range(first, len(table)):
        row = table[number]
        prompt = as_list(row[caption_column])[0]
        for name in IMAGES:
            image = image_source(row[name])
            yield image if isinstance(image, str) else NamedBytes(image or b"", f"{name} of row {number}"), prompt


def main(arguments: list[str] | None = None) -> None:
    """Label as the command line says."""
    config = parse_flags(RelabelConfig, "python -m sdpo.relabel", __doc__, arguments)
    start_console(main_process=True)
    show(relabel(config))


if __name__ == "__main__":
    run_command(main)
