"""Models and weight files in the hub's formats, local or fetched; those incomplete or not finite are refused."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from sdpo.command import InputError
from sdpo.files import brief, sha256

log = logging.getLogger(__name__)
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # as flags say it
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights
WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")  # what files that load_tensors reads are called
PART_FILES = {"config.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.json"}
PART_FILES |= {"special_tokens_map.json", "added_tokens.json"}  # what a part consists of besides its weights
# Modules and parameters whose tensors published files have, for parts that lack them
UNUSED = {"logit_scale", "text_projection", "visual_projection", "vision_model", "loss"}
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of names, from the outside in


def fetch(repository: str, name: str, **options: str | None) -> Path:
    """A file of a hub repository, downloaded once; raises InputError where that fails."""
    try:
        return Path(hf_hub_download(repository, name, **options))
    except Exception as error:  # connection, cache, access and naming errors have no ancestor in common
        raise InputError(
            f"cannot fetch {name} of {repository} ({brief(error)}); "
            "download it where the hub can be reached and give its path"
        ) from error


def load_part(cls, source: str, subfolder: str | None = None, **options):
    """`cls.from_pretrained`; raises InputError where it fails, and for models that lack tensors or are not finite."""
    part = f"{subfolder or cls.__name__} of {source!r}"
    is_model = issubclass(cls, nn.Module)
    if subfolder:
        options["subfolder"] = subfolder
    try:
        if is_model and hasattr(cls, "load_config"):  # of diffusers
            check_class(cls, cls.load_config(source, **options), part)
        if is_model:
            options["output_loading_info"] = True
        loaded = cls.from_pretrained(source, **options)
    except InputError:
        raise
    except Exception as error:  # files, JSON, weights and connections each have errors of their own
        fix = "give a local folder in the hub's format, or download it where the hub can be reached"
        if variant := only_variant(Path(source, subfolder or "")):
            fix = f"its weights are of the variant {variant} alone: take '.{variant}' out of their files' names"
        if "ignore_mismatched_sizes" in (reason := brief(error)):  # which shapes differ is in transformers' log only
            reason = "its config.json is missing, or of another size than its weights"
        raise InputError(f"cannot load {part} ({reason}); {fix}") from error
    if not is_model:
        return loaded
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # the libraries fill gaps with random weights or none
        raise InputError(f"{part} lacks {len(missing)} tensors (e.g. {missing[0]}); download it again")
    unneeded = {name for name in UNUSED if not hasattr(model, name)}
    unexpected = sorted(name for name in report["unexpected_keys"] if not name.endswith("position_ids"))
    unknown = [name for name in unexpected if name.partition(".")[0] not in unneeded]
    if unknown:
        raise InputError(f"{part} has {len(unknown)} tensors that its config.json has no place for (e.g. {unknown[0]})")
    check_finite(model.state_dict(), part)
    return model


def only_variant(folder: Path) -> str | None:
    """The variant, such as fp16, that the weights in a folder are of; None where others are there, or none at all."""
    if not folder.is_dir() or list_weights(folder):
        return None
    found = (re.fullmatch(r".*model\.(\w+)(-\d+-of-\d+)?\.safetensors", path.name) for path in folder.iterdir())
    return next((match[1] for match in found if match), None)


def check_class(cls: type[nn.Module], config: Mapping[str, Any], part: str) -> None:
    """Raises InputError where the config of a part names another class of models."""
    if (held := config.get("_class_name", cls.__name__)) != cls.__name__:
        raise InputError(f"{part} is of the class {held}, not {cls.__name__}: name another folder")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, source: str) -> None:
    """Raises InputError unless a tokenizer has `size` entries; warns if its merges do not lead to all of them."""
    if len(tokenizer) != size:  # transformers makes an empty one where files are missing
        raise InputError(
            f"the tokenizer of {source!r} has {len(tokenizer)} entries, its model {size}: files are missing or another "
            "model's; give a local folder that holds them, or download it where the hub can be reached"
        )
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    if rules["model"]["type"] == "BPE":
        merged = {"".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in rules["model"]["merges"]}
        known = merged | {token["content"] for token in rules["added_tokens"]}
        lost = [piece for piece in tokenizer.get_vocab() if len(piece.removesuffix("</w>")) > 1 and piece not in known]
        if lost:
            log.warning(
                f"CAUTION: the tokenizer of {source!r} has no merges for {len(lost):,} of {size:,} entries, such as "
                f"{lost[0]!r}: unless it was made so, its merges.txt is cut off; download it again"
            )


def check_finite(state: dict[str, Tensor], source: str) -> None:
    """Raises InputError, naming the source, unless all numbers of a state dict are finite."""
    broken = next((name for name, value in state.items() if not value.float().isfinite().all()), None)
    if broken:
        raise InputError(f"{source} holds numbers that are not finite (in {broken}): its training diverged; use others")


def check_fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str, fix: str) -> None:
    """Raises InputError unless a state dict from `source` has a model's own names and shapes, in floating point."""
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    resized = sorted(n for n in own.keys() & state.keys() if getattr(state[n], "shape", None) != own[n].shape)
    if missing or unknown or resized:
        if any("lora" in name.lower() for name in unknown) and not any("lora" in name for name in own):
            raise InputError(
                f"{source} holds LoRA weights, which are not read: give a UNet that they are merged into, such as the "
                "unet.pth that train.py leaves beside them"
            )
        if any(name.startswith("model.diffusion_model.") for name in unknown):
            raise InputError(
                f"{source} has the names of the original Stable Diffusion: convert it to diffusers' format"
            )
        if prefix := find_prefix(missing, unknown):
            raise InputError(f"{source}: {prefix!r} comes before the names of tensors: save them without it")
        examples = ", ".join(names[0] for names in (missing, unknown, resized) if names)
        raise InputError(
            f"{source} belongs to another architecture: {len(missing)} tensors missing, {len(unknown)} unknown, "
            f"{len(resized)} of another shape (e.g. {examples}); {fix}"
        )
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dtype not in FLOATS or value.layout != torch.strided or value.is_meta:
            kind = (
                f"{value.dtype}, {value.layout}, {value.device}" if isinstance(value, Tensor) else type(value).__name__
            )
            raise InputError(f"{source}: {name} is {kind}, but must be plain numbers of fp16, bf16, fp32 or fp64")


def find_prefix(missing: Sequence[str], unknown: Sequence[str]) -> str:
    """What comes before every name that is missing, among those that are unknown; empty if nothing does."""
    found = (name.removesuffix(missing[0]) for name in unknown if missing and name.endswith(missing[0]))
    return next((prefix for prefix in found if {prefix + name for name in missing}.issubset(unknown)), "")


def load_tensors(path: str | Path) -> Any:
    """What a .safetensors or torch file holds, on the CPU; raises InputError where it is damaged or holds code."""
    if not Path(path).exists():
        raise InputError(f"there is no file {path}: correct the path")
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch, zipfile, pickle and safetensors each have errors of their own
        if isinstance(error, UnpicklingError) and zipfile.is_zipfile(path):  # whole, as check_archive saw
            raise InputError(
                f"{path} cannot be read as weights (it holds Python objects or code, which are not loaded): give a "
                "state dict alone, by torch.save"
            ) from error
        raise InputError(
            f"{path} cannot be read as weights ({recognise(path) or brief(error)}); download it again, or give a state "
            "dict by torch.save"
        ) from error


def recognise(path: str | Path) -> str | None:
    """What a file is that is not a .pth: what downloads leave in place of weights, or weights of another name."""
    with suppress(OSError), open(path, "rb") as file:
        beginning = file.read(64)
        if beginning[8:9] == b"{" and not str(path).endswith(".safetensors"):
            return "it is a safetensors file: let its name end so"
        if beginning.startswith(b"PK") and str(path).endswith(".safetensors"):
            return "it is a file of torch.save: let its name end in .pth"
        beginning = beginning.lstrip()
        if beginning.startswith(b"version https://git-lfs"):
            return "it is a pointer of git-lfs: fetch its content with `git lfs pull`"
        if beginning.lower().startswith((b"<!doctype", b"<html", b"<?xml")):
            return "it is a web page"
    return None


def check_archive(path: str | Path) -> None:
    """Raises InputError for a file of torch.save that does not match its checksums, which torch does not verify."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise InputError(f"{path} is damaged, or saved without checksums (CRC of {damaged}): download it again")


def hash_part(cls, source: str, subfolder: str | None, **options) -> str:
    """SHA-256 over names and content of the files that `cls.from_pretrained` reads: the same for a copy elsewhere."""
    folder = Path(source, subfolder or "")
    if not folder.is_dir():
        name = "tokenizer_config.json" if cls is CLIPTokenizer else "config.json"
        folder = fetch(source, f"{subfolder}/{name}" if subfolder else name, **options).parent
        if not list_weights(folder):
            load_part(cls, source, subfolder, **options)  # fetches the other files
    digest = hashlib.sha256()
    for path in [*sorted(path for path in folder.iterdir() if path.name in PART_FILES), *list_weights(folder)]:
        digest.update(path.name.encode() + bytes.fromhex(sha256(path)))
    return digest.hexdigest()


def list_weights(folder: Path) -> list[Path]:
    """Weight files that from_pretrained chooses in a folder: no variants, safetensors before others."""
    names = r"(diffusion_pytorch_model|pytorch_model|model)(-\d+-of-\d+)?\.(safetensors|bin)"
    found = sorted(path for path in folder.iterdir() if re.fullmatch(names, path.name))
    return [path for path in found if path.suffix == ".safetensors"] or found


def is_weight_file(init: str) -> bool:
    """Whether this names a file with a state dict, there or not, rather than a folder or a hub id."""
    return Path(init).is_file() or init.endswith(WEIGHT_SUFFIXES)


def find_weights(init: str) -> str:
    """Path of the unet.pth in a folder, as runs and checkpoints have one; where there is none, `init` unchanged."""
    file = Path(init, "unet.pth")
    return str(file) if init and file.is_file() else init


def is_parameter(item: tuple[Any, Any]) -> bool:
    """Whether an item of a state dict is a name with a tensor of one shape."""
    return isinstance(item[0], str) and isinstance(item[1], Tensor) and not item[1].is_nested


def load_state(path: str | Path) -> dict[str, Tensor]:
    """State dict of a .pth/.pt/.bin (weights only) or .safetensors file; raises InputError for anything else.

    A dict nested under "state_dict" is accepted; prefixes of DistributedDataParallel and torch.compile are stripped.
    """
    state = load_tensors(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    others = [item for item in state.items() if not is_parameter(item)] if isinstance(state, dict) else []
    if not isinstance(state, dict) or not state or others:
        found = f" ({others[0][0]!r:.80} is none)" if others else ""
        raise InputError(
            f"{path} is not a state dict: expected parameter names with their tensors{found}, "
            "as written by torch.save(model.state_dict())"
        )
    while prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_fitting_state(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """State dict of a file; raises InputError unless it fits the model and is finite."""
    state = load_state(path)
    check_fit(state, model.state_dict(), str(path), "give the base model it was trained from")
    check_finite(state, str(path))
    return state


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put the state dict of a file into a model; raises InputError unless it fits and is finite."""
    model.load_state_dict(load_fitting_state(model, path))
