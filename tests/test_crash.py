"""Checkpoints are whole or absent: killed trainers, damaged files, full and read-only disks, pickled code."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import accelerate.checkpointing
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from forks import finish, start
from recording import Payload, metrics, run_on_ranks, weights
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import train
from sdpo.checkpoint import choose_checkpoint, damage, list_checkpoints, read_state, seal
from sdpo.command import InputError, run_command
from sdpo.config import TrainConfig

ROOT = Path(__file__).parents[1]
STEPS = 6
FLAGS = [
    f"--max_train_steps={STEPS}",
    "--checkpointing_steps=1",
    "--checkpoints_total_limit=2",
    "--use_ema",
    "--lr_scheduler=cosine",
    "--validation_pairs=4",
]
WATCHED = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
KILLS = 10  # of each kind
FILES = [
    "unet.pth",
    "unet_ema.pth",
    "optimizer.bin",
    "scheduler.bin",
    "random_states_0.pkl",
    "state.json",
    "files.json",
]

# Killed


def train_until(flags, fatal):
    """train.main, killed before its operation number `fatal` on checkpoint files (0: not killed)."""
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which outlives a process that is killed holding it
    done = 0

    def count(event, arguments):
        nonlocal done
        if event in WATCHED and ("checkpoint-" in str(arguments[0]) or event in ("os.remove", "os.rmdir")):
            done += 1
            if done == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    train.main(flags)


def finish_alone(flags):
    """Exit code of a trainer that nothing stops, negative for a signal."""
    return finish([start(train_until, flags, 0)])[0]


def what_is_left(run):
    """What must not depend on interruptions: weights, the last checkpoint's states, metrics without wall clock."""
    newest = list_checkpoints(run)[-1]
    assert [path.name for path in list_checkpoints(run)] == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]
    assert damage(newest) is None
    files = ["unet.pth", "unet_ema.pth", *(f"{newest.name}/{name}" for name in ("unet.pth", "unet_ema.pth"))]
    states = {name: weights(newest, name) for name in ("optimizer.bin", "scheduler.bin")}
    states |= {name: weights(run, name) for name in files}
    return states, metrics(run)


def assert_same(a, b):
    """Equal states, tensors bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_same(*pair)
    else:
        assert a == b


def kill_after_delay(flags, run, random):
    """Kill a trainer at some moment between writing its settings and its end."""
    (run / "config.json").unlink(missing_ok=True)
    process = start(train_until, flags, 0)
    while process.is_alive() and not (run / "config.json").exists():
        process.join(timeout=0.005)
    process.join(timeout=random.uniform(0, 0.5))
    process.kill()
    return finish([process])[0]


def kill_at_operation(flags, run, random):
    """Kill a trainer before some operation on the files of a checkpoint: inside a write, a rename, a removal."""
    return finish([start(train_until, flags, int(random.integers(1, 100)))])[0]


@pytest.mark.parametrize("kill", [kill_after_delay, kill_at_operation])
def test_killed_runs_end_with_the_bits_of_the_uninterrupted_one(arguments, tmp_path, kill):
    assert finish_alone(arguments(*FLAGS, out="whole")) == 0
    expected, random = what_is_left(tmp_path / "whole"), np.random.default_rng(0)
    flags, run, kills, halves = arguments(*FLAGS, out="cut"), tmp_path / "cut", 0, 0
    while kills < KILLS:
        code = kill(flags, run, random)
        kills += code == -signal.SIGKILL
        halves += any(run.glob("checkpoint-*.partial"))
        if code == 0:  # it came to its end first: begin again
            assert_same(what_is_left(run), expected)
            shutil.rmtree(run)
        else:
            assert code == -signal.SIGKILL
    assert halves or kill is kill_after_delay
    assert finish_alone(flags) == 0
    assert_same(what_is_left(run), expected)
    assert not list(run.glob("checkpoint-*.*"))


# Damaged

WHOLE = ["--checkpointing_steps=1", "--use_ema"]


@pytest.fixture(scope="module")
def original(arguments_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    train.main(arguments_in(folder, *WHOLE))
    return folder / "run"


@pytest.fixture
def run(original, tmp_path):
    """The folder of a whole run of three updates, each with a checkpoint, by the flags WHOLE."""
    return shutil.copytree(original, tmp_path / "run")


def rewrite(change):
    """Damage that replaces the bytes of a file."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


DAMAGE = {  # file, what happens to it, what is said
    "truncated": ("unet.pth", rewrite(lambda data: data[:1000]), "unet.pth has 1000 bytes instead of"),
    "bit flipped": (
        "optimizer.bin",
        rewrite(lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]),
        "has changed",
    ),
    "file deleted": ("scheduler.bin", Path.unlink, "scheduler.bin is missing"),
    "manifest deleted": ("files.json", Path.unlink, "files.json is missing"),
    "manifest empty": ("files.json", rewrite(lambda data: b""), "files.json cannot be read"),
    "manifest garbage": ("files.json", rewrite(lambda data: b"\x80garbage"), "files.json cannot be read"),
    "manifest of another form": ("files.json", rewrite(lambda data: b"[1, 2]"), "files.json cannot be read"),
    "manifest of no files": ("files.json", rewrite(lambda data: b"{}"), "files.json does not list state.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_named_and_not_used(arguments, run, capsys, kind):
    name, harm, said = DAMAGE[kind]
    flags, expected = arguments(*WHOLE), weights(run)
    harm(run / "checkpoint-3" / name)
    with pytest.raises(InputError, match=f"checkpoint-3: not a checkpoint.*{said}"):
        train.main([*flags, f"--resume_from_checkpoint={run / 'checkpoint-3'}"])
    capsys.readouterr()
    train.main(flags)
    lines = capsys.readouterr().err
    assert f"{run / 'checkpoint-3'} is damaged and not used" in lines and said in lines
    assert f"{run / 'checkpoint-2'}, after 2 updates" in lines
    assert_same(weights(run), expected)
    assert damage(run / "checkpoint-3") is None


def test_two_ranks_use_the_checkpoint_that_the_main_process_chose(arguments, run):
    (run / "checkpoint-3" / "unet.pth").unlink()
    said = run_on_ranks(2, ROOT / "train.py", arguments(*WHOLE))
    assert said.count("is damaged and not used") == 1 and "checkpoint-2, after 2 updates" in said
    assert damage(run / "checkpoint-3") is None
    assert (run / "checkpoint-3" / "random_states_1.pkl").is_file()


def test_only_damaged_checkpoints_are_no_reason_to_start_again(arguments, run):
    for folder in list_checkpoints(run):
        (folder / "unet.pth").unlink()
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(
        InputError, match=r"none of the 3 checkpoints in .* is whole .checkpoint-3: unet.pth is missing"
    ):
        train.main(arguments(*WHOLE))
    assert (run / "metrics.jsonl").read_text() == before


def test_a_checkpoint_on_a_disk_that_is_not_there_is_written_again(arguments, run):
    shutil.rmtree(run / "checkpoint-3")
    (run / "checkpoint-3").symlink_to("/nowhere/checkpoint-3")
    (run / "checkpoint-3.partial").write_text("")  # in the way
    train.main(arguments(*WHOLE))
    assert damage(run / "checkpoint-3") is None and not (run / "checkpoint-3").is_symlink()


def test_too_little_memory_is_not_the_checkpoints_fault(arguments, run, monkeypatch):
    def load_state(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(Accelerator, "load_state", load_state)
    with pytest.raises(
        InputError, match=r"memory is exhausted \(CUDA out of memory\): try --gradient_checkpointing full"
    ):
        train.main(arguments(*WHOLE))


def test_checkpoints_of_another_trainer_are_where_a_new_run_may_start(arguments, run):
    for folder in list_checkpoints(run):
        (folder / "files.json").unlink()  # which the official code does not write
    weights = run / "checkpoint-3" / "unet.pth"
    with pytest.raises(
        InputError, match=rf"checkpoint-3: files.json is missing: .*another trainer.*--unet_init {weights}"
    ):
        train.main(arguments(*WHOLE))


def test_a_run_that_goes_on_from_earlier_leaves_the_other_branch(arguments, run):
    train.main(arguments(*WHOLE, f"--resume_from_checkpoint={run / 'checkpoint-1'}", "--max_train_steps=2"))
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-1", "checkpoint-2"]
    abandoned = sorted(path.name for path in run.glob("*.abandoned"))
    assert abandoned == ["checkpoint-2.abandoned", "checkpoint-3.abandoned"]
    assert damage(run / "checkpoint-3.abandoned") is None  # nothing is lost


def test_a_later_checkpoint_on_a_disk_that_is_not_there_is_left_aside_too(arguments, run):
    (run / "checkpoint-9").symlink_to(run / "away" / "checkpoint-9")
    train.main(arguments(*WHOLE, f"--resume_from_checkpoint={run / 'checkpoint-1'}", "--max_train_steps=2"))
    assert (run / "checkpoint-9.abandoned").is_symlink()


def test_an_abandoned_branch_can_be_gone_on_with(arguments, run):
    """And every other branch stays; the limit concerns the checkpoints of this one."""
    first = arguments(*WHOLE, f"--resume_from_checkpoint={run / 'checkpoint-1'}", "--max_train_steps=2")
    train.main(first)
    back = f"--resume_from_checkpoint={run / 'checkpoint-2.abandoned'}"
    train.main(arguments(*WHOLE, back, "--checkpoints_total_limit=1"))
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-3"]
    abandoned = sorted(path.name for path in run.glob("*.abandoned*"))
    assert abandoned == ["checkpoint-2.abandoned", "checkpoint-2.abandoned-2", "checkpoint-3.abandoned"]
    assert_same(weights(run / "checkpoint-3", "unet.pth"), weights(run / "checkpoint-3.abandoned", "unet.pth"))


def test_another_base_is_another_run(arguments, bases, tmp_path):
    base = shutil.copytree(bases["sd15", "epsilon"], tmp_path / "base")
    flags = [*arguments("--checkpointing_steps=1"), f"--pretrained_model_name_or_path={base}"]
    train.main([*flags, "--max_train_steps=1"])
    tensors = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(
        {name: 1.1 * value for name, value in tensors.items()}, base / "unet" / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(InputError, match=r"would be another run: the base's UNet has changed\. Restore them"):
        train.main(flags)
    train.main([*flags, "--resume_with_changes"])


def test_two_runs_do_not_share_a_folder(arguments, tmp_path, monkeypatch):
    flags, holder = (
        arguments(),
        "import sys; from sdpo.output import alone_in\nwith alone_in(sys.argv[1]): print(1, flush=True); input()",
    )
    command = [sys.executable, "-c", holder, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match=r"another run is in .*run: wait until it ends"):
            train.main(flags)
        with monkeypatch.context() as patch, pytest.raises(InputError, match="another run is in"):
            patch.setenv("RANK", "1")  # which something else has left: launchers set LOCAL_RANK too
            train.main(flags)
        other.kill()
    (tmp_path / "run" / "unet.pth.0a1b2c3d.partial").touch()  # of a run that was killed
    (tmp_path / "run" / "thesis.partial").touch()  # of the user
    train.main(flags)
    assert [path.name for path in (tmp_path / "run").glob("*.partial")] == ["thesis.partial"]


def test_a_run_that_starts_anew_does_not_mix_its_checkpoints_with_others(arguments, tmp_path):
    """They would be resumed from later."""
    flags = arguments("--checkpointing_steps=1", "--max_train_steps=2")
    train.main(flags)
    before = list_checkpoints(tmp_path / "run")
    with pytest.raises(InputError, match=r"none: .*checkpoint-2 would later be taken for one of the new run: choose"):
        train.main([*flags, "--resume_from_checkpoint=none"])
    assert list_checkpoints(tmp_path / "run") == before
    for folder in before:
        shutil.rmtree(folder)
    train.main([*flags, "--resume_from_checkpoint=none"])
    assert list_checkpoints(tmp_path / "run") == before


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_passes(run, name):
    path, random = run / "checkpoint-1" / name, np.random.default_rng(0)
    data = path.read_bytes()
    assert damage(path.parent) is None
    for _ in range(50):
        changed = bytearray(data)
        changed[random.integers(len(data))] ^= 1 << random.integers(8)
        path.write_bytes(changed)
        assert damage(path.parent) is not None


def test_of_a_linked_checkpoint_the_link_is_removed(arguments, run, tmp_path):
    (run / "checkpoint-1").rename(tmp_path / "elsewhere")
    (run / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    for step in (2, 3):
        shutil.rmtree(run / f"checkpoint-{step}")
    train.main(arguments(*WHOLE, "--checkpoints_total_limit=1", "--max_train_steps=2"))
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert damage(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("prune, left", [(True, [2, 3]), (False, [1, 2, 3])])
def test_what_a_killed_run_was_removing_is_removed_when_it_goes_on(arguments, run, prune, left):
    """Even if nothing is left to train; but not what was kept on purpose, besides weights that may be broken."""
    newest = run / "checkpoint-3"
    (newest / "state.json").write_text(json.dumps(read_state(newest) | {"prune": prune}))
    (newest / "files.json").unlink()
    seal(newest)
    for ending in ("partial", "removed"):
        shutil.copytree(run / "checkpoint-1", run / f"checkpoint-1.{ending}")
    train.main(arguments(*WHOLE, "--checkpoints_total_limit=2"))
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == [f"checkpoint-{step}" for step in left]


def test_limit_keeps_the_new_checkpoint_among_later_damaged_ones(arguments, run):
    for step in (2, 3):
        (run / f"checkpoint-{step}" / "unet.pth").unlink()
    train.main(arguments(*WHOLE, "--checkpoints_total_limit=1", "--max_train_steps=2"))
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-2", "checkpoint-3"]
    assert damage(run / "checkpoint-2") is None


def test_a_renamed_checkpoint_is_not_taken_for_a_later_one(arguments, run, capsys):
    """Else every start would go on from its earlier state."""
    (run / "checkpoint-3").rename(run / "checkpoint-9")
    train.main(arguments(*WHOLE))
    assert "checkpoint-9 is damaged and not used: it is of update 3 and has been renamed" in capsys.readouterr().err
    train.main(arguments(*WHOLE, f"--resume_from_checkpoint={run / 'checkpoint-9'}"))  # which says what is meant
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-1", "checkpoint-2", "checkpoint-9"]
    assert damage(run / "checkpoint-3.abandoned") is None


# Full and read-only disks


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def error_of(flags, capsys):
    """The sentence, last on the console, of a command that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: train.main(flags))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1].removeprefix("error: ")


def begin(arguments, folder, *more):
    """Flags of a run in a folder that has made one of its updates and written checkpoint-1."""
    flags = [*arguments("--checkpointing_steps=1"), f"--output_dir={folder}", *more]
    train.main([*flags, "--max_train_steps=1"])
    return flags


@pytest.mark.parametrize("free", [20, 200, 400, 700])  # KiB: a checkpoint has 254 of weights and 516 of optimizer
def test_full_disk_is_one_sentence_and_costs_no_checkpoint(arguments, disk, capsys, free):
    flags = begin(arguments, disk / "run", "--checkpoints_total_limit=1")
    room = shutil.disk_usage(disk).free - free * 1024
    (disk / "ballast").write_bytes(bytes(room))
    error = error_of(flags, capsys)
    assert error.startswith(f"{disk / 'run'} cannot hold more (")
    assert "free space there" in error
    assert [path.name for path in (disk / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert damage(disk / "run" / "checkpoint-1") is None
    (disk / "ballast").unlink()
    train.main(flags)
    assert damage(disk / "run" / "checkpoint-3") is None


def test_too_little_space_is_said_before_training(arguments, disk, capsys):
    begin(arguments, disk / "run")
    assert "takes about" not in capsys.readouterr().err
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 400 * 1024))
    flags = [*arguments("--checkpointing_steps=1"), f"--output_dir={disk / 'run'}"]
    with pytest.raises(InputError):
        train.main(flags)
    said = capsys.readouterr().err
    for what in ("a checkpoint", "the trained model"):
        assert f"CAUTION: {disk / 'run'} has 0.000381 GiB free and {what} takes about" in said


def test_file_too_large_is_one_sentence(arguments, tmp_path, capsys):
    flags, limits = begin(arguments, tmp_path / "run"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400 * 1024, limits[1]))  # weights fit, the optimizer does not
    try:
        error = error_of(flags, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.startswith(f"{tmp_path / 'run'} cannot hold more (")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    train.main(flags)


@pytest.mark.parametrize("free", [100, 400])  # KiB: not for unet.pth; not for the pipeline
def test_no_room_for_the_trained_model_is_one_sentence(arguments, disk, capsys, free):
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - free * 1024))
    error = error_of([*arguments("--checkpointing_steps=0"), f"--output_dir={disk / 'run'}"], capsys)
    assert error.startswith(f"{disk / 'run'} cannot hold more (")


@pytest.mark.parametrize("begun", [True, False])
def test_read_only_folder_is_one_sentence(arguments, request, tmp_path, capsys, begun):
    if os.geteuid():
        disk, run = tmp_path / "disk", tmp_path / "disk" / "run"
    else:  # who may mount may also write where the mode forbids it
        disk = request.getfixturevalue("disk")
        run = disk / "run"
    flags = begin(arguments, run) if begun else [*arguments(), f"--output_dir={run}"]
    if os.geteuid():
        disk.mkdir(exist_ok=True)
        (run if begun else disk).chmod(0o555)
    else:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    error = error_of(flags, capsys)
    (run if begun else disk).chmod(0o755) if os.geteuid() else None
    assert error.startswith(str(run)) and error.endswith("): correct the path or its permissions")
    assert not begun or damage(run / "checkpoint-1") is None


# Pickled code


@pytest.mark.parametrize("name", [*FILES[:5], "custom_checkpoint_0.pkl"])
def test_code_in_a_checkpoint_does_not_run(arguments, original, tmp_path, name):
    """A checkpoint made by an attacker, with a manifest that fits."""
    flags, trace = arguments(*WHOLE), tmp_path / "trace"
    path = shutil.copytree(original / "checkpoint-1", tmp_path / "run" / "checkpoint-1") / name
    torch.save(Payload(trace), path)
    torch.load(path, weights_only=False)
    trace.rmdir()  # the payload works
    (path.parent / "files.json").unlink()
    seal(path.parent)
    assert damage(path.parent) is None
    if name == "random_states_0.pkl":  # accelerate goes on without it, and nothing here depends on it
        train.main(flags)
    else:
        with pytest.raises((InputError, RuntimeError)):
            train.main(flags)
    assert not trace.exists()


def test_code_in_a_scalers_state_does_not_run(tmp_path):
    """fp16 needs a GPU; what accelerate calls for scaler.pt does not."""
    torch.save(Payload(tmp_path / "trace"), tmp_path / "scaler.pt")
    accelerate.PartialState()
    with pytest.raises(pickle.UnpicklingError):
        accelerate.checkpointing.load_accelerator_state(tmp_path, [], [], [], [], 0, scaler=torch.amp.GradScaler("cpu"))
    assert not (tmp_path / "trace").exists()


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("checkpoint-100", "checkpoint-9", "checkpoint-10", "checkpoint-11.partial", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_a_checkpoint_may_be_given_by_its_name_alone(arguments, tmp_path):
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=2"))
    run = {"pretrained_model_name_or_path": "base", "train_data_dir": "pairs", "output_dir": str(tmp_path / "run")}
    for given in ("checkpoint-1", str(tmp_path / "run" / "checkpoint-1")):
        found = choose_checkpoint(TrainConfig(**run, resume_from_checkpoint=given))
        assert found == tmp_path / "run" / "checkpoint-1"
