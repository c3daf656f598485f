"""Pairs from every source, batches that depend on (seed, step, position) alone, and images that cannot be read."""

import csv
import errno
import fnmatch
import io
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from colours import as_parquet, loser, make_rows, solid, winner
from hub import serving
from PIL import Image, UnidentifiedImageError
from torchvision import transforms

import sdpo.data
import sdpo.rng
import train
from sdpo import images, tables
from sdpo.batch import collate
from sdpo.cache import ImageRows
from sdpo.command import InputError
from sdpo.config import Plan, TrainConfig
from sdpo.data import PairDataset, Transform, deal_out, train_batches
from sdpo.families import StableDiffusion
from sdpo.images import decode
from sdpo.inputs import make_inputs
from sdpo.pairs import Pairs, describe_size, draw_subset, load_pairs, prepare_pairs, split_by_prompt

ROOT = Path(__file__).parents[1]

DECIDED = (0, 1, 3, 4, 5)
LATENT = (4, 8, 8)


def table(rows=None):
    return datasets.Dataset.from_list(rows or make_rows())


def as_arrow(folder):
    folder.mkdir(parents=True)
    with datasets.arrow_writer.ArrowWriter(path=str(folder / "train.arrow")) as writer:
        writer.write_table(table().data.table)
        writer.finalize()
    return folder


def as_dataset(folder):
    table().save_to_disk(folder)
    return folder


def as_images(folder):
    columns = table().cast_column("jpg_0", datasets.Image()).cast_column("jpg_1", datasets.Image())
    columns.save_to_disk(folder)
    return folder


def as_dataset_dict(folder):
    datasets.DatasetDict(train=table(), validation=table(make_rows((1.0,)))).save_to_disk(folder)
    return folder


def by_outcome():
    """The decided pairs as columns of caption, winner and loser."""
    images = {"winner": [solid(winner(i)) for i in DECIDED], "loser": [solid(loser(i)) for i in DECIDED]}
    return datasets.Dataset.from_dict({"caption": [f"caption {i}" for i in DECIDED], **images})


def as_parquet_by_outcome(folder):
    folder.mkdir(parents=True)
    by_outcome().to_parquet(folder / "train.parquet")
    return folder


def as_images_by_outcome(folder):
    columns = by_outcome().cast_column("winner", datasets.Image()).cast_column("loser", datasets.Image())
    columns.save_to_disk(folder)
    return folder


def write_images(folder):
    """Records of caption, winner, loser beside their images."""
    (folder / "images").mkdir(parents=True)
    records = []
    for i in DECIDED:
        names = {role: f"images/{i}-{role}.png" for role in ("winner", "loser")}
        for role, colour in (("winner", winner(i)), ("loser", loser(i))):
            (folder / names[role]).write_bytes(solid(colour))
        records.append({"caption": f"caption {i}", **names})
    return records


def as_jsonl(folder, change=None):
    """A JSONL file; `change` edits the list of records."""
    records = write_images(folder)
    if change:
        change(records)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def as_jsonl_file(folder):
    return as_jsonl(folder) / "pairs.jsonl"


def as_csv(folder):
    records = write_images(folder)
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("caption", "winner", "loser"))
        writer.writeheader()
        writer.writerows(records)
    return folder


def settings(source, **changes):
    """A config whose caches stay beside the data."""
    source = str(source)
    named = {} if "dataset_name" in changes else {"train_data_dir": source}
    return TrainConfig(pretrained_model_name_or_path="unused", cache_dir=f"{source}-cache", **named | changes)


def load(source, **changes):
    return load_pairs(settings(source, **changes), changes.get("split", "train"))


def contents(pairs):
    """[(caption, winner's colour, loser's colour)]."""
    found = []
    for index in range(len(pairs)):
        images, (caption,) = pairs.load(index, 2)
        found.append((caption, *(image.getpixel((3, 3)) for image in images)))
    return found


def in_memory(count=10, caption=lambda i: f"caption {i}", **changes):
    """Pairs without files, the labels alternating."""
    rows = make_rows([float(i % 2) for i in range(count)], caption=caption, **changes)
    return Pairs(table(rows), np.arange(count), np.arange(count) % 2 == 1, ("jpg_0", "jpg_1"), "caption", "memory")


def samples(pairs=None, transform=Transform(8), seed=0, stream="train", global_batch=8, **options):  # noqa: B008
    return PairDataset(pairs or in_memory(), transform, LATENT, seed, stream, global_batch, **options)


def loaded(dataset, processes=1, accumulation=4, batch=2, workers=0, first_step=0, steps=3):
    """{(step, position): everything the ranks' loaders give for that place}."""
    options = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_train_steps": steps}
    config = settings("unused", dataloader_num_workers=workers, **options)
    plan = Plan.of(config, processes, len(dataset.pairs))
    found = {}
    for rank in range(processes):
        batches = train_batches(config, dataset, plan, rank, first_step)
        for places, got in zip(deal_out(plan, rank, first_step), batches, strict=True):
            members = {name: getattr(got, name).unflatten(0, (2, batch)) for name in ("pixels", "posterior_noise")}
            for i, place in enumerate(places):
                assert place not in found, f"{place} was loaded twice"
                found[place] = {
                    **{name: value[:, i] for name, value in members.items()},
                    "noise": got.noise[i],
                    "input_noise": None if got.input_noise is None else got.input_noise[i],
                    "uniform": got.uniform[i],
                    "caption": got.captions[i],
                }
    return found


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for place, sample in expected.items():
        for name, value in sample.items():
            same = torch.equal(got[place][name], value) if torch.is_tensor(value) else got[place][name] == value
            assert same, f"{name} differs at {place}"


class StubFamily:
    """Stands in for a base model: records the pixels, and noises zero latents by adding the noise."""

    def encode_moments(self, pixels):
        self.pixels = pixels

    def encode_texts(self, captions):
        return captions

    def sample_posterior(self, moments, noise):
        return torch.zeros_like(noise)

    def timesteps(self, uniform):
        return (uniform * 1000).long()

    def add_noise(self, latents, noise, timesteps, perturbed):
        return latents + (noise if perturbed is None else perturbed), noise

    def image_size(self, latent_size):
        return 8 * latent_size

    def condition(self, captions, resolution):
        return {"lengths": torch.tensor([[len(caption)] for caption in captions])}


# Reading

WRITERS = (
    as_parquet, as_arrow, as_dataset, as_images, as_dataset_dict, as_parquet_by_outcome, as_images_by_outcome, as_jsonl,
    as_jsonl_file, as_csv,
)  # fmt: skip


@pytest.mark.parametrize("write", WRITERS)
def test_every_source_gives_the_labelled_winner(write, tmp_path):
    pairs, _ = load(write(tmp_path / "pairs"))
    assert contents(pairs) == [(f"caption {i}", winner(i), loser(i)) for i in DECIDED]
    assert pairs.captions() == [[f"caption {i}"] for i in DECIDED]


@pytest.mark.parametrize(
    "name, message",
    {
        "jpg_0": "column jpg_1, label_0 missing .*rename columns",
        "label_0": "winner and loser say which image won, and so does label_0",
    }.items(),
)
def test_columns_of_both_kinds_are_not_mixed(tmp_path, name, message):
    folder = as_parquet_by_outcome(tmp_path / "pairs")
    by_outcome().add_column(name, [1.0] * len(DECIDED)).to_parquet(folder / "train.parquet")
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.mark.parametrize("write", (as_parquet, as_dataset_dict, as_jsonl))
def test_dataset_name_may_be_a_folder(write, tmp_path):
    folder = write(tmp_path / "pairs")
    pairs, _ = load(folder, dataset_name=str(folder))
    assert contents(pairs) == [(f"caption {i}", winner(i), loser(i)) for i in DECIDED]


def test_images_are_rgb_whatever_their_mode(tmp_path):
    def palette_and_alpha(records):
        for record in records:
            for role, mode in (("winner", "RGBA"), ("loser", "P")):
                path = tmp_path / "pairs" / record[role]
                Image.open(path).convert(mode).save(path)

    pairs, _ = load(as_jsonl(tmp_path / "pairs", palette_and_alpha))
    assert {image.mode for index in range(5) for image in pairs.load(index, 2)[0]} == {"RGB"}
    assert pairs.load(0, 2)[0][0].getpixel((0, 0)) == winner(0)


def test_sixteen_bits_are_scaled_to_eight():
    ramp = Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16))
    for name in ("PNG", "TIFF"):
        image = decode(in_format(ramp, name, quality=None))
        assert image.mode == "RGB" and np.array_equal(np.asarray(image)[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (Image.fromarray(np.ones((8, 8), np.float32)), "mode F have no known range: save"),
        (Image.fromarray(np.ones((8, 8), np.int32)), "mode I have no known range: save"),
        (Image.new("L", (1, 101)), "1 x 101 pixels: one side is over 100 times the other"),
        (Image.new("L", (60_000, 1)), "60000 x 1 pixels"),
    ],
)
def test_pictures_that_cannot_be_shown_are_refused(picture, said):
    with pytest.raises(ValueError, match=said):
        decode(in_format(picture, "TIFF", quality=None))


def in_format(image, name, quality=95):
    buffer = io.BytesIO()
    image.save(buffer, name, **({"quality": quality} if quality else {}))
    return buffer.getvalue()


def waves(width, height):
    """A picture without fine detail, so that reducing it early or late makes little difference."""
    y, x = np.mgrid[:height, :width] / 40
    return Image.fromarray((127 + 60 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "least", "decoded"),
    [
        ((256, 192), 0, (256, 192)),
        ((256, 192), 97, (256, 192)),
        ((256, 192), 96, (128, 96)),
        ((192, 256), 48, (48, 64)),
        ((200, 100), 12, (25, 13)),
    ],
)
def test_jpegs_are_reduced_to_no_less_than_what_training_needs(size, least, decoded):
    picture = waves(*size)
    image = decode(in_format(picture, "JPEG"), least)
    assert (image.mode, image.size) == ("RGB", decoded)
    assert decode(in_format(picture, "PNG"), least).size == size
    exact, reduced = (np.asarray(whole.resize((12, 12)), float) for whole in (picture, image))
    assert np.abs(exact - reduced).max() < 8  # of 120 between light and dark


def test_draft_decoding_reduces_the_images_of_a_run(tmp_path):
    folder = as_jsonl(tmp_path / "pairs")
    for path in folder.glob("**/*.png"):
        path.write_bytes(in_format(waves(64, 64), "JPEG"))
    for flags, side in (({}, 64), ({"draft_decoding": True}, 16)):
        pairs, _ = load(folder, resolution=16, **flags)
        assert {image.size for image in pairs.select(np.arange(3)).load(2, 2)[0]} == {(side, side)}


def test_csv_as_spreadsheets_write_it(tmp_path):
    folder = as_csv(tmp_path / "pairs")
    text = (folder / "pairs.csv").read_text()
    (folder / "pairs.csv").write_text(text, encoding="utf-8-sig")  # with a byte order mark
    assert load(folder)[0].captions() == [[f"caption {i}"] for i in DECIDED]


def test_only_the_needed_split_of_a_folder_is_read(tmp_path):
    folder = as_parquet(tmp_path / "pairs")
    (folder / "validation.parquet").write_bytes(b"PAR1 this is no parquet file")
    assert len(load(folder)[0]) == 5
    with pytest.raises(InputError):
        load(folder, split="validation")


def test_only_the_needed_split_of_a_saved_dataset_dict_is_read(tmp_path):
    folder = as_dataset_dict(tmp_path / "pairs")
    for file in (folder / "validation").iterdir():
        file.write_bytes(b"broken")
    assert len(load(folder)[0]) == 5


@pytest.mark.parametrize("write", (as_parquet, as_dataset_dict))
def test_the_named_split_is_read(write, tmp_path):
    folder = write(tmp_path / "pairs")
    if write is as_parquet:
        as_parquet(folder, make_rows((1.0,)), "validation")
    pairs, _ = load(folder, split="validation")
    assert contents(pairs) == [("caption 0", winner(0), loser(0))]


def test_ties_are_dropped_and_counted(tmp_path):
    labels = (0.5, 1.0, 0.5, 0.0, 0.5)
    pairs, notes = load(as_parquet(tmp_path / "any-name", make_rows(labels)))
    assert contents(pairs) == [(f"caption {i}", winner(i), loser(i)) for i in (1, 3)]
    assert "dropped 3 ties" in notes


def test_dreamlike_pairs(tmp_path):
    dream, other = "dreamlike-art/dreamlike-photoreal-2.0", "stabilityai/stable-diffusion-2-1"
    models = ((dream, dream), (dream, other), (dream, dream), (other, dream), (other, other), (dream, dream))
    rows = make_rows(model_0=lambda i: models[i][0], model_1=lambda i: models[i][1])
    pairs, notes = load(as_parquet(tmp_path / "pairs", rows), dreamlike_pairs_only=True)
    assert pairs.captions() == [["caption 0"], ["caption 5"]]  # row 2 is a tie
    assert any("dropped 3 " in note and "dreamlike" in note for note in notes)


def test_labels_as_text_mean_what_they_say(tmp_path):
    pairs, _ = load(as_parquet(tmp_path / "pairs", make_rows((1.0, 0.0), label_0=lambda i: ("1", "0")[i])))
    assert contents(pairs) == [(f"caption {i}", winner(i), loser(i)) for i in (0, 1)]


@pytest.mark.parametrize(
    "place, words", [("pairs-cache/x", "as --cache_dir"), ("pairs/train.parquet", "look at the files there")]
)
def test_what_may_not_be_read_or_written_is_named(tmp_path, monkeypatch, place, words):
    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "no", str(tmp_path / place))

    as_parquet(tmp_path / "pairs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=words):
        load("pairs")


def test_labels_that_number_classes_are_refused(tmp_path):
    """Classes are numbered in the order of their names, whatever these say."""
    data = table(make_rows((1.0, 0.0), label_0=lambda i: ("jpg_0", "jpg_1")[i])).class_encode_column("label_0")
    data.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"column label_0 numbers classes \(jpg_0, jpg_1\): write 1 \(jpg_0 won\)"):
        load(tmp_path)


def test_a_parquet_file_that_was_edited_is_read_again_whatever_its_time(tmp_path):
    for labels in ((1.0, 0.0), (0.0, 1.0), (1.0, 0.0, 1.0)):
        as_parquet(tmp_path, make_rows(labels))
        os.utime(tmp_path / "train.parquet", (10**9, 10**9))
        assert load(tmp_path)[0].first_won.tolist() == [label == 1 for label in labels]
    sizes = set()
    for caption in ("a red cat", "a red dog"):
        as_parquet(tmp_path, make_rows((1.0,), caption=lambda i, caption=caption: caption))
        os.utime(tmp_path / "train.parquet", (10**9, 10**9))
        sizes.add((tmp_path / "train.parquet").stat().st_size)
        assert load(tmp_path)[0].captions() == [[caption]]
    assert len(sizes) == 1


def test_the_row_at_a_place_is_that_of_its_sample():
    pairs = in_memory(9).select(np.array([1, 4, 5, 8]))
    for stream in ("train", "held-out"):
        dataset = samples(pairs, stream=stream, global_batch=2)
        assert all(dataset[0, place]["caption"] == f"caption {dataset.row((0, place))}" for place in range(4))


def test_the_working_directory_is_a_folder_like_others(tmp_path, monkeypatch):
    monkeypatch.chdir(as_parquet(tmp_path / "pairs"))
    assert contents(load(".")[0]) == contents(load(tmp_path / "pairs")[0])


def test_files_of_others_start_no_program(tmp_path, monkeypatch):
    """Pillow would hand PostScript to Ghostscript."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    with pytest.raises(UnidentifiedImageError):
        decode(script)
    assert not (tmp_path / "ran").exists()


def test_max_train_samples(tmp_path):
    folder = as_parquet(tmp_path / "pairs", make_rows([1.0] * 20))

    def drawn(seed, count):
        pairs, _, _ = prepare_pairs(settings(folder, max_train_samples=count), seed)
        return [caption for (caption,) in pairs.captions()]

    subsets = [tuple(drawn(seed, 5)) for seed in range(4)]
    assert all(len(set(subset)) == 5 for subset in subsets)
    assert len(set(subsets)) > 1
    assert tuple(drawn(0, 5)) == subsets[0]
    assert len(drawn(0, 20)) == len(drawn(0, 21)) == 20


def test_caption_column(tmp_path):
    rows = make_rows(prompt=lambda i: f"prompt {i}")
    pairs, _ = load(as_parquet(tmp_path / "pairs", rows), caption_column="prompt")
    assert pairs.captions() == [[f"prompt {i}"] for i in DECIDED]


def test_list_captions_are_drawn_for_training_and_fixed_for_held_out_pairs(tmp_path):
    rows = make_rows((1.0, 0.0), caption=lambda i: [f"{i} short", f"{i} long"])
    pairs, _ = load(as_parquet(tmp_path / "pairs", rows))
    drawn = Counter(samples(pairs)[step, 0]["caption"] for step in range(60))
    assert drawn.keys() == {"0 short", "0 long", "1 short", "1 long"}
    for seed in range(5):
        fixed = samples(pairs, stream="held-out", seed=seed)
        assert [fixed[0, position]["caption"] for position in range(2)] == ["0 short", "1 short"]


def test_sft_takes_winners_of_pairs_and_single_images(tmp_path):
    pairs, _ = load(as_parquet(tmp_path / "pairs"), train_method="sft")
    assert [pairs.load(index, 1)[0][0].getpixel((0, 0)) for index in range(5)] == [winner(i) for i in DECIDED]
    rows = [{"picture": solid(loser(i)), "caption": f"caption {i}"} for i in range(3)]
    single, _ = load(as_parquet(tmp_path / "single", rows), sft=True, image_column="picture")
    batch = collate([samples(single, members=1, stream="held-out")[0, i] for i in range(3)])
    assert batch.pixels[:, :, 0, 0].tolist() == [list(loser(i)) for i in range(3)]
    assert batch.captions == [f"caption {i}" for i in range(3)]
    assert batch.posterior_noise.shape == (3, *LATENT)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_sft_takes_a_folder_of_images_with_captions(tmp_path, ending):
    records = write_images(tmp_path / "images")
    for record in records:
        record["file_name"] = record.pop("winner")
        del record["loser"]
    lines = [json.dumps(record) for record in records]
    if ending == "csv":
        lines = ["file_name,caption", *(f"{record['file_name']},{record['caption']}" for record in records)]
    (tmp_path / "images" / f"metadata.{ending}").write_text("\n".join(lines) + "\n")
    for path in (tmp_path / "images").rglob("*-loser.png"):
        path.unlink()
    pairs, _ = load(tmp_path / "images", sft=True)
    shown = {pairs.captions()[i][0]: pairs.load(i, 1)[0][0].getpixel((0, 0)) for i in range(len(pairs))}
    assert shown == {f"caption {i}": winner(i) for i in DECIDED}
    with pytest.raises(InputError, match="column jpg_0, jpg_1, label_0 missing"):
        load(tmp_path / "images")


def test_held_out_pairs_come_from_another_split_or_folder(tmp_path):
    folder = as_parquet(tmp_path / "pairs")
    as_parquet(folder, make_rows((1.0, 0.0, 1.0), caption=lambda i: f"other {i}"), "validation")
    everything = {f"other {i}" for i in range(3)}
    elsewhere = as_parquet(tmp_path / "more", make_rows((0.0,), caption=lambda i: "elsewhere"))
    for changes, expected in (
        ({"validation_split": "validation"}, everything),
        ({"validation_data_dir": str(elsewhere)}, {"elsewhere"}),
        ({"validation_data_dir": str(folder), "validation_split": "validation"}, everything),
    ):
        pairs, held_out, _ = prepare_pairs(settings(folder, **changes), 0)
        assert pairs.captions() == [[f"caption {i}"] for i in DECIDED]
        assert captions_of(held_out) == expected
    _, held_out, _ = prepare_pairs(settings(folder, validation_split="validation", validation_pairs=2), 0)
    assert len(captions_of(held_out) & everything) == len(held_out) == 2


def test_empty_captions_and_pairs_of_one_image_are_counted(tmp_path):
    rows = make_rows([1.0, 0.0] * 50, caption=lambda i: "" if i < 3 else f"caption {i}")
    folder = as_parquet(
        tmp_path / "pairs", [row | {"jpg_1": row["jpg_0"]} if i % 2 else row for i, row in enumerate(rows)]
    )
    notes = prepare_pairs(settings(folder), 0)[2]
    assert f"CAUTION: 3 of 100 captions in {folder} (train) are empty" in notes
    assert f"CAUTION: in 33 of 64 pairs looked at in {folder} (train), jpg_0 and jpg_1 are one image" in notes[-1]
    assert not any("CAUTION" in note for note in prepare_pairs(settings(as_parquet(tmp_path / "good")), 0)[2])


def test_held_out_captions_that_are_trained_on_are_counted(tmp_path):
    folder = as_parquet(tmp_path / "pairs")
    as_parquet(folder, make_rows((1.0, 0.0), caption=lambda i: f"{('caption', 'other')[i]} {DECIDED[0]}"), "validation")
    notes = prepare_pairs(settings(folder, validation_split="validation"), 0)[2]
    assert notes[-1] == "CAUTION: 1 of them have captions of pairs that are trained on"
    as_parquet(folder, make_rows((1.0,), caption=lambda i: f"Caption  {DECIDED[0]} "), "validation")  # as CLIP reads it
    notes = prepare_pairs(settings(folder, validation_split="validation"), 0)[2]
    assert notes[-1] == "CAUTION: 1 of them have captions of pairs that are trained on"


def test_runs_of_any_seed_are_measured_on_the_same_pairs(tmp_path):
    folder = as_parquet(tmp_path / "pairs", make_rows([1.0] * 40))
    held_out = [
        prepare_pairs(settings(folder, validation_pairs=5, validation_seed=own), seed)[1].rows.tolist()
        for own, seed in ((0, 1), (0, 2), (3, 1))
    ]
    assert held_out[0] == held_out[1] != held_out[2]


# Transforms


@pytest.mark.parametrize("size", ((40, 24), (24, 41), (31, 17), (16, 16), (10, 13)))
def test_pixels_are_those_of_torchvision(size):
    """What the VAE gets, in [-1, 1], against ToTensor and Normalize on the same uint8 values: only float rounding."""
    noise = np.random.default_rng(0).integers(0, 256, (2, size[1], size[0], 3), dtype=np.uint8)
    images = [Image.fromarray(array) for array in noise]
    rng = np.random.default_rng(0)
    sample = samples()[0, 0] | {"pixels": Transform(16)(images, rng, rng)}
    family = StubFamily()
    make_inputs(family, collate([sample]))
    steps = (
        transforms.Resize(16),
        transforms.CenterCrop(16),
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5]),
    )
    expected = torch.stack([transforms.Compose(steps)(image) for image in images])
    torch.testing.assert_close(family.pixels, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "transform, share",
    (
        (Transform(8, flip=True), {(a, b): 0.25 for a in (0, 1) for b in (0, 1)}),
        (Transform(8, flip=True, shared_flip=True), {(0, 0): 0.5, (1, 1): 0.5}),
        (Transform(8), {(0, 0): 1.0}),
    ),
)
def test_flips(transform, share):
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, 4:] = 255
    images, rng = [Image.fromarray(half)] * 2, np.random.default_rng(0)
    seen = Counter()
    for _ in range(400):
        pixels = transform(images, rng, rng)
        upright, mirrored = torch.from_numpy(half).permute(2, 0, 1), torch.from_numpy(half).permute(2, 0, 1).flip(-1)
        assert all(torch.equal(x, upright) or torch.equal(x, mirrored) for x in pixels)
        seen[tuple(int(torch.equal(x, mirrored)) for x in pixels)] += 1
    assert seen.keys() == share.keys()
    assert all(abs(seen[key] / 400 - expected) < 0.1 for key, expected in share.items())  # 4 standard deviations


@pytest.mark.parametrize("size", ((20, 8), (8, 20)))
def test_random_crops_are_inside_and_reach_every_place(size):
    width, height = size
    y, x = np.mgrid[1 : height + 1, 1 : width + 1].astype(np.uint8)  # from 1: padding would show as 0
    image, rng = Image.fromarray(np.stack([x, y, x], -1)), np.random.default_rng(0)
    corners = set()
    for _ in range(300):
        (crop,) = Transform(8, random_crop=True)([image], rng, rng).int()
        left, top = int(crop[0, 0, 0]), int(crop[1, 0, 0])
        assert torch.equal(crop[0], torch.arange(left, left + 8).expand(8, 8).int())
        assert torch.equal(crop[1], torch.arange(top, top + 8)[:, None].expand(8, 8).int())
        corners.add(left + top - 1)
    assert corners == set(range(1, 14))


# Batches


def test_samples_do_not_depend_on_workers_or_on_how_the_batch_is_split():
    transform = Transform(6, random_crop=True, flip=True)
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)) for _ in range(20)]

    def png(image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    pairs = in_memory(jpg_0=lambda i: png(noise[2 * i]), jpg_1=lambda i: png(noise[2 * i + 1]))
    dataset = samples(pairs, transform, empty_captions=0.2)
    expected = loaded(dataset)
    assert expected.keys() == {(step, position) for step in range(3) for position in range(8)}
    assert_same(loaded(dataset, workers=2), expected)
    for processes, accumulation, batch in ((2, 2, 2), (4, 1, 2), (1, 1, 8), (1, 8, 1), (2, 1, 4)):
        assert_same(loaded(dataset, processes, accumulation, batch), expected)
    tail = {place: sample for place, sample in expected.items() if place[0] >= 2}
    assert_same(loaded(dataset, first_step=2), tail)
    assert_same(loaded(dataset, 2, 2, first_step=2), tail)


def test_both_members_share_caption_noise_and_timestep():
    batch = collate([samples(input_perturbation=0.3)[0, position] for position in range(5)])
    inputs = make_inputs(StubFamily(), batch)
    for value in (inputs.noisy, inputs.timesteps, inputs.target, *inputs.conditioning.values()):
        of_winners, of_losers = value.unflatten(0, (2, 5))
        assert torch.equal(of_winners, of_losers)
    assert torch.equal(inputs.noisy[:5], batch.input_noise)
    assert torch.equal(inputs.target[:5], batch.noise)
    assert torch.equal(inputs.timesteps[:5], (batch.uniform * 1000).long())
    assert batch.pixels[:5, 0].min() >= 100 and batch.pixels[5:, 1].min() >= 100  # winners first


def test_each_member_gets_its_own_pairs_caption():
    dataset = samples(in_memory(4, caption=lambda i: "x" * (i + 1)), stream="held-out")
    batch = collate([dataset[0, position] for position in range(4)])
    lengths = make_inputs(StubFamily(), batch).conditioning["lengths"]
    assert lengths.flatten().tolist() == [1, 2, 3, 4, 1, 2, 3, 4]  # winners, then losers


@pytest.mark.parametrize("name", ("noise", "posterior_noise", "uniform"))
def test_other_steps_positions_seeds_and_streams_draw_other_numbers(name):
    pairs = in_memory()
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 7), (7, 0)]
    datasets_ = [samples(pairs, seed=seed, stream=stream) for seed in (0, 1) for stream in ("train", "held-out")]
    values = [torch.as_tensor(dataset[place][name]) for dataset in datasets_ for place in places]
    assert len({tuple(value.flatten().tolist()) for value in values}) == len(values)


def test_every_draw_of_a_sample_has_a_stream_of_its_own(monkeypatch):
    used, original = [], sdpo.rng.draw
    for module in (sdpo.data, sdpo.rng):
        monkeypatch.setattr(module, "draw", lambda *key: used.append(key) or original(*key))
    samples(transform=Transform(6, random_crop=True, flip=True), noise_offset=0.1, input_perturbation=0.1)[3, 4]
    streams = [stream for _, stream, *position in used if position == [3, 4]]
    draws = ("caption", "crop", "flip", "noise", "offset", "perturbation", "posterior", "timestep")
    assert sorted(streams) == [f"train-{name}" for name in draws]


def test_the_noise_of_the_two_posteriors_differs():
    of_winner, of_loser = samples()[0, 0]["posterior_noise"]
    assert (of_winner != of_loser).all()


@pytest.mark.parametrize("global_batch", (1, 4, 8, 30))
def test_every_epoch_visits_every_pair_once(global_batch):
    dataset = samples(global_batch=global_batch)
    order = [dataset[divmod(place, global_batch)]["pixels"][0, 0, 0, 0].item() - 100 for place in range(30)]
    epochs = [order[:10], order[10:20], order[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = samples(seed=1)
    assert order != [other[divmod(place, 8)]["pixels"][0, 0, 0, 0].item() - 100 for place in range(30)]


def test_held_out_pairs_keep_their_order():
    dataset = samples(stream="held-out")
    assert [dataset[0, position]["caption"] for position in range(10)] == [f"caption {i}" for i in range(10)]


def test_share_of_empty_captions():
    dataset, empty = samples(empty_captions=0.2), 0
    for place in range(1500):
        sample = dataset[divmod(place, 8)]
        empty += sample["caption"] == ""
        assert sample["caption"] in ("", f"caption {sample['pixels'][0, 0, 0, 0].item() - 100}")
    assert abs(empty / 1500 - 0.2) < 4 * (0.2 * 0.8 / 1500) ** 0.5


def test_distribution_of_the_draws():
    dataset = samples(in_memory(2))
    drawn = [dataset[divmod(place, 8)] for place in range(256)]
    for name in ("noise", "posterior_noise"):
        values = torch.stack([sample[name] for sample in drawn]).double()
        assert abs(values.mean()) < 4 / values.numel() ** 0.5
        assert abs(values.var() - 1) < 4 * (2 / values.numel()) ** 0.5
    uniform = torch.tensor([sample["uniform"] for sample in drawn])
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 4 / (12 * 256) ** 0.5
    assert abs(uniform.var() - 1 / 12) < 4 * (1 / 180 / 256) ** 0.5


def test_the_largest_draw_gives_the_last_timestep():
    family = SimpleNamespace(scheduler=SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000)))
    batch = collate([samples()[0, 0] | {"uniform": value} for value in (0.0, 0.4999, float(np.nextafter(1, 0)))])
    assert StableDiffusion.timesteps(family, batch.uniform).tolist() == [0, 499, 999]


def test_noise_offset_and_input_perturbation():
    pairs, places = in_memory(2), [divmod(place, 8) for place in range(64)]
    plain, offset, perturbed = (
        [samples(pairs, **options)[place] for place in places]
        for options in ({}, {"noise_offset": 0.5}, {"input_perturbation": 0.3})
    )

    def stacked(name, drawn):
        return torch.stack([sample[name] for sample in drawn])

    noise = stacked("noise", plain)
    shift = (stacked("noise", offset) - noise) / 0.5  # (64, C, h, w), constant over h and w
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift), rtol=0, atol=1e-5)
    assert abs(shift[..., 0, 0].var() - 1) < 4 * (2 / 256) ** 0.5
    assert all(sample["input_noise"] is None for sample in (*plain, *offset))
    extra = (stacked("input_noise", perturbed) - noise) / 0.3
    assert torch.equal(stacked("noise", perturbed), noise)
    assert abs(extra.mean()) < 4 / extra.numel() ** 0.5
    assert abs(extra.var() - 1) < 4 * (2 / extra.numel()) ** 0.5
    assert abs((extra * noise).mean()) < 4 / extra.numel() ** 0.5


def test_the_noise_offset_differs_between_channels():
    plain, offset = (samples(in_memory(2), noise_offset=strength)[0, 0]["noise"] for strength in (0.0, 0.5))
    assert len((offset - plain)[:, 0, 0].round(decimals=3).unique()) == len(plain)


def test_flags_reach_the_samples():
    family = SimpleNamespace(latent_shape=lambda resolution: (4, resolution // 8, resolution // 8))
    plan = SimpleNamespace(global_batch=12)
    common = {"resolution": 64, "family": family, "seed": 5, "plan": plan, "reference_errors": None}
    changed = {
        "random_crop": True, "no_hflip": False, "shared_flip": True, "proportion_empty_prompts": 0.3, "noise_offset": 0.1,
        "input_perturbation": 0.2, "max_unreadable_images": 7,
    }  # fmt: skip

    def build(samples, **flags):
        return samples(SimpleNamespace(config=settings("pairs", **flags), **common), in_memory())

    training, holding_out = train.training_samples, train.held_out_samples
    trained, plain, held_out = build(training, **changed), build(training, no_hflip=True), build(holding_out, **changed)
    assert trained.transform == Transform(64, random_crop=True, flip=True, shared_flip=True)
    assert plain.transform == Transform(64) == held_out.transform
    names = ("empty_captions", "noise_offset", "input_perturbation", "max_unreadable", "members")
    assert [getattr(trained, name) for name in names] == [0.3, 0.1, 0.2, 7, 2]
    assert [getattr(held_out, name) for name in names] == [0.0, 0.0, 0.0, 7, 2]
    assert build(training, sft=True).members == 1
    assert {(d.global_batch, d.latent_shape) for d in (trained, held_out)} == {(12, (4, 8, 8))}
    assert (trained.seed, held_out.seed, build(holding_out, validation_seed=3).seed) == (5, 0, 3)


# Held-out pairs


def caption_lists(seed, count, vocabulary, longest):
    rng = np.random.default_rng(seed)
    return [
        [f"word {i}" for i in rng.choice(vocabulary, rng.integers(1, longest + 1), replace=False)] for _ in range(count)
    ]


def captions_of(pairs):
    return {caption for options in pairs.captions() for caption in options}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("held_out", (1, 7, 30))
def test_split_by_prompt(held_out, seed):
    captions = [options[0] for options in caption_lists(seed, 80, 25, 1)]
    pairs = in_memory(80, lambda i: captions[i], jpg_0=lambda i: b"", jpg_1=lambda i: b"")
    training, chosen = split_by_prompt(pairs, held_out, seed)
    assert len(chosen) == held_out
    assert not captions_of(training) & captions_of(chosen)
    assert len(training) == sum(caption not in captions_of(chosen) for caption in captions)
    assert all(captions[row] not in captions_of(training) for row in chosen.rows)
    assert len({*training.rows, *chosen.rows}) == len(training) + len(chosen)
    again = split_by_prompt(pairs, held_out, seed)
    assert all((a.rows == b.rows).all() for a, b in zip(again, (training, chosen), strict=True))
    assert {*split_by_prompt(pairs, held_out, seed + 1)[1].rows} != {*chosen.rows}


@pytest.mark.parametrize("seed", range(4))
def test_split_by_prompt_with_lists_of_captions(seed):
    captions = caption_lists(seed, 60, 100, 3)
    pairs = in_memory(60, lambda i: captions[i], jpg_0=lambda i: b"", jpg_1=lambda i: b"")
    training, chosen = split_by_prompt(pairs, 5, seed)
    assert len(chosen) == 5
    assert len({*training.rows, *chosen.rows}) == len(training) + len(chosen)
    assert not captions_of(training) & captions_of(chosen)


def test_captions_that_a_text_encoder_does_not_tell_apart_are_on_one_side():
    captions = [text for i in range(20) for text in (f"a cat {i}", f"A  Cat {i}", f" a CAT\n{i} ")]
    pairs = in_memory(60, lambda i: captions[i], jpg_0=lambda i: b"", jpg_1=lambda i: b"")
    training, chosen = split_by_prompt(pairs, 2, 0)
    assert len(training) == 54 and not {row // 3 for row in training.rows} & {row // 3 for row in chosen.rows}


@pytest.mark.parametrize("seed", range(3))
def test_held_out_pairs_have_captions_of_their_own_while_few_others_are_lost(seed):
    rng = np.random.default_rng(seed)
    sizes = np.concatenate([[300, 200, 100], rng.integers(1, 20, 197)])  # a few captions have most pairs
    captions = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    pairs = in_memory(len(captions), lambda i: f"caption {captions[i]}", jpg_0=lambda i: b"", jpg_1=lambda i: b"")
    for held_out, at_least in ((10, 10), (100, 15)):  # of 100 captions there would be half of the pairs
        training, chosen = split_by_prompt(pairs, held_out, seed)
        counts = Counter(captions[chosen.rows])
        assert len(chosen) == held_out and len(counts) >= at_least
        assert len(training) >= len(pairs) - max(held_out, 0.1 * len(pairs)) - max(sizes)
        spare = Counter(captions[np.isin(captions, list(counts))]) - counts  # a second pair only where all have one
        assert all(counts[caption] >= max(counts.values()) - 1 for caption in spare)


def test_selected_pairs_keep_their_winners(tmp_path):
    folder = as_parquet(tmp_path / "pairs", make_rows((1.0, 0.0, 0.0, 0.5) * 5))
    training, held_out, _ = prepare_pairs(settings(folder, validation_pairs=5, max_train_samples=7), 0)
    assert (len(training), len(held_out)) == (7, 5)
    for caption, *colours in contents(training) + contents(held_out):
        i = int(caption.removeprefix("caption "))
        assert colours == [winner(i), loser(i)]


def test_pairs_left_out_of_both_sides_are_counted(tmp_path):
    folder = as_parquet(tmp_path / "pairs", make_rows([1.0] * 12, caption=lambda i: f"caption {i // 4}"))
    training, held_out, notes = prepare_pairs(settings(folder, validation_pairs=3), 0)
    assert (len(training), len(held_out)) == (8, 3)
    assert any("held out 3 pairs of " in note and "(1 more" in note for note in notes)


def test_a_pair_file_is_held_out_whatever_the_split_to_train_on(tmp_path):
    folder, files = as_parquet(tmp_path / "pairs", split="test"), as_jsonl(tmp_path / "files")
    _, held_out, _ = prepare_pairs(settings(folder, split="test", validation_data_dir=str(files)), 0)
    assert held_out.captions() == [[f"caption {i}"] for i in DECIDED]


# What cannot be read (what is refused: test_bad_input.py)


@pytest.mark.parametrize("value", (b"no image", b"", solid(winner(0), (64, 64))[:-60], None), ids=repr)
def test_unreadable_images_are_replaced_and_reported(value):
    pairs = in_memory(jpg_1=lambda i: value if i == 3 else solid(loser(i) if i % 2 else winner(i)))
    batch = collate([samples(pairs, stream="held-out", global_batch=10)[0, position] for position in range(10)])
    (report,) = set(batch.unreadable)
    assert "memory" in report and "row 3: jpg_1: " in report and " at 0x" not in report
    captions = [f"caption {i}" for i in range(10)]
    assert batch.captions[3] in captions[:3] + captions[4:]
    assert [*batch.captions[:3], *batch.captions[4:]] == captions[:3] + captions[4:]
    shown = int(batch.captions[3].removeprefix("caption "))
    assert tuple(batch.pixels[3, :, 0, 0].tolist()) == winner(shown)
    assert tuple(batch.pixels[13, :, 0, 0].tolist()) == loser(shown)


def test_a_parquet_file_that_was_cut_off_is_named(tmp_path):
    folder = as_parquet(tmp_path / "pairs", split="train-0")
    path = as_parquet(folder, split="train-1") / "train-1.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=f"{path} is damaged, or not what .*: replace or remove it"):
        load(folder)
    whole = pq.read_table(folder / "train-0.parquet")
    pq.write_table(whole.slice(0, 0), path)
    with pytest.raises(InputError, match=f"{path} has no rows: replace or remove it"):
        load(folder)
    pq.write_table(whole, path, compression="none")
    path.write_bytes(b"PAR1" + bytes(60) + path.read_bytes()[64:])
    with pytest.raises(InputError, match=f"{path} is damaged, or"):  # in the middle of its data
        load(folder)
    pq.write_table(whole.append_column("caption", whole["caption"]), path)
    with pytest.raises(InputError, match=f"{path} has more than one column caption: keep one"):
        load(folder)
    pq.write_table(whole.append_column("score", whole["label_0"]), path)
    with pytest.raises(InputError, match=f"{path} has another column score than {folder / 'train-0.parquet'}: write"):
        load(folder)


def test_an_arrow_file_that_was_cut_off_is_named(tmp_path):
    path = as_arrow(tmp_path / "pairs") / "train.arrow"
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(InputError, match=f"{path} has no end, so it may be cut off: fetch or write it again"):
        load(path.parent)
    path.write_bytes(b"ARROW1" + path.read_bytes())
    with pytest.raises(InputError, match=f"{path} is damaged, or not what its name says .*: replace or remove it"):
        load(path.parent)


@pytest.mark.parametrize("saved", [True, False])
def test_an_arrow_file_that_was_cut_off_between_two_batches_is_named(tmp_path, saved):
    """Arrow itself takes what is left for the whole."""
    path = (as_dataset if saved else as_arrow)(tmp_path / "pairs") / (
        "data-00000-of-00001.arrow" if saved else "train.arrow"
    )
    rows, sink = pa.ipc.open_stream(path.read_bytes()).read_all(), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows[:2])
        middle = sink.tell()
        writer.write_table(rows[2:])
    content = sink.getvalue().to_pybytes()
    path.write_bytes(content)
    assert len(load(path.parent)) == len(load(as_parquet(tmp_path / "same")))
    path.write_bytes(content[:middle])
    assert pa.ipc.open_stream(path.read_bytes()).read_all().num_rows == 2
    with pytest.raises(InputError, match=f"{path} has no end, so it may be cut off: fetch or write it again"):
        load(path.parent)


def test_a_copy_that_was_cut_off_is_named(tmp_path):
    """As a loss of power may leave it."""
    folder = as_parquet(tmp_path / "pairs")
    load(folder)
    (copy,) = tmp_path.rglob("*.arrow")
    copy.write_bytes(copy.read_bytes()[:-8])
    assert pa.ipc.open_stream(copy.read_bytes()).read_all().num_rows == len(make_rows())  # Arrow misses nothing
    with pytest.raises(InputError, match=f"{copy} has no end, so it may be cut off: .* or delete it if it is a copy"):
        load(folder)


def test_saved_data_that_list_fewer_files_than_they_were_written_as_are_pointed_out(tmp_path, caplog):
    rows = make_rows((1.0, 0.0) * 4)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=3)
    assert len(load(tmp_path / "saved")[0]) == 8 and "are there" not in caplog.text
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    del state["_data_files"][1]
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    assert len(load(tmp_path / "saved")[0]) == 5
    assert "data-*-of-00003 only 2 files are there" in caplog.text


def test_files_that_are_not_read_are_named(tmp_path, caplog):
    as_parquet(tmp_path, split="train-00000-of-00003-b66ac786bf6fb553")
    as_parquet(tmp_path, split="test-00000-of-00001")
    load(tmp_path)
    assert f"of {tmp_path}/train-*-of-00003 only 1 files are there" in caplog.text and "not read" not in caplog.text
    (tmp_path / "train-00001-of-00003.parquet").symlink_to("none")
    (tmp_path / ".hidden.parquet").touch()
    as_parquet(tmp_path, split="more")
    load(tmp_path)
    assert f"2 files in {tmp_path} are not read, the first {tmp_path / 'more.parquet'}: by their" in caplog.text


def test_shards_beside_a_pair_file_are_named(tmp_path, caplog):
    folder = as_parquet(as_jsonl(tmp_path / "pairs"))
    load(folder / "pairs.jsonl")
    assert "CAUTION" not in caplog.text
    load(folder)
    assert f"{folder / 'pairs.jsonl'} is read, and 1 Parquet or Arrow files beside it are not, the first" in caplog.text


def test_images_of_several_types_are_refused(tmp_path):
    """The library would make the second file's paths bytes."""
    as_parquet(tmp_path, split="train-0")
    as_parquet(tmp_path, [row | {"jpg_1": "b.png"} for row in make_rows()], split="train-1")
    with pytest.raises(InputError, match=r"jpg_1 has several types \(binary in .*train-0.parquet, string in .*train-1"):
        load(tmp_path)


def test_labels_of_several_types_are_refused(tmp_path):
    """The library would make the second file's labels those of the first: true, where they are 0.5."""
    as_parquet(tmp_path, [row | {"label_0": bool(row["label_0"])} for row in make_rows()], split="train-0")
    as_parquet(tmp_path, split="train-1")
    with pytest.raises(InputError, match=r"label_0 has several types \(bool in .*train-0.parquet, double in .*train-1"):
        load(tmp_path)
    as_parquet(tmp_path, [row | {"label_0": int(row["label_0"])} for row in make_rows()], split="train-0")
    as_parquet(tmp_path, [row | {"label_0": float(round(row["label_0"]))} for row in make_rows()], split="train-1")
    won = load(tmp_path)[0].first_won  # of values that are the same numbers in either type
    labels = [row["label_0"] for row in make_rows()]
    assert won.tolist() == [int(label) == 1 for label in labels] + [round(label) == 1 for label in labels]


def test_folders_whose_names_are_patterns_are_refused(tmp_path):
    for name in ("run?", "run[1]", "a::b"):
        with pytest.raises(
            InputError,
            match=r"datasets takes \*, \?, \[, \] and :: in its path for patterns, and no line breaks; rename it",
        ):
            load(as_parquet(tmp_path / name))


@pytest.mark.parametrize(
    "code, words",
    [(errno.ENOSPC, "name a folder that can be written, with room, as --cache_dir"), (0, "or delete their copy")],
)
def test_a_copy_that_cannot_be_made_is_not_the_datas_fault(tmp_path, monkeypatch, code, words):
    def fail(*_, **__):
        raise OSError(code, "no") if code else ValueError("no way")

    folder = as_parquet(tmp_path / "pairs")
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=words):
        load(folder)


def test_much_data_is_copied_with_a_word(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, tables.__name__)
    load(as_parquet(tmp_path))
    assert "makes a copy" not in caplog.text
    monkeypatch.setattr(tables, "LARGE_COPY", 0)
    bar, shown, read = datasets.utils.logging.is_progress_bar_enabled, [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: shown.append(bar()) or read(*given, **more))
    load(tmp_path)
    assert "of which datasets makes a copy in" in caplog.text
    assert shown == [True] and not bar()


def test_images_of_which_only_the_path_is_given_must_exist(tmp_path):
    path = tmp_path / "there.png"
    path.write_bytes(solid(winner(0)))
    for make in (str, lambda path: {"bytes": None, "path": str(path)}):
        folder = tmp_path / make.__name__.strip("<>")
        as_parquet(folder, make_rows(jpg_1=lambda i, make=make: make(path if i != 4 else tmp_path / "gone.png")))
        with pytest.raises(InputError, match=r"row 4: jpg_1 .*gone.png is not a file; 1 such row\(s\) in all"):
            prepare_pairs(settings(folder, max_unreadable_images=0), seed=0)


def test_records_without_an_image_are_refused(tmp_path):
    as_parquet(tmp_path, make_rows(jpg_0=lambda i: {"data": solid(winner(i))}))
    with pytest.raises(InputError, match=r"column jpg_0 holds .*, but must hold encoded images"):
        load(tmp_path)


@pytest.mark.parametrize("empty", [None, {"bytes": None, "path": None}])
@pytest.mark.parametrize("name", ["jpg_0", "jpg_1"])
def test_rows_without_an_image_are_counted_before_training(tmp_path, name, empty):
    whole = (lambda i: solid(winner(i))) if empty is None else (lambda i: {"bytes": solid(winner(i)), "path": None})
    as_parquet(tmp_path, make_rows(**{name: lambda i: whole(i) if i < 3 else empty}))
    message = rf"row 3: {name} is empty; 3 such row\(s\) in all, more than --max_unreadable_images 2"
    with pytest.raises(InputError, match=message):
        prepare_pairs(settings(tmp_path, max_unreadable_images=2), seed=0)
    assert len(prepare_pairs(settings(tmp_path, max_unreadable_images=3), seed=0)[0]) == 5
    prepare_pairs(settings(tmp_path, max_unreadable_images=2, max_train_samples=2), seed=0)  # which never sees three


def test_captions_that_are_not_text_are_named(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(np.int32([0, 1, 2])), pa.py_buffer(b"a\xff")])
    whole = pa.Table.from_pylist(make_rows()[:2])
    pq.write_table(whole.set_column(whole.column_names.index("caption"), "caption", broken), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="row 1: caption is not UTF-8 text"):
        load(tmp_path)


def test_a_saved_table_with_a_format_is_read_like_one_without(tmp_path):
    folder = as_parquet(tmp_path / "pairs")
    table = load(folder)[0].table
    table.with_format("pandas", columns=["caption"]).save_to_disk(tmp_path / "saved")
    pairs, plain = (load(place)[0] for place in (tmp_path / "saved", folder))
    assert pairs.captions() == plain.captions() and (pairs.first_won == plain.first_won).all()
    assert pairs.load(0, 2)[0][0].size == plain.load(0, 2)[0][0].size


def test_an_unreadable_image_file_is_named(tmp_path):
    folder = as_jsonl(tmp_path / "pairs")
    (folder / "images/3-loser.png").write_bytes(b"no image")
    dataset = samples(load(folder)[0], stream="held-out")
    reports = [dataset[0, position]["unreadable"] for position in range(5)]
    assert [bool(texts) for texts in reports] == [False, False, True, False, False]
    assert str(folder / "images/3-loser.png") in reports[2][0]


def test_replacements_are_the_same_for_any_split_of_the_batch():
    dataset = samples(in_memory(jpg_0=lambda i: b"no image" if i % 3 == 0 else solid((i, i, i))))
    assert_same(loaded(dataset, 2, 2), loaded(dataset))


@pytest.mark.parametrize("limit", (0, 3))
def test_only_unreadable_images(limit):
    pairs = in_memory(jpg_0=lambda i: b"no image")
    with pytest.raises(InputError, match=r"memory row .*check the data") as error:
        samples(pairs, max_unreadable=limit)[0, 0]
    assert str(error.value).startswith(
        f"no readable pair in {limit + 1} draw(s), more than --max_unreadable_images {limit}; "
    )


@pytest.mark.parametrize(
    "fault", [OSError(errno.EMFILE, "Too many open files"), MemoryError()], ids=["files", "memory"]
)
def test_a_fault_of_the_machine_is_not_the_images(monkeypatch, fault):
    """Another pair would be trained on for ever where a cache notes it."""

    def fail(*_):
        raise fault

    pairs = in_memory()
    monkeypatch.setattr(images, "decode", fail)
    expected = InputError if isinstance(fault, OSError) else MemoryError
    for read in (lambda: samples(pairs)[0, 0], lambda: ImageRows(pairs, 16)[0]):
        with pytest.raises(expected) as error:
            read()
        assert expected is MemoryError or "jpg_0 cannot be read now (Too many open files)" in str(error.value)


def test_only_unreadable_images_in_a_worker():
    dataset = samples(in_memory(jpg_0=lambda i: b"no image"), max_unreadable=2)
    with pytest.raises(InputError, match="memory row") as error:
        loaded(dataset, workers=1)
    assert "Traceback" not in str(error.value)


READ_FROM_HUB = """
from sdpo.config import TrainConfig
from sdpo.pairs import prepare_pairs

config = TrainConfig(pretrained_model_name_or_path="unused", dataset_name="me/pairs")
print(len(prepare_pairs(config, 0)[0]), prepare_pairs(config, 0)[0].fingerprint())
"""


def test_a_data_set_of_the_hub_is_read_again_where_the_hub_is_out_of_reach(tmp_path, pairs_folder):
    """Of the hub, the split's own files are fetched alone."""

    def read(**changes):
        run = [sys.executable, "-c", READ_FROM_HUB]
        environment = os.environ | {"HF_HOME": str(tmp_path)} | changes
        result = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout, "CAUTION: me/pairs cannot be looked up" in result.stderr

    with serving(pairs_folder, "me/pairs") as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        first, cautioned = read(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
    assert first.startswith("116 ") and not cautioned
    assert read(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1") == (first, True)
    assert [file for file in server.fetched if file.endswith(".parquet")] == ["train.parquet"]
    assert len(list(tmp_path.rglob("*.arrow"))) == 1


def test_captions_of_their_own_leave_all_other_pairs_to_train_on_in_their_order():
    pairs = in_memory(30)
    training, held_out = split_by_prompt(pairs, 12, 0)
    assert sorted([*training.rows, *held_out.rows]) == list(range(30))
    for part in (training, held_out, draw_subset(training, 9, 0, "max-train-samples")):
        assert (np.diff(part.rows) > 0).all()


def test_pairs_of_one_caption_are_said_to_give_no_standard_errors():
    alike = describe_size(in_memory(4, caption=lambda i: ("a cat", " A  Cat")[i % 2]))
    assert alike == "4 pairs of 1 caption, so without standard errors"
    assert describe_size(in_memory(4, caption=lambda i: ("a cat", "a dog")[i % 2])) == "4 pairs of 2 captions"


def test_fingerprints_tell_rows_of_the_same_captions_apart():
    pairs = in_memory(8, caption=lambda i: "the same")
    prints = [pairs.select(np.array(rows)).fingerprint() for rows in ([0, 2], [2, 4], [0, 2], [0, 3])]
    assert prints[0] == prints[2] and len(set(prints)) == 3


def test_a_label_file_is_of_the_training_data_alone(tmp_path):
    folder, other = (as_parquet(tmp_path / name, make_rows([1.0] * 4)) for name in ("pairs", "more"))
    pq.write_table(pa.table({"label_0": [0.0] * 4}), tmp_path / "labels.parquet")
    config = settings(folder, labels_file=str(tmp_path / "labels.parquet"), validation_data_dir=str(other))
    training, held_out, notes = prepare_pairs(config, 0)
    assert any("their winners are the data's own, those of training are from" in note for note in notes)
    assert contents(training) == [(f"caption {i}", loser(i), winner(i)) for i in range(4)]
    assert contents(held_out) == [(f"caption {i}", winner(i), loser(i)) for i in range(4)]


def test_files_of_the_hub_are_fetched_by_name_and_at_the_revision_looked_up(monkeypatch):
    asked = {}
    place = SimpleNamespace(
        repo_id="me/pairs", repo_type="dataset", revision="c0ffee", path_in_repo="data[1]/a.parquet"
    )
    monkeypatch.setattr(tables, "HfFileSystem", lambda: SimpleNamespace(resolve_path=lambda file: place))
    monkeypatch.setattr(
        tables, "snapshot_download", lambda repo, **options: asked.update(options, repo=repo) or "/here"
    )
    files = tables.fetch_files(["hf://datasets/me/pairs@c0ffee/data[1]/a.parquet"], "cache")
    assert files == ["/here/data[1]/a.parquet"]
    (pattern,) = asked.pop("allow_patterns")
    assert fnmatch.fnmatch(place.path_in_repo, pattern) and not fnmatch.fnmatch("data1/a.parquet", pattern)
    assert asked == {"repo": "me/pairs", "repo_type": "dataset", "revision": "c0ffee", "cache_dir": "cache"}


def test_splits_and_configs_of_the_hub_are_remembered_apart(tmp_path, monkeypatch):
    calls = [
        ("me/pairs", None, "train"),
        ("me/pairs", "small", "train"),
        ("me/pairs", None, "test"),
        ("me/more", None, "train"),
    ]
    local = {
        f"hf://{name}-{config}-{split}": str(
            as_parquet(tmp_path / str(n), make_rows([1.0] * (n + 1))) / "train.parquet"
        )
        for n, (name, config, split) in enumerate(calls)
    }

    def look_up(source, name, cache_dir):
        files = {split: [f"hf://{source}-{name}-{split}"] for split in ("train", "test")}
        return SimpleNamespace(name="parquet", config=SimpleNamespace(data_files=files))

    def refuse(*given, **options):
        raise ConnectionError("out of reach")

    monkeypatch.setattr(tables, "fetch_files", lambda files, cache_dir: [local[file] for file in files])
    for builder in (look_up, refuse):
        monkeypatch.setattr(datasets, "load_dataset_builder", builder)
        found = [len(tables.read_split(*call, str(tmp_path / "cache"))) for call in calls]
        assert found == [1, 2, 3, 4]
