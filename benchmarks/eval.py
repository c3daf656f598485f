"""Speed of the evaluation: generation by batch size, and scoring in one pass: `python benchmarks/eval.py`.

Speeds differ by machine; the ratios, measured side by side in one run, are what to look at. Results go to
benchmarks/results/eval-{device}.json. Models have random weights and reduced size, except for the tiny base.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
import transformers
from diffusers import UNet2DConditionModel
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.environment import environment
from sdpo.families import Family, load_family
from sdpo.files import write_json
from sdpo.sampling import draw_noise, sample
from sdpo.scorers import Aesthetics, ClipScore, Head, HPSv2, HPSv21, PickScore, Scorer, score_rows
from sdpo.tiny import BASE, pictures
from sdpo.tiny.train_base import TOKENS, build_tokenizer

ARCHITECTURE = {  # of open_clip, with the official image size
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def measure(tasks: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Images per second by task, from the median time of `repeats` rounds over all tasks; a task returns its images.

    Tasks take turns, so that a slow spell of the machine meets all of them; a first round warms up.
    """
    images, times = {name: task() for name, task in tasks.items()}, {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - began)
    return {name: images[name] / float(np.median(times[name])) for name in tasks}


def ratios(speeds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Images per second, and how many times that of the first task."""
    first = next(iter(speeds.values()))
    return {name: {"images_per_second": speed, "ratio": speed / first} for name, speed in speeds.items()}


# Generation


def small_unet() -> UNet2DConditionModel:
    """A UNet of about 50 M random parameters for the tiny base's text encoder."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(128, 256, 384), layers_per_block=2, cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def generation_task(family: Family, unet: UNet2DConditionModel, size: int, batch: int, steps: int):
    """Generation of one batch with latents of `size` x `size`."""
    specs = pictures.HELD_OUT
    captions = [specs[i % len(specs)].caption for i in range(batch)]
    noise = draw_noise((4, size, size), range(batch), family.device, torch.float32)
    return lambda: len(sample(family, unet, captions, noise, steps, 7.5))


def generation(device: str, batches: list[int], repeats: int) -> dict:
    """Speeds by pipeline and batch size, as ratios to batch 1."""
    family = load_family(None, str(BASE)).to(torch.device(device), torch.float32)
    unets = {"tiny": (family.load_unet(), 8, 20), "small": (small_unet(), 16, 2)}  # UNet, latent side, steps
    results = {}
    for name, (unet, size, steps) in unets.items():
        unet.to(device).eval()
        tasks = {str(batch): generation_task(family, unet, size, batch, steps) for batch in batches}
        about = {"parameters": sum(p.numel() for p in unet.parameters()), "latent_side": size, "steps": steps}
        results[name] = {**about, "batch": ratios(measure(tasks, repeats))}
    return results


# Scoring


def build_scorers(folder: Path) -> dict[str, Scorer]:
    """Five scorers with random weights at reduced width; the two kinds of preprocessing are the official ones."""
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**ARCHITECTURE).state_dict(), folder / "clip.pt")
    torch.save(Head(32).state_dict(), folder / "head.pth")
    tokenizer = build_tokenizer()
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 256}
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = tower | {"image_size": 224, "patch_size": 32}
    config = transformers.CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=32)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.CLIPImageProcessorPil(size=224, crop_size=224).save_pretrained(folder)
    checkpoint, model = {"checkpoint": str(folder / "clip.pt")}, str(folder)
    return {
        "pickscore": PickScore({"model": model, "processor": model}),
        "hpsv2": HPSv2(checkpoint, architecture=ARCHITECTURE),
        "hpsv21": HPSv21(checkpoint, architecture=ARCHITECTURE),
        "aesthetics": Aesthetics({"model": model, "head": str(folder / "head.pth")}, head_sha256=None),
        "clip": ClipScore(checkpoint, architecture=ARCHITECTURE),
    }


def scoring(device: str, images: int, repeats: int) -> dict:
    """Speed of five scorers on images of 512 pixels in one pass, as a ratio to five passes."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), []
        for i in range(images):
            smooth = Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).resize((512, 512))
            smooth.save(folder / f"{i}.png")
            rows.append((folder / f"{i}.png", pictures.HELD_OUT[i % len(pictures.HELD_OUT)].caption))
        scorers = build_scorers(folder)

        def run(*groups: dict[str, Scorer]) -> int:
            for group in groups:
                list(score_rows(rows, group, device=device, batch_size=16))
            return images

        separate = [{metric: scorer} for metric, scorer in scorers.items()]
        speeds = measure({"separate passes": lambda: run(*separate), "one pass": lambda: run(scorers)}, repeats)
    return {"images": images, "scorers": list(scorers), "passes": ratios(speeds)}


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """A line per task: speed and ratio."""
    print(title)
    for name, row in rows.items():
        print(f"  {name:>16}  {row['images_per_second']:8.2f} images/s  x {row['ratio']:.2f}")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="batch sizes; the first is 1 x")
    parser.add_argument("--images", type=int, default=64, help="images to score")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    results = environment(args.device, "diffusers", "transformers", "open_clip_torch")
    results["generation"] = generation(args.device, args.batches, args.repeats)
    for name, result in results["generation"].items():
        show(f"generation, {name} ({result['parameters'] / 1e6:.1f} M parameters), by batch size", result["batch"])
    results["scoring"] = scoring(args.device, args.images, args.repeats)
    show(f"scoring, {len(results['scoring']['scorers'])} metrics", results["scoring"]["passes"])
    path = args.out / f"eval-{args.device.replace(':', '-')}.json"
    write_json(path, results)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
