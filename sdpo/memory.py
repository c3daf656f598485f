"""What training keeps in memory, and which activations are recomputed to keep it within a budget.

Diffusers models checkpoint activations in units: modules with a `gradient_checkpointing` switch. What they keep is
counted on tensors without data, so the choice takes seconds and no memory.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections import Counter

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sdpo.adapters import adapted_layers
from sdpo.arithmetic import compile_blocks, recompute
from sdpo.batch import Batch
from sdpo.families import Family
from sdpo.hub import DTYPES
from sdpo.inputs import Inputs, make_inputs
from sdpo.optimizers import OPTIMIZERS, optimizer_name
from sdpo.step import AUTOCAST, Run

FREE_SHARE = 0.85  # of the free memory that activations may take; the rest is for temporaries


def planned_memory(run: Run) -> dict[str, int]:
    """Bytes per device of everything but activations, by what they hold, before an engine shares any of it out."""
    size = sum(p.numel() for p in run.policy.parameters())
    trained = [p for p in run.policy.parameters() if p.requires_grad]
    trained_size = sum(p.numel() for p in trained)
    state = OPTIMIZERS[optimizer_name(run.config, run.family)].state_bytes
    reference = 4 if run.config.compile else DTYPES[run.config.mixed_precision].itemsize
    encoders = (p for model in (run.family.vae, *run.family.text_encoders) for p in model.parameters())
    sizes = {
        "policy": 4 * size,
        "gradients": 4 * trained_size,
        "optimizer": sum(map(state, trained)),
        "average": 4 * trained_size if run.config.use_ema else 0,
        "reference": 0 if run.reference is None or run.config.lora_rank else reference * size,
        "encoders": sum(p.nbytes for p in encoders if not p.is_meta),  # without weights where a latent cache is read
    }
    return {name: value for name, value in sizes.items() if value or name == "encoders"}


def choose_checkpointing(run: Run, batch: Batch) -> str:
    """Checkpoint as few of the policy's units as keep the activations of micro-batches like this one within budget.

    Returns a sentence for the console. The budget is --activation_memory, or what is free on the fullest GPU.
    """
    config = run.config
    device = run.accelerator.device
    budget = config.activation_memory
    if budget is None:
        torch.cuda.empty_cache()  # blocks that nobody uses any more would count as taken
        room = room_for_activations(run, torch.cuda.mem_get_info(device)[0])
        rooms = run.accelerator.gather(torch.tensor([room / 2**30], device=device))
        budget = rooms.min().item()  # ranks that recompute other units would wait for each other
    inputs = make_inputs(run.family, batch.to(device))
    unet = run.accelerator.unwrap_model(run.policy)
    dtype = DTYPES[config.mixed_precision]
    units, kept = choose_units(run.family, unet, inputs, dtype, budget * 2**30, config.compile)
    unet.enable_gradient_checkpointing(recompute)
    for name, unit in checkpoint_units(unet).items():
        unit.gradient_checkpointing = name in units
    return f"activations    {kept / 2**30:.3g} GiB of {budget:.3g} GiB, {len(units)} units are recomputed"


def room_for_activations(run: Run, free: int) -> float:
    """Bytes of `free` left for activations after gradients and, unless it is there already, optimizer state."""
    memory = planned_memory(run)
    coming = memory["gradients"] + (0 if run.optimizer.state else memory.get("optimizer", 0))
    return (free - coming / (run.accelerator.num_processes if run.sharded else 1)) * FREE_SHARE


def checkpoint_units(unet: nn.Module) -> dict[str, nn.Module]:
    """Modules whose activations can be recomputed, by name."""
    return {name: module for name, module in unet.named_modules() if hasattr(module, "gradient_checkpointing")}


def choose_units(
    family: Family, unet: ModelMixin, inputs: Inputs, dtype: torch.dtype, budget: float, compiled: bool = False
) -> tuple[set[str], int]:
    """(units to checkpoint, bytes of activations then kept) for micro-batches of the shapes of `inputs`.

    Units that keep most are chosen first, as few as bring the sum within `budget` bytes; all if even that is too much.
    """
    with FakeTensorMode():
        counter = ActivationCounter(family, unet, inputs, dtype, compiled)
        by_unit = counter.by_unit()
        order = sorted(by_unit, key=lambda name: -by_unit[name])
        fewest = bisect_left(range(len(order)), True, key=lambda n: counter.total(set(order[:n])) <= budget)
        chosen = set(order[:fewest])
        return chosen, counter.total(chosen)


class ActivationCounter:
    """Counts what a forward pass keeps for the backward pass, without weights, on a copy without data.

    The copy is on the device of `inputs`: autocast keeps other operations in fp32 on a GPU than on a CPU. If it is
    `compiled`, its blocks are split into passes as the compiler does it, but no code is made.
    """

    def __init__(self, family: Family, unet: ModelMixin, inputs: Inputs, dtype: torch.dtype, compiled: bool = False):
        device = inputs.noisy.device
        self.family = family
        self.autocast = torch.autocast(device.type, dtype, dtype != torch.float32, **AUTOCAST.to_kwargs())
        with device:
            self.model = type(unet).from_config(unet.config).eval()
            self.model.set_attn_processor(unet.attn_processors)
            conditioning = {name: torch.empty(value.shape) for name, value in inputs.conditioning.items()}
            timesteps = torch.empty(inputs.timesteps.shape, dtype=torch.long)
            self.inputs = torch.empty(inputs.noisy.shape), timesteps, conditioning
            self._adapt_like(unet)
        if compiled:
            compile_blocks(self.model, backend="aot_eager_decomp_partition")
        self.model.enable_gradient_checkpointing(recompute)  # which saves what it begins with
        self.units = checkpoint_units(self.model)
        self.weights = {weight.untyped_storage()._cdata for weight in self.model.parameters()}
        self.kept: dict[int, tuple[torch.UntypedStorage, str]] = {}  # by address; held, so that none is used again
        self.within = [""]  # names of the units that are running
        for name, unit in self.units.items():
            unit.register_forward_pre_hook(lambda *_, name=name: self.within.append(name))
            unit.register_forward_hook(self._leave)

    def _adapt_like(self, unet: nn.Module) -> None:
        """Freeze the model and give it adapters where the UNet has them."""
        adapted = adapted_layers(unet)
        self.model.requires_grad_(not adapted)
        for name, layer in adapted.items():
            blank = {id(p): nn.Parameter(torch.empty(p.shape), p.requires_grad) for p in layer.parameters()}
            self.model.set_submodule(name, copy.deepcopy(layer, blank))  # a memo: these stand for its weights

    def total(self, checkpointed: set[str]) -> int:
        """Bytes kept if the named units recompute their activations."""
        return sum(self._count(checkpointed).values())

    def by_unit(self) -> Counter:
        """Bytes that each unit keeps, not counting units within it, if none is checkpointed."""
        counts = self._count(set())
        return Counter({name: counts[name] for name in self.units})

    def _count(self, checkpointed: set[str]) -> Counter:
        for name, unit in self.units.items():
            unit.gradient_checkpointing = name in checkpointed
        self.kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor), self.autocast:
            self.family.predict(self.model, *self.inputs)
        counts: Counter = Counter()
        for storage, name in self.kept.values():
            counts[name] += storage.nbytes()
        return counts

    def _leave(self, *_) -> None:
        self.within.pop()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.kept.setdefault(storage._cdata, (storage, self.within[-1]))
        return tensor
