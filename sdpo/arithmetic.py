"""Forward passes whose arithmetic does not depend on whether gradients are wanted.

Where a backward pass will follow, torch may choose another attention kernel, and the compiler may round a block
differently. A reference that runs without gradients would then differ from an equal policy, and beta would amplify the
difference into margins that mean nothing.
"""

from __future__ import annotations

import functools

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

BLOCKS = {BasicTransformerBlock: 1, ResnetBlock2D: 2}  # how many of their first inputs carry the policy's gradient


def fuses_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's fused attention pays in training: not in bf16 on a CPU, where its backward pass is the slower."""
    return device.type != "cpu" or dtype != torch.bfloat16


def track_attention(model: nn.Module) -> None:
    """Have attention without gradients run as it does with them, in place."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.forward = functools.partial(_run, module.forward, 1)


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks that make up a diffusers UNet, in place, one graph per shape.

    Without gradients they run the same graph as with them, block by block, so that nothing is kept for a backward pass.
    """
    torch._dynamo.config.recompile_limit = 128  # every shape of a block counts, for policy and reference
    for block in model.modules():
        if carrying := BLOCKS.get(type(block)):
            block.requires_grad_(True)  # decides the graph; outputs of what is frozen are detached
            compiled = torch.compile(block.forward, fullgraph=True, dynamic=False)
            block.forward = functools.partial(_run, compiled, carrying)


def _run(forward, carrying: int, *inputs: Tensor | None, **options) -> Tensor:
    """The output for inputs of which the first `carrying` need gradients in training."""
    if torch.is_grad_enabled():
        return forward(*inputs, **options)
    with torch.enable_grad():
        tracked = (value.detach().requires_grad_() for value in inputs[:carrying])
        return forward(*tracked, *inputs[carrying:], **options).detach()
