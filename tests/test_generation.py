"""Images of prompt groups: equal to stock pipelines, independent of how they are split, resumed, never mixed."""

import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler
from PIL import Image
from recording import edit_json, run_on_ranks
from safetensors.torch import save_file

import eval_generate
from sdpo import generation
from sdpo.command import InputError, parse_flags
from sdpo.families import RELEASED, load_family
from sdpo.generation import (
    EvalConfig,
    EvalRun,
    describe_images,
    find_damage,
    find_groups,
    hash_weights,
    locate_unet,
    results_folder,
    save_image,
)
from sdpo.manifest import read_manifest, require_images
from sdpo.sampling import draw_noise, sample
from sdpo.tiny import compare, pictures

ROOT = Path(__file__).parents[1]
PROMPTS = [
    "a small red circle on a blue background",
    "un pêcheur 🍂",
    "a large white square on a red background ",
    "x",
    "a y",
]
NAME = "few_seed0_32x32_4s_7.5cfg"
TINY = [
    "--unet_path=base", f"--pretrain_path={compare.BASE}", "--steps=4", "--dtype=fp32", "--guidance=standard", "--cfg=1",
    "--noise=per-prompt", "--metrics=Pixels", "--output_path=run",
]  # fmt: skip
TINY_NAME = "tiny_seed0_32x32_4s_1.0cfg"


@pytest.fixture
def arguments(bases, tmp_path):
    """Flags of a short run over PROMPTS: `run/NAME` holds its images."""
    (tmp_path / "few.json").write_text(json.dumps(PROMPTS))

    def build(*flags, family="sd15", out="run", unet="base"):
        common = {
            "unet_path": unet, "pretrain_path": bases[family, "epsilon"], "test_json": tmp_path / "few.json",
            "steps": 4, "dtype": "fp32", "output_path": tmp_path / out,
        }  # fmt: skip
        return [*(f"--{name}={value}" for name, value in common.items()), "--metrics", "none", *flags]

    return build


def pixels(folder, count=5):
    return np.stack([np.asarray(Image.open(folder / f"{i}_32x32.png")) for i in range(count)]).astype(int)


def other_unet(bases):
    """The UNet of a base with other weights."""
    unet = load_family("sd15", str(bases["sd15", "epsilon"])).load_unet()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.01
    return unet


# Sampling


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_official_guidance_is_the_stock_pipeline_at_one_more(bases, family):
    model = load_family(family, str(bases[family, "epsilon"]))
    pipeline = DiffusionPipeline.from_pretrained(bases[family, "epsilon"])
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    noise = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    ours = {
        rule: sample(model, model.load_unet(), PROMPTS[:3], noise, 10, 7.5, rule) for rule in ("official", "standard")
    }
    stock = {}
    for scale in (7.5, 8.5):
        options = {"negative_prompt": [""] * 3, "num_inference_steps": 10, "guidance_scale": scale, "output_type": "np"}
        images = pipeline(PROMPTS[:3], latents=noise.clone(), height=32, width=48, **options).images
        stock[scale] = (images * 255).round()
    assert abs(ours["official"] - stock[8.5]).max() <= 1 and abs(ours["standard"] - stock[7.5]).max() <= 1
    assert abs(ours["official"] - stock[7.5]).max() > 1  # the two rules can be told apart
    assert stock[8.5].std() > 5


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_bf16_is_the_official_arithmetic_to_the_bit(bases, family):
    model = load_family(family, str(bases[family, "epsilon"]))
    unet = model.load_unet().to(torch.bfloat16)
    for encoder in model.text_encoders:
        encoder.to(torch.bfloat16)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    ours = sample(model, unet, PROMPTS[:3], noise.expand(3, -1, -1, -1), 10, 7.5, "official")

    scheduler = EulerDiscreteScheduler.from_config(model.scheduler.config)
    for prompt, image in zip(PROMPTS, ours, strict=False):  # one at a time, everything in bf16 but the decoder
        states = [model.encode_captions([text], 32) for text in (prompt, "")]
        cond = {name: torch.cat([s[name] for s in states]).bfloat16() for name in states[0]}
        text = cond.pop("encoder_hidden_states")
        scheduler.set_timesteps(10)
        latents = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(latents, t).repeat(2, 1, 1, 1)
            with_text, without = unet(inputs, t, text, added_cond_kwargs=cond, return_dict=False)[0].chunk(2)
            latents = scheduler.step(with_text + 7.5 * (with_text - without), t, latents, return_dict=False)[0]
        decoded = model.vae.decode(latents.float() / model.vae.config.scaling_factor).sample
        expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).byte().numpy()
        assert np.array_equal(image, expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_of_a_seed_is_drawn_anew_for_each_image(dtype):
    noise = draw_noise((4, 8, 8), [5, 5, 6], torch.device("cpu"), dtype)
    expected = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s), dtype=dtype) for s in (5, 5, 6)]
    assert torch.equal(noise, torch.cat(expected)) and noise.dtype == dtype


CONFIGS = {  # of base models on the hub, which leave out what diffusers has defaults for
    "pndm": {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": False},
    "euler": {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "timestep_spacing": "leading"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_euler_follows_the_base_models_own_scheduler(bases, tmp_path, name):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    base = tmp_path / "base"
    (base / "scheduler").mkdir(parents=True)
    for path in bases["sd15", "epsilon"].iterdir():
        if path.name != "scheduler":
            (base / path.name).symlink_to(path)
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps({**CONFIGS[name], **betas}))
    ours = EulerDiscreteScheduler.from_config(load_family("sd15", str(base)).scheduler.config)
    stock = EulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")
    for scheduler in (ours, stock):
        scheduler.set_timesteps(50)
    assert torch.equal(ours.timesteps, stock.timesteps) and torch.equal(ours.sigmas, stock.sigmas)
    assert ours.timesteps[0] == {"pndm": 999, "euler": 981}[name]


def test_precision_is_as_asked(arguments, bases, monkeypatch):
    seen = {}

    def record(family, unet, captions, noise, *_):
        seen.update(unet=unet.dtype, text=family.text_encoders[0].dtype, vae=family.vae, noise=noise)
        return np.zeros((len(captions), 32, 32, 3), np.uint8)

    monkeypatch.setattr("sdpo.generation.sample", record)  # records what sampling is given
    eval_generate.main(arguments("--dtype=bf16", "--latents_dtype=fp32", "--batch_size=5"))
    assert seen["unet"] == seen["text"] == torch.bfloat16
    drawn = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    assert torch.equal(seen["noise"], drawn.float().expand(5, -1, -1, -1))  # official noise, kept in fp32
    original = load_family("sd15", str(bases["sd15", "epsilon"])).vae.state_dict()
    assert all(torch.equal(value, original[name]) for name, value in seen["vae"].state_dict().items())
    eval_generate.main(arguments("--dtype=bf16", "--batch_size=5", out="other"))
    assert seen["noise"].dtype == torch.bfloat16


# Groups


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_files_are_the_official_ones(arguments, tmp_path, family):
    manifests = eval_generate.main(arguments("--zip", family=family))
    folder = tmp_path / "run" / NAME
    assert manifests == {"few": tmp_path / "run" / f"{NAME}.json"}
    names = [f"{i}_32x32.png" for i in range(len(PROMPTS))]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "fingerprint.json"])
    rows = json.loads(manifests["few"].read_text())
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["gen_image_path"] for row in rows] == [str(folder / name) for name in names]
    checkpoint = json.loads((folder / "fingerprint.json").read_text())["settings"]["checkpoint"]
    extra = {"raw_image_path": "", "metadata": {}, "seed": 0, "guidance": "official", "checkpoint": checkpoint}
    assert all({key: row[key] for key in extra} == extra for row in rows)
    require_images(read_manifest(manifests["few"]))
    for name, prompt in zip(names, PROMPTS, strict=True):
        with Image.open(folder / name) as image:
            assert image.size == (32, 32) and image.mode == "RGB"
            assert image.getexif()[270].encode("latin-1").decode() == prompt  # Pillow reads bytes as Latin-1
    with zipfile.ZipFile(tmp_path / "run" / f"{NAME}.zip") as archive:
        assert archive.namelist() == names and archive.testzip() is None


def test_images_without_a_date_are_packed(tmp_path):
    """Some file systems say 1970, and zip files begin with 1980."""
    (tmp_path / "0.png").write_bytes(b"x")
    os.utime(tmp_path / "0.png", (0, 0))
    generation.pack([tmp_path / "0.png"], tmp_path / "all.zip")
    assert zipfile.ZipFile(tmp_path / "all.zip").namelist() == ["0.png"]


def test_images_do_not_depend_on_batch_order_or_ranks(arguments, tmp_path):
    flags = ["--noise=per-prompt", "--seed=3"]
    said = run_on_ranks(2, ROOT / "eval_generate.py", arguments("--batch_size=2", *flags, out="two"))
    assert "5 prompts, 0 images there, 5 to make (processes: 2, batch size: 2)" in said
    name = NAME.replace("seed0", "seed3")
    two = pixels(tmp_path / "two" / name)
    for size in (1, 4):
        eval_generate.main(arguments(f"--batch_size={size}", *flags, out=f"batch-{size}"))
        assert abs(pixels(tmp_path / f"batch-{size}" / name) - two).max() <= 1
    (tmp_path / "few.json").write_text(json.dumps(PROMPTS[1:]))  # the first image comes to the second prompt
    eval_generate.main(arguments("--noise=per-prompt", "--seed=4", out="rest"))
    rest = pixels(tmp_path / "rest" / NAME.replace("seed0", "seed4"), 4)
    assert abs(rest - two[1:]).max() <= 1
    rows = json.loads((tmp_path / "two" / f"{name}.json").read_text())
    assert [row["seed"] for row in rows] == [3, 4, 5, 6, 7]
    assert all(abs(a - b).max() > 1 for a, b in itertools.pairwise(two))


def test_only_what_is_missing_is_made(arguments, tmp_path, capsys):
    eval_generate.main(arguments())
    folder = tmp_path / "run" / NAME
    files = [folder / f"{i}_32x32.png" for i in range(len(PROMPTS))]
    whole = [path.read_bytes() for path in files]
    files[0].unlink()
    files[1].write_bytes(whole[1][:-100])  # cut off
    files[2].write_bytes(whole[2][:300] + bytes([whole[2][300] ^ 1]) + whole[2][301:])  # one bit of its pixels
    Image.new("RGB", (8, 8)).save(files[3])
    (folder / "4_32x32.png.partial").write_bytes(b"half")
    before = files[4].stat().st_mtime_ns
    capsys.readouterr()
    eval_generate.main(arguments("--batch_size=3"))
    said = capsys.readouterr().err
    assert files[4].stat().st_mtime_ns == before
    again = pixels(folder)
    for path, content in zip(files, whole, strict=True):
        path.write_bytes(content)
    assert abs(again - pixels(folder)).max() <= 1
    assert "1 images there, 4 to make" in said
    damaged = [line for line in said.splitlines() if "is damaged" in line]
    assert [str(files[i]) in text for i, text in enumerate(damaged, 1)] == [True] * 3
    assert "8 x 8 pixels" in damaged[2]


@pytest.mark.parametrize("mode, kind", [("RGB", "JPEG"), ("L", "PNG"), ("RGBA", "PNG")])
def test_files_of_another_kind_are_not_images_of_a_run(tmp_path, mode, kind):
    path = tmp_path / "0_32x32.png"
    Image.new(mode, (32, 32)).save(path, kind)
    assert find_damage(path, 32, 32, "p") == f"{kind} of mode {mode}"


@pytest.mark.parametrize("prompt", ["a cat", "", "naïve 東京 🦊", " a\0b\nc ", "é" * 3000])
def test_an_image_is_that_of_the_prompt_that_it_names(tmp_path, prompt):
    save_image(tmp_path / "0.png", np.zeros((8, 8, 3), np.uint8), prompt)
    assert find_damage(tmp_path / "0.png", 8, 8, prompt) == ""
    assert find_damage(tmp_path / "0.png", 8, 8, prompt + "x") == "an image of another prompt"
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")  # names none
    assert find_damage(tmp_path / "1.png", 8, 8, prompt) == ""


@pytest.mark.parametrize(
    "part, values",
    {
        "vae/config.json": {"scaling_factor": 0.5},
        "text_encoder/config.json": {"hidden_act": "gelu"},
        "unet/config.json": {"flip_sin_to_cos": False},
        "scheduler/scheduler_config.json": {"beta_end": 0.013},
    }.items(),
)
def test_other_settings_of_the_base_are_refused(arguments, bases, tmp_path, part, values):
    """Its weights are the same, its images would not be."""
    eval_generate.main(arguments())
    copy = shutil.copytree(bases["sd15", "epsilon"], tmp_path / "base")
    eval_generate.main(arguments(f"--pretrain_path={copy}"))
    edit_json(copy / part, **values)
    with pytest.raises(InputError, match=r"holds images made with other settings .*the base .* was"):
        eval_generate.main(arguments(f"--pretrain_path={copy}"))


def test_a_base_whose_files_leave_out_defaults_is_the_same(arguments, bases, tmp_path):
    """Files on the hub do, those that a library saves again do not."""
    eval_generate.main(arguments())
    copy = shutil.copytree(bases["sd15", "epsilon"], tmp_path / "base")
    edit_json(copy / "vae/config.json", act_fn=None, latent_channels=None, layers_per_block=None, force_upcast=None)
    edit_json(copy / "unet/config.json", act_fn=None, flip_sin_to_cos=None, dropout=None, time_embedding_type=None)
    edit_json(copy / "text_encoder/config.json", hidden_act=None, layer_norm_eps=None, dtype=None)
    edit_json(copy / "scheduler/scheduler_config.json", num_train_timesteps=None)
    eval_generate.main(arguments(f"--pretrain_path={copy}"))
    edit_json(copy / "scheduler/scheduler_config.json", timestep_spacing=None)  # whose default is Euler's own
    with pytest.raises(InputError, match=r"holds images made with other settings .*the base .* was"):
        eval_generate.main(arguments(f"--pretrain_path={copy}"))


def test_images_need_not_be_square(arguments, tmp_path, capsys):
    eval_generate.main(arguments("--height=16"))  # the width is the base's own
    folder = tmp_path / "run" / "few_seed0_16x32_4s_7.5cfg"
    with Image.open(folder / "4_16x32.png") as image:
        assert image.size == (32, 16)
    assert "damaged" not in capsys.readouterr().err
    Image.new("RGB", (16, 32)).save(folder / "4_16x32.png")
    eval_generate.main(arguments("--height=16", "--width=32"))
    assert "4_16x32.png is damaged (16 x 32 pixels)" in capsys.readouterr().err


@pytest.mark.parametrize("size", [None, [8, 8]])
def test_a_base_that_does_not_say_its_size_needs_a_resolution(arguments, bases, tmp_path, size):
    copy = shutil.copytree(bases["sd15", "epsilon"], tmp_path / "base")
    edit_json(copy / "unet" / "config.json", sample_size=size)
    with pytest.raises(InputError, match="does not say how large its images are: give --resolution"):
        eval_generate.main(arguments(f"--pretrain_path={copy}"))
    eval_generate.main(arguments(f"--pretrain_path={copy}", "--resolution=32"))


def test_images_of_a_checkpoint_are_kept_outside_of_it(arguments, bases, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    torch.save(other_unet(bases).state_dict(), checkpoint / "unet.pth")
    (checkpoint / "files.json").touch()
    for path in (checkpoint, checkpoint / "unet.pth"):
        flags = [flag for flag in arguments() if not flag.startswith("--output_path")]
        (manifest,) = eval_generate.main([*flags, f"--unet_path={path}"]).values()
        assert manifest.parent == tmp_path / "run" / "eval-checkpoint-2"
    (entry, *_) = json.loads(manifest.read_text())
    assert (entry["steps"], entry["cfg"], entry["guidance"], entry["dtype"]) == (4, 7.5, "official", "fp32")
    shutil.move(checkpoint / "unet.pth", checkpoint / "unet_ema.pth")
    (manifest,) = eval_generate.main([*flags, f"--unet_path={checkpoint / 'unet_ema.pth'}"]).values()
    assert manifest.parent == tmp_path / "run" / "eval-checkpoint-2" / "eval-ema"


def test_the_folder_of_a_checkpoint_is_known_from_within_it(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-2").mkdir()
    monkeypatch.chdir(tmp_path / "checkpoint-2")
    assert results_folder(Path()) == Path()
    Path("files.json").touch()
    assert results_folder(Path()) == tmp_path / "eval-checkpoint-2"
    monkeypatch.chdir(tmp_path)
    assert results_folder(Path("checkpoint-2")) == Path("eval-checkpoint-2")  # as manifests then spell their images


def test_images_that_overflow_are_not_kept(arguments, bases, tmp_path):
    unet = other_unet(bases)
    unet.conv_out.weight.data *= 1e38
    torch.save(unet.state_dict(), tmp_path / "unet.pth")
    with pytest.raises(InputError, match="an image has pixels that are not finite: use --dtype bf16 or fp32"):
        eval_generate.main(arguments(f"--unet_path={tmp_path / 'unet.pth'}"))
    assert not list(tmp_path.rglob("*.png"))


def test_a_manifest_never_lacks_images(arguments, tmp_path, monkeypatch):
    """As on several machines whose disks are not shared."""
    monkeypatch.setattr(generation, "save_image", lambda path, *_: None if path.name[0] == "3" else path.touch())
    with pytest.raises(InputError, match=r"1 of 5 images of few are not there, the first .*3_32x32\.png"):
        eval_generate.main(arguments())
    assert not (tmp_path / "run" / f"{NAME}.json").exists()


def test_images_made_anew_have_no_manifest_of_earlier_ones(arguments, tmp_path, monkeypatch):
    eval_generate.main(arguments())
    shutil.rmtree(tmp_path / "run" / NAME)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generation, "make_images", Mock(side_effect=KeyboardInterrupt))
        eval_generate.main(arguments("--seed=0"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [NAME, f"{NAME}.json.old", "report.html"]


def test_of_two_commands_the_first_claims_the_folder(arguments, monkeypatch):
    """Also where the other one saw no fingerprint."""
    eval_generate.main(arguments())
    exists, asked = Path.exists, []

    def seen(path):
        if path.name == "fingerprint.json" and not asked:
            asked.append(path)
            return False
        return exists(path)

    monkeypatch.setattr(Path, "exists", seen)
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    with pytest.raises(InputError, match="guidance was official, is standard"):
        eval_generate.main(arguments("--guidance=standard"))


def test_a_scheduler_that_euler_steps_cannot_follow_is_named(arguments, bases, tmp_path):
    copy = shutil.copytree(bases["sd15", "epsilon"], tmp_path / "base")
    edit_json(copy / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid")  # which DDPM knows
    with pytest.raises(InputError, match=r"scheduler of .*base does not support Euler sampling \(.*sigmoid.*\)"):
        eval_generate.main(arguments(f"--pretrain_path={copy}"))


def test_another_tokenizer_of_the_base_is_refused(arguments, bases, tmp_path):
    eval_generate.main(arguments())
    copy = shutil.copytree(bases["sd15", "epsilon"], tmp_path / "base")
    path = copy / "tokenizer" / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["model"]["merges"].pop()
    path.write_text(json.dumps(rules))
    with pytest.raises(InputError, match=r"holds images made with other settings .*the base .* was"):
        eval_generate.main(arguments(f"--pretrain_path={copy}"))


def test_other_settings_or_weights_are_refused(arguments, bases, tmp_path):
    eval_generate.main(arguments())
    folder = tmp_path / "run" / NAME
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*") if path.is_file()}
    torch.save(other_unet(bases).state_dict(), tmp_path / "unet.pth")
    for flags, message in {
        ("--guidance=standard",): "guidance was official, is standard",
        ("--noise=per-prompt",): "noise was shared, is per-prompt",
        ("--dtype=bf16",): "dtype was fp32, is bf16; latents_dtype was fp32, is bf16",
        (f"--unet_path={tmp_path / 'unet.pth'}",): r"\(checkpoint was [0-9a-f]{12}, is [0-9a-f]{12}\)",
        (f"--pretrain_path={bases['sd15', 'v_prediction']}",): r"the base \(VAE, .*\) was",
    }.items():
        with pytest.raises(
            InputError, match=rf"{NAME} holds images made with other settings .*{message}.* another --output_path"
        ):
            eval_generate.main(arguments(*flags))
    (tmp_path / "few.json").write_text(json.dumps(PROMPTS[::-1]))
    with pytest.raises(InputError, match="prompts was"):
        eval_generate.main(arguments())
    assert {path: path.read_bytes() for path in before} == before
    (folder / "fingerprint.json").write_text("[]")
    with pytest.raises(InputError, match="does not say what made the images"):
        eval_generate.main(arguments())
    (folder / "fingerprint.json").unlink()  # as in a folder of the official code
    advice = rf"{NAME} holds images but no fingerprint\.json.*sdpo\.scoring .*{NAME}\.json` scores them"
    with pytest.raises(InputError, match=advice):
        eval_generate.main(arguments())
    packed = tmp_path / "run" / f"{NAME}.zip"
    packed.touch()
    shutil.rmtree(folder)  # its images are in the zip file only
    with pytest.raises(InputError, match=rf"{NAME}\.zip holds images of an earlier run.*move it away"):
        eval_generate.main(arguments())
    assert packed.exists() and (tmp_path / "run" / f"{NAME}.json").exists()


def test_a_refused_command_claims_no_folder(arguments, tmp_path):
    """Neither where another group is refused, nor where scores cannot be computed."""
    few, other = (f"{tmp_path / name}.json" for name in ("few", "other"))
    Path(other).write_text(json.dumps(PROMPTS[:1]))
    flags = [flag for flag in arguments() if not flag.startswith("--test_json")]
    eval_generate.main([*flags, f"--test_json={other}"])
    manifest = tmp_path / "run" / f"{NAME}.json"
    manifest.write_text("[]")
    for more, message in {
        ("--guidance=standard", "--test_json", few, other): "guidance was official",
        (f"--test_json={few}", "--metrics=CLIP", f"--weights=clip.checkpoint={manifest}"): "no image was made",
    }.items():
        with pytest.raises(InputError, match=message):
            eval_generate.main([*flags, *more])
        assert manifest.exists() and not (tmp_path / "run" / NAME).exists()


def test_a_folder_that_was_claimed_for_nothing_may_be_removed(arguments, tmp_path, monkeypatch):
    """As where the first images overflow in fp16, and the fix is another precision."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generation, "make_images", Mock(side_effect=KeyboardInterrupt))
        eval_generate.main(arguments())
    message = rf"{NAME} is kept for images of other settings \(noise was shared.*\), but has none: remove it, unless"
    with pytest.raises(InputError, match=message):
        eval_generate.main(arguments("--noise=per-prompt"))
    shutil.rmtree(tmp_path / "run" / NAME)
    eval_generate.main(arguments("--noise=per-prompt"))


def test_scores_of_two_models_are_refused_before_images_are_made(tmp_path):
    captions = [spec.caption for spec in pictures.HELD_OUT[:4]]
    for name, prompts in {"a": captions[:2], "b": captions[2:]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(prompts))
    flags = ["--unet_path=base", f"--pretrain_path={compare.BASE}", f"--output_path={tmp_path / 'out'}", "--steps=2"]
    flags += ["--dtype=fp32", "--metrics=Pixels", "--test_json", str(tmp_path / "a.json")]
    eval_generate.main(flags)
    path = tmp_path / "out" / "scores.jsonl"
    path.write_text(path.read_text().replace('"official"', '"bf16"'))
    before = path.read_text()
    with pytest.raises(InputError, match=r"scores of Pixels by another model \(bf16\) than .*; no image was made"):
        eval_generate.main([*flags, str(tmp_path / "b.json")])
    assert path.read_text() == before and not list((tmp_path / "out").glob("b_*/*.png"))
    eval_generate.main([*flags, str(tmp_path / "b.json"), "--metrics=none"])  # the images alone
    with pytest.raises(InputError, match=r"Pixels come from different models \(a: bf16, b: official\)"):
        eval_generate.main([*flags, str(tmp_path / "b.json")])
    assert path.read_text() == before


def test_a_killed_run_leaves_whole_images_and_is_resumed(tmp_path):
    flags = ["--output_path", str(tmp_path / "out"), "--batch_size", "1", "--steps", "4"]
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "scripts" / "eval" / "test_tiny.sh"), "base", *flags]
    folder = tmp_path / "out" / TINY_NAME
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as run:
        while len(list(folder.glob("*.png"))) < 3:
            assert run.poll() is None
            time.sleep(0.01)
        os.kill(run.pid, signal.SIGKILL)
    made = sorted(folder.glob("*.png"))
    assert 3 <= len(made) < 80 and not (folder.parent / f"{folder.name}.json").exists()
    for path in made:
        Image.open(path).load()
    before = {path: path.stat().st_mtime_ns for path in made}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"{len(made)} images there, {80 - len(made)} to make" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in made} == before
    assert len(json.loads((folder.parent / f"{folder.name}.json").read_text())) == 80


# What is evaluated


def test_a_unet_is_found_in_every_form(arguments, bases, tmp_path):
    unet = other_unet(bases)
    state, forms = unet.state_dict(), tmp_path / "forms"
    for name in ("file", "tensors", "trained"):
        (forms / name).mkdir(parents=True)
    torch.save(state, forms / "file" / "unet.pth")
    save_file(state, forms / "tensors" / "unet.safetensors")
    torch.save(state, forms / "trained" / "unet.pth")
    pipeline = DiffusionPipeline.from_pretrained(bases["sd15", "epsilon"])
    pipeline.save_pretrained(forms / "trained")  # unet.pth comes first
    pipeline.unet = unet
    pipeline.save_pretrained(forms / "diffusers")
    unet.save_pretrained(forms / "bare")
    sources = ["file/unet.pth", "tensors/unet.safetensors", "trained", "diffusers", "bare"]
    checkpoints = set()
    for source in sources:
        given = [a for a in arguments("--steps=1", unet=forms / source) if not a.startswith("--output_path")]
        manifest = eval_generate.main(given)["few"]
        assert manifest.parent == (forms / source if (forms / source).is_dir() else (forms / source).parent)
        checkpoints |= {row["checkpoint"] for row in json.loads(manifest.read_text())}
    assert len(checkpoints) == 1
    base = json.loads(eval_generate.main(arguments("--steps=1"))["few"].read_text())[0]["checkpoint"]
    assert base not in checkpoints


def test_published_checkpoints_have_short_names():
    assert len(RELEASED) == 6
    assert RELEASED["sdpo-sd1.5-diffusion-dpo"] == "AIDC-AI/Diffusion-SDPO:sd1.5/diffusion-dpo/unet.pth"
    assert RELEASED["sdpo-sdxl-dmpo"] == "AIDC-AI/Diffusion-SDPO:sdxl/dmpo/unet.pth"


def test_a_hub_reference_is_read_from_the_cache(tmp_path):
    file = tmp_path / "models--AIDC-AI--Diffusion-SDPO" / "snapshots" / ("0" * 40) / "sd1.5" / "dspo" / "unet.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    refs = tmp_path / "models--AIDC-AI--Diffusion-SDPO" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    for reference in ("sdpo-sd1.5-dspo", RELEASED["sdpo-sd1.5-dspo"]):
        found, folder = locate_unet(EvalConfig(reference, "base", cache_dir=str(tmp_path)))
        assert Path(found) == file and folder == Path("output/eval/AIDC-AI--Diffusion-SDPO--sd1.5--dspo")


@pytest.mark.parametrize("name", ["base", "sdpo-sdxl-dmpo"])
def test_a_folder_that_is_called_like_a_published_model_is_not_taken_for_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "unet.pth").touch()
    with pytest.raises(InputError, match=f"--unet_path {name} names a published model, .* write ./{name} for that"):
        locate_unet(EvalConfig(name, "model"))
    assert locate_unet(EvalConfig(f"./{name}", "model"))[0].endswith("unet.pth")


def wide_vae(bases, tmp_path):
    config = AutoencoderKL.load_config(bases["sd15", "epsilon"] / "vae")
    AutoencoderKL.from_config({**config, "latent_channels": 8}).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def shifted_vae(bases, tmp_path):
    folder = shutil.copytree(bases["sd15", "epsilon"] / "vae", tmp_path / "shifted")
    edit_json(folder / "config.json", shift_factor=0.1)
    return folder


def test_unusable_input_is_named(arguments, bases, tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").touch()
    for flags, message in {
        (f"--unet_path={tmp_path / 'begun'}",): "training in .*begun has not ended: name one of its checkpoint-N",
        ("--width=36",): "--resolution, --height and --width must be multiples of 8, got 36",
        ("--metrics", "none", "Pixels"): "--metrics none goes with no other",
        ("--metrics", "Pixels", "--weights", "hpsv2.checkpoint=x.pt"): "hpsv2.checkpoint belongs to a metric that is not scored",
        ("--metrics", "HPSv2", "--weights", "hpsv2.checkpoint=x.pt"): "there is no weights file x.pt",
        (f"--vae_path={wide_vae(bases, tmp_path)}",): "wide makes latents of 8 channels, the UNet takes 4: name the VAE of",
        (f"--vae_path={shifted_vae(bases, tmp_path)}",): "shifted shifts its latents, which is not supported",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message) as error:
            eval_generate.main(arguments(*flags))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_launchers_say_what_is_missing(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "HF_HUB_CACHE": str(tmp_path)}
    scripts = ROOT / "scripts" / "eval"
    command = ["bash", scripts / "test_sdxl.sh", "base", "--groups", "smoke"]
    result = subprocess.run(command, env={**environment, "GPUS": "1"}, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot fetch model_index.json of stabilityai/stable-diffusion-xl-base-1.0")
    assert len(result.stderr.splitlines()) == 1


def test_scorers_are_tried_out_before_images_are_made(arguments, tmp_path):
    (tmp_path / "clip").mkdir()
    flags = ["--metrics", "PickScore", "--weights", f"pickscore.model={tmp_path / 'clip'}"]
    with pytest.raises(InputError, match=r"pickscore: cannot load CLIPModel of .*clip.*no image was made"):
        eval_generate.main(arguments(*flags))
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.rank1.jsonl"])
def test_a_damaged_score_file_is_named_before_images_are_made(arguments, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("[1]\n")
    with pytest.raises(InputError, match=rf"{name}, line 1: not an object"):
        eval_generate.main(arguments())
    assert not list(tmp_path.rglob("*.png"))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The output folder of a run over the group `tiny`, its scores included, and what it printed."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        eval_generate.main([*TINY, "--groups=tiny"])
    return folder / "run", printed.getvalue()


@pytest.fixture
def tiny(tiny_run, tmp_path, monkeypatch):
    """A copy of that folder, in a working directory of its own."""
    shutil.copytree(tiny_run[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_generated_images_are_scored_and_summed_up(tiny, tiny_run):
    """A second run computes nothing anew."""
    entries = json.loads((tiny / f"{TINY_NAME}.json").read_text())
    scores = [json.loads(line) for line in (tiny / "scores.jsonl").read_text().splitlines()]
    expected = [pictures.score(np.asarray(Image.open(row["gen_image_path"])), row["prompt"]) for row in entries]
    assert [row["Pixels"] for row in scores] == pytest.approx(expected)
    (row,) = json.loads((tiny / "summary.json").read_text())
    assert (row["group"], row["metric"], row["n"]) == ("tiny", "Pixels", 4 * len(pictures.HELD_OUT))
    assert row["mean"] == pytest.approx(np.mean(expected))
    line = f"FinalResults Pixels for tiny : {np.mean(expected):.4f}"
    assert line in tiny_run[1].splitlines()  # alone there, for scripts that read it
    assert line in (tiny / "joint_test_32.log").read_text().splitlines()
    assert (tiny / "report.html").read_text().count('.png"') == len(entries)
    before = (tiny / "scores.jsonl").stat().st_mtime_ns
    eval_generate.main([*TINY, "--groups=tiny"])
    assert (tiny / "scores.jsonl").stat().st_mtime_ns == before


def test_pictures_without_pixel_checks_are_refused_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text(json.dumps(["a cat in the rain"]))
    for flags, message in {
        ("--test_json=mine.json",): "'a cat in the rain' is not a caption of the tiny pictures; .*; no image was made",
        ("--groups=tiny", "--resolution=40"): r"pixel checks are of 32 x 32 pixels, images have \(40, 40\); or choose",
    }.items():
        with pytest.raises(InputError, match=message):
            eval_generate.main([*TINY, *flags])
    assert not list(tmp_path.rglob("*.png"))


def test_a_unet_that_was_trained_with_another_vae_or_prediction_is_noticed(arguments, bases, tmp_path, capsys):
    run = tmp_path / "trained"
    base, other = bases["sd15", "epsilon"], bases["sd15", "v_prediction"]
    run.mkdir()
    torch.save(other_unet(bases).state_dict(), run / "unet.pth")
    settings = {
        "pretrained_model_name_or_path": os.path.relpath(base),
        "pretrained_vae_model_name_or_path": str(base / "vae"),
    }
    (run / "config.json").write_text(json.dumps({"config": settings}))
    eval_generate.main(arguments(unet=run))
    assert (
        f"was trained with VAE {base / 'vae'}, images are made with the VAE of its base: see" in capsys.readouterr().err
    )
    eval_generate.main(arguments(f"--vae_path={base / 'vae'}/", unet=run, out="again"))
    assert "was trained" not in capsys.readouterr().err
    (run / "config.json").write_text(json.dumps({"config": settings | {"pretrained_model_name_or_path": "a/base"}}))
    eval_generate.main(arguments(f"--vae_path={base / 'vae'}", unet=run, out="again"))
    assert f"was trained from a/base, images are made with the other parts of {base}: see" in capsys.readouterr().err
    (run / "checkpoint-1").mkdir()
    for name in ("unet.pth", "files.json"):
        (run / "checkpoint-1" / name).touch()
    for unet in (run, run / "unet.pth", run / "checkpoint-1"):
        with pytest.raises(InputError, match=r"--pretrain_path is missing: give .*; .* was trained from a/base$"):
            eval_generate.main([f"--unet_path={unet}", "--groups=tiny"])
    shutil.copytree(other / "scheduler", run / "scheduler")
    with pytest.raises(InputError, match=r"trained makes v_prediction predictions, .* epsilon ones: give the base"):
        eval_generate.main(arguments(unet=run))


def test_the_summary_is_of_all_groups_whose_scores_go_together(tiny, capsys):
    Path("one.json").write_text(json.dumps([pictures.HELD_OUT[0].caption]))

    def summed_up(*more):
        eval_generate.main([*TINY, "--test_json=one.json", *more])
        return [row["group"] for row in json.loads((tiny / "summary.json").read_text())]

    assert summed_up() == ["one", "tiny"]
    kept = (tiny / "scores.jsonl").read_text()
    (tiny / "scores.jsonl").write_text(kept.replace('"official"', '"bf16"', 3))
    assert summed_up() == ["one"]  # scores of `tiny` are not those of one model
    assert "tiny is left out of the summary: " in capsys.readouterr().err
    (tiny / "scores.jsonl").write_text(kept)
    picture = tiny / TINY_NAME / "3_32x32.png"
    content = picture.read_bytes()
    Image.new("RGB", (32, 32)).save(picture)
    assert summed_up() == ["one"]  # a picture of `tiny` was not scored
    assert "tiny is left out of the summary: " in capsys.readouterr().err
    picture.write_bytes(content)
    assert summed_up("--seed=1") == ["one"]  # made otherwise


def test_ranks_compute_the_scores_that_are_missing(tiny):
    rows = (tiny / "scores.jsonl").read_text().splitlines(keepends=True)
    (tiny / "scores.jsonl").write_text("".join(rows[:10]))
    (tiny / "scores.ranking.jsonl").write_text(rows[0].replace("Pixels", "Other"))  # a user's
    (tiny / "scores.rank1.jsonl").write_text("".join(rows[10:15]) + rows[15][:9])  # left by a run that was cut off
    said = run_on_ranks(2, ROOT / "eval_generate.py", [*TINY, "--groups=tiny"])
    assert "scoring on cpu: 100%" in said and f"/{math.ceil((len(rows) - 15) / 2)} " in said
    assert sorted((tiny / "scores.jsonl").read_text().splitlines(keepends=True)) == sorted(rows)
    assert [path.name for path in tiny.glob("scores.rank*")] == ["scores.ranking.jsonl"]


def test_an_error_of_one_rank_is_one_sentence_on_every_rank(tmp_path):
    prompts = [pictures.HELD_OUT[0].caption, "no caption of a tiny picture"]
    (tmp_path / "bad.json").write_text(json.dumps(prompts))
    flags = [
        "--unet_path=base",
        f"--pretrain_path={compare.BASE}",
        f"--test_json={tmp_path / 'bad.json'}",
        "--metrics=Pixels",
    ]
    flags += ["--steps=1", "--dtype=fp32", f"--output_path={tmp_path / 'out'}"]
    said = run_on_ranks(2, ROOT / "eval_generate.py", flags, succeeds=False)
    assert said.count("error: pixel checks: ") == 2 and "Connection closed" not in said


def test_lists_are_put_together_where_a_flag_is_given_twice():
    flags = ["--unet_path=base", "--pretrain_path=base", "--weights", "clip.checkpoint=a", "hpsv2.checkpoint=b"]
    flags += ["--weights=pickscore.model=c", "--test_json=a.json", "--test_json=b.json"]
    config = parse_flags(EvalConfig, "", "", flags)
    assert config.sources == {"clip.checkpoint": "a", "hpsv2.checkpoint": "b", "pickscore.model": "c"}
    assert config.test_json == ["a.json", "b.json"]
    with pytest.raises(InputError, match=r"--weights names clip.checkpoint twice: give it once"):
        parse_flags(EvalConfig, "", "", [*flags, "--weights=clip.checkpoint=d"]).sources  # noqa: B018


def test_defaults_are_the_official_settings():
    """Of the official evaluation: 50 steps, seed 0 for every prompt, guidance cond + 7.5 (cond - uncond), bf16 throughout."""
    config = EvalConfig("base", "base")
    assert (config.steps, config.cfg, config.guidance, config.seed, config.noise) == (50, 7.5, "official", 0, "shared")
    assert (config.dtype, config.latents_dtype, config.score_dtype) == ("bf16", None, None)
    assert config.resolution is config.height is config.width is None
    assert sorted(config.score_metrics) == ["Aesthetics", "CLIP", "HPSv2", "ImageReward", "PickScore"]


def test_the_fingerprint_covers_every_weight_and_its_name(bases):
    plain = {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    others = [
        {"a": [1.0, 2.5], "b": [3.0, 4.0]},
        {"a": [1.0, 2.0], "b": [3.0, 4.5]},
        {"a": [1.0, 2.0], "c": [3.0, 4.0]},
    ]

    def digest(state, dtype=torch.float32):
        module = torch.nn.Module()
        for name, values in state.items():
            module.register_buffer(name, torch.tensor(values, dtype=dtype))
        return hash_weights([module])

    assert digest(plain) == digest(dict(reversed(plain.items()))) == digest(plain, torch.float16)
    assert len({digest(state) for state in (plain, *others)}) == 4
    family, config = load_family("sdxl", str(bases["sdxl", "epsilon"])), EvalConfig("base", "base")
    unet = family.load_unet()
    found = [describe_images(config, family, unet, torch.device("cpu"))]
    for part, name in ((family.vae, "base"), (family.text_encoders[1], "base"), (unet, "checkpoint")):
        with torch.no_grad():
            list(part.parameters())[-1].view(-1)[-1] += 1
        found.append(describe_images(config, family, unet, torch.device("cpu")))
        assert [key for key in found[-1] if found[-1][key] != found[-2][key]] == [name]


def test_groups_of_other_weights_are_not_summed_up_with_these(tmp_path):
    made_with = {"checkpoint": "a", "height": 32}
    run = EvalRun(EvalConfig("base", "base"), None, None, None, tmp_path, 32, 32, made_with)
    for group, settings in {
        "same": made_with | {"prompts": "x"}, "weights": made_with | {"checkpoint": "b"}, "size": {"checkpoint": "a"},
    }.items():  # fmt: skip
        run.folder(group).mkdir()
        (run.folder(group) / "fingerprint.json").write_text(json.dumps({"settings": settings}))
        run.beside(group, ".json").write_text("[]")
    run.beside("unknown", ".json").write_text("[]")
    assert find_groups(run) == {"same": run.beside("same", ".json")}
