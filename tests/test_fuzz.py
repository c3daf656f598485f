"""Any content of any file that users give: a result that holds what it promises, or InputError in one line."""

import io
import json
import math
import re
import shutil
import string
from contextlib import redirect_stderr, suppress
from dataclasses import fields

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import event, example, given, reject, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import eval_vs
from sdpo.checkpoint import read_state
from sdpo.command import parse_flags, run_command
from sdpo.config import Plan, TrainConfig
from sdpo.families import read_pipeline_class
from sdpo.generation import EvalConfig
from sdpo.hub import load_weights
from sdpo.manifest import read_manifest, read_scores
from sdpo.pairs import load_pairs, read_label_file
from sdpo.prompts import READERS, read_prompts
from sdpo.relabel import RelabelConfig
from sdpo.tiny import make_pairs

fuzz = settings(deadline=None, derandomize=True, max_examples=200, database=None)
PNG = make_pairs.encode(np.zeros((8, 8, 3), np.uint8))

texts = st.text(st.characters(exclude_categories=())) | st.text(string.printable)  # with halves of surrogate pairs
names = st.sampled_from(["a.png", "b.png", "x/../a.png", "../a.png", "/a.png", "", ".", "a\0.png", "a\n.png"])
images, words = st.sampled_from(["a.png", "b.png"]), texts | st.just("p")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


def objects(**known):
    """Objects of known keys with values that fit, or some of the keys with any values."""
    loose = st.fixed_dictionaries({}, optional={key: value | values for key, value in known.items()})
    return st.fixed_dictionaries(known) | loose


def damaged(content):
    """Contents of a file: as they are, behind a byte order mark, cut off, in another encoding."""
    cut = st.tuples(content, st.integers(0, 99)).map(lambda pair: pair[0][: pair[1]])
    return st.one_of(content, content.map(lambda c: b"\xef\xbb\xbf" + c), cut, st.binary(), texts.map(encode))


def encode(text):
    return text.encode("utf-8", "surrogatepass")


def as_json(content):
    return damaged(content.map(lambda value: json.dumps(value).encode()))


def as_lines(row):
    row = row.map(json.dumps)
    lines = st.lists(row, max_size=4) | st.lists(row | texts, max_size=4)
    return damaged(lines.map(lambda lines: encode("\n".join(lines) + "\n")))


def attempt(read, *arguments):
    """The result, or None for input that a command refuses in one line."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            result = run_command(lambda: read(*arguments))
    except SystemExit as end:
        start, line, rest = re.split("(?<=^error: )|\n", said.getvalue())
        assert (end.code, start, rest) == (2, "error: ", "") and line and line.isprintable()
        event("refused")
        return None
    event("taken")
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    for name in "ab":
        (path / f"{name}.png").write_bytes(PNG)
    return path


entries = objects(prompt=words, gen_image_path=images | st.lists(images, min_size=1, max_size=2), metadata=values)
rows_of_scores = objects(
    image=images, prompt=words, CLIP=st.floats(), models=st.dictionaries(texts, texts), sha256=texts
)
prompts = words | objects(prompt=words, neg_prompt=texts, raw_image_path=names, metadata=values)


@fuzz
@given(as_json(st.lists(entries, max_size=4) | values))
def test_manifest(folder, content):
    (folder / "m.json").write_bytes(content)
    for entry in attempt(read_manifest, folder / "m.json") or []:
        assert entry.prompt.strip() and entry.prompt.encode() and entry.path.is_absolute()
        assert entry.image.startswith("/") or entry.path.is_relative_to(folder)


@fuzz
@given(as_lines(rows_of_scores | values))
@example(b'{"image": "a.png", "prompt": "p", "CLIP": 1' + b"0" * 400 + b"}\n")
def test_scores(folder, content):
    (folder / "s.jsonl").write_bytes(content)
    for (image, prompt), row in (attempt(read_scores, folder / "s.jsonl") or {}).items():
        assert isinstance(image, str) and isinstance(prompt, str)
        assert math.isfinite(row.get("CLIP", 0) ** 2)


@fuzz
@given(st.sampled_from([*READERS]), as_json(st.lists(prompts, max_size=4)) | as_lines(prompts))
def test_prompts(folder, suffix, content):
    path = folder / f"p{suffix}"
    path.write_bytes(content)
    for prompt in attempt(read_prompts, path) or []:
        assert prompt.text.strip() and prompt.text.encode() and isinstance(prompt.metadata, dict)


@fuzz
@given(
    st.sampled_from(["pairs.jsonl", "pairs.csv"]),
    as_lines(objects(caption=texts | st.lists(texts, max_size=2), winner=images, loser=images))
    | damaged(st.lists(st.lists(texts | names, max_size=4).map(",".join)).map(lambda rows: encode("\n".join(rows))))
    | damaged(
        st.lists(names).map(lambda rows: b"caption,winner,loser\n" + encode("\n".join(f"x,{n},a.png" for n in rows)))
    ),
)
def test_pairs(folder, name, content):
    data = folder / "pairs"
    data.mkdir(exist_ok=True)
    for file in [*data.glob("pairs.*")]:
        file.unlink()
    for image in ("a.png", "b.png"):
        (data / image).write_bytes(PNG)
    (data / name).write_bytes(content)
    config = TrainConfig(pretrained_model_name_or_path="x", train_data_dir=str(data))
    if loaded := attempt(load_pairs, config, "train"):
        pairs, _ = loaded
        captions = pairs.captions()
        assert 0 < len(pairs) == len(captions) and pairs.first_won.all()
        assert all(options == list(map(str, options)) for options in captions)


labels = st.sampled_from([0.0, 0.5, 1.0])
columns = st.fixed_dictionaries(
    {
        "jpg_0": st.just([PNG] * 2),
        "jpg_1": st.just([PNG] * 2),
        "caption": st.lists(words, min_size=2, max_size=2) | st.lists(words | values, min_size=2, max_size=2),
        "label_0": st.lists(labels, min_size=2, max_size=2) | st.lists(labels | values, min_size=2, max_size=2),
    }
)


@settings(fuzz, max_examples=100)
@given(columns)
def test_saved_pairs(folder, columns):
    data = folder / "saved"
    shutil.rmtree(data, ignore_errors=True)
    try:
        datasets.Dataset.from_dict(columns).save_to_disk(data)
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        reject()  # not every list is a column
    config = TrainConfig(pretrained_model_name_or_path="x", train_data_dir=str(data))
    if loaded := attempt(load_pairs, config, "train"):
        pairs, _ = loaded
        assert len(pairs) == sum(label != 0.5 for label in columns["label_0"])


@fuzz
@given(
    st.sampled_from(["w.pth", "w.safetensors"]), st.binary() | st.lists(st.tuples(st.integers(0), st.integers(0, 255)))
)
def test_weights(folder, name, damage):
    """A state dict of which some bytes, or all, are others."""
    path, model = folder / name, torch.nn.Linear(2, 2)
    (save_file if name.endswith("safetensors") else torch.save)(model.state_dict(), path)
    content = bytearray(path.read_bytes())
    for place, byte in [] if isinstance(damage, bytes) else damage:
        content[place % len(content)] = byte
    path.write_bytes(damage if isinstance(damage, bytes) else content)
    attempt(load_weights, model, path)
    assert all(value.isfinite().all() for value in model.state_dict().values())


@fuzz
@given(damaged(st.just(b"")) | st.lists(labels) | st.lists(values | st.floats(0, 1)))
def test_label_file(folder, content):
    path = folder / "labels.parquet"
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with suppress(pa.ArrowException, UnicodeEncodeError, OverflowError):  # not every list is a column
            pq.write_table(pa.table({"label_0": content}), path)
    labels = attempt(read_label_file, path, ["a caption"] * len(content), "data") if path.exists() else None
    assert labels is None or (len(labels) == len(content) and np.isin(labels, (0, 0.5, 1)).all())


@fuzz
@given(
    as_json(
        objects(step=st.integers(), seed=st.integers(), config=st.dictionaries(texts, values), plan=values) | values
    )
)
def test_state(folder, content):
    (folder / "state.json").write_bytes(content)
    if state := attempt(read_state, folder):
        assert state["step"] >= 0 and state["seed"] >= 0 and isinstance(state["config"], dict)
        assert all(f"{value:,}" for value in state.get("plan", {}).values())


@fuzz
@given(as_json(objects(_class_name=texts) | values))
def test_model_index(folder, content):
    (folder / "model_index.json").write_bytes(content)
    assert isinstance(attempt(read_pipeline_class, folder / "model_index.json"), str | None)


@pytest.mark.parametrize("cls", [TrainConfig, EvalConfig, RelabelConfig])
def test_flags(cls):
    numbers = st.integers(-9, 9) | st.integers() | st.floats() | st.sampled_from([10**400, 2**63, 1e308])
    flags = st.sampled_from([f"--{field.name}" for field in fields(cls)])
    words = st.lists(st.tuples(flags, (numbers | texts.filter("-h".__ne__)).map(str)).map("=".join), max_size=4)
    needed = {
        TrainConfig: ["--pretrained_model_name_or_path=x", "--train_data_dir=x"],
        EvalConfig: ["--unet_path=x", "--pretrain_path=x"],
        RelabelConfig: ["--train_data_dir=x", "--metric=clip"],
    }[cls]

    @fuzz
    @given(words)
    def parse(words):
        config = attempt(parse_flags, cls, "", "python train.py", [*needed, *words])
        if isinstance(config, TrainConfig) and (plan := attempt(Plan.of, config, 2, 100)):
            assert plan.steps > 0 and math.isfinite(plan.learning_rate)
            assert all(
                map(
                    str.isprintable,
                    [*plan.lines(config), *config.cautions("dspo-score", plan.steps), *config.without_effect("adamw")],
                )
            )

    parse()


runs = st.lists(
    st.tuples(st.sampled_from("pqr"), st.floats(allow_nan=False) | st.sampled_from([0.5, math.nextafter(0.5, 1)])),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(fuzz, max_examples=40)
@given(runs, runs, st.sampled_from(["prompt", "index"]))
@example([("p", 0.5)], [("p", math.nextafter(0.5, 1))], "prompt")
@example([("p", 1e99)], [("p", -1e99)], "prompt")
def test_comparison(folder, a, b, pair_by):
    for label, run in (("a", a), ("b", b)):
        (folder / label).mkdir(exist_ok=True)
        images = [{"prompt": prompt, "gen_image_path": f"{place}.png"} for place, (prompt, _) in enumerate(run)]
        (folder / label / "m.json").write_text(json.dumps(images))
        rows = [
            {"image": row["gen_image_path"], "prompt": row["prompt"], "CLIP": score}
            for row, (_, score) in zip(images, run, strict=True)
        ]
        (folder / label / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--json_{label}={folder}/{label}/m.json" for label in "ab"] + ["--label_a=a", "--label_b=b"]
    out = folder / f"out-{len(list(folder.glob('out-*')))}"
    attempt(eval_vs.main, [*flags, "--metrics", "CLIP", f"--pair_by={pair_by}", f"--outdir={out}"])
    for summary in out.glob("*/summary.json"):
        (row,) = json.loads(summary.read_text())["metrics"]
        assert 0 <= row["win_rate_a_over_b"] <= 1 and math.isfinite(row["mean_difference"])
