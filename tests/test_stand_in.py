"""What runs on a GPU, on a stand-in for one: no tensor is left behind, and the numbers are the CPU's but for rounding."""

import json

import numpy as np
import pytest
import stand_in
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from recording import set_up
from safetensors.torch import load_file

import eval_generate
import train
from sdpo import cache
from sdpo.adapters import merge
from sdpo.batch import collate
from sdpo.command import parse_flags
from sdpo.generation import GPU_SHARE, EvalConfig, prepare
from sdpo.step import compute_loss

FAMILIES = pytest.mark.parametrize("family", ["sd15", "sdxl"])


def on_both(task):
    """[task("cpu"), task("gpu")], the second on a GPU."""
    results = [task("cpu")]
    AcceleratorState._reset_state(reset_partial_state=True)
    with stand_in.gpu():
        results.append(task("gpu"))
    return results


def test_devices_do_not_mix():
    with stand_in.gpu():
        there = torch.ones(2, 3).to("cuda")
        assert there.device.type == "cuda" and (there @ torch.ones(3, 1, device="cuda")).cpu().tolist() == [[3.0]] * 2
        with pytest.raises(RuntimeError, match="several devices"):
            there + torch.ones(3)
    assert not torch.cuda.is_available()


@FAMILIES
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_images(bases, tmp_path, family, dtype):
    prompts = tmp_path / "few.json"
    prompts.write_text(json.dumps([{"prompt": "a small red circle"}, {"prompt": "a large blue square"}]))
    flags = [f"--pretrain_path={bases[family, 'epsilon']}", f"--test_json={prompts}", "--resolution=32", "--steps=3"]
    flags += ["--unet_path=base", "--metrics=none", f"--dtype={dtype}"]

    def images(place):
        eval_generate.main([*flags, f"--output_path={tmp_path / place}"])
        return np.stack([np.array(Image.open(path), int) for path in sorted((tmp_path / place).glob("*/*.png"))])

    on_cpu, on_gpu = on_both(images)
    assert on_cpu.shape == (2, 32, 32, 3)
    assert abs(on_cpu - on_gpu).mean() < (0.001 if dtype == "fp32" else 0.1) * on_cpu.std()


def test_a_batch_fills_its_share_of_the_free_memory(bases, tmp_path):
    prompts = tmp_path / "one.txt"
    prompts.write_text("a small red circle\n")
    flags = [f"--pretrain_path={bases['sd15', 'epsilon']}", f"--test_json={prompts}", "--unet_path=base"]
    config = parse_flags(EvalConfig, "", "", [*flags, "--resolution=32", f"--output_path={tmp_path / 'run'}"])
    with stand_in.gpu():
        run = prepare(config, Accelerator())
    assert run.batch_size == int(GPU_SHARE * stand_in.FREE / (stand_in.PEAK - stand_in.ALLOCATED))


@FAMILIES
def test_caches(arguments, tmp_path, family):
    def files(place):
        cache.main(arguments(f"--latent_cache={tmp_path / place}", "--latent_cache_dtype=fp32", family=family))
        return [load_file(path) for path in sorted((tmp_path / place).rglob("*.safetensors"))]

    for on_cpu, on_gpu in zip(*on_both(files), strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "family, precision, rank",
    [("sd15", "no", 0), ("sdxl", "no", 0), ("sdxl", "bf16", 0), ("sd15", "no", 3), ("sdxl", "bf16", 3)],
)
def test_losses_and_held_out_errors(arguments, capsys, family, precision, rank):
    flags = ["--validation_pairs=5", "--use_winner_preserving=true", "--winner_preserving_mu=0.5"]
    flags += [f"--mixed_precision={precision}", f"--lora_rank={rank}"]

    def figures(place):
        more = ["--gradient_checkpointing=auto"] if place == "gpu" else []
        run, dataset, held_out = set_up(arguments(*flags, *more, family=family, out=place))
        assert run.accelerator.device.type == ("cuda" if place == "gpu" else "cpu")
        batch = collate([dataset[0, i] for i in range(2)]).to(run.accelerator.device)
        assert compute_loss(run, batch)[1]["rewards/margins"].item() == 0
        trained = [parameter for parameter in run.policy.parameters() if parameter.requires_grad]
        with torch.no_grad():
            trained[-1] += 0.1  # the last bias, or the last B
        assert all(value.isfinite().all() for value in merge(run.policy.state_dict()).values())
        values = compute_loss(run, batch)[1] | train.validate(run, held_out)
        return {name: float(value) for name, value in values.items()}

    on_cpu, on_gpu = on_both(figures)
    assert "units are recomputed" in capsys.readouterr().err
    assert on_gpu["heldout/winner_error_change"] != 0
    for name in on_cpu if precision == "no" else ("model_mse_unaccumulated", "ref_mse_unaccumulated"):
        # a margin is beta / 2 = 50 times the difference of errors, which are rounded at 1e-7
        tolerance = {"rel": 1e-3, "abs": 5e-5} if precision == "no" else {"rel": 0.02}
        assert on_gpu[name] == pytest.approx(on_cpu[name], **tolerance), name
