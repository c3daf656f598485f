"""Compiled blocks whose arithmetic does not depend on whether gradients are wanted.

The compiler rounds a block's forward pass differently when it also plans a backward pass. A reference that runs without
gradients would then differ from an equal policy, and beta makes margins of that difference.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks that a diffusers model repeats (its `_repeated_blocks`), in place, one graph per shape.

    Without gradients they run the same graph as with them, block by block, so that nothing is kept for a backward pass.
    """
    torch._dynamo.config.recompile_limit = 64  # every shape of a block counts, for policy and reference
    for block in model.modules():
        if type(block).__name__ in model._repeated_blocks:
            block.requires_grad_(True)  # decides the graph; outputs of what is frozen are detached
            compiled = torch.compile(block.forward, fullgraph=True, dynamic=False)
            block.forward = functools.partial(_run, compiled)


def _run(compiled, hidden_states: Tensor, *inputs, **options) -> Tensor:
    if torch.is_grad_enabled():
        return compiled(hidden_states, *inputs, **options)
    with torch.enable_grad():
        return compiled(hidden_states.detach().requires_grad_(), *inputs, **options).detach()
