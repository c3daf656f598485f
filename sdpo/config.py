"""The training configuration: one frozen dataclass that generates the command line, its checks, its arithmetic."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdpo.command import (
    Count,
    Decay,
    Few,
    InputError,
    Natural,
    NotNegative,
    Positive,
    Share,
    Side,
    check_limits,
    flag,
    refuse,
)
from sdpo.files import is_text
from sdpo.manifest import METRICS

OFFICIAL_CHOICES = {"aesthetics": "aes", "hpsv2": "hps"}  # names of scorers in --choice_model
CHOICE_MODELS = {OFFICIAL_CHOICES.get(row, row): row for row in METRICS.values()}  # row of sdpo.scorers.SCORERS
POLYNOMIAL_END = 1e-7  # learning rate that diffusers' polynomial schedule ends with, whatever it began with
DATA_FOLDERS = ("dataset_name", "train_data_dir", "validation_data_dir")  # flags that may name a local folder of data
# Flags that must not be empty where they are given
NEVER_EMPTY = (
    "split", "image_column", "caption_column", "labels_file", "latent_cache", "reference_cache", "validation_data_dir",
    "validation_split",
)  # fmt: skip


def source_conflicts(dataset_name: str | None, train_data_dir: str | None) -> Iterator[tuple[object, str]]:
    """Pairs (is wrong, what to do about it) of the two flags, of which one says where the pairs are."""
    yield (
        not (dataset_name or train_data_dir),
        "no data: give --dataset_name (hub id or folder) or --train_data_dir (local folder)",
    )
    yield (
        dataset_name and train_data_dir,
        "--dataset_name and --train_data_dir exclude each other: give one of them (the launchers take DATA=FOLDER)",
    )


def check_texts(flags: Any) -> None:
    """Raises InputError for the first text among a dataclass instance's fields that is not UTF-8."""
    for name, value in vars(flags).items():
        if isinstance(value, str) and not is_text(value):
            raise InputError(f"--{name} {value!r} is not UTF-8: rename what it names, or choose another name")


@dataclass(frozen=True)
class TrainConfig:
    """Flags of train.py. Names and defaults of the official implementation are kept where they exist."""

    # Model
    pretrained_model_name_or_path: str = flag("", "base model: a hub id or a local diffusers folder")
    revision: str | None = flag(None, "revision of the base model on the hub")
    pretrained_vae_model_name_or_path: str | None = flag(None, "another VAE: a hub id or a local folder")
    sdxl: bool = flag(False, "the base model is SDXL (turns on Adafactor and gradient checkpointing, resolution 1024)")
    unet_init: str = flag(
        "", "start policy and reference from this UNet: .pth, .safetensors, checkpoint-N, diffusers folder or hub id"
    )
    cache_dir: str | None = flag(
        None, "where data sets from the hub and copies of parquet files are kept; models are where HF_HOME says"
    )

    # Data
    dataset_name: str | None = flag(None, "pairs: a hub id, or a local folder as --train_data_dir takes it")
    dataset_config_name: str | None = flag(None, "config of the data set on the hub")
    train_data_dir: str | None = flag(
        None,
        "local pairs: parquet/arrow files, a save_to_disk folder, or images with a JSONL/CSV of caption, winner, loser",
    )
    split: str = flag("train", "split to train on")
    image_column: str = flag("image", "column of single images, for sft on data without pairs")
    caption_column: str = flag("caption", "column of the caption or list of captions")
    max_train_samples: Count | None = flag(None, "train on this many pairs, drawn with the seed")
    dreamlike_pairs_only: bool = flag(False, "keep pairs whose model_0 and model_1 both name a dreamlike model")
    labels_file: str | None = flag(None, "labels made by `python -m sdpo.relabel`, in place of the training data's own")
    choice_model: str = flag(
        "",
        f"label the training pairs with a scorer before the start: {', '.join(CHOICE_MODELS)}; "
        "kept in output_dir. One process does it while the others wait, six hours at most: for much data run "
        "`python -m sdpo.relabel` first",
    )
    choice_margin: NotNegative = flag(0.0, "with --choice_model: pairs whose scores differ by this or less are ties")
    choice_weights: str = flag("", "with --choice_model: METRIC.PART=SOURCE,... for weights that lie elsewhere")
    resolution: Side | None = flag(
        None, "side of the square training images in pixels; the official one of the base by default, 512 or 1024"
    )
    random_crop: bool = flag(False, "crop at random instead of at the centre")
    no_hflip: bool = flag(False, "never flip images")
    shared_flip: bool = flag(False, "flip both images of a pair together; officially each is flipped on its own")
    draft_decoding: bool = flag(
        False,
        "decode JPEGs at 1/2, 1/4 or 1/8 of their size where that is still --resolution or more: quicker, less exact",
    )
    proportion_empty_prompts: Share = flag(0.2, "share of captions replaced by the empty string")
    max_unreadable_images: Natural = flag(
        100, "replace up to this many unreadable pairs per process by others, then stop"
    )
    dataloader_num_workers: Natural = flag(0, "data loading processes per rank; 0 loads in the main process")
    latent_cache: str | None = flag(
        None, "folder of encoded images and captions: filled by `python -m sdpo.cache` or on first use, then read"
    )
    latent_cache_dtype: Literal["bf16", "fp32"] = flag("bf16", "precision of the numbers in the latent cache")

    # Method
    train_method: Literal["diffusion-dpo", "dspo", "dmpo", "sft"] = flag("diffusion-dpo", "training method")
    sft: bool = flag(False, "same as --train_method sft")
    beta_dpo: Positive = flag(5000.0, "beta of the loss; contains the paper's T * omega(t)")
    dmpo_alpha: Share = flag(0.0, "1 - alpha is the probability that dmpo pulls sigmoid(margin) to; 0.01 is official")
    dspo_form: Literal["auto", "score", "switched"] = flag(
        "auto", "form of dspo; auto is the official one for the base model"
    )
    use_winner_preserving: bool = flag(
        False, "scale the loser's gradient by the winner-preserving rule (the safeguard)"
    )
    winner_preserving_mu: Share = flag(0.0, "share of the winner's descent that the safeguard keeps, in [0, 1]")
    winner_preserving_per: Literal["batch", "pair"] = flag(
        "batch", "one loser scale per device micro-batch (official) or per pair (split-invariant)"
    )
    constant_loser_scale: Share = flag(
        1.0,
        "control experiment: a constant loser scale in [0, 1]; 1 is the plain method, 0 trains on winners only",
    )
    official_reference_errors: bool = flag(
        False,
        "form the reference's errors and their difference in --mixed_precision, not in fp32: margins of equal models "
        "then spread, by 1.4 in bf16 at beta 5000, and are not 0",
    )
    reference_cache: str | None = flag(
        None,
        "folder of the reference's errors: written by the first run, read by others that differ in loss (not dspo), "
        "beta, safeguard, schedule or optimizer",
    )
    noise_offset: NotNegative = flag(0.0, "strength of a per-channel offset added to the noise")
    input_perturbation: NotNegative = flag(
        0.0,
        "strength of extra noise on the model's input, shared by the pair; the target keeps the plain noise",
    )

    # Optimisation
    seed: Natural | None = flag(None, "seed of every random draw; drawn, printed and saved if not given")
    train_batch_size: Few = flag(1, "pairs per device and micro-step")
    gradient_accumulation_steps: Count = flag(1, "micro-steps per update")
    global_batch_size: Count | None = flag(None, "pairs per update over all devices; sets gradient_accumulation_steps")
    max_train_steps: Natural = flag(2000, "updates; 0 means num_train_epochs passes over the data")
    num_train_epochs: Count = flag(100, "passes over the data, used with --max_train_steps 0")
    learning_rate: NotNegative = flag(1e-8, "learning rate after warm-up, before --scale_lr")
    scale_lr: bool = flag(False, "multiply the learning rate by the global batch size")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = flag("constant_with_warmup", "learning rate schedule")
    lr_warmup_steps: Natural = flag(500, "warm-up updates")
    use_adafactor: bool = flag(False, "same as --optimizer adafactor")
    optimizer: Literal["auto", "adamw", "adamw8bit", "adafactor"] = flag(
        "auto", "auto is the official one for the base model; adamw8bit needs `pip install bitsandbytes`"
    )
    adam_beta1: Decay = flag(0.9, "beta1 of AdamW")
    adam_beta2: Decay = flag(0.999, "beta2 of AdamW")
    adam_weight_decay: NotNegative = flag(1e-2, "weight decay of every optimizer")
    adam_epsilon: Positive = flag(1e-8, "epsilon of AdamW")
    max_grad_norm: NotNegative = flag(1.0, "clip the gradient's norm at this value; 0 turns clipping off")
    max_skipped_updates: Count = flag(10, "stop after this many skipped updates in a row")
    skip_grad_norm_above: Positive | None = flag(None, "also skip updates whose gradient norm is above this value")
    mixed_precision: Literal["no", "fp16", "bf16"] = flag("fp16", "autocast precision; weights of the policy stay fp32")
    allow_tf32: bool = flag(
        False, "allow TF32 in fp32 matrix products on GPUs that have it; PyTorch allows it in convolutions anyway"
    )
    gradient_checkpointing: Literal["none", "full", "auto"] | None = field(
        default=None,
        metadata={
            "help": "recompute activations in the backward pass to save memory: all, none, or as few as fit into "
            "--activation_memory; the base model's own by default, full if no value is given",
            "nargs": "?",
            "const": "full",
        },
    )
    activation_memory: Positive | None = flag(
        None, "GiB per device that --gradient_checkpointing auto may keep; what is free by default"
    )
    compile: bool = flag(False, "compile the UNet's repeated blocks; the first update takes minutes longer")
    channels_last: bool = flag(False, "keep the UNets in channels-last memory format")
    cuda_graphs: bool = flag(
        False, "launch each micro-step as one CUDA graph, so that the host keeps up: on one GPU, with --latent_cache"
    )
    lora_rank: Natural = flag(
        0, "train adapters of this rank on the linear layers of attention, all other weights frozen; 0 trains all"
    )
    use_ema: bool = flag(False, "keep an exponential moving average of the weights, saved as unet_ema.pth")
    ema_decay: Decay = flag(0.995, "decay of the average; it remembers about 1 / (1 - decay) updates")

    # Held-out pairs
    validation_pairs: Natural = flag(
        0,
        "pairs set aside by prompt for held-out errors; with a validation split or folder: take this many, 0 for all",
    )
    validation_split: str | None = flag(None, "read the held-out pairs from this split of the data set instead")
    validation_data_dir: str | None = flag(None, "read the held-out pairs from this local folder instead")
    validation_seed: Natural = flag(
        0, "seed of what held-out errors are measured on: pairs, noise and timesteps, alike for runs of any --seed"
    )
    validation_steps: Count = flag(
        100, "updates between measurements of held-out errors, besides those at the start and end"
    )
    validation_prompts: str | None = flag(
        None, "sample an image of each prompt as held-out errors are measured: a .txt file of lines, .json or .jsonl"
    )

    # Output
    output_dir: str = flag("sd-model-finetuned", "folder for checkpoints, metrics and the trained model")
    logging_dir: str = flag("logs", "folder of the tracker's files, inside output_dir unless it is an absolute path")
    report_to: Literal["tensorboard", "wandb", "comet_ml", "all", "none"] = flag(
        "tensorboard", "tracker; all is every one that is installed"
    )
    tracker_project_name: str = flag("tuning", "project name given to the trackers")
    logging_steps: Count = flag(1, "updates between log lines; metrics are averaged over them")
    checkpointing_steps: Natural = flag(500, "updates between checkpoints; 0 writes none")
    checkpoints_total_limit: Count | None = flag(None, "keep this many newest checkpoints")
    resume_from_checkpoint: str | None = flag(
        "latest", "'latest', a checkpoint folder, or 'none' to begin in a folder without checkpoints"
    )
    resume_with_changes: bool = flag(False, "resume although settings or data that shape the run have changed")

    # Accepted so that official commands run
    hub_model_id: str | None = flag(None, "obsolete")
    local_rank: int = flag(-1, "obsolete")
    hard_skip_resume: bool = flag(False, "obsolete")

    def __post_init__(self):
        check_limits(self)
        check_texts(self)
        for name in NEVER_EMPTY:
            if getattr(self, name) == "":  # as from a shell variable that is not set
                raise InputError(f"--{name} is empty: give its value or leave the flag out")
        refuse(self._conflicts())

    def _conflicts(self) -> Iterator[tuple[object, str]]:
        """Pairs (is wrong, what to do about it) of what is missing or does not go together."""
        yield from self._place_conflicts()
        yield from self._data_conflicts()
        yield from self._training_conflicts()

    def _place_conflicts(self) -> Iterator[tuple[object, str]]:
        yield (
            not self.pretrained_model_name_or_path,
            "--pretrained_model_name_or_path is missing: give a hub id or a local diffusers folder",
        )
        yield from source_conflicts(self.dataset_name, self.train_data_dir)
        yield not self.output_dir, "--output_dir is empty: name a folder"
        yield (
            self.report_to in ("tensorboard", "all")
            and (self.tracker_project_name in (".", "..") or "/" in self.tracker_project_name),
            f"--tracker_project_name {self.tracker_project_name} would be a path: give a name",
        )
        output = os.path.realpath(self.output_dir)
        models = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "unet_init")
        for name in (*models, "dataset_name", "train_data_dir"):
            place = Path(os.path.realpath(getattr(self, name) or ""))
            part = place.is_file() or (name in models and Path(place.parent, "model_index.json").is_file())
            yield (
                getattr(self, name) and output == str(place.parent if part else place),
                f"--output_dir {self.output_dir} holds --{name}, which training would write over: name another folder",
            )

    def _data_conflicts(self) -> Iterator[tuple[object, str]]:
        yield (
            self.choice_model and self.choice_model not in CHOICE_MODELS,
            f"--choice_model {self.choice_model!r}: choose from {', '.join(CHOICE_MODELS)}, "
            "or drop it to use the data's own labels",
        )
        yield (
            self.choice_model and self.labels_file,
            "--choice_model and --labels_file exclude each other: both say which image won",
        )
        yield (
            (self.choice_margin or self.choice_weights) and not self.choice_model,
            "--choice_margin and --choice_weights go with --choice_model; drop them or name a scorer",
        )
        yield (
            self.validation_split == self.split and not self.validation_data_dir,
            f"--validation_split {self.split} is the split trained on: name another one, or use --validation_pairs",
        )
        yield (
            self.labels_file and not Path(self.labels_file).is_file(),
            f"--labels_file {self.labels_file} is not a file: make it with python -m sdpo.relabel",
        )
        yield (
            self.validation_data_dir and not Path(self.validation_data_dir).exists(),
            f"data folder {self.validation_data_dir} does not exist: correct --validation_data_dir",
        )
        yield (
            self.validation_prompts is not None and not Path(self.validation_prompts).is_file(),
            f"--validation_prompts {self.validation_prompts} is not a file; give one prompt per line",
        )
        yield (
            self.draft_decoding and not self.resolution,
            "--draft_decoding needs --resolution, which says how far JPEGs may be reduced: give it too",
        )
        yield (
            self.latent_cache and self.random_crop,
            "--random_crop draws a new crop every time, which --latent_cache cannot hold: drop one of them",
        )
        yield (
            self.latent_cache and self.max_train_samples is not None and self.seed is None,
            "--latent_cache with --max_train_samples needs --seed, which chooses the pairs",
        )

    def _training_conflicts(self) -> Iterator[tuple[object, str]]:
        yield (
            self.sft and self.train_method not in ("diffusion-dpo", "sft"),
            f"--sft and --train_method {self.train_method} exclude each other: drop one",
        )
        yield (
            self.global_batch_size and self.gradient_accumulation_steps != 1,
            "--global_batch_size sets the number of micro-steps: change it in place of --gradient_accumulation_steps",
        )
        yield (
            self.use_adafactor and self.optimizer not in ("auto", "adafactor"),
            f"--use_adafactor and --optimizer {self.optimizer} exclude each other; drop one",
        )
        yield (
            self.activation_memory is not None and self.gradient_checkpointing != "auto",
            "--activation_memory goes with --gradient_checkpointing auto; drop it or add that",
        )
        yield (
            self.cuda_graphs and not self.latent_cache,
            "--cuda_graphs goes with --latent_cache, for a graph holds no tokenizer: add that or drop it",
        )
        yield (
            self.lora_rank and (self.compile or self.cuda_graphs),
            "--lora_rank does not go with --compile and --cuda_graphs, where policy and reference have one graph: drop "
            "either",
        )
        yield (
            self.reference_cache and self.seed is None,
            "--reference_cache needs --seed, which the runs that share it have in common",
        )
        yield (
            self.reference_cache and self.method == "sft",
            "--reference_cache keeps errors of the reference, and sft needs no reference: drop it",
        )
        yield (
            self.use_winner_preserving and self.constant_loser_scale != 1,
            "--use_winner_preserving and --constant_loser_scale exclude each other: both set the loser's scale",
        )

    @property
    def base(self) -> dict[str, str | None]:
        """Arguments of load_family."""
        return {
            "name": "sdxl" if self.sdxl else "sd15",  # row of FAMILIES
            "source": self.pretrained_model_name_or_path,
            "vae": self.pretrained_vae_model_name_or_path or None,  # "" takes back a launcher's
            "revision": self.revision,
        }

    @property
    def method(self) -> str:
        """The training method after --sft."""
        return "sft" if self.sft else self.train_method

    @property
    def preserves_winners(self) -> bool:
        """Whether the safeguard acts: sft has no loser whose gradient it could scale."""
        return self.use_winner_preserving and self.method != "sft"

    def describe_loser_scale(self) -> str:
        """What scales the loser's gradient, for the console."""
        if self.use_winner_preserving:
            return f"winner-preserving, mu {self.winner_preserving_mu:g}, per {self.winner_preserving_per}"
        plain = ", the plain method" if self.constant_loser_scale == 1 else ""
        return f"constant, {self.constant_loser_scale:g}{plain}"

    @property
    def labels_path(self) -> Path | None:
        """The label file of the training split, given or made by the choice model; None if its own labels count."""
        made = Path(self.output_dir, f"labels_{self.choice_model}.parquet") if self.choice_model else None
        return Path(self.labels_file) if self.labels_file else made

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out pairs."""
        return bool(self.validation_pairs or self.validation_split or self.validation_data_dir)

    def idle(self, optimizer: str) -> dict[str, str]:
        """Flags that have no effect, and why; `optimizer` is the row of OPTIMIZERS."""
        reasons = {  # names of flags: (whether these have no effect, why)
            "hub_model_id": (
                True,
                "(nor in the official code): run `hf upload REPO OUTPUT_DIR` after training",
            ),
            "local_rank": (True, "(the launcher sets the rank)"),
            "hard_skip_resume": (True, "(resuming never replays data)"),
            "use_winner_preserving constant_loser_scale": (self.method == "sft", "on sft, which has no loser"),
            "winner_preserving_mu winner_preserving_per": (
                not self.preserves_winners,
                "on sft" if self.method == "sft" else "without --use_winner_preserving",
            ),
            "beta_dpo": (self.method == "sft" and not self.holds_out, "on sft"),
            "revision": (Path(self.pretrained_model_name_or_path).is_dir(), "on a base model in a local folder"),
            "image_column": (self.method != "sft", f"on {self.method}"),
            "dmpo_alpha": (self.method != "dmpo", f"on {self.method}"),
            "dspo_form": (self.method != "dspo", f"on {self.method}"),
            "official_reference_errors": (
                self.method == "sft" or self.mixed_precision == "no",
                "on sft" if self.method == "sft" else "with --mixed_precision no",
            ),
            "adam_beta1 adam_beta2 adam_epsilon": (optimizer not in ("adamw", "adamw8bit"), f"on {optimizer}"),
            "lr_warmup_steps": (self.lr_scheduler == "constant", "with --lr_scheduler constant"),
            "num_train_epochs": (self.max_train_steps > 0, "unless --max_train_steps is 0"),
            "ema_decay": (not self.use_ema, "without --use_ema"),
            "shared_flip": (self.no_hflip, "with --no_hflip"),
            "latent_cache_dtype": (not self.latent_cache, "without --latent_cache"),
            "validation_seed": (not self.holds_out, "without held-out pairs"),
            "validation_steps": (
                not (self.holds_out or self.validation_prompts),
                "without held-out pairs and --validation_prompts",
            ),
        }
        return {name: why for names, (idle, why) in reasons.items() for name in names.split() if idle}

    def without_effect(self, optimizer: str) -> list[str]:
        """A sentence for every flag that was given and has no effect; `optimizer` is the row of OPTIMIZERS."""
        idle = self.idle(optimizer).items()
        return [
            f"--{name} has no effect {why}" for name, why in idle if getattr(self, name) != getattr(TrainConfig, name)
        ]

    def accumulation(self, processes: int) -> int:
        """Micro-steps per update; raises InputError for a global batch that cannot be split over the processes."""
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        per_micro_step = self.train_batch_size * processes
        accumulation, rest = divmod(self.global_batch_size, per_micro_step)
        if rest:  # so is a global batch below one micro-step
            raise InputError(
                f"--global_batch_size {self.global_batch_size} is not a multiple of {self.train_batch_size} "
                f"pairs x {processes} processes: use a multiple of {per_micro_step} or change --train_batch_size"
            )
        return accumulation

    def cautions(self, loss: str, steps: int) -> list[str]:
        """A sentence for every combination that is known to be inert or harmful in a run of `steps` updates.

        `loss` is the row of PAIR_LOSSES.
        """
        found = itertools.chain(self._method_cautions(loss), self._run_cautions(steps), self._place_cautions())
        return [text for applies, text in found if applies]

    def _place_cautions(self) -> Iterator[tuple[object, str]]:
        for name, written in itertools.product(DATA_FOLDERS, ("output_dir", "latent_cache", "reference_cache")):
            data, place = getattr(self, name), getattr(self, written)
            yield (
                data and place and os.path.isdir(data) and Path(place).resolve().is_relative_to(Path(data).resolve()),
                f"--{written} {place} is in the folder of --{name}, where the next command may take its files for "
                "data: better name another folder",
            )

    def _method_cautions(self, loss: str) -> Iterator[tuple[object, str]]:
        q = float(np.float32(1 - self.dmpo_alpha).clip(1e-6, 1 - 1e-6))  # rounded as the loss has it
        turn = math.log(q) - math.log1p(-q)
        yield (
            self.method == "dmpo",
            f"the gradient of dmpo with alpha {self.dmpo_alpha:g} changes sign at margin {turn:.3f}: beyond it descent "
            "shrinks the margin and raises the winner's error, and scaling the loser cannot prevent that",
        )
        yield (
            loss == "dspo-score" and self.beta_dpo <= 0.1,
            f"dspo by score matching at beta {self.beta_dpo:g}: the loser's gradient is of order beta^2, "
            "so training is close to sft and the safeguard close to inert",
        )
        yield (
            loss == "dspo-switched",
            "this form of dspo (--dspo_form switched) looks at a mean over the micro-batch, so training depends on how "
            "the global batch is split, with --winner_preserving_per pair too",
        )
        yield (
            self.preserves_winners and self.winner_preserving_mu == 0,
            "--winner_preserving_mu 0 only forbids a first-order rise of the winner's error on outputs; "
            "in experiments it was close to inert, and held-out winner errors still rose; try 0.6 to 0.9",
        )
        yield (
            self.preserves_winners and self.winner_preserving_mu == 1,
            "--winner_preserving_mu 1 makes the scale 0 wherever <e_w, e_l> > 0: training is on winners only, mostly",
        )

    def _run_cautions(self, steps: int) -> Iterator[tuple[object, str]]:
        yield (
            (self.input_perturbation > 0 or self.noise_offset > 0) and self.holds_out,
            "held-out errors are measured without --input_perturbation and --noise_offset",
        )
        yield (
            "turbo" in self.pretrained_model_name_or_path.lower(),
            f"{self.pretrained_model_name_or_path} is trained on all timesteps of its own noise schedule; the official "
            "code has others for bases called turbo",
        )
        yield (
            self.latent_cache and self.validation_prompts,
            "--validation_prompts needs VAE and text encoders, so they are loaded in spite of --latent_cache",
        )
        yield (
            self.lr_scheduler != "constant" and steps <= self.lr_warmup_steps,
            f"--lr_warmup_steps {self.lr_warmup_steps} is no shorter than the run: the learning rate is never reached",
        )
        yield (
            self.use_ema and 1 / (1 - self.ema_decay) > steps,
            f"--ema_decay {self.ema_decay} remembers {1 / (1 - self.ema_decay):.0f} updates, more than the run has: "
            "unet_ema.pth will hardly move",
        )


@dataclass(frozen=True)
class Plan:
    """The numbers a config implies for a number of processes and pairs."""

    processes: int
    pairs: int
    accumulation: int
    global_batch: int
    steps: int
    steps_per_epoch: float
    learning_rate: float

    @classmethod
    def of(cls, config: TrainConfig, processes: int, pairs: int) -> Plan:
        """Micro-steps, pairs per update, updates and learning rate for so many processes and pairs.

        Raises InputError for a global batch that cannot be split over the devices, or an impossible schedule.
        """
        accumulation = config.accumulation(processes)
        batch = config.train_batch_size * processes * accumulation
        steps = config.max_train_steps or math.ceil(config.num_train_epochs * pairs / batch)
        rate = config.learning_rate * (batch if config.scale_lr else 1)
        left = steps - config.lr_warmup_steps
        if config.lr_scheduler == "polynomial" and (rate <= POLYNOMIAL_END or not left):
            raise InputError(
                f"--lr_scheduler polynomial decays to {POLYNOMIAL_END:g} after the warm-up, which needs a higher "
                f"learning rate (got {rate:g}) and updates left after the warm-up (got {left}); use linear, "
                "which decays to 0"
            )
        return cls(processes, pairs, accumulation, batch, steps, pairs / batch, rate)

    def lines(self, config: TrainConfig) -> list[str]:
        """What will be done, for the console."""
        micro_step = f"{config.train_batch_size} pairs x {self.processes} processes"
        epochs = self.steps / self.steps_per_epoch
        scaled = f" = {config.learning_rate:g} x {self.global_batch}" if config.scale_lr else ""
        schedule = f"{config.lr_scheduler}, {config.lr_warmup_steps} warm-up updates"
        return [
            f"pairs          {self.pairs:,}",
            f"global batch   {micro_step} x {self.accumulation} accumulation = {self.global_batch} pairs",
            f"updates        {self.steps:,} ({self.steps_per_epoch:,.1f} per epoch, {epochs:.2f} epochs)",
            f"learning rate  {self.learning_rate:g}{scaled}, {schedule}",
        ]
