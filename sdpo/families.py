"""The base models: the only module that knows what distinguishes one family from another.

A family encodes images and captions, adds noise, predicts and saves. A new one is a class here plus a row in FAMILIES.
Targets are returned for every sample, so that parametrisations in which winner and loser differ (v-prediction, flow
matching) need nothing elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdpo.command import InputError, is_of_machine
from sdpo.files import brief, parse_json, read_text, sha256
from sdpo.hub import check_vocabulary, fetch, find_weights, hash_part, is_weight_file, load_part, load_weights

Conditioning = dict[str, Tensor]  # every tensor has one row per sample
MENDED = "captions mended by ftfy"  # part of what identifies tokens and embeddings


def read_pipeline_class(source: str, **options: str | None) -> str:
    """The class of pipeline that a hub id or local folder says it holds; raises InputError if it does not say."""
    index = Path(source, "model_index.json")
    fix = "download the model again"
    if Path(source).is_dir() and not index.is_file():
        raise InputError(f"{source} has no {index.name}, which says what kind of model it is; {fix}")
    if not index.is_file():
        index = fetch(source, index.name, **options)
    content = parse_json(read_text(index), index, fix)
    name = content.get("_class_name") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise InputError(f"{index} names no pipeline class; {fix}")
    return name


def hold_matmul_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Keep the weights that autocast would cast anyway (linear and convolution) in `dtype`, all others in fp32.

    Autocast does not cast the weights of norms, so these must not be rounded: with them in fp32, the frozen model
    computes bit for bit what an fp32 copy computes under autocast.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            module.to(dtype)
    return model


def check_scheduler(scheduler: DDPMScheduler, source: str) -> None:
    """Raises InputError for a noise schedule without betas in (0, 1] for every timestep, or for another prediction."""
    config, betas = scheduler.config, scheduler.betas
    if "beta_schedule" in config.get("_use_default_values", ()) and not config.trained_betas:
        raise InputError(f"the scheduler of {source} has no betas: it is of another kind of diffusion model")
    wrong = ""
    if betas.dim() != 1:
        wrong = "no list of trained_betas"
    elif not ((betas > 0) & (betas <= 1)).all():
        wrong = "betas outside (0, 1]"
    elif len(betas) != config.num_train_timesteps:
        wrong = f"{len(betas)} trained_betas for {config.num_train_timesteps} timesteps"
    if wrong:
        raise InputError(f"the scheduler of {source} has {wrong}: correct its scheduler_config.json")
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(
            f"{source}: prediction_type {config.prediction_type!r} is not supported; epsilon and v_prediction are"
        )


class WeightlessVAE:
    """A VAE of which only the config is loaded."""

    @classmethod
    def from_pretrained(cls, source: str, **options) -> AutoencoderKL:
        """The VAE on the meta device, where tensors take no memory."""
        config = AutoencoderKL.load_config(source, **options)
        with torch.device("meta"):
            return AutoencoderKL.from_config(config)


class Family(ABC):
    """A base model in diffusers' format: a VAE, CLIP text encoders and a UNet that predicts noise or velocity."""

    pipeline_class: type[DiffusionPipeline]
    adapted: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")  # linear layers, for --lora_rank
    text_parts: ClassVar[dict[str, type]]  # class by subfolder: every tokenizer, then its text encoder
    # official settings, for flags that are not given
    resolution: int  # pixels
    dspo_form: str
    optimizer: str  # row of sdpo.optimizers.OPTIMIZERS
    gradient_checkpointing: str
    slices_vae = False  # whether the VAE takes one image at a time

    def __init__(
        self,
        source: str,
        *,
        vae: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        encoders: bool = True,
    ):
        self.source, self.vae_source = source, vae
        self.options = {"revision": revision, "cache_dir": cache_dir}
        self.options_elsewhere = {"cache_dir": cache_dir}  # for parts from another source: --revision is the base's
        self.scheduler = self.load(DDPMScheduler, "scheduler")
        check_scheduler(self.scheduler, source)
        self.tokenizers, self.text_encoders = [], []
        if encoders:
            self._load_text_parts()
        self.vae = self.load(AutoencoderKL if encoders else WeightlessVAE, "vae")
        if self.slices_vae:
            self.vae.enable_slicing()
        if self.vae.config.shift_factor or self.vae.config.latents_mean or self.vae.config.latents_std:
            raise InputError(f"VAE {vae or source} shifts its latents, which is not supported: name another one")
        for model in (self.vae, *self.text_encoders):
            model.requires_grad_(False).eval()

    def _load_text_parts(self) -> None:
        for name, cls in self.text_parts.items():
            part = self.load(cls, name)
            if isinstance(part, CLIPTokenizer):
                self.tokenizers.append(part)
            else:
                self.text_encoders.append(part)
        self._check_tokenizers()

    def _place(self, name: str) -> tuple[str, str | None, dict[str, str | None]]:
        """Source, subfolder and options of a part, by its subfolder in the base model."""
        if name == "vae" and self.vae_source:
            within = Path(self.vae_source, "vae", "config.json").is_file()  # of another pipeline
            return self.vae_source, "vae" if within else None, self.options_elsewhere
        return self.source, name, self.options

    def load(self, cls: type, name: str):
        """One part, by its subfolder in the base model; raises InputError if it cannot be read."""
        source, subfolder, options = self._place(name)
        return load_part(cls, source, subfolder, **options)

    def _hash(self, cls: type, name: str) -> str:
        source, subfolder, options = self._place(name)
        return hash_part(cls, source, subfolder, **options)

    def _check_tokenizers(self) -> None:
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            check_vocabulary(tokenizer, encoder.config.vocab_size, self.source)
            most = tokenizer.model_max_length
            if not (isinstance(most, int) and 2 <= most <= encoder.config.max_position_embeddings):
                raise InputError(
                    f"tokenizer of {self.source!r} makes {most!r:.12} tokens, its text encoder takes "
                    f"{encoder.config.max_position_embeddings}: correct model_max_length in tokenizer_config.json"
                )

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 over the files of the VAE, and over those of tokenizers and text encoders; none need be loaded."""
        texts = [self._hash(cls, name) for name, cls in self.text_parts.items()]
        return {
            "VAE": self._hash(AutoencoderKL, "vae"),
            "text encoders": hashlib.sha256("".join([MENDED, *texts]).encode()).hexdigest(),
        }

    def _unet_place(self, init: str) -> tuple[str, str | None, dict[str, str | None]]:
        if not init:
            return self.source, "unet", self.options
        # the folder of the UNet itself, not of a run or a pipeline, where it is a folder beside another config.json
        bare = Path(init, "config.json").is_file() and not Path(init, "unet").is_dir()
        return init, None if bare else "unet", self.options_elsewhere

    def fingerprint_unet(self, init: str) -> str:
        """SHA-256 over the files of the UNet that load_unet gives; it need not be loaded."""
        init = find_weights(init)
        if is_weight_file(init):
            return sha256(init)
        source, subfolder, options = self._unet_place(init)
        return hash_part(UNet2DConditionModel, source, subfolder, **options)

    def describe(self, init: str = "") -> dict[str, str]:
        """SHA-256 over the files of every part, and of the noise schedule's settings: what a run begins with."""
        schedule = {name: value for name, value in self.scheduler.config.items() if not name.startswith("_")}
        schedule = json.dumps(schedule, sort_keys=True, default=str)
        return {
            "UNet": self.fingerprint_unet(init),
            **self.fingerprints(),
            "noise schedule": hashlib.sha256(schedule.encode()).hexdigest(),
        }

    def load_unet(self, init: str = "") -> UNet2DConditionModel:
        """A UNet in fp32: the base model's, or that of a weight file, a checkpoint, a diffusers folder or a hub id.

        Raises InputError unless it has the base's architecture and takes what the VAE makes.
        """
        init = find_weights(init)
        if not init or is_weight_file(init):
            unet = self.load(UNet2DConditionModel, "unet")
            if init:
                load_weights(unet, init)  # compares names and shapes
                self._check_prediction(Path(init).parent)
        else:
            source, subfolder, options = self._unet_place(init)
            unet = load_part(UNet2DConditionModel, source, subfolder, **options)
            self._check_kind(unet, init)
        width = sum(encoder.config.hidden_size for encoder in self.text_encoders)
        if width and isinstance(unet.config.cross_attention_dim, int) and width != unet.config.cross_attention_dim:
            raise InputError(
                f"the text encoders of {self.source} are {width} wide, the UNet takes "
                f"{unet.config.cross_attention_dim}: they belong to different models"
            )
        if (channels := self.vae.config.latent_channels) != unet.config.in_channels:
            raise InputError(
                f"VAE {self.vae_source or self.source} makes latents of {channels} channels, the UNet takes "
                f"{unet.config.in_channels}: name the VAE of the base model"
            )
        return unet.float()

    def _check_prediction(self, folder: Path) -> None:
        """Raises InputError where a folder is in a pipeline whose UNet predicts something other than the base's."""
        kind = self.scheduler.config.prediction_type
        within = (folder, *folder.absolute().parents[:2]) if folder.exists() else ()  # itself, a part, a checkpoint
        paths = [place / "scheduler" / "scheduler_config.json" for place in within]
        path = next(filter(Path.is_file, paths), None)
        scheduler = parse_json(read_text(path), path, "download it again") if path else {}
        if isinstance(scheduler, dict) and (other := scheduler.get("prediction_type", kind)) != kind:
            raise InputError(
                f"{folder} makes {other} predictions, {self.source} {kind} ones: give the base model it was trained "
                "from"
            )

    def _check_kind(self, unet: UNet2DConditionModel, init: str) -> None:
        self._check_prediction(Path(init))
        base = UNet2DConditionModel.load_config(self.source, subfolder="unet", **self.options)
        for name in ("in_channels", "block_out_channels", "cross_attention_dim", "addition_embed_type"):
            found, wanted = unet.config.get(name), base.get(name, unet.config.get(name))
            if json.dumps(found) != json.dumps(wanted):  # tuples and lists are one in JSON
                raise InputError(
                    f"{init} belongs to another architecture: {name} is {found}, {wanted} in {self.source}; "
                    "give the base model it was trained from"
                )

    def to(self, device: torch.device, dtype: torch.dtype) -> Family:
        """Move the frozen encoders; their weights are held in `dtype`, those of the VAE in vae_dtype(dtype)."""
        if self.vae.device.type != "meta":
            self.vae.to(device, self.vae_dtype(dtype))
        for encoder in self.text_encoders:
            encoder.to(device, dtype)
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)
        return self

    def vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The precision of the VAE where that of training is `dtype`."""
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the frozen encoders are."""
        return self.vae.device

    def latent_shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of this size in pixels, square if only its height is given.

        Raises InputError if the VAE cannot halve it often enough.
        """
        factor = self.image_size(1)
        width = width or height
        for side in (height, width):
            if side % factor:
                raise InputError(f"--resolution must be a multiple of {factor} for {self.source}, got {side}")
        return self.vae.config.latent_channels, height // factor, width // factor

    def image_size(self, latent_size: int) -> int:
        """Side in pixels of an image whose latents have this side."""
        return latent_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def own_size(self, unet: UNet2DConditionModel) -> int | None:
        """Side in pixels of the images that a UNet makes by its config; None if that does not say."""
        side = unet.config.sample_size
        return self.image_size(side) if isinstance(side, int) and side > 0 else None

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Mean and standard deviation (N, 2, C, h, w) fp32 of the posteriors of pixels (N, 3, H, W) in [-1, 1]."""
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1).float()

    def sample_posterior(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Latents (N, C, h, w) fp32 of moments (N, 2, C, h, w) in any precision and standard normal noise."""
        mean, std = moments.float().unbind(1)
        return (mean + std * noise) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) fp32 in [-1, 1] of latents (N, C, h, w); the VAE keeps its precision under autocast."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()

    @staticmethod
    def mend(captions: list[str]) -> list[str]:
        """Captions with typographic quotes, ligatures, HTML entities and mojibake as plain characters.

        CLIP's tokenizer did that itself up to transformers 4, in CLIP's training and in the official code.
        """
        from ftfy import fix_text  # the benchmark does without it

        return [fix_text(caption) for caption in captions]

    def tokenize(self, captions: list[str]) -> list[Tensor]:
        """Token ids (N, L) of the mended captions for each tokenizer."""
        captions = self.mend(captions)
        return [
            tokenizer(
                captions,
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids.to(self.device, non_blocking=True)
            for tokenizer in self.tokenizers
        ]

    def encode_captions(self, captions: list[str], height: int, width: int | None = None) -> Conditioning:
        """Conditioning of N captions for images of this size in pixels, as `condition` returns it."""
        return self.condition(self.encode_texts(captions), height, width)

    @abstractmethod
    def encode_texts(self, captions: list[str]) -> Conditioning:
        """{"encoder_hidden_states": (N, L, D), ...} of N captions, in the encoders' precision."""

    def condition(self, texts: Conditioning, height: int, width: int | None = None) -> Conditioning:
        """What encode_texts gave, in any precision, in fp32; for images of this size in pixels."""
        return {name: value.float() for name, value in texts.items()}

    def timesteps(self, uniform: Tensor) -> Tensor:
        """Timesteps (N,) for uniform draws in [0, 1)."""
        steps = self.scheduler.config.num_train_timesteps
        return (uniform * steps).long().clamp_max(steps - 1)  # in fp32 a draw may round up to 1

    def sampler(self) -> SchedulerMixin:
        """A new scheduler that samples by Euler's method, its timesteps not set yet."""
        return EulerDiscreteScheduler.from_config(self.scheduler.config)

    def check_sampler(self, steps: int, fix: str) -> None:
        """Raises InputError for more steps than there are timesteps, and settings that Euler's method does not take."""
        most = self.scheduler.config.num_train_timesteps
        if steps > most:
            raise InputError(f"{self.source} has {most} timesteps, of which {steps} steps cannot be sampled: {fix}")
        try:
            self.sampler().set_timesteps(steps)
        except Exception as error:  # each wrong setting has one of its own
            raise InputError(
                f"the scheduler of {self.source} does not support Euler sampling ({brief(error)}): correct its "
                "scheduler_config.json"
            ) from error

    def add_noise(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, perturbed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(noised latents, target), each (N, C, h, w); `perturbed` replaces the noise on the model's input only."""
        noisy = self.scheduler.add_noise(latents, noise if perturbed is None else perturbed, timesteps)
        if self.scheduler.config.prediction_type == "v_prediction":
            return noisy, self.scheduler.get_velocity(latents, noise, timesteps)
        return noisy, noise

    def predict(self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's prediction (N, C, h, w) in fp32."""
        return unet(noisy, timesteps, **conditioning).sample.float()

    @torch.no_grad()
    def try_out(self, unet: nn.Module) -> None:
        """Encode, predict and decode a small image; raises InputError where that fails or numbers are not finite."""
        side = self.image_size(8)
        with self._refusing_misfits():
            with torch.autocast(self.device.type, enabled=False):  # as in training: a VAE in fp32 overflows in fp16
                moments = self.encode_moments(torch.zeros(1, 3, side, side, device=self.device))
            latents = self.sample_posterior(moments, torch.ones_like(moments[:, 0]))
            timesteps = self.timesteps(torch.full((1,), 0.5, device=self.device))
            noisy, target = self.add_noise(latents, torch.ones_like(latents), timesteps)
            texts = self.encode_captions([""], side)
            pixels = self.decode_latents(latents)
        for name, value in {"latents": noisy, "target": target, "pixels": pixels}.items():
            if not value.isfinite().all():
                raise self._misfit(f"its {name} have numbers that are not finite")
        self.try_prediction(unet, noisy, timesteps, texts)

    @torch.no_grad()
    def try_prediction(self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> None:
        """Raises InputError where a prediction fails or is not finite."""
        with self._refusing_misfits():
            conditioning = {name: value.to(unet.dtype) for name, value in conditioning.items()}
            prediction = self.predict(unet, noisy.to(unet.dtype), timesteps, conditioning)
        if not prediction.isfinite().all():
            raise InputError(
                f"the UNet's prediction for {self.source} is not finite: use bf16 or fp32 instead of fp16, or other "
                "weights"
            )

    @contextmanager
    def _refusing_misfits(self) -> Iterator[None]:
        """InputError for what parts that do not go together raise."""
        try:
            yield
        except Exception as error:  # every wrong setting has one of its own
            if is_of_machine(error):
                raise
            raise self._misfit(brief(error)) from error

    def _misfit(self, reason: str) -> InputError:
        return InputError(
            f"{self.source} cannot encode, predict and decode an image ({reason}): its config files do not go with its "
            "weights; download it again"
        )

    @property
    def parts(self) -> list[str]:
        """Subfolders of a pipeline."""
        return ["scheduler", "unet", "vae", *self.text_parts]

    def check_pipeline(self) -> None:
        """Raises InputError unless save_pipeline will find what it reads from the base."""
        models = dict.fromkeys(part for part in self.parts if part != "scheduler")
        try:
            index = self.pipeline_class.load_config(self.source, **self.options)
        except OSError as error:
            raise InputError(f"{self.source}: {brief(error)}; download the model again") from error
        if missing := sorted(set(self.parts) - index.keys()):
            raise InputError(f"model_index.json of {self.source} does not list {missing[0]}: download the model again")
        load_part(self.pipeline_class, self.source, **models, **self._left_out, **self.options)

    @property
    def _left_out(self) -> dict[str, Any]:
        """Options for optional parts of the pipeline that are not saved."""
        if "safety_checker" not in self.pipeline_class._optional_components:
            return {}
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def save_pipeline(self, config: dict, state: dict[str, Tensor], folder: str | Path) -> None:
        """Write a diffusers pipeline with a UNet of this config and state; its other parts are read again, in fp32."""
        unet = UNet2DConditionModel.from_config(config)
        unet.load_state_dict(state)
        parts = {"unet": unet, "vae": self.load(AutoencoderKL, "vae"), **self._left_out}
        load_part(self.pipeline_class, self.source, **parts, **self.options).to(torch.float32).save_pretrained(folder)
        for path in Path(folder).glob("*/*.safetensors"):
            shutil.copymode(Path(folder, "model_index.json"), path)  # safetensors lets nobody else read its files


class StableDiffusion(Family):
    """Stable Diffusion 1.x: the last states of one text encoder."""

    pipeline_class = StableDiffusionPipeline
    text_parts: ClassVar[dict[str, type]] = {"tokenizer": CLIPTokenizer, "text_encoder": CLIPTextModel}
    resolution = 512
    dspo_form = "score"
    optimizer = "adamw"
    gradient_checkpointing = "none"

    @torch.no_grad()
    def encode_texts(self, captions: list[str]) -> Conditioning:
        """{"encoder_hidden_states": (N, L, D)} of N captions, in the encoders' precision."""
        (tokens,) = self.tokenize(captions)
        return {"encoder_hidden_states": self.text_encoders[0](tokens)[0]}


class StableDiffusionXL(Family):
    """Stable Diffusion XL: penultimate states of two text encoders side by side, a pooled embedding and time ids."""

    pipeline_class = StableDiffusionXLPipeline
    text_parts: ClassVar[dict[str, type]] = {
        "tokenizer": CLIPTokenizer,
        "text_encoder": CLIPTextModel,
        "tokenizer_2": CLIPTokenizer,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    resolution = 1024
    dspo_form = "switched"
    optimizer = "adafactor"
    gradient_checkpointing = "full"
    slices_vae = True  # 16 images of 1024 pixels at once would take some 20 GiB in bf16

    def vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """`dtype`, but fp32 where the VAE overflows in fp16, as its config says."""
        return torch.float32 if dtype == torch.float16 and self.vae.config.force_upcast else dtype

    @torch.no_grad()
    def encode_texts(self, captions: list[str]) -> Conditioning:
        """{"encoder_hidden_states": (N, L, D1 + D2), of both encoders side by side, "text_embeds": (N, D2), pooled}."""
        outputs = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip(self.text_encoders, self.tokenize(captions), strict=True)
        ]
        return {
            "encoder_hidden_states": torch.cat([output.hidden_states[-2] for output in outputs], -1),
            "text_embeds": outputs[-1].text_embeds,
        }

    def condition(self, texts: Conditioning, height: int, width: int | None = None) -> Conditioning:
        """Adds "time_ids" (N, 6): original height and width, crop corner, target height and width."""
        conditioning = super().condition(texts, height, width)
        pooled = conditioning["text_embeds"]
        time_ids = pooled.new_full((len(pooled), 6), height)
        time_ids[:, 1] = time_ids[:, 5] = width or height  # on the device: a tensor made from a list would wait for it
        time_ids[:, 2:4] = 0
        return conditioning | {"time_ids": time_ids}

    def predict(self, unet: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's prediction (N, C, h, w) in fp32."""
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        return unet(noisy, timesteps, conditioning["encoder_hidden_states"], added_cond_kwargs=added).sample.float()


FAMILIES: dict[str, type[Family]] = {"sd15": StableDiffusion, "sdxl": StableDiffusionXL}
HUB = "AIDC-AI/Diffusion-SDPO"
RELEASED = {  # short names of the published checkpoints
    f"sdpo-{base}-{method}": f"{HUB}:{base}/{method}/unet.pth"
    for base in ("sd1.5", "sdxl")
    for method in ("diffusion-dpo", "dspo", "dmpo")
}


def load_family(name: str | None, source: str, **options: str | bool | None) -> Family:
    """The family with its frozen parts on the CPU in fp32; source is a hub id or a local diffusers folder.

    With encoders=False it has neither tokenizers nor text encoders, and of the VAE only the config. Raises InputError
    unless the source holds a pipeline of the family `name`, a row of FAMILIES (None takes any of them), whose parts can
    be read and go together.
    """
    held = read_pipeline_class(source, **{key: options.get(key) for key in ("revision", "cache_dir")})
    rows = {family.pipeline_class.__name__: row for row, family in FAMILIES.items()}
    if held not in rows:
        raise InputError(f"{source} holds a {held}; supported are {', '.join(rows)}")
    if name not in (None, rows[held]):
        wanted = FAMILIES[name].pipeline_class.__name__
        raise InputError(
            f"{source} holds a {held}, not a {wanted}: SDXL models need --sdxl, SD1.x models run without it"
        )
    return FAMILIES[rows[held]](source, **options)
