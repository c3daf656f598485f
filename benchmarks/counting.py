"""Floating-point operations and bytes of a training step, counted on the meta device: shapes, but no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.architectures import Base

ADAMW_BYTES = 28  # per parameter: weight, gradient and two moments read, weight and moments written, fp32


def attention_flops(q: tuple, k: tuple, v: tuple, *_, **__) -> int:
    """Scores and their product with the values: two matrix products, two operations per element."""
    return 4 * q[0] * q[1] * q[2] * q[3] * k[2]


def attention_backward_flops(grad: tuple, q: tuple, k: tuple, v: tuple, *_, **__) -> int:
    """Twice the forward pass: fused kernels compute the scores again, which is not counted as work."""
    return 2 * attention_flops(q, k, v)


FUSED = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
FORMULAS = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}{suffix}"): formula
    for kind in FUSED
    for suffix, formula in (("", attention_flops), ("_backward", attention_backward_flops))
}


class Bytes(TorchDispatchMode):
    """Counts what every operation reads and writes; views cost nothing, and no two operations are fused."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation and add the sizes of its inputs and outputs."""
        out = func(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and func is not torch.ops.aten._unsafe_view.default:
            tensors = (x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
            self.total += sum(x.numel() * x.element_size() for x in tensors)
        return out


@contextmanager
def counted(into: dict[str, float], share: float = 1.0) -> Iterator[None]:
    """Put the FLOPs and bytes of the block, times `share`, into a dict; attention counts as one fused kernel."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as flops, Bytes() as traffic:
        yield
    into |= {"flops": flops.get_total_flops() * share, "bytes": traffic.total * share}


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *_, **__) -> Tensor:
    """Attention as one operation, which the meta device otherwise takes apart."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """Let tensors without data on "cuda" choose precision and kernels as on a GPU, where there is none."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    with (
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch.cuda, "is_bf16_supported", lambda: True),
        patch.object(F, "scaled_dot_product_attention", lambda q, k, v, **_: flash(q, k, v)[0]),
    ):
        yield


def count(base: Base, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """FLOPs and bytes per pair by part, in micro-steps of the base's size with all tensors in `dtype`.

    The reference's pass costs what the policy's forward pass does. "recomputation" is what full gradient checkpointing
    adds to the backward pass. The optimizer's bytes, an AdamW step in fp32, are per update.
    """
    config, meta, parts = base.config(), torch.device("meta"), {}
    pairs, size = config.train_batch_size, config.resolution

    def part(name: str):
        return counted(parts.setdefault(name, {}), 1 / pairs)

    family = base.build(meta).to(meta, dtype)
    family.vae.to(dtype)  # which is otherwise left alone on the meta device
    unet = family.load_unet().to(meta, dtype).train()
    noise = torch.empty(2 * pairs, *family.latent_shape(size), device=meta)
    pixels = torch.empty(2 * pairs, 3, size, size, device=meta)
    with patch.object(F, "scaled_dot_product_attention", fused_attention):
        with part("encode"):
            latents = family.sample_posterior(family.encode_moments(pixels), noise)
        with part("text"):
            conditioning = family.encode_captions([""] * pairs, size)
        conditioning = {k: torch.cat([v, v]).to(dtype) for k, v in conditioning.items()}
        timesteps = torch.empty(2 * pairs, device=meta, dtype=torch.long)
        for checkpointing in (False, True):
            if checkpointing:
                unet.enable_gradient_checkpointing()
            with part("policy forward"):
                prediction = family.predict(unet, latents.to(dtype), timesteps, conditioning)
            with part("recomputation" if checkpointing else "backward"):
                prediction.sum().backward()
            unet.zero_grad()
    parts["recomputation"] = {k: v - parts["backward"][k] for k, v in parts["recomputation"].items()}
    parts["optimizer"] = {"flops": 0, "bytes": ADAMW_BYTES * sum(p.numel() for p in unet.parameters())}
    return parts
