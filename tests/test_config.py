"""The command line against the official one, what it refuses, warns about and computes, and the launchers."""

import contextlib
import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch

from sdpo.command import InputError, parse_flags, run_command, show
from sdpo.config import Plan, TrainConfig
from sdpo.families import FAMILIES
from sdpo.generation import EvalConfig
from sdpo.losses import PAIR_LOSSES, dmpo
from sdpo.optimizers import OPTIMIZERS, optimizer_name
from sdpo.step import loss_name

LAUNCHERS = Path(__file__).parents[1] / "scripts" / "train"
NEEDED = ("--pretrained_model_name_or_path=model", "--dataset_name=pairs")
PAIRS = 851_293  # of Pick-a-Pic v2 without ties

SD15 = ("stable-diffusion-v1-5/stable-diffusion-v1-5", None, 1e-8)
SDXL = ("stabilityai/stable-diffusion-xl-base-1.0", "madebyollin/sdxl-vae-fp16-fix", 1e-9)
RECIPES = {  # the paper's settings: (base, VAE, learning rate), method, beta, alpha, mu
    "sd15_diffusion_dpo": (SD15, "diffusion-dpo", 5000, 0, 0.9),
    "sd15_dspo": (SD15, "dspo", 0.001, 0, 0.2),
    "sd15_dmpo": (SD15, "dmpo", 2000, 0.01, 0.9),
    "sdxl_diffusion_dpo": (SDXL, "diffusion-dpo", 5000, 0, 0.6),
    "sdxl_dspo": (SDXL, "dspo", 5000, 0, 0.6),
    "sdxl_dmpo": (SDXL, "dmpo", 6000, 0.01, 0.6),
}

TINY = {  # method, beta, alpha, mu
    "tiny_diffusion_dpo": ("diffusion-dpo", 200, 0, 0.9),
    "tiny_dspo": ("dspo", 0.001, 0, 0.2),
    "tiny_dmpo": ("dmpo", 200, 0.01, 0.9),
}

OFFICIAL = {  # flags of the official train.py with their defaults
    "input_perturbation": 0.0,
    "revision": None,
    "dataset_name": None,
    "dataset_config_name": None,
    "train_data_dir": None,
    "image_column": "image",
    "caption_column": "caption",
    "max_train_samples": None,
    "output_dir": "sd-model-finetuned",
    "cache_dir": None,
    "seed": None,
    "resolution": None,
    "random_crop": False,
    "no_hflip": False,
    "train_batch_size": 1,
    "num_train_epochs": 100,
    "max_train_steps": 2000,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": None,
    "learning_rate": 1e-8,
    "scale_lr": False,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 500,
    "use_adafactor": False,
    "allow_tf32": False,
    "dataloader_num_workers": 0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "hub_model_id": None,
    "logging_dir": "logs",
    "mixed_precision": "fp16",
    "report_to": "tensorboard",
    "local_rank": -1,
    "checkpointing_steps": 500,
    "resume_from_checkpoint": "latest",
    "noise_offset": 0.0,
    "tracker_project_name": "tuning",
    "pretrained_vae_model_name_or_path": None,
    "sdxl": False,
    "sft": False,
    "beta_dpo": 5000.0,
    "hard_skip_resume": False,
    "unet_init": "",
    "proportion_empty_prompts": 0.2,
    "split": "train",
    "dreamlike_pairs_only": False,
    "use_winner_preserving": False,
    "winner_preserving_mu": 0.0,
    "dmpo_alpha": 0.0,
    "train_method": "diffusion-dpo",
}
GIVEN = {  # a value to give where the default's type does not say what is allowed
    "max_train_samples": 16,
    "seed": 16,
    "resolution": 16,
    "gradient_checkpointing": "auto",
    "mixed_precision": "bf16",
    "lr_scheduler": "cosine",
    "report_to": "wandb",
    "train_method": "dspo",
}


def parse_config(flags):
    return parse_flags(TrainConfig, "python train.py", "", flags)


def parse(*flags):
    return parse_config([*NEEDED, *flags])


def official_command(name):
    """The official launch command of one recipe, as its users type it."""
    (base, vae, rate), method, beta, alpha, mu = RECIPES[name]
    command = f"--pretrained_model_name_or_path={base} "
    command += f"--pretrained_vae_model_name_or_path={vae} " if vae else ""
    command += (
        "--dataset_name=yuvalkirstain/pickapic_v2 --train_batch_size=8 --dataloader_num_workers=16 "
        "--gradient_accumulation_steps=32 --max_train_steps=2000 --lr_scheduler=constant_with_warmup "
        f"--lr_warmup_steps=500 --learning_rate={rate:g} --scale_lr --checkpointing_steps 500 --mixed_precision bf16 "
        f"--allow_tf32 --output_dir output/{name} --train_method {method} --beta_dpo {beta:g} "
    )
    command += "--sdxl " if vae else ""
    command += f"--dmpo_alpha {alpha} " if alpha else ""
    return f"{command}--use_winner_preserving --winner_preserving_mu {mu}".split()


def launched(launcher, folder, *flags, gpus="1"):
    """The words with which a launcher calls python last."""
    python = folder / "python"
    python.write_text(f"#!{sys.executable} -S\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "GPUS": gpus}
    command = ["bash", "-c", '"$0" "$@"', "bash", str(launcher), *flags]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_recipe(config, name):
    (base, vae, rate), method, beta, alpha, mu = RECIPES[name]
    assert (config.pretrained_model_name_or_path, config.pretrained_vae_model_name_or_path) == (base, vae)
    assert config.sdxl == (vae is not None)
    assert (config.method, config.beta_dpo, config.dmpo_alpha) == (method, beta, alpha)
    assert config.use_winner_preserving and config.winner_preserving_mu == mu
    assert (config.winner_preserving_per, config.constant_loser_scale) == ("batch", 1)
    assert config.dataset_name == "yuvalkirstain/pickapic_v2"
    assert (config.train_batch_size, config.learning_rate, config.scale_lr) == (8, rate, True)
    assert (config.max_train_steps, config.lr_scheduler) == (2000, "constant_with_warmup")
    assert (config.lr_warmup_steps, config.checkpointing_steps, config.max_grad_norm) == (500, 500, 1)
    assert (config.mixed_precision, config.allow_tf32) == ("bf16", True)
    assert (config.proportion_empty_prompts, config.random_crop, config.no_hflip) == (0.2, False, False)
    assert config.dataloader_num_workers == 16
    assert config.without_effect(optimizer_name(config, FAMILIES[config.base["name"]])) == []
    plan = Plan.of(config, 8, PAIRS)
    assert (plan.accumulation, plan.global_batch, plan.steps) == (32, 2048, 2000)
    assert plan.learning_rate == pytest.approx(2.048e-6 if vae else 2.048e-5)


# Official commands and flags


@pytest.mark.parametrize("name", RECIPES)
def test_official_commands(name):
    assert_recipe(parse_config(official_command(name)), name)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_defaults(name):
    config = parse_config(["--pretrained_model_name_or_path=model", "--train_data_dir=pairs"])
    if name == "train_data_dir":
        config = parse()
    value = getattr(config, name)
    assert value == OFFICIAL[name] and type(value) is type(OFFICIAL[name])


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_flags_are_taken(name):
    default = OFFICIAL[name]
    if isinstance(default, bool):
        assert getattr(parse(f"--{name}"), name) is True
        return
    given = GIVEN.get(name, {float: 0.25, int: 16}.get(type(default), "given"))
    other = ["--dataset_name="] if name == "train_data_dir" else []
    for flags in ((f"--{name}={given}",), (f"--{name}", str(given))):
        assert getattr(parse(*other, *flags), name) == given


def test_gradient_checkpointing_without_a_value_is_the_official_flag():
    assert parse("--gradient_checkpointing", "--use_ema").gradient_checkpointing == "full"
    for flags, words in {
        "--activation_memory=4": "--gradient_checkpointing auto",
        "--use_adafactor --optimizer=adamw": "drop one",
    }.items():
        with pytest.raises(InputError, match=words):
            parse(*flags.split())


@pytest.mark.parametrize(
    "flags, names",
    [((), ["adamw", "adafactor"]), (("--use_adafactor",), ["adafactor"] * 2), (("--optimizer=adamw",), ["adamw"] * 2)],
)
def test_the_optimizer_is_the_bases_unless_it_is_named(flags, names):
    assert [optimizer_name(parse(*flags), FAMILIES[base]) for base in ("sd15", "sdxl")] == names


def test_held_out_pairs_are_asked_for_by_any_of_three_flags():
    assert not parse().holds_out
    for flags in (
        "--validation_pairs=3",
        "--validation_split=test",
        "--validation_data_dir=.",
        "--validation_data_dir=. --validation_split=train",  # of another folder
    ):
        assert parse(*flags.split()).holds_out


def test_an_output_folder_is_known_by_any_name(tmp_path):
    base = tmp_path / "base"
    (base / "unet").mkdir(parents=True)
    (base / "model_index.json").touch()
    (tmp_path / "link").symlink_to(base)
    for output, init in (("link", ""), ("base", base / "unet"), ("link", base / "unet")):
        with pytest.raises(InputError, match="which training would write over"):
            parse(f"--pretrained_model_name_or_path={base}", f"--unet_init={init}", f"--output_dir={tmp_path / output}")
    parse(f"--pretrained_model_name_or_path={base}", f"--output_dir={base}/run", f"--unet_init={base}/unet")


def test_choice_model_answers():
    assert parse().choice_model == ""
    for name in ("aes", "clip", "hps", "pickscore", "imagereward", "pixels"):
        assert parse(f"--choice_model={name}").labels_path.name == f"labels_{name}.parquet"
    with pytest.raises(InputError, match=r"--choice_model 'blip': choose from pickscore"):
        parse("--choice_model=blip")
    with pytest.raises(InputError, match="exclude each other"):
        parse("--choice_model=aes", "--labels_file=labels.parquet")
    for alone in ("--choice_margin=0.1", "--choice_weights=clip.checkpoint=x"):
        with pytest.raises(InputError, match="go with --choice_model"):
            parse(alone)
    with pytest.raises(InputError, match="must be at least 0"):
        parse("--choice_model=aes", "--choice_margin=-1")


def test_draft_decoding_needs_to_know_how_far():
    assert parse("--draft_decoding", "--resolution=512").draft_decoding
    with pytest.raises(InputError, match="--draft_decoding needs --resolution"):
        parse("--draft_decoding")


WITHOUT_EFFECT = {
    "--hub_model_id=someone/model": "(nor in the official code): run `hf upload",
    "--local_rank=0": "(the launcher sets the rank)",
    "--hard_skip_resume": "(resuming never replays data)",
    "--use_winner_preserving --sft": "on sft, which has no loser",
    "--constant_loser_scale=0.5 --train_method=sft": "on sft, which has no loser",
    "--winner_preserving_mu=0.5": "without --use_winner_preserving",
    "--winner_preserving_per=pair": "without --use_winner_preserving",
    "--beta_dpo=7 --sft": "on sft",
    "--image_column=picture": "on diffusion-dpo",
    "--dmpo_alpha=0.01": "on diffusion-dpo",
    "--dspo_form=score --train_method=dmpo": "on dmpo",
    "--official_reference_errors": "with --mixed_precision no",
    "--official_reference_errors --sft": "on sft",
    "--adam_epsilon=1e-6 --sdxl": "on adafactor",
    "--adam_beta1=0.8 --use_adafactor": "on adafactor",
    "--lr_warmup_steps=5 --lr_scheduler=constant": "with --lr_scheduler constant",
    "--num_train_epochs=1": "unless --max_train_steps is 0",
    "--ema_decay=0.9": "without --use_ema",
    "--shared_flip --no_hflip": "with --no_hflip",
    "--latent_cache_dtype=fp32": "without --latent_cache",
    "--validation_steps=5": "without held-out pairs and --validation_prompts",
}


@pytest.mark.parametrize("flags", WITHOUT_EFFECT)
def test_flags_without_effect_say_so(flags):
    config = parse("--mixed_precision=no", *flags.split())
    (sentence,) = config.without_effect(optimizer_name(config, FAMILIES[config.base["name"]]))
    assert sentence.startswith(f"{flags.split()[0].split('=')[0]} has no effect {WITHOUT_EFFECT[flags]}")


@pytest.mark.parametrize(
    "flags",
    (
        "",
        "--use_winner_preserving --winner_preserving_mu=0.5 --winner_preserving_per=pair",
        "--train_method=dmpo --dmpo_alpha=0.01 --beta_dpo=7",
        "--train_method=dspo --dspo_form=switched --official_reference_errors --mixed_precision=bf16",
        "--adam_epsilon=1e-6 --adam_beta1=0.8 --adam_beta2=0.9 --lr_warmup_steps=5",
        "--num_train_epochs=1 --max_train_steps=0 --use_ema --ema_decay=0.9 --shared_flip",
        "--latent_cache=x --latent_cache_dtype=fp32 --checkpoints_total_limit=2",
        "--validation_steps=5 --validation_pairs=2",
    ),
)
def test_flags_with_an_effect_do_not_say_so(flags):
    assert parse(*flags.split()).without_effect("adamw") == []


def test_results_are_shown_on_any_stream():
    for encoding in ("ascii", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with contextlib.redirect_stdout(stream):
            show("Ému \udce9")
        assert stream.buffer.getvalue() == "Ému \udce9\n".encode(encoding, "backslashreplace")
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        show("x")
    assert stream.getvalue() == "x\n"
    with contextlib.redirect_stdout(None):  # as Python has a closed one
        show("x")


def test_a_full_disk_is_one_sentence(capsys):
    def main():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 2
    said = "error: a file cannot be written (No space left on device): make room and run the same command again\n"
    assert capsys.readouterr().err == said


# Launchers


@pytest.mark.parametrize("launcher", sorted(LAUNCHERS.glob("*_*.sh")), ids=lambda path: path.stem)
def test_launchers(launcher, tmp_path):
    script, *flags = launched(launcher, tmp_path)
    assert Path(script).name == "train.py" and Path(script).is_file()
    config = parse_config(flags)
    if launcher.stem in RECIPES:
        assert_recipe(config, launcher.stem)
    else:
        assert TINY[launcher.stem] == (config.method, config.beta_dpo, config.dmpo_alpha, config.winner_preserving_mu)
        assert config.use_winner_preserving and config.lr_scheduler == "cosine"
        assert (config.resolution, config.mixed_precision, config.report_to) == (32, "no", "tensorboard")
    _, *flags = launched(launcher, tmp_path, "--output_dir", "with a space", "--winner_preserving_mu=0.5")
    config = parse_config(flags)
    assert (config.output_dir, config.winner_preserving_mu) == ("with a space", 0.5)


@pytest.mark.parametrize("name, base", [("sd15", SD15), ("sdxl", SDXL)])
def test_launchers_of_the_evaluation_name_the_official_bases(tmp_path, name, base):
    script, *flags = launched(LAUNCHERS.parent / "eval" / f"test_{name}.sh", tmp_path, "base", "--steps=7")
    config = parse_flags(EvalConfig, "", "", flags)
    assert script.endswith("eval_generate.py") and config.steps == 7
    assert (config.unet_path, config.pretrain_path, config.vae_path) == ("base", *base[:2])


def test_there_is_a_launcher_for_every_base_and_method():
    methods = ("diffusion_dpo", "dspo", "dmpo")
    expected = {f"{base}_{method}" for base in ("sd15", "sdxl", "tiny") for method in methods}
    assert {path.stem for path in LAUNCHERS.glob("*_*.sh")} == expected


def test_launchers_use_every_gpu(tmp_path):
    words = launched(LAUNCHERS / "sd15_dmpo.sh", tmp_path, gpus="4")
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 4 --num_machines 1"
    assert words[:11] == f"{launch} --mixed_precision no --dynamo_backend no".split()
    script = next(i for i, word in enumerate(words) if word.endswith("train.py"))
    assert Plan.of(parse_config(words[script + 1 :]), 4, PAIRS).accumulation == 64  # 8 pairs x 4 x 64 = 2048


# At the edges, and missing (what is refused: test_bad_input.py)


@pytest.mark.parametrize(
    "flags",
    (
        "--winner_preserving_mu=0 --use_winner_preserving",
        "--winner_preserving_mu=1 --use_winner_preserving",
        "--constant_loser_scale=0",
        "--dmpo_alpha=1 --train_method=dmpo",
        "--proportion_empty_prompts=0",
        "--proportion_empty_prompts=1",
        "--resolution=8",
        "--max_grad_norm=0",
        "--seed=0",
        "--max_train_steps=0",
        "--checkpointing_steps=0",
    ),
)
def test_values_at_the_edge_are_taken(flags):
    assert isinstance(parse(*flags.split()), TrainConfig)


@pytest.mark.parametrize(
    "flags, words",
    (
        (["--dataset_name=pairs"], ["--pretrained_model_name_or_path"]),
        (["--pretrained_model_name_or_path=model"], ["--dataset_name", "--train_data_dir"]),
        ([], ["--pretrained_model_name_or_path"]),
    ),
)
def test_model_and_data_are_needed(flags, words):
    with pytest.raises(InputError) as error:
        parse_config(flags)
    assert all(word in str(error.value) for word in words)


# Arithmetic


@pytest.mark.parametrize("processes, accumulation", ((1, 256), (2, 128), (4, 64), (8, 32), (16, 16), (256, 1)))
def test_accumulation_follows_from_the_global_batch(processes, accumulation):
    config = parse("--global_batch_size=2048", "--train_batch_size=8")
    plan = Plan.of(config, processes, PAIRS)
    assert (plan.accumulation, plan.global_batch, plan.processes, plan.pairs) == (accumulation, 2048, processes, PAIRS)


@pytest.mark.parametrize("processes, size", ((3, 2048), (8, 100), (8, 32), (512, 2048)))
def test_a_global_batch_that_cannot_be_split(processes, size):
    config = parse(f"--global_batch_size={size}", "--train_batch_size=8")
    with pytest.raises(InputError) as error:
        Plan.of(config, processes, PAIRS)
    words = (f"--global_batch_size {size}", f"{processes} processes", f"multiple of {8 * processes}")
    assert all(word in str(error.value) for word in words)


def test_plan():
    flags = ("--train_batch_size=8", "--gradient_accumulation_steps=32", "--learning_rate=1e-8", "--scale_lr")
    config = parse(*flags)
    plan = Plan.of(config, 8, PAIRS)
    assert plan.learning_rate == pytest.approx(2.048e-5, rel=1e-12)
    assert plan.steps_per_epoch == pytest.approx(415.6704, abs=1e-4)  # 851,293 / 2048
    text = "\n".join(plan.lines(config))
    for part in ("851,293", "8 pairs x 8 processes x 32 accumulation = 2048 pairs", "2,000", "415.7", "4.81 epochs"):
        assert part in text
    assert "2.048e-05 = 1e-08 x 2048" in text and "500 warm-up" in text
    assert Plan.of(parse(*flags[:3]), 8, PAIRS).learning_rate == 1e-8


@pytest.mark.parametrize("pairs, epochs, updates", ((100, 3, 38), (96, 3, 36), (5, 1, 1), (97, 1, 13)))
def test_epochs_set_the_updates_where_max_train_steps_is_0(pairs, epochs, updates):
    flags = ("--max_train_steps=0", f"--num_train_epochs={epochs}", "--train_batch_size=2")
    config = parse(*flags, "--gradient_accumulation_steps=2")
    assert Plan.of(config, 2, pairs).steps == updates  # of 8 pairs


def test_max_train_steps_goes_before_epochs():
    assert Plan.of(parse("--max_train_steps=7", "--num_train_epochs=3"), 1, 100).steps == 7


# Cautions

GUARDED = "--use_winner_preserving --winner_preserving_mu="


def cautions(flags):
    config = parse(*flags.split())
    return config.cautions(loss_name(config, FAMILIES[config.base["name"]]), Plan.of(config, 1, pairs=10).steps)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.1, 1.0])
def test_the_margin_at_which_dmpo_turns_is_where_its_gradient_changes_sign(alpha):
    (said,) = (text for text in cautions(f"--train_method=dmpo --dmpo_alpha={alpha}") if "changes sign" in text)
    turn = float(re.search(r"at margin (-?[\d.]+):", said)[1])
    margins = torch.tensor([turn - 0.004, turn + 0.004], requires_grad=True)
    below, above = torch.autograd.grad(dmpo(SimpleNamespace(margin=margins), alpha).sum(), margins)[0]
    assert below < 0 < above


@pytest.mark.parametrize(
    "flags, words",
    (
        ("--train_method=dmpo --dmpo_alpha=0.01", "dmpo 0.01 4.595 winner"),  # ln 99
        ("--train_method=dmpo --dmpo_alpha=0.1", "dmpo 0.1 2.197"),  # ln 9
        ("--train_method=dmpo", "dmpo alpha 0 13.802"),  # 1 - alpha is kept off 1 by 1e-6, to fp32
        ("--train_method=dmpo --dmpo_alpha=1", "dmpo alpha 1 -13.816"),
        ("--train_method=dspo --beta_dpo=0.001", "dspo 0.001 beta^2 inert"),
        ("--train_method=dspo --beta_dpo=0.001 --sdxl", "dspo micro-batch split"),
        ("--train_method=dspo --beta_dpo=0.001 --dspo_form=switched", "dspo micro-batch split"),
        ("--use_winner_preserving", "--winner_preserving_mu 0 inert"),
        (f"{GUARDED}1", "--winner_preserving_mu 1 scale 0 winners only"),
        ("--input_perturbation=0.1 --validation_pairs=8", "input perturbation held-out"),
        ("--use_ema --ema_decay=0.999 --max_train_steps=900", "--ema_decay 0.999 1000"),
        ("--max_train_steps=500", "--lr_warmup_steps 500 never reached"),
        ("--max_train_steps=0 --num_train_epochs=50", "--lr_warmup_steps 500 never reached"),  # of 10 pairs
    ),
)
def test_cautions(flags, words):
    (sentence,) = cautions(flags)
    assert [word for word in words.split() if word not in sentence] == [], sentence


@pytest.mark.parametrize("flag", ["output_dir", "latent_cache", "reference_cache"])
def test_files_among_the_data_are_cautioned_about(tmp_path, flag):
    """Where `datasets` takes a folder's name for a split's, they are read as data."""
    (sentence,) = cautions(f"--seed=1 --dataset_name={tmp_path} --{flag}={tmp_path / 'train-run'}")
    assert sentence.startswith(f"--{flag} {tmp_path / 'train-run'} is in the folder of --dataset_name, where the next")


@pytest.mark.parametrize(
    "flags",
    (
        f"{GUARDED}0.9",
        "--train_method=dspo --beta_dpo=5000",
        "--train_method=diffusion-dpo --dmpo_alpha=0.01",
        "--input_perturbation=0.1",
        "--use_ema",
        "--constant_loser_scale=0",
        "--max_train_steps=501",
        "--max_train_steps=100 --lr_scheduler=constant",
        "--max_train_steps=0",
    ),
)
def test_no_caution_without_reason(flags):
    assert cautions(flags) == []


def test_choices_are_the_rows_of_tables():
    choices = {name: set(get_args(kind)) for name, kind in get_type_hints(TrainConfig).items()}
    methods = choices["train_method"] - {"sft"}
    forms = {f"dspo-{form}" for form in choices["dspo_form"] - {"auto"}}
    assert methods - {"dspo"} | forms == set(PAIR_LOSSES)
    assert choices["optimizer"] - {"auto"} == set(OPTIMIZERS)
