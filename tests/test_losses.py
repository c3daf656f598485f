"""The losses and the safeguard against the official code's figures, autograd and closed forms."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdpo.losses import PAIR_LOSSES, pair_terms, scale_gradient, sft, winner_preserving_scale

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "golden_losses.json").read_text())
METHODS = sorted(PAIR_LOSSES)


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "golden_losses.safetensors")


def pairs(seed, size=3, shape=(4, 8, 8), dtype=torch.float32):
    """Prediction, reference and target (2 * size, *shape) with targets that differ between winner and loser."""
    draw = torch.Generator().manual_seed(seed)
    target, noise, drift = (torch.randn(2 * size, *shape, generator=draw) for _ in range(3))
    return [x.to(dtype) for x in (target + 0.3 * noise + 0.1 * drift, target + 0.3 * noise, target)]


def backward(method, prediction, reference, target, beta=20.0, alpha=0.01, **safeguard):
    """Loss value and its gradient with respect to the prediction."""
    prediction = prediction.clone().requires_grad_()
    terms = pair_terms(prediction, reference, target, beta, **safeguard)
    loss = PAIR_LOSSES[method](terms, beta, alpha).mean()
    loss.backward()
    return loss.detach(), prediction.grad


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
    loss = PAIR_LOSSES[method](terms, case["beta"], case["alpha"]).mean()
    loss.backward()
    for got, expected in (
        (loss, "loss"),
        (terms.loser_scale, "lam"),
        (terms.margin, "inside_term"),
        (prediction.grad, "grad"),
    ):
        scale = tensor[expected].abs().max().item()
        torch.testing.assert_close(got, tensor[expected], rtol=1e-5, atol=1e-6 * scale)
