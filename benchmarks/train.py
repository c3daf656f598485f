"""Speed, memory and arithmetic of training, beside the official loop's: `python benchmarks/train.py`.

Counts FLOPs and bytes on the meta device, then measures contestants in turns on models with random weights. Ratios are
taken within a round, so that a slow spell of the machine meets both sides. Results go to
benchmarks/results/{device}-{date}.json, and as tables to the .md beside it. What is measured: docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from benchmarks.architectures import BASES, Base
from benchmarks.baseline import OfficialLoop
from benchmarks.contestants import VARIANTS, OurLoop, build, cache_latents, know_reference
from benchmarks.counting import count, counted
from benchmarks.environment import environment
from benchmarks.tables import PARTS, markdown, show_check, show_counts, show_safeguard
from sdpo.arithmetic import fuses_attention
from sdpo.files import write_json, write_text
from sdpo.hub import DTYPES
from sdpo.images import decode
from sdpo.losses import pair_terms
from sdpo.rng import draw, normal

ONLY_ON_GPU = {
    "CUDA graphs",
    "reference in fp32",  # where the training precision is lower
    "figures fetched",  # where the host waits for a device
}

# Measuring


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> float:
    """Seconds, when the device has done its work; on a single CPU thread those that it worked for this process."""
    synchronize(device)
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def seconds(task: Callable[[], Any], device: torch.device) -> float:
    """Duration of one call, until the device has done its work."""
    began = clock(device)
    task()
    return clock(device) - began


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Best rate of a large matrix product, FLOP/s, and of a large copy, bytes read and written per second."""
    cuda = device.type == "cuda"
    sides = (8192,) if cuda else (512, 1024, 2048)
    source = torch.randn(2**28 if cuda else 2**25, device=device)
    target = torch.empty_like(source)

    def best(task: Callable[[], Any]) -> float:
        return min(seconds(task, device) for _ in range(20))

    def matmul(side: int) -> float:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        return 2 * side**3 / best(lambda: torch.mm(a, b))

    return {
        "matmul_flops_per_second": max(map(matmul, sides)),
        "copy_bytes_per_second": 2 * source.nbytes / best(lambda: target.copy_(source)),
    }


def measure_round(contestant: OurLoop | OfficialLoop, device: torch.device, least: float) -> dict[str, float]:
    """Pairs per second over at least `least` seconds after updates of warm-up, and the peak memory of all.

    The updates of warm-up have one micro-step each.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    contestant.take_micro_steps(1)
    first, times = seconds(contestant.update, device), []
    while not contestant.warm:
        contestant.update()
    contestant.take_micro_steps(contestant.config.gradient_accumulation_steps)
    while not times or sum(times) < least:
        times.append(seconds(contestant.update, device))
    config = contestant.config
    pairs = config.train_batch_size * config.gradient_accumulation_steps
    figures = {"pairs_per_second": pairs / statistics.median(times), "updates": len(times), "first_update_s": first}
    if isinstance(contestant, OurLoop):
        figures["equal_models_margin"] = contestant.first_margin
    if device.type == "cuda":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return figures


def time_parts(contestant: OurLoop | OfficialLoop, device: torch.device) -> dict[str, float]:
    """Milliseconds by part of an update of one micro-step, each waited for on its own."""
    spent, family = Counter(), contestant.family
    contestant.take_micro_steps(1)
    if isinstance(contestant, OurLoop):
        contestant.run.recorded = None  # what is launched as one cannot be timed by part

    def watch(owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def timed(*args, **kwargs):
            began = clock(device)
            out = original(*args, **kwargs)
            spent[name] += clock(device) - began
            return out

        setattr(owner, method, timed)

    for owner, method, name in (
        (family.vae, "encode", "encode"),
        *((encoder, "forward", "encode") for encoder in family.text_encoders),
        (contestant.policy, "forward", "policy forward"),
        *([(contestant.reference, "forward", "reference")] if contestant.reference else []),
        (contestant.accelerator, "backward", "backward"),
        (contestant.accelerator, "clip_grad_norm_", "optimizer"),
        (contestant.optimizer, "step", "optimizer"),
        (contestant.optimizer, "zero_grad", "optimizer"),
    ):
        watch(owner, method, name)
    total = seconds(contestant.update, device)
    spent["other"] = total - sum(spent.values())
    return {name: 1000 * spent[name] for name in (*PARTS, "optimizer")}


def data_milliseconds(base: Base) -> dict[str, float] | None:
    """Time of one core to make a sample of a pair of JPEG files; None where torchvision is not installed.

    Of files of the base's own size, and of twice the resolution, decoded whole and reduced.
    """
    try:
        from sdpo.data import Transform
    except ImportError:
        return None
    side = base.config().resolution
    transform, shape = Transform(side, flip=True), base.build("meta").latent_shape(side)
    smooth = Image.fromarray(draw(0, "benchmark-image").integers(0, 256, (16, 16, 3), dtype=np.uint8))

    def milliseconds(stored: int, least: int = 0) -> float:
        file = io.BytesIO()
        smooth.resize((stored, stored), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)

        def pair() -> tuple[Tensor, ...]:
            images = [decode(file.getvalue(), least) for _ in range(2)]
            pixels = transform(images, draw(0, "crop"), draw(0, "flip"))
            return pixels, normal(0, "noise", (), shape), normal(0, "posterior", (), (2, *shape))

        return 1000 * statistics.median(seconds(pair, torch.device("cpu")) for _ in range(10))

    return {"stored": milliseconds(base.stored), "large": milliseconds(2 * side), "draft": milliseconds(2 * side, side)}


# The safeguard


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "low": low, "high": high, "rounds": len(values)}


def safeguard_cost(base: Base, device: torch.device, least: float) -> dict[str, Any]:
    """What the safeguard adds to a step: on and off in turns in one run, and the loss alone on tensors of its size."""
    contestant = build(base, "default", device)
    contestant.take_micro_steps(1)
    run, on = contestant.run, contestant.run.config
    configs = {"off": dataclasses.replace(on, use_winner_preserving=False, winner_preserving_mu=0.0), "on": on}
    times, peaks = {"off": [], "on": []}, {}
    contestant.update()
    began = time.perf_counter()
    while time.perf_counter() - began < least or len(times["on"]) < 3:
        order = ("off", "on") if len(times["on"]) % 2 else ("on", "off")
        for name in order:
            run.config = configs[name]
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            times[name].append(seconds(contestant.update, device))
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated(device)
    shape = (2 * on.train_batch_size, *run.family.latent_shape(on.resolution))
    loss = {name: loss_seconds(shape, mu, device) for name, mu in (("off", None), ("on", on.winner_preserving_mu))}
    ratios = [a / b for a, b in zip(times["on"], times["off"], strict=True)]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    result = {
        "on_to_off": spread(ratios) | {"mean": statistics.fmean(ratios), "standard_error": error},
        "added_to_loss_s": loss["on"] - loss["off"],
        "share_of_micro_step": (loss["on"] - loss["off"]) / statistics.median(times["off"]),
    }
    return result | ({"added_peak_bytes": peaks["on"] - peaks["off"]} if peaks else {})


def loss_seconds(shape: tuple[int, ...], mu: float | None, device: torch.device) -> float:
    """Median time of the loss and its gradient for predictions of `shape`, with the safeguard or without."""
    prediction, reference, target = (torch.randn(shape, device=device) for _ in range(3))
    prediction.requires_grad_()

    def task() -> None:
        pair_terms(prediction, reference, target, 5000.0, mu=mu).margin.mean().backward()

    return statistics.median(seconds(task, device) for _ in range(100))


# One base model


def expected_flops(
    parts: dict[str, dict[str, float]], cached: bool = False, known: bool = False, recomputed: bool = False
) -> float:
    """FLOPs of one pair's step; recomputation in the backward pass is no useful work and counts only on request."""
    names = ["policy forward", "backward"]
    names += [] if known else ["policy forward"]  # which the reference's pass costs too
    names += [] if cached else ["encode", "text"]
    return sum(parts[name]["flops"] for name in names + (["recomputation"] if recomputed else []))


def check_baseline(base: Base, parts: dict[str, dict[str, float]], device: torch.device) -> dict[str, float]:
    """FLOPs of a micro-step of one pair of the baseline as run on the device, beside the count of the official work.

    Counting keeps more in memory than running does; FLOPs are proportional to pairs.
    """
    one_pair = dataclasses.replace(base, flags=base.flags | {"train_batch_size": 1})
    contestant, measured = build(one_pair, "baseline", device), {}
    with counted(measured):
        contestant.micro_step()
    expected = expected_flops(parts, recomputed=contestant.family.gradient_checkpointing == "full")
    return {"measured": measured["flops"], "expected": expected, "ratio": measured["flops"] / expected}


def add_ratios(results: dict[str, Any], flops: dict[str, float], peak: float) -> None:
    """Add speed, ratios by round to the first contestant and to the uncompiled one, share of the peak, memory."""
    speeds = {name: [r["pairs_per_second"] for r in result["rounds"]] for name, result in results.items()}
    first = next(iter(results))
    for name, result in results.items():
        if not speeds[name]:
            continue
        result["pairs_per_second"] = spread(speeds[name])
        result["parts_ms"] = result["rounds"][0]["parts_ms"]
        result["share_of_matmul_peak"] = statistics.median(speeds[name]) * flops[name] / peak
        others = [first, name.removesuffix(", compiled")] if name.endswith(", compiled") else [first]
        for other in others:
            if speeds.get(other):
                ratios = [own / theirs for own, theirs in zip(speeds[name], speeds[other], strict=False)]
                result[f"ratio_to_{other}"] = spread(ratios)
        peaks = [r["peak_bytes"] for r in result["rounds"] if "peak_bytes" in r]
        result["peak_bytes"] = max(peaks, default=None)


def describe(base: Base, dtype: torch.dtype) -> dict[str, Any]:
    """Size of an update, and what a pair costs by part with all tensors in `dtype`."""
    names = ("resolution", "train_batch_size", "gradient_accumulation_steps")
    return {name: getattr(base.config(), name) for name in names} | {"per_pair": count(base, dtype)}


@dataclass
class BaseBenchmark:
    """What is measured of one base model on one device."""

    base: Base
    device: torch.device
    compiled: bool  # whether compiled blocks are
    rounds: int  # turns of every contestant at most
    least: float  # seconds that a turn measures
    save: Callable[[], None] = lambda: None  # called after every turn
    failed: bool = False  # whether anything was not measured because of an error
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The training precision."""
        return DTYPES[self.base.config().mixed_precision]

    def measure(self, until: float) -> None:
        """Everything, to end at the time `until` of the monotonic clock, but for the time that compiling takes."""
        base, device, result = self.base, self.device, self.result
        result |= describe(base, self.dtype)
        result["ceilings"] = ceilings(device, self.dtype)
        result["data_ms_per_pair"] = data_milliseconds(base)
        result["baseline_flops"] = self.attempt(lambda: check_baseline(base, result["per_pair"], device))
        result["safeguard"] = self.attempt(lambda: safeguard_cost(base, device, 4 * self.least))
        print(f"  baseline's FLOPs: {show_check(result['baseline_flops'])}", flush=True)
        print(f"  safeguard: {show_safeguard(result['safeguard'])}", flush=True)
        now = time.monotonic()
        self.compare("against_baseline", base.against_baseline, now + (0.85 if base.changes else 1) * (until - now))
        if base.changes:
            self.compare("against_default", ("default", *base.changes), until)

    def compare(self, title: str, names: tuple[str, ...], until: float) -> None:
        """A race of those contestants that this machine can run, with their ratios, under `title` of the result."""
        unwanted = {"fused attention" if fuses_attention(self.device, self.dtype) else "unfused attention"}
        unwanted |= set() if self.device.type == "cuda" else ONLY_ON_GPU
        unwanted |= set() if self.compiled else {name for name in names if "compiled" in name}
        unwanted |= set() if find_spec("bitsandbytes") else {"AdamW in 8 bits"}
        results = self.result[title] = {name: {"rounds": []} for name in names if name not in unwanted}
        changes = {name: VARIANTS[name].changes for name in results}
        flops = {
            name: expected_flops(self.result["per_pair"], cached=cache_latents in done, known=know_reference in done)
            for name, done in changes.items()
        }
        for _ in self.race(results, until):
            add_ratios(results, flops, self.result["ceilings"]["matmul_flops_per_second"])
            self.save()

    def race(self, results: dict[str, dict], until: float) -> Iterator[str]:
        """Add rounds to the results by contestant, until all are done or the next would end too late.

        Yields the contestant's name after every turn. One that fails (out of memory, no compiler) is named with its
        error and not tried again.
        """
        took: dict[str, float] = {}
        for number, (name, result) in itertools.product(range(self.rounds), results.items()):
            began = time.monotonic()
            if "error" in result or began + took.get(name, 0) > until:
                continue
            figures = self.attempt(lambda name=name, first=number == 0: self.turn(name, parts=first))
            if "error" in figures:
                result |= figures
            else:
                result["rounds"].append(figures)
                took[name] = time.monotonic() - began - figures["first_update_s"]  # which may compile
                print(f"  round {number + 1}  {name:20} {figures['pairs_per_second']:8.3f} pairs/s", flush=True)
            yield name

    def attempt(self, task: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the task returns, or {"error": ...}: the suite runs unattended, and one failure must not end it."""
        try:
            return task()
        except Exception as error:
            traceback.print_exc()
            self.failed = True
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}

    def turn(self, name: str, parts: bool) -> dict[str, Any]:
        """Speed, memory and, if asked for, parts of one contestant, built anew."""
        contestant = build(self.base, name, self.device)
        figures = measure_round(contestant, self.device, self.least)
        return figures | ({"parts_ms": time_parts(contestant, self.device)} if parts else {})


# Everything


def fill_compilers_cache(bases: dict[str, Base], device: torch.device) -> None:
    """Compile the blocks of one base in this process, or of several in a process each, for later runs to read."""
    if len(bases) > 1:
        processes = [subprocess.Popen([sys.executable, *sys.argv, "--bases", name]) for name in bases]
        sys.exit(any([process.wait() for process in processes]))
    for base in bases.values():
        contestant = build(base, "compiled, full checkpointing", device)
        contestant.take_micro_steps(1)
        contestant.update()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--count", action="store_true", help="print FLOPs and bytes in bf16 and stop; needs no GPU")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=["sd15", "sdxl"] if cuda else ["tiny", "small"])
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), help="bf16 on a GPU and no on a CPU by default")
    compiled = {"action": argparse.BooleanOptionalAction, "default": cuda}
    parser.add_argument("--compile", help="measure compiled blocks too; minutes on a CPU", **compiled)
    parser.add_argument("--only_compile", action="store_true", help="fill the compiler's cache on disk and stop")
    parser.add_argument("--pairs", type=int, help="pairs per micro-step, in place of the base's own number")
    parser.add_argument("--accumulation", type=int, help="micro-steps per update, in place of the base's own number")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contestant at most")
    parser.add_argument("--seconds", type=float, default=2.0, help="measure a contestant this long per round at least")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all bases")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    return parser.parse_args()


def main() -> None:
    """Measure, print and write; exit code 1 if a contestant failed."""
    args = parse_arguments()
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if args.count:
        print(show_counts({name: describe(BASES[name], torch.bfloat16) for name in args.bases}))
        return
    flags = {"train_batch_size": args.pairs, "gradient_accumulation_steps": args.accumulation}
    flags["mixed_precision"] = args.mixed_precision or ("bf16" if args.device == "cuda" else "no")
    flags = {name: value for name, value in flags.items() if value}
    device, until = torch.device(args.device), time.monotonic() + 60 * args.minutes
    os.environ["ACCELERATE_USE_CPU"] = str(device.type == "cpu").lower()
    torch.backends.cuda.matmul.allow_tf32 = True  # as the official recipe has it
    bases = {name: dataclasses.replace(BASES[name], flags=BASES[name].flags | flags) for name in args.bases}
    if args.only_compile:
        fill_compilers_cache(bases if args.compile else {}, device)
        return
    results = environment(device, "diffusers", "transformers", "accelerate") | {"bases": {}}
    stem = "-".join(filter(None, (device.type, args.mixed_precision, results["date"][:10])))
    path = args.out / f"{stem}.json"

    def save() -> None:
        write_json(path, results)
        write_text(path.with_suffix(".md"), markdown(results))

    options = (device, args.compile, args.rounds, args.seconds, save)
    benchmarks = {name: BaseBenchmark(base, *options) for name, base in bases.items()}
    left = sum(benchmark.base.share for benchmark in benchmarks.values())
    for name, benchmark in benchmarks.items():
        print(name, flush=True)
        results["bases"][name], now = benchmark.result, time.monotonic()
        benchmark.measure(now + (until - now) * benchmark.base.share / left)
        left -= benchmark.base.share
    save()  # also where no turn was left time for
    print(f"\n{markdown(results)}\nwritten to {path}")
    sys.exit(any(benchmark.failed for benchmark in benchmarks.values()))


if __name__ == "__main__":
    main()
