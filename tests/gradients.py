"""In how many storages the gradients of a run are after its updates. As a script: on every rank."""

import json
import sys
from pathlib import Path

from recording import set_up

import train
from sdpo.step import update

if __name__ == "__main__":
    folder, *flags = sys.argv[1:]
    run, dataset, _ = set_up(flags)
    batches = train.train_batches(run.config, dataset, run.plan, run.accelerator.process_index, 0)
    for _ in range(run.plan.steps):
        update(run, batches)
    gradients = [parameter.grad for parameter in run.policy.parameters()]
    storages = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    counts = [len(gradients), len(storages)]
    Path(folder, f"rank-{run.accelerator.process_index}.json").write_text(json.dumps(counts))
    run.accelerator.end_training()
