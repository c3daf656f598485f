"""Micro-steps as CUDA graphs: on a stand-in everywhere, and on a GPU where there is one."""

import pytest
import tape
import torch
from accelerate.state import AcceleratorState
from recording import same, set_up

import train
from sdpo import step
from sdpo.checkpoint import save_checkpoint
from sdpo.command import InputError
from sdpo.graphs import WARM_UP, RecordedSteps

DMPO = ["--train_method=dmpo", "--dmpo_alpha=0.01", "--use_winner_preserving=true", "--winner_preserving_mu=0.9"]
METHODS = {
    "dpo": ["--use_winner_preserving=true", "--winner_preserving_mu=0.5"],
    "dspo": ["--train_method=dspo"],
    "dmpo": [*DMPO, "--winner_preserving_per=pair"],
    "sft": ["--sft"],
    "recomputed": ["--gradient_checkpointing=full"],
    "perturbed": ["--noise_offset=0.1", "--input_perturbation=0.1", "--use_ema"],
}


def begin(flags):
    """A run and its batches."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run, dataset, _ = set_up(flags)
    return run, train.train_batches(run.config, dataset, run.plan, 0, run.step)


def record(run):
    """What Run.prepare does for --cuda_graphs, which is refused without a GPU."""
    run.recorded = RecordedSteps(lambda batch: step.micro_step(run, batch), run.accelerator.device)


def update(run, batches, times):
    """Figures of so many updates, not counting those that are skipped, as fp16 begins."""
    figures = []
    while len(figures) < times:
        if step.update(run, batches) is None:
            figures.append(run.meter.reduce())
    return figures


def weights(run):
    return {name: value.clone() for name, value in run.policy.state_dict().items()}


@pytest.mark.parametrize(
    "family, method", [*(("sd15", method) for method in METHODS), ("sdxl", "dpo"), ("sdxl", "dspo")]
)
def test_recorded_micro_steps_are_the_run(arguments, tmp_path, family, method):
    flags = [*METHODS[method], f"--latent_cache={tmp_path / 'latents'}", "--max_train_steps=6"]
    run, batches = begin(arguments(*flags, family=family, out="plain"))
    expected, wanted = update(run, batches, 5), weights(run)
    run, batches = begin(arguments(*flags, family=family, out="recorded"))
    with tape.cuda_graphs() as tapes:
        record(run)
        found = update(run, batches, 5)
    assert len(tapes) == 1 and tapes[0].replays == 10 - WARM_UP
    assert found == expected and same(weights(run), wanted)


def test_errors_of_the_reference_are_kept_and_read(arguments, tmp_path):
    """Where an earlier run leaves some of them, there are two kinds of micro-steps."""
    flags = [*DMPO, f"--latent_cache={tmp_path / 'latents'}", "--max_train_steps=8"]
    run, batches = begin(arguments(*flags, out="plain"))
    expected, wanted = update(run, batches, 8), weights(run)
    flags += [f"--reference_cache={tmp_path / 'references'}"]
    run, batches = begin(arguments(*flags, out="first"))
    with tape.cuda_graphs() as tapes:
        record(run)
        update(run, batches, 4)
        run.reference_errors.write(run.step)
        run, batches = begin(arguments(*flags, out="second"))
        record(run)
        found = update(run, batches, 8)
    assert [one.replays for one in tapes] == [8 - WARM_UP] * 3
    assert found == expected and same(weights(run), wanted)


@pytest.mark.usefixtures("fp16")
def test_the_scale_of_fp16_reaches_recorded_micro_steps(arguments, tmp_path):
    flags = [f"--latent_cache={tmp_path / 'latents'}", "--max_train_steps=30", "--learning_rate=1e-5"]
    run, batches = begin(arguments(*flags, out="plain"))
    expected, wanted, scale = update(run, batches, 4), weights(run), run.accelerator.scaler.get_scale()
    assert scale < 2.0**17  # it was found while micro-steps were recorded
    run, batches = begin(arguments(*flags, out="recorded"))
    with tape.cuda_graphs() as tapes:
        record(run)
        assert update(run, batches, 4) == expected
    assert tapes[0].replays > 4 and same(weights(run), wanted) and run.accelerator.scaler.get_scale() == scale


def test_a_skipped_update_leaves_nothing_behind(arguments, tmp_path):
    flags = [f"--latent_cache={tmp_path / 'latents'}", "--max_train_steps=6"]
    run, batches = begin(arguments(*flags, "--skip_grad_norm_above=1e-9"))
    with tape.cuda_graphs():
        record(run)
        before = weights(run)
        skipped = [step.update(run, batches) for _ in range(3)]
        assert all(skipped) and len(skipped[0].losses) == 2
    assert same(weights(run), before)
    assert all(not parameter.grad.any() for parameter in run.policy.parameters())


def test_nothing_may_be_read_from_the_device(arguments, tmp_path):
    run, batches = begin(arguments(f"--latent_cache={tmp_path / 'latents'}"))
    with tape.cuda_graphs():
        run.recorded = RecordedSteps(lambda batch: {"noise": batch.noise.sum() * batch.noise.sum().item()}, "cpu")
        batch = next(batches)
        for _ in range(WARM_UP):
            run.recorded(batch)
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            run.recorded(batch)


def test_where_they_cannot_run(arguments, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--cuda_graphs goes with --latent_cache"):
        begin(arguments("--cuda_graphs"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(InputError, match="--cuda_graphs runs on one GPU in one process"):
        begin(arguments("--cuda_graphs", f"--latent_cache={tmp_path / 'latents'}"))


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_a_gpu
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_a_gpu_keeps_its_losses(arguments, tmp_path, method, precision):
    flags = [*METHODS[method], f"--latent_cache={tmp_path / 'latents'}", "--max_train_steps=30"]
    flags += [f"--mixed_precision={precision}", "--learning_rate=1e-5"]
    run, batches = begin(arguments(*flags, out="plain"))
    expected = update(run, batches, 5)
    run, batches = begin(arguments(*flags, "--cuda_graphs", out="recorded"))
    found = update(run, batches, 5)
    assert len(run.recorded.recordings) == 1
    tolerance = 1e-5 if precision == "no" else 1e-2
    assert [figures["train_loss"] for figures in found] == pytest.approx(
        [figures["train_loss"] for figures in expected], rel=tolerance
    )
    if method != "sft":
        assert found[0]["rewards/margins"] == expected[0]["rewards/margins"] == 0


@on_a_gpu
def test_a_run_on_a_gpu_is_resumed(arguments, tmp_path):
    flags = [f"--latent_cache={tmp_path / 'latents'}", "--max_train_steps=8", "--cuda_graphs", "--use_ema"]
    run, batches = begin(arguments(*flags))
    update(run, batches, 4)
    save_checkpoint(run, prune=False)
    expected = update(run, batches, 3)
    again, batches = begin(arguments(*flags))
    found = update(again, batches, 3)
    assert [figures["train_loss"] for figures in found] == pytest.approx([f["train_loss"] for f in expected], rel=1e-4)


@on_a_gpu
def test_compiled_blocks_on_a_gpu_keep_the_margin_exact(arguments, tmp_path):
    flags = [f"--latent_cache={tmp_path / 'latents'}", "--cuda_graphs", "--compile", "--channels_last"]
    run, batches = begin(arguments(*flags, "--mixed_precision=bf16", "--max_train_steps=6"))
    figures = update(run, batches, 4)
    assert figures[0]["rewards/margins"] == 0 and figures[0]["avg_lose_diff_loss"] == 0
    assert figures[-1]["avg_win_diff_loss"] != 0 and len(run.recorded.recordings) == 1
