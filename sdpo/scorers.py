"""Scores of images for their prompts: one table of metrics, on transformers and open_clip alone.

A metric is a class that loads, prepares images and scores, a row in SCORERS, and one in manifest.METRICS, which says
what it is called in files; higher scores are better. Its weights are named parts, each a hub reference
(`owner/repository` or `owner/repository:file`) or a local path. `score_rows` is the pass over images.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, compress, islice, pairwise
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import transformers
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as T

from sdpo.command import InputError
from sdpo.files import brief, sha256
from sdpo.hub import check_finite, check_fit, check_vocabulary, fetch, load_part, load_state
from sdpo.images import open_image, refuse_errors_of_the_machine, to_rgb
from sdpo.tiny import pictures

IN_TURN_BLOCK = 512  # images per turn of a model; up to twice as many are held prepared (0.6 MB each and preprocessing)
MEMORY_MARGIN = 1.5  # device memory needed per byte of weights, to leave room for activations

# Loading


def locate(source: str) -> str:
    """Path of a weights file: a local one, or `owner/repository:file`, fetched from the hub once; raises InputError."""
    check_file(source)
    if Path(source).is_file():
        return source
    repository, _, name = source.partition(":")
    return str(fetch(repository, name))


def check_file(source: str) -> None:
    """Raises InputError unless a source is a file, or has the form of one on the hub."""
    if not Path(source).is_file() and not source.partition(":")[2]:
        raise InputError(f"there is no weights file {source}; give a file, or owner/repository:file of the hub")


def assign_weights(module: nn.Module, source: str, rename: Callable[[str], str | None] = str) -> None:
    """Assign weights to a module that has none yet: `source` is a .safetensors or torch file, as `locate` finds it.

    `rename` maps the file's names to the module's, None drops one. Raises InputError where names or shapes differ.
    """
    state = {rename(name): value for name, value in load_state(locate(source)).items()}
    state.pop(None, None)  # what `rename` drops
    check_fit(state, module.state_dict(), source, "give the file that the metric's part names")
    check_finite(state, source)
    module.load_state_dict(state, assign=True)


def load_tokenizer(cls, source: str, size: int, extra: Iterable[str] = ()):
    """A tokenizer of `size` entries, `extra` included; raises InputError for any other size."""
    tokenizer = load_part(cls, source)
    tokenizer.add_tokens(list(extra), special_tokens=True)
    check_vocabulary(tokenizer, size, source)
    return tokenizer


# Preprocessing


@dataclass(frozen=True)
class Preprocess:
    """How a scorer prepares a PIL image in RGB as a tensor (3, H, W); those of one key are equal and done once."""

    key: str
    prepare: Callable[[Image.Image], Tensor] = field(compare=False)


def torchvision_preprocess(size: int) -> Preprocess:
    """That of open_clip and ImageReward: shortest side to `size` (PIL, bicubic), centre crop, CLIP's mean and std."""
    normalize = T.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    steps = T.Compose([T.Resize(size, T.InterpolationMode.BICUBIC), T.CenterCrop(size), T.ToTensor(), normalize])
    return Preprocess(repr(steps), steps)


def processor_preprocess(source: str, size: int) -> Preprocess:
    """That of a CLIP model on the hub, on PIL: transformers resizes tensors by default, which moves pixels by 0.015.

    Raises InputError unless it makes pictures of `size` x `size` pixels.
    """
    processor = load_part(transformers.CLIPImageProcessorPil, source)

    def prepare(image: Image.Image) -> Tensor:
        return processor(image, return_tensors="pt")["pixel_values"][0]

    try:
        made = prepare(Image.new("RGB", (size, size)))
        wrong = "" if made.shape == (3, size, size) and made.isfinite().all() else f"makes {tuple(made.shape)}"
    except Exception as error:  # each wrong setting has one of its own
        wrong = brief(error)
    if wrong:
        raise InputError(
            f"the image processor of {source!r} does not make the finite numbers of 3 x {size} x {size} that its model "
            f"takes ({wrong}): give the preprocessor_config.json of that model"
        )
    return Preprocess(processor.to_json_string(), prepare)


def tiny_pixels(image: Image.Image) -> Tensor:
    """The pixels (3, 32, 32) uint8 of a tiny picture; raises InputError for another size."""
    if image.size != (pictures.SIDE, pictures.SIDE):
        raise InputError(f"a tiny picture has {pictures.SIDE} x {pictures.SIDE} pixels, this has {image.size}")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# Metrics


class Scorer(nn.Module):
    """A metric with its weights on the CPU; `.to(device)` moves them.

    `sources` replaces hub references of `official` by part, e.g. {"checkpoint": "/models/HPS_v2_compressed.pt"}.
    Backbones compute in `dtype` (float32 or bfloat16), heads and cosines in fp32. `options` go to the metric's `load`.
    Raises InputError for parts that do not exist, cannot be loaded or belong to another model.
    """

    official: ClassVar[dict[str, str]] = {}
    preprocess: Preprocess

    def __init__(self, sources: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float32, **options):
        super().__init__()
        self.sources = self.official | dict(sources or {})
        self.dtype = dtype
        if unknown := sorted(self.sources.keys() - self.official.keys()):
            raise InputError(f"{type(self).__name__} has no part {unknown[0]!r}; it has {', '.join(self.official)}")
        self.load(**options)
        self.requires_grad_(False).eval()

    def load(self) -> None:
        """Load the parts and set `preprocess`."""

    @classmethod
    def check(cls, prompts: Iterable[str], size: tuple[int, int] | None = None) -> None:
        """Raises InputError for prompts, and a (height, width), of images that it cannot score; needs no weights."""

    @torch.no_grad()
    def score(self, pixels: Tensor, prompts: Iterable[str]) -> Tensor:
        """Scores (N,) fp32 on the CPU of prepared images (N, 3, H, W), one per prompt; ValueError if counts differ."""
        prompts = list(prompts)
        if len(pixels) != len(prompts):
            raise ValueError(f"{len(pixels)} images, {len(prompts)} prompts: give one prompt per image")
        device = next(self.parameters(), pixels).device
        return self(pixels.to(device), prompts).float().cpu()


class PickScore(Scorer):
    """Cosine between PickScore's embeddings of text and image, without the logit scale (arXiv 2305.01569)."""

    official: ClassVar = {
        "model": "yuvalkirstain/PickScore_v1",
        "processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    }

    def load(self) -> None:
        """Model, tokenizer and image processor."""
        self.model = load_part(transformers.CLIPModel, self.sources["model"], dtype=torch.float32).to(self.dtype)
        text = self.model.config.text_config
        self.tokenizer = load_tokenizer(transformers.CLIPTokenizer, self.sources["processor"], text.vocab_size)
        self.text_options = {"padding": True, "truncation": True, "max_length": text.max_position_embeddings}
        self.preprocess = processor_preprocess(self.sources["processor"], self.model.config.vision_config.image_size)

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores (N,) of pixels (N, 3, H, W)."""
        tokens = self.tokenizer(prompts, return_tensors="pt", **self.text_options).to(pixels.device)
        image = self.model.get_image_features(pixels.to(self.dtype)).pooler_output  # (N, D)
        text = self.model.get_text_features(**tokens).pooler_output  # (N, D)
        return F.cosine_similarity(text.float(), image.float())


class ClipScore(Scorer):
    """Cosine between the embeddings of text and image of an open_clip model, here LAION's ViT-H-14."""

    official: ClassVar = {"checkpoint": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K:open_clip_pytorch_model.bin"}

    def load(self, architecture: dict | None = None) -> None:
        """The checkpoint, for an open_clip model config (that of ViT-H-14 by default)."""
        architecture = architecture or open_clip.get_model_config("ViT-H-14")
        with init_empty_weights():  # so that no weight can stay random
            self.model = open_clip.CLIP(**architecture)
        assign_weights(self.model, self.sources["checkpoint"])
        self.model.to(self.dtype)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=architecture["text_cfg"]["context_length"])
        self.preprocess = torchvision_preprocess(architecture["vision_cfg"]["image_size"])

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores (N,) of pixels (N, 3, H, W)."""
        return self.cosine(pixels, self.tokenizer(prompts).to(pixels.device))

    def cosine(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Scores (N,) of pixels (N, 3, H, W) for tokens (N, L)."""
        image, text = self.model.encode_image(pixels.to(self.dtype)), self.model.encode_text(tokens)  # each (N, D)
        return F.cosine_similarity(text.float(), image.float())


class HPSv2(ClipScore):
    """Human Preference Score v2.0 (arXiv 2306.09341), images prepared by open_clip as in the official evaluation."""

    official: ClassVar = {"checkpoint": "xswu/HPSv2:HPS_v2_compressed.pt"}


class HPSv21(ClipScore):
    """Human Preference Score v2.1."""

    official: ClassVar = {"checkpoint": "xswu/HPSv2:HPS_v2.1_compressed.pt"}


class Head(nn.Module):
    """The regressor of Aesthetics and ImageReward, (N, width) -> (N,) fp32: linear layers with nothing in between.

    Identities stand where the originals have dropout, so that the layers keep their numbers 0, 2, 4, 6 and 7.
    """

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Identity(),
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """One number per row."""
        return self.layers(x.float()).squeeze(1)


class Aesthetics(Scorer):
    """The predictor of christophschuhmann/improved-aesthetic-predictor, about 1 to 10; prompts are not looked at."""

    official: ClassVar = {
        "model": "openai/clip-vit-large-patch14",
        "head": "camenduru/improved-aesthetic-predictor:sac+logos+ava1-l14-linearMSE.pth",
    }
    head_sha256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"

    def load(self, head_sha256: str | None = head_sha256) -> None:
        """CLIP and the head, whose file must have this sha256; None accepts a head of one's own."""
        source = self.sources["head"]
        found = sha256(locate(source))
        if head_sha256 not in (None, found):
            raise InputError(f"{source} has sha256 {found}, not {head_sha256}; download the official file again")
        self.model = load_part(transformers.CLIPModel, self.sources["model"], dtype=torch.float32).to(self.dtype)
        del self.model.text_model
        with init_empty_weights():
            self.head = Head(self.model.config.projection_dim)
        assign_weights(self.head, source)
        self.head.float()
        self.preprocess = processor_preprocess(self.sources["model"], self.model.config.vision_config.image_size)

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores (N,) of pixels (N, 3, H, W)."""
        image = self.model.get_image_features(pixels.to(self.dtype)).pooler_output  # (N, D)
        return self.head(F.normalize(image.float()))


class ImageReward(Scorer):
    """ImageReward (arXiv 2304.05977): BLIP's text encoder attends to the image, a head reads its first token."""

    official: ClassVar = {"checkpoint": "THUDM/ImageReward:ImageReward.pt", "tokenizer": "bert-base-uncased"}
    vision: ClassVar = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    text: ClassVar = {"num_attention_heads": 12, "encoder_hidden_size": 1024, "is_decoder": True}
    text_options: ClassVar = {"padding": "max_length", "truncation": True, "max_length": 35}
    mean, std = 0.16717362830052426, 1.0333394966054072  # of the head's output
    names: ClassVar = {  # in the checkpoint -> here, replaced in this order
        "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
        "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
        "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
        "blip.visual_encoder.norm.": "vision.post_layernorm.",
        "blip.visual_encoder.blocks.": "vision.encoder.layers.",
        "blip.text_encoder.": "text.",
        ".norm1.": ".layer_norm1.",
        ".norm2.": ".layer_norm2.",
        ".attn.qkv.": ".self_attn.qkv.",
        ".attn.proj.": ".self_attn.projection.",
    }
    unused = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")

    def load(self, vision: Mapping = vision, text: Mapping = text) -> None:
        """Checkpoint and tokenizer, for settings of transformers' BlipVisionConfig and BlipTextConfig."""
        config = transformers.BlipTextConfig(**text)
        with init_empty_weights():
            blip = {
                "vision": transformers.BlipVisionModel(transformers.BlipVisionConfig(**vision)),
                "text": transformers.BlipTextModel(config, add_pooling_layer=False),
            }
            self.parts = nn.ModuleDict(blip | {"mlp": Head(config.hidden_size)})
        assign_weights(self.parts, self.sources["checkpoint"], self.rename)
        self.parts.to(self.dtype)["mlp"].float()
        self.tokenizer = load_tokenizer(
            transformers.BertTokenizer, self.sources["tokenizer"], config.vocab_size, ("[DEC]", "[ENC]")
        )
        self.preprocess = torchvision_preprocess(vision["image_size"])

    def rename(self, name: str) -> str | None:
        """The name here of a tensor of the checkpoint; None if the score does not need it."""
        if name.startswith(self.unused):
            return None
        for old, new in self.names.items():
            name = name.replace(old, new)
        return name

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Rewards (N,) of pixels (N, 3, H, W), about standard normal."""
        tokens = self.tokenizer(prompts, return_tensors="pt", **self.text_options).to(pixels.device)
        return self.reward(pixels, tokens["input_ids"], tokens["attention_mask"])

    def reward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Rewards (N,) of pixels (N, 3, H, W) for token ids (N, L), of which mask (N, L) is 0 where padded."""
        image = self.parts["vision"](pixels.to(self.dtype)).last_hidden_state  # (N, patches + 1, D)
        text = self.parts["text"](ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state  # (N, L, D)
        return (self.parts["mlp"](text[:, 0]) - self.mean) / self.std


class PixelChecks(Scorer):
    """Share of the checks that a picture of the tiny default passes for its caption (sdpo.tiny.pictures.score)."""

    preprocess = Preprocess("tiny pixels", tiny_pixels)

    @classmethod
    def check(cls, prompts: Iterable[str], size: tuple[int, int] | None = None) -> None:
        """Only captions and pictures of the tiny default have checks."""
        try:
            for prompt in set(prompts):
                pictures.parse(prompt)
        except ValueError as error:
            raise InputError(f"pixel checks: {error}") from error
        if size not in (None, (pictures.SIDE, pictures.SIDE)):
            raise InputError(f"pixel checks are of {pictures.SIDE} x {pictures.SIDE} pixels, images have {size}")

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores (N,) in [0, 1] of pixels (N, 3, 32, 32) uint8; raises InputError for captions of another form."""
        self.check(prompts)
        rows = zip(pixels.permute(0, 2, 3, 1).cpu().numpy(), prompts, strict=True)
        return torch.tensor([pictures.score(picture, caption) for picture, caption in rows])


SCORERS: dict[str, type[Scorer]] = {
    "pickscore": PickScore,
    "hpsv2": HPSv2,
    "hpsv21": HPSv21,
    "aesthetics": Aesthetics,
    "clip": ClipScore,
    "imagereward": ImageReward,
    "pixels": PixelChecks,
}


def check_names(names: Iterable[str], known: Collection[str]) -> None:
    """Raises InputError for the first name that is not known."""
    for name in names:
        if name not in known:
            raise InputError(f"there is no {name!r}; choose from {', '.join(known)}")


def check_parts(sources: Mapping[str, str], metrics: Collection[str] = SCORERS) -> None:
    """Raises InputError unless names are "metric.part" of one of the metrics, and weights files exist."""
    official = {f"{metric}.{part}": source for metric in SCORERS for part, source in SCORERS[metric].official.items()}
    check_names(sources, official)
    for name, source in sources.items():
        if name.rpartition(".")[0] not in metrics:
            raise InputError(f"{name} belongs to a metric that is not scored: score that too, or drop it")
        if ":" in official[name]:  # a file, not a folder
            check_file(source)
        elif not Path(source).is_dir() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
            raise InputError(f"there is no folder {source}; give one, or owner/repository of the hub")


def load_scorers(
    metrics: Iterable[str], sources: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Scorer]:
    """Scorers by metric, on the CPU; `sources` maps "metric.part" to a local path or hub reference.

    Raises InputError for names that do not exist and for weights that cannot be used.
    """
    metrics = list(metrics)
    sources = sources or {}
    check_names(metrics, SCORERS)
    check_parts(sources)
    parts = {metric: {} for metric in SCORERS}
    for name, source in sources.items():
        metric, _, part = name.rpartition(".")
        parts[metric][part] = source
    scorers = {}
    for metric in metrics:
        try:
            scorers[metric] = SCORERS[metric](parts[metric], dtype)
        except InputError as error:
            raise InputError(f"{metric}: {error}") from error
    return scorers


# The pass


def score_rows(
    rows: Iterable[tuple[str | Path | BinaryIO, str]],
    scorers: Mapping[str, Scorer],
    *,
    batch_size: int = 64,
    device: str | torch.device | None = "cpu",
    in_turn: bool | None = None,
    tolerant: bool = False,
) -> Iterator[dict[str, float] | InputError]:
    """One {metric: score} per row (image, prompt), in order and as they come.

    An image is a path, or an open file. It is decoded once and prepared once per distinct preprocessing, by threads
    that work ahead of the models. With `in_turn` the models take turns on the device, each for IN_TURN_BLOCK images; by
    default they do if it cannot hold them together. Raises InputError naming a device that cannot be used, or an image
    that cannot be read or has no finite score; all rows of earlier blocks have been yielded by then. If `tolerant`, the
    error of an image that cannot be read is yielded, not raised.
    """
    device = check_device(device)
    in_turn = are_too_large(scorers.values(), device) if in_turn is None else in_turn
    preprocesses = {scorer.preprocess for scorer in scorers.values()}
    home = "cpu" if in_turn else device
    block_size = max(batch_size, IN_TURN_BLOCK) if in_turn else batch_size
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for block, prepared in work_ahead(pool, lambda row: prepare(row[0], preprocesses), rows, block_size):
            readable = [not isinstance(image, InputError) for image in prepared]
            if not all(readable) and not tolerant:
                raise prepared[readable.index(False)]
            pairs = list(compress(zip(block, prepared, strict=True), readable))
            columns = {}
            for metric, scorer in scorers.items():
                scorer.to(device)
                columns[metric] = score_block(metric, scorer, pairs, batch_size)
                scorer.to(home)
            scores = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
            yield from (image if isinstance(image, InputError) else next(scores) for image in prepared)


def are_too_large(scorers: Iterable[Scorer], device: torch.device) -> bool:
    """Whether models are too large for what is free on a GPU."""
    if device.type != "cuda":
        return False
    weights = [tensor for scorer in scorers for tensor in scorer.parameters()]
    there = sum(tensor.nbytes for tensor in weights if tensor.is_cuda)
    need = MEMORY_MARGIN * sum(tensor.nbytes for tensor in weights)
    torch.cuda.empty_cache()  # blocks that nobody uses any more would count as taken
    return need > torch.cuda.mem_get_info(device)[0] + there


def check_device(name: str | torch.device | None) -> torch.device:
    """The device, for None a GPU if there is one; raises InputError if it cannot be used here."""
    try:
        number = torch.zeros((), device=name or ("cuda" if torch.cuda.is_available() else "cpu"))
        number.item()  # the meta device has none
        return number.device
    except Exception as error:  # every backend that is not there has one of its own
        raise InputError(f"--device {name} cannot be used ({brief(error)}); give cpu, cuda, cuda:1, ...") from error


def prepare(image: str | Path | BinaryIO, preprocesses: Iterable[Preprocess]) -> dict[Preprocess, Tensor] | InputError:
    """The image, decoded once, by preprocessing; where it cannot be read, an InputError that names it.

    Raises MemoryError and InputError where that is not the image's fault.
    """
    try:
        with open_image(image) as opened:
            picture = to_rgb(opened)
        return {preprocess: preprocess.prepare(picture) for preprocess in preprocesses}
    except Exception as error:  # every image format has errors of its own
        refuse_errors_of_the_machine(error, f"image {image}")
        return InputError(f"image {image} cannot be scored: {brief(error)}; make it again or drop it")


def work_ahead(pool: ThreadPoolExecutor, function: Callable, rows: Iterable, size: int) -> Iterator[tuple[list, list]]:
    """Blocks of `size` rows with the function's results, while the next block is being worked on."""
    rows = iter(rows)
    begun = ((block, pool.map(function, block)) for block in iter(lambda: list(islice(rows, size)), []))
    for (block, results), _ in pairwise(chain(begun, [None])):  # which begins the next one
        yield block, list(results)


def score_block(
    metric: str, scorer: Scorer, rows: list[tuple[tuple, dict[Preprocess, Tensor]]], batch_size: int
) -> list[float]:
    """Scores of rows ((image, prompt), prepared image), in batches; raises InputError for one that is not finite."""
    scores: list[float] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        pixels = torch.stack([image[scorer.preprocess] for _, image in batch])
        scores += scorer.score(pixels, [prompt for (_, prompt), _ in batch]).tolist()
    for ((image, _), _), score in zip(rows, scores, strict=True):
        if not math.isfinite(score):
            raise InputError(f"{metric} of image {image} is {score}; check its weights or use float32")
    return scores
