"""The base models that benchmarks measure: public architectures with random weights, nothing downloaded.

Configurations are those published with stable-diffusion-v1-5/stable-diffusion-v1-5,
stabilityai/stable-diffusion-xl-base-1.0 and madebyollin/sdxl-vae-fp16-fix; what equals the default of its class is
left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedModel

from sdpo.config import TrainConfig
from sdpo.families import FAMILIES, Family, load_family
from sdpo.tiny import BASE

TOKENS = 77  # per caption, padded

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
SD15 = {
    "scheduler": SCHEDULER,
    "text_encoder": CLIP_L,
    "vae": VAE | {"sample_size": 512, "scaling_factor": 0.18215},
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
}
SDXL = {
    "scheduler": SCHEDULER,
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_BIG_G,
    "vae": VAE | {"sample_size": 512, "scaling_factor": 0.13025, "force_upcast": False},
    "unet": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
SMALL = {  # a UNet of 49.5 M parameters, widths 0.2 to 0.3 of SD1.5's, and a VAE of a quarter of its widths
    "scheduler": SCHEDULER,
    "text_encoder": CLIP_L | {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3},
    "vae": VAE | {"block_out_channels": (32, 64, 128, 128), "scaling_factor": 0.18215},
    "unet": {"sample_size": 32, "block_out_channels": (96, 192, 288, 288), "cross_attention_dim": 192},
}


CHANGES = (  # contestants that differ from the default in one thing
    "cached latents", "CUDA graphs", "averaged weights", "full checkpointing", "known reference", "channels last",
    "fused attention", "unfused attention", "reference in fp32", "figures fetched", "unfused AdamW", "Adafactor",
    "AdamW in 8 bits",
)  # fmt: skip


AGAINST_BASELINE = ("baseline", "fast, compiled", "fast", "default", "fast, known reference")
SD15_LACKS = ("Adafactor", "AdamW in 8 bits", "unfused attention")  # for lack of time in gpu.sh, the last of memory


@dataclass(frozen=True)
class Base:
    """A base model and the official settings of its training."""

    parts: dict[str, dict] | None  # configuration of every part; None: the embedded tiny base
    flags: dict[str, Any]
    stored: int  # side of the images on file, pixels
    against_baseline: tuple[str, ...] = AGAINST_BASELINE
    changes: tuple[str, ...] = CHANGES
    share: float = 1.0  # of the time, beside others'

    def config(self, **flags: Any) -> TrainConfig:
        """The settings of a run, with some of its flags set otherwise."""
        return TrainConfig(**(OFFICIAL | self.flags | flags))

    def build(self, device: str | torch.device) -> Family:
        """The family; random parts are made on `device`: "meta" gives shapes without memory."""
        name = self.config().base["name"]
        if self.parts is None:
            family = load_family(name, str(BASE))
        else:
            family = random_family(FAMILIES[name], self.parts, device)
        family.mend = list  # captions here are plain, and ftfy may not be there
        return family


def random_family(family: type[Family], parts: dict[str, dict], device: str | torch.device) -> Family:
    """A family whose parts are made on `device`, with random weights in fp32, instead of read from a folder."""

    class RandomFamily(family):
        def load(self, cls: type, name: str):
            if cls is CLIPTokenizer:  # the tiny base's vocabulary, at the official length
                return CLIPTokenizer.from_pretrained(BASE / "tokenizer", model_max_length=TOKENS)
            if issubclass(cls, SchedulerMixin):  # whose numbers are looked at
                return cls.from_config(parts[name])
            with torch.device(device):
                if issubclass(cls, PreTrainedModel):
                    return cls(CLIPTextConfig(**parts[name]))
                return cls.from_config(parts[name])

        def _check_tokenizers(self) -> None:
            """The vocabulary is smaller than the encoder's, which does not change what encoding costs."""

    return RandomFamily("random weights")


OFFICIAL = {
    "pretrained_model_name_or_path": "random weights",
    "train_data_dir": "random pairs",
    "mixed_precision": "no",
    "allow_tf32": True,
    "use_winner_preserving": True,
    "winner_preserving_mu": 0.9,
}


def batch_of(pairs: int, resolution: int, accumulation: int) -> dict[str, int]:
    """Flags of the size of an update; 32 micro-steps are official: the fewer, the more the optimizer weighs."""
    return {"train_batch_size": pairs, "resolution": resolution, "gradient_accumulation_steps": accumulation}


BASES = {
    "tiny": Base(None, batch_of(16, 32, accumulation=1), stored=32),
    "small": Base(SMALL, batch_of(4, 128, accumulation=1), stored=128),
    "sd15": Base(
        SD15,
        batch_of(8, 512, accumulation=8),
        stored=768,
        changes=tuple(name for name in CHANGES if name not in SD15_LACKS),
        share=1.25,
    ),
    "sdxl": Base(
        SDXL,
        batch_of(8, 1024, accumulation=4) | {"sdxl": True, "winner_preserving_mu": 0.6},
        stored=1024,
        against_baseline=("baseline", "fast, compiled"),  # turns take up to half a minute
        changes=(),
    ),
}
