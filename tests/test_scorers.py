"""The scorers against the packages' own figures, plain computations of the same models, and what must be refused."""

import copy
import errno
import gzip
import hashlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import open_clip
import pytest
import stand_in
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from PIL import Image
from recording import Payload
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)

from sdpo import scorers as module
from sdpo.command import InputError
from sdpo.manifest import METRICS
from sdpo.scorers import (
    SCORERS,
    Aesthetics,
    ClipScore,
    HPSv2,
    ImageReward,
    PickScore,
    PixelChecks,
    Preprocess,
    are_too_large,
    load_scorers,
    prepare,
    score_rows,
    torchvision_preprocess,
)
from sdpo.tiny import pictures

DATA = Path(__file__).parent / "data"
PROMPTS = [
    "a small red circle on a blue background",
    "",
    "Two dogs, one cat & 3 birds!",
    "naïve café façade 東京 🦊",
    "very " * 100 + "long",
]
ARCHITECTURE = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "##s", "on", "the", "mat", ","]


def test_every_scorer_has_a_name_in_files():
    assert sorted(METRICS.values()) == sorted(SCORERS)


def fixture_file(name):
    """Weights, inputs and sizes of a file in tests/data."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        sizes = json.loads(file.metadata()["config"])
    tensors = load_file(DATA / f"{name}.safetensors")
    given = {key: value for key, value in tensors.items() if key.startswith(("io.", "pre."))}
    return {key: value for key, value in tensors.items() if key not in given}, given, sizes


def blip_sizes(**changes):
    """Settings of the two BLIP encoders of ir_tiny, of which some may be changed."""
    c = fixture_file("ir_tiny")[2]
    vision = {
        "hidden_size": c["vision_width"], "intermediate_size": 4 * c["vision_width"], "layer_norm_eps": 1e-6,
        "num_hidden_layers": c["vision_layers"], "num_attention_heads": c["vision_heads"],
        "image_size": c["image_size"], "patch_size": c["patch_size"],
    }  # fmt: skip
    text = {
        "hidden_size": c["text_width"], "intermediate_size": c["intermediate"], "vocab_size": c["vocab_size"],
        "num_hidden_layers": c["text_layers"], "num_attention_heads": c["text_heads"], "is_decoder": True,
        "max_position_embeddings": c["max_pos"], "encoder_hidden_size": c["vision_width"],
    }  # fmt: skip
    return {
        "vision": {k: changes.get(f"vision_{k}", v) for k, v in vision.items()},
        "text": {k: changes.get(f"text_{k}", v) for k, v in text.items()},
    }


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with every metric's files at reduced width, laid out as on the hub."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    blip, _, _ = fixture_file("ir_tiny")
    torch.save(blip, folder / "ImageReward.pt")
    hps, _, _ = fixture_file("hps_tiny")
    torch.save({"epoch": 1, "state_dict": {f"module.{key}": value for key, value in hps.items()}}, folder / "hps.pt")
    save_file(randomised(open_clip.CLIP(**ARCHITECTURE)), folder / "clip.safetensors")
    save_clip(folder / "clip")
    (folder / "bert").mkdir()
    (folder / "bert/vocab.txt").write_text("\n".join(WORDS + [f"w{i}" for i in range(62 - len(WORDS))]))
    shapes = [(1024, 12), (128, 1024), (64, 128), (16, 64), (1, 16)]
    head = {}
    for layer, (rows, columns) in zip((0, 2, 4, 6, 7), shapes, strict=True):
        head |= {f"layers.{layer}.weight": torch.randn(rows, columns) / columns**0.5}
        head |= {f"layers.{layer}.bias": torch.randn(rows) / 10}
    torch.save(head, folder / "head.pth")
    return folder


def randomised(module):
    """State dict with norms and biases too, which a fresh module leaves at 1 and 0, away from where they start."""
    return {key: value + 0.1 * torch.randn_like(value) for key, value in module.state_dict().items()}


def save_clip(folder):
    """A CLIP in transformers' format with CLIP's own vocabulary, its end token where the hub's checkpoints have it."""
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    text = tower | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2, "hidden_act": "gelu"}
    vision = tower | {"image_size": 32, "patch_size": 8, "hidden_act": "gelu"}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    model.load_state_dict(randomised(model))
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size=32, crop_size=32).save_pretrained(folder)
    lines = gzip.decompress((Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = lines.split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    pieces = [*letters, *(x + "</w>" for x in letters), *("".join(m.split()) for m in merges)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    CLIPTokenizer.from_pretrained(folder, model_max_length=77).save_pretrained(folder)


def make(metric, weights, dtype=torch.float32):
    """A metric at reduced width, through the loading code that the official weights take."""
    clip = str(weights / "clip")
    return {
        "pickscore": lambda: PickScore({"model": clip, "processor": clip}, dtype),
        "clip": lambda: ClipScore({"checkpoint": str(weights / "clip.safetensors")}, dtype, architecture=ARCHITECTURE),
        "aesthetics": lambda: Aesthetics({"model": clip, "head": str(weights / "head.pth")}, dtype, head_sha256=None),
        "imagereward": lambda: ImageReward(
            {"checkpoint": str(weights / "ImageReward.pt"), "tokenizer": str(weights / "bert")}, dtype, **blip_sizes()
        ),
        "pixels": PixelChecks,
    }[metric]()


LEARNED = ("pickscore", "clip", "aesthetics", "imagereward")


@pytest.fixture(scope="module")
def scorers(weights):
    return {metric: make(metric, weights) for metric in LEARNED}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Seven pictures of several sizes and modes with their prompts."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    sizes = [(40, 40), (64, 64), (48, 33), (31, 77), (200, 64), (32, 32), (64, 40)]
    result = []
    for i, (width, height) in enumerate(sizes):
        smooth = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
        smooth.convert(("RGB", "L", "P", "RGBA")[i % 4]).save(folder / f"{i}.png")
        result.append((folder / f"{i}.png", PROMPTS[i % len(PROMPTS)]))
    return result


def columns(results):
    """{metric: scores (N,)} of score_rows."""
    results = list(results)
    return {metric: torch.tensor([row[metric] for row in results]) for metric in results[0]}


# The packages' own figures


def test_imagereward_equals_the_package(scorers):
    _, given, _ = fixture_file("ir_tiny")
    reward = scorers["imagereward"].reward(given["io.pixels"], given["io.ids"], given["io.mask"])
    torch.testing.assert_close(reward, given["io.score"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"text_num_attention_heads": 8}, {"vision_num_attention_heads": 8}, {"vision_layer_norm_eps": 1e-5}, "mask"],
    ids=str,
)
def test_imagereward_depends_on_what_it_should(change, weights):
    _, given, _ = fixture_file("ir_tiny")
    sources = {"checkpoint": str(weights / "ImageReward.pt"), "tokenizer": str(weights / "bert")}
    mask = torch.ones_like(given["io.mask"]) if change == "mask" else given["io.mask"]
    scorer = ImageReward(sources, **blip_sizes(**({} if change == "mask" else change)))
    assert (scorer.reward(given["io.pixels"], given["io.ids"], mask) - given["io.score"]).abs().max() > 5e-5


def test_an_image_that_needs_no_resizing_is_prepared_as_the_package_does():
    given = fixture_file("hps_tiny")[1]
    image = Image.fromarray(given["pre.image0"].numpy())
    assert image.size == (32, 32)
    torch.testing.assert_close(torchvision_preprocess(32).prepare(image), given["io.pixels_noaa"][0])


def test_hpsv2_equals_the_package(weights):
    _, given, sizes = fixture_file("hps_tiny")
    scorer = HPSv2({"checkpoint": str(weights / "hps.pt")}, architecture=sizes)
    score = scorer.cosine(given["io.pixels_noaa"], given["io.tokens"])
    torch.testing.assert_close(score, given["io.score_noaa"], rtol=0, atol=1e-5)
    other = HPSv2({"checkpoint": str(weights / "hps.pt")}, architecture=sizes | {"quick_gelu": True})
    assert (other.cosine(given["io.pixels_noaa"], given["io.tokens"]) - given["io.score_noaa"]).abs().max() > 1e-4


def test_official_sizes_are_those_of_the_checkpoints():
    """ImageReward.pt has 625 tensors, five of them unused; ViT-H-14 has 986.11 M parameters."""
    with init_empty_weights():
        vision = BlipVisionModel(BlipVisionConfig(**ImageReward.vision))
        text = BlipTextModel(BlipTextConfig(**ImageReward.text), add_pooling_layer=False)
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    assert len(vision.state_dict()) + len(text.state_dict()) + 2 * 5 == 625 - 5
    assert text.embeddings.word_embeddings.weight.shape == (30522 + 2, 768)  # bert-base-uncased, [DEC], [ENC]
    assert text.encoder.layer[0].crossattention.self.key.weight.shape == (768, 1024)
    assert sum(p.numel() for p in clip.parameters()) == 986_109_441


# Plain computations of the same models


def attend(x, w, heads, causal):
    """Self-attention of (N, L, D), written out; w: weight and bias of q, k, v and the output."""
    n, length, width = x.shape
    q, k, v = (F.linear(x, *w[name]).view(n, length, heads, -1).transpose(1, 2) for name in "qkv")
    logits = q @ k.transpose(2, 3) * (width // heads) ** -0.5
    if causal:
        logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return F.linear((logits.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width), *w["out"])


def tower(x, layers, heads, causal=False):
    """A stack of pre-norm transformer blocks."""
    for w in layers:
        x = x + attend(F.layer_norm(x, x.shape[-1:], *w["norm1"]), w, heads, causal)
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], *w["norm2"]), *w["up"])), *w["down"])
    return x


def embed_image(pixels, patch, start, position, norm_in, layers, heads, norm_out, project):
    patches = F.conv2d(pixels, patch, stride=patch.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([start.expand(len(pixels), 1, -1), patches], 1) + position
    x = tower(F.layer_norm(x, x.shape[-1:], *norm_in), layers, heads)[:, 0]
    return F.normalize(F.linear(F.layer_norm(x, x.shape[-1:], *norm_out), project))


def embed_text(ids, table, position, layers, heads, norm_out, project):
    x = tower(table[ids] + position[: ids.shape[1]], layers, heads, causal=True)
    x = F.layer_norm(x, x.shape[-1:], *norm_out)[torch.arange(len(ids)), ids.argmax(1)]  # the end token is the last id
    return F.normalize(F.linear(x, project))


def transformers_layers(state, side):
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.out_proj",
             "norm1": "layer_norm1", "norm2": "layer_norm2", "up": "mlp.fc1", "down": "mlp.fc2"}  # fmt: skip
    return [{key: both(state, f"{side}.encoder.layers.{i}.{name}") for key, name in names.items()} for i in range(2)]


def open_clip_layers(state, prefix):
    names = {"out": "attn.out_proj", "norm1": "ln_1", "norm2": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    layers = []
    for block in (f"{prefix}transformer.resblocks.{i}." for i in range(2)):
        packed = state[block + "attn.in_proj_weight"].chunk(3), state[block + "attn.in_proj_bias"].chunk(3)
        layers.append({key: both(state, block + name) for key, name in names.items()})
        layers[-1] |= dict(zip("qkv", zip(*packed, strict=True), strict=True))
    return layers


def both(state, name):
    return state[f"{name}.weight"], state[f"{name}.bias"]


def transformers_image(state, pixels):
    at = "vision_model.embeddings."
    return embed_image(
        pixels, state[at + "patch_embedding.weight"], state[at + "class_embedding"], state[at + "position_embedding.weight"],
        both(state, "vision_model.pre_layrnorm"), transformers_layers(state, "vision_model"), 2,
        both(state, "vision_model.post_layernorm"), state["visual_projection.weight"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(len(PROMPTS), 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_pickscore_is_the_cosine_of_the_plain_model(scorers, weights, pixels):
    state = load_file(weights / "clip/model.safetensors")
    ids = open_clip.SimpleTokenizer(context_length=77)(PROMPTS)  # CLIP's own tokenizer; its padding lies after the end
    at = "text_model.embeddings."
    text = embed_text(
        ids, state[at + "token_embedding.weight"], state[at + "position_embedding.weight"],
        transformers_layers(state, "text_model"), 2, both(state, "text_model.final_layer_norm"), state["text_projection.weight"],
    )  # fmt: skip
    expected = (text * transformers_image(state, pixels)).sum(1)
    torch.testing.assert_close(scorers["pickscore"].score(pixels, PROMPTS), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01  # the prompts matter


def test_clip_is_the_cosine_of_the_plain_model(scorers, weights, pixels):
    state = load_file(weights / "clip.safetensors")
    ids = CLIPTokenizer.from_pretrained(weights / "clip")(PROMPTS, padding="max_length", truncation=True, max_length=77)
    text = embed_text(
        torch.tensor(ids["input_ids"]), state["token_embedding.weight"], state["positional_embedding"],
        open_clip_layers(state, ""), 2, both(state, "ln_final"), state["text_projection"].T,
    )  # fmt: skip
    image = embed_image(
        pixels, state["visual.conv1.weight"], state["visual.class_embedding"], state["visual.positional_embedding"],
        both(state, "visual.ln_pre"), open_clip_layers(state, "visual."), 2, both(state, "visual.ln_post"),
        state["visual.proj"].T,
    )  # fmt: skip
    expected = (text * image).sum(1)
    torch.testing.assert_close(scorers["clip"].score(pixels, PROMPTS), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01


def test_aesthetics_is_the_head_on_the_plain_embedding(scorers, weights, pixels):
    x = transformers_image(load_file(weights / "clip/model.safetensors"), pixels)
    head = torch.load(weights / "head.pth", weights_only=True)
    for layer in (0, 2, 4, 6, 7):
        x = x @ head[f"layers.{layer}.weight"].T + head[f"layers.{layer}.bias"]
    torch.testing.assert_close(scorers["aesthetics"].score(pixels, PROMPTS), x[:, 0], rtol=0, atol=1e-5)


def test_imagereward_reads_prompts_as_bert_tokens(scorers, pixels):
    prompts = ["a red cat", "Cats on the MAT, unknown", "mat " * 60]
    pad, start, end = 0, 2, 3
    ids = [[start, 5, 6, 7, end], [start, 7, 8, 9, 10, 11, 12, 1, end], [start, *[11] * 33, end]]
    mask = torch.tensor([[1] * len(row) + [0] * (35 - len(row)) for row in ids])
    ids = torch.tensor([row + [pad] * (35 - len(row)) for row in ids])
    expected = scorers["imagereward"].reward(pixels[:3], ids, mask)
    torch.testing.assert_close(scorers["imagereward"].score(pixels[:3], prompts), expected, rtol=0, atol=1e-6)
    assert expected.std() > 1e-3


def test_pixel_checks_are_those_of_the_tiny_pictures(tmp_path):
    draw, rows, expected = np.random.default_rng(0), [], []
    for i, spec in enumerate(pictures.HELD_OUT):
        picture = pictures.render_fault(spec, pictures.draw_centre(spec, draw), draw)
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        rows.append((tmp_path / f"{i}.png", spec.caption))
        expected.append(pictures.score(picture, spec.caption))
    got = columns(score_rows(rows, load_scorers(["pixels"]), batch_size=8))
    assert got["pixels"].tolist() == pytest.approx(expected)
    assert len(set(expected)) > 1


# Preprocessing


@pytest.mark.parametrize("size", [(512, 512), (300, 301), (77, 31), (224, 224), (100, 640), (227, 224)], ids=str)
def test_preprocessing_equals_independent_code(size, scorers):
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for metric in ("clip", "imagereward"):
        expected = open_clip.image_transform(32, is_train=False)(picture)
        assert torch.equal(scorers[metric].preprocess.prepare(picture), expected)
    scale = 32 / min(size)
    width, height = (32 if side == min(size) else int(32 * side / min(size)) for side in size)
    left, top = (width - 32) // 2, (height - 32) // 2
    resized = (
        np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)) if scale != 1 else np.asarray(picture)
    )
    mean, std = np.array(open_clip.OPENAI_DATASET_MEAN), np.array(open_clip.OPENAI_DATASET_STD)
    expected = ((resized[top : top + 32, left : left + 32] / 255 - mean) / std).transpose(2, 0, 1)
    for metric in ("pickscore", "aesthetics"):
        got = scorers[metric].preprocess.prepare(picture)
        torch.testing.assert_close(got, torch.from_numpy(expected).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_is_opaque(mode, scorers, tmp_path):
    """As in the same picture without one; transformers would put it on white."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 4, (40, 40, 3), dtype=np.uint8) * 80).convert(mode)
    colour = picture.getpixel((0, 0))
    picture.convert("RGB").save(tmp_path / "plain.png")
    picture.save(tmp_path / "transparent.png", transparency=colour)
    assert "transparency" in Image.open(tmp_path / "transparent.png").info
    preprocesses = {scorer.preprocess for scorer in scorers.values()}
    plain, transparent = (prepare(tmp_path / f"{name}.png", preprocesses) for name in ("plain", "transparent"))
    assert all(np.array_equal(plain[p], transparent[p]) for p in preprocesses)


def test_the_other_backend_of_transformers_would_differ(scorers):
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    other = CLIPImageProcessor(size=32, crop_size=32)(picture, return_tensors="pt")["pixel_values"][0]
    assert (other - scorers["pickscore"].preprocess.prepare(picture)).abs().max() > 1e-3


def test_images_are_prepared_once_per_distinct_preprocessing(scorers, rows, monkeypatch):
    """PickScore's and Aesthetics' processors are alike here, open_clip's and ImageReward's recipes always."""
    calls = []
    for scorer in scorers.values():
        key, prepare = scorer.preprocess.key, scorer.preprocess.prepare
        counted = Preprocess(key, lambda image, key=key, prepare=prepare: calls.append(key) or prepare(image))
        monkeypatch.setattr(scorer, "preprocess", counted)
    list(score_rows(rows, scorers, batch_size=3))
    assert sorted(calls) == sorted(len(rows) * [scorers["aesthetics"].preprocess.key, scorers["clip"].preprocess.key])
    assert torchvision_preprocess(32) == torchvision_preprocess(32) != torchvision_preprocess(64)


# The pass


def test_scores_do_not_depend_on_the_batch_or_on_turns(scorers, rows):
    whole = columns(score_rows(rows, scorers, batch_size=64))
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 2, "in_turn": True}):
        other = columns(score_rows(iter(rows), scorers, **options))
        for metric, scores in whole.items():
            torch.testing.assert_close(other[metric], scores, rtol=0, atol=2e-6)
    assert all(scores.std() > 1e-4 for scores in whole.values())


def test_scores_on_a_gpu_are_those_on_the_cpu(scorers, rows):
    on_cpu = columns(score_rows(rows, scorers))
    moved = copy.deepcopy(scorers)
    with stand_in.gpu():
        on_gpu = columns(score_rows(rows, moved, device="cuda", in_turn=False))
        assert {weight.device.type for scorer in moved.values() for weight in scorer.parameters()} == {"cuda"}
    for metric, scores in on_cpu.items():
        torch.testing.assert_close(on_gpu[metric], scores, rtol=0, atol=1e-5)


def test_rows_are_scored_with_their_own_image_and_prompt(scorers, rows):
    got = columns(score_rows(rows, scorers, batch_size=3))
    for metric, scorer in scorers.items():
        for i, (path, prompt) in enumerate(rows):
            prepared = scorer.preprocess.prepare(Image.open(path).convert("RGB"))
            assert got[metric][i].item() == pytest.approx(scorer.score(prepared[None], [prompt]).item(), abs=2e-6)


def test_open_files_are_scored_like_paths(scorers, rows):
    files = [(io.BytesIO(Path(path).read_bytes()), prompt) for path, prompt in rows]
    assert list(score_rows(files, scorers)) == list(score_rows(rows, scorers))
    assert list(score_rows([], scorers)) == []


def test_bfloat16_halves_the_weights_and_stays_close(weights, scorers, rows):
    exact = columns(score_rows(rows, scorers))
    low = {metric: make(metric, weights, torch.bfloat16) for metric in LEARNED}
    for metric, scores in columns(score_rows(rows, low)).items():
        assert 0 < (scores - exact[metric]).abs().max() < 0.05, metric
        assert scores.dtype == torch.float32
        assert not torch.equal(scores, scores.bfloat16().float()), metric  # rounded, close scores would tie
    sizes = [sum(p.nbytes for p in group["clip"].parameters()) for group in (low, scorers)]
    assert sizes[0] * 2 == sizes[1]
    for head in (low["aesthetics"].head, low["imagereward"].parts["mlp"]):
        assert {p.dtype for p in head.parameters()} == {torch.float32}


def test_checkpoints_in_half_precision_are_computed_in_fp32(weights, tmp_path, pixels):
    for name in ("head.pth", "clip.safetensors"):
        state = torch.load(weights / name, weights_only=True) if name == "head.pth" else load_file(weights / name)
        for kind, dtype in (("half", torch.float16), ("exact", torch.float32)):
            torch.save({key: value.half().to(dtype) for key, value in state.items()}, tmp_path / f"{kind}-{name}.pt")
    clip = str(weights / "clip")
    half, exact = (
        [
            Aesthetics({"model": clip, "head": str(tmp_path / f"{kind}-head.pth.pt")}, head_sha256=None),
            ClipScore({"checkpoint": str(tmp_path / f"{kind}-clip.safetensors.pt")}, architecture=ARCHITECTURE),
        ]
        for kind in ("half", "exact")
    )
    for a, b in zip(half, exact, strict=True):
        assert torch.equal(a.score(pixels, PROMPTS), b.score(pixels, PROMPTS))


def test_scorers_are_loaded_by_name(weights, scorers):
    assert list(SCORERS) == ["pickscore", "hpsv2", "hpsv21", "aesthetics", "clip", "imagereward", "pixels"]
    clip = str(weights / "clip")
    loaded = load_scorers(
        ["pickscore", "pixels"], {"pickscore.model": clip, "pickscore.processor": clip}, torch.bfloat16
    )
    assert [type(scorer) for scorer in loaded.values()] == [PickScore, PixelChecks]
    assert loaded["pickscore"].sources == {"model": clip, "processor": clip}
    assert {p.dtype for p in loaded["pickscore"].parameters()} == {torch.bfloat16}
    for scorer in (*loaded.values(), *scorers.values()):
        assert not any(p.requires_grad for p in scorer.parameters())
        assert not any(module.training for module in scorer.modules())


# What is refused


def refused(match, function, *arguments, **options):
    """The function raises InputError with all these texts in one sentence."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    for text in [match] if isinstance(match, str) else match:
        assert str(text) in message, message
    assert "\n" not in message


@pytest.mark.parametrize("metric", [name for name, cls in SCORERS.items() if cls.official])
def test_missing_official_weights_name_the_file_and_the_fix(metric, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cls = SCORERS[metric]
    part = "head" if metric == "aesthetics" else next(iter(cls.official))
    repository, _, name = cls.official[part].partition(":")
    refused([repository, name, "where the hub can be reached"], cls)


def test_missing_local_weights_are_named(tmp_path):
    missing = str(tmp_path / "none.pt")
    refused(["there is no weights file", missing], HPSv2, {"checkpoint": missing})
    refused(["there is no weights file", str(tmp_path)], HPSv2, {"checkpoint": str(tmp_path)})  # a folder
    refused([str(tmp_path), "CLIPModel"], PickScore, {"model": str(tmp_path), "processor": str(tmp_path)})


@pytest.mark.parametrize(
    "settings, wrong",
    [
        ({"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}, "(makes (3, 64, 64))"),
        ({"image_std": [0, 0, 0]}, "finite numbers of 3 x 32 x 32"),
        ({"image_mean": [0.5]}, "mean must have 3 elements"),
    ],
)
def test_image_processors_of_another_model_are_refused(weights, tmp_path, settings, wrong):
    shutil.copytree(weights / "clip", tmp_path / "clip")
    path = tmp_path / "clip" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    sources = {"model": str(weights / "clip"), "processor": str(tmp_path / "clip")}
    refused([tmp_path / "clip", wrong, "preprocessor_config.json of that model"], PickScore, sources)
    sources = {"model": str(tmp_path / "clip"), "head": str(weights / "head.pth")}
    refused([wrong, "preprocessor_config.json of that model"], Aesthetics, sources, head_sha256=None)


def test_a_clip_with_more_layers_than_its_config_says_is_refused(weights, tmp_path):
    shutil.copytree(weights / "clip", tmp_path / "clip")
    path = tmp_path / "clip" / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["num_hidden_layers"] = 1
    path.write_text(json.dumps(config))
    sources = {"model": str(tmp_path / "clip"), "processor": str(weights / "clip")}
    refused(["16 tensors that its config.json has no place for", "vision_model"], PickScore, sources)
    config["vision_config"] |= {"num_hidden_layers": 2, "hidden_size": 8}
    path.write_text(json.dumps(config))
    refused("its config.json is missing, or of another size than its weights", PickScore, sources)


def test_merges_that_were_cut_off_are_pointed_out(weights, tmp_path, caplog):
    shutil.copytree(weights / "clip", tmp_path / "clip")
    (tmp_path / "clip" / "tokenizer.json").unlink()
    lines = (weights / "clip" / "merges.txt").read_text().split("\n")
    sources = {"model": str(weights / "clip"), "processor": str(tmp_path / "clip")}
    for kept, said in ((len(lines), ""), (1001, "has no merges for 47,894 of 49,408 entries, such as ")):
        (tmp_path / "clip" / "merges.txt").write_text("\n".join(lines[:kept]))
        PickScore(sources)
        assert said in caplog.text and bool(said) == bool(caplog.text)


def test_unknown_names_are_refused():
    refused(["'beauty'", "pickscore, hpsv2"], load_scorers, ["beauty"])
    refused(["'hpsv2.model'", "hpsv2.checkpoint"], load_scorers, ["hpsv2"], {"hpsv2.model": "x"})
    refused(["ClipScore", "'model'", "checkpoint"], ClipScore, {"model": "x"})


def broken_states(state):
    """Checkpoints that must be refused, by what is wrong with them."""
    first = next(iter(state))
    wide = dict(state) | {"positional_embedding": torch.randn(99, 16)}  # open_clip itself would interpolate
    return {
        "1 tensors missing": {key: value for key, value in state.items() if key != first},
        "1 unknown": dict(state) | {"extra": torch.zeros(1)},
        "1 of another shape (e.g. positional_embedding)": wide,
        "is not a state dict": ["not a dict"],
        f"{first} is torch.int64, torch.strided, cpu, but must be": dict(state)
        | {first: torch.zeros(state[first].shape, dtype=torch.long)},
        "is not a state dict: expected parameter names": {},
    }


@pytest.mark.parametrize("number", range(6))
def test_wrong_checkpoints_are_refused(number, weights, tmp_path):
    path = tmp_path / "checkpoint.pt"
    fault, state = list(broken_states(load_file(weights / "clip.safetensors")).items())[number]
    torch.save(state, path)
    refused([path, fault], ClipScore, {"checkpoint": str(path)}, architecture=ARCHITECTURE)


def test_checkpoints_of_another_architecture_are_refused(weights):
    refused("another architecture", ClipScore, {"checkpoint": str(weights / "hps.pt")}, architecture=ARCHITECTURE)
    refused("another architecture", HPSv2, {"checkpoint": str(weights / "clip.safetensors")})  # not ViT-H-14
    sources = {"checkpoint": str(weights / "hps.pt"), "tokenizer": str(weights / "bert")}
    refused("another architecture", ImageReward, sources, **blip_sizes())
    clip = {"model": str(weights / "clip"), "head": str(weights / "clip.safetensors")}
    refused("another architecture", Aesthetics, clip, head_sha256=None)


def test_files_that_are_no_weights_are_refused(weights, tmp_path):
    whole = (weights / "ImageReward.pt").read_bytes()
    for name, content in {"cut.pt": whole[: len(whole) // 2], "text.pt": b"hello", "empty.safetensors": b""}.items():
        (tmp_path / name).write_bytes(content)
        refused([name, "download it again"], ClipScore, {"checkpoint": str(tmp_path / name)})


def test_pickled_code_is_not_run(tmp_path):
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "bad.pt")
    refused("cannot be read as weights", ClipScore, {"checkpoint": str(tmp_path / "bad.pt")})
    assert not (tmp_path / "ran").exists()


def copy_clip(weights, folder, drop="", **sizes):
    """The CLIP folder without one tensor, or with another config."""
    folder.mkdir()
    for file in (weights / "clip").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != drop}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= sizes
    (folder / "config.json").write_text(json.dumps(config))
    return {"model": str(folder), "processor": str(weights / "clip")}


def test_clip_folders_that_would_stay_partly_random_are_refused(weights, tmp_path):
    name = "visual_projection.weight"
    refused([tmp_path / "a", "lacks 1 tensors", name], PickScore, copy_clip(weights, tmp_path / "a", drop=name))
    refused([tmp_path / "b", "CLIPModel"], PickScore, copy_clip(weights, tmp_path / "b", hidden_size=24))


def test_tokenizers_without_vocabulary_are_refused(weights, tmp_path):
    """transformers builds an empty tokenizer without a word."""
    blip = {"checkpoint": str(weights / "ImageReward.pt"), "tokenizer": str(tmp_path)}
    refused([tmp_path, "its model 64", "files are missing"], ImageReward, blip, **blip_sizes())
    refused(
        [weights / "bert", "files are missing or another model's"],
        PickScore,
        {"model": str(weights / "clip"), "processor": str(weights / "bert")},
    )


def test_the_official_head_is_known_by_its_hash(weights):
    sources = {"model": str(weights / "clip"), "head": str(weights / "head.pth")}
    found = hashlib.sha256((weights / "head.pth").read_bytes()).hexdigest()
    official = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
    refused(["head.pth", found, official], Aesthetics, sources)
    assert Aesthetics(sources, head_sha256=found).sources == sources


def test_scores_that_are_not_finite_name_the_image(weights, tmp_path, rows):
    head = torch.load(weights / "head.pth", weights_only=True)
    parts = {"model": str(weights / "clip"), "head": str(tmp_path / "head.pth")}
    head["layers.7.weight"].fill_(3e38)  # finite, but sums are not
    torch.save(head, parts["head"])
    broken = Aesthetics(parts, head_sha256=None)
    refused(["aesthetics", rows[0][0], "inf"], list, score_rows(rows, {"aesthetics": broken}))
    head["layers.7.bias"].fill_(torch.nan)
    torch.save(head, parts["head"])
    refused([parts["head"], "not finite", "layers.7.bias"], Aesthetics, parts, head_sha256=None)


@pytest.mark.parametrize("fault", ["cut", "text", "missing", "folder", "long", "float"])
def test_images_that_cannot_be_read_are_named_and_earlier_rows_kept(fault, scorers, rows, tmp_path):
    bad = tmp_path / "bad.png"
    whole = rows[1][0].read_bytes()
    if fault == "folder":
        bad.mkdir()
    elif fault == "long":
        Image.new("L", (1, 60_000)).save(bad)
    elif fault == "float":
        Image.new("F", (8, 8)).save(bad, "TIFF")
    elif fault != "missing":
        bad.write_bytes(whole[: len(whole) // 2] if fault == "cut" else b"hello")
    done = []
    refused([bad, "cannot be scored"], done.extend, score_rows([*rows[:5], (bad, "x")], scorers, batch_size=2))
    assert len(done) == 4  # the two batches before the one with the bad image


@pytest.mark.parametrize(
    "fault", [OSError(errno.EMFILE, "Too many open files"), MemoryError()], ids=["files", "memory"]
)
def test_a_fault_of_the_machine_is_not_the_images(rows, monkeypatch, fault):
    """In labels the image's row would be a tie for ever."""
    monkeypatch.setattr("sdpo.scorers.open_image", Mock(side_effect=fault))
    expected = InputError if isinstance(fault, OSError) else MemoryError
    with pytest.raises(expected) as error:
        list(score_rows(rows, load_scorers(["pixels"]), tolerant=True))
    assert expected is MemoryError or "cannot be read now (Too many open files)" in str(error.value)


def test_pixel_checks_refuse_other_pictures_and_captions(rows):
    caption = pictures.SPECS[0].caption
    pixel_checks = load_scorers(["pixels"])
    refused([rows[0][0], "32 x 32"], list, score_rows([(rows[0][0], caption)], pixel_checks))
    refused(["'a photo'", caption], list, score_rows([(rows[5][0], "a photo")], pixel_checks))


def test_images_and_prompts_must_be_paired(scorers, pixels):
    with pytest.raises(ValueError, match="5 images, 1 prompts"):
        scorers["clip"].score(pixels, ["one"])


def test_official_parts_are_those_of_the_protocol():
    h14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert {metric: cls.official for metric, cls in SCORERS.items()} == {
        "pickscore": {"model": "yuvalkirstain/PickScore_v1", "processor": h14},
        "hpsv2": {"checkpoint": "xswu/HPSv2:HPS_v2_compressed.pt"},
        "hpsv21": {"checkpoint": "xswu/HPSv2:HPS_v2.1_compressed.pt"},
        "clip": {"checkpoint": f"{h14}:open_clip_pytorch_model.bin"},
        "aesthetics": {
            "model": "openai/clip-vit-large-patch14",
            "head": "camenduru/improved-aesthetic-predictor:sac+logos+ava1-l14-linearMSE.pth",
        },
        "imagereward": {"checkpoint": "THUDM/ImageReward:ImageReward.pt", "tokenizer": "bert-base-uncased"},
        "pixels": {},
    }


def test_imagerewards_settings_are_the_packages():
    """Heads and epsilons are in no tensor's shape, so a checkpoint loads with any."""
    assert ImageReward.vision == {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    assert ImageReward.text == {"num_attention_heads": 12, "encoder_hidden_size": 1024, "is_decoder": True}
    assert (ImageReward.mean, ImageReward.std) == (0.16717362830052426, 1.0333394966054072)


def test_the_official_clip_is_vit_h_14(monkeypatch):
    monkeypatch.setattr(module, "assign_weights", lambda *given: None)  # the model stays on the meta device
    scorer = module.ClipScore()
    assert sum(p.numel() for p in scorer.model.parameters()) == pytest.approx(986.11e6, rel=1e-5)
    assert scorer.preprocess == module.torchvision_preprocess(224)


@pytest.mark.parametrize("free, turns", [(1000, False), (599, True)])
def test_scorers_take_turns_where_the_gpu_cannot_hold_them(monkeypatch, free, turns):
    """1.5 times the weights must fit: here 2 x 200 bytes of weights, none of which are there yet."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    models = [torch.nn.Linear(50, 1, bias=False) for _ in range(2)]
    assert are_too_large(models, SimpleNamespace(type="cuda")) == turns
    assert not are_too_large(models, torch.device("cpu"))


@pytest.mark.parametrize("in_turn, places", [(True, ["meta", "cpu"]), (False, ["meta", "meta"])])
def test_scorers_that_take_turns_leave_the_device_again(monkeypatch, in_turn, places):
    moves = []
    scorer = SimpleNamespace(preprocess=None, to=lambda device: moves.append(str(device)))
    monkeypatch.setattr(module, "check_device", torch.device)
    monkeypatch.setattr(module, "prepare", lambda *given: {})
    monkeypatch.setattr(module, "score_block", lambda metric, scorer, rows, size: [0.0] * len(rows))
    rows = [("image", "prompt")] * 3
    assert len(list(module.score_rows(rows, {"clip": scorer}, device="meta", in_turn=in_turn))) == 3
    assert moves == places


def test_models_take_turns_less_often_than_batches(monkeypatch):
    """Moving a model to the device and back takes longer than a batch."""
    blocks = []
    scorer = SimpleNamespace(preprocess=None, to=lambda device: None)
    monkeypatch.setattr(module, "prepare", lambda *given: {})
    monkeypatch.setattr(
        module, "score_block", lambda metric, scorer, rows, size: blocks.append(len(rows)) or [0.0] * len(rows)
    )
    list(module.score_rows([("image", "prompt")] * 600, {"clip": scorer}, batch_size=8, in_turn=True))
    assert blocks == [512, 88]
