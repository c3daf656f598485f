"""Input that cannot be used: every command says so in one sentence with the place and the fix, and exits with 2."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from recording import Payload, edit_json
from safetensors.torch import load_file, save_file

import eval_generate
import eval_vs
import train
from sdpo import relabel
from sdpo.checkpoint import seal
from sdpo.command import InputError, parse_flags, run_command, within_memory
from sdpo.config import TrainConfig
from sdpo.families import load_family
from sdpo.tables import read_table
from sdpo.tiny import compare, make_pairs, pictures

ROOT = Path(__file__).parents[1]
PNG = make_pairs.encode(np.zeros((32, 32, 3), np.uint8))
MAINS = {"train": train.main, "eval_generate": eval_generate.main, "eval_vs": eval_vs.main, "relabel": relabel.main}
DEEP = "[" * 100_000  # deeper than Python's parser follows


# Writing input


def text(name, content, encoding="utf-8"):
    """A function that writes a text, bytes, or JSON of anything else to a file of a folder."""

    def write(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str | bytes):
            path.write_text(json.dumps(content))
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))

    return write


def both(*writers):
    """A function that writes what several functions write."""
    return lambda folder: [write(folder) for write in writers]


def parquet(name="train.parquet", **changes):
    """A function that writes four good pairs as parquet, with columns changed, or dropped where they are None."""
    columns = {
        "caption": list("abcd"),
        "jpg_0": [PNG] * 4,
        "jpg_1": [PNG] * 4,
        "label_0": [1.0, 0.0, 1.0, 0.0],
    } | changes
    kept = {key: values for key, values in columns.items() if values is not None}
    return lambda folder: pq.write_table(pa.table(kept), folder / name)


IMAGES = both(*(text(f"{name}.png", PNG) for name in "abc"))
ROW = {"caption": "x", "winner": "a.png", "loser": "b.png"}


def jsonl(*rows, encoding="utf-8"):
    """A function that writes rows, or lines as they stand, as pairs.jsonl beside their images."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return both(IMAGES, text("pairs.jsonl", "\n".join(lines) + "\n", encoding))


def table(*lines, encoding="utf-8"):
    """A function that writes lines as pairs.csv beside their images."""
    return both(IMAGES, text("pairs.csv", "\n".join(lines) + "\n", encoding))


def saved(splits):
    """A function that writes a data set of these splits as save_to_disk does; a lone None is a set without splits."""
    data = datasets.Dataset.from_dict({"caption": ["a"], "jpg_0": [PNG], "jpg_1": [PNG], "label_0": [1.0]})
    return lambda folder: (datasets.DatasetDict(dict.fromkeys(splits, data)) if splits else data).save_to_disk(folder)


def score(value):
    """A line of scores.jsonl, the score as it stands there."""
    return f'{{"image": "0.png", "prompt": "p", "CLIP": {value}}}'


HEAD = "caption,winner,loser"
NOTHING = both()
SINGLE = parquet(jpg_0=None, jpg_1=None, label_0=None, image=[PNG] * 4)
DREAM = "--dreamlike_pairs_only"
NO_UNREADABLE = "--max_unreadable_images=0"
CONFIGS = text(
    "README.md",
    "---\nconfigs:\n" + "".join(f"- config_name: {name}\n  data_files: train.parquet\n" for name in "ab") + "---\n",
)
LABELS = "--labels_file={f}/data/train.parquet"
VALIDATION = "--validation_prompts={f}/data/p.txt --train_data_dir={pairs}"
UNREADABLE = r"/u[a-z]*\.[a-z]+ cannot be read as weights \(.*\); download it again"
UNSCORED = "--metrics Pixels --json_a={pictures} --json_b={pictures}"
UNFETCHED = UNSCORED.replace("Pixels", "HPSv2")  # its weights are not on the disk


# Models


def state(change=dict):
    """A function that writes the tiny UNet's state dict, changed, as unet.pth."""

    def write(folder):
        torch.save(change(load_family("sd15", str(compare.BASE)).load_unet().state_dict()), folder / "unet.pth")

    return write


def cut(name, keep=0.5):
    """A function that cuts a file of a folder off."""

    def write(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return write


def flip(name):
    """A function that flips a bit in the middle of a file of a folder."""

    def write(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return write


def base(*writers):
    """A function that copies the tiny base model to base/ and lets functions damage it."""

    def write(folder):
        shutil.copytree(compare.BASE, folder / "base")
        for writer in writers:
            writer(folder / "base")

    return write


def drop(name):
    """A function that removes a file or folder."""
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def edit(name, **changes):
    """A function that changes keys of a JSON file, or drops them where they are None."""
    return lambda folder: edit_json(folder / name, **changes)


def tensors(name, change):
    """A function that changes the state dict in a .safetensors file."""

    def write(folder):
        save_file(change(load_file(folder / name)), folder / name, {"format": "pt"})

    return write


def malicious(name):
    """A function that writes a pickle of code, which would make a folder named `ran`."""
    return lambda folder: torch.save({"weights": Payload(folder / "ran")}, folder / name)


def nan(tensors):
    return {name: value * torch.nan for name, value in tensors.items()}


def less(tensors):
    return dict(list(tensors.items())[1:])


def safetensors(folder):
    save_file({"a": torch.ones(99)}, folder / "u.safetensors")


# The tables: what was given -> what is said


TRAIN_FLAGS = {
    "--pretrained_model_name_or_path=": r"--pretrained_model_name_or_path is missing: give a hub id or a local",
    "--output_dir=~/runs": r"--output_dir=~/runs: shells do not expand ~ there; write --output_dir=.HOME/runs",
    "--train_data_dir=": r"no data: give --dataset_name .* or --train_data_dir",
    "--dataset_name=pairs": r"--dataset_name and --train_data_dir exclude each other: give one of them",
    "--dataset_name=owner/none --train_data_dir=": r"cannot read pairs from 'owner/none' \(.*\); give a local folder",
    "--train_data_dir=/nowhere": r"data folder /nowhere does not exist",
    "--train_data_dir={pairs}/train.parquet": r"train.parquet is a file, but neither .jsonl nor .csv: give the folder",
    "--split=test": r"no split 'test'; it has train, validation: choose",
    "--split=": r"--split is empty: give its value or leave the flag out",
    "--caption_column=": r"--caption_column is empty: give its value",
    "--logging_dir=checkpoint-1": r"--logging_dir: checkpoint-1/tuning would be in the place of something else: name another",
    "--logging_dir=./unet.pth": r"--logging_dir: unet.pth/tuning would be in the place of something else",
    "--logging_dir=. --tracker_project_name=unet": r"--logging_dir: unet would be in the place of something else",
    "--report_to=tensorboard --tracker_project_name=../x": r"--tracker_project_name ../x would be a path: give a name",
    "--report_to=tensorboard --tracker_project_name=..": r"--tracker_project_name .. would be a path: give a name",
    "--validation_split=nope": r"no split 'nope'; it has train, validation: choose",
    "--validation_split=train": r"--validation_split train is the split trained on: name another",
    "--validation_data_dir=/nowhere": r"data folder /nowhere does not exist",
    "--validation_pairs=-1": r"--validation_pairs must be at least 0 and below 2.63, got -1",
    "--validation_pairs=100000": r"--validation_pairs 100000 leaves nothing to train on: .*use fewer",
    "--validation_steps=0": r"--validation_steps must be at least 1 and below 2.63, got 0",
    "--validation_prompts=/nowhere.txt": r"--validation_prompts /nowhere.txt is not a file; give one prompt per line",
    "--caption_column=text": r"column text missing \(it has caption, .* give --caption_column",
    "--dreamlike_pairs_only": r"column model_0 missing: drop --dreamlike_pairs_only",
    "--max_train_samples=0": r"--max_train_samples must be at least 1 and below 2.63, got 0",
    "--max_unreadable_images=-1": r"--max_unreadable_images must be at least 0 and below 2.63, got -1",
    "--dataloader_num_workers=-1": r"--dataloader_num_workers must be at least 0 and below 2.63, got -1",
    "--proportion_empty_prompts=2": r"--proportion_empty_prompts must lie in \[0, 1\], got 2",
    "--labels_file=/nowhere": r"--labels_file /nowhere is not a file: make it with python -m sdpo.relabel",
    "--choice_model=blip": r"--choice_model 'blip': choose from pickscore, .* or drop it",
    "--choice_model=aes --labels_file=x": r"--choice_model and --labels_file exclude each other",
    "--choice_margin=0.1": r"--choice_margin and --choice_weights go with --choice_model; drop them",
    "--choice_weights=x=y": r"--choice_margin and --choice_weights go with --choice_model; drop them",
    "--choice_model=aes --choice_margin=-1": r"--choice_margin must be at least 0 and below 2.63, got -1",
    "--choice_model=clip --choice_weights=clip": r"--choice_weights clip: expected NAME=VALUE",
    "--choice_model=clip --choice_weights=clip.x=y": r"there is no 'clip.x'; choose from .*clip.checkpoint",
    "--choice_model=clip --choice_weights=clip.checkpoint=/no.pt": r"there is no weights file /no.pt; give a file",
    "--resolution=500": r"--resolution must be a multiple of 8, at most 8192, got 500",
    "--resolution=8000000000": r"--resolution must be a multiple of 8, at most 8192, got 8000000000",
    "--resolution=-8": r"--resolution must be a multiple of 8.*, got -8",
    "--train_method=ppo": r"--train_method.*: invalid choice: 'ppo' \(choose from",
    "--beta_dpo=high": r"--beta_dpo.*: invalid float value: 'high'",
    "--beta_dpo=0": r"--beta_dpo must be above 0 and below 2.63, got 0",
    "--beta_dpo=-5000": r"--beta_dpo must be above 0 and below 2.63, got -5000",
    "--beta_dpo=inf": r"--beta_dpo must be above 0 and below 2.63, got inf",
    "--beta_dpo=nan": r"--beta_dpo must be above 0 and below 2.63, got nan",
    "--dmpo_alpha=1.01": r"--dmpo_alpha must lie in \[0, 1\], got 1.01",
    "--dmpo_alpha=-0.01": r"--dmpo_alpha must lie in \[0, 1\], got -0.01",
    "--winner_preserving_mu=1.5": r"--winner_preserving_mu must lie in \[0, 1\], got 1.5",
    "--winner_preserving_mu=-0.1": r"--winner_preserving_mu must lie in \[0, 1\], got -0.1",
    "--winner_preserving_mu=nan": r"--winner_preserving_mu must lie in \[0, 1\], got nan",
    "--winner_preserving_mue=0.5": r"unknown flag --winner_preserving_mue=0.5; .* lists the flags",
    "--constant_loser_scale=1.5": r"--constant_loser_scale must lie in \[0, 1\], got 1.5",
    "--use_winner_preserving=maybe": r"--use_winner_preserving.*: Truthy value expected: got maybe",
    "--use_winner_preserving --constant_loser_scale=0.5": r"--use_winner_preserving and --constant_loser_scale exclude",
    "--sft --train_method=dmpo": r"--sft and --train_method dmpo exclude each other: drop one",
    "--max_train_steps=1" + "0" * 400: r"--max_train_steps must be at least 0 and below 2.63, got 10",
    "--noise_offset=nan": r"--noise_offset must be at least 0 and below 2.63, got nan",
    "--input_perturbation=-1": r"--input_perturbation must be at least 0 and below 2.63, got -1",
    "--seed=-1": r"--seed must be at least 0 and below 2.63, got -1",
    "--seed=1.5": r"--seed.*: invalid int value: '1.5'",
    "--train_batch_size=0": r"--train_batch_size must be at least 1, at most 65536, got 0",
    "--train_batch_size=65537": r"--train_batch_size must be at least 1, at most 65536, got 65537",
    "--train_batch 8": r"unknown flag --train_batch; .* lists the flags",
    "--global_batch_size=0": r"--global_batch_size must be at least 1 and below 2.63, got 0",
    "--validation_data_dir={pairs}": r"--validation_data_dir .* holds the pairs trained on: name another folder",
    "--lr_scheduler=polynomial --learning_rate=1e-8": r"polynomial .* needs a higher learning rate \(got 1e-08\) .*; use linear",
    "--lr_scheduler=polynomial --lr_warmup_steps=3 --max_train_steps=3": r"polynomial .* updates left after the warm-up \(got 0\); use linear",
    "--global_batch_size=5 --train_batch_size=2": r"--global_batch_size 5 is not a multiple of 2 .* use a multiple",
    "--global_batch_size=8 --gradient_accumulation_steps=2": r"--global_batch_size sets the number of micro-steps",
    "--gradient_accumulation_steps=0": r"--gradient_accumulation_steps must be at least 1 and below 2.63, got 0",
    "--max_train_steps=-1": r"--max_train_steps must be at least 0 and below 2.63, got -1",
    "--max_train_steps=0 --num_train_epochs=0": r"--num_train_epochs must be at least 1 and below 2.63, got 0",
    "--learning_rate=nan": r"--learning_rate must be at least 0 and below 2.63, got nan",
    "--learning_rate=inf": r"--learning_rate must be at least 0 and below 2.63, got inf",
    "--learning_rate=-1e-8": r"--learning_rate must be at least 0 and below 2.63, got -1e-08",
    "--learning_rate": r"--learning_rate.*: expected one argument",
    "--optimizer=sgd": r"--optimizer.*: invalid choice: 'sgd' \(choose from",
    "--use_adafactor --optimizer=adamw": r"--use_adafactor and --optimizer adamw exclude each other; drop one",
    "--max_skipped_updates=0": r"--max_skipped_updates must be at least 1 and below 2.63, got 0",
    "--skip_grad_norm_above=0": r"--skip_grad_norm_above must be above 0 and below 2.63, got 0",
    "--activation_memory=0": r"--activation_memory must be above 0 and below 2.63, got 0",
    "--activation_memory=1 --gradient_checkpointing=full": r"--activation_memory goes with .* auto",
    "--gradient_checkpointing=auto": r"auto: say how many GiB may be kept with --activation_memory",
    "--gradient_checkpointing=some": r"--gradient_checkpointing.*: invalid choice: 'some'",
    "--lr_scheduler=step": r"--lr_scheduler.*: invalid choice: 'step' \(choose from",
    "--lr_warmup_steps=-1": r"--lr_warmup_steps must be at least 0 and below 2.63, got -1",
    "--adam_beta1=1": r"--adam_beta1 must lie in \[0, 1\), got 1",
    "--adam_beta2=nan": r"--adam_beta2 must lie in \[0, 1\), got nan",
    "--adam_epsilon=0": r"--adam_epsilon must be above 0 and below 2.63, got 0",
    "--adam_weight_decay=-1": r"--adam_weight_decay must be at least 0 and below 2.63, got -1",
    "--max_grad_norm=-1": r"--max_grad_norm must be at least 0 and below 2.63, got -1",
    "--ema_decay=1": r"--ema_decay must lie in \[0, 1\), got 1",
    "--ema_decay=-0.1": r"--ema_decay must lie in \[0, 1\), got -0.1",
    "--mixed_precision=fp8": r"--mixed_precision.*: invalid choice: 'fp8' \(choose from",
    "--mixed_precision=fp16": r"--mixed_precision fp16 .* needs a GPU: use --mixed_precision no or bf16",
    "--logging_steps=0": r"--logging_steps must be at least 1 and below 2.63, got 0",
    "--checkpointing_steps=-1": r"--checkpointing_steps must be at least 0 and below 2.63, got -1",
    "--checkpoints_total_limit=0": r"--checkpoints_total_limit must be at least 1 and below 2.63, got 0",
    "--report_to=paper": r"--report_to.*: invalid choice: 'paper' \(choose from 'tensorboard'",
    "--report_to=wandb": r"--report_to wandb: .*pip install wandb",
    "--output_dir={pairs}": r"--output_dir .* holds --train_data_dir, which training would write over: name another",
    "--output_dir={sd15}": r"--output_dir .* holds --pretrained_model_name_or_path, which training would write over",
    "--output_dir={sd15} --unet_init={sd15}/unet": r"--output_dir .* holds --.*, which training would write over",
    "--output_dir=": r"--output_dir is empty: name a folder",
    "--output_dir=\udcff": r"--output_dir '.udcff' is not UTF-8: rename what it names",
    "--latent_cache=\udcff": r"--latent_cache '.udcff' is not UTF-8: rename what it names",
    "--output_dir={f}/few.json": r"few.json cannot be used \(File exists\): correct the path",
    "--output_dir=/proc/nowhere": r"/proc/nowhere cannot be used \(No such file or directory\): correct the path",
    "--resume_from_checkpoint=/nowhere": r"--resume_from_checkpoint /nowhere: not a checkpoint .* Use 'latest', or 'none' to begin anew$",
    "--resume_from_checkpoint={pairs}": r"--resume_from_checkpoint .*: not a checkpoint .* Use 'latest'",
    "--unet_init=/nowhere.pth": r"there is no file /nowhere.pth: correct the path",
    "--unet_init=/nowhere": r"cannot load unet of '/nowhere' \(.*\); give a local",
    "--unet_init={pairs}": r"cannot load unet of '.*pairs.*' \(.*\); give a local",
    "--pretrained_vae_model_name_or_path=/nowhere": r"cannot load AutoencoderKL of '/nowhere' \(.*\); give a local",
    "--pretrained_model_name_or_path=/nowhere": r"cannot fetch model_index.json of /nowhere \(.*\); .* give its path",
    "--pretrained_model_name_or_path=owner/none": r"cannot fetch model_index.json of owner/none \(.*\); .* its path",
    "--pretrained_model_name_or_path={pairs}": r"pairs\w* has no model_index.json, which says what .*; download the",
    "--pretrained_model_name_or_path={sdxl}": r"holds a StableDiffusionXLPipeline, .*: SDXL models need --sdxl",
    "--sdxl": r"holds a StableDiffusionPipeline, .* SD1.x models run without it",
    "pairs": r"unknown flag pairs; .* lists the flags",
}  # fmt: skip

RELABEL_FLAGS = {
    "--train_data_dir=": r"no data: give --dataset_name .* or --train_data_dir",
    "--train_data_dir=/nowhere": r"data folder /nowhere does not exist",
    "--metric=": r"--metric '': choose from pickscore, hps",
    "--metric=blip": r"--metric 'blip': choose from pickscore, hps",
    "--margin=-1": r"--margin must be at least 0 and below 2.63, got -1",
    "--margin=nan": r"--margin must be at least 0 and below 2.63, got nan",
    "--batch_size=0": r"--batch_size must be at least 1 and below 2.31, got 0",
    "--split=test": r"no split 'test'; it has train, validation: choose",
    "--caption_column=text": r"column text missing \(it has caption",
    "--weights pixels": r"--weights pixels: expected NAME=VALUE",
    "--weights pixels.x=y": r"there is no 'pixels.x'; choose from",
    "--weights imagereward.tokenizer=a/b": r"imagereward.tokenizer belongs to a metric that is not scored: score that",
    "--device=tpu9": r"--device tpu9 cannot be used \(.*\); give cpu",
    "--device=cuda:99": r"--device cuda:99 cannot be used \(.*\); give cpu",
    "--out=": r"--out '' is not the name of a file; give one",
    "--out={f}": r"--out '.*' is not the name of a file; give one",
    "--out={f}/few.json/labels.parquet": r"--out .*few.json/labels.parquet cannot be written: name another",
    "--nonsense": r"unknown flag --nonsense; .* lists the flags",
}  # fmt: skip

GENERATE_FLAGS = {
    "--unet_path=": r"--unet_path is missing: give a unet.pth",
    "--pretrain_path=": r"--pretrain_path is missing: give the base model",
    "--unet_path=runs/7/unet.pth": r"runs/7/unet.pth is neither a file nor a folder, nor base or one of",
    "--unet_path=../../etc/passwd": r"\.\./\.\./etc/passwd is neither a file nor a folder",
    "--unet_path=sdpo-sdxl-dspo": r"cannot fetch sdxl/dspo/unet.pth of AIDC-AI/.* give its path",
    "--unet_path=owner/model": r"cannot load unet of 'owner/model' \(.*\); give a local",
    "--unet_path={pairs}": r"cannot load unet of '.*pairs.*' \(.*\); give a local",
    "--unet_path={sdxl}": r"belongs to another architecture: .* give the base model it was trained from",
    "--pretrain_path={pairs}": r"pairs\w* has no model_index.json, which says what kind of model it is; download the",
    "--pretrain_path=owner/none": r"cannot fetch model_index.json of owner/none \(.*\); .* give its path",
    "--vae_path=/nowhere": r"cannot load AutoencoderKL of '/nowhere' \(.*\); give a local",
    "--resolution=36": r"--resolution, --height and --width must be multiples of 8, got 36",
    "--resolution=0": r"--resolution must be at least 1 and below 2.31, got 0",
    "--steps=0": r"--steps must be at least 1 and below 2.31, got 0",
    "--resolution=4000000": r"memory is exhausted \(.*\): 1 images of 4000000x4000000 at .* smaller --batch_size",
    "--steps=1001": r" has 1000 timesteps, of which 1001 steps cannot be sampled: lower --steps",
    "--steps=many": r"--steps.*: invalid int value: 'many'",
    "--batch_size=0": r"--batch_size must be at least 1 and below 2.31, got 0",
    "--score_batch_size=0": r"--score_batch_size must be at least 1 and below 2.31, got 0",
    "--seed=-1": r"--seed must be at least 0 and below 2.63, got -1",
    "--seed=9223372036854775808": r"--seed must be at least 0 and below 2.63, got 9223372036854775808",
    "--cfg=nan": r"--cfg must be a number, got nan",
    "--cfg=inf": r"--cfg must be a number, got inf",
    "--dtype=fp8": r"--dtype.*: invalid choice: 'fp8' \(choose from",
    "--guidance=none": r"--guidance.*: invalid choice: 'none' \(choose from",
    "--groups=papv3": r"--groups papv3: known are papv2, hpsv2, .*; give files with --test_json",
    "--groups": r"--groups.*: expected at least one argument",
    "--test_json {f}/few.json {f}/few.json": r"groups must have different names, got few, few",
    "--groups tiny tiny": r"groups must have different names, got tiny, tiny",
    "--metrics Beauty": r"--metrics Beauty: known are PickScore, .*, or none",
    "--metrics CLIP --weights clip": r"--weights clip: expected NAME=VALUE",
    "--metrics PickScore --weights pickscore.model=/no": r"there is no folder /no; give one, or owner/repository",
    "--metrics CLIP --weights clip.x=y": r"there is no 'clip.x'; choose from",
    "--output_path=": r"--output_path is empty: name a folder or leave the flag out",
    "--test_json=": r"--test_json is empty: name a file with prompts",
    "--output_path={f}/few.json": r"few.json cannot be used \(File exists\): correct the path",
    "--output_path=/proc/nowhere": r"/proc/nowhere cannot be used \(.*\): correct the path",
    "--test_json=/nowhere.json": r"/nowhere.json cannot be read .*; groups known by name: papv2",
    "--test_json={f}": r": prompts are read from .json, .jsonl, .txt files",
    f"--test_json={{f}}/{'x' * 181}.json": r"--test_json: 'x*' cannot be part of a folder's name: use up to 180 bytes",
    "--test_json=http://127.0.0.1:9/p.json": r"http:/.*p.json cannot be read .*; groups known by name: papv2",
    "--stepz=3": r"unknown flag --stepz=3; .* lists the flags",
}  # fmt: skip

VERSUS_FLAGS = {
    "--outdir=~/out": r"--outdir=~/out: shells do not expand ~ there; write --outdir=.HOME/out",
    "--label_a=x/y": r"label 'x/y' cannot name an output folder; use up to 60",
    "--label_a=..\\c": r"label .* cannot name an output folder; use up to 60",
    "--label_b=..": r"label '\.\.' cannot name an output folder; use up to 60",
    "--label_b=": r"label '' cannot name an output folder; use up to 60",
    "--label_b=" + "a" * 61: r"label 'a+' cannot name an output folder; use up to 60",
    "--label_b=" + "雪" * 21: r"label '雪+' cannot name an output folder; use up to 60",
    "--label_b=tie": r"label 'tie' is what a draw is called .*; choose another",
    "--label_b=A": r"labels must differ, got A, A; give each run its own",
    "--more A={f}/A/A.json": r"labels must differ, got A, B, A; give each run its own",
    "--more C": r"--more C: expected NAME=VALUE",
    "--more ={f}/A/A.json": r"--more =.*A.json: expected NAME=VALUE",
    "--more C=": r"the name of a manifest is empty; give the .json file",
    "--json_b=/nowhere.json": r"/nowhere.json is not a file; give the manifest",
    "--json_b={f}": r" is not a file; give the manifest",
    "--json_a": r"--json_a.*: expected one argument",
    "--json": r"unrecognized arguments: --json",
    "--metrics": r"--metrics.*: expected at least one argument",
    "--metrics Beauty": r"--metrics.*: invalid choice: 'Beauty' \(choose from",
    "--metrics HPSv2": r"0.png is neither in the working directory nor .*; generate it again",
    "--metrics HPSv2 --weights hpsv2": r"--weights hpsv2: expected NAME=VALUE",
    f"{UNSCORED} --weights x.y=z": r"there is no 'x.y'; choose from",
    "--pair_by=luck": r"--pair_by.*: invalid choice: 'luck' \(choose from",
    "--batch_size=0": r"--batch_size must be at least 1 and below 2.31, got 0",
    "--batch_size=many": r"--batch_size.*: invalid int value: 'many'",
    f"--device=meta {UNFETCHED}": r"--device meta cannot be used \(.*\); give cpu",
    f"--device=hpu {UNSCORED}": r"--device hpu cannot be used \(.*\); give cpu",
    f"--device=tpu9 {UNSCORED}": r"--device tpu9 cannot be used \(.*\); give cpu",
    "--outdir=": r"--outdir is empty: name a folder",
    "--outdir={f}/few.json": r"few.json cannot be used \(File exists\): correct the path",
    "--outdir=/proc/nowhere": r"/proc/nowhere cannot be used \(.*\): correct the path",
}  # fmt: skip
DATA = {  # pairs: (what writes them, flags of train.py, message)
    "no second image": (parquet(jpg_1=None), "", r"data \(train\): column jpg_1 missing .* rename"),
    "no label": (parquet(label_0=None), "", r"data \(train\): column label_0 missing .* rename"),
    "no caption": (parquet(caption=None), "", r"data \(train\): column caption missing .* --caption_column"),
    "label 0.7": (parquet(label_0=[1, 0, 1, 0.7]), "", r"row 3: label_0 is 0.7, but must be 1 .* correct or remove"),
    "label -1": (parquet(label_0=[1, -1, 1, 0]), "", r"row 1: label_0 is -1, but must be 1"),
    "label nan": (parquet(label_0=[1, np.nan, 1, 0]), "", r"row 1: label_0 is nan, but must be 1"),
    "label null": (parquet(label_0=[1.0, 0.0, None, 0.0]), "", r"row 2: label_0 is None, but must be 1"),
    "labels as words": (parquet(label_0=["left"] * 4), "", r"row 0: label_0 is left, .*; 4 such row"),
    "labels as lists": (parquet(label_0=[[1.0]] * 4), "", r"row 0: label_0 is \[1.0\], but must be 1"),
    "caption null": (parquet(caption=["a", None, "c", "d"]), "", r"row 1: caption is None, but must be a text"),
    "captions are numbers": (parquet(caption=[1, 2, 3, 4]), "", r"row 0: caption is 1, but must be a text"),
    "no captions": (parquet(caption=[["a"], ["b"], [], ["d"]]), "", r"row 2: caption is \[\], but must be a text"),
    "images are numbers": (parquet(jpg_0=[1, 2, 3, 4]), "", r"\(train\): column jpg_0 holds int64, but must hold"),
    "images are lists": (parquet(jpg_1=[[1], [2], [3], [4]]), "", r"column jpg_1 holds list<.*>, .*: write the data again"),
    "images are null": (parquet(jpg_1=[None] * 4), "", r"data \(train\) row \d: jpg_1: None is not an image; check the data"),
    "images are addresses": (parquet(jpg_0=["http://127.0.0.1:9/x.png"] * 4), "", r"row \d: .*No such file.*; check"),
    "images cut off": (parquet(jpg_1=[PNG[:60]] * 4), "--max_unreadable_images=5", r"no readable pair in 6 draw.s., more than --max_unreadable_images 5; .* row \d.*check"),
    "images of text": (parquet(jpg_0=[b"GIF"] * 4), "--max_unreadable_images=0", r"no readable pair in 1 .* row \d.*check"),
    "only ties": (parquet(label_0=[0.5] * 4), "", r"no pair is left after the filters \(.*4 ties\)"),
    "no rows": (parquet(caption=[], jpg_0=[], jpg_1=[], label_0=[]), "", r"cannot read pairs from .*data"),
    "nothing dreamlike": (parquet(model_0=["x"] * 4, model_1=["x"] * 4), DREAM, r"no pair is left .*4 pairs that"),
    "model null": (parquet(model_0=["dream"] * 4, model_1=["x", None] * 2), DREAM, r"row 1: model_1 is None; .* drop"),
    "a text": (text("pairs.txt", "x"), "--train_data_dir={f}/data/pairs.txt", r"pairs.txt is a file, but neither .jsonl nor .csv"),
    "readme of no YAML": (both(parquet(), text("README.md", "---\nconfigs: [\n---\n")), "", r"README.md does not begin with valid YAML: correct"),
    "readme of files not there": (both(parquet(), text("README.md", "---\nconfigs:\n- config_name: a\n  data_files: b.parquet\n---\n")), "", r"b.parquet'\); .*README.md chooses files that are not there"),
    "a key twice": (jsonl(ROW, '{"caption": "x", "winner": "a.png", "winner": "b.png", "loser": "c.png"}'), "", r"row 2: not valid JSON \(the key 'winner' comes twice\); write"),
    "empty folder": (NOTHING, "", r"cannot read pairs from .*data' \(.*\); it is empty: give the folder that holds them"),
    "parquet of nothing": (text("train.parquet", b""), "", r"cannot read pairs from .*data"),
    "parquet of text": (text("train.parquet", b"PAR1 this is no parquet file"), "", r"cannot read pairs from .*data"),
    "parquet cut off": (both(parquet(), cut("train.parquet")), "", r"cannot read pairs from .*data"),
    "parquet is a folder": (text("train.parquet/x", ""), "", r"cannot read pairs from .*data"),
    "arrow of text": (text("train.arrow", b"ARROW1 not"), "", r"cannot read pairs from .*data"),
    "only a readme": (text("README.md", "# pairs"), "", r"cannot read pairs from .*data"),
    "saved, no splits": (saved(()), "--validation_split=validation", r"has no splits, .*--validation_data_dir"),
    "saved, another split": (saved(("train", "x")), "--split=test", r"no split 'test'; it has train, x: choose"),
    "saved, index cut off": (both(saved(("train",)), text("dataset_dict.json", "{")), "", r"dict.json: not valid JSON"),
    "saved, empty index": (both(saved(("train",)), text("dataset_dict.json", {})), "", r"dict.json does not list the splits: save the data set again"),
    "saved, splits in a word": (both(saved(("train",)), text("dataset_dict.json", {"splits": "train"})), "", r"does not list the splits"),
    "saved, no list of files": (both(saved(()), text("state.json", {})), "", r"look at the files there, or save the data set again"),
    "saved, split gone": (both(saved(("train",)), drop("train")), "", r"cannot read pairs from .*data"),
    "saved, damaged": (both(saved(()), cut("data-00000-of-00001.arrow")), "", r"cannot read pairs from .*data"),
    "saved, state of text": (both(saved(()), text("state.json", "x")), "", r"cannot read pairs from .*state.json: not valid JSON"),
    "images, metadata of text": (both(text("train/a.png", PNG), text("train/metadata.jsonl", '{"file_name": "a.png"}\n{"file_name')), "", r"cannot read pairs from .*metadata.jsonl, line 2: not valid JSON"),
    "saved, state a list": (both(saved(()), text("state.json", [])), "", r"cannot read pairs from .*data"),
    "single, held out": (SINGLE, "--sft --validation_pairs=2", r"has single images; .*drop --validation_pairs"),
    "single, labels": (SINGLE, "--sft --labels_file={pairs}/train.parquet", r"has single images, .*drop --choice_model and --labels_file"),
    "all held out": (parquet(), "--validation_pairs=4", r"--validation_pairs 4 leaves nothing .* 4 pairs .*use fewer"),
    "split of a pair file": (jsonl(ROW), "--validation_split=x", r"pairs.jsonl has no splits, .*--validation_data_dir"),
    "several pair files": (both(jsonl(ROW), table(HEAD)), "", r"pair files \(pairs.csv, pairs.jsonl\): name one"),
    "image missing": (jsonl(ROW, ROW | {"loser": "none.png"}), "", r"row 2: image .*none.png does not exist"),
    "image outside": (jsonl(ROW | {"winner": "../../etc/passwd"}), "", r"row 1: image .* does not exist; paths are"),
    "image of a long name": (jsonl(ROW | {"winner": "x" * 300}), "", r"pairs.jsonl row 1: image .* does not exist"),
    "image with NUL": (jsonl(ROW | {"winner": "a\0.png"}), "", r"pairs.jsonl row 1: image .* does not exist"),
    "image is a folder": (jsonl(ROW | {"winner": "."}), "", r"pairs.jsonl row 1: image .* does not exist"),
    "image is an object": (jsonl(ROW, ROW | {"winner": {"x": 1}}), "", r"row 2: winner is .*, but must be the path"),
    "image of no name": (jsonl(ROW, ROW | {"winner": ""}), "", r"pairs.jsonl row 2: winner missing, it has .*; every row needs"),
    "caption gone": (jsonl(ROW, {"winner": "a.png", "loser": "b.png"}), "", r"row 2: caption missing, it has 'winner', 'loser'; every row"),
    "caption null in JSONL": (jsonl(ROW, ROW | {"caption": None}), "", r"row 2: caption missing, it has .*; every row needs"),
    "caption a number": (jsonl(ROW, ROW | {"caption": 7}), "", r"pairs.jsonl row 2: caption is 7, but must be a text"),
    "caption after a blank line": (jsonl(ROW, "", ROW | {"caption": 7}), "", r"pairs.jsonl row 3: caption is 7"),
    "captions mixed": (jsonl(ROW | {"caption": ["a", 1]}), "", r"row 1: caption is \['a', 1\], but must be a text"),
    "half a surrogate": (jsonl(ROW | {"caption": "\ud83c"}), "", r"row 1: caption is '.ud83c', but must be a text"),
    "JSONL, row a list": (jsonl(ROW, "[1, 2]"), "", r"pairs.jsonl row 2 is not a JSON object; write \{"),
    "JSONL, broken": (jsonl(ROW, "{caption"), "", r"pairs.jsonl row 2: not valid JSON \(.*\); write \{"),
    "JSONL, too deep": (jsonl(ROW, DEEP), "", r"pairs.jsonl row 2: not valid JSON \(.*recursion.*\); write"),
    "JSONL, digits without end": (jsonl(ROW, "1" * 5000), "", r"pairs.jsonl row 2: not valid JSON"),
    "JSONL in UTF-16": (jsonl(ROW, encoding="utf-16"), "", r"pairs.jsonl is not UTF-8 text .*; save it as UTF-8"),
    "JSONL in UTF-16 without a mark": (jsonl(ROW, encoding="utf-16-le"), "", r"pairs.jsonl is not UTF-8 text \(line 1 holds NUL\); save"),
    "JSONL with labels": (jsonl(ROW, ROW | {"label_0": 0}), "", r"pairs.jsonl row 2: winner and loser say which .* label_0: remove that"),
    "JSONL in Latin-1": (jsonl('{"caption": "é"}', encoding="latin-1"), "", r"is not UTF-8 text .*; save it as UTF-8"),
    "JSONL of nothing": (jsonl(""), "", r"pairs.jsonl has no rows; write"),
    "JSONL is a folder": (text("pairs.jsonl/x", ""), "", r"cannot read pairs from .*data"),
    "CSV, image missing": (table(HEAD, "x,a.png,b.png", "x,a.png,c"), "", r"pairs.csv row 2: image .*c does not exist"),
    "CSV, row too short": (table(HEAD, "x,a.png,b.png", "x,a.png"), "", r"row 2: loser missing, it has .*; every row needs"),
    "CSV, row too long": (table(HEAD, "x, y,a.png,b.png"), "", r"row 1: more values than columns; .* double quotes"),
    "CSV with semicolons": (table("caption;winner;loser", "x;a.png;b.png"), "", r"row 1: caption, .* missing"),
    "CSV without header": (table("x,a.png,b.png", "x,a.png,b.png"), "", r"row 1: caption, winner, loser missing"),
    "CSV with a quote within": (table(HEAD, '"a" cat,a.png,b.png'), "", r"pairs.csv is not valid CSV \(.*\); write it"),
    "one image twice": (jsonl(ROW, ROW | {"loser": "a.png"}), "", r"pairs.jsonl row 2: winner and loser are the same image"),
    "CSV without rows": (table(HEAD), "", r"pairs.csv has no rows; write"),
    "CSV of nothing": (text("pairs.csv", ""), "", r"pairs.csv has no rows; write"),
    "CSV, endless field": (table(HEAD, f"{'x' * 140_000},a.png,b.png"), "", r"is not valid CSV \(.*\); write"),
    "CSV in Latin-1": (table(HEAD, "é,a.png,b.png", encoding="latin-1"), "", r"is not UTF-8 text .*; save it"),
    "CSV in UTF-16": (table(HEAD, "x,a.png,b.png", encoding="utf-16"), "", r"pairs.csv is not UTF-8 text .*; save it"),
    "CSV, column twice": (table(f"{HEAD},winner", "x,a.png,b.png,b.png"), "", r"pairs.csv has more than one column 'winner': keep one"),
    "image of no bytes": (parquet(jpg_0=[PNG, PNG, b"", PNG]), NO_UNREADABLE, r"row 2: jpg_0 is empty; 1 such row\(s\)"),
    "image file of no bytes": (both(jsonl(ROW), text("b.png", "")), NO_UNREADABLE, r"row 0: jpg_1 .*b.png is empty; 1 such row\(s\)"),
    "more text than parquet": (both(parquet("x.parquet"), text("a.txt", "x"), text("b.txt", "x")), "", r"data is read as text, .* without x.parquet: move"),
    "several configs": (both(parquet(), CONFIGS), "", r"cannot read pairs from .* as --dataset_config_name: \['a', 'b'\]"),
    "another config": (both(parquet(), CONFIGS), "--dataset_config_name=c", r"as --dataset_config_name: \['a', 'b'\]"),
    "images as lists": (
        parquet(jpg_0=[{"bytes": list(PNG), "path": None}] * 4),
        "",
        r"column jpg_0 holds struct<.*list.*>, but must hold encoded images",
    ),
    "labels of other data": (
        both(parquet(), parquet("l.pq", caption=None, jpg_0=None, jpg_1=None)),
        "--labels_file={f}/data/l.pq --train_data_dir={pairs}",
        r"l.pq has labels of 4 rows, but .* has 120 rows: make it again",
    ),
    "labels without labels": (parquet(label_0=None), LABELS, r"cannot read labels from .* \(.*\); make it with"),
    "labels out of range": (parquet(label_0=[1.0, 0.0, 7.0, 0.0]), LABELS, r"train.parquet row 2: label_0 is 7.0, but"),
    "labels of bytes": (parquet(caption=[b"a"] * 4), LABELS, r"data \(train\) row 0: caption is b'a', but must be"),
    "labels sorted otherwise": (
        both(parquet(), parquet("l.pq", row=[1, 0, 2, 3])),
        "--labels_file={f}/data/l.pq",
        r"l.pq does not have its rows in the order of the data: sort them by row",
    ),
    "labels in text": (both(parquet(), text("l.txt", "1 0 1")), "--labels_file={f}/data/l.txt", r"cannot read labels"),
    "prompts in Latin-1": (text("p.txt", b"caf\xe9"), VALIDATION, r"p.txt is not UTF-8 text .*; save it as UTF-8"),
    "prompts of no kind": (text("p", "x"), VALIDATION.replace("p.txt", "p"), r"p: prompts are read from .json, .jsonl"),
    "held out from its folder": (
        jsonl(ROW),
        "--train_data_dir={f}/data/pairs.jsonl --validation_data_dir={f}/data",
        r"--validation_data_dir .*data holds the pairs trained on: name another folder",
    ),
    "no prompts": (text("p.txt", ""), VALIDATION, r"p.txt holds no prompts"),
    "settings in the way": (
        text("config.json/x", ""),
        "--output_dir={f}/data --train_data_dir={pairs}",
        r"data/config.json is in the way of the trained model",
    ),
}  # fmt: skip

WEIGHTS = "diffusion_pytorch_model.safetensors"
ENCODER, SCHEDULER = "text_encoder/model.safetensors", "scheduler/scheduler_config.json"
MODELS = {  # base model: (what writes it, message)
    "no tokenizer": (base(drop("tokenizer")), r"tokenizer of .*base' has 2 entries, .*: files are missing .*"),
    "no VAE": (base(drop("vae")), r"cannot load vae of .*base' \(.*\); give a local folder in the hub's format"),
    "no UNet weights": (base(drop(f"unet/{WEIGHTS}")), r"cannot load unet of .*base' \(.*\); give a local"),
    "index of text": (base(text("model_index.json", "SD")), r"model_index.json: not valid JSON \(.*\); download"),
    "index too deep": (base(text("model_index.json", DEEP)), r"model_index.json: not valid JSON \(.*\); download the"),
    "index is a list": (base(text("model_index.json", [])), r"model_index.json names no pipeline class; download the"),
    "index without class": (base(edit("model_index.json", _class_name=None)), r"names no pipeline class"),
    "index of Flux": (base(edit("model_index.json", _class_name="FluxPipeline")), r"base holds a FluxPipeline"),
    "a variant of the UNet alone": (
        base(lambda folder: (folder / "unet" / WEIGHTS).rename(folder / "unet" / WEIGHTS.replace(".", ".fp16.", 1))),
        r"cannot load unet of .*base' \(.*\); its weights are of the variant fp16 alone: take '.fp16' out",
    ),
    "UNet config of text": (base(text("unet/config.json", "{")), r"cannot load unet of .*base' \("),
    "UNet config a list": (base(text("unet/config.json", [])), r"cannot load unet of .*base' \("),
    "UNet config of no sizes": (base(text("unet/config.json", {})), r"cannot load unet of .*base' \(.*expected shape"),
    "UNet config of a text size": (base(edit("unet/config.json", in_channels="x")), r"cannot load unet of .*base' \("),
    "UNet of another size": (base(edit("unet/config.json", block_out_channels=[8, 16])), r"cannot load unet .*shape"),
    "UNet weights cut off": (base(cut(f"unet/{WEIGHTS}")), r"cannot load unet of .*base' \("),
    "UNet lacks a tensor": (base(tensors(f"unet/{WEIGHTS}", less)), r"unet of .*base' lacks 1 tensors .*; download"),
    "UNet not finite": (base(tensors(f"unet/{WEIGHTS}", nan)), r"unet of .*base' holds numbers that are not finite"),
    "VAE weights cut off": (base(cut(f"vae/{WEIGHTS}")), r"cannot load vae of .*base' \("),
    "VAE lacks a tensor": (base(tensors(f"vae/{WEIGHTS}", less)), r"vae of .*base' lacks 1 tensors .*; download"),
    "encoder cut off": (base(cut(ENCODER)), r"cannot load text_encoder of .*base' \("),
    "encoder lacks a tensor": (base(tensors(ENCODER, less)), r"text_encoder of .* lacks 1 tensors"),
    "tokenizer of text": (base(text("tokenizer/tokenizer.json", "x")), r"cannot load tokenizer of .*base' \("),
    "scheduler of text": (base(text(SCHEDULER, "x")), r"cannot load scheduler of .*base' \("),
    "scheduler without betas": (base(text(SCHEDULER, {"num_train_timesteps": 1000})), r"scheduler of .*base has no betas"),
    "tokenizer without a length": (
        base(edit("tokenizer/tokenizer_config.json", model_max_length=None)),
        r"tokenizer of .* makes 1000\d+ tokens, its text encoder takes \d+: correct model_max_length",
    ),
    "scale of nothing": (base(edit("vae/config.json", scaling_factor=0)), r"cannot encode, .*\(its pixels have numbers"),
    "scale of text": (base(edit("vae/config.json", scaling_factor="x")), r"cannot encode, predict and decode an image"),
    "norm without a number": (base(edit("unet/config.json", norm_eps=float("nan"))), r"UNet's prediction for .*base is not finite"),
    "more weights than layers": (base(edit("text_encoder/config.json", num_hidden_layers=1)), r"text_encoder of .* has 16 tensors"),
    "betas a number": (base(edit(SCHEDULER, trained_betas=0.5)), r"base has no list of trained_betas: correct its"),
    "betas too large": (base(edit(SCHEDULER, beta_end=3.0)), r"base has betas outside \(0, 1\]: correct its"),
    "VAE with a mean": (base(edit("vae/config.json", latents_mean=[0.1] * 4)), r"VAE .*base shifts its latents, which"),
    "prediction of samples": (base(edit(SCHEDULER, prediction_type="sample")), r"'sample' is not"),
}  # fmt: skip

SAVING = {  # what training alone needs of a base model: (what writes it, message)
    "index without parts": (
        base(text("model_index.json", {"_class_name": "StableDiffusionPipeline"})),
        r"model_index.json of .*base does not list scheduler: download the model again",
    ),
    "index with a mark": (
        base(text("model_index.json", '{"_class_name": "StableDiffusionPipeline"}', "utf-8-sig")),
        r"base: .*model_index.json' is not a valid JSON file",
    ),
    "index of no such class": (
        base(edit("model_index.json", scheduler=["diffusers", "FooScheduler"])),
        r"cannot load StableDiffusionPipeline of .*FooScheduler",
    ),
}

EIGHT_BITS = r"unet.pth: .* is torch.float8_e4m3fn, torch.strided, cpu, but must be plain numbers of fp16"
UNETS = {  # weights of the UNet: (what writes them, file, message)
    "text": (text("unet.pth", "weights"), "unet.pth", UNREADABLE),
    "nothing": (text("unet.pth", ""), "unet.pth", UNREADABLE),
    "cut off": (both(state(), cut("unet.pth")), "unet.pth", UNREADABLE),
    "beside an object": (state(lambda s: {"state_dict": s, "args": Path()}), "unet.pth", r"objects or code, which are not loaded\): give a state dict"),
    "a list": (lambda f: torch.save([1, 2], f / "unet.pth"), "unet.pth", r"unet.pth is not a state dict: expected"),
    "an empty dict": (lambda f: torch.save({}, f / "unet.pth"), "unet.pth", r"unet.pth is not a state dict: expected"),
    "of another format": (
        state(lambda s: {f"model.diffusion_model.{name}": value for name, value in s.items()}),
        "unet.pth",
        r"unet.pth has the names of the original Stable Diffusion: convert it",
    ),
    "nested": (state(lambda s: {"model": s}), "unet.pth", r"unet.pth is not a state dict: expected"),
    "in 8 bits": (state(lambda s: {k: v.to(torch.float8_e4m3fn) for k, v in s.items()}), "unet.pth", EIGHT_BITS),
    "whole numbers": (state(lambda s: {k: v.int() for k, v in s.items()}), "unet.pth", r"unet.pth: .* is torch.int32"),
    "without numbers": (state(lambda s: {k: v.to("meta") for k, v in s.items()}), "unet.pth", r"unet.pth: .* meta, but must"),
    "sparse": (state(lambda s: {k: v.to_sparse() for k, v in s.items()}), "unet.pth", r"unet.pth: .* torch.sparse_coo"),
    "of ragged shape": (
        state(lambda s: s | {"x": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}),
        "unet.pth",
        r"unet.pth (is not a state dict: expected|cannot be read as weights)",  # torch 2.15 does not load them
    ),
    "a pointer of git-lfs": (text("unet.pth", "version https://git-lfs.github.com/spec/v1"), "unet.pth", r"git lfs pull"),
    "a web page": (text("unet.pth", "<!DOCTYPE html>"), "unet.pth", r"unet.pth cannot be read .*\(it is a web page\)"),
    "safetensors by another name": (
        lambda folder: save_file({"x": torch.zeros(1)}, folder / "unet.pth"),
        "unet.pth",
        r"unet.pth cannot be read .*\(it is a safetensors file: let its name end so\)",
    ),
    "torch's format by another name": (
        both(state(), lambda folder: (folder / "unet.pth").rename(folder / "u.safetensors")),
        "u.safetensors",
        r"u.safetensors cannot be read .*\(it is a file of torch.save: let its name end in .pth\)",
    ),
    "numbered": (state(lambda s: dict(enumerate(s.values()))), "unet.pth", r"unet.pth is not a state dict: expected"),
    "code": (malicious("unet.pth"), "unet.pth", r"unet.pth cannot be read as weights \(it holds Python objects or code"),
    "lacks a tensor": (state(less), "unet.pth", r"unet.pth belongs to another architecture: 1 tensors missing"),
    "names with a prefix": (
        state(lambda s: {f"ema_model.{name}": s[name] for name in s}),
        "unet.pth",
        r"unet.pth: 'ema_model.' comes before the names of tensors: save them without it",
    ),
    "a number among tensors": (state(lambda s: s | {"step": 5}), "unet.pth", r"not a state dict: .* \('step' is none\)"),
    "unknown tensor": (state(lambda s: s | {"x": torch.ones(1)}), "unet.pth", r"belongs .* 1 unknown.* give the"),
    "LoRA": (state(lambda s: s | {"x.lora_A.weight": torch.ones(1)}), "unet.pth", r"unet.pth holds LoRA weights, which"),
    "not finite in fp32": (state(lambda s: {k: v.double() * 1e300 for k, v in s.items()}), "unet.pth", r"not finite \(in"),
    "a bit flipped": (both(state(), flip("unet.pth")), "unet.pth", r"unet.pth is damaged, .*\(CRC of .*\): download it again"),
    "other shapes": (state(lambda s: {k: v[None] for k, v in s.items()}), "unet.pth", r"belongs .* of another shape"),
    "not finite": (state(nan), "unet.pth", r"unet.pth holds numbers that are not finite \(in .*\)"),
    "safetensors cut off": (both(safetensors, cut("u.safetensors")), "u.safetensors", UNREADABLE),
    "safetensors of text": (text("u.safetensors", "x"), "u.safetensors", UNREADABLE),
    "unknown ending": (text("u.ckpt", "x"), "u.ckpt", r"u.ckpt cannot be read as weights \(.*\); download"),
    "empty folder": (text("u/readme", ""), "u", r"cannot load unet of .*u' \(.*\); give a local"),
    "a VAE": (lambda folder: shutil.copytree(compare.BASE / "vae", folder / "u"), "u", r"u' is of the class AutoencoderKL, not UNet2DConditionModel: name another"),
    "config alone": (text("u/config.json", {}), "u", r"cannot load .*u' \(.*\); give a local"),
}  # fmt: skip


def optimizer_of_other_shapes(folder):
    """Its kernel would read past the end of what is there."""
    state = torch.load(folder / "optimizer.bin", weights_only=True)
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].flatten()[:1]
    torch.save(state, folder / "optimizer.bin")


def optimizer_of_repeated_elements(folder):
    """Of the right shape, with memory for one element."""
    state = torch.load(folder / "optimizer.bin", weights_only=True)
    state["state"][0]["exp_avg"] = torch.zeros(()).expand(state["state"][0]["exp_avg"].shape)
    torch.save(state, folder / "optimizer.bin")


def optimizer_of_sparse_moments(folder):
    state = torch.load(folder / "optimizer.bin", weights_only=True)
    state["state"][0]["exp_avg_sq"] = state["state"][0]["exp_avg_sq"].to_sparse()
    torch.save(state, folder / "optimizer.bin")


CHECKPOINTS = {  # damage to a checkpoint: (what does it, message)
    "state of text": (text("state.json", "x"), r"state.json: not valid JSON \(.*\); remove the checkpoint"),
    "state too deep": (text("state.json", DEEP), r"state.json: not valid JSON \(.*\); remove the checkpoint"),
    "state in UTF-16": (text("state.json", "{}", "utf-16"), r"state.json is not UTF-8 text"),
    "state a list": (text("state.json", []), r"state.json does not hold step and seed, .*; remove the checkpoint"),
    "state without step": (edit("state.json", step=None), r"state.json does not hold step and seed, .*; remove"),
    "step of text": (edit("state.json", step="1"), r"state.json does not hold step and seed"),
    "step below 0": (edit("state.json", step=-1), r"state.json does not hold step and seed, both 0 or more"),
    "step not finite": (edit("state.json", step=float("nan")), r"state.json does not hold step and seed"),
    "settings a list": (edit("state.json", config=[]), r"state.json does not hold step and seed, .* config"),
    "plan a list": (edit("state.json", plan=[]), r"state.json does not hold step and seed, .* plan"),
    "meter of texts": (edit("state.json", meter={"sums": {"x": ["y"]}, "made": 1, "skipped": 0}), r"state.json does not hold the meter's sums as lists of numbers; remove"),
    "plan of texts": (edit("state.json", plan={"pairs": "x"}), r"state.json does not hold the plan as numbers; remove"),
    "weights cut off": (cut("unet.pth"), r"unet.pth cannot be read as weights"),
    "weights with code": (malicious("unet.pth"), r"unet.pth cannot be read as weights"),
    "meter of no numbers": (edit("state.json", meter={"sums": {}, "made": None, "skipped": 0}), r"numbers of updates made"),
    "optimizer of other shapes": (optimizer_of_other_shapes, r"resumed from \(exp_avg of the optimizer does not have"),
    "optimizer of repeated elements": (optimizer_of_repeated_elements, r"resumed from \(exp_avg of the optimizer does not"),
    "optimizer of sparse moments": (optimizer_of_sparse_moments, r"resumed from \(exp_avg_sq of the optimizer does not"),
    "meter too large": (edit("state.json", meter={"sums": {}, "made": 10**30, "skipped": 0}), r"numbers of updates made"),
    "optimizer gone": (drop("optimizer.bin"), r"checkpoint-1 cannot be resumed from \(.*\); remove it"),
    "optimizer cut off": (cut("optimizer.bin"), r"checkpoint-1 cannot be resumed from \(.*\); remove it"),
    "optimizer with code": (malicious("optimizer.bin"), r"checkpoint-1 cannot be resumed from \(.*\); remove it"),
    "schedule with code": (malicious("scheduler.bin"), r"checkpoint-1 cannot be resumed from \(.*\); remove it"),
}  # fmt: skip

PROMPTS = {  # prompts of eval_generate.py: (file, its content, message)
    "an object": ("p.json", {}, r"p.json is not a JSON list; write"),
    "broken": ("p.json", "[", r"p.json: not valid JSON \(.*\); write it as JSON"),
    "too deep": ("p.json", DEEP, r"p.json: not valid JSON \(.*recursion.*\); write it"),
    "empty list": ("p.json", [], r"p.json holds no prompts"),
    "no prompt": ("p.json", ["cat", {"x": 1}], r'p.json, entry 1 \(counted from 0\): has no text under "prompt"'),
    "blank prompt": ("p.json", [{"prompt": " "}], r"p.json, entry 0 .* has no text .* or remove it"),
    "number": ("p.json", ["cat", 3], r"p.json, entry 1 .* has no text"),
    "metadata of text": ("p.json", [{"prompt": "x", "metadata": "x"}], r'entry 0 .* "metadata" must be an object'),
    "negative a list": ("p.json", [{"prompt": "x", "neg_prompt": [1]}], r'entry 0 .* "neg_prompt" .* must be text'),
    "path a number": ("p.json", [{"prompt": "x", "raw_image_path": 3}], r"p.json, entry 0 .* must be text"),
    "half a surrogate": ("p.json", ["\ud83c"], r"p.json, entry 0 .* surrogate, which is not a character; correct it"),
    "line broken": ("p.jsonl", '"cat"\n{"prompt"', r"p.jsonl, line 2: not valid JSON"),
    "line too deep": ("p.jsonl", '"cat"\n' + DEEP, r"p.jsonl, line 2: not valid JSON"),
    "metadata not finite": ("p.json", '["cat", {"prompt": "x", "metadata": {"x": NaN}}]', r"entry 1 .* NaN or Infinity, which are"),
    "a key twice": ("p.json", '[{"prompt": "x", "prompt": "y"}]', r"p.json: not valid JSON \(the key 'prompt' comes twice\)"),
    "JSON as text": ("p.txt", '[\n"a cat"\n]', r"p.txt holds JSON: let its name end in .json"),
    "JSON lines as text": ("p.txt", '{"prompt": "a"}\n{"prompt": "b"}\n', r"p.txt holds JSON: .* in .jsonl for an object per"),
    "blank lines": ("p.txt", "\n \n", r"p.txt holds no prompts"),
    "UTF-16": ("p.txt", "cat".encode("utf-16"), r"p.txt is not UTF-8 text .* save it as UTF-8"),
    "UTF-16 without a mark": ("p.txt", "a\ncat".encode("utf-16-le"), r"p.txt is not UTF-8 text \(line 1 holds NUL\); save"),
    "NUL": ("p.txt", b"a\nc\0t", r"p.txt is not UTF-8 text \(line 2 holds NUL\); .* correct the line"),
    "Latin-1": ("p.json", '["café"]'.encode("latin-1"), r"p.json is not UTF-8 text .* save it as UTF-8"),
    "CSV": ("p.csv", "cat", r"p.csv: prompts are read from .json, .jsonl, .txt files"),
    "a folder": ("p.txt/x", "", r"p.txt cannot be read \(Is a directory\)"),
}  # fmt: skip

GOOD = {"prompt": "p", "gen_image_path": "0.png"}
OUT = "../../../../../../etc/passwd"
MANIFESTS = {  # manifest of run B, which has no scores: (its content, message)
    "nothing": ("", r"B.json: not valid JSON \(.*line 1.*\); generate again"),
    "cut off": ('[{"prompt": "p", "gen_', r"B.json: not valid JSON \(.*\); generate again"),
    "too deep": (DEEP, r"B.json: not valid JSON \(.*recursion.*\); generate again"),
    "Latin-1": (b'["\xff"]', r"B.json is not UTF-8 text \(.* at byte 2\); save it"),
    "UTF-16": ("[]".encode("utf-16"), r"B.json is not UTF-8 text .*; save it"),
    "a summary": ({"pair": {}}, r"B.json is not a JSON list of entries; give a manifest"),
    "empty": ([], r"B.json is an empty list; generate its images first"),
    "a text": ([GOOD, "p"], r"B.json, entry 1 \(counted from 0\): not an object; write"),
    "no prompt": ([GOOD, {"gen_image_path": "0.png"}], r'B.json, entry 1 .*: has no text under "prompt"; add'),
    "blank prompt": ([GOOD | {"prompt": " \n"}], r'B.json, entry 0 .*: has no text under "prompt"'),
    "prompt a list": ([GOOD | {"prompt": ["p"]}], r'B.json, entry 0 .*: has no text under "prompt"'),
    "half a surrogate": ([GOOD | {"prompt": "\ud83c"}], r'B.json, entry 0 .*: has no text under "prompt"'),
    "half a surrogate in a path": ([GOOD | {"gen_image_path": "\ud800.png"}], r'entry 0 .*: has no path under "gen_'),
    "no image": ([GOOD, {"prompt": "p"}], r'B.json, entry 1 .*: has no path under "gen_image_path"; add'),
    "no images": ([GOOD | {"gen_image_path": []}], r'B.json, entry 0 .*: has no path under "gen_image_path"'),
    "images empty": ([GOOD | {"gen_image_path": ["", None]}], r'entry 0 .*: has no path under "gen_image_path"'),
    "image a number": ([GOOD | {"gen_image_path": 3}], r'B.json, entry 0 .*: has no path under "gen_image_path"'),
    "image outside": ([GOOD | {"gen_image_path": OUT}], r"B.json, entry 0 .*: image .*passwd leads out of .* absolute"),
    "image outside by a folder": ([GOOD | {"gen_image_path": f"x/../{OUT}"}], r"image .*passwd leads out of"),
    "image an address": ([GOOD | {"gen_image_path": "http://127.0.0.1:9/0.png"}], r"image http.* is neither .*"),
    "image a text": ([GOOD | {"gen_image_path": "B.json"}], r"image .*B.json cannot be scored: .*; make it again"),
    "image a folder": ([GOOD | {"gen_image_path": "."}], r"B.json, entry 0 .*: image \. is neither .*; generate"),
    "NUL in a name": ([GOOD | {"gen_image_path": "\0.png"}], r"B.json, entry 0 .*: image .*; generate it again"),
    "long name": ([GOOD | {"gen_image_path": "x" * 300}], r"entry 0 .*: image x+ is neither .*; generate it again"),
    "images gone": ([GOOD | {"gen_image_path": f"{i}.png"} for i in (9, 8)], r"image 9.png \(and 1 more\) is neither"),
}  # fmt: skip

SCORES = {  # scores.jsonl of run B: (its second line, message)
    "broken": ('{"image": "0.png", "pro', r"B/scores.jsonl, line 2: not valid JSON \(.*\); delete the line"),
    "too deep": (DEEP, r"B/scores.jsonl, line 2: not valid JSON \(.*\); delete the line"),
    "UTF-16": ("{}".encode("utf-16"), r"B/scores.jsonl, line 2: not valid JSON \(.*\); delete the line"),
    "NUL": (bytes(8), r"B/scores.jsonl, line 2: not valid JSON \(Expecting value.*\); delete the line"),
    "a list": ("[1]", r'B/scores.jsonl, line 2: not an object with "image" and "prompt"; delete'),
    "no prompt": ('{"image": "0.png"}', r'B/scores.jsonl, line 2: not an object with "image" and "prompt"; delete'),
    "models of text": (score('0.1, "models": "x"'), r'B/scores.jsonl, line 2: "models" is not an object .*; delete'),
    "digest a list": (score('0.1, "sha256": ["x"]'), r'line 2: "sha256" is not a text; delete'),
    "models of numbers": (score('0.1, "models": {"CLIP": 1}'), r'line 2: "models" is not an object .*; delete'),
    "another number": (score("0.7"), r"B/scores.jsonl, line 2: CLIP of 0.png is 0.7, and 0.5 in an earlier line; delete"),
    "a key twice": (score('0.1, "CLIP": 0.9'), r"line 2: not valid JSON \(the key 'CLIP' comes twice\); delete the line"),
    "NaN": (score("NaN"), r"B/scores.jsonl, line 2: CLIP of 0.png is nan, not a finite number; .*scored again"),
    "infinite": (score("-Infinity"), r"B/scores.jsonl, line 2: CLIP of 0.png is -inf, not a finite"),
    "large": (score("1e300"), r"B/scores.jsonl, line 2: CLIP of 0.png is 1e\+300, not a finite"),
    "larger": (score("1" + "0" * 400), r"B/scores.jsonl, line 2: CLIP of 0.png is 10+, not a finite"),
    "text": (score('"0.2"'), r"B/scores.jsonl, line 2: CLIP of 0.png is '0.2', not a finite"),
    "yes": (score("true"), r"B/scores.jsonl, line 2: CLIP of 0.png is True, not a finite"),
    "null": (score("null"), r"B/scores.jsonl, line 2: CLIP of 0.png is None, not a finite"),
}  # fmt: skip


LAUNCHED = {  # what is run in a process of its own: (words, environment, message)
    "train": ("scripts/train/sd15_dmpo.sh --beta_dpo=-1", {}, r"--beta_dpo must be above 0 and below 2.63, got -1"),
    "relabel": ("python -m sdpo.relabel --metric=blip --train_data_dir=x", {}, r"--metric 'blip': choose from pickscore"),
    "generate": ("scripts/eval/test_tiny.sh none/unet.pth --steps=0", {}, r"--steps must be at least 1 and below 2.31, got 0"),
    "versus, no flags": ("scripts/eval/test_vs.sh", {}, r"required: --json_a, --json_b, --label_a, --label_b"),
    "versus, no file": (
        "python eval_vs.py --json_a=a.json --json_b=b.json --label_a=a --label_b=b",
        {},
        r"a.json is not a file; give the manifest",
    ),
    "rank of text": ("scripts/eval/test_tiny.sh base", {"RANK": "x"}, r"RANK=x in the environment is not a number: start"),
    "rank too high": (
        "scripts/eval/test_tiny.sh base",
        {"RANK": "5", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        r"RANK=5 in the environment is not below WORLD_SIZE=2: start",
    ),
    "no UNet": ("scripts/eval/test_sd15.sh", {}, r"name the UNet first: .*test_sd15.sh PATH/unet.pth"),
    "no UNet, tiny": ("scripts/eval/test_tiny.sh", {}, r"name the UNet first: .*test_tiny.sh PATH/unet.pth"),
    "a flag for a UNet": ("scripts/eval/test_sdxl.sh --steps=2", {}, r"name the UNet first: .*test_sdxl.sh"),
    "GPUs in words, training": ("scripts/train/sdxl_dspo.sh", {"GPUS": "two"}, r"GPUS=two is not a number"),
    "GPUs below 0": ("scripts/train/sd15_dspo.sh", {"GPUS": "-1"}, r"GPUS=-1 is not a number of GPUs: give how many"),
    "too many GPUs": ("scripts/train/sd15_dspo.sh", {"GPUS": "9" * 20}, r"GPUS=9+ is not a number of GPUs: give how many"),
    "no GPUs": ("scripts/train/sd15_dspo.sh", {"GPUS": "0"}, r"GPUS=0 is not a number of GPUs: give how many"),
    "GPUs in words, evaluation": ("scripts/eval/test_sd15.sh x", {"GPUS": "two"}, r"GPUS=two is not a number"),
    "no interpreter, training": ("scripts/train/sdxl_dmpo.sh", {"PYTHON": "/nowhere"}, r"/nowhere is not a program"),
    "no interpreter": ("scripts/eval/test_vs.sh", {"PYTHON": "/nowhere"}, r"PYTHON=/nowhere is not a program"),
}  # fmt: skip


# Running


@pytest.fixture(scope="module")
def pictures_manifest(tmp_path_factory):
    """A manifest of two pictures without scores."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(2):
        (folder / f"{i}.png").write_bytes(PNG)
    text("m.json", [{"prompt": pictures.HELD_OUT[i].caption, "gen_image_path": f"{i}.png"} for i in range(2)])(folder)
    return folder / "m.json"


@pytest.fixture
def command(bases, pairs_folder, pictures_manifest, tmp_path, monkeypatch):
    """Runs a command with flags added to ones that would work; the network fails the test."""
    places = {
        "f": tmp_path, "pairs": pairs_folder, "pictures": pictures_manifest, "sd15": bases["sd15", "epsilon"],
        "sdxl": bases["sdxl", "epsilon"],
    }  # fmt: skip
    good = {
        "train": "--pretrained_model_name_or_path={sd15} --train_data_dir={pairs} --resolution=32 --mixed_precision=no "
        "--report_to=none --output_dir={f}/run --cache_dir={f}/cache --max_train_steps=1 --seed=7",
        "relabel": "--train_data_dir={pairs} --metric=pixels --out={f}/labels.parquet --cache_dir={f}/cache",
        "eval_generate": "--unet_path=base --pretrain_path={sd15} --test_json={f}/few.json --output_path={f}/run "
        "--steps=1 --dtype=fp32 --metrics none --cache_dir={f}/cache",
        "eval_vs": "--json_a={f}/A/A.json --json_b={f}/B/B.json --label_a=A --label_b=B "
        "--metrics CLIP --outdir={f}/out",
    }
    text("few.json", ["a cat"])(tmp_path)
    for run in "AB":
        text(f"{run}/{run}.json", [GOOD])(tmp_path)
        text(f"{run}/scores.jsonl", score(0.5) + "\n")(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))

    def run(name, flags=""):
        words = [word.format(**places) for word in (good[name] + " " + flags).split()]
        return run_command(lambda: MAINS[name](words))

    return run


def sentence(said):
    """The one sentence that a command ended with, on standard error after what it told before."""
    *told, last = said.splitlines()
    assert last.startswith("error: ") and not any(line.startswith("error: ") for line in told), said
    assert "Traceback" not in said and len(last) < 700, said
    return last


@pytest.fixture
def refused(command, capsys):
    """Runs a command as `command` does; returns its one sentence after checking the exit code."""

    def run(name, flags=""):
        with pytest.raises(SystemExit) as end:
            command(name, flags)
        assert end.value.code == 2
        return sentence(capsys.readouterr().err)

    return run


def check(said, message):
    assert re.search(message, said), said


def test_an_interrupt_is_no_traceback(capsys):
    with pytest.raises(SystemExit) as end:
        run_command(Mock(side_effect=KeyboardInterrupt))
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("flags", TRAIN_FLAGS)
def test_flags_of_train(refused, tmp_path, flags):
    check(refused("train", flags), TRAIN_FLAGS[flags])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("flags", RELABEL_FLAGS)
def test_flags_of_relabel(refused, flags):
    check(refused("relabel", flags), RELABEL_FLAGS[flags])


@pytest.mark.parametrize("flags", GENERATE_FLAGS)
def test_flags_of_eval_generate(refused, tmp_path, flags):
    check(refused("eval_generate", flags), GENERATE_FLAGS[flags])
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("flags", VERSUS_FLAGS)
def test_flags_of_eval_vs(refused, tmp_path, flags):
    check(refused("eval_vs", flags), VERSUS_FLAGS[flags])
    assert not list((tmp_path / "out").glob("*/*"))


@pytest.mark.parametrize("case", DATA)
def test_pairs(refused, tmp_path, case):
    write, flags, message = DATA[case]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    check(refused("train", "--train_data_dir={f}/data " + flags), message)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize(
    "name, flag", [("train", "--pretrained_model_name_or_path"), ("eval_generate", "--pretrain_path")]
)
def test_base_models(refused, tmp_path, case, name, flag):
    write, message = MODELS[case]
    write(tmp_path)
    check(refused(name, flag + "={f}/base"), message)


@pytest.mark.parametrize("case", SAVING)
def test_base_models_that_could_not_be_saved(refused, tmp_path, case):
    write, message = SAVING[case]
    write(tmp_path)
    check(refused("train", "--pretrained_model_name_or_path={f}/base"), message)


@pytest.mark.parametrize("case", UNETS)
@pytest.mark.parametrize(
    "name, flags",
    [
        ("train", f"--pretrained_model_name_or_path={compare.BASE} --unet_init="),
        ("eval_generate", f"--pretrain_path={compare.BASE} --unet_path="),
    ],
)
def test_unets(refused, tmp_path, case, name, flags):
    write, file, message = UNETS[case]
    write(tmp_path)
    check(refused(name, flags + "{f}/" + file), message)
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def trained(bases, pairs_folder, tmp_path_factory):
    """The output folder of a run of one update, with its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    train.main(
        f"--pretrained_model_name_or_path={bases['sd15', 'epsilon']} --train_data_dir={pairs_folder} --resolution=32 "
        f"--mixed_precision=no --report_to=none --output_dir={folder} --cache_dir={folder}/cache --max_train_steps=1 "
        "--checkpointing_steps=1 --seed=7".split()
    )
    return folder


@pytest.mark.parametrize("name", ["vae", "scheduler", "unet.pth/x"])
def test_what_is_in_the_way_of_the_trained_model(refused, tmp_path, name):
    text(f"run/{name}", "x")(tmp_path)
    check(
        refused("train"),
        rf"run/{name.removesuffix('/x')} is in the way of the trained model, a link, or cannot be written: move",
    )


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(refused, trained, tmp_path, case):
    damage, message = CHECKPOINTS[case]
    shutil.copytree(trained / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    damage(tmp_path / "run" / "checkpoint-1")
    (tmp_path / "run" / "checkpoint-1" / "files.json").unlink()
    seal(tmp_path / "run" / "checkpoint-1")  # without it the damage is seen before any file is read
    check(refused("train", "--max_train_steps=2"), message)
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize(
    "line, message",
    [
        ("x", r"line 2: not valid JSON \(.*\); remove the file"),
        (DEEP, r"line 2: not valid JSON \(.*\); remove the file"),
        ("[1]", r"line 2: not the scores of two images; remove the file"),
        ("[1, NaN]", r"line 2: a score is nan, not a finite number"),
    ],
)
def test_scores_kept_by_relabel(refused, pairs_folder, tmp_path, line, message):
    config = relabel.RelabelConfig(train_data_dir=str(pairs_folder), metric="pixels", cache_dir=str(tmp_path / "cache"))
    about = relabel.describe_scores(config, read_table(config, "train"))
    text("labels.parquet.scores.jsonl", f"{json.dumps(about)}\n{line}\n")(tmp_path)
    check(refused("relabel"), r"labels.parquet.scores.jsonl, " + message)


@pytest.mark.parametrize("content", ["my own notes", "{}\n", '{"caption": "x"}\n[1, 2]\n'])
def test_a_file_of_something_else_is_not_written_over_by_relabel(refused, tmp_path, content):
    text("labels.parquet.scores.jsonl", content)(tmp_path)
    check(refused("relabel"), r"labels.parquet.scores.jsonl does not hold scores of these pairs by this model: name")
    assert (tmp_path / "labels.parquet.scores.jsonl").read_text() == content


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(refused, tmp_path, case):
    name, content, message = PROMPTS[case]
    text(name, content)(tmp_path)
    check(refused("eval_generate", "--test_json={f}/" + name.removesuffix("/x")), message)


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(refused, tmp_path, case):
    content, message = MANIFESTS[case]
    text("B/B.json", content)(tmp_path)
    check(refused("eval_vs", "--json_a={pictures} --metrics Pixels --pair_by=index"), message)


@pytest.mark.parametrize("case", SCORES)
def test_scores(refused, tmp_path, case):
    line, message = SCORES[case]
    path = tmp_path / "B" / "scores.jsonl"
    path.write_bytes(path.read_bytes() + (line if isinstance(line, bytes) else line.encode()) + b"\n{}\n")
    check(refused("eval_vs"), message)


def test_a_list_in_place_of_scores_is_not_overwritten(refused, tmp_path):
    (tmp_path / "B" / "scores.jsonl").write_text('[{"image": "0.png"}]')
    check(refused("eval_vs"), r'B/scores.jsonl, line 1: not an object with "image" and "prompt"; delete')
    assert (tmp_path / "B" / "scores.jsonl").read_text() == '[{"image": "0.png"}]'


def test_a_part_of_a_model_is_not_written_over(refused, tmp_path):
    shutil.copytree(compare.BASE, tmp_path / "base")
    message = r"--output_dir .*/base/unet is a part of the model in .*/base: name another folder"
    check(refused("train", "--output_dir={f}/base/unet"), message)
    assert not (tmp_path / "base" / "unet" / "metrics.jsonl").exists()


def test_a_file_in_place_of_the_folder_of_copies(refused, tmp_path):
    (tmp_path / "copies").write_text("")
    check(refused("train", "--cache_dir={f}/copies"), r"their copy is made in .*/copies: name a folder that can be")


@pytest.mark.parametrize("name", ["labels_file", "latent_cache", "reference_cache", "validation_data_dir"])
def test_a_shell_variable_that_is_not_set_is_not_taken_for_a_flag_left_out(refused, name):
    check(refused("train", f"--{name}="), rf"--{name} is empty: give its value or leave the flag out")


def test_flags_are_not_read_from_files_beside_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", [str(tmp_path / "train.py"), "--dataset_name=x", "--pretrained_model_name_or_path=x"]
    )
    (tmp_path / "train.args").write_text("--seed 3")
    assert parse_flags(TrainConfig, "train.py", "").seed is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("can't allocate memory"),
    ],
)
def test_exhausted_memory_is_one_sentence(error):
    with pytest.raises(InputError, match=r"memory is exhausted \(.+\): try less"), within_memory("try less"):
        raise error


def test_other_errors_are_not_taken_for_exhausted_memory():
    with pytest.raises(RuntimeError, match="shape"), within_memory("try less"):
        raise RuntimeError("shape mismatch")


def test_runs_without_a_common_prompt(refused, tmp_path):
    text("B/B.json", [GOOD | {"prompt": "q"}])(tmp_path)
    text("B/scores.jsonl", score(0.5).replace('"p"', '"q"'))(tmp_path)
    check(refused("eval_vs"), r"A and B have no prompt in common \(.*'p'; .*'q'\); generate both from the same prompts")


def test_scores_are_a_folder(refused, tmp_path):
    both(drop("B/scores.jsonl"), text("B/scores.jsonl/x", ""))(tmp_path)
    check(refused("eval_vs"), r"B/scores.jsonl cannot be used \(Is a directory\): correct the path")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(refused, tmp_path):
    (tmp_path / "B" / "B.json").chmod(0)
    check(refused("eval_vs"), r"B.json cannot be used \(Permission denied\): correct the path or its permissions")


def test_addresses_as_prompts_are_text(command, tmp_path):
    text("few.json", ["http://127.0.0.1:9/a.png", "file:///etc/passwd"])(tmp_path)
    (manifest,) = command("eval_generate").values()
    assert [row["prompt"] for row in json.loads(manifest.read_text())] == [
        "http://127.0.0.1:9/a.png",
        "file:///etc/passwd",
    ]


def test_markup_in_captions_is_text(command, tmp_path):
    hostile = "</script><script>alert(1)</script>"
    for run in "AB":
        text(f"{run}/{run}.json", [GOOD | {"prompt": hostile}])(tmp_path)
        text(f"{run}/scores.jsonl", score(0.5).replace('"p"', json.dumps(hostile)))(tmp_path)
    command("eval_vs", "--label_a=<b>A")
    (page,) = (tmp_path / "out").rglob("report.html")
    assert "alert(1)" in page.read_text() and "<script>alert" not in page.read_text()
    assert "&lt;b&gt;A" in page.read_text() and "<b>A" not in page.read_text()


@pytest.mark.parametrize("gpus", ["", "1"])
@pytest.mark.parametrize(
    "launcher", ["train/tiny_dspo.sh", "train/sdxl_dmpo.sh", "eval/test_tiny.sh", "eval/test_vs.sh"]
)
def test_launchers_say_that_nothing_is_installed(tmp_path, launcher, gpus):
    text("python", f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')(tmp_path)  # without installed packages
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "GPUS": gpus}
    command = ["bash", ROOT / "scripts" / launcher, "base"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    check(sentence(done.stderr), r"/python lacks what requirements.txt lists: run bash .*scripts/setup.sh, or name")
    assert done.returncode == 2 and sorted(tmp_path.iterdir()) == [tmp_path / "python"]


@pytest.fixture(scope="module", autouse=True)
def launched(tmp_path_factory):
    """The processes of LAUNCHED by case; all start at once and run beside the other tests."""
    python = Path(sys.executable)
    folder = tmp_path_factory.mktemp("launched")
    text("output/tiny/pairs/train.parquet", "")(folder)  # so that the tiny launchers make none
    common = os.environ | {"PYTHON": str(python), "PYTHONPATH": str(ROOT), "GPUS": "1"}
    processes = {}
    for case, (words, changes, _) in LAUNCHED.items():
        first, *flags = words.replace("python eval_vs", f"python {ROOT}/eval_vs").split()
        start = [str(python)] if first == "python" else ["bash", str(ROOT / first)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes[case] = subprocess.Popen([*start, *flags], cwd=folder, env=common | changes, **pipes)
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("case", LAUNCHED)
def test_launched(launched, case):
    printed, said = launched[case].communicate(timeout=120)
    check(sentence(said), LAUNCHED[case][2])
    assert (launched[case].returncode, printed) == (2, "")
