"""Align a diffusion model with preference pairs: Diffusion-DPO, DSPO, DMPO or SFT, with or without the winner-preserving safeguard.

Run with `accelerate launch train.py ...` or one of scripts/train/*.sh; `python train.py --help` lists the flags.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import secrets
import sys
import time
from pathlib import Path

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import Adafactor

from sdpo import checkpoint as checkpoints
from sdpo.config import InputError, Plan, TrainConfig, parse_config
from sdpo.data import Batch, PairDataset, Pairs, Transform, prepare_pairs, train_loader
from sdpo.families import StableDiffusion, hold_matmul_weights, load_family
from sdpo.heldout import HeldOutPairs
from sdpo.inputs import make_inputs
from sdpo.losses import PAIR_LOSSES, pair_terms, sft
from sdpo.metrics import Meter, MetricsLog, pair_metrics
from sdpo.rng import normal
from sdpo.sampling import sample

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
log = logging.getLogger("train")


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate, console logging on rank 0 and the output folder; raises InputError if the device lacks the precision asked for."""
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--mixed_precision fp16 (the default) needs a GPU: use --mixed_precision no or bf16 here")
    accelerator = Accelerator(
        gradient_accumulation_steps=1,  # set once the number of processes is known
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir, config.logging_dir))
        ),
        step_scheduler_with_optimizer=False,  # the schedule advances once per update, on any number of ranks
    )
    logging.basicConfig(
        format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR, force=True
    )
    for name in ("httpx", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for library in (datasets, diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    return accelerator


def choose_seed(config: TrainConfig, resume: Path | None) -> int:
    """The seed given, else that of the checkpoint, else a fresh one shared by all ranks."""
    seed = (
        config.seed
        if config.seed is not None
        else checkpoints.read_state(resume)["seed"]
        if resume
        else secrets.randbits(32)
    )
    return broadcast_object_list([seed])[0]


def build_models(
    config: TrainConfig, family: StableDiffusion, accelerator: Accelerator
) -> tuple[nn.Module, nn.Module | None, AveragedModel | None]:
    """(policy in fp32, frozen reference or None, averaged policy or None), on the device."""
    dtype = DTYPES[accelerator.mixed_precision]
    family.to(accelerator.device, dtype)
    unet = family.load_unet().to(accelerator.device).train()
    reference = ema = None
    if config.method != "sft" or config.validation_pairs or config.validation_split or config.validation_data_dir:
        reference = hold_matmul_weights(copy.deepcopy(unet).requires_grad_(False), dtype)
    if config.use_ema:
        ema = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)).requires_grad_(False)
        ema.update_parameters(unet)  # the first call copies: the average starts at the base model
    if config.gradient_checkpointing or family.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet, reference, ema


def build_optimizer(
    config: TrainConfig, family: StableDiffusion, unet: nn.Module, plan: Plan
) -> tuple[torch.optim.Optimizer, object]:
    """(AdamW, or Adafactor where asked for or official for the family; learning rate schedule)."""
    if config.use_adafactor or family.adafactor:
        settings = {"clip_threshold": 1.0, "scale_parameter": False, "relative_step": False}
        optimizer = Adafactor(
            unet.parameters(), lr=plan.learning_rate, weight_decay=config.adam_weight_decay, **settings
        )
    else:
        optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=plan.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )
    return optimizer, get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=plan.steps
    )


def make_dataset(
    config: TrainConfig, family: StableDiffusion, pairs: Pairs, plan: Plan, seed: int, stream: str
) -> PairDataset:
    """Training samples, or held-out samples without flips, random crops, dropped captions and added noise."""
    resolution = config.resolution or family.resolution
    latent_shape = family.latent_shape(resolution)
    if stream == "held-out":
        return PairDataset(
            pairs,
            Transform(resolution),
            latent_shape,
            seed,
            stream,
            plan.global_batch,
            max_unreadable=config.max_unreadable_images,
        )
    return PairDataset(
        pairs,
        Transform(resolution, config.random_crop, not config.no_hflip, config.shared_flip),
        latent_shape,
        seed,
        stream,
        plan.global_batch,
        members=1 if config.method == "sft" else 2,
        empty_captions=config.proportion_empty_prompts,
        noise_offset=config.noise_offset,
        input_perturbation=config.input_perturbation,
        max_unreadable=config.max_unreadable_images,
    )


def compute_loss(
    config: TrainConfig,
    family: StableDiffusion,
    accelerator: Accelerator,
    unet: nn.Module,
    reference: nn.Module | None,
    batch: Batch,
):
    """(mean loss of a micro-batch, its metrics): predictions of policy and reference on the same inputs under the same autocast."""
    inputs = make_inputs(family, batch)
    with accelerator.autocast():
        prediction = family.predict(unet, inputs.noisy, inputs.timesteps, inputs.conditioning)
        if config.method == "sft":
            loss = sft(prediction, inputs.target).mean()
            return loss, {"train_loss": loss}
        with torch.no_grad():
            reference_prediction = family.predict(reference, inputs.noisy, inputs.timesteps, inputs.conditioning)
    form = family.dspo_form if config.dspo_form == "auto" else config.dspo_form
    method = f"dspo-{form}" if config.method == "dspo" else config.method
    safeguard = {
        "mu": config.winner_preserving_mu if config.use_winner_preserving else None,
        "per_pair": config.winner_preserving_per == "pair",
    }
    terms = pair_terms(
        prediction,
        reference_prediction,
        inputs.target,
        config.beta_dpo,
        constant=config.constant_loser_scale,
        **safeguard,
    )
    loss = PAIR_LOSSES[method](terms, config.beta_dpo, config.dmpo_alpha).mean()
    return loss, {"train_loss": loss, **pair_metrics(terms, config.beta_dpo)}


def validate(
    config: TrainConfig,
    family: StableDiffusion,
    accelerator: Accelerator,
    held_out: HeldOutPairs | None,
    models: dict,
    step: int,
    seed: int,
):
    """Held-out errors of every model and, if asked for, an image per validation prompt in {output_dir}/validation/."""
    figures: dict[str, float] = {}
    for name, model in models.items():
        figures |= held_out.measure(model, config.beta_dpo, name) if held_out else {}
    if config.validation_prompts and accelerator.is_main_process:
        prompts = Path(config.validation_prompts).read_text(encoding="utf-8").split("\n")
        prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
        shape = family.latent_shape(config.resolution or family.resolution)
        folder = Path(config.output_dir, "validation", f"step-{step:06d}")
        folder.mkdir(parents=True, exist_ok=True)
        for index, prompt in enumerate(prompts):
            noise = torch.from_numpy(normal(seed, "validation-image", (index,), (1, *shape)))
            with accelerator.autocast():
                (image,) = sample(
                    family, accelerator.unwrap_model(models["heldout"]), [prompt], noise, steps=25, guidance_scale=7.5
                )
            Image.fromarray(image).save(folder / f"{index:03d}.png")
            for tracker in accelerator.trackers:
                if tracker.name in ("tensorboard", "wandb"):
                    tracker.log_images(
                        {f"validation/{index:03d}": [image] if tracker.name == "wandb" else image[None]}, step=step
                    )
    return figures


def announce(
    config: TrainConfig, plan: Plan, unet: nn.Module, family: StableDiffusion, notes: list[str], seed: int
) -> None:
    """Say what is about to happen and what is known to be unwise about it."""
    parameters = sum(p.numel() for p in unet.parameters())
    adafactor = config.use_adafactor or family.adafactor
    per_parameter = {"policy": 4, "gradients": 4, "optimizer": 0 if adafactor else 8, "average": 4 * config.use_ema}
    per_parameter["reference"] = 0 if config.method == "sft" else 4 if config.mixed_precision == "no" else 2
    frozen = sum(
        p.numel() * p.element_size() for model in (family.vae, *family.text_encoders) for p in model.parameters()
    )
    memory = {name: parameters * size / 2**30 for name, size in per_parameter.items() if size} | {
        "encoders": frozen / 2**30
    }
    parts = ", ".join(f"{name} {size:.3g}" for name, size in memory.items())
    for line in (*notes, *plan.lines(config)):
        log.info(line)
    log.info(
        f"method         {config.method}, beta {config.beta_dpo:g}, seed {seed}, {config.mixed_precision} precision"
    )
    log.info(
        f"parameters     {parameters:,}; about {sum(memory.values()):.3g} GiB per device before activations ({parts})"
    )
    for caution in (*config.obsolete(), *config.cautions()):
        log.warning(f"CAUTION: {caution}")


def count_unreadable(config: TrainConfig, batch: Batch, so_far: int) -> int:
    """Report pairs that were replaced because an image could not be read; raises InputError past the limit."""
    for text in batch.unreadable:
        log.error(f"unreadable, replaced by another pair: {text}")
    so_far += len(batch.unreadable)
    if so_far > config.max_unreadable_images:
        raise InputError(
            f"{so_far} unreadable pairs, more than --max_unreadable_images {config.max_unreadable_images}; the last: {batch.unreadable[-1]}"
        )
    return so_far


def main(arguments: list[str] | None = None) -> None:
    """Train as the command line says."""
    # Config, devices, data
    config = parse_config(arguments)
    accelerator = start_accelerator(config)
    resume = checkpoints.find_checkpoint(config)
    seed = choose_seed(config, resume)
    family = load_family(config)
    with accelerator.main_process_first():
        pairs, held_out_pairs, notes = prepare_pairs(config, seed)
    plan = Plan.of(config, accelerator.num_processes, len(pairs))
    accelerator.gradient_accumulation_steps = plan.accumulation

    # Models and optimizer
    dataset = make_dataset(config, family, pairs, plan, seed, "train")
    unet, reference, ema = build_models(config, family, accelerator)
    optimizer, schedule = build_optimizer(config, family, unet, plan)
    announce(config, plan, unet, family, notes, seed)
    unet, optimizer, schedule = accelerator.prepare(unet, optimizer, schedule)
    checkpoints.register_hooks(accelerator, unet)

    # Resume
    step = 0
    if resume:
        for change in checkpoints.changed_settings(config, resume):
            log.warning(f"CAUTION: resuming with another setting: {change}")
        step = checkpoints.load_checkpoint(accelerator, ema, resume)
        log.info(f"resumed from {resume} after {step} updates")

    # Held-out pairs and logs
    held_out = None
    if held_out_pairs:
        began = time.monotonic()
        held_out_set = make_dataset(config, family, held_out_pairs, plan, seed, "held-out")
        held_out = HeldOutPairs(accelerator, family, held_out_set, config.train_batch_size, reference)
        passes = len(held_out.shares) * (2 if ema else 1)
        log.info(
            f"held out       {held_out.pairs} pairs, encoded in {time.monotonic() - began:.1f} s; {passes} forward passes every {config.validation_steps} updates"
        )
    save_run(config, plan, accelerator, seed)
    metrics = MetricsLog(accelerator, config.output_dir, step)
    models = {"heldout": unet} | ({"heldout_ema": ema.module} if ema else {})
    if step == 0:
        metrics.write(0, validate(config, family, accelerator, held_out, models, 0, seed))

    # Updates
    meter, unreadable = Meter(accelerator), 0
    progress = tqdm(
        total=plan.steps, initial=step, desc=config.method, unit="update", disable=not accelerator.is_local_main_process
    )
    micro_batches = iter(train_loader(config, dataset, plan, accelerator.process_index, step))
    began, first = time.monotonic(), step
    while step < plan.steps:
        for _ in range(plan.accumulation):
            batch = next(micro_batches)
            unreadable = count_unreadable(config, batch, unreadable)
            with accelerator.accumulate(unet):
                loss, values = compute_loss(config, family, accelerator, unet, reference, batch.to(accelerator.device))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    values["grad_norm"] = clip_gradients(config, accelerator, unet)
                optimizer.step()
                optimizer.zero_grad()
            meter.add(values)
        learning_rate = schedule.get_last_lr()[0]
        schedule.step()
        if ema:
            ema.update_parameters(accelerator.unwrap_model(unet))
        step += 1
        progress.update()

        if step % config.logging_steps == 0 or step == plan.steps:
            figures = meter.reduce() | {
                "lr": learning_rate,
                "pairs_per_second": (step - first) * plan.global_batch / (time.monotonic() - began),
            }
            show_progress(progress, figures)
            metrics.write(step, figures)
        if step % config.validation_steps == 0 or step == plan.steps:
            metrics.write(step, validate(config, family, accelerator, held_out, models, step, seed))
        if config.checkpointing_steps and step % config.checkpointing_steps == 0:
            checkpoints.save_checkpoint(accelerator, config, ema, step, seed)
    progress.close()

    save_model(config, family, accelerator, unet, ema)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def clip_gradients(config: TrainConfig, accelerator: Accelerator, unet: nn.Module) -> Tensor:
    """Norm of the gradient before clipping."""
    return accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm or float("inf"))


def show_progress(progress: tqdm, figures: dict[str, float]) -> None:
    """Loss, margin accuracy, mean loser scale and throughput behind the progress bar."""
    short = {
        "loss": "train_loss",
        "accuracy": "rewards/accuracies",
        "lambda": "avg_lose_l_scale",
        "pairs/s": "pairs_per_second",
    }
    progress.set_postfix(
        {label: f"{figures[name]:.3g}" for label, name in short.items() if name in figures}, refresh=False
    )


def save_run(config: TrainConfig, plan: Plan, accelerator: Accelerator, seed: int) -> None:
    """Start the trackers and write config and derived numbers to {output_dir}/config.json."""
    settings = {**dataclasses.asdict(config), "seed": seed}
    if accelerator.is_main_process:
        text = json.dumps({"config": settings, "plan": dataclasses.asdict(plan)}, indent=2) + "\n"
        checkpoints.write_file(Path(config.output_dir, "config.json"), lambda partial: partial.write_text(text))
    accelerator.init_trackers(
        config.tracker_project_name, {name: value for name, value in settings.items() if value is not None}
    )


def save_model(
    config: TrainConfig, family: StableDiffusion, accelerator: Accelerator, unet: nn.Module, ema: AveragedModel | None
) -> None:
    """Write unet.pth, unet_ema.pth and a complete diffusers pipeline into the output folder."""
    state = accelerator.get_state_dict(unet)
    if accelerator.is_main_process:
        output = Path(config.output_dir)
        checkpoints.save_state_dict(state, output / "unet.pth")
        if ema:
            checkpoints.save_state_dict(ema.module, output / "unet_ema.pth")
        family.save_pipeline(accelerator.unwrap_model(unet), output)
        log.info(
            f"saved          {output}/unet.pth" + (", unet_ema.pth" if ema else "") + " and the pipeline beside it"
        )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
