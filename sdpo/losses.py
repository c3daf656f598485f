"""The preference losses and the winner-preserving safeguard (Diffusion-SDPO, arXiv 2511.03317), on plain tensors.

One pair is one caption with a winner `w` and a loser `l` that share noise and timestep. Tensors of predictions and
targets hold 2B samples, winners first. `pair_terms` and `sft` form errors in fp32 whatever the precision of their
inputs. No loss knows a model, a device or a config; PAIR_LOSSES names the settings that give a loss its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PairTerms:
    """What the losses are functions of: one value or one residual per pair."""

    residual_w: Tensor  # (B, C, H, W)  e_w = prediction - target of the winner
    residual_l: Tensor  # (B, C, H, W)  e_l
    drift_w: Tensor | None  # (B, C, H, W)  prediction of the policy - that of the reference, of the winner
    error_w: Tensor  # (B,)  m_w = mean of e_w^2
    error_l: Tensor  # (B,)  m_l; its gradient is scaled by loser_scale
    reference_error_w: Tensor  # (B,)  r_w
    reference_error_l: Tensor  # (B,)  r_l
    loser_scale: Tensor  # () or (B,)  lambda
    margin: Tensor  # (B,)  u, the implicit reward margin
    beta: float  # of the margin


def scale_gradient(x: Tensor, scale: Tensor) -> Tensor:
    """x as it is, with its gradient multiplied by `scale`, a constant that broadcasts against x."""
    value = x.detach()
    return value + scale.detach().to(x.dtype) * (x - value)  # the difference is 0, its gradient is not


def check_shape(name: str, x: Tensor, expected: Sequence[int], like: str) -> None:
    """Raises ValueError unless x has the expected shape, so that nothing broadcasts unnoticed."""
    if x.shape != torch.Size(expected):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but must have {tuple(expected)} like {like}")


def check_pairs(prediction: Tensor, reference: Tensor | None, target: Tensor, reference_error: Tensor | None) -> None:
    """Raises ValueError unless these are arguments of pair_terms for one or more pairs."""
    if prediction.dim() < 2 or not prediction.numel() or len(prediction) % 2:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, but must hold B winners, then B losers")
    check_shape("target", target, prediction.shape, "prediction")
    if reference is not None:
        check_shape("reference", reference, prediction.shape, "prediction")
    elif reference_error is None:
        raise ValueError("give the reference's prediction, or its errors as reference_error")
    if reference_error is not None:
        check_shape("reference_error", reference_error, prediction.shape[:1], "the samples of prediction")


def sample_mean(x: Tensor) -> Tensor:
    """Mean over all but the batch dimension: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def sample_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample: (B, ...) twice -> (B,)."""
    return sample_mean((prediction - target).square())


def winner_preserving_scale(
    residual_w: Tensor, residual_l: Tensor, mu: float, per_pair: bool = False, eps: float = 1e-9
) -> Tensor:
    """Largest loser scale in [0, 1] that keeps the share `mu` of the winner's descent, to first order in output space.

    residual_w, residual_l: (B, ...) prediction minus target. Returns lambda without gradient: () for the micro-batch as
    a whole (the official rule) or (B,) with per_pair, which does not depend on how the batch is split. `eps` is added
    to the inner product of the gradients g = 2 e / N (N elements share one lambda), hence eps N^2 / 4 to that of the
    residuals. Raises ValueError for mu outside [0, 1], and for residuals that are empty or of different shapes.
    Source: arXiv 2511.03317, winner-preserving condition.
    """
    if not 0 <= mu <= 1:
        raise ValueError(f"mu must lie in [0, 1], got {mu}")
    check_shape("residual_l", residual_l, residual_w.shape, "residual_w")
    if not residual_w.numel():
        raise ValueError(f"residual_w has shape {tuple(residual_w.shape)}, but must hold B winners")
    residual_w, residual_l = residual_w.detach().float(), residual_l.detach().float()
    rows = len(residual_w) if per_pair else 1
    flat_w, flat_l = residual_w.reshape(rows, -1), residual_l.reshape(rows, -1)  # (rows, N)
    ww, wl = (flat_w * flat_w).sum(1), (flat_w * flat_l).sum(1)  # N^2/4 times ||g_w||^2 and <g_w, g_l>
    limit = (1 - mu) * ww / (wl + eps * flat_w.shape[1] ** 2 / 4)  # -||g_w||^2 + lambda <g_w, g_l> <= -mu ||g_w||^2
    scale = torch.where(wl > 0, limit.clamp(0, 1), 1.0)
    return scale if per_pair else scale.squeeze(0)


def loser_scale(
    residual_w: Tensor, residual_l: Tensor, mu: float | None, per_pair: bool = False, constant: float = 1.0
) -> Tensor:
    """Lambda without gradient, () or (B,): by the winner-preserving rule where `mu` is given, else `constant`.

    residual_w, residual_l: (B, ...) prediction minus target. Raises ValueError for a constant outside [0, 1] or beside
    mu, and as winner_preserving_scale.
    """
    if not 0 <= constant <= 1 or (mu is not None and constant != 1):
        raise ValueError(f"constant must lie in [0, 1], and be 1 where mu is given; got {constant} and mu {mu}")
    if mu is None:
        return residual_w.new_full((), constant)
    return winner_preserving_scale(residual_w, residual_l, mu, per_pair)


def pair_terms(
    prediction: Tensor,
    reference: Tensor | None,
    target: Tensor,
    beta: float,
    *,
    reference_error: Tensor | None = None,
    mu: float | None = None,
    per_pair: bool = False,
    constant: float = 1.0,
) -> PairTerms:
    """Residuals, errors, loser scale and margin of B pairs.

    prediction, reference, target: (2B, C, H, W), winners first; the targets of the two members need not be equal. Where
    `reference_error` (2B,) is known, the prediction of the reference is needed for the drift alone; the difference of
    such errors is formed in the precision in which they are given. The loser's gradient is scaled by the
    winner-preserving rule where `mu` is given, else by `constant` (1 is the plain method, 0 trains on winners only).
    Raises ValueError for shapes that do not fit, for scales outside [0, 1] or set twice, and where nothing is known of
    the reference.
    """
    check_pairs(prediction, reference, target, reference_error)
    prediction, target = prediction.float(), target.detach().float()
    residual = prediction - target
    residual_w, residual_l = residual.chunk(2)
    error_w, error_l = sample_mean(residual.square()).chunk(2)  # at once, as the reference's: a GPU sums by shape
    drift_w = None
    if reference is not None:
        reference = reference.detach().float()
        drift_w = prediction.chunk(2)[0] - reference.chunk(2)[0]
    if reference_error is None:
        reference_error = sample_error(reference, target)
    reference_error_w, reference_error_l = reference_error.detach().chunk(2)
    scale = loser_scale(residual_w, residual_l, mu, per_pair, constant)
    error_l = scale_gradient(error_l, scale)
    margin = -beta / 2 * ((error_w - error_l) - (reference_error_w - reference_error_l).float())
    return PairTerms(
        residual_w=residual_w,
        residual_l=residual_l,
        drift_w=drift_w,
        error_w=error_w,
        error_l=error_l,
        reference_error_w=reference_error_w.float(),
        reference_error_l=reference_error_l.float(),
        loser_scale=scale,
        margin=margin,
        beta=beta,
    )


def diffusion_dpo(terms: PairTerms) -> Tensor:
    """Diffusion-DPO, (B,): -log sigmoid(u) (arXiv 2311.12908)."""
    return -F.logsigmoid(terms.margin)


def require_drift(terms: PairTerms) -> Tensor:
    """drift_w; raises ValueError where the terms were formed without it."""
    if terms.drift_w is None:
        raise ValueError("this loss needs the reference's prediction: its errors alone do not give drift_w")
    return terms.drift_w


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """values (B,) as (B, 1, ..., 1), to be multiplied with x (B, ...)."""
    return values.view(-1, *[1] * (x.dim() - 1))


def dspo_score(terms: PairTerms) -> Tensor:
    """DSPO by score matching (Zhu et al., ICLR 2025), (B,): |e_w - beta (1 - sigmoid(u)) drift_w|^2.

    Nothing is detached but the reference, as in the official code. Raises ValueError for terms without drift_w.
    """
    drift = require_drift(terms)
    weight = terms.beta * (1 - torch.sigmoid(terms.margin))  # (B,)
    return sample_mean((terms.residual_w - per_sample(weight, drift) * drift).square())


def dspo_switched(terms: PairTerms) -> Tensor:
    """DSPO in its second official form, (B,): (1 - sigmoid(u))^2, times drift_w^2 where its micro-batch mean >= 0.1.

    Raises ValueError for terms without drift_w.
    """
    drift = require_drift(terms)
    doubt = 1 - torch.sigmoid(terms.margin)  # (B,)
    far = sample_mean(drift.square()).mean() >= 0.1
    return torch.where(far, sample_mean((per_sample(doubt, drift) * drift).square()), doubt.square())


def dmpo(terms: PairTerms, alpha: float) -> Tensor:
    """DMPO (arXiv 2507.07510), (B,): KL(Bernoulli(sigmoid(u)) || Bernoulli(q)), q = 1 - alpha in [1e-6, 1 - 1e-6]."""
    u = terms.margin
    p, log_p, log_not_p = torch.sigmoid(u), -F.softplus(-u), -F.softplus(u)
    q = u.new_full((), 1 - alpha).clamp(1e-6, 1 - 1e-6)  # in fp32: the official code's figures, bit for bit
    return p * (log_p - q.log()) + (1 - p) * (log_not_p - torch.log1p(-q))


def sft(prediction: Tensor, target: Tensor) -> Tensor:
    """Supervised fine-tuning on winners, (B,): the mean squared residual; no reference and no loser.

    prediction, target: (B, C, H, W), of winners alone. Raises ValueError unless their shapes are equal.
    """
    check_shape("target", target, prediction.shape, "prediction")
    return sample_error(prediction.float(), target.detach().float())


@dataclass(frozen=True)
class PairLoss:
    """A loss of pairs, and what the trainer has to know of it."""

    function: Callable[..., Tensor]  # of PairTerms, and of the arguments that options name, (B,)
    options: Mapping[str, str] = field(default_factory=dict)  # argument: the setting that gives it
    needs_drift: bool = False  # the reference's errors alone do not do
    per_micro_batch: bool = False  # not a function of each pair alone, so training depends on the split


PAIR_LOSSES = {
    "diffusion-dpo": PairLoss(diffusion_dpo),
    "dspo-score": PairLoss(dspo_score, needs_drift=True),
    "dspo-switched": PairLoss(dspo_switched, needs_drift=True, per_micro_batch=True),
    "dmpo": PairLoss(dmpo, options={"alpha": "dmpo_alpha"}),
}
