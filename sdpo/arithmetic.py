"""Forward passes whose arithmetic does not depend on whether gradients are wanted.

Where a backward pass will follow, torch may choose another attention kernel, and the compiler may round a block
differently. A reference that runs without gradients would then differ from an equal policy, and beta would amplify the
difference into margins that mean nothing.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdpo.command import InputError

COMPILED = {  # methods of modules; those of Transformer2DModel are what it does before and after its blocks
    BasicTransformerBlock: ("forward",),
    ResnetBlock2D: ("forward",),
    Upsample2D: ("forward",),
    Transformer2DModel: ("_operate_on_continuous_inputs", "_get_output_for_continuous_inputs"),
}
CARRYING = {"hidden_states", "input_tensor", "temb", "residual"}  # inputs through which the policy's gradient flows

# Recomputation without drawing the same random numbers again: there is no dropout
recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def fuses_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's fused attention pays in training: not in bf16 on a CPU, where its backward pass is slower."""
    return device.type != "cpu" or dtype != torch.bfloat16


def to_channels_last(model: nn.Module) -> None:
    """Put a diffusers UNet into channels-last memory format, in place.

    Its transformers are kept from leaving it, and its convolutions of single pixels become the matrix products that
    they are in this format: cuDNN differentiates those at a sixth of the rate of its other convolutions.
    """
    model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, Transformer2DModel) and module.is_input_continuous:
            module._get_output_for_continuous_inputs = types.MethodType(_after_blocks, module)
        if isinstance(module, nn.Conv2d) and _multiplies_pixels(module):
            module.forward = types.MethodType(_multiply_pixels, module)


def _multiplies_pixels(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def _multiply_pixels(self: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of single pixels without padding: (N, C, H, W) in any format to (N, C', H, W), channels last."""
    # CUDA's norms leave the format, and how torch multiplies other views depends on whether the weight is frozen
    pixels = x.permute(0, 2, 3, 1).contiguous()  # (N, H, W, C)
    weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (C', C), whose gradient keeps the format, as DDP wants it
    return F.linear(pixels, weight, self.bias).permute(0, 3, 1, 2)


def _after_blocks(
    self: Transformer2DModel,
    hidden_states: Tensor,
    residual: Tensor,
    batch_size: int,
    height: int,
    width: int,
    inner_dim: int,
) -> Tensor:
    """The method that it replaces, without its copy into the other format: tokens (N, h w, C) to (N, C, h, w)."""
    if self.use_linear_projection:
        hidden_states = self.proj_out(hidden_states)
    hidden_states = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
    return residual + (hidden_states if self.use_linear_projection else self.proj_out(hidden_states))


def track_attention(model: nn.Module) -> None:
    """Make attention run without gradients as it does with them, in place."""
    for module in model.modules():
        if isinstance(module, Attention):
            _track(module, "forward", module.forward)


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the blocks that make up a diffusers UNet, in place, one graph per shape.

    Without gradients the blocks run the graph that they run with them, one at a time, so that nothing is kept. The
    backward pass computes norms, activations and casts of weights again instead of keeping them, which leaves half to
    two thirds of the bytes. Raises InputError for a model without such blocks.
    """
    blocks = [module for module in model.modules() if type(module) in COMPILED]
    if not blocks:
        raise InputError(f"--compile knows no block of a {type(model).__name__}: drop it")
    torch._dynamo.config.recompile_limit = 128  # every shape of a block counts
    torch._functorch.config.ban_recompute_materialized_backward = False
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # of diffusers, harmless
    for block in blocks:
        block.requires_grad_(True)  # the reference's too, for the policy's graph; _track detaches its outputs
        for norm in block.children():
            if isinstance(norm, nn.GroupNorm) and norm.weight.device.type != "cpu":  # where torch's keeps the format
                norm.forward = types.MethodType(group_norm, norm)
        for method in COMPILED[type(block)]:
            _track(block, method, torch.compile(getattr(block, method), backend=backend, fullgraph=True, dynamic=False))


def group_norm(self: nn.GroupNorm, x: Tensor) -> Tensor:
    """The norm's forward pass, keeping the memory format: (N, C, H, W) in any precision to that of the weights.

    On CUDA torch's own leaves channels last, and a compiled backward pass copies what convolutions take in, and their
    gradients, back into it.
    """
    groups = x.float().unflatten(1, (self.num_groups, -1))  # (N, G, C / G, H, W)
    weight, bias = (parameter.view(*groups.shape[1:3], 1, 1) for parameter in (self.weight, self.bias))
    variance, mean = torch.var_mean(groups, (2, 3, 4), correction=0, keepdim=True)
    scale = weight * torch.rsqrt(variance + self.eps)  # (N, G, C / G, 1, 1): so that every gradient is a sum by channel
    out = groups * scale + (bias - mean * scale)
    return out.flatten(1, 2).to(self.weight.dtype)


def _track(module: nn.Module, method: str, run: Callable) -> None:
    """Have a method of a module run by `run`, and without gradients as with them."""
    signature = inspect.signature(getattr(module, method))

    def tracked(*inputs, **options):
        if torch.is_grad_enabled():
            return run(*inputs, **options)
        call = signature.bind(*inputs, **options)
        for name in CARRYING & call.arguments.keys():
            if isinstance(call.arguments[name], Tensor):
                call.arguments[name] = call.arguments[name].detach().requires_grad_()
        with torch.enable_grad():
            return _detach(run(*call.args, **call.kwargs))

    setattr(module, method, tracked)


def _detach(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(map(_detach, output))
    return output.detach() if isinstance(output, Tensor) else output
