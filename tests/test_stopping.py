"""Runs that are told to stop, meet numbers that are not finite, or are continued with other settings."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from forks import finish, started_on_ranks
from recording import metrics, optimizer_state, run_on_ranks, same, weights

import train
from sdpo import ranks
from sdpo.batch import collate
from sdpo.command import InputError
from sdpo.console import start_console
from sdpo.data import PREFETCHED, SHARED_MEMORY, PairDataset, explain_failures
from sdpo.metrics import read_metrics
from sdpo.pairs import Pairs
from sdpo.step import Skipped, compute_loss
from sdpo.stopping import Skips

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def not_below_nohup():
    """Signals have their usual effects at first, whatever the tests were started by."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def send_after(monkeypatch, updates, *numbers):
    """Have the process send itself signals within its update of this number."""
    original, made = train.update, []

    def update(*given):
        result = original(*given)
        made.append(result)
        if len(made) == updates:
            for number in numbers:
                os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(train, "update", update)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_run_after_the_update_with_a_checkpoint(
    arguments, tmp_path, monkeypatch, number, code, capsys
):
    train.main(arguments("--max_train_steps=4", out="whole"))
    handlers = [signal.getsignal(other) for other in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        send_after(patch, 2, number)
        train.main(arguments("--max_train_steps=4"))
    assert stopped.value.code == code
    assert "stopped after 2 updates, checkpoint written; the same command continues" in capsys.readouterr().err
    assert [signal.getsignal(other) for other in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not (tmp_path / "run" / "unet.pth").exists()
    train.main(arguments("--max_train_steps=4"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_the_second_signal_of_a_terminal_that_closes_does_not_matter(arguments, tmp_path, monkeypatch):
    """The shell sends one, and the kernel another when the shell ends."""
    send_after(monkeypatch, 2, signal.SIGHUP, signal.SIGHUP)
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments("--max_train_steps=4"))
    assert stopped.value.code == 129 and (tmp_path / "run" / "checkpoint-2").is_dir()


def fail_with(error):
    """Batches of a loader that end in an error."""
    yield 1
    raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        RuntimeError("Pin memory thread exited unexpectedly"),
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
    ],
)
def test_a_loader_worker_may_end_in_several_ways(error):
    with pytest.raises(InputError, match="a loader worker was killed"):
        list(explain_failures(fail_with(error)))


@pytest.mark.parametrize(
    "error", [RuntimeError("received 0 items of ancdata"), OSError(errno.EMFILE, "Too many open files")], ids=str
)
def test_too_few_open_files_for_loader_workers_are_named(error):
    with pytest.raises(InputError, match="more open files than allowed: raise the limit with `ulimit -n 65536`"):
        list(explain_failures(fail_with(error)))


def test_errors_of_a_loader_worker_are_not_taken_for_its_end():
    error = RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nunforeseen")
    with pytest.raises(RuntimeError, match="unforeseen"):
        list(explain_failures(fail_with(error)))


def test_a_terminal_that_closes_is_nothing_to_a_run_that_ignores_it(arguments, tmp_path, monkeypatch):
    """As nohup has it."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send_after(monkeypatch, 1, signal.SIGHUP)
        train.main(arguments("--max_train_steps=2"))
    finally:
        signal.signal(signal.SIGHUP, earlier)
    assert (tmp_path / "run" / "unet.pth").exists()


def test_a_console_on_a_full_disk_does_not_end_the_run(arguments, tmp_path):
    command = [sys.executable, ROOT / "train.py", *arguments("--max_train_steps=2")]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, cwd=ROOT, stderr=full, timeout=120).returncode == 0
    assert (tmp_path / "run" / "unet.pth").exists()


def test_a_thread_on_a_full_disk_is_one_sentence(capsys):
    """As TensorBoard's; any other error of a thread is shown as it would be."""

    def fail(error):
        def run():
            raise error

        thread = threading.Thread(target=run, name="writer")
        thread.start()
        thread.join()

    earlier = threading.excepthook
    try:
        start_console(main_process=True)
        fail(OSError(errno.ENOSPC, "No space left on device"))
        assert capsys.readouterr().err == "writer cannot write: No space left on device\n"
        fail(ValueError("unforeseen"))
        assert "ValueError: unforeseen" in capsys.readouterr().err
    finally:
        threading.excepthook = earlier


def test_a_package_that_the_launcher_needs_is_named(arguments, monkeypatch):
    def refuse(**options):
        raise ImportError("DeepSpeed is not installed => run `pip install deepspeed` or build it from source.")

    monkeypatch.setattr(ranks, "Accelerator", refuse)
    with pytest.raises(InputError, match="another package: DeepSpeed is not installed => run `pip install deepspeed`"):
        train.main(arguments())


def test_pairs_that_were_replaced_are_summed_up(arguments, monkeypatch, capsys):
    original = Pairs.load

    def load(pairs, index, members):
        if index == 0:
            raise ValueError("jpg_0: broken")
        return original(pairs, index, members)

    monkeypatch.setattr(Pairs, "load", load)
    train.main(arguments("--max_train_samples=8", "--max_train_steps=4"))  # two passes over the pairs
    said = "CAUTION: 1 pairs that this process drew could not be read and were replaced by others"
    assert said in capsys.readouterr().err


def test_what_was_trained_is_kept_where_data_end_the_run(arguments, tmp_path, monkeypatch):
    """Every unreadable pair counts once, however often it is drawn."""
    original, broken = Pairs.load, set()

    def load(pairs, index, members):
        if index in broken:
            raise ValueError("jpg_0: broken")
        return original(pairs, index, members)

    monkeypatch.setattr(Pairs, "load", load)
    broken |= {0, 1}
    flags = ["--max_train_samples=8", "--checkpointing_steps=0", "--max_train_steps=4"]
    train.main(arguments(*flags, "--max_unreadable_images=2", out="whole"))  # which are drawn twice
    given = arguments(*flags, "--max_unreadable_images=2")

    def update(run, batches, original=train.update):
        if run.step == 2:
            broken.add(2)
        return original(run, batches)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="3 unreadable pairs, more than"):
        patch.setattr(train, "update", update)
        train.main(given)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert checkpoint.name in ("checkpoint-2", "checkpoint-3")  # by when the third is drawn
    broken.remove(2)
    train.main(given)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


LOST_DATA = """
import os
import re
import train
from sdpo.command import InputError
from sdpo.data import PairDataset

def load(dataset, place, original=PairDataset.__getitem__):
    if (dataset.stream, place) == ("train", LOST) and os.environ["RANK"] == "1":
        raise InputError("a disk is gone")
    return original(dataset, place)

PairDataset.__getitem__ = load
train.run_command(train.main)
"""


ON_RANKS = ["--train_batch_size=1", "--max_train_steps=4", "--use_ema", "--validation_pairs=2", "--validation_steps=9"]


@pytest.fixture(scope="module")
def whole(arguments_in, tmp_path_factory):
    """The folder of a run on two ranks whose data do not end."""
    folder = tmp_path_factory.mktemp("whole")
    run_on_ranks(2, ROOT / "train.py", arguments_in(folder, *ON_RANKS))
    return folder / "run"


@pytest.mark.parametrize("place", [(0, 1), (2, 1), (2, 3)])  # of rank 1's first and second micro-step
def test_where_the_data_of_one_rank_end_all_keep_what_was_trained(arguments, whole, tmp_path, place):
    script = tmp_path / "lost.py"
    script.write_text(LOST_DATA.replace("LOST", repr(place)))
    said = run_on_ranks(2, script, arguments(*ON_RANKS), succeeds=False)
    assert said.count("error: a disk is gone") == 2
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"] * (place[0] > 0)
    assert not (tmp_path / "run" / "unet.pth").exists()
    run_on_ranks(2, ROOT / "train.py", arguments(*ON_RANKS))
    for file in ("unet.pth", "unet_ema.pth"):
        assert same(weights(tmp_path / "run", file), weights(whole, file))
    assert metrics(tmp_path / "run") == metrics(whole)


KILLED_WORKER = """
import multiprocessing
import train

def update(run, micro_batches, original=train.update):
    result = original(run, micro_batches)
    for worker in multiprocessing.active_children():
        worker.kill()
    return result

train.update = update
train.run_command(train.main)
"""


def test_a_loader_worker_that_was_killed_is_one_sentence(arguments, tmp_path):
    flags = arguments("--dataloader_num_workers=2", "--max_train_steps=50")
    command = [sys.executable, "-c", KILLED_WORKER, *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "error: a loader worker was killed (" in result.stderr and "Traceback" not in result.stderr
    assert list((tmp_path / "run").glob("checkpoint-*"))


def test_too_little_shared_memory_is_said_before_training(arguments, tmp_path, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(path)._replace(total=2**8) if path == SHARED_MEMORY else usage(path)
    )
    train.main(arguments("--max_train_steps=1", out="alone"))
    for flags in ([], [f"--latent_cache={tmp_path / 'cache'}"]):
        with pytest.raises(InputError, match=r"/dev/shm has 0 MiB, of which 2 loader workers need .* --shm-size"):
            train.main(arguments("--dataloader_num_workers=2", *flags))


@pytest.mark.parametrize("processes", [1, 2])
def test_shared_memory_must_hold_what_the_workers_of_all_ranks_prepare(arguments, monkeypatch, processes):
    config = train.parse_flags(train.TrainConfig, "", "", arguments("--dataloader_num_workers=2"))
    run, dataset, _ = train.set_up(config)
    batch = collate([dataset[0, position] for position in range(config.train_batch_size)])
    needed = processes * 2 * PREFETCHED * batch.nbytes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    def load(total):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=total))
        train.try_loading(run, dataset)

    load(needed)
    load(0)  # is without a limit
    with pytest.raises(InputError, match=f"of which {2 * processes} loader workers need"):
        load(needed - 1)


TWO_SIGNALS = """
import os, signal, sys
import train

def update(*given, original=train.update):
    original(*given)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)

train.update = update
train.main(sys.argv[1:])
"""


BUG = """
import sys
import train

def update(run, micro_batches, original=train.update):
    original(run, micro_batches)
    raise RuntimeError("unforeseen")

train.update = update
train.main(sys.argv[1:])
"""


def test_an_error_ends_the_process_although_workers_outlive_signals(arguments):
    flags = arguments("--dataloader_num_workers=2", "--max_train_steps=50")  # the workers are still at work
    result = subprocess.run([sys.executable, "-c", BUG, *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "RuntimeError: unforeseen" in result.stderr and result.stderr.count("Traceback") == 1


def test_a_second_signal_ends_the_process_at_once(arguments, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", TWO_SIGNALS, *arguments()], cwd=ROOT, capture_output=True, timeout=120
    )
    assert result.returncode == -signal.SIGTERM, result.stderr[-2000:]
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert not list((tmp_path / "run").glob("checkpoint*"))


@contextmanager
def started(command, **options):
    """A process in a session of its own, of which nothing is left after the block."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, **options)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_training(folder):
    """Whether the run in a folder has made an update."""
    log = folder / "run" / "metrics.jsonl"
    return log.exists() and log.read_text().count("\n") > 1


def wait_for_training(folder, process):
    """Until the process that runs there has made an update."""
    while not is_training(folder):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)


def signal_second_rank(script, flags, folder, ready):
    """(exit codes, errors) of two ranks, of which the second gets SIGTERM when `ready`."""
    with started_on_ranks(2, script, flags, folder) as ranks:
        while not ready():
            assert all(rank.is_alive() for rank in ranks)
            time.sleep(0.1)
        ranks[1].terminate()
        codes = finish(ranks, 60)
    return codes, [(folder / f"rank-{rank}.log").read_text() for rank in range(2)]


def test_a_signal_to_one_rank_stops_all_after_the_same_update(arguments, tmp_path):
    flags = arguments("--max_train_steps=100000", "--train_batch_size=1")
    codes, said = signal_second_rank(ROOT / "train.py", flags, tmp_path, partial(is_training, tmp_path))
    assert codes == [143, 143], said
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert f"stopped after {checkpoint.name.split('-')[1]} updates" in said[0]


SAVE_SLOWLY = """
import time, train
from sdpo.command import run_command
from sdpo.families import StableDiffusion

def save(*given, original=StableDiffusion.save_pipeline):
    time.sleep(3)
    original(*given)

StableDiffusion.save_pipeline = save
run_command(train.main)
"""


def test_a_signal_to_a_rank_that_waits_for_the_model_to_be_saved_does_not_end_it(arguments, tmp_path):
    (tmp_path / "slow.py").write_text(SAVE_SLOWLY)
    flags = arguments("--max_train_steps=1", "--train_batch_size=1")
    codes, said = signal_second_rank(tmp_path / "slow.py", flags, tmp_path, (tmp_path / "run" / "unet.pth").exists)
    assert codes == [0, 0], said
    assert (tmp_path / "run" / "model_index.json").is_file()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group_spares_loader_workers(arguments, tmp_path, number, code):
    """As launchers and terminals send it; what is left of the workers would fail the run."""
    command = [sys.executable, ROOT / "train.py", *arguments("--max_train_steps=100000", "--dataloader_num_workers=2")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    with started(command, env=environment) as process:
        wait_for_training(tmp_path, process)
        os.killpg(process.pid, number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert f"stopped after {checkpoint.name.split('-')[1]} updates" in said
    assert said.count("stopping once this update is made and saved") == 1


def poison(monkeypatch, bad):
    """Make the noise of the pairs at some places infinite."""
    original = PairDataset.__getitem__

    def load(dataset, place):
        sample = original(dataset, place)
        if dataset.stream == "train" and bad(place):
            sample["noise"] = sample["noise"] / 0
        return sample

    monkeypatch.setattr(PairDataset, "__getitem__", load)


def test_an_update_that_is_not_finite_is_skipped_and_named(arguments, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, lambda place: place == (1, 1))  # of the second update's first micro-batch
    flags = ["--use_ema", "--checkpointing_steps=1", "--lr_scheduler=cosine"]
    train.main(arguments(*flags))
    before, after, last = (tmp_path / "run" / f"checkpoint-{step}" for step in (1, 2, 3))
    for file in ("unet.pth", "unet_ema.pth"):
        assert same(weights(before, file), weights(after, file))
        assert not same(weights(after, file), weights(last, file))
        assert all(value.isfinite().all() for value in weights(last, file).values())
    assert same(optimizer_state(before), optimizer_state(after))
    assert dict(read_metrics(tmp_path / "run", "skipped_updates")) == {1: 0, 2: 1, 3: 0}
    assert [step for step, _ in read_metrics(tmp_path / "run", "train_loss")] == [1, 3]
    assert dict(read_metrics(tmp_path / "run", "lr"))[2] == dict(read_metrics(tmp_path / "run", "lr"))[3]
    said = capsys.readouterr().err
    config = train.parse_flags(train.TrainConfig, "", "", arguments(*flags))
    dataset = train.set_up(config)[1]
    rows = f"{dataset.row((1, 0))}, {dataset.row((1, 1))}"
    assert (
        f"update 2 skipped: gradient norm nan, losses of 1 micro-batches not finite, rows {rows} of {dataset.pairs.source}"
        in said
    )


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is_finite(arguments, monkeypatch):
    """As where the reference overflows on a loser: the margin is -inf, the loss inf, its slope -1."""
    run, dataset, _ = train.set_up(train.parse_flags(train.TrainConfig, "", "", arguments()))

    def overflow(*given):
        loss, values = compute_loss(*given)
        return loss + float("inf"), values

    monkeypatch.setattr("sdpo.step.compute_loss", overflow)
    before = {name: value.clone() for name, value in run.policy.state_dict().items()}
    assert train.update(run, train.train_batches(run.config, dataset, run.plan, 0, 0)) is not None
    assert same(run.policy.state_dict(), before)


def test_too_many_skipped_updates_end_the_run_with_a_checkpoint(arguments, tmp_path, monkeypatch):
    poison(monkeypatch, lambda place: place[0] in (1, 3, 4, 5))  # one alone, then three in a row
    with pytest.raises(
        InputError,
        match=r"3 updates in a row skipped, the last: update 6 .*checkpoint-6 holds the last good state.*--resume_with_changes$",
    ):
        flags = ["--max_skipped_updates=3", "--checkpointing_steps=3", "--checkpoints_total_limit=1"]
        train.main(arguments("--max_train_steps=9", *flags))
    assert same(weights(tmp_path / "run" / "checkpoint-6"), weights(tmp_path / "run" / "checkpoint-3"))


def test_weights_that_an_update_has_broken_are_not_kept(arguments, tmp_path, capsys):
    """After the first update of a far too high learning rate all others are skipped, whatever their pairs."""
    flags = ["--max_train_steps=9", "--checkpointing_steps=1"]
    train.main(arguments(*flags, "--max_train_steps=2"))
    broken = [*flags, "--max_skipped_updates=3", "--learning_rate=1e18", "--resume_with_changes"]
    with pytest.raises(InputError, match=r"after update 3 give no finite loss .* goes on from .*checkpoint-2, with"):
        train.main(arguments(*broken))
    left = sorted(path.name.removeprefix("checkpoint-") for path in (tmp_path / "run").glob("checkpoint-*"))
    assert left == ["1", "2", "3.broken", "4.broken", "5.broken"]
    assert list(dict(read_metrics(tmp_path / "run", "skipped_updates"))) == [1, 2, 3, 4, 5, 6]
    train.main(arguments(*flags, "--resume_with_changes"))
    assert "checkpoint-2, after 2 updates" in capsys.readouterr().err
    assert list(dict(read_metrics(tmp_path / "run", "train_loss"))) == list(range(1, 10))


def test_broken_weights_without_an_earlier_checkpoint_are_not_kept_either(arguments, tmp_path):
    with pytest.raises(InputError, match=r"after update 2 give no finite loss .*; the same command then begins again$"):
        train.main(arguments("--max_train_steps=9", "--max_skipped_updates=3", "--learning_rate=1e18"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_run_that_makes_no_update_does_not_put_away_what_it_began_with(arguments, tmp_path, monkeypatch):
    """It may be the data, or a precision in which everything overflows."""
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=1"))
    poison(monkeypatch, lambda place: True)
    with pytest.raises(InputError, match=r"after update 1 give no finite .*, and this run began with them: lower"):
        train.main(arguments("--max_train_steps=9", "--max_skipped_updates=3"))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.usefixtures("fp16")
def test_fp16_skips_what_overflows_until_the_scale_is_found(arguments, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, lambda place: place == (0, 1))
    train.main(arguments("--max_train_steps=12", "--use_ema", "--checkpointing_steps=1", "--lr_scheduler=cosine"))
    skipped = [bool(count) for _, count in read_metrics(tmp_path / "run", "skipped_updates")]
    made = [step for step in range(1, 13) if not skipped[step - 1]]
    assert skipped[:2] == [True, True] and len(made) > 4  # the one of the bad pair, and at least one that overflowed
    assert [step for step, _ in read_metrics(tmp_path / "run", "train_loss")] == made
    folders = [tmp_path / "run" / f"checkpoint-{step}" for step in range(1, 13)]
    rates = [rate for _, rate in read_metrics(tmp_path / "run", "lr")]
    for step in range(1, 12):
        before, after = folders[step - 1], folders[step]
        for file in ("unet.pth", "unet_ema.pth"):
            assert same(weights(before, file), weights(after, file)) == (skipped[step] or rates[step] == 0)
        assert same(optimizer_state(before), optimizer_state(after)) == skipped[step]
        assert (rates[step] == rates[step - 1]) == skipped[step - 1]
    assert all(value.isfinite().all() for value in weights(folders[-1]).values())
    assert torch.load(folders[-1] / "scaler.pt", weights_only=True)["scale"] == 2.0 ** (18 - sum(skipped))
    said = capsys.readouterr().err
    assert "update 1 skipped: gradient norm nan, losses of 1 micro-batches not finite" in said
    assert "update 2 skipped" not in said  # its losses are finite: the scale is being found


@pytest.mark.usefixtures("fp16")
@pytest.mark.parametrize("family", ["sd15", "sdxl"])  # fused AdamW and Adafactor
def test_fp16_resumes_with_its_scale(arguments, tmp_path, capsys, family):
    flags = ["--checkpointing_steps=3", "--resume_with_changes"]
    train.main(arguments("--max_train_steps=8", *flags, family=family, out="whole"))
    train.main(arguments("--max_train_steps=3", *flags, family=family))
    train.main(arguments("--max_train_steps=8", *flags, family=family))
    assert "checkpoint-3, after 3 updates" in capsys.readouterr().err
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    skipped = read_metrics(tmp_path / "run", "skipped_updates")
    assert skipped == read_metrics(tmp_path / "whole", "skipped_updates")
    assert 0 < sum(count for _, count in skipped) < 8


@pytest.mark.usefixtures("fp16")
def test_fp16_reports_gradients_above_the_limit(arguments):
    with pytest.raises(InputError, match=r"2 updates in a row skipped, the last: .* gradient norm \d.*, losses finite"):
        train.main(arguments("--max_train_steps=12", "--skip_grad_norm_above=1e-9", "--max_skipped_updates=2"))


def test_a_gradient_above_the_limit_is_skipped(arguments, tmp_path):
    train.main(arguments("--max_train_steps=4"))
    norms = dict(read_metrics(tmp_path / "run", "grad_norm"))
    limit = (norms[1] + norms[2]) / 2
    train.main(arguments("--max_train_steps=2", f"--skip_grad_norm_above={limit}", out="limited"))
    skipped = dict(read_metrics(tmp_path / "limited", "skipped_updates"))
    assert skipped == {step: int(norms[step] > limit) for step in (1, 2)}
    assert sum(skipped.values()) == 1


@pytest.mark.parametrize(
    "change, words",
    {
        "--beta_dpo=200": "--beta_dpo was 100.0, is 200.0",
        "--seed=8": "--seed was 7, is 8",
        "--max_train_samples=50": "--max_train_samples was None, is 50",
        "--global_batch_size=8": "the global batch was 4, is 8",
        "--train_batch_size=4": "--train_batch_size was 2, is 4",  # the safeguard's scale is per micro-batch
        "--lr_scheduler=cosine": "--lr_scheduler was 'constant_with_warmup', is 'cosine'",
    }.items(),
)
def test_resuming_with_a_change_must_be_meant(arguments, tmp_path, capsys, change, words):
    flags = ["--checkpointing_steps=1", "--use_winner_preserving", "--winner_preserving_mu=0.5"]
    train.main(arguments(*flags, "--max_train_steps=1"))
    with pytest.raises(InputError) as error:
        train.main(arguments(*flags, change))
    assert words in str(error.value) and "--resume_with_changes" in str(error.value)
    train.main(arguments(*flags, change, "--resume_with_changes"))
    assert f"CAUTION: resuming with a change: {words}" in capsys.readouterr().err
    assert [step for step, _ in read_metrics(tmp_path / "run", "train_loss")] == [1, 2, 3]


@pytest.mark.parametrize("then, now", [(["--use_ema"], []), ([], ["--use_ema"])])
def test_flags_that_lose_or_gain_their_effect_by_a_change_are_not_named_with_it(arguments, then, now):
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=1", "--ema_decay=0.5", *then))
    with pytest.raises(InputError, match=r"another run: --use_ema was \w+, is \w+\. Restore them"):
        train.main(arguments("--ema_decay=0.5", *now))


def test_pairs_that_were_trained_on_before_they_were_held_out_are_pointed_out(arguments, capsys):
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=1"))
    train.main(arguments("--max_train_steps=2", "--validation_pairs=4", "--resume_with_changes"))
    said = "CAUTION: pairs that are held out now may be among those of the first "
    assert f"{said}1 updates" in capsys.readouterr().err
    train.main(
        arguments("--max_train_steps=2", "--validation_pairs=4", "--checkpointing_steps=1", out="from the start")
    )
    train.main(arguments("--max_train_steps=3", "--validation_pairs=4", out="from the start"))
    assert said not in capsys.readouterr().err


def test_settings_that_sft_does_not_look_at_may_change(arguments, tmp_path):
    flags = ["--sft", "--use_winner_preserving", "--checkpointing_steps=1"]
    train.main(arguments(*flags, "--max_train_steps=1", "--winner_preserving_mu=0.5"))
    train.main(arguments(*flags, "--max_train_steps=2", "--winner_preserving_mu=0.7", "--train_batch_size=4"))
    assert [step for step, _ in read_metrics(tmp_path / "run", "train_loss")] == [1, 2]


def test_data_that_were_moved_are_the_same_data(arguments, pairs_folder, tmp_path, capsys):
    shutil.copytree(pairs_folder, tmp_path / "copy")
    flags = ["--checkpointing_steps=1", "--max_train_steps=1", f"--latent_cache={tmp_path / 'cache'}"]
    train.main(arguments(*flags, f"--train_data_dir={tmp_path / 'copy'}"))
    (tmp_path / "copy").rename(tmp_path / "moved")
    (tmp_path / "cache").rename(tmp_path / "cache-too")
    moved = [f"--dataset_name={tmp_path / 'moved'}", "--train_data_dir=", f"--latent_cache={tmp_path / 'cache-too'}"]
    train.main(arguments(*flags, "--max_train_steps=2", *moved))
    assert "checkpoint-1, after 1 updates" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"--latent_cache was '.*/cache-too', is None"):
        train.main(arguments("--checkpointing_steps=1", "--max_train_steps=3"))


CONSTANT = ["--lr_scheduler=constant", "--checkpointing_steps=1"]


def test_a_changed_learning_rate_is_the_rate_from_the_next_update_on(arguments, tmp_path):
    train.main(arguments(*CONSTANT, "--max_train_steps=2"))
    train.main(arguments(*CONSTANT, "--max_train_steps=4", "--learning_rate=5e-3", "--resume_with_changes"))
    rates = dict(read_metrics(tmp_path / "run", "lr"))
    assert rates == pytest.approx({1: 1e-3, 2: 1e-3, 3: 5e-3, 4: 5e-3})
    one, two, three = (weights(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 2, 3))
    moved = [sum((b[name] - a[name]).abs().sum() for name in a) for a, b in ((one, two), (two, three))]
    assert 3 < moved[1] / moved[0] < 7  # steps of Adam are about as long as the rate


@pytest.mark.parametrize("change", ["--adam_weight_decay=0.9", "--adam_beta1=0.1", "--adam_epsilon=0.1"])
def test_changed_settings_of_the_optimizer_take_effect(arguments, tmp_path, change):
    train.main(arguments(*CONSTANT, "--max_train_steps=2", out="changed"))
    shutil.copytree(tmp_path / "changed", tmp_path / "same")
    train.main(arguments(*CONSTANT, change, "--resume_with_changes", out="changed"))
    train.main(arguments(*CONSTANT, out="same"))
    assert not same(weights(tmp_path / "changed"), weights(tmp_path / "same"))


@pytest.mark.parametrize("then, now", [("adamw", "adafactor"), ("adafactor", "adamw")])
def test_the_state_of_another_optimizer_is_refused(arguments, then, now):
    train.main(arguments(f"--optimizer={then}", "--checkpointing_steps=1", "--max_train_steps=1"))
    with pytest.raises(InputError, match=r"checkpoint-1 holds the state of another optimizer: .* --unet_init"):
        train.main(arguments(f"--optimizer={now}", "--resume_with_changes"))


def test_flags_without_effect_and_other_names_of_a_place_do_not_change_a_run(arguments, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=1", f"--latent_cache={cache}"))
    monkeypatch.chdir(tmp_path)
    flags = ["--hub_model_id=me/x", "--local_rank=0", "--hard_skip_resume", "--latent_cache=cache"]
    flags += ["--optimizer=adamw", "--dspo_form=switched", "--dmpo_alpha=0.3", "--image_column=x", "--adam_beta1=0.9"]
    train.main(arguments("--max_train_steps=2", "--lr_scheduler=constant_with_warmup", *flags))
    assert dict(read_metrics(tmp_path / "run", "train_loss")).keys() == {1, 2}


def test_a_checkpoint_beyond_the_runs_end_is_refused(arguments):
    train.main(arguments("--checkpointing_steps=1"))
    with pytest.raises(InputError, match="checkpoint-3 is beyond the run's 2 updates: raise --max_train_steps"):
        train.main(arguments("--max_train_steps=2"))


def test_other_labels_and_captions_are_noticed(arguments, pairs_folder, tmp_path):
    table = pq.read_table(pairs_folder / "train.parquet")
    changes = {
        "label_0": [label if label == 0.5 else 1 - label for label in table["label_0"].to_pylist()],
        "caption": table["caption"].to_pylist()[::-1],
        "jpg_0": table["jpg_0"].to_pylist()[::-1],
    }
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=1"))
    for name, values in changes.items():
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        pq.write_table(table.set_column(table.column_names.index(name), name, [values]), folder / "train.parquet")
        with pytest.raises(InputError, match="captions, labels or images of the pairs trained on have changed"):
            train.main([*arguments(), f"--train_data_dir={folder}"])


@pytest.mark.parametrize("damaged", [b"", b"{\n", b"[1]\n", b'{"a": 1}\n', b"\xe9\0\n", b'{"step": Infinity}\n'])
def test_damaged_lines_of_metrics_are_left_out(arguments, tmp_path, damaged, capsys):
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=2"))
    path = tmp_path / "run" / "metrics.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damaged + b"".join(rest))
    train.main(arguments("--checkpointing_steps=1"))
    assert [step for step, _ in read_metrics(tmp_path / "run", "train_loss")] == [1, 2, 3]
    said = capsys.readouterr().err
    assert (f"CAUTION: {path}, line 2 is damaged and left out" in said) == bool(damaged)
    assert "is gone" not in said


def test_metrics_that_are_gone_are_named(arguments, tmp_path, capsys):
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=2"))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    train.main(arguments("--checkpointing_steps=1"))
    assert "metrics.jsonl is gone: it will lack the first 2 updates" in capsys.readouterr().err
    assert [step for step, _ in read_metrics(tmp_path / "run", "train_loss")] == [3]


def test_a_signal_while_the_model_is_saved_does_not_cost_it(arguments, tmp_path, monkeypatch):
    save = train.save_model

    def save_after_a_signal(run):
        os.kill(os.getpid(), signal.SIGTERM)
        save(run)

    monkeypatch.setattr(train, "save_model", save_after_a_signal)
    train.main(arguments())
    assert (tmp_path / "run" / "unet.pth").is_file() and (tmp_path / "run" / "model_index.json").is_file()


def test_skipped_updates_are_summed_up(arguments, capsys):
    train.main(arguments("--skip_grad_norm_above=1e-9", "--checkpointing_steps=0"))
    said = capsys.readouterr().err
    assert re.search(
        r"update 1 skipped: gradient norm \S+ \(--skip_grad_norm_above is 1e-09\), losses finite, rows", said
    )
    assert "CAUTION: 3 of 3 updates were skipped\n" in said
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=1", out="resumed"))
    train.main(arguments("--skip_grad_norm_above=1e-9", "--resume_with_changes", out="resumed"))
    said = capsys.readouterr().err
    assert "CAUTION: 2 of 2 updates were skipped, the last 2 among them: the one before may have" in said


def test_the_switch_of_dspo_depends_on_the_micro_batch(arguments):
    flags = ["--train_method=dspo", "--dspo_form=switched", "--checkpointing_steps=1"]
    train.main(arguments(*flags, "--max_train_steps=1"))
    with pytest.raises(InputError, match="--train_batch_size was 2, is 4"):
        train.main(arguments(*flags, "--train_batch_size=4"))


def test_resuming_finds_base_and_data_in_another_place(arguments, bases, pairs_folder, tmp_path, monkeypatch):
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=1"))
    moved = shutil.copytree(bases["sd15", "epsilon"], tmp_path / "moved")
    data = os.path.relpath(pairs_folder)
    train.main(arguments(f"--pretrained_model_name_or_path={moved}", f"--train_data_dir={data}", "--max_train_steps=2"))
    assert dict(read_metrics(tmp_path / "run", "train_loss")).keys() == {1, 2}


PER_PAIR = ["--use_winner_preserving", "--winner_preserving_mu=0.5", "--winner_preserving_per=pair"]


@pytest.mark.parametrize("scale", [[], PER_PAIR], ids=["plain", "per pair"])
def test_resuming_may_split_the_same_batch_otherwise(arguments, tmp_path, scale):
    train.main(arguments("--checkpointing_steps=1", "--max_train_steps=1", *scale))
    train.main(arguments("--train_batch_size=4", "--logging_steps=2", "--max_train_steps=2", *scale))
    assert dict(read_metrics(tmp_path / "run", "train_loss")).keys() == {1, 2}


SRUN = """shift  # --cpus-per-task
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" &
  echo $! >>tasks
done
for task in $(cat tasks); do wait "$task" || code=$?; done
exit $code"""
SCONTROL = """if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >>requeued; fi"""


def test_a_preempted_slurm_job_goes_back_into_the_queue(arguments, pairs_folder, tmp_path):
    """The batch script, with a scheduler that starts two tasks here."""
    for name, script in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "here", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "scripts/slurm/train.sbatch", ROOT / "scripts/train/sd15_diffusion_dpo.sh"]
    flags = arguments("--max_train_steps=100000", "--train_batch_size=1", "--dataloader_num_workers=0")
    command += [flag for flag in flags if not flag.startswith("--train_data_dir")]
    settings = {"ACCELERATE_USE_CPU": "true", "PYTHON": sys.executable, "DATA": str(pairs_folder)}
    with started(command, cwd=tmp_path, env=os.environ | job | settings) as process:
        wait_for_training(tmp_path, process)
        for task in (tmp_path / "tasks").read_text().split():
            os.kill(int(task), signal.SIGTERM)
        said = process.communicate(timeout=90)[1]
    assert process.returncode == 143, said
    assert "1 pairs x 2 processes" in said
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    assert (tmp_path / "requeued").read_text() == f"requeue {job['SLURM_JOB_ID']}\n"


def moved(folder, first, second):
    """The largest move of a weight between two checkpoints."""
    a, b = (weights(folder / f"checkpoint-{step}") for step in (first, second))
    return max((b[name] - a[name]).abs().max().item() for name in a)


def test_resuming_with_more_micro_steps_per_update_is_the_same_run(arguments, tmp_path):
    """After an odd number of micro-steps, of which an update now has two."""
    flags = ["--checkpointing_steps=1", "--adam_epsilon=0.1", "--learning_rate=1e-2"]  # steps as long as the gradient
    train.main(arguments(*flags, "--max_train_steps=1", "--train_batch_size=4", out="cut"))
    train.main(arguments(*flags, "--max_train_steps=2", "--train_batch_size=2", out="cut"))
    train.main(arguments(*flags, "--max_train_steps=2", "--train_batch_size=4", out="whole"))
    cut, whole = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    apart = max((cut[name] - whole[name]).abs().max().item() for name in whole)
    assert apart < 0.01 * moved(tmp_path / "whole", 1, 2)


@pytest.mark.parametrize(
    "given, change, words",
    [
        (["--lr_scheduler=linear"], "--max_train_steps=9", "--max_train_steps was 3, is 9"),
        ([], "--lr_warmup_steps=2", "--lr_warmup_steps was 1, is 2"),
        ([], "--proportion_empty_prompts=0.5", "--proportion_empty_prompts was 0.2, is 0.5"),
        ([], "--use_ema", "--use_ema was False, is True"),
        (["--use_ema"], "--ema_decay=0.5", "--ema_decay was "),
        (["--train_method=dspo"], "--dspo_form=switched", "--dspo_form was 'score', is 'switched'"),
        ([], "--noise_offset=0.1", "--noise_offset was 0.0, is 0.1"),
        ([], "--no_hflip", "--no_hflip was False, is True"),
    ],
)
def test_other_changes_of_a_resumed_run_must_be_meant_too(arguments, given, change, words):
    train.main(arguments(*given, "--checkpointing_steps=3"))
    with pytest.raises(InputError) as error:
        train.main(arguments(*given, change))
    assert words in str(error.value) and "--resume_with_changes" in str(error.value)


def skips(scale=None, rank=0):
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    accelerator = SimpleNamespace(scaler=scaler, process_index=rank)
    plan = SimpleNamespace(global_batch=8, processes=2, accumulation=2)
    config = SimpleNamespace(max_skipped_updates=100, skip_grad_norm_above=None)
    dataset = SimpleNamespace(row=lambda place: f"{place[0]}-{place[1]}", pairs=SimpleNamespace(source="pairs"))
    return Skips(SimpleNamespace(accelerator=accelerator, plan=plan, config=config, step=3), dataset)


@pytest.mark.parametrize("scale, norm, counted", [(2.0, float("inf"), 0), (1.0, float("inf"), 1), (2.0, 9.0, 1)])
def test_only_overflows_while_the_scale_is_found_do_not_count(scale, norm, counted):
    """A run that overflows at a scale of 1 has diverged, and would never end."""
    noted = skips(scale)
    noted.note(Skipped(norm, [0.5, 0.5]))
    assert (noted.in_a_row, noted.in_total) == (counted, counted)


def test_a_rank_names_the_rows_of_its_own(caplog):
    noted = skips(rank=1)
    noted.note(Skipped(float("nan"), [0.5, float("nan")]))
    assert "update 3 skipped" in caplog.text and "rows 2-6, 2-7 of pairs" in caplog.text
