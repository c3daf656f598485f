"""Low-rank adapters (LoRA, arXiv 2106.09685) on a frozen UNet: linear layers W become W + B A, and A, B are trained.

peft keeps such a layer X as `X.base_layer.weight` W (out, in), `X.lora_A.default.weight` A (rank, in) and
`X.lora_B.default.weight` B (out, rank). B begins as 0: the policy then is its reference, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdpo.command import InputError
from sdpo.files import write_file
from sdpo.hub import check_finite, check_fit, load_state
from sdpo.rng import normal

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def add_adapters(model: nn.Module, layers: Iterable[str], rank: int, seed: int) -> None:
    """Freeze a model and add adapters to its linear layers of these names, in place; A is normal with deviation 1/rank.

    What is added follows from the seed alone. Raises InputError for a rank that no layer has.
    """
    from peft import LoraConfig, inject_adapter_in_model  # the benchmark of training does without it

    check_rank(model, layers, rank)
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers)), model)
    down = [parameter for name, parameter in model.named_parameters() if DOWN in name]
    for index, parameter in enumerate(down):
        parameter.data.copy_(normal(seed, "adapters", (index,), tuple(parameter.shape)) / rank)


def check_rank(model: nn.Module, layers: Iterable[str], rank: int) -> None:
    """Raises InputError for a rank that none of a model's linear layers of these names has."""
    most = max(min(m.weight.shape) for name, m in model.named_modules() if name.endswith(tuple(layers)))
    if rank > most:
        raise InputError(f"--lora_rank {rank} is above {most}, that of the largest layers: choose a smaller one, or 0")


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def merge(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the plain model that computes what an adapted one does: W + B A in place of W, A and B.

    One without adapters is as it was. Sums are formed on the CPU, where there is room and no TF32.
    """
    merged = {name.replace(BASE, "."): value for name, value in state.items() if DOWN not in name and UP not in name}
    for name, down in state.items():
        if DOWN in name:
            up, layer = state[name.replace(DOWN, UP)], name.replace(DOWN, ".")
            merged[layer] = merged[layer].cpu() + up.cpu() @ down.cpu()
    return merged


def adapters_in(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every A and B in a state dict, by the names that load_lora_weights of diffusers' pipelines knows; maybe none."""
    return {f"unet.{name.replace('.default.', '.')}": v for name, v in state.items() if DOWN in name or UP in name}


def save_adapters(state: Mapping[str, Tensor], path: Path) -> None:
    """Write the adapters in a state dict as safetensors, if there are any."""
    if adapters := adapters_in(state):
        adapters = {name: value.detach().cpu().contiguous() for name, value in adapters.items()}
        write_file(path, lambda partial: save_file(adapters, partial))


@torch.no_grad()
def load_adapters(model: nn.Module, path: Path) -> None:
    """Put what save_adapters wrote into an adapted model; raises InputError unless it fits and is finite."""
    own, state = adapters_in(dict(model.named_parameters())), load_state(path)
    check_fit(state, own, str(path), "give the --lora_rank that it was trained with")
    check_finite(state, str(path))
    for name, parameter in own.items():
        parameter.copy_(state[name])
