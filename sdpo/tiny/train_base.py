"""Train the tiny base model that is committed under sdpo/tiny/base: `python -m sdpo.tiny.train_base --out DIR`.

A Stable Diffusion 1.5 pipeline in miniature: AutoencoderKL with 4 x 8 x 8 latents, a 2-layer CLIP text encoder with its
own vocabulary and a UNet2DConditionModel, trained from scratch on the pictures of sdpo.tiny.pictures (the held-out
captions excepted). A share of the training pictures breaks its caption, so that the base knows good and bad pictures,
as real base models do.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdpo.command import InputError, Parser, run_command, show
from sdpo.files import can_be_written, write_json
from sdpo.tiny import BASE, pictures

TOKENS = 16  # length of a tokenised caption
GUIDANCE = 3.0  # standard convention, used to measure the base


def draw_batch(size: int, rng: np.random.Generator, faulty: float) -> tuple[torch.Tensor, list[str]]:
    """Pictures (size, 3, 32, 32) in [-1, 1] and their captions; a share `faulty` of the pictures breaks its caption."""
    specs = [pictures.TRAINED[i] for i in rng.integers(len(pictures.TRAINED), size=size)]
    images = []
    for spec in specs:
        centre = pictures.draw_centre(spec, rng)
        images.append(
            pictures.render_fault(spec, centre, rng) if rng.random() < faulty else pictures.render(spec, centre)
        )
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, [spec.caption for spec in specs]


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges make one token of every word that captions use."""
    words = sorted({word for spec in pictures.SPECS for word in spec.caption.split()})
    letters = [chr(c) for c in range(33, 127)]
    merges, vocabulary = [], letters + [letter + "</w>" for letter in letters]
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
                vocabulary.append("".join(pair))
            pieces[:2] = ["".join(pair)]
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def build_pipeline() -> StableDiffusionPipeline:
    """The tiny pipeline with random weights."""
    tokenizer = build_tokenizer()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=64, max_position_embeddings=TOKENS, bos_token_id=start, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4,
        sample_size=pictures.SIDE, mid_block_add_attention=False,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(40, 72), layers_per_block=1, cross_attention_dim=64, attention_head_dim=4,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def train_vae(vae: AutoencoderKL, steps: int, batch: int, rng: np.random.Generator) -> None:
    """Fit the autoencoder (absolute error, small KL), then set its scaling factor to 1 / std of the latents."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    progress = tqdm(range(steps), desc="vae", mininterval=10)
    for _ in progress:
        pixels, _captions = draw_batch(batch, rng, faulty=0.3)
        posterior = vae.encode(pixels).latent_dist
        output = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(output, pixels) + F.mse_loss(output, pixels) + 1e-4 * posterior.kl().mean() / 256
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    with torch.no_grad():
        latents = vae.encode(draw_batch(512, rng, faulty=0.1)[0]).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))


def train_denoiser(
    pipeline: StableDiffusionPipeline, steps: int, batch: int, faulty: float, rng: np.random.Generator
) -> None:
    """Fit text encoder and UNet to the noise-prediction loss, 10 % empty captions; their averaged weights are kept."""
    parameters = [*pipeline.text_encoder.parameters(), *pipeline.unet.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.03)
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    progress = tqdm(range(steps), desc="unet", mininterval=10)
    running = 0.0
    for step in progress:
        pixels, captions = draw_batch(batch, rng, faulty)
        captions = ["" if rng.random() < 0.1 else caption for caption in captions]
        tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (batch,))
        noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
        loss = F.mse_loss(pipeline.unet(noisy, timesteps, pipeline.text_encoder(tokens)[0]).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        running += (loss.item() - running) / min(step + 1, 200)
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
    average.copy_to(parameters)


def measure(pipeline: StableDiffusionPipeline, pictures_per_caption: int = 16) -> dict[str, float]:
    """Share of samples for held-out captions that pass each check, and all (20 Euler steps, guidance 3, seed 0)."""
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    specs = [spec for spec in pictures.HELD_OUT for _ in range(pictures_per_caption)]
    samples = pipeline(
        [spec.caption for spec in specs], num_inference_steps=20, guidance_scale=GUIDANCE,
        height=pictures.SIDE, width=pictures.SIDE, generator=torch.Generator().manual_seed(0), output_type="np",
    ).images  # fmt: skip
    passed = [
        pictures.check((sample * 255).round().astype(np.uint8), spec)
        for sample, spec in zip(samples, specs, strict=True)
    ]
    shares = {name: float(np.mean([checks[name] for checks in passed])) for name in pictures.CHECKS}
    return {**shares, "all": float(np.mean([all(checks.values()) for checks in passed])), "samples": len(specs)}


def main(arguments: list[str] | None = None) -> None:
    """Train both stages from seed 0, save the pipeline in fp16 and its measured shares beside it."""
    parser = Parser("python -m sdpo.tiny.train_base", __doc__)
    parser.add_argument("--out", default=str(BASE))
    parser.add_argument("--vae_steps", type=int, default=3000)
    parser.add_argument("--unet_steps", type=int, default=11000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--faulty", type=float, default=0.15, help="share of training pictures that break their caption"
    )
    args = parser.parse_args(arguments)
    if min(args.vae_steps, args.unet_steps, args.batch) < 1:
        raise InputError("--vae_steps, --unet_steps and --batch must be at least 1")
    if not 0 <= args.faulty <= 1:
        raise InputError(f"--faulty must lie in [0, 1], got {args.faulty}")
    if not args.out or not can_be_written(args.out):
        raise InputError(f"--out {args.out!r} is empty or cannot be written: name a folder")
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    pipeline = build_pipeline()
    train_vae(pipeline.vae, args.vae_steps, args.batch, rng)
    train_denoiser(pipeline, args.unet_steps, args.batch, args.faulty, rng)
    scheduler = pipeline.scheduler
    figures = measure(pipeline.to(torch.float16).to(torch.float32))  # what the stored weights can do
    pipeline.scheduler = scheduler
    pipeline.to(torch.float16).save_pretrained(args.out)
    write_json(Path(args.out, "measured.json"), settings | figures)
    show(json.dumps(figures, indent=2))


if __name__ == "__main__":
    run_command(main)
