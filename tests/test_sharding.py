"""Two CPU ranks: FSDP2 trains what one process trains, and leaves the same files; DDP keeps gradients once."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline
from recording import run_on_ranks, same, set_up, weights

import train
from sdpo.command import InputError
from sdpo.metrics import read_metrics
from sdpo.step import Run

run_sharded = partial(run_on_ranks, 2, Path(__file__).with_name("fsdp_on_cpu.py"))


@pytest.mark.parametrize("family, precision", [("sd15", "no"), ("sdxl", "bf16")])
def test_sharded_run_is_the_run_of_one_process(arguments, tmp_path, family, precision):
    flags = [
        "--optimizer=adamw",
        "--train_batch_size=1",
        f"--mixed_precision={precision}",
        "--validation_pairs=5",
        "--checkpointing_steps=2",
        "--use_ema",
        "--ema_decay=0.5",
        "--validation_steps=1",  # puts averaged weights in place and takes them back
        "--adam_epsilon=0.1",  # Adam otherwise turns the rounding of small gradients into steps
    ]
    assert "1 pairs x 2 processes x 2 accumulation" in run_sharded(arguments(*flags, family=family, out="sharded"))
    train.main(arguments(*flags, family=family, out="one"))
    start = train.load_family(family, arguments(family=family)[0].split("=")[1]).load_unet("").state_dict()
    for file in ("unet.pth", "unet_ema.pth"):
        sharded, one = (weights(tmp_path / out, file) for out in ("sharded", "one"))
        moved = sum((one[name] - start[name]).square().sum() for name in one).sqrt()
        apart = sum((one[name] - sharded[name]).square().sum() for name in one).sqrt()
        assert apart < (1e-3 if precision == "no" else 0.2) * moved
        assert all(type(value) is torch.Tensor for value in sharded.values())
    shards = (tmp_path / "sharded" / "checkpoint-2" / "pytorch_model_fsdp_0").iterdir()
    assert sum(path.stat().st_size for path in shards) > sum(value.nbytes for value in start.values())
    exact = precision == "no"  # bf16 rounds away what held-out errors change
    for name in ("train_loss", *(["heldout/winner_error_change", "heldout_ema/winner_error_change"] if exact else [])):
        metrics = {out: dict(read_metrics(tmp_path / out, name)) for out in ("sharded", "one")}
        # errors lie near 1, where fp32 numbers are 1.2e-7 apart
        assert metrics["sharded"] == pytest.approx(metrics["one"], rel=1e-5 if exact else 0.05, abs=1e-6), name
    sharded, averaged = weights(tmp_path / "sharded"), weights(tmp_path / "sharded", "unet_ema.pth")
    assert dict(read_metrics(tmp_path / "sharded", "rewards/margins"))[1] == 0  # the same arithmetic as the reference
    assert dict(read_metrics(tmp_path / "sharded", "heldout/margin"))[0] == 0
    assert same(DiffusionPipeline.from_pretrained(tmp_path / "sharded").unet.state_dict(), sharded)

    if not exact:
        return
    (tmp_path / "sharded" / "unet.pth").unlink()
    assert "after 2 updates" in run_sharded(arguments(*flags, family=family, out="sharded"))
    assert same(weights(tmp_path / "sharded"), sharded)
    assert same(weights(tmp_path / "sharded", "unet_ema.pth"), averaged)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_room_for_a_checkpoint_includes_an_engines_shards(arguments, monkeypatch, sharded):
    announced = {}
    monkeypatch.setattr(train, "space_cautions", lambda _, sizes: announced.update(sizes) or [])
    monkeypatch.setattr(Run, "sharded", sharded)
    run, _, _ = set_up(arguments("--optimizer=adamw", "--checkpointing_steps=2"))
    weights = sum(parameter.nbytes for parameter in run.policy.parameters())
    assert announced["a checkpoint"] == (4 if sharded else 3) * weights  # unet.pth, two moments, the shards


@pytest.mark.parametrize(
    "environment, flags, message",
    [
        ({"FSDP_VERSION": "1"}, [], "FSDP 1 is not supported: write fsdp_version: 2"),
        (
            {},
            ["--optimizer=adafactor"],
            "--optimizer adafactor does not go with FSDP2 or DeepSpeed: use --optimizer adamw",
        ),
        ({}, ["--channels_last"], "--channels_last does not go with FSDP2"),
    ],
)
def test_what_sharding_cannot_do_is_refused(arguments, monkeypatch, environment, flags, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert f"error: {message}" in run_sharded(arguments(*flags), succeeds=False)


@pytest.mark.parametrize(
    "flags, message",
    {
        ("--mixed_precision=bf16",): "--mixed_precision bf16 under DeepSpeed would round the policy otherwise",
        ("--use_ema",): "--use_ema does not go with DeepSpeed",
        ("--skip_grad_norm_above=9",): "--skip_grad_norm_above does not go with DeepSpeed",
        ("--optimizer=adafactor",): "--optimizer adafactor does not go with FSDP2 or DeepSpeed",
    }.items(),
)
def test_what_deepspeed_cannot_do_is_refused(arguments, monkeypatch, flags, message):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(InputError, match=message):
        train.main(arguments(*flags))


def test_gradients_of_two_ranks_stay_in_the_buckets_that_are_sent(arguments, tmp_path):
    """But for the first update, they take no memory beside them; accelerate would give the buckets up after each."""
    run_on_ranks(2, Path(__file__).with_name("gradients.py"), [tmp_path, *arguments("--max_train_steps=2")])
    for rank in range(2):
        parameters, storages = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert parameters > 100 and storages < 10


def test_between_micro_steps_sharded_gradients_are_held_once_by_all_ranks_together(arguments, tmp_path):
    flags = [tmp_path, *arguments("--optimizer=adamw", "--global_batch_size=8")]
    run_on_ranks(2, Path(__file__).with_name("sharded_gradients.py"), flags)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert len(ranks[0]) > 100
    for (whole, first), (_, second) in zip(*ranks, strict=True):
        assert first + second == whole
