"""Runs of train.py against a plain loop in float64, written from the equations on stock diffusers pipelines.

The loop takes from the run what was drawn for each pair, and nothing else. It knows neither sdpo's families nor its
losses, and instead of scaling a gradient on its way it adds up two: of the loss by all but the loser's error, and
lambda times that by the loser's error.
"""

import copy

import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from recording import metrics, record, train_flags, weights

UPDATES, WARM_UP, RATE, MU, BETA, ALPHA = 8, 3, 3e-3, 0.5, 20, 0.1
RUN = {
    "max_train_steps": UPDATES, "train_batch_size": 2, "gradient_accumulation_steps": 2, "lr_warmup_steps": WARM_UP,
    "learning_rate": RATE, "adam_epsilon": 1e-2, "beta_dpo": BETA, "dmpo_alpha": ALPHA,
}  # fmt: skip
SAFEGUARD = {"use_winner_preserving": True, "winner_preserving_mu": MU}


# The losses, on errors m and r of policy and reference, each (B,)


def margin(m_w, m_l, r_w, r_l):
    return -BETA / 2 * ((m_w - m_l) - (r_w - r_l))


def dpo(u, e_w, drift):
    return -torch.log(torch.sigmoid(u))


def dspo(u, e_w, drift):
    return (e_w - (BETA * (1 - torch.sigmoid(u))).view(-1, 1, 1, 1) * drift).square().mean((1, 2, 3))


def dspo_switched(u, e_w, drift):
    doubt = 1 - torch.sigmoid(u)
    near = drift.square().mean() < 0.1
    return doubt.square() if near else (doubt.view(-1, 1, 1, 1) * drift).square().mean((1, 2, 3))


def dmpo(u, e_w, drift):
    p, q = torch.sigmoid(u), 1 - ALPHA
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


def sft(u, e_w, drift):
    return e_w.square().mean((1, 2, 3))


def find_scale(e_w, e_l):
    """Lambda of a micro-batch, from the gradients of the mean errors by the predictions."""
    g_w, g_l = 2 * e_w / e_w.numel(), 2 * e_l / e_l.numel()
    inner = (g_w * g_l).sum()
    return ((1 - MU) * g_w.square().sum() / (inner + 1e-9)).clamp(0, 1) if inner > 0 else torch.ones(())


# The loop


class Denoiser:
    """Policy and reference of a pipeline, and what they are shown."""

    def __init__(self, folder):
        self.pipe = DiffusionPipeline.from_pretrained(folder).to(torch.float64)
        self.pipe.scheduler.alphas_cumprod = self.pipe.scheduler.alphas_cumprod.double()
        self.policy, self.reference = self.pipe.unet, copy.deepcopy(self.pipe.unet)

    @torch.no_grad()
    def encode(self, draws):
        """(noised latents, timesteps, conditioning, target) of a micro-batch, winners first."""
        vae, scheduler = self.pipe.vae, self.pipe.scheduler
        pixels, posterior_noise = (draws[name].transpose(0, 1).flatten(0, 1) for name in ("pixels", "posterior_noise"))
        moments = vae.encode(pixels.double() / 127.5 - 1).latent_dist
        latents = (moments.mean + moments.std * posterior_noise) * vae.config.scaling_factor
        members = len(latents) // len(draws["captions"])
        noise, timesteps = draws["noise"].double().repeat(members, 1, 1, 1), draws["timesteps"].repeat(members)
        kept = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = kept.sqrt() * noise - (1 - kept).sqrt() * latents
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        return noisy, timesteps, self.condition(draws["captions"] * members, pixels.shape[-1]), target

    def condition(self, captions, side):
        options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        texts, _, *pooled = self.pipe.encode_prompt(captions, **options)
        if not pooled:
            return {"encoder_hidden_states": texts}
        time_ids = torch.tensor([[side, side, 0, 0, side, side]] * len(captions))
        return {"encoder_hidden_states": texts, "added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": time_ids}}


def differentiate(denoiser, draws, loss, safeguard):
    """(gradient, loss, lambda) of a micro-batch."""
    noisy, timesteps, conditioning, target = denoiser.encode(draws)
    prediction = denoiser.policy(noisy, timesteps, **conditioning).sample
    with torch.no_grad():
        reference = denoiser.reference(noisy, timesteps, **conditioning).sample
    half = len(draws["captions"])
    e, r = prediction - target, (reference - target).square().mean((1, 2, 3))
    drift = (prediction - reference)[:half]
    if len(e) == half:  # winners alone
        value = loss(None, e, drift).mean()
        return torch.autograd.grad(value, list(denoiser.policy.parameters())), value.item(), None
    m_w, m_l = e.square().mean((1, 2, 3)).chunk(2)
    scale = find_scale(*e.detach().chunk(2)) if safeguard else torch.ones(())

    def by(m_w, m_l, e_w, drift):
        value = loss(margin(m_w, m_l, *r.chunk(2)), e_w, drift).mean()
        return value, torch.autograd.grad(value, list(denoiser.policy.parameters()), retain_graph=True)

    value, rest = by(m_w, m_l.detach(), e[:half], drift)
    _, of_loser = by(m_w.detach(), m_l, e[:half].detach(), drift.detach())
    return [a + scale * b for a, b in zip(rest, of_loser, strict=True)], value.item(), scale.item()


def follow(folder, updates, loss, safeguard, adafactor):
    """Loss, gradient norm and mean lambda of every update, and the weights after the last."""
    denoiser = Denoiser(folder)
    parameters = list(denoiser.policy.parameters())
    if adafactor:
        options = {"scale_parameter": False, "relative_step": False, "weight_decay": 1e-2, "clip_threshold": 1.0}
        optimizer = transformers.Adafactor(parameters, lr=RATE, **options)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.999), eps=1e-2, weight_decay=1e-2)
    rows = []
    for made, update in enumerate(updates):
        parts = [differentiate(denoiser, draws, loss, safeguard) for draws in update["draws"]]
        gradients, losses, scales = zip(*parts, strict=True)
        for parameter, *shares in zip(parameters, *gradients, strict=True):
            parameter.grad = sum(shares) / len(shares)
        norm = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm().item()
        for parameter in parameters:
            parameter.grad *= min(1, 1 / norm)
        optimizer.param_groups[0]["lr"] = RATE * min(1, made / WARM_UP)
        optimizer.step()
        rows.append({"train_loss": sum(losses) / len(losses), "grad_norm": norm})
        if None not in scales:
            rows[-1]["avg_lose_l_scale"] = sum(scales) / len(scales)
    return rows, {name: value.detach() for name, value in denoiser.policy.named_parameters()}


# Largest relative deviation measured: 2e-6 with AdamW, 7e-5 with Adafactor, which magnifies rounding
RTOL = 3e-4
CASES = {
    "diffusion-dpo": ("sd15", "epsilon", dpo, {"train_method": "diffusion-dpo"} | SAFEGUARD),
    "diffusion-dpo plain": ("sd15", "epsilon", dpo, {"train_method": "diffusion-dpo"}),
    "diffusion-dpo velocity": ("sd15", "v_prediction", dpo, {"train_method": "diffusion-dpo"} | SAFEGUARD),
    "diffusion-dpo sdxl": ("sdxl", "epsilon", dpo, {"train_method": "diffusion-dpo"} | SAFEGUARD),
    "dspo": ("sd15", "epsilon", dspo, {"train_method": "dspo"} | SAFEGUARD),
    "dspo sdxl": ("sdxl", "epsilon", dspo_switched, {"train_method": "dspo"} | SAFEGUARD),
    "dmpo": ("sd15", "epsilon", dmpo, {"train_method": "dmpo"} | SAFEGUARD),
    "dmpo sdxl": ("sdxl", "epsilon", dmpo, {"train_method": "dmpo"} | SAFEGUARD),
    "sft": ("sd15", "epsilon", sft, {"train_method": "sft"}),
}


@pytest.mark.parametrize("case", CASES)
def test_runs_follow_a_plain_loop(bases, wide_pairs, tmp_path, case):
    family, prediction, loss, settings = CASES[case]
    base = bases[family, prediction]
    xl = family == "sdxl"
    updates = record(train_flags(base, wide_pairs, tmp_path, sdxl=xl, **RUN | settings))
    expected, trained = follow(base, updates, loss, "use_winner_preserving" in settings, adafactor=xl)
    found = metrics(tmp_path)
    assert len(found) == len(expected) == UPDATES
    for row, own in zip(expected, found, strict=True):
        assert {name: own[name] for name in row} == pytest.approx(row, rel=RTOL)
    begun, saved = Denoiser(base).policy.state_dict(), weights(tmp_path)
    moved, off = (torch.cat([(a[name] - trained[name]).flatten() for name in trained]).norm() for a in (begun, saved))
    assert off < RTOL * moved
