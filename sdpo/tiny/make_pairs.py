"""Write preference pairs of tiny pictures in Pick-a-Pic columns: `python -m sdpo.tiny.make_pairs --out DIR`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sdpo.command import InputError, Parser, run_command
from sdpo.files import write_file
from sdpo.tiny import pictures

PAIRS = 4000
TIES = 0.06  # share of undecided pairs, as Pick-a-Pic has
FAULTY_WINNERS = 0.1  # share of pairs whose winner has a fault too, as human labels are noisy


def make_pair(spec: pictures.Spec, rng: np.random.Generator) -> dict:
    """One row: two pictures of a caption, the one without fault mostly preferred; in one place unless sizes differ."""
    centre = pictures.draw_centre(spec, rng)
    winner = (
        pictures.render_fault(spec, centre, rng) if rng.random() < FAULTY_WINNERS else pictures.render(spec, centre)
    )
    loser = pictures.render_fault(spec, centre, rng)
    swapped = bool(rng.random() < 0.5)
    label = 0.5 if rng.random() < TIES else 1.0 - swapped
    first, second = (loser, winner) if swapped else (winner, loser)
    return {"caption": spec.caption, "jpg_0": encode(first), "jpg_1": encode(second), "label_0": label}


def encode(picture: np.ndarray) -> bytes:
    """PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def write_split(specs: list[pictures.Spec], count: int, seed: int, path: Path) -> None:
    """Write `count` pairs over these captions as a parquet file."""
    rng = np.random.default_rng(seed)
    rows = [make_pair(specs[i], rng) for i in rng.integers(len(specs), size=count)]
    write_file(path, lambda partial: pq.write_table(pa.Table.from_pylist(rows), partial))


def main(arguments: list[str] | None = None) -> None:
    """Pairs over the captions that the base was trained on."""
    parser = Parser("python -m sdpo.tiny.make_pairs", __doc__)
    parser.add_argument("--out", required=True, help="folder of train.parquet, made if need be")
    out = parser.parse_args(arguments).out
    if not out:
        raise InputError("--out is empty: name a folder")
    path = Path(out, "train.parquet")
    if path.exists():
        raise InputError(f"{path} is there already: name another --out, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_split(pictures.TRAINED, PAIRS, 0, path)


if __name__ == "__main__":
    run_command(main)
