"""Images of prompt groups from a UNet, with their manifests: batched, dealt out to ranks, resumable.

Image i of a group depends on prompt, settings and weights, and on its batch by rounding only, so it may be made in any
batch, order or process. What exists is not made again; fingerprint.json beside the images says what they were made with
and keeps others out.
"""

from __future__ import annotations

import glob
import hashlib
import inspect
import json
import logging
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import ConfigMixin, UNet2DConditionModel
from PIL import ExifTags, Image
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTokenizer, PreTrainedModel

from sdpo.command import InputError, Natural, Size, check_limits, flag, parse_assignments, refuse, within_memory
from sdpo.families import MENDED, RELEASED, Family, load_family
from sdpo.files import brief, is_text, write_file, write_json
from sdpo.hub import DTYPES, WEIGHT_SUFFIXES, fetch, find_weights
from sdpo.images import open_image, refuse_errors_of_the_machine, verify
from sdpo.manifest import MADE_WITH, METRICS, OFFICIAL_METRICS, write_manifest
from sdpo.prompts import GROUPS, OFFICIAL, Prompt, read_prompts
from sdpo.ranks import on_main, together
from sdpo.sampling import draw_noise, sample

CPU_PIXELS = 128 * 128  # batch on a CPU: larger ones only pay for tiny images
GPU_SHARE, GPU_IMAGES = 0.8, 32  # batch on a GPU: share of its free memory, and what is enough to keep it busy
FINGERPRINT = "fingerprint.json"
NAMES = {"base": "the base (VAE, text encoders, tokenizers, settings)"}  # of what a fingerprint says, for people
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalConfig:
    """Flags of eval_generate.py. Names and defaults of the official implementation are kept where they exist."""

    # Model
    unet_path: str = flag(
        "",
        "what to evaluate: unet.pth, .safetensors, a diffusers folder, an output folder of train.py, a hub id, "
        f"owner/repository:file on the hub, {', '.join(RELEASED)}, or base for the base model itself",
    )
    pretrain_path: str = flag("", "base model: a hub id or a local diffusers folder")
    vae_path: str | None = flag(None, "another VAE: a hub id or a local folder")
    revision: str | None = flag(None, "revision of the base model on the hub")
    cache_dir: str | None = flag(
        None, "where base models and UNets from the hub are kept; scorers are where HF_HOME says"
    )

    # Prompts
    groups: list[str] = field(
        default_factory=list,
        metadata={"help": f"of {', '.join(GROUPS)}; {', '.join(OFFICIAL)} by default unless --test_json is given"},
    )
    test_json: list[str] = field(
        default_factory=list,
        metadata={"help": "JSON, JSONL or TXT files with prompts, each a group of its own", "action": "extend"},
    )

    # Sampling
    resolution: Size | None = flag(None, "side of the square images in pixels; the base model's own by default")
    height: Size | None = flag(None, "height of the images in pixels, in place of --resolution")
    width: Size | None = flag(None, "width of the images in pixels, in place of --resolution")
    steps: Size = flag(50, "Euler steps")
    cfg: float = flag(7.5, "guidance scale")
    guidance: Literal["official", "standard"] = flag(
        "official",
        "official: cond + cfg (cond - uncond); standard: uncond + cfg (cond - uncond). 7.5 official is 8.5 standard",
    )
    seed: Natural = flag(0, "seed of the noise")
    noise: Literal["shared", "per-prompt"] = flag(
        "shared", "every prompt starts from the noise of the seed (official), or prompt i from that of seed + i"
    )
    dtype: Literal["bf16", "fp32", "fp16"] = flag("bf16", "of UNet, text encoders and noise; the VAE decodes in fp32")
    latents_dtype: Literal["bf16", "fp32", "fp16"] | None = flag(
        None, "of latents and guidance between UNet calls; that of --dtype by default (official), fp32 is more exact"
    )
    batch_size: Size | None = flag(
        None,
        "images at a time and process; by default as many as fit 0.8 of the GPU's free memory, 32 at most, or on a "
        "CPU as many as fill 128 x 128 pixels",
    )

    # Scores
    metrics: list[str] = field(
        default_factory=lambda: list(OFFICIAL_METRICS),
        metadata={"help": f"of {', '.join(METRICS)}, computed after the images; none makes images only"},
    )
    weights: list[str] = field(
        default_factory=list,
        metadata={
            "help": "METRIC.PART=SOURCE: a local path or hub file in place of the official one",
            "action": "extend",
        },
    )
    score_dtype: Literal["fp32", "bf16"] | None = flag(
        None, "of the scorers' backbones, fp32 by default; bf16 is faster on a GPU and moves scores by up to about 2e-3"
    )
    score_batch_size: Size = flag(64, "images per step of a scorer")

    # Output
    output_path: str | None = flag(
        None, "folder of image folders and manifests; that of --unet_path, output/eval/NAME for a hub reference"
    )
    zip: bool = flag(False, "also pack the images of each group into a zip file")

    def __post_init__(self):
        check_limits(self)
        refuse(self._conflicts())

    def _conflicts(self) -> Iterator[tuple[object, str]]:
        """Pairs (is wrong, what to do about it)."""
        yield not self.unet_path, "--unet_path is missing: give a unet.pth, or base for the base model itself"
        yield self.output_path == "", "--output_path is empty: name a folder or leave the flag out"
        yield "" in self.test_json, "--test_json is empty: name a file with prompts or leave the flag out"
        if not self.pretrain_path:
            base, _ = trained_from(find_weights(self.unet_path)) or ("", "")
            known = f"; {self.unet_path} was trained from {base}" if base else ""
            yield True, f"--pretrain_path is missing: give the base model, a hub id or a diffusers folder{known}"
        for group in self.groups:
            yield group not in GROUPS, f"--groups {group}: known are {', '.join(GROUPS)}; give files with --test_json"
        names = [*self.groups, *(Path(path).stem for path in self.test_json)]
        yield len(set(names)) < len(names), f"groups must have different names, got {', '.join(names)}: rename a file"
        for name in names:
            wrong = not is_text(name) or len(name.encode()) > 180  # of 255 bytes that names of files may have
            yield wrong, f"--test_json: {name!r} cannot be part of a folder's name: use up to 180 bytes of UTF-8"
        for metric in self.metrics:
            yield metric not in (*METRICS, "none"), f"--metrics {metric}: known are {', '.join(METRICS)}, or none"
        yield "none" in self.metrics and len(self.metrics) > 1, "--metrics none goes with no other: drop one of them"
        yield not math.isfinite(self.cfg), f"--cfg must be a number, got {self.cfg}"

    @property
    def sources(self) -> dict[str, str]:
        """Replaced parts of scorers, as load_scorers takes them; raises InputError for a text without '='."""
        return parse_assignments(self.weights, "--weights")

    @property
    def score_metrics(self) -> list[str]:
        """The metrics to score by; empty where only images are wanted."""
        return [] if "none" in self.metrics else list(dict.fromkeys(self.metrics))

    def load_prompts(self) -> dict[str, list[Prompt]]:
        """Prompts by group name, official groups fetched if need be; raises InputError."""
        groups = self.groups or ([] if self.test_json else list(OFFICIAL))
        return {name: GROUPS[name]() for name in groups} | {Path(p).stem: read_prompts(p) for p in self.test_json}


# The model


def locate_unet(config: EvalConfig) -> tuple[str, Path]:
    """(file, folder or hub id of the UNet, empty for the base's own; folder the results belong in).

    Raises InputError where a file is missing or cannot be fetched.
    """
    reference = RELEASED.get(config.unet_path, config.unet_path)
    path = Path(reference)
    hub_folder = Path("output/eval")
    if config.unet_path in (*RELEASED, "base") and Path(config.unet_path, "unet.pth").is_file():
        raise InputError(
            f"--unet_path {config.unet_path} names a published model, and a folder of that name holds a run: "
            f"write ./{config.unet_path} for that, or rename it"
        )
    if reference == "base":
        return "", hub_folder / f"base-{Path(config.pretrain_path).name}"
    if path.is_dir():
        if (path / "metrics.jsonl").is_file() and not (path / "unet.pth").is_file():
            raise InputError(f"training in {path} has not ended: name one of its checkpoint-N folders, or let it end")
        return find_weights(str(path)), results_folder(path)
    if path.is_file():
        return reference, results_folder(path.parent, path.name)
    repository, _, name = reference.partition(":")
    if repository.count("/") != 1 or repository.endswith(WEIGHT_SUFFIXES):
        raise InputError(f"--unet_path {reference} is neither a file nor a folder, nor base or one of {list(RELEASED)}")
    folder = hub_folder / "--".join([*repository.split("/"), *name.split("/")[:-1]])
    return str(fetch(repository, name, cache_dir=config.cache_dir)) if name else reference, folder


def trained_from(unet: str) -> tuple[str, str] | None:
    """(base, VAE or "" for the base's own) of the run of train.py that left a UNet's file; None if it is not known."""
    folder = Path(unet).parent
    if (folder / "files.json").is_file():  # a checkpoint
        folder = folder.resolve().parent
    try:
        trained = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        return tuple(str(trained.get(f"pretrained_{name}model_name_or_path") or "") for name in ("", "vae_"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # not a run's, or no file
        return None


def caution_other_parts(unet: str, config: EvalConfig) -> None:
    """Warn where the run of train.py that left a UNet's file had another base or VAE than images are made with."""
    base, vae = trained_from(unet) or ("", config.vae_path or "")
    if base and os.path.realpath(base) != os.path.realpath(config.pretrain_path):
        log.warning(
            f"CAUTION: {unet} was trained from {base}, images are made with the other parts of {config.pretrain_path}: "
            "see --pretrain_path"
        )
    if os.path.realpath(vae) != os.path.realpath(config.vae_path or ""):
        own, other = (f"VAE {place}" if place else "the VAE of its base" for place in (config.vae_path, vae))
        log.warning(f"CAUTION: {unet} was trained with {other}, images are made with {own}: see --vae_path")


def results_folder(folder: Path, name: str = "unet.pth") -> Path:
    """Where the images of the UNet file `name` in a folder go: into it, those of averaged weights into eval-ema there.

    A checkpoint may be removed by training, so they go beside it.
    """
    if (folder / "files.json").is_file():
        named = Path(os.path.abspath(folder)) if folder.name in ("", "..") else folder
        folder = named.with_name(f"eval-{named.name}")
    return folder / "eval-ema" if name == "unet_ema.pth" else folder


def hash_weights(models: Iterable[nn.Module]) -> str:
    """The sha256 over names and fp32 values of all parameters and buffers, whatever file they came from."""
    digest = hashlib.sha256()
    for model in models:
        for name, value in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.float().cpu().flatten().numpy())
    return digest.hexdigest()


@dataclass
class EvalRun:
    """A model ready to sample, and where its images go."""

    config: EvalConfig
    accelerator: Accelerator
    family: Family
    unet: UNet2DConditionModel
    output: Path
    height: int  # pixels
    width: int
    made_with: dict[str, object]  # what determines every image, prompts excepted
    batch_size: int = 1
    prompts: dict[str, list[Prompt]] = field(default_factory=dict)  # by group
    missing: dict[str, list[int]] = field(default_factory=dict)  # indices of the images to make, by group

    @property
    def size(self) -> str:
        """Height and width of the images as the official file names have them."""
        return f"{self.height}x{self.width}"

    def folder(self, group: str) -> Path:
        """The folder of a group's images; its name is the official one."""
        config = self.config
        return self.output / f"{group}_seed{config.seed}_{self.size}_{config.steps}s_{config.cfg}cfg"

    def image(self, group: str, index: int) -> Path:
        """The file of one image."""
        return self.folder(group) / f"{index}_{self.size}.png"

    def beside(self, group: str, suffix: str) -> Path:
        """The manifest (.json) or zip file of a group, beside the folder of its images."""
        folder = self.folder(group)
        return folder.with_name(folder.name + suffix)

    def seed(self, index: int) -> int:
        """The seed of one image's noise."""
        return self.config.seed + (index if self.config.noise == "per-prompt" else 0)


def choose_size(config: EvalConfig, family: Family, unet: UNet2DConditionModel) -> tuple[int, int]:
    """Height and width of the images in pixels; raises InputError unless their latents have the official size."""
    factor = family.image_size(1)
    height, width = (side or config.resolution or family.own_size(unet) for side in (config.height, config.width))
    if not (height and width):
        raise InputError(f"{config.pretrain_path} does not say how large its images are: give --resolution")
    for side in (height, width):
        if side % (2 * factor):  # else 2 * ceil(side / (2 * factor)), the official size of latents, is side / factor
            raise InputError(f"--resolution, --height and --width must be multiples of {2 * factor}, got {side}")
    return height, width


def own_settings(part: ConfigMixin | PreTrainedModel) -> dict[str, Any]:
    """Settings of a part that are not the defaults of its class, which a library may write out or leave out."""
    if isinstance(part, PreTrainedModel):
        settings = part.config.to_diff_dict()
        other = ("transformers_version", "dtype", "architectures")
        return {name: value for name, value in settings.items() if name not in other and not name.startswith("_")}
    parameters = inspect.signature(type(part).__init__).parameters
    return {
        name: value
        for name, value in part.config.items()
        if name in parameters and json.dumps(value) != json.dumps(parameters[name].default)  # tuples are lists in JSON
    }


def own_rules(tokenizer: CLIPTokenizer) -> list[Any]:
    """All that decides which tokens a text becomes."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: value for name, value in rules.items() if name not in ("version", "truncation", "padding")}
    return [
        MENDED,
        rules,
        tokenizer.model_max_length,
        tokenizer.pad_token_id,
        tokenizer.padding_side,
        tokenizer.truncation_side,
    ]


def describe_images(config: EvalConfig, family: Family, unet: nn.Module, device: torch.device) -> dict[str, object]:
    """Everything but prompts and size that determines the images; weights by their sha256."""
    parts = [own_settings(part) for part in (family.sampler(), family.vae, *family.text_encoders, unet)]
    parts += [own_rules(tokenizer) for tokenizer in family.tokenizers]
    base = hash_weights([family.vae, *family.text_encoders]) + json.dumps(parts, sort_keys=True, default=str)
    settings = {name: getattr(config, name) for name in ("steps", "cfg", "guidance", "seed", "noise", "dtype")}
    return {
        "checkpoint": hash_weights([unet]),
        "base": hashlib.sha256(base.encode()).hexdigest(),
        **settings,
        "latents_dtype": config.latents_dtype or config.dtype,
        "device": device.type,  # a seed means other noise on another kind
    }


def load_run(config: EvalConfig, accelerator: Accelerator) -> EvalRun:
    """Models on the device in their dtypes, weights hashed, batch size chosen; raises InputError."""
    device = accelerator.device
    dtype = DTYPES[config.dtype]
    source, folder = locate_unet(config)
    options = {"vae": config.vae_path or None, "revision": config.revision, "cache_dir": config.cache_dir}
    family = load_family(None, config.pretrain_path, **options)
    unet = family.load_unet(source).requires_grad_(False).eval()
    if source:
        caution_other_parts(source, config)
    family.check_sampler(config.steps, "lower --steps")
    height, width = choose_size(config, family, unet)
    made_with = describe_images(config, family, unet, device) | {"height": height, "width": width}
    with within_memory("use --dtype bf16, or a GPU with more memory"):
        family.to(device, torch.float32)  # the VAE stays so
        for model in (unet, *family.text_encoders):
            model.to(device, dtype)
        family.try_out(unet)
    run = EvalRun(config, accelerator, family, unet, Path(config.output_path or folder), height, width, made_with)
    run.batch_size = config.batch_size or choose_batch_size(run)
    return run


# The images


def sample_images(run: EvalRun, captions: list[str], seeds: list[int], steps: int) -> np.ndarray:
    """Images (N, H, W, 3) uint8 of captions, each from the noise of its seed.

    Raises InputError where memory runs out or numbers overflow.
    """
    config, family = run.config, run.family
    shape = family.latent_shape(run.height, run.width)
    fix = "run again with a smaller --batch_size or smaller images"
    try:
        with within_memory(f"{len(captions)} images of {run.size} at a time; what was made is kept, {fix}"):
            noise = draw_noise(shape, seeds, run.accelerator.device, DTYPES[config.dtype])
            noise = noise.to(DTYPES[config.latents_dtype or config.dtype])
            return sample(family, run.unet, captions, noise, steps, config.cfg, config.guidance)
    except FloatingPointError as error:
        raise InputError(
            f"{error}: use --dtype bf16 or fp32 instead of fp16, a smaller --cfg, or other weights; what was made is "
            "kept"
        ) from error


def choose_batch_size(run: EvalRun) -> int:
    """Images that fit: on a GPU by the memory that a trial image of one step takes, on a CPU by pixels."""
    device = run.accelerator.device
    if device.type != "cuda":
        return max(1, CPU_PIXELS // (run.height * run.width))
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    sample_images(run, [""], [0], steps=1)
    per_image = torch.cuda.max_memory_allocated(device) - before  # on the safe side: images are decoded one at a time
    torch.cuda.empty_cache()
    free, _total = torch.cuda.mem_get_info(device)
    return min(GPU_IMAGES, max(1, int(GPU_SHARE * free / per_image)))


def save_image(path: Path, image: np.ndarray, prompt: str) -> None:
    """Write pixels (H, W, 3) uint8 as PNG, whole or not at all; EXIF ImageDescription is the prompt in UTF-8."""
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = prompt.encode()
    write_file(path, lambda partial: Image.fromarray(image).save(partial, format="PNG", exif=exif))


def find_damage(path: Path, height: int, width: int, prompt: str) -> str:
    """What is wrong with an existing PNG, by its size, checksums and the prompt that it names; empty if nothing is."""
    try:
        kind, mode, size = verify(path)
        with open_image(path) as image:
            named = image.getexif().get(ExifTags.Base.ImageDescription)
    except Exception as error:  # a broken file may raise anything
        refuse_errors_of_the_machine(error, str(path))
        return brief(error)
    if (kind, mode) != ("PNG", "RGB"):
        return f"{kind} of mode {mode}"
    if named is not None and named != prompt.encode().decode("latin-1"):  # as Pillow reads what save_image wrote
        return "an image of another prompt"
    return "" if size == (width, height) else f"{size[0]} x {size[1]} pixels"


def settings_of(run: EvalRun, group: str) -> dict[str, object]:
    """What determines the images of a group."""
    texts = json.dumps([prompt.text for prompt in run.prompts[group]])
    return {**run.made_with, "prompts": hashlib.sha256(texts.encode()).hexdigest()}


def claim_folder(run: EvalRun, group: str) -> None:
    """Write the fingerprint of a group's folder; raises InputError, as check_folder, where another command was first.

    A manifest whose images are no longer there is renamed.
    """
    folder, manifest = run.folder(group), run.beside(group, ".json")
    path = folder / FINGERPRINT
    if not path.exists():
        if manifest.exists():
            kept = manifest.with_name(f"{manifest.name}.old")
            manifest.replace(kept)
            log.warning(f"CAUTION: {manifest} is of images that are no longer in {folder}, and is now {kept.name}")
        about = {"unet_path": run.config.unet_path, "pretrain_path": run.config.pretrain_path}
        about |= {"torch": torch.__version__, "diffusers": diffusers.__version__}
        write_json(path, {"settings": settings_of(run, group), "about": about}, replace=False)
    check_folder(run, group)


def check_folder(run: EvalRun, group: str) -> None:
    """Raises InputError if there are images of a group that were made with other settings, or as nobody knows."""
    folder = run.folder(group)
    path = folder / FINGERPRINT
    settings = settings_of(run, group)
    other = "choose another --output_path"
    fix = f"{other}, or remove the folder"
    if not path.exists():
        manifest, packed = (run.beside(group, ending) for ending in (".json", ".zip"))
        if any(folder.glob("*.png")):
            if manifest.exists():
                fix += f"; `python -m sdpo.scoring {manifest}` scores them as they are"
            raise InputError(f"{folder} holds images but no {FINGERPRINT} that says what made them: {fix}")
        if packed.exists():
            raise InputError(f"{packed} holds images of an earlier run: {other}, or move it away")
        return
    then = read_settings(path)
    if then is None:
        raise InputError(f"{path} does not say what made the images in its folder: {fix}")
    differ = "; ".join(
        f"{NAMES.get(name, name)} was {str(then.get(name))[:12]}, is {str(settings.get(name))[:12]}"
        for name in sorted(then.keys() | settings.keys())
        if then.get(name) != settings.get(name)
    )
    if differ and any(folder.glob("*.png")):
        raise InputError(f"{folder} holds images made with other settings ({differ}): {fix}")
    if differ:
        raise InputError(
            f"{folder} is kept for images of other settings ({differ}), but has none: remove it, unless another "
            f"command is about to make them, or {other}"
        )


def read_settings(fingerprint: Path) -> dict[str, object] | None:
    """What the images of a folder were made with, None if its fingerprint does not say."""
    try:
        return dict(json.loads(fingerprint.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def find_groups(run: EvalRun) -> dict[str, Path]:
    """Manifests in the output folder by group, of this command and of others with the same weights and settings."""
    ending = run.beside("", ".json").name
    found = {}
    for path in sorted(run.output.glob(f"*{glob.escape(ending)}")):
        group = path.name.removesuffix(ending)
        settings = read_settings(run.folder(group) / FINGERPRINT) or {}
        if all(settings.get(name) == value for name, value in run.made_with.items()):
            found[group] = path
    return found


def find_missing(run: EvalRun, group: str) -> list[int]:
    """Indices to make, the same on every rank: images that do not exist, and damaged ones, which are named."""
    count = len(run.prompts[group])
    rank = run.accelerator.process_index
    ranks = run.accelerator.num_processes
    there = [index for index in range(rank, count, ranks) if run.image(group, index).exists()]

    def look(index: int) -> tuple[int, str]:
        return index, find_damage(run.image(group, index), run.height, run.width, run.prompts[group][index].text)

    damage = dict(sorted(gather_object(together(lambda: list(map(look, there))))))  # of those there; "" where sound
    for index, what in damage.items():
        if what:
            log.warning(f"CAUTION: {run.image(group, index)} is damaged ({what}) and will be made again")
    return [index for index in range(count) if damage.get(index, "missing")]


def make_images(run: EvalRun, group: str) -> None:
    """Sample and write this rank's share of the missing images, with a progress bar on the main one."""
    accelerator = run.accelerator
    size = run.batch_size
    prompts = run.prompts[group]
    share = run.missing[group][accelerator.process_index :: accelerator.num_processes]
    hidden = not accelerator.is_main_process or not share
    label = group if accelerator.num_processes == 1 else f"{group}, process 1 of {accelerator.num_processes}"
    with tqdm(total=len(share), desc=label, unit="image", disable=hidden) as bar, ThreadPoolExecutor() as pool:
        writes: Iterable[None] = ()
        for batch in (share[start : start + size] for start in range(0, len(share), size)):
            captions, seeds = [prompts[i].text for i in batch], [run.seed(i) for i in batch]
            images = sample_images(run, captions, seeds, run.config.steps)
            list(writes)  # waits for those of the batch before; a full disk stops the run
            writes = pool.map(save_image, [run.image(group, i) for i in batch], images, captions)
            bar.update(len(batch))
        list(writes)


def write_results(run: EvalRun, group: str) -> None:
    """Write the manifest, image paths as --output_path spells them, and the zip file; InputError if any is missing."""
    prompts = run.prompts[group]
    images = [run.image(group, index) for index in range(len(prompts))]
    if missing := [path for path in images if not path.is_file()]:
        raise InputError(
            f"{len(missing)} of {len(images)} images of {group} are not there, the first {missing[0]}: run again, on "
            "several machines with an --output_path on a disk that they share"
        )
    about = {name: run.made_with[name] for name in (*MADE_WITH, "checkpoint") if name != "seed"}
    entries = [
        {
            "prompt": prompt.text,
            "gen_image_path": str(path),
            "raw_image_path": prompt.raw_image_path,
            "metadata": prompt.metadata,
            "seed": run.seed(index),
            **about,
        }
        for index, (prompt, path) in enumerate(zip(prompts, images, strict=True))
    ]
    write_manifest(run.beside(group, ".json"), entries)
    if run.config.zip:
        write_file(run.beside(group, ".zip"), lambda partial: pack(images, partial))


def pack(files: Iterable[Path], path: Path) -> None:
    """Write a zip file of files under their bare names; PNGs are compressed already."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:  # some are of 1970
        for file in files:
            archive.write(file, file.name)


def prepare(config: EvalConfig, accelerator: Accelerator) -> EvalRun:
    """Models loaded, folders of the prompt groups checked, missing images found; every rank calls this.

    Raises InputError for input that cannot be used.
    """
    prompts = on_main(accelerator, config.load_prompts)
    run = load_run(config, accelerator)
    run.prompts = prompts
    for group in prompts:
        on_main(accelerator, partial(check_folder, run, group))
        if any(prompt.negative for prompt in prompts[group]):
            log.warning(f"CAUTION: negative prompts of {group} are not used: the empty caption is")
    run.output.mkdir(parents=True, exist_ok=True)
    run.missing = {group: find_missing(run, group) for group in prompts}
    return run


def generate(run: EvalRun) -> dict[str, Path]:
    """Make the missing images and write the manifests, whose paths are returned by group; every rank calls this.

    Raises InputError where images cannot be made or written; those made until then stay.
    """
    accelerator = run.accelerator
    for group in run.prompts:
        on_main(accelerator, partial(claim_folder, run, group))
    for group, prompts in run.prompts.items():
        count = len(run.missing[group])
        log.info(
            f"{group}: {len(prompts)} prompts, {len(prompts) - count} images there, {count} to make "
            f"(processes: {accelerator.num_processes}, batch size: {run.batch_size}) in {run.folder(group)}"
        )
        together(partial(make_images, run, group))
        on_main(accelerator, partial(write_results, run, group))
    return {group: run.beside(group, ".json") for group in run.prompts}
