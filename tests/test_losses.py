"""The losses and the safeguard against the official code's figures, autograd and closed forms."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from sdpo.losses import PAIR_LOSSES, pair_terms, sample_mean, scale_gradient, sft, winner_preserving_scale

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "golden_losses.json").read_text())
METHODS = sorted(PAIR_LOSSES)


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "golden_losses.safetensors")


def pairs(seed, size=3, shape=(4, 8, 8), dtype=torch.float32):
    """Prediction, reference and target (2 * size, *shape): targets differ between winner and loser, residuals correlate."""
    draw = torch.Generator().manual_seed(seed)
    target, noise, drift = (torch.randn(2 * size, *shape, generator=draw) for _ in range(3))
    noise = noise + torch.randn(size, *shape, generator=draw).repeat(2, 1, 1, 1)
    return [x.to(dtype) for x in (target + 0.3 * noise + 0.1 * drift, target + 0.3 * noise, target)]


def loss_of(method, terms, alpha=0.01):
    """A loss by name, (B,)."""
    options = {"alpha": alpha} if "alpha" in PAIR_LOSSES[method].options else {}
    return PAIR_LOSSES[method].function(terms, **options)


def backward(method, prediction, reference, target, beta=20.0, alpha=0.01, **safeguard):
    """Loss value and its gradient with respect to the prediction."""
    prediction = prediction.clone().requires_grad_()
    terms = pair_terms(prediction, reference, target, beta, **safeguard)
    loss = loss_of(method, terms, alpha).mean()
    loss.backward()
    return loss.detach(), prediction.grad


@pytest.mark.parametrize("method", ["diffusion-dpo", "dmpo"])
def test_known_errors_of_the_reference_stand_for_its_prediction(method):
    prediction, reference, target = pairs(3)
    computed = backward(method, prediction, reference, target, mu=0.5)
    known = sample_mean((reference - target).square())
    read = backward(method, prediction, None, target, mu=0.5, reference_error=known)
    assert all(map(torch.equal, computed, read))


def test_known_errors_in_low_precision_are_subtracted_in_it():
    """As the official code does, whose reference's errors are bf16 tensors."""
    prediction, _, target = pairs(3)
    known = torch.tensor([0.1, 0.2, 0.3, 1.7, 2.9, 0.75]).bfloat16().requires_grad_()
    error_w, error_l = sample_mean((prediction - target).square()).chunk(2)
    difference = (known[:3] - known[3:]).detach().float()  # of bf16 numbers, so bf16
    assert not difference.equal(known[:3].float() - known[3:].float())
    terms = pair_terms(prediction.requires_grad_(), None, target, 5000.0, reference_error=known)
    assert torch.equal(terms.margin, -2500 * ((error_w - error_l) - difference))
    assert terms.margin.dtype == terms.reference_error_w.dtype == torch.float32
    terms.margin.sum().backward()
    assert known.grad is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']}-{case['method']}-{case['kind']}")
def test_official_cases(case, golden):
    tensor = {
        name: golden[f"{case['id']:03d}.{name}"]
        for name in ("model_pred", "ref_pred", "target", "loss", "lam", "inside_term", "grad")
    }
    method = {"dspo": "dspo-switched" if case["sdxl"] else "dspo-score"}.get(case["method"], case["method"])
    prediction = tensor["model_pred"].clone().requires_grad_()
    terms = pair_terms(
        prediction, tensor["ref_pred"], tensor["target"], case["beta"], mu=case["mu"] if case["use_wp"] else None
    )
    loss = loss_of(method, terms, case["alpha"]).mean()
    loss.backward()
    for got, expected in (
        (loss, "loss"),
        (terms.loser_scale, "lam"),
        (terms.margin, "inside_term"),
        (prediction.grad, "grad"),
    ):
        torch.testing.assert_close(got, tensor[expected], rtol=1e-5, atol=0)


# The closed-form scale against autograd, and the rule it promises


def scale_by_autograd(prediction, target, mu):
    """Lambda from gradients that autograd takes of the two members' mean errors."""
    prediction = prediction.clone().requires_grad_()
    error_w, error_l = ((prediction - target) ** 2).chunk(2)
    grad_w = torch.autograd.grad(error_w.mean(), prediction, retain_graph=True)[0].chunk(2)[0].flatten()
    grad_l = torch.autograd.grad(error_l.mean(), prediction)[0].chunk(2)[1].flatten()
    inner = grad_w @ grad_l
    return min(1.0, ((1 - mu) * grad_w @ grad_w / (inner + 1e-9)).item()) if inner > 0 else 1.0


@pytest.mark.parametrize("mu", [0.0, 0.2, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_scale_equals_autograd(seed, mu):
    prediction, _, target = pairs(seed, size=4)
    residual_w, residual_l = (prediction - target).chunk(2)
    residual_l = residual_l + 0.5 * residual_w  # so that the inner product is positive
    prediction = target + torch.cat([residual_w, residual_l])
    expected = scale_by_autograd(prediction, target, mu)
    assert winner_preserving_scale(residual_w, residual_l, mu).item() == pytest.approx(expected, rel=1e-5)
    each = winner_preserving_scale(residual_w, residual_l, mu, per_pair=True)
    rows = [torch.stack(pair) for pair in zip(*prediction.chunk(2), strict=True)]
    goals = [torch.stack(pair) for pair in zip(*target.chunk(2), strict=True)]
    assert each.tolist() == pytest.approx(
        [scale_by_autograd(p, t, mu) for p, t in zip(rows, goals, strict=True)], rel=1e-5
    )


@pytest.mark.parametrize("per_pair", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_winner_descends_to_first_order(seed, per_pair):
    """-||g_w||^2 + lambda <g_w, g_l> <= -mu ||g_w||^2 for random residuals and mu."""
    draw = torch.Generator().manual_seed(seed)
    mu = torch.rand((), generator=draw).item()
    residual_w, residual_l = torch.randn(2, 3, 4, 8, 8, generator=draw, dtype=torch.float64) * torch.rand(
        2, 1, 1, 1, 1, generator=draw
    )
    residual_l = residual_l + 3 * torch.rand((), generator=draw) * residual_w
    scale = winner_preserving_scale(residual_w, residual_l, mu, per_pair).double()
    sums = (1,) if per_pair else (0, 1)
    ww, wl = (x.flatten(1).sum(sums) for x in (residual_w**2, residual_w * residual_l))
    assert ((-ww + scale * wl) <= -mu * ww * (1 - 1e-5) + 1e-9).all()
    assert ((scale >= 0) & (scale <= 1)).all()


@pytest.mark.parametrize(
    "relation, mu, expected",
    [
        (lambda w: w, 0.75, 0.25),
        (lambda w: 2 * w, 0.0, 0.5),
        (lambda w: -w, 0.9, 1.0),
        (lambda w: torch.cat([w[:, 1:2], -w[:, :1]], 1), 0.9, 1.0),
        (torch.zeros_like, 0.9, 1.0),
        (lambda w: 0.1 * w, 0.5, 1.0),
    ],
    ids=["identical", "twice", "anti-parallel", "orthogonal", "zero loser", "small loser"],
)
@pytest.mark.parametrize("per_pair", [False, True])
def test_scale_of_special_residuals(relation, mu, expected, per_pair):
    residual_w = torch.randint(-3, 4, (2, 2, 16, 16), generator=torch.Generator().manual_seed(0)).float()  # exact sums
    scale = winner_preserving_scale(residual_w, relation(residual_w), mu, per_pair)
    assert scale.shape == ((2,) if per_pair else ())
    torch.testing.assert_close(scale, torch.full_like(scale, expected), rtol=1e-5, atol=0)


def test_zero_winner_has_no_descent_to_keep():
    loser = torch.randn(2, 4, 8, 8)
    assert winner_preserving_scale(torch.zeros_like(loser), loser, 0.5) == 1  # the inner product is 0, not positive


def test_the_official_epsilon_counts_the_elements_that_share_a_scale():
    """<g_w, g_l> = 4 <e_w, e_l> / N^2 is 1e-9 here, as large as the epsilon, which halves lambda."""
    n = 4 * 64 * 64
    residual = torch.full((3, 4, 64, 64), (1e-9 * n / 4) ** 0.5)
    scale = winner_preserving_scale(residual, residual, 0.0, per_pair=True)
    torch.testing.assert_close(scale, torch.full((3,), 0.5), rtol=1e-4, atol=0)


def test_mu_outside_the_unit_interval_is_refused():
    for mu in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"mu must lie in \[0, 1\]"):
            winner_preserving_scale(torch.ones(1, 4), torch.ones(1, 4), mu)


PAIR = torch.ones(4, 2, 3, 3)  # of two pairs
MISUSE = {
    "three samples": (
        (PAIR[:3], PAIR[:3], PAIR[:3]),
        {},
        r"prediction has shape \(3, 2, 3, 3\), but must hold B winners",
    ),
    "no numbers": ((PAIR[:, :0], PAIR[:, :0], PAIR[:, :0]), {}, "must hold B winners, then B losers"),
    "no pair": ((PAIR[:0], PAIR[:0], PAIR[:0]), {}, "must hold B winners, then B losers"),
    "one number per sample": ((PAIR[:, 0, 0, 0],) * 3, {}, "must hold B winners, then B losers"),
    "one target": (
        (PAIR, PAIR, PAIR[:1]),
        {},
        r"target has shape \(1, 2, 3, 3\), but must have \(4, 2, 3, 3\) like pred",
    ),
    "one reference": ((PAIR, PAIR[:, :1], PAIR), {}, r"reference has shape \(4, 1, 3, 3\), but must have"),
    "no reference": ((PAIR, None, PAIR), {}, "give the reference's prediction, or its errors"),
    "errors of winners": ((PAIR, None, PAIR), {"reference_error": torch.ones(2)}, r"reference_error has shape \(2,\)"),
    "columns": ((PAIR, None, PAIR), {"reference_error": torch.ones(4, 1)}, r"must have \(4,\) like the samples of"),
    "two scales": ((PAIR, PAIR, PAIR), {"mu": 0.5, "constant": 0.5}, "be 1 where mu is given; got 0.5 and mu 0.5"),
    "constant": ((PAIR, PAIR, PAIR), {"constant": 5.0}, r"constant must lie in \[0, 1\]"),
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_arguments_that_would_broadcast_or_mean_nothing_are_refused(misuse):
    (prediction, reference, target), options, message = MISUSE[misuse]
    with pytest.raises(ValueError, match=message):
        pair_terms(prediction, reference, target, 10.0, **options)


def test_other_shapes_are_refused_by_every_public_function():
    with pytest.raises(ValueError, match="residual_l has shape"):
        winner_preserving_scale(PAIR, PAIR[:1], 0.5)
    for per_pair in (False, True):
        with pytest.raises(ValueError, match=r"residual_w has shape .*, but must hold B winners"):
            winner_preserving_scale(PAIR[:0], PAIR[:0], 0.5, per_pair)
    with pytest.raises(ValueError, match="target has shape"):
        sft(PAIR, PAIR[:1])
    terms = pair_terms(PAIR, None, PAIR, 10.0, reference_error=torch.ones(4))
    for method in ("dspo-score", "dspo-switched"):
        with pytest.raises(ValueError, match="needs the reference's prediction"):
            PAIR_LOSSES[method].function(terms)


@pytest.mark.parametrize("method", PAIR_LOSSES)
def test_losses_do_not_depend_on_how_a_sample_is_laid_out(method):
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(4, 2, 3, 3, generator=generator) for _ in range(3)]
    losses = [
        loss_of(method, pair_terms(*(x.view(shape) for x in inputs), 2.0, mu=0.5))
        for shape in ((4, 2, 3, 3), (4, 18), (4, 2, 9), (4, 2, 3, 3, 1))
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


def test_errors_of_policy_and_reference_are_sums_of_one_shape():
    """A GPU sums another shape in another order, and equal models would then have a margin."""
    shapes = []

    class Means(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mean.dim:
                shapes.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    prediction, reference, target = torch.randn(3, 6, 4, 8, 8)
    with Means():
        pair_terms(prediction, reference, target, 5000.0, mu=0.9)
    assert shapes == [(6, 4 * 8 * 8)] * 2


def test_scale_per_pair_does_not_depend_on_the_split():
    prediction, _, target = pairs(0, size=6)
    residual_w, residual_l = (prediction - target).chunk(2)
    residual_l = residual_l + residual_w
    whole = winner_preserving_scale(residual_w, residual_l, 0.9, per_pair=True)
    parts = [
        winner_preserving_scale(winner[None], loser[None], 0.9, per_pair=True)
        for winner, loser in zip(residual_w, residual_l, strict=True)
    ]
    torch.testing.assert_close(whole, torch.cat(parts))


# What the hook changes, and what it must not


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "safeguard", [{"mu": 0.9}, {"mu": 0.9, "per_pair": True}, {"constant": 0.3}, {"constant": 0.0}]
)
def test_hook_leaves_loss_and_winner_untouched(method, safeguard):
    prediction, reference, target = pairs(1)
    loss, grad = backward(method, prediction, reference, target)
    hooked_loss, hooked_grad = backward(method, prediction, reference, target, **safeguard)
    assert torch.equal(loss, hooked_loss)
    assert torch.equal(grad.chunk(2)[0], hooked_grad.chunk(2)[0])
    assert not torch.equal(grad.chunk(2)[1], hooked_grad.chunk(2)[1])
    scale = pair_terms(prediction, reference, target, 20.0, **safeguard).loser_scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(hooked_grad.chunk(2)[1], scale * grad.chunk(2)[1])


@pytest.mark.parametrize("method", METHODS)
def test_scale_one_is_the_plain_method(method, monkeypatch):
    """Bit for bit that without any hook, and to rounding the losses written out."""
    prediction, reference, target = pairs(2)
    beta, alpha = 20.0, 0.01
    leaf = prediction.clone().requires_grad_()
    error, reference_error = ((x - target).square().flatten(1).mean(1).chunk(2) for x in (leaf, reference))
    margin = -beta / 2 * ((error[0] - error[1]) - (reference_error[0] - reference_error[1]))
    drift, residual = ((leaf - x).chunk(2)[0] for x in (reference, target))
    doubt = (1 - margin.sigmoid()).view(-1, 1, 1, 1)
    q = torch.tensor(1 - alpha)
    log = torch.nn.functional.logsigmoid
    expected = {
        "diffusion-dpo": lambda: -log(margin),
        "dmpo": lambda: (
            margin.sigmoid() * (log(margin) - q.log()) + (1 - margin.sigmoid()) * (log(-margin) - (1 - q).log())
        ),
        "dspo-score": lambda: (residual - beta * doubt * drift).square().flatten(1).mean(1),
        "dspo-switched": lambda: doubt.flatten().square(),  # drift^2 is about 0.01 here, below the switch at 0.1
    }[method]().mean()
    expected.backward()
    loss, grad = backward(method, prediction, reference, target, constant=1.0)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-5, atol=1e-8)
    with monkeypatch.context() as without_hook:
        without_hook.setattr("sdpo.losses.scale_gradient", lambda x, scale: x)
        bare_loss, bare_grad = backward(method, prediction, reference, target)
    assert torch.equal(loss, bare_loss) and torch.equal(grad, bare_grad)
    anti = torch.cat([target.chunk(2)[0] + 0.1, target.chunk(2)[1] - 0.1])  # lambda = 1 by the rule
    plain, ruled = (backward(method, anti, reference, target, **options) for options in ({}, {"mu": 0.9}))
    assert torch.equal(plain[0], ruled[0])
    assert torch.equal(plain[1], ruled[1])


def test_switched_form_switches_at_a_mean_squared_drift_of_a_tenth():
    target = torch.zeros(4, 1, 2, 2)
    reference = torch.full_like(target, 0.5)
    for drift, factor in ((0.1**0.5 * 0.999, 1.0), (0.1**0.5 * 1.001, 0.1 * 1.001**2)):
        terms = pair_terms(reference + drift, reference, target, 1.0)
        expected = (1 - terms.margin.sigmoid()).square() * factor
        torch.testing.assert_close(PAIR_LOSSES["dspo-switched"].function(terms), expected)


def test_the_switch_looks_at_the_whole_micro_batch():
    """One pair far from the reference, one near: by their mean, both are treated alike."""
    target = torch.zeros(4, 1, 2, 2)
    for drifts, far in (((0.5, 0.0), True), ((0.4, 0.0), False)):  # mean squares 0.125 and 0.08
        prediction = torch.cat([torch.full((1, 1, 2, 2), drift) for drift in (*drifts, 0.0, 0.0)])
        terms = pair_terms(prediction, target, target, 1.0)
        doubt = (1 - terms.margin.sigmoid()).square()
        expected = doubt * torch.tensor(drifts).square() if far else doubt
        torch.testing.assert_close(PAIR_LOSSES["dspo-switched"].function(terms), expected)


def terms_with_margins(margins):
    """Terms of pairs with these margins at beta 2: r_w - r_l, where the policy is exact."""
    target = torch.zeros(2 * len(margins), 1, 1, 1)
    known = torch.tensor([*margins, *[0.0] * len(margins)])
    return pair_terms(target, target, target, 2.0, reference_error=known)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.5, 1.0])
def test_dmpo_is_the_divergence_at_margins_of_any_size(alpha):
    """Against float64, where nothing underflows; 1 - alpha is kept off 0 and 1 by 1e-6."""
    margins, q = [-300.0, -40.0, -1.0, 0.0, 1.0, 40.0, 300.0], min(max(1 - alpha, 1e-6), 1 - 1e-6)
    expected = []
    for u in margins:
        log_p, log_not_p = -math.log1p(math.exp(-u)), -math.log1p(math.exp(u))
        p = math.exp(log_p)
        expected.append(p * (log_p - math.log(q)) + (1 - p) * (log_not_p - math.log1p(-q)))
    got = PAIR_LOSSES["dmpo"].function(terms_with_margins(margins), alpha)
    torch.testing.assert_close(got.double(), torch.tensor(expected).double(), rtol=1e-2, atol=1e-4)


def test_dpo_is_finite_at_margins_of_any_size():
    got = PAIR_LOSSES["diffusion-dpo"].function(terms_with_margins([-300.0, 0.0, 300.0]))
    torch.testing.assert_close(got, torch.tensor([300.0, math.log(2), 0.0]))


def test_dmpo_turns_at_the_logit_of_its_target():
    """dL/du = p (1 - p) (u - logit q): negative below logit 0.99 = 4.595, positive above."""
    margins = torch.tensor([0.0, 4.5, 4.7, 9.0], requires_grad=True)
    terms = replace(pair_terms(*pairs(0), 1.0), margin=margins)
    PAIR_LOSSES["dmpo"].function(terms, 0.01).sum().backward()
    p = margins.detach().sigmoid()
    torch.testing.assert_close(margins.grad, p * (1 - p) * (margins.detach() - 4.59512), rtol=1e-4, atol=1e-7)


def test_targets_may_differ_between_winner_and_loser():
    prediction, reference, target = pairs(3, size=1)
    terms = pair_terms(prediction, reference, target, 2.0)
    for member, error in ((0, terms.error_w), (1, terms.error_l)):
        assert error.item() == pytest.approx((prediction[member] - target[member]).square().mean().item())


@pytest.mark.parametrize("method", METHODS)
def test_low_precision_inputs_are_computed_in_fp32(method):
    low = pairs(4, dtype=torch.bfloat16)
    exact = backward(method, *[x.float() for x in low], mu=0.5)
    loss, grad = backward(method, *low, mu=0.5)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, exact[0])
    assert torch.equal(grad, exact[1].bfloat16())


def test_equal_models_have_margin_zero_in_low_precision():
    prediction, _, target = pairs(5, dtype=torch.bfloat16)
    assert (pair_terms(prediction, prediction, target, 5000.0).margin == 0).all()


def test_sft_is_the_mean_squared_error():
    prediction, _, target = pairs(6)
    torch.testing.assert_close(sft(prediction, target).mean(), torch.nn.functional.mse_loss(prediction, target))


def test_sft_is_computed_in_fp32():
    prediction, _, target = pairs(4, dtype=torch.bfloat16)
    assert torch.equal(sft(prediction, target), sft(prediction.float(), target.float()))
    assert sft(prediction, target).dtype == torch.float32


def test_gradient_hook_is_identity_forward():
    x = torch.randn(5, requires_grad=True)
    y = scale_gradient(x, torch.tensor(0.25))
    assert torch.equal(x, y)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((5,), 0.25))


def test_nothing_flows_into_reference_targets_or_scale():
    prediction, reference, target = (x.requires_grad_() for x in pairs(5))
    for method in METHODS:
        loss_of(method, pair_terms(prediction, reference, target, 20.0, mu=0.5)).sum().backward()
    sft(prediction, target).sum().backward()
    assert prediction.grad is not None and reference.grad is None and target.grad is None
    scale = winner_preserving_scale(*(prediction - target).chunk(2), 0.5)
    assert not scale.requires_grad
    learnt = torch.tensor(0.5, requires_grad=True)
    scale_gradient(prediction, learnt).sum().backward()
    assert learnt.grad is None


def test_losses_import_without_diffusers():
    code = (
        "import sys, sdpo.losses; print([m for m in ('diffusers', 'transformers', 'accelerate') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=DATA.parents[1], check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_example_of_the_readme_runs(dtype):
    """The library example, executed as it stands, equals Diffusion-DPO with the safeguard."""
    readme = (DATA.parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(example.strip().splitlines()) <= 10
    prediction, reference, target = pairs(7, dtype=dtype)
    leaf = prediction.clone().requires_grad_()
    scope = {"prediction": leaf, "reference": reference, "target": target, "beta": 20.0}
    exec(example, scope)
    scope["loss"].backward()
    loss, grad = backward("diffusion-dpo", prediction, reference, target, mu=0.9)
    torch.testing.assert_close(scope["loss"].detach(), loss)
    torch.testing.assert_close(leaf.grad, grad)
