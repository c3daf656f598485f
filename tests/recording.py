"""Runs of train.py: their flags and files, what every update saw, several ranks. As a script: runs on every rank."""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forks import finish, started_on_ranks
from safetensors.torch import load_file, save_file

import train
from sdpo import step
from sdpo.command import parse_flags
from sdpo.config import TrainConfig
from sdpo.hub import load_weights

DEFAULTS = {
    "resolution": 16, "mixed_precision": "no", "seed": 7, "report_to": "none", "lr_warmup_steps": 2, "learning_rate": 1e-3,
    "beta_dpo": 10, "dmpo_alpha": 0.01, "checkpointing_steps": 0,
}  # fmt: skip


def train_flags(base, data, output, **settings):
    """Command line of a run on a tiny pipeline."""
    places = {"pretrained_model_name_or_path": base, "train_data_dir": data, "output_dir": output}
    return [f"--{name}={value}" for name, value in (DEFAULTS | places | settings).items()]


def set_up(flags):
    """The run that a command line describes, its training samples and its held-out pairs."""
    return train.set_up(parse_flags(TrainConfig, "", "", flags))


# Changing files


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def change_part(folder):
    """Add one to a tensor of the weights in a folder."""
    path = next(folder.glob("*.safetensors"))
    state = load_file(path)
    name = min(state)
    save_file(state | {name: state[name] + 1}, path)


def edit_json(path, **changes):
    """Change keys of a JSON file, or drop them where they are None."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# What runs leave


def weights(folder, file="unet.pth"):
    """A state dict in a folder of a run."""
    return torch.load(folder / file, weights_only=True)


def optimizer_state(checkpoint):
    """Every tensor of the optimizer's state."""
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    return {(index, name): value for index, values in state.items() for name, value in values.items()}


def same(a, b):
    """Whether two dicts of tensors are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(folder):
    """Rows of metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "pairs_per_second"} for row in rows]


# What updates saw


def by_pair(batch, inputs):
    """What was drawn for the pairs of a micro-batch: each a tensor (B, ...) or a list of B."""
    pairs = len(batch.captions)
    members = {
        name: getattr(batch, name).unflatten(0, (-1, pairs)).transpose(0, 1) for name in ("pixels", "posterior_noise")
    }
    shared = {name: getattr(batch, name) for name in ("noise", "input_noise", "uniform", "captions")}
    drawn = members | shared | {"timesteps": inputs.timesteps[:pairs]}
    return {name: value for name, value in drawn.items() if value is not None}


class Recorder:
    """Stands between train.py and its parts; `teacher` is a run whose checkpoints the policy takes before each update."""

    def __init__(self, patch, teacher=None):
        self.updates, self.teacher = [], teacher
        for owner, name in (
            (train, "update"),
            (step, "make_inputs"),
            (step, "compute_loss"),
            (Accelerator, "clip_grad_norm_"),
        ):
            original, wrapper = getattr(owner, name), getattr(self, name.strip("_"))
            patch.setattr(owner, name, lambda *given, f=original, wrapper=wrapper: wrapper(f, *given))

    def update(self, original, run, *given):
        if self.teacher and run.step:
            unet = run.accelerator.unwrap_model(run.policy)
            load_weights(unet, Path(self.teacher, f"checkpoint-{run.step}", "unet.pth"))
        self.updates.append({"step": run.step, "draws": [], "losses": [], "exchanges": [], "gradient": None})
        return original(run, *given)

    def make_inputs(self, original, family, batch):
        inputs = original(family, batch)
        self.updates[-1]["draws"].append(by_pair(batch, inputs))
        return inputs

    def compute_loss(self, original, run, *given):
        loss, values = original(run, *given)
        self.updates[-1]["losses"].append(loss.item())
        self.updates[-1]["exchanges"].append(getattr(run.policy, "require_backward_grad_sync", None))  # of DDP
        return loss, values

    def clip_grad_norm(self, original, accelerator, parameters, limit):
        parameters = list(parameters)
        self.updates[-1]["gradient"] = torch.cat([parameter.grad.flatten() for parameter in parameters])
        return original(accelerator, parameters, limit)


def record(command, teacher=None):
    """Train on the CPU; one dict per update of what this rank saw."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(Accelerator, "end_training", lambda self: None)  # it would end the process group for later runs
        recorder = Recorder(patch, teacher)
        train.main(command)
    return recorder.updates


# Several ranks


def run_on_ranks(ranks, script, flags, succeeds=True):
    """Run a script on several ranks on the CPU; what they said, after checking that all of them succeeded, or none."""
    with TemporaryDirectory() as folder:
        with started_on_ranks(ranks, script, flags, folder) as processes:
            codes = finish(processes)
        said = "".join(Path(folder, f"rank-{rank}.log").read_text() for rank in range(ranks))
    assert None not in codes and [code == 0 for code in codes] == [succeeds] * ranks, (codes, said[-3000:])
    return said


def record_on_ranks(ranks, jobs, folder):
    """`record` of several (command, teacher) one after the other on several ranks: [job][rank] -> updates."""
    (folder / "jobs.json").write_text(json.dumps([(command, str(teacher or "")) for command, teacher in jobs]))
    run_on_ranks(ranks, __file__, [folder])
    return [[torch.load(folder / f"job-{job}-rank-{rank}.pt") for rank in range(ranks)] for job in range(len(jobs))]


def main(folder):
    torch.set_num_threads(1)
    for job, (command, teacher) in enumerate(json.loads(Path(folder, "jobs.json").read_text())):
        updates = record(command, teacher)
        torch.save(updates, Path(folder, f"job-{job}-rank-{os.environ['RANK']}.pt"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
