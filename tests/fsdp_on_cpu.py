"""train.py under accelerate's FSDP2 on CPU ranks, where accelerate itself takes FSDP for GPUs only: run by test_sharding.py."""

import os
import sys
from pathlib import Path

import yaml
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import train
from sdpo.command import run_command

original = Accelerator.__init__
CONFIG = Path(__file__).parents[1] / "configs" / "accelerate" / "fsdp2.yaml"


def begin(self, *given, **options):
    for name, value in yaml.safe_load(CONFIG.read_text())["fsdp_config"].items():  # as accelerate's launcher does
        os.environ.setdefault(name.replace("transformer_layer_cls", "transformer_cls").upper(), str(value))
    if os.environ["FSDP_VERSION"] == "1":
        os.environ["FSDP_RESHARD_AFTER_FORWARD"] = "FULL_SHARD"
    plugin = FullyShardedDataParallelPlugin()
    original(self, *given, **options)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    if self.mixed_precision != "no":
        plugin.set_mixed_precision(self.mixed_precision)
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


Accelerator.__init__ = begin
if __name__ == "__main__":
    run_command(lambda: train.main(sys.argv[1:]))
