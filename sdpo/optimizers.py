"""The optimizers that train.py offers: a function, a row of OPTIMIZERS and a choice of --optimizer each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from torch.optim import Optimizer

from sdpo.command import InputError
from sdpo.config import TrainConfig
from sdpo.families import Family


def adamw(parameters: Iterable[nn.Parameter], config: TrainConfig, learning_rate: float) -> Optimizer:
    """AdamW in fused kernels."""
    return torch.optim.AdamW(parameters, fused=True, **adam_settings(config, learning_rate))


def adamw8bit(parameters: Iterable[nn.Parameter], config: TrainConfig, learning_rate: float) -> Optimizer:
    """AdamW with its state in 8 bits; raises InputError if its package is missing."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError("--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit(parameters, **adam_settings(config, learning_rate))


def adam_settings(config: TrainConfig, learning_rate: float) -> dict:
    """What either AdamW takes."""
    return {
        "lr": learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }


def adafactor(parameters: Iterable[nn.Parameter], config: TrainConfig, learning_rate: float) -> Optimizer:
    """Adafactor with a learning rate from outside, as the official code has it."""
    return transformers.Adafactor(
        parameters,
        lr=learning_rate,
        weight_decay=config.adam_weight_decay,
        clip_threshold=1.0,
        scale_parameter=False,
        relative_step=False,
    )


def adafactor_bytes(parameter: nn.Parameter) -> int:
    """Size of Adafactor's state of a parameter: second moments in fp32, by row and column of the last two dimensions.

    Of convolutions these are the kernels' sides: their state has two thirds of their size if these are 3, twice if 1.
    """
    size, shape = parameter.numel(), parameter.shape
    return 4 * (size // shape[-1] + size // shape[-2] if len(shape) > 1 else size)


@dataclass(frozen=True)
class OptimizerSpec:
    """What the trainer has to know of an optimizer."""

    build: Callable[[Iterable[nn.Parameter], TrainConfig, float], Optimizer]
    state_bytes: Callable[[nn.Parameter], int]  # bytes that the state of a parameter takes
    moments: tuple[str, ...] = ()  # state that has the shape of its parameter
    shards: bool = False  # whether it works on parameters that FSDP2 or DeepSpeed share out


OPTIMIZERS = {
    "adamw": OptimizerSpec(adamw, lambda p: 8 * p.numel(), moments=("exp_avg", "exp_avg_sq"), shards=True),
    "adamw8bit": OptimizerSpec(adamw8bit, lambda p: 2 * p.numel()),
    "adafactor": OptimizerSpec(adafactor, adafactor_bytes),
}


def optimizer_name(config: TrainConfig, family: Family | type[Family]) -> str:
    """Row of OPTIMIZERS that the config asks for."""
    if config.use_adafactor:
        return "adafactor"
    return family.optimizer if config.optimizer == "auto" else config.optimizer
