"""Random pipelines of both families in the hub's own format, and pairs, made offline once for all tests."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
if "SDPO_TEST_GPU" not in os.environ:  # then test_graphs.py runs on the GPU too; other tests expect none
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import train
from sdpo.rng import draw, normal
from sdpo.tiny import make_pairs, pictures
from sdpo.tiny.train_base import TOKENS, build_tokenizer

torch.set_num_threads(1)


def text_config(tokenizer, width):
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=width, max_position_embeddings=TOKENS, bos_token_id=start, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip


def draw_weights(model):
    """Weights drawn by name, so that no library's own initialisation decides them; norms too are not the identity."""
    for name, parameter in model.named_parameters():
        value = normal(0, name, (), tuple(parameter.shape))
        if parameter.dim() > 1:
            parameter.data = value / parameter[0].numel() ** 0.5
        else:
            parameter.data = name.endswith("weight") + 0.05 * value


def build_pipeline(family, prediction_type="epsilon", widths=(8, 16)):
    """A pipeline with some 100,000 random weights; `widths` are the UNet's channels by depth."""
    tokenizer, xl = build_tokenizer(), family == "sdxl"
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 24 + 16,
    }
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(text_config(tokenizer, 16)),
        "vae": AutoencoderKL(
            block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=2,
            up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, sample_size=32,
        ),
        "unet": UNet2DConditionModel(
            sample_size=8, block_out_channels=widths, layers_per_block=1, attention_head_dim=2, norm_num_groups=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32 if xl else 16, **(added if xl else {}),
        ),
        "scheduler": DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
            prediction_type=prediction_type,
        ),
    }  # fmt: skip
    if xl:
        second = build_tokenizer()
        second.pad_token = "!"
        parts |= {"tokenizer_2": second, "text_encoder_2": CLIPTextModelWithProjection(text_config(second, 16))}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    for model in (value for value in parts.values() if isinstance(value, torch.nn.Module)):
        draw_weights(model)
    return (StableDiffusionXLPipeline if xl else StableDiffusionPipeline)(**parts)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folder of a saved pipeline by (family, prediction type)."""
    root, folders = tmp_path_factory.mktemp("bases"), {}
    for key in (("sd15", "epsilon"), ("sd15", "v_prediction"), ("sdxl", "epsilon")):
        folders[key] = root / "-".join(key)
        build_pipeline(*key).save_pretrained(folders[key])
    return folders


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory):
    """Pick-a-Pic style parquet files: 120 training and 24 validation pairs of tiny pictures."""
    folder = tmp_path_factory.mktemp("pairs")
    make_pairs.write_split(pictures.TRAINED, 120, 0, folder / "train.parquet")
    make_pairs.write_split(pictures.HELD_OUT, 24, 1, folder / "validation.parquet")
    return folder


@pytest.fixture(scope="session")
def wide_pairs(tmp_path_factory):
    """A parquet file of 44 pairs, 4 of them ties, of 20 x 16 pixels of noise: 16 pixels are cropped without resizing."""
    rng, rows = draw(0, "wide-pairs"), []
    for i in range(44):
        images = rng.integers(256, size=(2, 16, 20, 3), dtype=np.uint8)
        label = 0.5 if i % 11 == 10 else i % 2
        rows.append({"caption": f"a {'small' if i % 3 else 'large'} circle {i}", "label_0": float(label)})
        rows[-1] |= {name: make_pairs.encode(image) for name, image in zip(("jpg_0", "jpg_1"), images, strict=True)}
    folder = tmp_path_factory.mktemp("wide-pairs")
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


@pytest.fixture(scope="session")
def arguments_in(bases, pairs_folder):
    """Builds the flags of a short run of train.py in a folder: 3 updates of 4 pairs."""

    def build(folder, *flags, family="sd15", prediction="epsilon", out="run"):
        common = {
            "pretrained_model_name_or_path": bases[family, prediction], "train_data_dir": pairs_folder, "resolution": 32,
            "train_batch_size": 2, "global_batch_size": 4, "max_train_steps": 3, "lr_warmup_steps": 1, "learning_rate": 1e-3,
            "beta_dpo": 100, "mixed_precision": "no", "seed": 7, "report_to": "none", "output_dir": folder / out,
        }  # fmt: skip
        given = [f"--{name}={value}" for name, value in common.items()] + ["--sdxl"] * (family == "sdxl")
        return [*given, *map(str, flags)]

    return build


@pytest.fixture
def arguments(arguments_in, tmp_path):
    """Builds the flags of a short run of train.py below the test's folder, `run` unless `out` says otherwise."""
    return partial(arguments_in, tmp_path)


@pytest.fixture
def fp16(monkeypatch):
    """Accelerate takes fp16 for GPUs only; its parts work on a CPU too."""
    start = train.start_accelerator

    def start_in_fp16(config):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = start(config)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)  # at which gradients overflow
        return accelerator

    monkeypatch.setattr(train, "start_accelerator", start_in_fp16)


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Accelerate keeps its state in the process; every test starts without one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
