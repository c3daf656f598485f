"""The training benchmark: architectures, counts, the baseline's honesty, what the safeguard keeps, the offline run."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.architectures import BASES, SDXL, Base, batch_of
from benchmarks.baseline import OfficialLoop
from benchmarks.contestants import VARIANTS, OurLoop, Variant, build, cache_latents, make_batch
from benchmarks.counting import count, counted, like_a_gpu
from benchmarks.eval import ratios
from benchmarks.memory import gibibytes
from benchmarks.tables import show_margins, show_race
from benchmarks.train import (
    BaseBenchmark,
    add_ratios,
    check_baseline,
    expected_flops,
    fill_compilers_cache,
    main,
    measure_round,
    safeguard_cost,
)
from sdpo.inputs import make_inputs
from sdpo.losses import diffusion_dpo, pair_terms

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
MICRO = dataclasses.replace(BASES["tiny"], flags=batch_of(2, 32, accumulation=1))
WIDTHS = {"block_out_channels": (8, 16), "norm_num_groups": 2, "layers_per_block": 1}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
}
MICRO_XL = Base(
    {
        "scheduler": SDXL["scheduler"],
        "text_encoder": TEXT,
        "text_encoder_2": TEXT,
        "vae": WIDTHS | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        "unet": WIDTHS | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 2, "cross_attention_dim": 32, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 24 + 16,
        },
    },
    batch_of(2, 32, accumulation=2) | {"sdxl": True}, stored=32,
)  # fmt: skip
SPEEDS = {"baseline": 1.0, "fast": 2.0, "fast, compiled": 3.0}  # pairs per second
PARAMETERS = {  # of the published weights: UNet, VAE, text encoders
    "sd15": [859_520_964, 83_653_863, 123_060_480],
    "sdxl": [2_567_463_684, 83_653_863, 123_060_480, 694_659_840],
}
TFLOP = {  # per pair at the official resolution, counted independently
    "sd15": {"encode": 2.23, "text": 0.013, "policy forward": 1.61, "backward": 3.21, "recomputation": 1.19},
    "sdxl": {"encode": 9.76, "text": 0.11, "policy forward": 13.52, "backward": 26.94, "recomputation": 10.42},
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.mark.parametrize("name", PARAMETERS)
def test_architectures_have_the_published_number_of_parameters(name):
    family = BASES[name].build("meta")
    models = [family.load_unet(), family.vae, *family.text_encoders]
    assert [sum(p.numel() for p in model.parameters()) for model in models] == PARAMETERS[name]


@pytest.mark.parametrize("name", TFLOP)
def test_counts_are_the_known_ones(name):
    parts = count(BASES[name], torch.bfloat16)
    for part, tera in TFLOP[name].items():
        assert parts[part]["flops"] / 1e12 == pytest.approx(tera, rel=0.03 if tera < 1 else 0.003), part
    weights = 2 * PARAMETERS[name][0] / BASES[name].config().train_batch_size  # bytes, bf16, read once per micro-step
    assert weights < parts["policy forward"]["bytes"] < 10 * weights * BASES[name].config().train_batch_size


def test_the_count_is_a_command():
    """In a process of its own: transformers may leave torch.linspace as it had it for tensors without data."""
    command = [sys.executable, ROOT / "benchmarks" / "train.py", "--count", "--bases", "small"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "| small, 128 px, 4 pairs | 0.00857 / " in result.stdout, result.stderr


def test_results_are_written_where_there_is_time_for_no_contestant(tmp_path, monkeypatch):
    flags = ["--bases", "tiny", "--seconds", "0", "--minutes", "0", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/train.py", *flags])
    with pytest.raises(SystemExit, match="False"):  # nothing failed
        main()
    (path,) = tmp_path.glob("cpu-*.json")
    assert json.loads(path.read_text())["bases"]["tiny"]["safeguard"]["on_to_off"]["rounds"] >= 3


def test_bytes_are_inputs_and_outputs_and_views_cost_nothing():
    counts, a, b = {}, torch.randn(8, 16), torch.randn(16, 32)
    with counted(counts, share=0.5):
        torch.mm(a, b).t().reshape(-1)[:4].relu()
    copied = 2 * 8 * 32  # the reshape of a transposed matrix is a copy
    assert counts == {"flops": 8 * 16 * 32, "bytes": 2 * (8 * 16 + 16 * 32 + 8 * 32 + copied + 2 * 4)}


def test_attention_costs_two_products_forward_and_four_backward():
    forward, backward = {}, {}
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (64, 77, 77))
    with counted(forward):
        out = F.scaled_dot_product_attention(q, k, v)
    with counted(backward):
        out.sum().backward()
    product = 2 * 2 * 3 * 64 * 77 * 8
    assert (forward["flops"], backward["flops"]) == (2 * product, 4 * product)


@pytest.mark.parametrize("base", [MICRO, MICRO_XL], ids=["sd15", "sdxl"])
def test_the_baseline_does_the_counted_work(base):
    assert check_baseline(base, count(base, torch.float32), CPU)["ratio"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", sorted(name for name in VARIANTS if "compiled" not in name))
def test_every_contestant_makes_updates(name):
    if name == "AdamW in 8 bits":
        pytest.importorskip("bitsandbytes")
    contestant = build(MICRO_XL, name, CPU)
    clipped, clip = [], contestant.accelerator.clip_grad_norm_
    contestant.accelerator.clip_grad_norm_ = lambda *given: clipped.append(clip(*given)) or clipped[-1]
    contestant.update()
    assert name == "baseline" or contestant.first_margin == 0
    assert len(clipped) == 1  # in the official loop too, where Adafactor is not asked for by a flag of its own


def test_the_compilers_cache_is_filled_with_the_blocks_that_are_measured(monkeypatch):
    """By their graphs' inputs; compiling itself takes minutes."""

    def compile_nothing(forward, **_):
        def call(*inputs, **options):
            tensors = [value for value in (*inputs, *options.values()) if isinstance(value, torch.Tensor)]
            seen = [(x.shape, x.stride(), x.dtype, x.requires_grad) for x in tensors]
            if not any(isinstance(x, FakeTensor) for x in tensors):  # of what only counts activations
                called.add((type(forward.__self__), *seen))
            return forward(*inputs, **options)

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    called = set()
    build(MICRO_XL, "fast, compiled", CPU).update()
    measured = set(called)
    called.clear()
    fill_compilers_cache({"micro": MICRO_XL}, CPU)
    assert called == measured and len(called) > 3


def test_speed_counts_the_pairs_of_all_micro_steps(monkeypatch):
    ticks, steps, update = itertools.count(), [], OurLoop.update
    monkeypatch.setattr("benchmarks.train.clock", lambda device: float(next(ticks)))
    monkeypatch.setattr(OurLoop, "update", lambda self: steps.append(self.run.plan.accumulation) or update(self))
    figures = measure_round(build(MICRO_XL, "default", CPU), CPU, least=2.0)  # 2 pairs x 2 micro-steps
    assert figures["pairs_per_second"] == 4 and steps == [1, 2, 2]


def test_flops_of_what_a_contestant_leaves_out_are_not_expected():
    parts = {name: {"flops": 10**n} for n, name in enumerate(("policy forward", "backward", "encode", "text"))}
    assert [expected_flops(parts, **left) for left in ({}, {"cached": True}, {"known": True})] == [1112, 12, 1111]


def test_ratios_are_of_the_speeds():
    assert ratios({"a": 2.0, "b": 6.0})["b"] == {"images_per_second": 6.0, "ratio": 3.0}


def test_adamw_takes_18_bytes_per_parameter_before_activations():
    count = sum(p.numel() for p in BASES["small"].build("meta").load_unet().parameters())
    with like_a_gpu():
        before, least, most = gibibytes("small", "adamw", 0, 1, compiled=False)
        adapted, *_ = gibibytes("small", "adamw", 4, 1, compiled=False)
    assert 4 * count / 2**30 < adapted < 4.2 * count / 2**30
    assert before == pytest.approx(18 * count / 2**30, rel=0.01) and 0 < least < most


def test_changes_change_what_they_are_called():
    low = dataclasses.replace(MICRO, flags=MICRO.flags | {"mixed_precision": "bf16"})
    for base, name, processor in (
        (MICRO, "unfused attention", AttnProcessor),
        (low, "default", AttnProcessor),
        (low, "fused attention", AttnProcessor2_0),
        (low, "baseline", AttnProcessor2_0),
    ):
        contestant = build(base, name, CPU)
        for unet in (contestant.policy, contestant.reference):
            assert {type(used) for used in unet.attn_processors.values()} == {processor}
        AcceleratorState._reset_state(reset_partial_state=True)
    fetched = build(MICRO, "figures fetched", CPU)
    gathered, gather = [], fetched.accelerator.gather
    fetched.accelerator.gather = lambda value: gathered.append(value) or gather(value)
    fetched.update()
    assert [value.dim() for value in gathered[:7]] == [0] * 7
    assert build(MICRO, "averaged weights", CPU).run.average is not None


def test_the_baseline_computes_the_same_loss_and_gradient_as_we_do():
    baseline = build(MICRO, "baseline", CPU)
    torch.manual_seed(1)
    target, prediction, reference = (torch.randn(8, 4, 8, 8, dtype=torch.float32) for _ in range(3))
    prediction, reference = target + 0.01 * prediction, target + 0.01 * reference
    gradients, losses = [], []
    for ours in (False, True):
        x = prediction.clone().requires_grad_()
        terms = pair_terms(x, reference, target, 5000.0, mu=0.9)
        loss = diffusion_dpo(terms).mean() if ours else baseline.loss(x, reference, target)[0]
        loss.backward()
        losses.append(loss.detach())
        gradients.append(x.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_the_baseline_updates_the_policy_and_fetches_seven_figures_per_micro_step():
    baseline = build(MICRO, "baseline", CPU)
    before = [p.detach().clone() for p in baseline.policy.parameters()]
    baseline.update()  # the first step of the warm-up has learning rate 0
    baseline.micro_step()
    assert len(baseline.figures) == 7 and all(isinstance(figure, float) for figure in baseline.figures)
    assert any(not torch.equal(a, b) for a, b in zip(before, baseline.policy.parameters(), strict=True))


def test_an_update_that_is_skipped_is_an_error_and_no_fast_update():
    contestant = build(MICRO, "default", CPU)
    batch = next(contestant.batches)
    contestant.batches = itertools.repeat(dataclasses.replace(batch, noise=batch.noise * float("nan")))
    with pytest.raises(RuntimeError, match="skipped"):
        contestant.update()


def test_cached_latents_are_the_encoded_ones():
    base = MICRO
    config, family = base.config(mixed_precision="no"), base.build(CPU)
    contestant = OurLoop(config, family, Variant())
    batch = make_batch(family, config)
    encoded = make_inputs(family, batch)
    cached = make_inputs(family, cache_latents(contestant.run, batch))
    torch.testing.assert_close(vars(cached), vars(encoded), rtol=0, atol=0)


@pytest.mark.parametrize("per_pair", [False, True])
def test_the_safeguard_keeps_no_more_than_a_number_per_pair_for_the_backward_pass(per_pair):
    def kept(side, mu):
        sizes, pairs = [], 4
        prediction = torch.randn(2 * pairs, 4, side, side, requires_grad=True)
        reference, target = torch.randn(2, 2 * pairs, 4, side, side)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            pair_terms(prediction, reference, target, 5000.0, mu=mu, per_pair=per_pair).margin.sum()
        return sum(sizes)

    assert [kept(side, 0.9) - kept(side, None) for side in (8, 32)] == ([3, 3] if per_pair else [0, 0])


def test_the_safeguard_is_measured_on_and_off(monkeypatch):
    made, update = [], OurLoop.update
    monkeypatch.setattr(
        OurLoop, "update", lambda self: (made.append(self.run.config.use_winner_preserving), update(self))
    )
    cost = safeguard_cost(MICRO, CPU, 0.0)
    assert cost["on_to_off"]["rounds"] >= 3
    assert made[1:] == [True, False, False, True] * (len(made) // 4) + [True, False] * (len(made) // 2 % 2)
    assert 0 < cost["on_to_off"]["low"] <= cost["on_to_off"]["median"] <= cost["on_to_off"]["high"]
    assert cost["on_to_off"]["mean"] > 0 and cost["on_to_off"]["standard_error"] > 0


BLOCK = """
import importlib.util, sys

MISSING = {"datasets", "ftfy", "open_clip", "peft", "pyarrow", "torchvision", "pooch", "scipy", "tensorboard"}
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in MISSING else find_spec(name, *rest)


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
"""


def test_the_gpu_suite_runs_without_packages_that_training_does_not_need(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    check = subprocess.run([sys.executable, "-c", "import datasets"], env=environment, capture_output=True, text=True)
    assert "No module named 'datasets'" in check.stderr
    flags = "--device cpu --bases tiny --pairs 2 --accumulation 1 --rounds 1 --seconds 0 --minutes 2"
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *flags.split()]
    run = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = (tmp_path / "out").glob("cpu-*.json")
    tiny = json.loads(path.read_text())["bases"]["tiny"]
    assert tiny["data_ms_per_pair"] is None
    for other in ("baseline", "default"):
        for result in tiny[f"against_{other}"].values():
            assert result[f"ratio_to_{other}"]["median"] > 0
            assert result["parts_ms"]["backward"] > 0
    table = path.with_suffix(".md").read_text()
    assert "| baseline |" in table and "by `OMP_NUM_THREADS=1 python benchmarks/train.py --minutes " in table
    assert "1.0000 of the count" in table


@pytest.mark.parametrize(
    "script, flags, figures",
    [
        ("cache.py", "--pairs 200 --folder {tmp}", lambda results: results["tasks"].values()),
        ("eval.py", "--batches 1 2 --images 2", lambda results: results["scoring"]["passes"].values()),
    ],
)
def test_the_other_benchmarks_run(tmp_path, script, flags, figures):
    command = [sys.executable, ROOT / "benchmarks" / script, "--repeats=1", f"--out={tmp_path}"]
    run = subprocess.run([*command, *flags.format(tmp=tmp_path).split()], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert results["command"].startswith(f"OMP_NUM_THREADS=1 python benchmarks/{script} --repeats=1")
    assert all(row.get("pairs_per_second", row.get("images_per_second")) > 0 for row in figures(results))


def test_a_failing_contestant_is_named_and_the_others_go_on(monkeypatch):
    def broken(run, batch):
        raise torch.OutOfMemoryError("no memory for this one")

    monkeypatch.setitem(VARIANTS, "greedy", Variant(changes=(broken,)))
    results = {name: {"rounds": []} for name in ("default", "greedy")}
    turns = list(BaseBenchmark(MICRO, CPU, compiled=False, rounds=2, least=0).race(results, until=float("inf")))
    assert turns == ["default", "greedy", "default"]
    add_ratios(results, {"default": 1.0, "greedy": 1.0}, peak=1.0)
    assert len(results["default"]["rounds"]) == 2
    assert show_margins({"against_default": results}) == "0 in all 1 contestants"
    assert "| greedy | OutOfMemoryError: no memory for this one |" in show_race(results)


def test_compiled_blocks_are_compared_with_the_same_without():
    results = {
        name: {"rounds": [{"pairs_per_second": v, "parts_ms": {"other": v}} for v in (speed, speed, 4 * speed)]}
        for name, speed in SPEEDS.items()
    }
    add_ratios(results, dict.fromkeys(SPEEDS, 1e12), peak=1e13)
    assert results["fast, compiled"]["ratio_to_baseline"] == {"median": 3.0, "low": 3.0, "high": 3.0, "rounds": 3}
    assert results["fast"]["parts_ms"] == {"other": SPEEDS["fast"]}  # of the first round
    assert results["fast, compiled"]["ratio_to_fast"]["median"] == 1.5
    assert results["fast"]["share_of_matmul_peak"] == pytest.approx(0.2)
    alone = {name: results[name] for name in ("baseline", "fast, compiled")}
    add_ratios(alone, dict.fromkeys(alone, 1e12), peak=1e13)  # where the uncompiled one is left out
    assert alone["fast, compiled"]["ratio_to_baseline"]["median"] == 3.0


def test_rounds_end_with_the_time():
    results = {"default": {"rounds": []}}
    assert not list(BaseBenchmark(MICRO, CPU, compiled=False, rounds=2, least=0).race(results, until=0.0))
    add_ratios(results, {"default": 1.0}, peak=1.0)
    assert "| default | no time left |" in show_race(results)


def test_the_official_loop_has_all_weights_of_the_reference_in_the_training_precision():
    base = MICRO
    config, family = base.config(mixed_precision="bf16"), base.build(CPU)
    baseline = OfficialLoop(config, family, make_batch(family, config))
    assert {p.dtype for p in baseline.reference.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in baseline.policy.parameters()} == {torch.float32}
    noisy, noise, timesteps, conditioning = baseline.make_inputs()
    assert {noisy.dtype, noise.dtype, conditioning["encoder_hidden_states"].dtype} == {torch.bfloat16}
    with torch.no_grad():
        assert family.predict(baseline.reference, noisy, timesteps, conditioning).isfinite().all()
