"""Logged figures against their formulas, and their averages over micro-steps, updates and ranks."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from sdpo.losses import pair_terms
from sdpo.metrics import Meter, MetricsLog, pair_metrics, read_metrics


def test_damaged_lines_of_a_run_are_named_and_left_out(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "x": 0.5}\n{"x": 3}\n[]\n{"step": 2, "x": 0.25}\n{"step": 3, "x"'
    )
    assert read_metrics(tmp_path, "x") == [(1, 0.5), (2, 0.25)]
    assert [f"line {number} is damaged" in caplog.text for number in range(1, 6)] == [False, True, True, False, True]


def test_metrics_are_what_they_are_called():
    draw = torch.Generator().manual_seed(0)
    prediction, reference, target = torch.randn(3, 6, 4, 8, 8, generator=draw, dtype=torch.float64)
    beta, mu, pairs = 3.0, 0.5, 3
    for winner, factor in enumerate((2.0, 3.0, -1.0)):  # lambda is 1/4, 1/6 and 1
        loser = winner + pairs
        residual = factor * (prediction[winner] - target[winner]) + 0.1 * prediction[loser]
        prediction[loser] = target[loser] + residual
    terms = pair_terms(prediction, reference, target, beta, mu=mu, per_pair=True)
    errors = [(x - target).square().mean((1, 2, 3)) for x in (prediction, reference)]
    (change_w, change_l) = (errors[0] - errors[1]).chunk(2)
    margin = -beta / 2 * (change_w - change_l)
    e_w, e_l = (prediction - target).flatten(1).chunk(2)
    ww, ll, wl = (e_w * e_w).sum(1), (e_l * e_l).sum(1), (e_w * e_l).sum(1)
    scale = torch.where(wl > 0, (1 - mu) * ww / wl, 1).clamp(max=1)
    expected = {
        "model_mse_unaccumulated": errors[0].mean(), "ref_mse_unaccumulated": errors[1].mean(),
        "implicit_acc_accumulated": (margin > 0).double().mean(), "rewards/accuracies": (margin > 0).double().mean(),
        "avg_win_diff_loss": change_w.mean(), "avg_lose_diff_loss": change_l.mean(),
        "avg_lose_l_scale": scale.mean(), "lambda/min": scale.min(), "lambda/share_below_1": (scale < 1).double().mean(),
        "residual_cosine": (wl / (ww * ll).sqrt()).mean(),
        "rewards/chosen": -beta / 2 * change_w.mean(), "rewards/rejected": -beta / 2 * change_l.mean(),
        "rewards/margins": margin.mean(),
    }  # fmt: skip
    got = {name: value.item() for name, value in pair_metrics(terms).items()}
    assert got == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4, abs=1e-6)
    assert 0 < got["lambda/share_below_1"] < 1 and 0 < got["rewards/accuracies"] < 1
    assert got["rewards/chosen"] - got["rewards/rejected"] == pytest.approx(got["rewards/margins"], rel=1e-4)


def test_a_margin_of_zero_is_not_accurate():
    target = torch.zeros(4, 1, 2, 2)
    assert pair_metrics(pair_terms(target, target, target, 1.0))["rewards/accuracies"] == 0


def test_metrics_keep_no_graph():
    """An update's activations would stay in memory until its figures are logged."""
    prediction, reference, target = torch.randn(3, 4, 2, 3, 3)
    values = pair_metrics(pair_terms(prediction.requires_grad_(), reference, target, 1.0, mu=0.5))
    assert not any(value.requires_grad for value in values.values())


# Averages


def scalars(loss, least):
    """What a micro-step measures."""
    return {"loss": torch.tensor(loss), "lambda/min": torch.tensor(least)}


def test_the_meter_averages_over_micro_steps_and_updates_and_keeps_minima():
    meter = Meter(Accelerator(cpu=True))
    meter.add([scalars(1.0, 0.9), scalars(2.0, 0.4), scalars(3.0, 0.8)])
    meter.add([scalars(4.0, 0.8), scalars(8.0, 0.7)])
    meter.skipped = 2
    assert meter.reduce() == pytest.approx({"loss": (2 + 6) / 2, "lambda/min": 0.4, "skipped_updates": 2})
    meter.add([scalars(5.0, 0.6)])
    assert meter.reduce() == pytest.approx({"loss": 5.0, "lambda/min": 0.6, "skipped_updates": 0})


def test_the_meter_reduces_over_ranks():
    """The second of two ranks, of which the first has measured 0.25 less."""

    def gather(own):
        return torch.cat([own - 0.25, own])

    meter = Meter(SimpleNamespace(gather=gather, device="cpu", process_index=1, num_processes=2))
    meter.add([scalars(1.0, 0.5)])
    state = meter.state()
    assert state == {"sums": {"loss": [0.75, 1.0], "lambda/min": [0.25, 0.5]}, "made": 1, "skipped": 0}
    assert meter.reduce() == {"loss": 0.875, "lambda/min": 0.25, "skipped_updates": 0}
    meter.load(state)  # of which it takes its own
    assert {name: value.item() for name, value in meter.sums.items()} == {"loss": 1.0, "lambda/min": 0.5}


def test_a_meters_state_goes_on_with_any_number_of_ranks():
    meter = Meter(Accelerator(cpu=True))
    meter.load({"sums": {"loss": [2.0, 4.0], "lambda/min": [0.3, 0.2]}, "made": 2, "skipped": 1})  # of two ranks
    assert meter.reduce() == pytest.approx({"loss": 1.5, "lambda/min": 0.2, "skipped_updates": 1})


# The file


def test_only_the_main_process_writes_lines(tmp_path):
    for main in (True, False):
        rank = SimpleNamespace(is_main_process=main, log=lambda values, step: None)
        log = MetricsLog(rank, tmp_path, first_step=0)
        log.write(1, {"train_loss": 0.5})
        log.write(2, {})
    assert read_metrics(tmp_path, "train_loss") == [(1, 0.5)]


@pytest.mark.parametrize("first_step, kept", [(0, []), (1, [0, 1]), (2, [0, 1, 2])])
def test_figures_that_will_be_measured_again_are_dropped(tmp_path, first_step, kept):
    rank = SimpleNamespace(is_main_process=True, log=lambda values, step: None)
    log = MetricsLog(rank, tmp_path, first_step=0)
    for step in range(3):
        log.write(step, {"loss": 0.5})
    MetricsLog(rank, tmp_path, first_step)
    assert [step for step, _ in read_metrics(tmp_path, "loss")] == kept
