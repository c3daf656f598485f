"""Errors of the reference on file: runs that share them are bit for bit the runs that compute them."""

import dataclasses
import hashlib
import json
import pickle
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from recording import metrics, record_on_ranks, same, set_up, train_flags, weights
from safetensors import SafetensorError
from safetensors.torch import load_file

import train
from sdpo import checkpoint, files, references, shards
from sdpo.command import InputError
from sdpo.config import TrainConfig
from sdpo.references import ReferenceErrors, make_key
from sdpo.shards import Shards

DPO, DMPO = "--train_method=diffusion-dpo", "--train_method=dmpo"


@pytest.fixture
def flags(arguments, tmp_path):
    """Flags of a short run that reads and writes errors of the reference; later ones replace earlier ones."""

    def build(*more, out="run", cached=True, **options):
        where = [f"--reference_cache={tmp_path / 'references'}"] if cached else []
        return [*arguments(*where, out=out, **options), "--dmpo_alpha=0.01", *more]

    return build


@pytest.mark.parametrize("cached", [True, False])
def test_loader_workers_need_not_be_forked(flags, tmp_path, cached):
    """They get the samples as pickles then, as Python 3.14 starts them."""
    given = flags(*([f"--latent_cache={tmp_path / 'latents'}"] if cached else []), "--report_to=tensorboard")
    train.main(given)
    _, samples, _ = set_up([*given, f"--output_dir={tmp_path / 'another'}"])
    copied = pickle.loads(pickle.dumps(samples))
    assert samples[0, 1].keys() == copied[0, 1].keys() >= {"reference_error"}
    assert torch.equal(samples[0, 1]["reference_error"], copied[0, 1]["reference_error"])


def errors(folder):
    """Errors on file by update, (global batch, 2)."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        about = json.loads(load_header(path)["about"])
        found |= dict(zip(about["names"], load_file(path)["errors"], strict=True))
    return found


def load_header(path):
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


@pytest.mark.parametrize(
    "family, precision, latents",
    [
        ("sd15", "no", "encoded"),
        ("sd15", "bf16", "cached"),
        ("sd15", "bf16 --official_reference_errors", "encoded"),
        ("sdxl", "no", "cached"),
        ("sdxl", "bf16", "encoded"),
        ("sdxl", "bf16 --official_reference_errors", "cached"),
    ],
)
def test_a_run_that_reads_the_errors_is_the_run_that_computes_them(flags, tmp_path, family, precision, latents):
    common = ["--noise_offset=0.1", "--mixed_precision", *precision.split()]
    common += [f"--latent_cache={tmp_path / 'latents'}"] if latents == "cached" else []
    train.main(flags(*common, DPO, "--beta_dpo=50", family=family, out="first"))
    train.main(flags(*common, DMPO, family=family, out="computed", cached=False))
    run, _, _ = set_up(flags(*common, DMPO, family=family))
    assert run.reference is None
    train.main(flags(*common, DMPO, "--use_ema", family=family, out="read"))
    assert same(weights(tmp_path / "read"), weights(tmp_path / "computed"))
    assert not same(weights(tmp_path / "read"), weights(tmp_path / "first"))
    assert metrics(tmp_path / "read") == metrics(tmp_path / "computed")


def test_held_out_pairs_and_longer_runs_have_a_reference_again(flags, tmp_path):
    split = ["--validation_split=validation", "--validation_pairs=4"]
    train.main(flags(*split, out="first"))
    longer = [*split, "--max_train_steps=5"]
    assert set_up(flags(*split))[0].reference is not None
    assert set_up(flags("--max_train_steps=5"))[0].reference is not None
    train.main(flags(*longer, out="longer"))
    train.main(flags(*longer, out="computed", cached=False))
    assert same(weights(tmp_path / "longer"), weights(tmp_path / "computed"))
    assert metrics(tmp_path / "longer") == metrics(tmp_path / "computed")
    assert sorted(errors(tmp_path / "references")) == [0, 1, 2, 3, 4]


def test_a_run_that_was_cut_off_leaves_what_its_checkpoints_cover(flags, tmp_path, monkeypatch):
    def crash(partial):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "seal", crash)
        train.main(flags("--checkpointing_steps=2", out="cut"))
    assert sorted(errors(tmp_path / "references")) == [0, 1]
    train.main(flags("--checkpointing_steps=2", out="cut"))
    train.main(flags(out="computed", cached=False))
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "computed"))
    assert set_up(flags(DMPO))[0].reference is None


def test_a_run_that_is_stopped_leaves_the_errors_of_its_updates(flags, tmp_path, monkeypatch):
    """It goes on after them, so no later run would write them."""
    monkeypatch.setattr(train.StopRequest, "agreed", lambda request: signal.SIGTERM)
    with pytest.raises(SystemExit):
        train.main(flags())
    assert sorted(errors(tmp_path / "references")) == [0]


def test_ranks_write_the_errors_of_one_rank(bases, wide_pairs, tmp_path):
    """The same micro-batches on one rank and on two: the same numbers at the same positions."""
    settings = {"train_batch_size": 2, "global_batch_size": 8, "max_train_steps": 3, "random_crop": True}
    base = bases["sd15", "epsilon"]
    jobs = [
        (train_flags(base, wide_pairs, tmp_path / out, reference_cache=tmp_path / out, **settings), "")
        for out in ("two", "one")
    ]
    record_on_ranks(2, jobs[:1], tmp_path)
    record_on_ranks(1, jobs[1:], tmp_path)
    one, two = errors(tmp_path / "one"), errors(tmp_path / "two")
    assert one.keys() == two.keys() == {0, 1, 2}
    assert all(value.shape == (8, 2) and value.unique().numel() == 16 for value in one.values())
    assert all(torch.equal(one[step], two[step]) for step in one)


@pytest.mark.parametrize(
    "changes, said",
    [
        (["--seed=8"], "seed was 7, is 8"),
        (["--global_batch_size=8"], "pairs per update was 4, is 8"),
        (["--train_batch_size=1"], "--train_batch_size was 2, is 1"),
        (["--no_hflip"], "--no_hflip was False, is True"),
        (["--proportion_empty_prompts=0"], "--proportion_empty_prompts was 0.2, is 0.0"),
        (["--resolution=16"], "resolution was 32, is 16"),
        (["--mixed_precision=bf16"], "--mixed_precision was no, is bf16"),
        (["--max_train_samples=50"], "captions, rows and labels was "),
        (["--split=validation"], "captions of the data was "),
    ],
)
def test_errors_of_other_samples_are_refused(flags, changes, said):
    train.main(flags("--max_train_steps=1"))
    AcceleratorState._reset_state(reset_partial_state=True)  # holds the precision
    with pytest.raises(InputError, match="--reference_cache was made from something else") as error:
        train.main(flags(*changes, out="other"))
    assert said in str(error.value) and "Name another --reference_cache" in str(error.value)


def test_files_of_the_base_are_read_once_for_caches_and_checkpoints(flags, tmp_path, monkeypatch):
    read, original = Counter(), hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, name: read.update([Path(file.name)]) or original(file, name)
    )
    files._sha256_of_state.cache_clear()
    train.main(flags(f"--latent_cache={tmp_path / 'latents'}"))
    parts = {"unet", "vae", "text_encoder", "tokenizer"}
    counts = {path: count for path, count in read.items() if path.parent.name in parts}
    assert {path.parent.name for path in counts} == parts and set(counts.values()) == {1}


@pytest.mark.parametrize(
    "said",
    ["No space left on device (os error 28)", "Permission denied (os error 13)", "Quota exceeded (os error 122)"],
)
def test_a_run_goes_on_where_its_errors_find_no_room(flags, tmp_path, monkeypatch, capsys, said):
    def full(*_):
        raise SafetensorError(f"Error while serializing: I/O error: {said}")

    monkeypatch.setattr(shards, "save_file", full)
    train.main(flags())
    assert (tmp_path / "run" / "unet.pth").is_file()
    assert f"errors of 3 updates are not kept, for {tmp_path / 'references'} takes no more" in capsys.readouterr().err


def test_a_complete_cache_may_be_one_that_can_only_be_read(flags, monkeypatch):
    train.main(flags())
    monkeypatch.setattr(shards, "write_json", lambda *_, **__: pytest.fail("written to"))
    monkeypatch.setattr(shards, "write_file", lambda *_, **__: pytest.fail("written to"))
    train.main(flags(DMPO, out="other"))


def test_two_runs_that_begin_together_do_not_mix(tmp_path):
    """The first one claims the folder, whichever writes first; a file of another would be refused."""
    key, other = {"seed": 1}, {"seed": 2}
    one, two = Shards(tmp_path / "together", key), Shards(tmp_path / "together", other)
    one.create()
    with pytest.raises(InputError, match="seed was 1, is 2"):
        two.create()
    errors = {"errors": torch.zeros(1, 4, 2)}
    two.write([0], errors, {})
    one.write([0], errors, {})
    assert len(list((tmp_path / "together").glob("*.safetensors"))) == 2
    with pytest.raises(
        InputError, match=r"\.safetensors was made from something else than the files beside it: delete"
    ):
        one.scan()


def test_errors_of_another_reference_are_refused(flags, tmp_path):
    train.main(flags(out="first"))
    for init in (tmp_path / "first" / "unet.pth", tmp_path / "first", tmp_path / "first" / "unet"):
        with pytest.raises(InputError, match=r"something else: .*: UNet was \w{12}, is \w{12}\."):
            train.main(flags(f"--unet_init={init}", out="other"))


def test_damaged_files_are_named(flags, tmp_path):
    train.main(flags())
    (path,) = (tmp_path / "references").glob("*.safetensors")
    content = path.read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-9], b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=path.name):
            train.main(flags(out="other"))


@pytest.mark.parametrize(
    "more, said",
    [
        (["--train_method=dspo"], "dspo needs its predictions: drop it"),
        (["--sft"], "sft needs no reference: drop it"),
    ],
)
def test_what_errors_are_no_use_for_is_refused(flags, more, said):
    with pytest.raises(InputError, match=said):
        train.main(flags(*more))


def test_runs_without_a_seed_are_refused(flags):
    given = [flag for flag in flags() if not flag.startswith("--seed")]
    with pytest.raises(InputError, match="--reference_cache needs --seed"):
        train.main(given)


def test_all_that_the_references_errors_depend_on_is_in_their_key(monkeypatch):
    given = {"pretrained_model_name_or_path": "base", "train_data_dir": "pairs", "resolution": 512}
    family = SimpleNamespace(describe=lambda init: {"UNet": init}, resolution=512)
    pairs = SimpleNamespace(fingerprint=lambda: "pairs", describe=lambda: {"rows": 8})
    accelerator, plan = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(global_batch=4)

    def key(**flags):
        return make_key(TrainConfig(**given | flags), accelerator, family, plan, 7, pairs)

    matter = {
        "random_crop": True, "no_hflip": True, "shared_flip": True, "draft_decoding": True, "noise_offset": 0.1,
        "proportion_empty_prompts": 0.0, "input_perturbation": 0.1, "train_batch_size": 3, "allow_tf32": True,
        "official_reference_errors": True, "mixed_precision": "bf16", "compile": True, "channels_last": True,
        "resolution": 256, "unet_init": "unet.pth", "latent_cache": "cache",
    }  # fmt: skip
    plain = key()
    assert plain.keys() == key(latent_cache="cache").keys() and plain["device"] == "cpu"
    for name, value in matter.items():
        changed = key(**{name: value})
        assert sum(changed[entry] != plain[entry] for entry in plain) == 1, name
    for stored in ("fp32", "bf16"):
        assert stored in key(latent_cache="cache", latent_cache_dtype=stored)["latents"]
    free = {
        "beta_dpo": 3.0,
        "learning_rate": 1.0,
        "use_winner_preserving": True,
        "optimizer": "adafactor",
        "use_ema": True,
    }
    assert all(key(**{name: value}) == plain for name, value in free.items())
    for module, name, value in ((torch, "__version__", "1.0"), (references, "ARITHMETIC", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert key() != plain


IN_THE_KEY_OTHERWISE = {  # by what they come to, or by content
    "pretrained_model_name_or_path", "revision", "pretrained_vae_model_name_or_path", "sdxl", "unet_init", "dataset_name",
    "dataset_config_name", "train_data_dir", "split", "image_column", "caption_column", "max_train_samples",
    "dreamlike_pairs_only", "labels_file", "choice_model", "choice_margin", "choice_weights", "resolution", "latent_cache",
    "latent_cache_dtype", "seed", "global_batch_size", "gradient_accumulation_steps", "max_unreadable_images",
    "validation_pairs", "validation_split", "validation_data_dir", "validation_seed",
}  # fmt: skip
NOTHING_TO_THE_REFERENCE = {
    "cache_dir", "dataloader_num_workers", "train_method", "sft", "beta_dpo", "dmpo_alpha", "dspo_form",
    "use_winner_preserving", "winner_preserving_mu", "winner_preserving_per", "constant_loser_scale", "reference_cache",
    "max_train_steps", "num_train_epochs", "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "use_adafactor",
    "optimizer", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "max_skipped_updates",
    "skip_grad_norm_above", "gradient_checkpointing", "activation_memory", "cuda_graphs", "lora_rank", "use_ema",
    "ema_decay", "validation_steps", "validation_prompts", "output_dir", "logging_dir", "report_to", "tracker_project_name",
    "logging_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "resume_with_changes",
    "hub_model_id", "local_rank", "hard_skip_resume",
}  # fmt: skip


def test_of_every_flag_it_is_known_whether_it_matters_to_the_reference():
    """A new flag that decides what the reference is shown would otherwise be given the errors of other runs."""
    known = [*references.FLAGS, *IN_THE_KEY_OTHERWISE, *NOTHING_TO_THE_REFERENCE]
    assert sorted(known) == sorted(field.name for field in dataclasses.fields(TrainConfig))


def test_errors_are_complete_where_every_update_has_them():
    def complete(steps, *there):
        shards = SimpleNamespace(places={step: (0, step) for step in there})
        return ReferenceErrors(shards, None, SimpleNamespace(steps=steps)).complete

    assert complete(3, 0, 1, 2) and complete(3, 0, 1, 2, 3)
    assert not complete(3, 0, 1) and not complete(3, 1, 2) and not complete(3, 0, 2)


def test_errors_of_an_update_that_was_taken_back_are_not_kept(tmp_path):
    """Where the data of a rank end, its noise is not a number, and the update is no longer counted."""
    store = Shards(tmp_path, {"seed": 7})
    store.create()
    rank = SimpleNamespace(gather=lambda own: own, is_main_process=True)
    kept = ReferenceErrors(store, rank, SimpleNamespace(steps=3, global_batch=2))
    kept.add(0, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    kept.add(1, torch.full((4,), torch.nan))
    kept.write(made=1)
    kept.write(made=2)  # which is nothing new
    found = errors(tmp_path)
    assert found.keys() == {0} and found[0].tolist() == [[1.0, 3.0], [2.0, 4.0]]  # winner, loser of each pair
