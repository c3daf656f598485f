"""train.py under accelerate's FSDP2 on CPU ranks, where accelerate itself takes FSDP for GPUs only: run by test_sharding.py."""

import os
import sys

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import train
from sdpo.config import run_command

original = Accelerator.__init__


def begin(self, *given, **options):
    version = int(os.environ.get("FSDP_VERSION", 2))  # accelerate's own variable
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BasicTransformerBlock", "ResnetBlock2D"],
        state_dict_type="SHARDED_STATE_DICT",
        reshard_after_forward=True if version == 2 else "FULL_SHARD",
    )
    original(self, *given, **options)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    if self.mixed_precision != "no":
        plugin.set_mixed_precision(self.mixed_precision)
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


Accelerator.__init__ = begin
run_command(lambda: train.main(sys.argv[1:]))
