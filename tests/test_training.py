"""train.py end to end on random pipelines: every method, resuming, splitting over ranks and micro-steps, what it leaves behind."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image
from recording import edit_json, run_on_ranks, same, set_up, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Adafactor

import train
from sdpo import heldout
from sdpo.average import AveragedWeights
from sdpo.batch import collate
from sdpo.command import InputError, parse_flags
from sdpo.compare import read_runs
from sdpo.config import TrainConfig
from sdpo.families import FAMILIES, StableDiffusion, load_family
from sdpo.heldout import HeldOutPairs, clustered_error
from sdpo.inputs import make_inputs
from sdpo.metrics import read_metrics
from sdpo.optimizers import OPTIMIZERS, optimizer_name
from sdpo.output import check_places, find_other_model, set_results_aside
from sdpo.pairs import prepare_pairs
from sdpo.rng import normal
from sdpo.step import compute_loss

ROOT = Path(__file__).parents[1]


PAIR_METHODS = ("diffusion-dpo", "dspo", "dmpo")
SAFEGUARDS = {"plain": [], "safeguard": ["--use_winner_preserving", "--winner_preserving_mu=0.5"]}


def configure(flags):
    return parse_flags(TrainConfig, "", "", flags)


@pytest.mark.parametrize(
    "family, precision, method, safeguard",
    [
        *itertools.product(("sd15", "sdxl"), ("no", "bf16"), PAIR_METHODS, ("safeguard",)),
        *itertools.product(("sd15", "sdxl"), ("no", "bf16"), ("sft",), ("plain",)),
        *itertools.product(("sd15",), ("bf16",), PAIR_METHODS, ("plain",)),
    ],
)
def test_every_method_trains(arguments, tmp_path, family, precision, method, safeguard):
    flags = [f"--train_method={method}", f"--mixed_precision={precision}", "--dmpo_alpha=0.01", *SAFEGUARDS[safeguard]]
    train.main(arguments(*flags, family=family))
    losses = read_metrics(tmp_path / "run", "train_loss")
    assert [step for step, _ in losses] == [1, 2, 3]
    if method != "sft":  # policy and reference start equal, in either precision
        assert dict(read_metrics(tmp_path / "run", "rewards/margins"))[1] == 0
        scales = [value for _, value in read_metrics(tmp_path / "run", "avg_lose_l_scale")]
        assert all(scale == 1 for scale in scales) == (safeguard == "plain")
    trained = weights(tmp_path / "run")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in trained.values())
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert same(pipeline.unet.state_dict(), trained)
    assert {p.dtype for model in (pipeline.vae, pipeline.text_encoder) for p in model.parameters()} == {torch.float32}
    assert (tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert len({path.stat().st_mode for path in (tmp_path / "run").rglob("*.*") if path.is_file()}) == 1


def test_v_prediction_trains(arguments, tmp_path):
    train.main(arguments("--mixed_precision=bf16", prediction="v_prediction"))
    assert dict(read_metrics(tmp_path / "run", "rewards/margins"))[1] == 0
    assert DiffusionPipeline.from_pretrained(tmp_path / "run").scheduler.config.prediction_type == "v_prediction"


def test_sft_is_descent_on_the_winners_error(arguments, tmp_path):
    """One update of sft and of a pair loss with loser scale 0 at u = 0 point the same way: the latter's gradient is beta/4 of the former's."""
    for out, flags in {"sft": ["--train_method=sft"], "pair": ["--constant_loser_scale=0"]}.items():
        train.main(arguments("--max_train_steps=2", "--max_grad_norm=0", *flags, out=out))
    norms = [dict(read_metrics(tmp_path / out, "grad_norm"))[1] for out in ("pair", "sft")]
    assert norms[0] / norms[1] == pytest.approx(100 / 4, rel=1e-4)


def test_optimizers_have_the_official_settings():
    """Adafactor is without its relative step and parameter scaling."""
    config, model = TrainConfig(pretrained_model_name_or_path="base", train_data_dir="pairs"), torch.nn.Linear(2, 2)
    expected = {
        torch.optim.AdamW: {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "maximize": False},
        Adafactor: {
            "relative_step": False, "scale_parameter": False, "warmup_init": False, "clip_threshold": 1.0, "beta1": None,
        },
    }  # fmt: skip
    for family, (kind, settings) in zip(("sd15", "sdxl"), expected.items(), strict=True):
        optimizer = OPTIMIZERS[optimizer_name(config, FAMILIES[family])].build(model.parameters(), config, 3e-4)
        (group,) = optimizer.param_groups
        assert type(optimizer) is kind and ({"lr": 3e-4, "weight_decay": 1e-2} | settings).items() <= group.items()
        assert set(map(id, group["params"])) == set(map(id, model.parameters()))


def test_max_grad_norm_clips_and_0_does_not(arguments, tmp_path):
    for limit in ("0", "1e9", "1e-3"):
        train.main(arguments(f"--max_grad_norm={limit}", "--adam_epsilon=1", "--learning_rate=1", out=limit))
    assert same(weights(tmp_path / "0"), weights(tmp_path / "1e9"))
    assert not same(weights(tmp_path / "0"), weights(tmp_path / "1e-3"))


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_the_safeguard_is_on_at_every_share(arguments, mu):
    """At 0, the default, it is not the plain method."""
    flags = arguments("--use_winner_preserving", "--winner_preserving_per=pair", f"--winner_preserving_mu={mu}")
    run, dataset, _ = set_up(flags)
    batch = collate([dataset[0, position] for position in range(8)])
    inputs = make_inputs(run.family, batch)
    with torch.no_grad():
        prediction = run.family.predict(run.policy, inputs.noisy, inputs.timesteps, inputs.conditioning)
    w, x = (prediction - inputs.target).double().flatten(1).chunk(2)
    ww, wl = (w * w).sum(1), (w * x).sum(1)
    expected = torch.where(wl > 0, ((1 - mu) * ww / wl).clamp(max=1), 1.0)
    figures = compute_loss(run, batch)[1]
    assert expected.min() < 1
    assert figures["lambda/min"].item() == pytest.approx(expected.min().item(), rel=1e-4)
    assert figures["avg_lose_l_scale"].item() == pytest.approx(expected.mean().item(), rel=1e-4)


SCHEDULES = {"linear": lambda done: 1 - done, "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_end_with_the_run(arguments, tmp_path, name):
    train.main(arguments(f"--lr_scheduler={name}", "--max_train_steps=5", "--lr_warmup_steps=1"))
    expected = [0.0] + [1e-3 * SCHEDULES[name](step / 4) for step in range(4)]
    assert [rate for _, rate in read_metrics(tmp_path / "run", "lr")] == pytest.approx(expected)


def test_logged_rewards_are_those_of_the_runs_beta(arguments, tmp_path):
    train.main(arguments())
    chosen, rejected, margins = (
        [value for _, value in read_metrics(tmp_path / "run", f"rewards/{name}")]
        for name in ("chosen", "rejected", "margins")
    )
    differences = [a - b for a, b in zip(chosen, rejected, strict=True)]
    assert differences == pytest.approx(margins, rel=1e-3, abs=1e-6) and margins[-1] != 0


def test_speed_is_in_pairs_per_second(arguments, tmp_path, monkeypatch):
    """By a clock that advances half a second per reading, and so per update of 4 pairs."""
    ticks = itertools.count(step=0.5)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    train.main(arguments("--logging_steps=2"))
    assert read_metrics(tmp_path / "run", "pairs_per_second") == [(2, 8.0), (3, 8.0)]


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_allowed_as_asked(arguments, allowed):
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, not allowed
    try:
        train.start_accelerator(configure(arguments(f"--allow_tf32={allowed}")))
        assert torch.backends.cuda.matmul.allow_tf32 == allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_the_reference_is_held_in_the_training_precision(arguments):
    """Linear and convolution weights, which are nearly all: the frozen copy takes half the memory of the policy."""
    run, _, _ = set_up(arguments("--mixed_precision=bf16"))
    policy, reference = (sum(p.nbytes for p in model.parameters()) for model in (run.policy, run.reference))
    assert reference < 0.55 * policy
    assert not any(parameter.requires_grad for parameter in run.reference.parameters())


def test_without_a_seed_the_checkpoints_is_used(arguments, tmp_path):
    flags = [flag for flag in arguments("--checkpointing_steps=1") if not flag.startswith("--seed")]
    train.main([*flags, "--max_train_steps=1"])
    seed = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["seed"]
    train.main(flags)
    assert json.loads((tmp_path / "run" / "checkpoint-3" / "state.json").read_text())["seed"] == seed


def test_a_trained_model_is_neither_overwritten_nor_mixed_with_another(arguments, tmp_path, capsys):
    run, flags = tmp_path / "run", arguments("--checkpointing_steps=0", "--max_train_steps=2")
    train.main([*flags, "--use_ema"])
    first, ema = (run / "unet.pth").read_bytes(), (run / "unet_ema.pth").read_bytes()
    evaluation = [
        "papv2_seed0_32x32_20s_7.5cfg.json",
        "scores.jsonl",
        "summary.json",
        "joint_test_32.log",
        "report.html",
    ]
    for name in evaluation:
        (run / name).touch()
    (run / "papv2_seed0_32x32_20s_7.5cfg").mkdir()
    train.main([*flags, "--seed=8"])
    assert all((run / "earlier-1" / name).exists() for name in evaluation)
    assert not list(run.glob("papv2*")) + [name for name in evaluation if (run / name).exists()]
    said = capsys.readouterr().err
    assert f"{run} held the results of another run, which are now in {run / 'earlier-1'}" in said
    assert (run / "earlier-1" / "unet.pth").read_bytes() == first
    assert (run / "earlier-1" / "unet_ema.pth").read_bytes() == ema and not (run / "unet_ema.pth").exists()
    assert (run / "unet.pth").read_bytes() != first and (run / "earlier-1" / "config.json").exists()
    train.main(flags)
    assert (run / "unet.pth").read_bytes() == first  # the same run is the same file
    assert (run / "earlier-2" / "metrics.jsonl").exists()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_refused_command_leaves_what_is_there(arguments, tmp_path):
    """Also where it is refused once pairs are looked at: held-out ones of which none can be read."""
    (tmp_path / "broken").mkdir()
    rows = [{"caption": "a", "jpg_0": b"no image", "jpg_1": b"none", "label_0": 1.0}] * 4
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "broken" / "train.parquet")
    late = (f"--validation_data_dir={tmp_path / 'broken'}", "--max_unreadable_images=0", "--resume_with_changes")
    flags = arguments("--checkpointing_steps=1", "--max_train_steps=2")
    train.main(flags)
    before = contents(tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoint-1", tmp_path / "elsewhere"):
        if not checkpoint.exists():
            shutil.copytree(tmp_path / "run" / "checkpoint-1", checkpoint)
        with pytest.raises(InputError, match="no readable pair"):
            train.main([*flags, *late, f"--resume_from_checkpoint={checkpoint}"])
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["model_index.json", "config.json"])
def test_the_model_of_somebody_else_is_not_written_over(arguments, bases, tmp_path, name):
    base = bases["sd15", "v_prediction"]
    shutil.copytree(base if name == "model_index.json" else base / "unet", tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match=rf"run/{name} is not of a run of train.py, which would write over it"):
        train.main(arguments())
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "heldout.parquet", "checkpoint-3.abandoned", "earlier-1", "unet.pth"]
)
def test_what_a_run_leaves_is_not_taken_for_somebody_elses(tmp_path, name):
    (tmp_path / "config.json").write_text("{")  # damaged
    assert find_other_model(tmp_path) == tmp_path / "config.json"
    (tmp_path / name).touch()
    assert find_other_model(tmp_path) is None


def test_a_schedule_that_validation_images_cannot_be_sampled_by_is_refused_at_the_start(arguments, bases, tmp_path):
    base, prompts = tmp_path / "base", tmp_path / "prompts.txt"
    prompts.write_text("a small red circle")
    for change, message in {
        "num_train_timesteps": (20, r"base has 20 timesteps, of which 25 steps cannot be sampled: drop --validation_p"),
        "timestep_spacing": ("foo", r"scheduler of .*base does not support Euler sampling \(foo"),
    }.items():
        shutil.copytree(bases["sd15", "epsilon"], base, dirs_exist_ok=True)
        edit_json(base / "scheduler" / "scheduler_config.json", **{change: message[0]})
        with pytest.raises(InputError, match=message[1]):
            train.main(arguments(f"--pretrained_model_name_or_path={base}", f"--validation_prompts={prompts}"))


def test_a_link_to_a_part_of_another_model_is_not_written_through(arguments, bases, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "vae").symlink_to(bases["sd15", "v_prediction"] / "vae")
    with pytest.raises(InputError, match=r"run/vae is in the way of the trained model"):
        train.main(arguments())


def test_what_the_flags_and_the_base_tell_is_refused_before_data_are_read(arguments, bases, tmp_path, monkeypatch):
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=1"))
    monkeypatch.setattr(train, "prepare_pairs", None)  # cannot be called
    for flags, message in {
        ("--beta_dpo=7",): "would be another run: --beta_dpo was 100.0, is 7.0",
        ("--lora_rank=17", f"--output_dir={tmp_path / 'other'}"): "--lora_rank 17 is above 16",
        (f"--reference_cache={tmp_path / 'run' / 'unet.pth' / 'x'}",): "unet.pth/x cannot be written: name another",
        ("--unet_init=/nowhere", "--resume_with_changes"): "/nowhere",
        ("--global_batch_size=3", "--train_batch_size=2"): "not a multiple of 2",
        ("--lr_scheduler=polynomial", "--learning_rate=1e-8", "--resume_with_changes"): "needs a higher learning rate",
    }.items():
        with pytest.raises(InputError, match=message):
            train.main(arguments(*flags))


@pytest.mark.parametrize("name", ["", ".", "logs", "logs/checkpoint-1", "/elsewhere/unet", "checkpoint-1x"])
def test_other_tracker_folders_are_in_nobodys_place(tmp_path, name):
    def check(logging_dir, project="tuning"):
        config = SimpleNamespace(
            output_dir=tmp_path, logging_dir=logging_dir, tracker_project_name=project, report_to="none"
        )
        check_places(config, ["unet", "vae"])

    check(name)
    for place in (["vae/x"], ["./checkpoint-2"], [".", "vae"], [str(tmp_path / "unet.pth")]):
        with pytest.raises(InputError, match=r"--logging_dir: .* would be in the place of something else"):
            check(*place)


def test_a_tracker_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "logs").touch()

    def check(report_to):
        config = SimpleNamespace(
            output_dir=tmp_path, logging_dir="logs", tracker_project_name="tuning", report_to=report_to
        )
        check_places(config, ["unet", "vae"])

    for report_to in ("tensorboard", "all"):
        with pytest.raises(InputError, match=r"--logging_dir: .*logs/tuning cannot be written: name another folder"):
            check(report_to)
    check("none")
    (tmp_path / "logs").unlink()
    check("tensorboard")


def test_a_tracker_folder_called_like_an_evaluations_is_moved_once(tmp_path):
    (tmp_path / "eval-logs").mkdir()
    (tmp_path / "unet.pth").touch()
    set_results_aside(tmp_path, "eval-logs", anew=True)
    assert sorted(path.name for path in (tmp_path / "earlier-1").iterdir()) == ["eval-logs", "unet.pth"]


def test_bad_data_are_one_sentence_on_every_rank(arguments, pairs_folder, tmp_path):
    rows = pq.read_table(pairs_folder / "train.parquet").to_pylist()
    (tmp_path / "data").mkdir()
    pq.write_table(
        pa.Table.from_pylist([*rows[:20], rows[20] | {"label_0": None}]), tmp_path / "data" / "train.parquet"
    )
    flags = [f"--train_data_dir={tmp_path / 'data'}"]
    said = run_on_ranks(2, ROOT / "train.py", arguments(*flags), succeeds=False)
    assert said.count("row 20: label_0 is None") == 2 and "Connection closed" not in said


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--global_batch_size=5", "--global_batch_size 5 is not a multiple of 2"),
        ("--unet_init=/nowhere/unet.pth", "there is no file /nowhere/unet.pth"),
    ],
)
def test_flags_are_tried_before_a_cache_is_made(arguments, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        train.main(arguments(f"--latent_cache={tmp_path / 'cache'}", flags))
    assert not (tmp_path / "cache").exists()


def test_a_run_resumed_from_elsewhere_leaves_what_is_in_its_folder(arguments, tmp_path):
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=1", out="first"))
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=1", out="second"))
    second, flags = tmp_path / "second", ["--checkpointing_steps=0", "--max_train_steps=3"]
    with pytest.raises(InputError, match="was made with other settings"):
        elsewhere = f"--resume_from_checkpoint={tmp_path / 'first' / 'checkpoint-1'}"
        train.main(arguments(*flags, elsewhere, "--beta_dpo=7", out="second"))
    assert (second / "unet.pth").exists()  # nothing was moved for a run that is refused
    train.main(arguments(*flags, f"--resume_from_checkpoint={tmp_path / 'first' / 'checkpoint-1'}", out="second"))
    assert (second / "earlier-1" / "unet.pth").exists() and (second / "earlier-1" / "checkpoint-1").exists()
    assert not (second / "checkpoint-1").exists()  # which would later be taken for one of the run's
    assert [step for step, _ in read_metrics(second, "train_loss")] == [2, 3]
    (second / "unet.pth").unlink()  # as if it had been killed before its end
    train.main(arguments(*flags, f"--resume_from_checkpoint={second / 'earlier-1' / 'checkpoint-1'}", out="second"))
    assert (second / "earlier-2" / "metrics.jsonl").exists()
    assert [step for step, _ in read_metrics(second, "train_loss")] == [2, 3]


def test_averaged_weights_of_an_earlier_run_do_not_stay_beside_others(arguments, tmp_path):
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=1", "--use_ema"))
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=2", "--resume_with_changes"))
    assert (tmp_path / "run" / "unet.pth").exists() and not (tmp_path / "run" / "unet_ema.pth").exists()


def test_processes_that_did_not_join_are_refused(arguments, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # alone it says nothing: schedulers set it for programs of any kind
    train.start_accelerator(configure(arguments()))
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match="2 processes were started, but 1 found each other"):
        train.main(arguments())


def test_the_console_says_what_the_run_is_about(arguments, capsys):
    guarded = [
        "--use_winner_preserving",
        "--winner_preserving_mu=0.9",
        "--checkpointing_steps=2",
        "--validation_pairs=2",
    ]
    train.main(arguments(*guarded, "--max_train_samples=3", "--max_train_steps=2"))
    said = capsys.readouterr().err
    assert "loser scale    winner-preserving, mu 0.9, per batch" in said
    assert re.search(r"base +\S+; output in \S+/run\n", said)
    assert re.search(
        r"heldout +after 2 updates: change of winners' error [+-]\d\S*, losers' [+-]\d\S*, margin accuracy \d", said
    )
    assert re.search(r"saved +\S*run/checkpoint-2\n", said)
    assert "an update takes 4 pairs and the data has 3, which repeat" in said


def test_seeds_that_are_not_given_differ(arguments):
    config = configure([flag for flag in arguments() if not flag.startswith("--seed")])
    accelerator = train.start_accelerator(config)
    seeds = {train.choose_seed(config, accelerator, None) for _ in range(8)}
    assert len(seeds) == 8 and min(seeds) >= 0


def test_checkpoints_are_limited_and_plain(arguments, tmp_path):
    train.main(arguments("--checkpointing_steps=1", "--checkpoints_total_limit=2"))
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint*")) == ["checkpoint-2", "checkpoint-3"]
    assert same(weights(tmp_path / "run" / "checkpoint-3"), weights(tmp_path / "run"))


@pytest.mark.parametrize("method", ["diffusion-dpo", "dspo"])
def test_the_references_errors_may_be_rounded_as_the_official_code_does(arguments, method):
    figures = {}
    for official in (False, True):
        flags = arguments(
            "--mixed_precision=bf16", f"--train_method={method}", f"--official_reference_errors={official}"
        )
        run, dataset, _ = set_up([*flags, "--beta_dpo=5000"])
        batch = collate([dataset[0, position] for position in range(4)])
        figures[official] = compute_loss(run, batch)[1]
        inputs = make_inputs(run.family, batch)
        with torch.no_grad(), run.accelerator.autocast():
            prediction = run.family.predict(run.reference, inputs.noisy, inputs.timesteps, inputs.conditioning)
        rounded = (prediction.bfloat16() - inputs.target.bfloat16()).pow(2).mean((1, 2, 3))  # in bf16 throughout
    error_w, error_l = (prediction.float() - inputs.target).pow(2).mean((1, 2, 3)).chunk(2)
    rounded_w, rounded_l = rounded.chunk(2)
    margins = -2500 * ((error_w - error_l) - (rounded_w - rounded_l).float())
    assert figures[False]["rewards/margins"] == 0 != figures[True]["rewards/margins"]
    assert figures[True]["rewards/margins"].item() == pytest.approx(margins.mean().item(), rel=1e-4)
    assert figures[True]["ref_mse_unaccumulated"] == pytest.approx(rounded.float().mean().item(), rel=1e-6)
    assert figures[True]["model_mse_unaccumulated"] == figures[False]["model_mse_unaccumulated"]


def test_a_trained_output_folder_is_a_start_for_another_run(arguments, tmp_path):
    train.main(arguments(out="first"))
    train.main(arguments(f"--unet_init={tmp_path / 'first'}", "--learning_rate=0", "--max_train_steps=1"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "first"))
    train.main(arguments("--learning_rate=1e-3", out="first"))  # moves the former results aside
    earlier = tmp_path / "first" / "earlier-1"
    train.main(arguments(f"--unet_init={earlier}", "--learning_rate=0", "--max_train_steps=1", out="again"))
    assert same(weights(tmp_path / "again"), weights(earlier))


def test_a_single_held_out_caption_has_no_standard_error(arguments, tmp_path):
    train.main(arguments("--validation_pairs=1", "--max_train_steps=1"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # NaN is no JSON
    assert "heldout/margin" in rows[0] and "heldout/margin_se" not in rows[0]


def test_averaged_weights_are_the_recursion(arguments, tmp_path):
    train.main(arguments("--use_ema", "--ema_decay=0.9", "--checkpointing_steps=1"))
    base = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["pretrained_model_name_or_path"]
    start = load_family("sd15", base).load_unet().state_dict()
    expected = dict(start)
    for step in (1, 2, 3):
        state = weights(tmp_path / "run" / f"checkpoint-{step}")
        expected = {name: 0.9 * expected[name] + 0.1 * state[name] for name in expected}
    averaged = weights(tmp_path / "run", "unet_ema.pth")
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value, rtol=1e-5, atol=1e-7)


def test_held_out_figures_are_those_of_the_saved_weights(arguments, tmp_path):
    """Computed again from unet.pth and the base, pair by pair; the batch size does not matter."""
    flags = ["--validation_split=validation", "--validation_pairs=10", "--validation_steps=2"]
    train.main([*arguments(*flags), "--train_batch_size=4"])
    first = read_metrics(tmp_path / "run", "heldout/winner_error_change")
    assert [step for step, _ in first] == [0, 2, 3] and first[0][1] == 0
    run, _, held_out = set_up([*arguments(*flags, out="again"), "--train_batch_size=1"])
    models = run.family.load_unet(str(tmp_path / "run" / "unet.pth")), run.family.load_unet()
    changes = []
    for _, x in held_out.shares:  # winner, loser of one pair
        with torch.no_grad():
            outputs = [model(x.noisy, x.timesteps, **x.conditioning).sample for model in models]
        trained, base = ((output - x.target).square().mean((1, 2, 3)) for output in outputs)
        changes.append(trained - base)
    winner, loser = torch.stack(changes).double().unbind(1)
    sums = Counter()  # of deviations, by caption: pairs of one are not independent
    for (caption,), change in zip(prepare_pairs(run.config, run.seed)[1].captions(), winner, strict=True):
        sums[caption] += (change - winner.mean()).item()
    assert 1 < len(sums) < 10
    sizes = Counter(held_out.captions)
    squares = sum((value / (10 - sizes[caption])) ** 2 for caption, value in sums.items())
    margin = -run.config.beta_dpo / 2 * (winner - loser)
    expected = {
        "winner_error_change": winner.mean(),
        "winner_error_change_se": ((len(sums) - 1) / len(sums) * squares) ** 0.5,
        "loser_error_change": loser.mean(),
        "margin": margin.mean(),
        "margin_accuracy": (margin > 0).double().mean(),
    }
    for name, value in expected.items():
        last = read_metrics(tmp_path / "run", f"heldout/{name}")[-1][1]
        assert last == pytest.approx(float(value), rel=1e-3), name


def test_held_out_errors_that_are_not_finite_are_said(caplog):
    figures = {"winner_error_change": 0.1, "loser_error_change": math.inf, "margin": math.inf, "margin_accuracy": 1.0}
    for loser, said in ((0.2, 0), (math.inf, 1), (math.nan, 1)):
        caplog.clear()
        changed = {f"heldout/{name}": value for name, value in (figures | {"loser_error_change": loser}).items()}
        train.log_held_out(SimpleNamespace(step=1), changed)
        assert caplog.text.count("CAUTION: held-out errors are not finite") == said


def test_pairs_of_one_caption_are_not_independent():
    """The standard error is that of the means of captions where these have as many pairs; else that of pairs."""
    values = torch.tensor([1.0, 2, 4, 9, 3, 5, 8, 2, 7, 1, 0, 6], dtype=torch.float64)
    assert clustered_error(values, torch.arange(12)) == pytest.approx(values.std().item() / 12**0.5)
    means = values.view(4, 3).mean(1)
    assert clustered_error(values, torch.tensor([5, 0, 2, 9]).repeat_interleave(3)) == pytest.approx(
        means.std().item() / 2
    )
    assert clustered_error(values, torch.zeros(12, dtype=torch.long)) is None


def test_captions_of_many_pairs_count_as_the_captions_that_they_are():
    """The error is the jackknife's over captions; of means of unequal captions it has the right size on average."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([40, 20, 13, 10, 8, 6, 5, 5, 4, 4, 3])
    clusters = torch.arange(len(sizes)).repeat_interleave(sizes)
    effects = torch.randn(2000, len(sizes), generator=generator, dtype=torch.float64)[:, clusters]
    errors = torch.tensor([clustered_error(values, clusters) for values in effects])
    assert errors.square().mean().item() == pytest.approx(effects.mean(1).var().item(), rel=0.1)
    without = torch.stack([effects[0, clusters != cluster].mean() for cluster in range(len(sizes))])
    deviations = without - effects[0].mean()
    jackknife = ((len(sizes) - 1) / len(sizes) * deviations.square().sum()).sqrt()
    assert errors[0].item() == pytest.approx(jackknife.item())


def test_a_held_out_error_that_is_not_finite_is_no_wrong_margin(arguments):
    run, _, held_out = set_up(arguments("--validation_pairs=6"))
    held_out.reference_errors[0, 0] = torch.nan  # of a winner
    assert math.isnan(held_out.figures(held_out.measure(run.policy), 100.0)["margin_accuracy"])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_equal_models_have_a_held_out_accuracy_of_one_half(arguments, tmp_path, precision):
    train.main(arguments("--validation_pairs=6", "--max_train_steps=1", f"--mixed_precision={precision}"))
    assert dict(read_metrics(tmp_path / "run", "heldout/margin_accuracy"))[0] == 0.5


def test_held_out_standard_errors_go_by_the_captions_of_readable_pairs(arguments):
    """Of captions with as many pairs each, it is that of their means; nor is a graph kept while they are measured."""
    run, _, held_out = set_up(arguments("--validation_split=validation", "--validation_pairs=10"))
    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter.mul_(1.1)
    held_out.captions = list("aaaabbccdd")
    errors, means = held_out.measure(run.policy), []
    for prompt in "bcd":
        held_out.readable = torch.tensor([name == prompt for name in held_out.captions])
        means.append(held_out.figures(errors, 100.0)["winner_error_change"])
    held_out.readable = torch.arange(10) >= 4
    figures = held_out.figures(errors, 100.0)
    assert figures["winner_error_change_se"] == pytest.approx(np.std(means, ddof=1) / 3**0.5, rel=1e-5)
    assert not held_out._errors(run.policy, held_out.shares[0][1]).requires_grad


class FivePairs:
    """Held-out samples that are their own places, of which the fourth cannot be read."""

    class Pairs(list):
        def captions(self):
            return [["a", "b"], ["b"], ["b", "a"], ["c", "a"], ["a"]]

    pairs = Pairs(range(5))

    def __getitem__(self, place):
        return {"place": place, "unreadable": ["row 3: broken"] if place == (0, 3) else []}


def test_held_out_pairs_are_dealt_out_and_what_any_rank_cannot_read_is_left_out(monkeypatch):
    """The second of two ranks, whose neighbour can read everything."""
    rank = SimpleNamespace(
        num_processes=2, process_index=1, device=torch.device("cpu"), autocast=nullcontext,
        gather=lambda own: torch.cat([torch.zeros_like(own), own]),
    )  # fmt: skip
    inputs = SimpleNamespace(noisy=None, timesteps=None, conditioning=None, target=torch.zeros(4, 1, 1, 1))
    inputs.to = lambda device: inputs
    monkeypatch.setattr(heldout, "collate", lambda samples: SimpleNamespace(to=lambda device: samples))
    monkeypatch.setattr(heldout, "make_inputs", lambda family, batch: inputs)
    family = SimpleNamespace(predict=lambda *given: torch.ones(4, 1, 1, 1))
    pairs = HeldOutPairs(rank, family, FivePairs(), 2, None)
    assert [(places.start, places.stop) for places, _ in pairs.shares] == [(2, 4), (0, 2)]  # as many as rank 0 has
    assert pairs.readable.tolist() == [True, True, True, False, True]
    assert pairs.captions == ["a", "b", "b", "c", "a"]  # the first one is what they are measured with


@pytest.mark.parametrize("short", [0, 1000])
def test_measuring_shows_progress_where_it_takes_long(arguments, monkeypatch, capsys, short):
    monkeypatch.setattr(heldout, "PROGRESS_AFTER", short)
    train.main(arguments("--validation_pairs=4", "--max_train_steps=1"))
    said = capsys.readouterr().err
    assert all((what in said) == (not short) for what in ("encoding held-out pairs:", "measuring held-out pairs:"))


def test_validation_prompts_are_sampled(arguments, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    train.main(
        arguments(f"--validation_prompts={tmp_path / 'prompts.txt'}", "--max_train_steps=1", "--report_to=tensorboard")
    )
    for step in ("step-000000", "step-000001"):
        assert len(list((tmp_path / "run" / "validation" / step).glob("*.png"))) == 2
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "tuning")).Reload()
    for name in ("validation/000", "validation/001"):
        assert [image.step for image in events.Images(name)] == [0, 1]


def test_a_launchers_compiler_is_not_used(arguments, tmp_path, monkeypatch):
    """It would compile the policy alone, and put its own names into the weights."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    train.main(arguments("--max_train_steps=1"))
    assert not [name for name in weights(tmp_path / "run") if name.startswith("_orig_mod")]


def test_dropout_is_refused(arguments, bases, tmp_path):
    base = shutil.copytree(bases["sd15", "epsilon"], tmp_path / "base")
    edit_json(base / "unet" / "config.json", dropout=0.1)
    with pytest.raises(InputError, match="the UNet has dropout, which tells policy and reference apart: set it to 0"):
        train.main([*arguments(), f"--pretrained_model_name_or_path={base}"])


@pytest.mark.parametrize("part", ["", "unet", "unet/diffusion_pytorch_model.safetensors"])
def test_a_start_that_predicts_something_else_is_refused(arguments, bases, part):
    with pytest.raises(InputError, match=r"makes v_prediction predictions, .* epsilon ones: give the base"):
        train.main(arguments(f"--unet_init={bases['sd15', 'v_prediction'] / part}"))


def test_an_optimizer_whose_package_is_missing_is_named(arguments, monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    with pytest.raises(InputError, match="--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes"):
        train.main(arguments("--optimizer=adamw8bit"))


def test_two_ranks_checkpoint_finish_and_equal_one(arguments, tmp_path):
    flags = [
        "--use_winner_preserving",
        "--winner_preserving_mu=0.5",
        "--checkpointing_steps=2",
        "--use_ema",
        "--validation_pairs=6",
    ]
    flags += ["--validation_steps=2", "--train_method=dmpo", "--dmpo_alpha=0.01", "--max_train_steps=4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    subprocess.run([*command, *arguments(*flags, out="two")], env=environment, timeout=300, check=True)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["plan"]["processes"] == 2
    assert [path.name for path in sorted((tmp_path / "two").glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]
    train.main(arguments(*flags, out="one"))  # the same micro-batches of 2 pairs, one after the other
    for name in ("train_loss", "grad_norm", "heldout/winner_error_change", "heldout_ema/margin"):
        one, two = (dict(read_metrics(tmp_path / out, name)) for out in ("one", "two"))
        assert one.keys() == two.keys()
        assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-3, abs=1e-6)
    one, two = read_runs({out: str(tmp_path / out) for out in ("one", "two")})
    assert len(one.pairs) == 6 and one.errors.keys() == {"reference", "policy", "average"}
    for model, errors in one.errors.items():
        torch.testing.assert_close(two.errors[model], errors, rtol=1e-3, atol=0)


def test_held_out_pairs_that_cannot_be_read_are_left_out(arguments, pairs_folder, tmp_path, capsys):
    """Not replaced by others, which would then count twice."""
    rows, figures = pq.read_table(pairs_folder / "validation.parquet").to_pylist(), {}
    rows = [row for row in rows if row["label_0"] != 0.5][:6]
    for out in ("whole", "broken"):
        folder = tmp_path / f"{out}-pairs"
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
        flags = arguments(f"--validation_data_dir={folder}", out=out)
        run, _, held_out = set_up(flags)
        with torch.no_grad():
            for parameter in run.policy.parameters():
                parameter.mul_(1.1)
        if out == "whole":
            held_out.readable[0] = False
        figures[out] = held_out.figures(held_out.measure(run.policy), 100.0)
        rows[0]["jpg_0"] = b"no image"
    assert figures["broken"] == figures["whole"]
    assert figures["broken"]["winner_error_change_se"] > 0
    said = capsys.readouterr().err
    assert said.count("unreadable, not measured on: ") == 1 and "row 0" in said
    for row in rows:
        row["jpg_1"] = b"no image"
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    with pytest.raises(InputError, match="no readable pair in 101 draw"):
        set_up(flags)


def test_validation_images_are_those_of_the_stock_pipeline(arguments, bases, tmp_path):
    """25 Euler steps in the standard guidance of 7.5, each prompt from noise of its own."""
    prompts = ["a red circle", "a blue square"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    train.main(arguments(f"--validation_prompts={tmp_path / 'prompts.txt'}", "--max_train_steps=1"))
    pipeline = DiffusionPipeline.from_pretrained(bases["sd15", "epsilon"])
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    options = {"num_inference_steps": 25, "guidance_scale": 7.5, "output_type": "np", "height": 32, "width": 32}
    for index, prompt in enumerate(prompts):
        noise = normal(7, "validation-image", (index,), (1, 4, 8, 8))
        expected = pipeline(prompt, latents=noise, **options).images[0] * 255
        made = np.array(Image.open(tmp_path / "run" / "validation" / "step-000000" / f"{index:03d}.png"), float)
        assert abs(made - expected).max() <= 1.01


def test_averaged_weights_are_in_place_for_a_while():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = AveragedWeights(model, 0.75)
    model.weight.data.fill_(5.0)
    average.update()  # 0.75 * 1 + 0.25 * 5
    for _ in range(2):
        with pytest.raises(KeyError), average.in_place():
            assert model.weight.item() == 2.0
            raise KeyError
        assert model.weight.item() == 5.0
    average.update()  # 0.75 * 2 + 0.25 * 5
    with average.in_place():
        assert model.weight.item() == 2.75
    average.load({"weight": torch.tensor([[9.0]])})
    with average.in_place():
        assert model.weight.item() == 9.0
    assert model.weight.item() == 5.0


def test_averaged_weights_have_held_out_figures_of_their_own(arguments, tmp_path):
    flags = ["--validation_pairs=6", "--use_ema", "--ema_decay=0.9"]
    train.main(arguments(*flags))
    run, _, held_out = set_up(arguments(*flags, out="again"))
    for file, prefix in (("unet.pth", "heldout"), ("unet_ema.pth", "heldout_ema")):
        unet = run.family.load_unet(str(tmp_path / "run" / file))
        for name, value in held_out.figures(held_out.measure(unet), run.config.beta_dpo).items():
            last = read_metrics(tmp_path / "run", f"{prefix}/{name}")[-1]
            assert last == (3, pytest.approx(value, rel=1e-3, abs=1e-6)), name
    changes = [read_metrics(tmp_path / "run", f"{name}/loser_error_change") for name in ("heldout", "heldout_ema")]
    assert [len(values) for values in changes] == [2, 2] and changes[0][-1] != changes[1][-1]


def test_the_last_updates_are_logged_too(arguments, tmp_path):
    for steps in (1, 2):
        train.main(arguments(f"--logging_steps={steps}", out=str(steps)))
    each, some = (read_metrics(tmp_path / name, "train_loss") for name in "12")
    assert [step for step, _ in some] == [2, 3]
    values = [value for _, value in each]
    assert [value for _, value in some] == pytest.approx([(values[0] + values[1]) / 2, values[2]], rel=1e-5)


@pytest.mark.parametrize("step", [0, 1])
def test_tensorboard_hides_updates_that_are_made_again(arguments, tmp_path, step):
    """By a run that goes on from a checkpoint, or was killed before there was one."""
    flags = ["--report_to=tensorboard", "--checkpointing_steps=1", "--validation_pairs=2", "--validation_steps=1"]
    train.main(arguments(*flags))
    (tmp_path / "run" / "unet.pth").unlink()
    for folder in (tmp_path / "run").glob("checkpoint-*" if step == 0 else "none"):
        shutil.rmtree(folder)
    train.main(arguments(*flags, *["--resume_from_checkpoint=checkpoint-1"] * step))
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "tuning")).Reload()
    for name in ("train_loss", "heldout/winner_error_change"):
        kept = read_metrics(tmp_path / "run", name)
        assert [event.step for event in events.Scalars(name)] == [step for step, _ in kept]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([value for _, value in kept])


def test_a_base_of_another_size_than_the_default_is_cautioned_about(arguments, monkeypatch, capsys):
    given = arguments("--max_train_steps=1")
    without = [flag for flag in given if not flag.startswith("--resolution")]
    for resolution, cautioned in ((64, True), (32, False)):
        monkeypatch.setattr(StableDiffusion, "resolution", resolution)
        set_up(without)
        assert (
            "CAUTION: the base makes images of 32 pixels, but is trained on 64" in capsys.readouterr().err
        ) is cautioned
        AcceleratorState._reset_state(reset_partial_state=True)
    set_up(given)
    assert "the base makes images of" not in capsys.readouterr().err


def test_the_resolution_is_said_and_kept(arguments, tmp_path, capsys):
    train.main(arguments("--max_train_steps=1"))
    assert "images         32 x 32 pixels" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["resolution"] == 32
