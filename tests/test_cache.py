"""The latent cache: the same training as without it, whole after any interruption, refused when it does not fit."""

import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator, PartialState
from diffusers import AutoencoderKL, UNet2DConditionModel
from forks import finish, run_script, start
from recording import change_part, run_on_ranks, set_up
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import train
from sdpo import cache
from sdpo.batch import collate
from sdpo.cache import refuse_unreadable
from sdpo.command import InputError
from sdpo.data import PairDataset, Transform
from sdpo.families import load_family
from sdpo.hub import hash_part
from sdpo.inputs import make_inputs
from sdpo.metrics import read_metrics
from sdpo.pairs import Pairs, prepare_pairs
from sdpo.shards import Shards, hash_header, is_intact, read_about, refuse_changes
from sdpo.stopping import StopRequest
from sdpo.tiny import pictures
from sdpo.tiny.make_pairs import encode

UNREADABLE = 5  # row with a broken winner; in the next one the loser is broken


@pytest.fixture
def data(pairs_folder, tmp_path):
    """40 training pairs, some with lists of captions, two of them unreadable, and 10 held-out ones."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split, count in (("train", 40), ("validation", 10)):
        rows = pq.read_table(pairs_folder / f"{split}.parquet").slice(0, count).to_pylist()
        for i, row in enumerate(rows):
            row["caption"] = [row["caption"], f"{row['caption']} again", ""][: 1 + i % 3]
        if split == "train":
            rows[UNREADABLE] |= {"jpg_0": b"no image", "label_0": 1.0}
            rows[UNREADABLE + 1] |= {"jpg_0": b"no image", "label_0": 0.0}
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


@pytest.fixture
def flags(arguments, data, tmp_path):
    """Flags of a short run on a cache that does not exist yet."""

    def build(*more, family="sd15", cached=True):
        places = [f"--train_data_dir={data}", "--validation_split=validation", f"--cache_dir={tmp_path / 'hub'}"]
        places += [f"--latent_cache={tmp_path / 'cache'}"] * cached
        return arguments(*places, "--lr_warmup_steps=0", *more, family=family)

    return build


def parse(arguments):
    return cache.parse_flags(cache.CacheConfig, "", "", arguments)


def open_cache(arguments):
    """(pairs, held-out pairs) of the cache that the flags describe, made if need be."""
    config = parse(arguments)
    pairs, held_out, _ = prepare_pairs(config, config.seed or 0)
    return cache.open_cache(config, Accelerator(cpu=True), pairs, held_out)


def files(folder, pattern="*/*.safetensors"):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.glob(pattern))}


def cached_rows(folder):
    """Rows of the training images in a cache, by file."""
    found = {}
    for path in (folder / "images").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found[path.name] = json.loads(file.metadata()["about"])["names"]
    return found


# The same numbers


def make_both(arguments, mixed="no", stream="train"):
    """Inputs of the denoiser and batch of 48 samples, encoded on the fly and read from the cache."""
    config = parse(arguments)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[mixed]
    held = stream == "held-out"
    pairs = prepare_pairs(config, 7)[held]
    for encoders, source in ((True, pairs), (False, open_cache(arguments)[held])):
        family = load_family(**config.base, encoders=encoders).to(torch.device("cpu"), dtype)
        transform, options = Transform(32, flip=not held), {} if held else {"empty_captions": 0.2}
        dataset = PairDataset(source, transform, family.latent_shape(32), 7, stream, 48, **options)
        batch = collate([dataset[0, position] for position in range(len(pairs) if held else 48)])
        yield make_inputs(family, batch), batch


TOLERANCE = {"fp32": 1e-6, "bf16": 2**-8}  # of the largest value; the VAE rounds otherwise in another batch


@pytest.mark.parametrize("stream", ["train", "held-out"])
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_inputs_are_those_encoded_on_the_fly(flags, family, stored, stream):
    arguments = flags(f"--latent_cache_dtype={stored}", family=family)
    (fresh, batch), (cached, cached_batch) = make_both(arguments, stream=stream)
    assert cached_batch.captions == batch.captions
    assert cached_batch.unreadable == [re.sub(" at 0x[0-9a-f]+", "", report) for report in batch.unreadable]
    if stream == "train":
        assert {re.search(r"row (\d+):", report)[1] for report in batch.unreadable} == {"5", "6"}
        assert {"", "again"} < {text.split(" ")[-1] for text in batch.captions}
    assert torch.equal(cached.timesteps, fresh.timesteps) and torch.equal(cached.target, fresh.target)
    assert fresh.conditioning.keys() == cached.conditioning.keys()
    for name, value in fresh.conditioning.items() | {("noisy", fresh.noisy)}:
        other = cached.conditioning.get(name, cached.noisy)
        assert (other - value).abs().max() <= TOLERANCE[stored] * value.abs().max(), name


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_encoders_in_bf16_lose_nothing_in_a_cache_of_bf16(flags, family):
    """What they say is bf16 already; only the batch they see differs."""
    (fresh, _), (cached, _) = make_both(flags("--mixed_precision=bf16", family=family), "bf16")
    assert torch.equal(fresh.conditioning["encoder_hidden_states"], cached.conditioning["encoder_hidden_states"])
    assert torch.equal(fresh.noisy, cached.noisy)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("stored, tolerance", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_training_is_the_same_with_the_cache(flags, tmp_path, family, stored, tolerance):
    """Updates magnify what rounding leaves; the margin of the first one is 0 and its loss log 2 in any case."""
    for cached in (False, True):
        out = f"--output_dir={tmp_path / str(cached)}"
        train.main(flags(out, f"--latent_cache_dtype={stored}", "--validation_steps=3", family=family, cached=cached))
    for name in ("train_loss", "grad_norm", "model_mse_unaccumulated", "heldout/winner_error_change"):
        fresh, cached = (dict(read_metrics(tmp_path / str(cached), name)) for cached in (False, True))
        assert len(set(fresh.values())) >= 2
        assert list(cached.values()) == pytest.approx(list(fresh.values()), rel=tolerance, abs=1e-12), name


def test_both_orientations_are_stored(flags):
    """The first one is the picture's, the second its mirror image's."""
    arguments = flags("--latent_cache_dtype=fp32")
    config = parse(arguments)
    pairs, _, _ = prepare_pairs(config, 7)
    cached, _ = open_cache(arguments)
    family, differ = load_family(**config.base), 0
    for index in np.flatnonzero(pairs.rows > UNREADABLE + 1)[:10]:
        images, _ = pairs.load(index, 2)
        for image, (upright, flipped) in zip(images, cached.load(index, 2)[0], strict=True):
            pixels = Transform(32).crop_and_flip(image, mirrored=False)[None].float() / 127.5 - 1
            torch.testing.assert_close(upright, family.encode_moments(pixels)[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(flipped, family.encode_moments(pixels.flip(-1))[0], rtol=1e-4, atol=1e-5)
            differ += not torch.equal(upright, flipped)
    assert differ > 10


def test_encoders_are_not_loaded(flags, monkeypatch):
    """Neither to train nor to measure held-out pairs, once the cache is there."""
    open_cache(flags())

    def refuse(*args, **kwargs):
        raise AssertionError("an encoder was loaded")

    for cls in (AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection):
        monkeypatch.setattr(cls, "from_pretrained", refuse)
    run, dataset, held_out = set_up(flags())
    with StopRequest(run.accelerator) as request:
        train.train(run, dataset, held_out, request)
    assert run.step == 3 and run.family.text_encoders == []
    assert {parameter.device.type for parameter in run.family.vae.parameters()} == {"meta"}


def test_winners_and_single_images(flags, data, tmp_path):
    """sft reads the winners of pairs, and data without pairs."""
    winners, _ = open_cache(flags("--sft"))
    both, _ = open_cache(flags())
    assert torch.equal(winners.load(0, 1)[0][0], both.load(0, 2)[0][0])
    rows = [{"image": row["jpg_1"], "caption": "a circle"} for row in pq.read_table(data / "train.parquet").to_pylist()]
    (tmp_path / "single").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "single" / "train.parquet")
    given = [flag for flag in flags("--sft") if "validation" not in flag and "cache=" not in flag]
    train.main([*given, f"--train_data_dir={tmp_path / 'single'}", f"--latent_cache={tmp_path / 'other'}"])
    assert len(read_metrics(tmp_path / "run", "train_loss")) == 3


# Files


def test_files_are_bounded_and_mapped(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 20_000)
    pairs, _ = open_cache(flags())
    sizes = [path.stat().st_size for path in (tmp_path / "cache" / "images").glob("*.safetensors")]
    assert len(sizes) > 5 and max(sizes) < 21_000
    mapped = Path("/proc/self/maps")
    before = mapped.read_text().count(str(tmp_path / "cache" / "images"))
    pairs.load(0, 2)
    assert before == 0 and mapped.read_text().count(str(tmp_path / "cache" / "images")) == 1


def test_workers_and_other_processes_read_the_same(flags):
    config = parse(flags())
    pairs, _ = open_cache(flags())
    shape = load_family(**config.base, encoders=False).latent_shape(32)
    places = [[(0, i), (1, i)] for i in range(8)]
    batches = [
        list(DataLoader(PairDataset(source, Transform(32, flip=True), shape, 7, "train", 8), batch_sampler=places,
                        collate_fn=collate, num_workers=workers))
        for source, workers in ((pairs, 0), (pairs, 2), (pickle.loads(pickle.dumps(pairs)), 0))
    ]  # fmt: skip
    for one, *others in zip(*batches, strict=True):
        for other in others:
            assert torch.equal(one.moments, other.moments) and one.captions == other.captions
            assert all(torch.equal(one.texts[name], other.texts[name]) for name in one.texts)


def test_more_rows_are_added_to_those_there(flags, tmp_path):
    """Another seed draws other pairs; only those that are new are made."""
    open_cache(flags("--max_train_samples=10"))
    first = cached_rows(tmp_path / "cache")
    before = files(tmp_path / "cache", "images/*.safetensors")
    pairs, _ = open_cache(flags("--max_train_samples=10", "--seed=8"))
    rows = cached_rows(tmp_path / "cache")
    added = {row for name, names in rows.items() if name not in first for row in names}
    (there,) = map(set, first.values())
    assert added == set(pairs.rows.tolist()) - there and 0 < len(added) < 10
    assert before.items() <= files(tmp_path / "cache", "images/*.safetensors").items()
    fresh = f"--latent_cache={tmp_path / 'fresh'}"
    (one, captions), (other, same_captions) = (
        open_cache(flags("--max_train_samples=5", *where))[0].load(0, 2) for where in ([], [fresh])
    )
    assert captions == same_captions and all(map(torch.equal, one, other))


SCRIPT = """
import os, signal, sys
from sdpo import cache, command, shards

cache.SHARD_BYTES = 20_000
save, written = shards.save_file, []

def cut_off(tensors, path, about):
    if len(written) == int(sys.argv[1]):
        path.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path)
    save(tensors, path, about)

shards.save_file = cut_off
command.run_command(lambda: cache.main(sys.argv[2:]))
"""


@pytest.fixture
def script(tmp_path):
    """A script of the command in small files, killed after writing as many as its first argument says."""
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def test_a_killed_command_continues(flags, script, tmp_path, monkeypatch):
    log = tmp_path / "said.log"
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    assert finish([start(run_script, script, [4, *flags()], environment, log)]) == [-signal.SIGKILL]
    assert "GiB, in" in log.read_text() and "pair/s" in log.read_text()
    there = files(tmp_path / "cache")
    assert len(there) == 4
    code = finish([start(run_script, script, [-1, *flags("--verify")], environment, log)])
    assert code == [0], log.read_text()
    whole = files(tmp_path / "cache")
    assert there.items() < whole.items()
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(cache, "SHARD_BYTES", 20_000)
    open_cache(flags())
    assert files(tmp_path / "cache") == whole


def test_two_ranks_make_the_same_cache(flags, script, tmp_path, monkeypatch):
    run_on_ranks(2, script, ["-1", *flags("--verify")])
    made = files(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(cache, "SHARD_BYTES", 20_000)
    open_cache(flags())
    assert files(tmp_path / "cache") == made


def test_two_ranks_share_the_files(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "SHARD_BYTES", 100)
    work = cache.Work(Shards(tmp_path, {}), list(range(25)), None)

    def share(rank):
        accelerator = type("Rank", (), {"num_processes": 2, "process_index": rank})
        return work.share(10, accelerator)

    assert share(0) == [list(range(10)), list(range(20, 25))]
    assert share(1) == [list(range(10, 20)), []]


OTHER_ROWS = '{"names": [1, 2], "notes": {}, "sha256": "", "key": ""}'  # of a file with one row
ODD_ROWS = '{"names": [[1]], "notes": {}, "sha256": "", "key": ""}'


def test_damage_is_found(flags, tmp_path):
    cache.main(flags("--verify"))
    (path,) = (tmp_path / "cache" / "images").glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # noticed at every start, as is a file of others
    with pytest.raises(InputError, match=f"{path} is damaged"):
        cache.main(flags())
    for metadata in (None, {"about": "{"}, {"about": '{"names": []}'}, {"about": OTHER_ROWS}, {"about": ODD_ROWS}):
        save_file({"moments": torch.zeros(1)}, path, metadata)
        with pytest.raises(InputError, match=f"{path} is damaged"):
            cache.main(flags())
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])  # noticed when checksums are compared
    with pytest.raises(InputError, match=f"damaged: {path}; delete"):
        cache.main(flags("--verify"))
    path.unlink()
    cache.main(flags("--verify"))
    assert path.read_bytes() == whole
    index = tmp_path / "cache" / "captions" / "index.json"
    damages = [lambda text=text: index.write_text(text) for text in ("{", "[]", "{}", '{"key": 3}')]
    for damage in (*damages, index.unlink):
        damage()
        with pytest.raises(InputError, match=f"{index}.* delete {index.parent} to make it again"):
            cache.main(flags())


# What fits


def change_rows(data, change):
    rows = pq.read_table(data / "train.parquet").to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), data / "train.parquet")


def edit_caption(rows):
    rows[3]["caption"] = ["something else"]


def edit_image(rows):
    rows[3]["jpg_1"] = rows[3]["jpg_1"] + b"0"


STALE = {
    "VAE": (lambda base, data: change_part(base / "vae"), [], "images: VAE was"),
    "text encoder": (lambda base, data: change_part(base / "text_encoder"), [], "captions: text encoders was"),
    "tokenizer": (
        lambda base, data: (base / "tokenizer" / "special_tokens_map.json").write_text("{}"),
        [],
        "captions: text encoders was",
    ),
    "resolution": (None, ["--resolution=64"], "images: resolution was 32, is 64"),
    "stored": (None, ["--latent_cache_dtype=fp32"], "images: stored in was bf16, is fp32"),
    "computed": (None, ["--mixed_precision=bf16"], "images: computed in was float32, is bfloat16"),
    "flips": (None, [], "images: flips was False, is True"),
    "decoded": (None, ["--draft_decoding"], "images: JPEGs decoded was whole, is reduced"),
    "caption": (lambda base, data: change_rows(data, edit_caption), [], "images: captions of the data was"),
    "image": (lambda base, data: change_rows(data, edit_image), [], "images: image sizes of the data was"),
    "rows": (lambda base, data: change_rows(data, list.pop), [], "images: rows of the data was 40, is 39"),
}


@pytest.mark.parametrize("case", STALE)
def test_a_stale_cache_is_refused(case, flags, bases, data, tmp_path):
    shutil.copytree(bases["sd15", "epsilon"], tmp_path / "base")
    given = flags(f"--pretrained_model_name_or_path={tmp_path / 'base'}")
    open_cache([*given, "--no_hflip"] if case == "flips" else given)
    before = files(tmp_path / "cache", "*/*")
    change, more, message = STALE[case]
    if change:
        change(tmp_path / "base", data)
    with pytest.raises(InputError, match=message) as error:
        open_cache([*given, *more])
    assert "--latent_cache" in str(error.value) and "\n" not in str(error.value)
    assert files(tmp_path / "cache", "*/*") == before


def test_what_does_not_matter_is_not_refused(flags, bases, tmp_path):
    """Labels, seed, method, batch, a copy of the base elsewhere, and flips that are there but not used."""
    open_cache(flags())
    before = files(tmp_path / "cache")
    shutil.copytree(bases["sd15", "epsilon"], tmp_path / "copy")
    changes = ["--seed=9", "--sft", "--train_batch_size=1", "--no_hflip", "--proportion_empty_prompts=0"]
    pairs, _ = open_cache([*flags(*changes), f"--pretrained_model_name_or_path={tmp_path / 'copy'}"])
    assert pairs.load(0, 1) and files(tmp_path / "cache") == before


def test_a_choice_model_labels_the_pairs_for_the_cache_too(flags, tmp_path):
    cache.main(flags("--choice_model=pixels"))
    assert (tmp_path / "run" / "labels_pixels.parquet").is_file()
    before = files(tmp_path / "cache")
    train.main(flags("--choice_model=pixels", "--max_train_steps=1"))
    assert files(tmp_path / "cache") == before


def test_a_base_in_the_hubs_cache_has_the_fingerprint_of_its_files(bases, tmp_path):
    base = bases["sdxl", "epsilon"]
    commit = "0" * 40
    repository = tmp_path / "models--somebody--base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(base, repository / "snapshots" / commit)
    options = {"cache_dir": str(tmp_path), "encoders": False}
    family = load_family("sdxl", "somebody/base", **options)
    assert family.fingerprints() == load_family("sdxl", str(base), encoders=False).fingerprints()
    with pytest.raises(InputError, match="nobody/base"):
        load_family("sdxl", "nobody/base", **options)
    with pytest.raises(InputError, match=r"somebody/base holds a StableDiffusionXLPipeline, .* need --sdxl"):
        load_family("sd15", "somebody/base", **options)


@pytest.mark.parametrize("form", ["bytes", "paths", "records", "records with paths"])
def test_data_is_described_by_rows_captions_and_sizes(form, tmp_path):
    def table(images):
        encoded = [encode(image) for image in images]
        paths = [tmp_path / f"{len(content)}.png" for content in encoded]
        for path, content in zip(paths, encoded, strict=True):
            path.write_bytes(content)
        values = {
            "bytes": encoded,
            "paths": list(map(str, paths)),
            "records": [{"bytes": content, "path": None} for content in encoded],
            "records with paths": [{"bytes": None, "path": str(path)} for path in paths],
        }[form]
        return datasets.Dataset.from_dict({"caption": ["a", "b"], "image": values})

    def describe(table):
        return Pairs(table, np.arange(2), np.ones(2, bool), ("image",), "caption", "memory").describe()

    rng = np.random.default_rng(0)
    one, two, three = (pictures.render(spec, pictures.draw_centre(spec, rng)) for spec in pictures.TRAINED[:3])
    first = describe(table([one, two]))
    assert first == describe(table([one, two]))
    other = describe(table([one, three]))
    assert {name for name in first if first[name] != other[name]} == {"image sizes of the data", "sample of its images"}
    swapped = table([one, two]).select([1, 0])
    changed = describe(swapped)
    assert {name for name in first if first[name] != changed[name]} == {
        "captions of the data",
        "image sizes of the data",
        "sample of its images",
    }


def test_what_will_be_refused_is_refused_before_hours_of_encoding(flags, tmp_path):
    wrong = ("--lr_scheduler=polynomial", "--learning_rate=1e-8"), ("--global_batch_size=3", "--train_batch_size=2")
    for flag in wrong:
        with pytest.raises(InputError, match=r"needs a higher learning rate|not a multiple of"):
            set_up(flags(*flag))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--random_crop"], "--random_crop draws a new crop"),
        (["--max_unreadable_images=1"], "2 unreadable images, more than --max_unreadable_images"),
    ],
)
def test_what_cannot_be_cached_is_refused(flags, more, message):
    with pytest.raises(InputError, match=message):
        open_cache(flags(*more))


def test_run_again_a_cache_with_too_many_unreadable_images_is_refused_again(flags, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 100)  # a row per file, so the first of them is on file
    for _ in range(2):
        with pytest.raises(InputError, match="2 unreadable images, more than --max_unreadable_images"):
            open_cache(flags("--max_unreadable_images=1"))


def test_a_full_disk_is_noticed_before_the_start(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="GiB more, but its disk has"):
        open_cache(flags())
    assert not (tmp_path / "cache").exists()


def test_the_command_needs_a_folder_the_seed_that_chooses_pairs_and_for_fp16_a_gpu(flags, tmp_path):
    without_seed = [flag for flag in flags("--max_train_samples=10") if not flag.startswith("--seed")]
    with pytest.raises(InputError, match="needs --seed"):
        cache.main(without_seed)
    with pytest.raises(InputError, match="--latent_cache is missing"):
        cache.main(flags(cached=False))
    with pytest.raises(InputError, match=r"--mixed_precision fp16 .* needs a GPU"):
        cache.main(flags("--mixed_precision=fp16"))
    assert not (tmp_path / "cache").exists()


def test_sampled_images_need_the_encoders(flags, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    train.main(flags(f"--validation_prompts={tmp_path / 'prompts.txt'}", "--max_train_steps=1"))
    assert (tmp_path / "run" / "validation" / "step-000001" / "000.png").is_file()


def test_rows_and_notes_of_all_files_are_found_again(tmp_path):
    PartialState(cpu=True)
    written = Shards(tmp_path, {"VAE": "a"})
    written.create()
    written.write([3, 5], {"x": torch.tensor([[3.0], [5.0]])}, {"3 0": "broken"})
    written.write([4], {"x": torch.tensor([[4.0]])}, {"4 1": "cut off"})
    found = Shards(tmp_path, {"VAE": "a"})
    found.scan()
    assert found.notes == {"3 0": "broken", "4 1": "cut off"}
    assert {name: found.read(place)["x"].item() for name, place in found.places.items()} == {3: 3.0, 4: 4.0, 5: 5.0}


def test_whoever_may_read_the_index_may_read_the_rows(tmp_path):
    """safetensors writes files for their owner alone, and a cache is made once for a whole group."""
    before = os.umask(0o027)
    try:
        store = Shards(tmp_path / "cache", {"seed": 1})
        store.create()
        store.write([0], {"moments": torch.zeros(1, 2)}, {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in store.folder.iterdir()} == {0o640}


def test_files_of_other_keys_rows_or_notes_are_refused(tmp_path):
    PartialState(cpu=True)
    shards = Shards(tmp_path, {"VAE": "a", "crop": "centre"})
    shards.create()
    shards.write([1, 2], {"x": torch.tensor([1.0, 2.0])}, {"1 0": "broken"})
    (path,) = tmp_path.glob("*.safetensors")
    tensors, about = load_file(path), read_about(path)
    assert is_intact(path)
    save_file(tensors, path, {"about": json.dumps(about | {"sha256": "0" * 64})})
    assert not is_intact(path)
    for part, value in {"names": [1, 3], "notes": {"1`0": "broken"}}.items():
        save_file(tensors, path, {"about": json.dumps(about | {part: value})})
        with pytest.raises(InputError, match=f"{path} is damaged .*its header has changed"):
            shards.scan()
    save_file({"y": tensors["x"]}, path, {"about": json.dumps(about)})
    with pytest.raises(InputError, match=f"{path} is damaged .*its header has changed"):
        shards.scan()

    def save_with(names):
        header = hash_header(names, about["notes"], {"x": [2]})
        save_file(tensors, path, {"about": json.dumps(about | {"names": names, "header": header})})

    with pytest.raises(InputError, match=f"{path} is damaged .*its own rows"):
        save_file(tensors, path, {"about": json.dumps(about | {"crc32": about["crc32"][:1]})})
        shards.scan()
    for names in ([1], [1, 1], [1, 2, 3]):
        save_with(names)
        with pytest.raises(InputError, match=f"{path} is damaged .*its own rows"):
            shards.scan()
    save_with([1, 3])
    with pytest.raises(InputError, match=f"{path} is damaged .its name is not that of its rows"):
        shards.scan()
    save_file(tensors, path, {"about": json.dumps(about | {"key": "0" * 64})})
    with pytest.raises(InputError, match=f"{path} was made from something else than the files beside it"):
        shards.scan()
    (tmp_path / "index.json").write_text(json.dumps({"key": {"VAE": "a"}}))  # which does not say how it was cropped
    with pytest.raises(InputError, match="crop was None, is centre"):
        refuse_changes([shards])


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_all_files_that_from_pretrained_reads_have_a_part_in_the_fingerprint(tmp_path, ending):
    (tmp_path / "unet").mkdir()

    def digest(name="config.json", content="{}"):
        (tmp_path / "unet" / name).write_text(content)
        return hash_part(UNet2DConditionModel, str(tmp_path), "unet")

    pieces = [f"diffusion_pytorch_model-0000{n}-of-00002.{ending}" for n in (1, 2)]
    for name in ("config.json", *pieces):
        digest(name, "{}")
    before = digest()
    others = [f"diffusion_pytorch_model.fp16.{ending}", f"diffusion_pytorch_model.non_ema.{ending}", "README.md"]
    others += ["diffusion_pytorch_model.bin"] * (ending == "safetensors")
    assert all(digest(name, "other") == before for name in others)
    assert len({before, *(digest(name, "changed") for name in ("config.json", *pieces))}) == 4
    (tmp_path / "unet" / pieces[0]).rename(tmp_path / "unet" / f"diffusion_pytorch_model.{ending}")
    assert digest() != before


def test_as_many_images_may_be_unreadable_as_are_allowed():
    notes, pairs = {"3 0": "broken", "7 1": "cut off"}, SimpleNamespace(source="pairs")
    refuse_unreadable(notes, 2, pairs)
    with pytest.raises(InputError, match=r"2 unreadable images, .* 1; the last: pairs row 7: cut off"):
        refuse_unreadable(notes, 1, pairs)


def test_what_a_killed_writer_left_is_removed(flags, tmp_path):
    open_cache(flags())
    for shard in (tmp_path / "cache" / "images").glob("*.safetensors"):
        shard.rename(f"{shard}.0123abcd.partial")
        os.utime(f"{shard}.0123abcd.partial", times=(0, 0))
    open_cache(flags())
    assert not list((tmp_path / "cache").glob("*/*.partial"))


@pytest.mark.parametrize("folder", ["images", "captions"])
def test_a_bit_that_flipped_is_not_trained_on(flags, tmp_path, folder):
    train.main(flags())
    for path in (tmp_path / "cache" / folder).glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1  # of the last row
        path.write_bytes(content)
    again = flags(f"--output_dir={tmp_path / 'again'}", "--max_train_steps=30", "--proportion_empty_prompts=0")
    with pytest.raises(InputError, match=rf"cache/{folder}/.*safetensors is damaged \(CRC-32 of row \d+\): delete it"):
        train.main(again)
    for path in (tmp_path / "cache" / folder).glob("*.safetensors"):
        path.unlink()
    train.main(again)


def test_other_images_of_the_same_sizes_are_noticed():
    def describe(images):
        table = datasets.Dataset.from_dict({"caption": ["c"] * len(images), "image": images})
        pairs = Pairs(table, np.arange(len(images)), np.ones(len(images), bool), ("image",), "caption", "pairs")
        return pairs.describe() | {"fingerprint": pairs.fingerprint()}

    first, second = describe([b"one"] * 300), describe([b"two"] * 300)
    assert {name for name in first if first[name] != second[name]} == {"sample of its images", "fingerprint"}
    assert first == describe([b"one"] * 300)


def test_images_far_down_the_data_are_described_too():
    def describe(longer=None):
        images = [b"image" + b"!" * (row == longer) for row in range(20_001)]
        table = datasets.Dataset.from_dict({"caption": ["c"] * len(images), "image": images})
        pairs = Pairs(table, np.arange(1), np.ones(1, bool), ("image",), "caption", "pairs")
        return pairs.describe()["image sizes of the data"]

    assert len({describe(row) for row in (None, 0, 9_999, 10_000, 20_000)}) == 5


def test_pairs_held_out_of_the_training_data_are_cached_with_them(flags):
    given = [flag for flag in flags("--validation_pairs=5") if not flag.startswith("--validation_split")]
    training, held_out = open_cache(given)
    assert len(held_out) == 5 and not {*training.rows} & {*held_out.rows}
    assert training.images is held_out.images and held_out.load(0, 2)


def test_a_base_that_does_not_fit_together_is_refused_before_anything_is_cached(flags, bases, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(bases["sd15", "epsilon"], broken)
    config = json.loads((broken / "vae" / "config.json").read_text())
    (broken / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0}))
    with pytest.raises(InputError, match=r"broken cannot encode, predict and decode an image \(its pixels have"):
        cache.main(flags(f"--pretrained_model_name_or_path={broken}"))
    assert not files(tmp_path / "cache")
    with pytest.raises(InputError, match=r"none.pth"):
        cache.main(flags(f"--unet_init={tmp_path / 'none.pth'}"))
    assert not files(tmp_path / "cache")


def test_a_unet_that_does_not_fit_the_cached_captions_is_refused(flags, bases, tmp_path):
    """Its VAE and text encoders are those that the cache was made with, and are not loaded again."""
    open_cache(flags())
    other = tmp_path / "other"
    shutil.copytree(bases["sd15", "epsilon"], other)
    unet = UNet2DConditionModel.from_pretrained(other, subfolder="unet")
    wider = UNet2DConditionModel.from_config(unet.config, cross_attention_dim=2 * unet.config.cross_attention_dim)
    wider.save_pretrained(other / "unet")
    with pytest.raises(InputError, match=r"other cannot encode, predict and decode an image \(mat1 and mat2"):
        train.main(flags(f"--pretrained_model_name_or_path={other}"))
