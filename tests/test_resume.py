"""A run that is stopped after any update and started again is the same run: weights, optimizer, metrics, data read."""

import json
import shutil

import pytest
from recording import metrics, optimizer_state, record_on_ranks, same, train_flags, weights

import train
from sdpo.data import epoch_order
from sdpo.metrics import read_metrics
from sdpo.pairs import Pairs

STEPS = 6
RUN = {
    "max_train_steps": STEPS, "train_batch_size": 2, "global_batch_size": 16, "checkpointing_steps": 1, "random_crop": True,
    "lr_scheduler": "cosine", "use_ema": True, "ema_decay": 0.9, "validation_pairs": 4, "validation_steps": 2,
    "learning_rate": 1e-4, "use_winner_preserving": True, "winner_preserving_mu": 0.5, "winner_preserving_per": "pair",
}  # fmt: skip


def assert_same_run(folder, whole):
    for name in ("unet.pth", "unet_ema.pth"):
        assert same(weights(folder, name), weights(whole, name))
    assert same(optimizer_state(folder / f"checkpoint-{STEPS}"), optimizer_state(whole / f"checkpoint-{STEPS}"))
    assert metrics(folder) == metrics(whole)
    logged = [step for step, _ in read_metrics(folder, "train_loss")]
    assert logged == sorted(set(logged)) and logged[-1] == STEPS


def leave(whole, folder, step):
    """What a run that got as far as the next checkpoint, and lost it, leaves behind."""
    folder.mkdir()
    shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copy(whole / "metrics.jsonl", folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "train_l')
    (folder / "checkpoint-9.partial").mkdir()


def index_of(place, pairs):
    """Index of the pair that a run trains on at a place, counted from its start."""
    epoch, offset = divmod(place, pairs)
    return int(epoch_order(7, epoch, pairs)[offset])


@pytest.mark.parametrize(
    "settings, stops",
    [
        ({"dataloader_num_workers": 0, "sdxl": False}, range(1, STEPS)),
        # averages over updates before and after
        ({"dataloader_num_workers": 2, "sdxl": False, "logging_steps": 4}, (1, 3, 4)),
        ({"dataloader_num_workers": 0, "sdxl": True, "optimizer": "adamw"}, (3,)),
    ],
    ids=["sd15", "workers", "sdxl"],
)
def test_stopping_after_any_update_changes_nothing(bases, wide_pairs, tmp_path, monkeypatch, settings, stops):
    base, loaded, original = bases["sdxl" if settings["sdxl"] else "sd15", "epsilon"], [], Pairs.load
    monkeypatch.setattr(
        Pairs, "load", lambda pairs, index, members: loaded.append(index) or original(pairs, index, members)
    )
    train.main(train_flags(base, wide_pairs, tmp_path / "whole", **RUN | settings))
    whole = list(loaded)
    pairs = json.loads((tmp_path / "whole" / "config.json").read_text())["plan"]["pairs"]
    trained = [index_of(place, pairs) for place in range(16 * STEPS)]  # in their order
    here = slice(0) if settings["dataloader_num_workers"] else slice(None)  # workers load in processes of their own
    held_out = whole[1 : 1 + RUN["validation_pairs"]]
    assert whole == [trained[0], *held_out, *trained[here]]  # the first to see whether it can be loaded
    for step in stops:
        loaded.clear()
        leave(tmp_path / "whole", tmp_path / f"cut-{step}", step)
        train.main(train_flags(base, wide_pairs, tmp_path / f"cut-{step}", **RUN | settings))
        assert_same_run(tmp_path / f"cut-{step}", tmp_path / "whole")
        assert loaded == [trained[16 * step], *held_out, *trained[16 * step :][here]]  # no data but what is trained on


def test_on_two_ranks_too_and_with_another_number_of_ranks(bases, wide_pairs, tmp_path):
    """Two ranks go on from two after any update, bit for bit; two from one, and one from two, to rounding."""
    again = [f"again-{step}" for step in range(1, STEPS)]
    names = ("one", "two", "more", "less", *again)
    smooth = {
        "adam_epsilon": 0.1,
        "learning_rate": 1e-2,
    }  # Adam otherwise turns the rounding of small gradients into steps
    settings = RUN | {"use_ema": False, "logging_steps": 4} | smooth
    command = {name: train_flags(bases["sd15", "epsilon"], wide_pairs, tmp_path / name, **settings) for name in names}
    train.main(command["one"])
    leave(tmp_path / "one", tmp_path / "more", 3)
    record_on_ranks(2, [(command["two"], None), (command["more"], None)], tmp_path)
    for step, name in enumerate(again, 1):
        leave(tmp_path / "two", tmp_path / name, step)
    leave(tmp_path / "two", tmp_path / "less", 3)
    record_on_ranks(2, [(command[name], None) for name in again], tmp_path)
    train.main(command["less"])
    last = f"checkpoint-{STEPS}"
    for name in again:
        assert same(weights(tmp_path / name), weights(tmp_path / "two"))
        assert same(optimizer_state(tmp_path / name / last), optimizer_state(tmp_path / "two" / last))
        assert metrics(tmp_path / name) == metrics(tmp_path / "two")
    losses = {name: dict(read_metrics(tmp_path / name, "train_loss")) for name in names}
    for name in ("two", "more", "less"):
        assert losses[name] == pytest.approx(losses["one"], rel=1e-5)
