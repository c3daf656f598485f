"""Pairs of pictures of one colour each, in Pick-a-Pic columns."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

LABELS = (1.0, 0.0, 0.5, 0.0, 1.0, 1.0)  # one tie


def solid(colour, size=(8, 8)):
    """PNG bytes of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def winner(i):
    """Colour of the preferred image of pair i."""
    return (100 + i, 0, 0)


def loser(i):
    """Colour of the other image of pair i."""
    return (0, 100 + i, 0)


def make_rows(labels=LABELS, **changes):
    """Rows in Pick-a-Pic columns; changes map a column to a function of the row number."""
    rows = []
    for i, label in enumerate(labels):
        first, second = (loser(i), winner(i)) if label == 0 else (winner(i), loser(i))
        row = {"caption": f"caption {i}", "jpg_0": solid(first), "jpg_1": solid(second), "label_0": label}
        rows.append(row | {name: value(i) for name, value in changes.items()})
    return rows


def as_parquet(folder, rows=None, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(make_rows() if rows is None else rows), folder / f"{split}.parquet")
    return folder
