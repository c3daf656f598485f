"""Align a diffusion model with preference pairs: Diffusion-DPO, DSPO, DMPO or SFT, with or without the safeguard.

Run with `accelerate launch train.py ...` or one of scripts/train/*.sh; `python train.py --help` lists the flags.
The path of one batch: docs/design.md.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.integrations import unset_hf_deepspeed_config

from sdpo.adapters import check_rank
from sdpo.batch import collate
from sdpo.cache import CachedPairs, open_cache
from sdpo.checkpoint import (
    ADAPTERS,
    choose_checkpoint,
    read_state,
    register_hooks,
    save_average,
    save_checkpoint,
    save_policy,
    writing_to,
)
from sdpo.command import InputError, parse_flags, refuse, run_command, within_memory
from sdpo.config import Plan, TrainConfig
from sdpo.console import start_console
from sdpo.data import PairDataset, Transform, check_shared_memory, train_batches
from sdpo.families import FAMILIES, Family, load_family
from sdpo.files import can_be_written, write_json
from sdpo.heldout import HELD_OUT_FILE, PREFIXES, HeldOutPairs
from sdpo.inputs import make_inputs
from sdpo.losses import PAIR_LOSSES
from sdpo.memory import choose_checkpointing, planned_memory
from sdpo.metrics import MetricsLog
from sdpo.optimizers import OPTIMIZERS, optimizer_name
from sdpo.output import alone_in, check_places, space_cautions, tidy_output
from sdpo.pairs import Pairs, prepare_pairs
from sdpo.prompts import read_prompts
from sdpo.ranks import check_precision, join_ranks, main_first, on_main, together
from sdpo.references import open_references
from sdpo.resuming import changed_flags, refuse_other_rank, refuse_other_settings, resume
from sdpo.rng import normal
from sdpo.sampling import sample
from sdpo.step import AUTOCAST, SHARDING, Run, build_run, loss_name, update
from sdpo.stopping import DataError, MicroBatches, Skips, StopRequest

log = logging.getLogger(__name__)
SAMPLING_STEPS, SAMPLING_GUIDANCE = 25, 7.5  # of images of --validation_prompts
LESS_MEMORY = (
    "try --gradient_checkpointing full, fewer pairs in --train_batch_size with as many more in "
    "--gradient_accumulation_steps, --latent_cache, --optimizer adamw8bit, --lora_rank, or a smaller --resolution"
)


# Setting up


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate, console logging on rank 0 and the output folder; InputError for what this machine lacks."""
    check_precision(config.mixed_precision)
    logs = str(Path(config.output_dir, config.logging_dir))
    accelerator = join_ranks(
        mixed_precision=config.mixed_precision,
        dynamo_backend="no",  # ignore the launcher's, which would compile the policy alone; --compile compiles both
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=logs),
        # after the first update, gradients are views of DDP's buckets
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True), AUTOCAST],
        step_scheduler_with_optimizer=False,  # the schedule advances once per update, on any number of ranks
    )
    if config.report_to not in ("all", "none") and not accelerator.log_with:
        raise InputError(f"--report_to {config.report_to}: it is not installed; pip install {config.report_to}")
    settle_engine(config, accelerator)
    start_console(accelerator.is_main_process)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    return accelerator


def engine_conflicts(config: TrainConfig, accelerator: Accelerator) -> Iterator[tuple[object, str]]:
    """Pairs (is wrong, what to do about it) of settings that the engine does not support."""
    engine = accelerator.distributed_type
    optimizer = optimizer_name(config, FAMILIES[config.base["name"]])
    yield (
        engine in SHARDING and not OPTIMIZERS[optimizer].shards,
        f"--optimizer {optimizer} does not go with FSDP2 or DeepSpeed: use --optimizer adamw",
    )
    yield (
        config.lora_rank and engine in SHARDING,
        "--lora_rank does not go with FSDP2 or DeepSpeed, and needs neither: use configs/accelerate/ddp.yaml",
    )
    alone = engine == DistributedType.NO and accelerator.device.type == "cuda"
    yield config.cuda_graphs and not alone, "--cuda_graphs runs on one GPU in one process: drop it"
    yield (
        config.gradient_checkpointing == "auto" and not config.activation_memory and accelerator.device.type != "cuda",
        "--gradient_checkpointing auto: say how many GiB may be kept with --activation_memory",
    )
    if engine == DistributedType.FSDP:
        yield (
            not accelerator.is_fsdp2,
            "FSDP 1 is not supported: write fsdp_version: 2, as in configs/accelerate/fsdp2.yaml",
        )
        yield (
            config.channels_last,
            "--channels_last does not go with FSDP2, which takes no weights of that format: drop it",
        )
    if engine == DistributedType.DEEPSPEED:
        yield (
            config.mixed_precision != "no",
            f"--mixed_precision {config.mixed_precision} under DeepSpeed would round the policy otherwise than the "
            "reference: use configs/accelerate/fsdp2.yaml, or --mixed_precision no with --allow_tf32",
        )
        flag = "--use_ema" if config.use_ema else "--skip_grad_norm_above"
        yield (
            config.use_ema or config.skip_grad_norm_above,
            f"{flag} does not go with DeepSpeed: use configs/accelerate/fsdp2.yaml or ddp.yaml",
        )


def settle_engine(config: TrainConfig, accelerator: Accelerator) -> None:
    """Make FSDP2 or DeepSpeed compute what a single process does; InputError for settings they do not support."""
    refuse(engine_conflicts(config, accelerator))
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.mixed_precision_policy = None  # autocast casts, as it does for the reference
        # else every rank would hold whole gradients between the micro-steps of an update
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        unset_hf_deepspeed_config()  # encoders and reference are loaded whole, also where the policy is shared out


def choose_seed(config: TrainConfig, accelerator: Accelerator, checkpoint: Path | None) -> int:
    """The seed given, else that of the checkpoint, else a fresh one shared by all ranks."""
    if config.seed is not None:
        return config.seed
    if checkpoint:
        return read_state(checkpoint)["seed"]
    return on_main(accelerator, lambda: secrets.randbits(32))


def training_samples(run: Run, pairs: Pairs | CachedPairs) -> PairDataset:
    """Samples to train on, as the flags ask."""
    config = run.config
    return PairDataset(
        pairs,
        Transform(run.resolution, config.random_crop, not config.no_hflip, config.shared_flip),
        run.family.latent_shape(run.resolution),
        run.seed,
        "train",
        run.plan.global_batch,
        members=1 if config.method == "sft" else 2,
        empty_captions=config.proportion_empty_prompts,
        noise_offset=config.noise_offset,
        input_perturbation=config.input_perturbation,
        max_unreadable=config.max_unreadable_images,
        references=run.reference_errors.known if run.reference_errors else None,
    )


def held_out_samples(run: Run, pairs: Pairs | CachedPairs) -> PairDataset:
    """Samples to measure on: without flips, random crops, dropped captions or added noise."""
    config = run.config
    return PairDataset(
        pairs,
        Transform(run.resolution),
        run.family.latent_shape(run.resolution),
        config.validation_seed,
        "held-out",
        run.plan.global_batch,
        max_unreadable=config.max_unreadable_images,
    )


def announce(run: Run, notes: list[str], memory: dict[str, int]) -> None:
    """Log the plan, the method and the memory it needs; `memory` is planned_memory(run)."""
    config = run.config
    parameters = sum(p.numel() for p in run.policy.parameters())
    trained = sum(p.numel() for p in run.policy.parameters() if p.requires_grad)
    adapters = f", of which adapters of {trained:,} are trained" if config.lora_rank else ""
    for line in (*notes, *run.plan.lines(config)):
        log.info(line)
    precision = "fp32" if config.mixed_precision == "no" else config.mixed_precision
    beta = "" if config.method == "sft" else f", beta {config.beta_dpo:g}"
    start = f", UNet of {config.unet_init}" if config.unet_init else ""
    log.info(f"base           {config.pretrained_model_name_or_path}{start}; output in {config.output_dir}")
    log.info(f"method         {config.method}{beta}, {precision}, seed {run.seed}")
    if config.method != "sft":
        log.info(f"loser scale    {config.describe_loser_scale()}")
    log.info(f"images         {run.resolution} x {run.resolution} pixels")
    log.info(f"parameters     {parameters:,}{adapters}, {optimizer_name(config, run.family)}")
    parts = ", ".join(f"{name} {size / 2**30:.3g}" for name, size in memory.items())
    shared = ", before the engine shares its part out" if run.sharded else ""
    log.info(f"memory         {sum(memory.values()) / 2**30:.3g} GiB per device before activations{shared}: {parts}")


def caution(run: Run, memory: dict[str, int]) -> None:
    """Warn of flags without effect, of what is known to be unwise, and of too little room for a checkpoint."""
    config = run.config
    cautions = config.without_effect(optimizer_name(config, run.family))
    cautions += config.cautions(loss_name(config, run.family), run.plan.steps)
    if run.plan.global_batch > run.plan.pairs:
        cautions.append(
            f"an update takes {run.plan.global_batch} pairs and the data has {run.plan.pairs}, which repeat within it: "
            "choose a smaller --global_batch_size or --train_batch_size"
        )
    own = run.family.own_size(run.policy)
    if config.resolution is None and own not in (None, run.resolution):
        cautions.append(f"the base makes images of {own} pixels, but is trained on {run.resolution}: see --resolution")
    files = memory["policy"] * (2 if config.use_ema else 1)  # unet.pth and unet_ema.pth
    sizes = {"the trained model": files + memory["policy"]}  # and a pipeline
    if config.checkpointing_steps:
        shards = memory["policy"] if run.sharded else 0  # what an engine itself goes on from
        sizes["a checkpoint"] = files + shards + memory["optimizer"]
    cautions += space_cautions(config.output_dir, sizes)
    for text in cautions:
        log.warning(f"CAUTION: {text}")


def set_up(config: TrainConfig) -> tuple[Run, PairDataset, HeldOutPairs | None]:
    """The run, resumed if there is a checkpoint, its training samples and its held-out pairs."""
    accelerator = start_accelerator(config)
    checkpoint = on_main(accelerator, lambda: choose_checkpoint(config))
    seed = choose_seed(config, accelerator, checkpoint)
    prompts = [prompt.text for prompt in read_prompts(config.validation_prompts)] if config.validation_prompts else []
    family = load_family(**config.base, encoders=not config.latent_cache or bool(prompts))
    on_main(accelerator, lambda: check_start(config, accelerator.num_processes, family, checkpoint))

    # data: what identifies the pairs is read before a latent cache stands in for them
    pairs, held_out_pairs, notes = main_first(accelerator, lambda: prepare_pairs(config, seed))
    plan = Plan.of(config, accelerator.num_processes, len(pairs))
    references = open_references(config, accelerator, family, plan, seed, pairs)
    fingerprint = pairs.fingerprint()
    if config.latent_cache:
        pairs, held_out_pairs = open_cache(config, accelerator, pairs, held_out_pairs)

    # models: tried out and announced before an engine wraps them
    run = build_run(config, accelerator, family, plan, seed, references)
    run.data_fingerprint = fingerprint
    run.base_fingerprints = on_main(accelerator, lambda: family.describe(config.unet_init))
    run.prompts = prompts
    dataset = training_samples(run, pairs)
    try_out(run, dataset)
    memory = planned_memory(run)
    announce(run, notes, memory)
    caution(run, memory)
    run.prepare()

    # what an earlier run left
    register_hooks(accelerator, run.policy)
    if checkpoint:
        resume(run, checkpoint)
    together(lambda: try_loading(run, dataset))
    if config.gradient_checkpointing == "auto":
        log.info(choose_checkpointing(run, collate([dataset[run.step, 0]] * config.train_batch_size)))
    held_out = hold_out(run, held_out_pairs)
    if run.reference_errors:
        run.reference_errors.claim()
    tidy_output(run, checkpoint)  # once nothing is refused any more
    return run, dataset, held_out


def check_start(config: TrainConfig, processes: int, family: Family, checkpoint: Path | None) -> None:
    """Raises InputError for what would stop the run once data are fetched, labelled and encoded."""
    if config.reference_cache and PAIR_LOSSES[loss_name(config, family)].needs_drift:
        raise InputError(
            f"--reference_cache keeps errors of the reference, and {config.method} needs its predictions: drop it"
        )
    cache = config.reference_cache
    if cache and not (can_be_written(cache) or Path(cache, "index.json").is_file()):
        raise InputError(f"--reference_cache {cache} cannot be written: name another folder")
    family.check_pipeline()
    check_places(config, family.parts)
    if config.validation_prompts:
        family.check_sampler(SAMPLING_STEPS, "drop --validation_prompts")
    if checkpoint:
        refuse_other_rank(config, checkpoint)
    if checkpoint and not config.resume_with_changes:
        refuse_other_settings(checkpoint, changed_flags(config, family, read_state(checkpoint)))
    if config.max_train_steps:
        Plan.of(config, processes, pairs=1)
    else:  # the rest of the plan depends on how many pairs there are
        config.accumulation(processes)
    OPTIMIZERS[optimizer_name(config, family)].build([nn.Parameter(torch.zeros(1))], config, config.learning_rate)
    unet = family.load_unet(config.unet_init)
    if config.lora_rank:
        check_rank(unet, family.adapted, config.lora_rank)


def try_loading(run: Run, dataset: PairDataset) -> None:
    """Raises InputError where the first pair of the next update cannot be loaded, or loader workers have no room."""
    if run.step < run.plan.steps:
        size = run.config.train_batch_size * collate([dataset[run.step, 0]]).nbytes
        check_shared_memory(run.config.dataloader_num_workers, size)


@torch.compiler.set_stance("force_eager")  # for an image of another size than those trained on
def try_out(run: Run, dataset: PairDataset) -> None:
    """Raises InputError, before training, for a base whose parts do not work together."""
    if run.family.text_encoders:
        with run.accelerator.autocast():
            run.family.try_out(run.policy)
    else:  # a latent cache stands for them and the VAE
        inputs = make_inputs(run.family, collate([dataset[0, 0]]).to(run.accelerator.device))
        with run.accelerator.autocast():
            run.family.try_prediction(run.policy, inputs.noisy, inputs.timesteps, inputs.conditioning)


def hold_out(run: Run, pairs: Pairs | CachedPairs | None) -> HeldOutPairs | None:
    """Encode the held-out pairs and say what measuring on them costs."""
    if pairs is None:
        return None
    log.info(f"held out       encoding {len(pairs):,} pairs")
    began = time.monotonic()
    samples = held_out_samples(run, pairs)
    held_out = HeldOutPairs(run.accelerator, run.family, samples, run.config.train_batch_size, run.reference)
    passes = len(held_out.shares) * (2 if run.average else 1)
    log.info(
        f"held out       {held_out.count} pairs, encoded in {time.monotonic() - began:.1f} s; "
        f"{passes} forward passes per device every {run.config.validation_steps} updates"
    )
    return held_out


def start_logs(run: Run) -> MetricsLog:
    """Trackers, config.json with settings and derived numbers, metrics.jsonl up to the step the run starts from."""
    settings = {**dataclasses.asdict(run.config), "seed": run.seed, "resolution": run.resolution}
    if run.accelerator.is_main_process:
        derived = dataclasses.asdict(run.plan)
        write_json(Path(run.config.output_dir, "config.json"), {"config": settings, "plan": derived})
    shown = {name: value for name, value in settings.items() if value is not None}
    made_again = {"tensorboard": {"purge_step": run.step and run.step + 1}}  # hides what it showed from there on
    run.accelerator.init_trackers(run.config.tracker_project_name, shown, made_again)
    return MetricsLog(run.accelerator, run.config.output_dir, run.step)


# Training


def train(run: Run, dataset: PairDataset, held_out: HeldOutPairs | None, request: StopRequest) -> int:
    """Update until the run's last step; log, measure held-out pairs and write checkpoints on the way.

    Returns 0, or the number of the signal that stopped the run early, with a checkpoint.
    """
    config = run.config
    plan = run.plan
    metrics = start_logs(run)
    if run.step == 0:
        metrics.write(0, validate(run, held_out))
    rank = run.accelerator.process_index
    micro_batches = MicroBatches(run, train_batches(config, dataset, plan, rank, run.step))
    logged = saved_at = run.step
    seconds = 0.0
    skipped = Skips(run, dataset)
    stop = 0
    hidden = not run.accelerator.is_local_main_process
    progress = tqdm(total=plan.steps, initial=run.step, desc=config.method, unit="update", disable=hidden)
    with logging_redirect_tqdm(), progress:
        while run.step < plan.steps and not stop:
            learning_rate = run.optimizer.param_groups[0]["lr"]
            began = time.monotonic()
            try:
                outcome = update(run, micro_batches)
                micro_batches.check(outcome)
            except DataError:  # weights and state are those of the last update
                save_progress(run, saved_at, prune=not skipped.in_a_row)
                raise
            seconds += time.monotonic() - began
            progress.update()

            last = run.step == plan.steps
            stop = 0 if last else request.agreed()
            if run.step % config.logging_steps == 0 or last:
                speed = (run.step - logged) * plan.global_batch / seconds
                logged = run.step
                seconds = 0.0
                figures = run.meter.reduce() | {"lr": learning_rate, "pairs_per_second": speed}
                show_progress(progress, figures)
                metrics.write(run.step, figures)
            skipped.note(outcome)  # may end the run
            if run.step % config.validation_steps == 0 or last:
                figures = validate(run, held_out)
                metrics.write(run.step, figures)
                log_held_out(run, figures)
            due = config.checkpointing_steps and run.step % config.checkpointing_steps == 0
            if due or stop:
                folder = save_checkpoint(run, prune=not skipped.in_a_row)  # may hold broken weights
                saved_at = run.step
                log.info(f"saved          {folder}")
    if run.reference_errors:
        run.reference_errors.write(run.step)
    skipped.sum_up()
    if micro_batches.unreadable:
        count = len(micro_batches.unreadable)
        log.warning(f"CAUTION: {count} pairs that this process drew could not be read and were replaced by others")
    return stop


def save_progress(run: Run, saved_at: int, prune: bool) -> None:
    """Write a checkpoint of what was done since update `saved_at`; every rank calls this."""
    if run.step == saved_at:
        return
    try:
        log.info(f"saved          {save_checkpoint(run, prune)}")
    except InputError as error:  # the disk is full; the caller has an error of its own to raise
        log.error(str(error))


def show_progress(progress: tqdm, figures: dict[str, float]) -> None:
    """Loss, margin accuracy, mean loser scale and throughput behind the progress bar."""
    names = {
        "loss": "train_loss",
        "accuracy": "rewards/accuracies",
        "lambda": "avg_lose_l_scale",
        "pairs/s": "pairs_per_second",
    }
    shown = {label: f"{figures[name]:.3g}" for label, name in names.items() if name in figures}
    progress.set_postfix(shown, refresh=False)


def log_held_out(run: Run, figures: dict[str, float]) -> None:
    """Log how held-out errors have changed so far: a line for the raw weights, one for the averaged ones."""
    for name in PREFIXES.values():
        if f"{name}/margin" in figures:
            winner, loser, accuracy = (
                figures[f"{name}/{key}"] for key in ("winner_error_change", "loser_error_change", "margin_accuracy")
            )
            log.info(
                f"{name:14} after {run.step} updates: change of winners' error {winner:+.3g}, losers' {loser:+.3g}, "
                f"margin accuracy {accuracy:.3f}"
            )
            if not math.isfinite(winner + loser):
                log.warning("CAUTION: held-out errors are not finite: the weights are broken; lower --learning_rate")


@torch.compiler.set_stance("force_eager")  # ranks and batches of other shapes would each be compiled
def validate(run: Run, held_out: HeldOutPairs | None) -> dict[str, float]:
    """Held-out errors of the raw and of the averaged weights; sampled images if there are validation prompts."""
    figures: dict[str, float] = {}
    unet = run.accelerator.unwrap_model(run.policy)
    if held_out:
        errors = {"policy": held_out.measure(unet)}
        if run.average:
            with run.average.in_place():
                errors["average"] = held_out.measure(unet)
        for model, values in errors.items():
            found = held_out.figures(values, run.config.beta_dpo)
            figures |= {f"{PREFIXES[model]}/{name}": value for name, value in found.items()}
        if run.accelerator.is_main_process:
            held_out.write(Path(run.config.output_dir, HELD_OUT_FILE), run.step, errors)
    if run.prompts and (run.accelerator.is_main_process or run.sharded):
        sample_prompts(run, unet)
    return figures


def sample_prompts(run: Run, unet: nn.Module) -> None:
    """Write an image per validation prompt to {output_dir}/validation/step-N/ and show it in TensorBoard."""
    folder = Path(run.config.output_dir, "validation", f"step-{run.step:06d}")
    folder.mkdir(parents=True, exist_ok=True)
    shape = run.family.latent_shape(run.resolution)
    for index, prompt in enumerate(run.prompts):
        noise = normal(run.seed, "validation-image", (index,), (1, *shape))
        try:
            with run.accelerator.autocast():  # (1, H, W, 3)
                image = sample(run.family, unet, [prompt], noise, SAMPLING_STEPS, SAMPLING_GUIDANCE)
        except FloatingPointError as error:
            log.error(f"no image of {prompt!r} after {run.step} updates: {error}")
            continue
        if not run.accelerator.is_main_process:
            continue
        Image.fromarray(image[0]).save(folder / f"{index:03d}.png")
        for tracker in run.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({f"validation/{index:03d}": image}, step=run.step, dataformats="NHWC")


def save_model(run: Run) -> None:
    """Write unet.pth, unet_ema.pth, adapters and a complete diffusers pipeline into the output folder."""
    output = Path(run.config.output_dir)
    if run.average:
        save_average(run, output)
    elif run.accelerator.is_main_process:
        for name in ("unet_ema.pth", ADAPTERS.format("_ema")):
            (output / name).unlink(missing_ok=True)  # an earlier run's
    state = save_policy(run.accelerator, run.policy, output)
    if run.accelerator.is_main_process:
        run.family.save_pipeline(run.accelerator.unwrap_model(run.policy).config, state, output)
        names = "unet.pth, unet_ema.pth" if run.average else "unet.pth"
        adapters = ", adapters" if run.config.lora_rank else ""
        log.info(f"saved          {names}{adapters} and the pipeline in {output}")


def main(arguments: list[str] | None = None) -> None:
    """Train as the command line says."""
    config = parse_flags(TrainConfig, "python train.py", __doc__, arguments)
    with alone_in(config.output_dir), within_memory(LESS_MEMORY):
        run, dataset, held_out = set_up(config)
        with writing_to(config.output_dir), StopRequest(run.accelerator) as request:
            stopped_by = train(run, dataset, held_out, request)
            if not stopped_by:
                save_model(run)
            run.accelerator.wait_for_everyone()  # a signal meanwhile must not end a rank that waits
        run.accelerator.end_training()
    if stopped_by:
        log.warning(
            f"stopped after {run.step} updates, checkpoint written; the same command continues"
            + ("" if config.resume_from_checkpoint == "latest" else " with --resume_from_checkpoint latest")
        )
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    run_command(main)
