"""How many numbers the gradients of a rank have after the first of an update's micro-steps under FSDP2. As a script: on every rank."""

import json
import sys
from pathlib import Path

import fsdp_on_cpu  # noqa: F401, has accelerate take CPU ranks
from recording import set_up

import train
from sdpo.step import micro_step

if __name__ == "__main__":
    folder, *flags = sys.argv[1:]
    run, dataset, _ = set_up(flags)
    batches = train.train_batches(run.config, dataset, run.plan, run.accelerator.process_index, 0)
    with run.accelerator.accumulate(run.policy):
        micro_step(run, next(batches))
    sizes = [[parameter.numel(), parameter.grad.to_local().numel()] for parameter in run.policy.parameters()]
    Path(folder, f"rank-{run.accelerator.process_index}.json").write_text(json.dumps(sizes))
    run.accelerator.end_training()
