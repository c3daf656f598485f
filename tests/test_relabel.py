"""Labels by a scorer: which image wins, what is kept and refused, and training on them."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from colours import as_parquet, loser, make_rows, solid, winner
from PIL import Image

import train
from sdpo import relabel as module
from sdpo.command import InputError, parse_flags
from sdpo.config import TrainConfig
from sdpo.pairs import load_pairs, prepare_pairs, read_label_file
from sdpo.relabel import RelabelConfig, describe_scores, iterate_images, main, make_labels, read_kept, relabel
from sdpo.tables import read_table
from sdpo.tiny import pictures


def expected_scores(folder, split="train"):
    """(n, 2), by the pictures' own score."""
    rows = pq.read_table(folder / f"{split}.parquet").to_pylist()
    return np.array([[score(row[name], row["caption"]) for name in ("jpg_0", "jpg_1")] for row in rows])


def score(png, caption):
    return pictures.score(np.array(Image.open(io.BytesIO(png)).convert("RGB")), caption)


def made(folder, out, *flags):
    main([f"--train_data_dir={folder}", "--metric=pixels", f"--out={out}", *flags])
    return pq.read_table(out)


def test_one_command_at_a_time_makes_a_label_file(pairs_folder, tmp_path):
    out = tmp_path / "labels.parquet"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".labels.parquet.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match=r"another command makes .*labels.parquet: wait until it ends"):
            made(pairs_folder, out)
        other.communicate()
    assert made(pairs_folder, out).num_rows == 120


HOLD = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_image_with_the_higher_score_wins(pairs_folder, tmp_path):
    table = made(pairs_folder, tmp_path / "labels.parquet", "--batch_size=7")
    scores = expected_scores(pairs_folder)
    assert table.column_names == ["row", "score_0", "score_1", "label_0"]
    assert table["row"].to_pylist() == list(range(120))
    found = np.column_stack([table["score_0"], table["score_1"]])
    np.testing.assert_allclose(found, scores, atol=1e-6)
    wanted = [1.0 if first > second else 0.0 if first < second else 0.5 for first, second in scores]
    assert table["label_0"].to_pylist() == wanted
    assert {0.0, 0.5, 1.0} == set(wanted)  # the pictures hold every case
    about = json.loads(table.schema.metadata[b"sdpo"])
    assert about["source"] == f"{pairs_folder} (train)"
    assert (about["rows"], about["metric"], about["margin"]) == (120, "pixels", 0)
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["labels.parquet"]


def test_another_split_is_labelled(pairs_folder, tmp_path):
    table = made(pairs_folder, tmp_path / "labels.parquet", "--split=validation")
    scores = expected_scores(pairs_folder, "validation")
    assert table["label_0"].to_pylist() == (0.5 + 0.5 * np.sign(scores[:, 0] - scores[:, 1])).tolist()


@pytest.mark.parametrize("margin, labels", [(0, [1, 0, 0.5, 1]), (0.25, [0.5, 0, 0.5, 1]), (1, [0.5] * 4)])
def test_ties_are_those_within_the_margin(margin, labels):
    scores = np.array([[0.5, 0.25], [0.25, 0.75], [0.5, 0.5], [1.0, 0.0]])
    assert make_labels(scores, margin).tolist() == labels


def test_the_margin_reaches_the_file(pairs_folder, tmp_path):
    scores = expected_scores(pairs_folder)
    gaps = np.abs(scores[:, 0] - scores[:, 1])
    ties = np.array(made(pairs_folder, tmp_path / "labels.parquet", "--margin=0.6")["label_0"]) == 0.5
    assert ties.tolist() == (gaps <= 0.6).tolist()
    assert (gaps[ties] > 0).any() and not ties.all()


def test_labels_are_made_once_and_those_of_something_else_stay(pairs_folder, tmp_path):
    out = tmp_path / "labels.parquet"
    made(pairs_folder, out)
    before = out.read_bytes()
    made(os.path.relpath(pairs_folder), out)  # the same data by another name
    with pytest.raises(
        InputError, match=rf"--out {out} holds labels by pixels .*\(other rows, captions, images\): name"
    ):
        made(pairs_folder, out, "--split=validation")
    assert out.read_bytes() == before
    assert made(pairs_folder, tmp_path / "validation.parquet", "--split=validation").num_rows == 24


@pytest.mark.parametrize("place", ["labels.parquet", "sub/labels.parquet"])
def test_labels_among_the_data_are_refused(pairs_folder, monkeypatch, place):
    """Where they would be read as pairs."""
    monkeypatch.chdir(pairs_folder)
    with pytest.raises(InputError, match=rf"{place} would lie among the data in \. and be read with them"):
        made(".", place)


def test_another_margin_over_a_damaged_label_file(pairs_folder, tmp_path):
    out = tmp_path / "labels.parquet"
    made(pairs_folder, out)
    table = pq.read_table(out)
    for damaged, message in (
        (table.slice(0, 2), "has 2 rows, the data 120: remove it"),
        (table.drop_columns(["score_1"]), "is damaged .*: remove it to score"),
        (table.set_column(1, "score_0", pa.array(["x"] * 120)), "is damaged .*: remove it to score"),
        (table.set_column(1, "score_0", table["score_1"]), r"is damaged \(sha256\): remove it to score"),
    ):
        pq.write_table(damaged, out)
        with pytest.raises(InputError, match=f"{out} {message}"):
            made(pairs_folder, out, "--margin=0.6")


def test_another_margin_needs_no_new_scores(pairs_folder, tmp_path, monkeypatch):
    plain = made(pairs_folder, tmp_path / "labels.parquet")
    wide = made(pairs_folder, tmp_path / "wide.parquet", "--margin=0.6")
    monkeypatch.setattr(module, "score_rows", None)  # cannot be called
    again = made(pairs_folder, tmp_path / "labels.parquet", "--margin=0.6")
    assert again.equals(wide, check_metadata=True) and not again.equals(plain)


def test_columns_that_hold_no_images_are_refused(tmp_path):
    columns = {"caption": ["a"], "jpg_0": [b""], "jpg_1": [1]}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data" / "train.parquet")
    with pytest.raises(InputError, match=r"\(train\): column jpg_1 holds int64, but must hold encoded images"):
        made(tmp_path / "data", tmp_path / "labels.parquet")


def test_a_file_that_is_no_label_file_is_not_written_over(pairs_folder, tmp_path):
    path = tmp_path / "train.parquet"
    shutil.copy(pairs_folder / "train.parquet", path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"train\.parquet is there already and is not a label file: name another one"):
        made(pairs_folder, path)
    assert path.read_bytes() == before


def test_scores_of_a_run_that_was_cut_off_are_reused(pairs_folder, tmp_path, monkeypatch):
    whole = made(pairs_folder, tmp_path / "whole.parquet")
    score_rows, asked = module.score_rows, []

    def cut(rows, *arguments, **options):
        for number, row in enumerate(score_rows(rows, *arguments, **options)):
            if number == 41:  # between the images of a pair
                raise KeyboardInterrupt
            yield row

    def count(rows, *arguments, **options):
        return score_rows((asked.append(row) or row for row in rows), *arguments, **options)

    monkeypatch.setattr(module, "score_rows", cut)
    with pytest.raises(KeyboardInterrupt):
        made(pairs_folder, tmp_path / "cut.parquet")
    assert not (tmp_path / "cut.parquet").exists()
    with (tmp_path / "cut.parquet.scores.jsonl").open("a") as file:
        file.write("[0.5, 0.")
    monkeypatch.setattr(module, "score_rows", count)
    assert made(pairs_folder, tmp_path / "cut.parquet").equals(whole)
    assert len(asked) == 2 * (120 - 20)


def test_rows_with_unreadable_images_are_named_and_count_as_ties(pairs_folder, tmp_path, capsys):
    rows = pq.read_table(pairs_folder / "train.parquet").to_pylist()[:4]
    rows[1]["jpg_1"], rows[2]["jpg_0"] = b"no image", None
    data, out = tmp_path / "data", tmp_path / "labels" / "labels.parquet"
    data.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), data / "train.parquet")
    for _ in range(2):  # run again, it stops again
        with pytest.raises(
            InputError, match=r"2 rows have unreadable .* --max_unreadable_images 1; the last: image jpg_0 of row 2 "
        ):
            made(data, out, "--max_unreadable_images=1")
    table = made(data, out, "--batch_size=2")  # goes on at row 2
    said = capsys.readouterr().err
    for name in ("jpg_1 of row 1", "jpg_0 of row 2"):
        assert f"image {name} cannot be scored: cannot identify image file {name}" in said
    assert table["label_0"].to_pylist()[1:3] == [0.5, 0.5]
    assert [table[name].to_pylist().index(None) for name in ("score_0", "score_1")] == [2, 1]
    whole = made(pairs_folder, tmp_path / "whole.parquet")
    for name in ("score_0", "score_1", "label_0"):
        assert [table[name].to_pylist()[i] for i in (0, 3)] == [whole[name].to_pylist()[i] for i in (0, 3)]
    assert made(data, out, "--margin=1")["score_1"].to_pylist()[1] is None


def test_rows_without_images_and_captions_that_cannot_be_scored_are_found_before_any_is(
    pairs_folder, tmp_path, monkeypatch
):
    def score_rows(*_, **__):
        raise AssertionError("no image is to be scored")

    monkeypatch.setattr(module, "score_rows", score_rows)
    rows = pq.read_table(pairs_folder / "train.parquet").to_pylist()
    for name, last, flag, message in (
        ("image", {"jpg_1": b""}, "--max_unreadable_images=0", r"row 119: jpg_1 is empty; 1 such row\(s\) in all"),
        ("caption", {"caption": "a cat"}, "--margin=0", r"'a cat' is not a caption of the tiny pictures"),
    ):
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist([*rows[:-1], rows[-1] | last]), tmp_path / name / "train.parquet")
        with pytest.raises(InputError, match=message):
            made(tmp_path / name, tmp_path / f"{name}.parquet", flag)


# Training on them


def config(folder, **options):
    return TrainConfig(pretrained_model_name_or_path="base", train_data_dir=str(folder), **options)


def test_training_reads_the_file_in_place_of_the_datas_labels(pairs_folder, tmp_path):
    out = tmp_path / "labels.parquet"
    made(pairs_folder, out)
    pairs, notes = load_pairs(config(pairs_folder, labels_file=str(out)), "train")
    scores = expected_scores(pairs_folder)
    decided = np.flatnonzero(scores[:, 0] != scores[:, 1])
    assert pairs.rows.tolist() == decided.tolist()
    assert pairs.first_won.tolist() == (scores[decided, 0] > scores[decided, 1]).tolist()
    assert any(str(out) in note for note in notes)
    images = (np.asarray(pairs.load(i, 2)[0][0]) for i in range(len(pairs)))
    winners = [pictures.score(image, caption) for image, (caption,) in zip(images, pairs.captions(), strict=True)]
    assert winners == scores[decided].max(1).tolist()
    own, _ = load_pairs(config(pairs_folder), "train")
    assert own.rows.tolist() != pairs.rows.tolist()
    held_out, _ = load_pairs(config(pairs_folder, labels_file=str(out)), "validation")  # its own labels
    assert held_out.first_won.tolist() == load_pairs(config(pairs_folder), "validation")[0].first_won.tolist()


def test_data_without_labels_can_be_labelled(pairs_folder, tmp_path):
    table = pq.read_table(pairs_folder / "train.parquet").drop_columns(["label_0"])
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "train.parquet")
    made(tmp_path / "data", tmp_path / "labels.parquet")
    assert len(load_pairs(config(tmp_path / "data", labels_file=str(tmp_path / "labels.parquet")), "train")[0])


def test_label_files_of_other_data_or_none_are_refused(pairs_folder, tmp_path):
    out = tmp_path / "labels.parquet"
    made(pairs_folder, tmp_path / "validation.parquet", "--split=validation")
    with pytest.raises(InputError, match=r"labels of 24 rows, but .* has 120 rows"):
        load_pairs(config(pairs_folder, labels_file=str(tmp_path / "validation.parquet")), "train")
    (tmp_path / "text.parquet").write_text("no parquet")
    pq.write_table(pa.table({"score": [1.0] * 120}), tmp_path / "other.parquet")
    for name in ("text", "other"):
        path = tmp_path / f"{name}.parquet"
        with pytest.raises(InputError, match=f"cannot read labels from {path}"):
            load_pairs(config(pairs_folder, labels_file=str(path)), "train")
    made(pairs_folder, out)
    (tmp_path / "turned").mkdir()
    table = pq.read_table(pairs_folder / "train.parquet")
    pq.write_table(table.take(list(range(119, -1, -1))), tmp_path / "turned" / "train.parquet")
    with pytest.raises(InputError, match=r"labels\.parquet was made for other captions, or another order of them"):
        load_pairs(config(tmp_path / "turned", labels_file=str(out)), "train")
    names = {"jpg_0": "jpg_1", "jpg_1": "jpg_0"}
    exchanged = table.rename_columns([names.get(name, name) for name in table.column_names])
    pq.write_table(exchanged, tmp_path / "turned" / "train.parquet")
    with pytest.raises(InputError, match=r"labels\.parquet was made for other images than"):
        load_pairs(config(tmp_path / "turned", labels_file=str(out)), "train")


def test_single_images_need_no_labels(pairs_folder, tmp_path):
    rows = pq.read_table(pairs_folder / "train.parquet").to_pylist()[:4]
    (tmp_path / "data").mkdir()
    table = pa.table({"caption": [row["caption"] for row in rows], "image": [row["jpg_0"] for row in rows]})
    pq.write_table(table, tmp_path / "data" / "train.parquet")
    with pytest.raises(InputError, match="single images, which need no labels"):
        load_pairs(config(tmp_path / "data", sft=True, labels_file=str(tmp_path / "data" / "train.parquet")), "train")
    with pytest.raises(InputError, match="column jpg_0, jpg_1 missing"):
        relabel(RelabelConfig(train_data_dir=str(tmp_path / "data"), metric="pixels", out=str(tmp_path / "l.parquet")))


@pytest.mark.parametrize("method", ["diffusion-dpo", "sft"])
def test_train_labels_at_the_start_and_once(bases, pairs_folder, tmp_path, monkeypatch, method):
    flags = [
        f"--pretrained_model_name_or_path={bases['sd15', 'epsilon']}", f"--train_data_dir={pairs_folder}",
        "--resolution=32", "--train_batch_size=2", "--lr_warmup_steps=1", "--mixed_precision=no", "--seed=7",
        "--report_to=none", f"--output_dir={tmp_path}", f"--train_method={method}", "--checkpointing_steps=1",
    ]  # fmt: skip
    chosen = ["--choice_model=pixels", "--choice_margin=0.1"]
    train.main([*flags, *chosen, "--max_train_steps=1"])
    labels = np.array(pq.read_table(tmp_path / "labels_pixels.parquet")["label_0"])
    scores = expected_scores(pairs_folder)
    gaps = scores[:, 0] - scores[:, 1]
    assert labels.tolist() == np.where(np.abs(gaps) <= 0.1, 0.5, gaps > 0).tolist()
    plan = json.loads((tmp_path / "config.json").read_text())["plan"]
    assert plan["pairs"] == (np.abs(gaps) > 0.1).sum()
    monkeypatch.setattr(module, "score_rows", None)  # resuming scores nothing
    train.main([*flags, *chosen, "--max_train_steps=2"])
    assert (tmp_path / "checkpoint-2").is_dir()


def test_a_choice_model_is_asked_for_what_train_was_told():
    data = {"dataset_name": "me/pairs", "dataset_config_name": "small", "split": "extra", "caption_column": "text"}
    data |= {"cache_dir": "models", "max_unreadable_images": 7}
    choice = {"choice_model": "hps", "choice_margin": 0.25, "choice_weights": "hpsv2.checkpoint=a.pt,clip.checkpoint=b"}
    config = TrainConfig(pretrained_model_name_or_path="base", output_dir="run", **data, **choice)
    assert RelabelConfig.of(config) == RelabelConfig(
        **data, metric="hps", margin=0.25, weights=["hpsv2.checkpoint=a.pt", "clip.checkpoint=b"],
        out="run/labels_hps.parquet",
    )  # fmt: skip


def test_what_scores_are_made_from_tells_weights_apart(tmp_path):
    data = {"train_data_dir": str(as_parquet(tmp_path / "pairs", make_rows())), "metric": "clip"}
    configs = [{}, {"weights": ["clip.checkpoint=a.pt"]}, {"weights": ["clip.checkpoint=b.pt"]}]
    made_from = []
    for config in (RelabelConfig(**data, **more) for more in configs):
        made_from.append(describe_scores(config, read_table(RelabelConfig(**data), "train")))
    assert all(a != b for i, a in enumerate(made_from) for b in made_from[:i])

    kept = tmp_path / "kept.jsonl"
    kept.write_text(f"{json.dumps(made_from[0])}\n[0.5, 0.25]\n")
    assert read_kept(kept, made_from[0]) == [[0.5, 0.25]]
    for other in made_from[1:]:
        with pytest.raises(InputError, match=r"kept.jsonl does not hold scores of these pairs by this model: name"):
            read_kept(kept, other)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--dreamlike_pairs_only", "column model_0 missing: drop --dreamlike_pairs_only"),
        ("--validation_pairs=9000", "--validation_pairs 9000 leaves nothing of 120 rows to train on"),
        ("--validation_data_dir={pairs_folder}", "holds the pairs trained on: name another folder"),
    ],
)
def test_data_that_will_be_refused_are_refused_before_hours_of_scoring(
    pairs_folder, tmp_path, monkeypatch, flags, message
):
    monkeypatch.setattr(module, "score_rows", None)  # cannot be called
    command = ["--pretrained_model_name_or_path=base", f"--train_data_dir={pairs_folder}", "--choice_model=pixels"]
    config = parse_flags(
        TrainConfig, "", "", [*command, f"--output_dir={tmp_path}", flags.format(pairs_folder=pairs_folder)]
    )
    with pytest.raises(InputError, match=message):
        prepare_pairs(config, 0)


@pytest.mark.parametrize(
    "flags, message",
    {
        ("--metric=clip", "--weights=clip.checkpoint=/nowhere.pt"): "nowhere.pt",
        ("--metric=pixels", "--device=cuda:7"): "--device cuda:7 cannot be used",
        ("--metric=pixels", "--out={tmp_path}/file/labels.parquet"): r"--out .*labels.parquet cannot be written: name",
        ("--metric=pixels", "--out={tmp_path}/file"): r"file is there already and is not a label file",
    }.items(),
)
def test_flags_are_refused_before_data_are_read(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(module, "read_table", None)  # cannot be called
    (tmp_path / "file").touch()
    command = ["--train_data_dir=data", f"--out={tmp_path}/labels.parquet"]
    with pytest.raises(InputError, match=message):
        module.main([*command, *(flag.replace("{tmp_path}", str(tmp_path)) for flag in flags)])


def test_images_are_scored_for_the_first_of_several_captions(tmp_path):
    folder = as_parquet(tmp_path / "pairs", make_rows([1.0, 1.0], caption=lambda i: [f"first {i}", f"second {i}"]))
    table = read_table(RelabelConfig(train_data_dir=str(folder), metric="clip"), "train")
    images = [(image.getvalue(), prompt) for image, prompt in iterate_images(table, "caption", 0)]
    assert images == [(solid(colour(i)), f"first {i}") for i in range(2) for colour in (winner, loser)]


def test_labels_are_scored_with_the_weights_given(pairs_folder, tmp_path, monkeypatch):
    def load_scorers(names, sources):
        raise InputError(f"{names} {sources}")

    monkeypatch.setattr(module, "load_scorers", load_scorers)
    flags = [f"--train_data_dir={pairs_folder}", "--metric=hps", "--weights=hpsv2.checkpoint=a/b:a.pt"]
    with pytest.raises(InputError, match=r"^\['hpsv2'\] {'hpsv2.checkpoint': 'a/b:a.pt'}$"):
        module.main([*flags, f"--out={tmp_path / 'labels.parquet'}"])


def test_labels_that_changed_since_they_were_written_are_refused(pairs_folder, tmp_path):
    table = made(pairs_folder, tmp_path / "l.parquet")
    labels = table["label_0"].to_pylist()
    other = table.set_column(table.column_names.index("label_0"), "label_0", [[1 - label for label in labels]])
    pq.write_table(other, tmp_path / "other.parquet")
    captions = [row["caption"] for row in pq.read_table(pairs_folder / "train.parquet").to_pylist()]
    assert read_label_file(tmp_path / "l.parquet", captions, "data").tolist() == labels
    with pytest.raises(InputError, match=r"other.parquet does not hold what .*relabel wrote \(sha256\): make it again"):
        read_label_file(tmp_path / "other.parquet", captions, "data")
    pq.write_table(other.replace_schema_metadata({}), tmp_path / "other.parquet")
    assert read_label_file(tmp_path / "other.parquet", captions, "data").tolist() == [1 - label for label in labels]
