"""Training of low-rank adapters: what moves, what it comes to, and what it leaves for others to load."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from activations import kept_for_backward
from diffusers import DiffusionPipeline, UNet2DConditionModel
from recording import edit_json, metrics, run_on_ranks, same, set_up, weights
from safetensors.torch import load_file, save_file

import train
from sdpo.adapters import add_adapters, load_adapters, merge, save_adapters
from sdpo.batch import collate
from sdpo.checkpoint import seal
from sdpo.command import InputError, parse_flags
from sdpo.config import TrainConfig
from sdpo.families import load_family
from sdpo.inputs import Inputs
from sdpo.memory import choose_units, planned_memory
from sdpo.metrics import read_metrics
from sdpo.step import compute_loss

ROOT = Path(__file__).parents[1]
RANK = 3
LAYERS = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)\.weight"
FILE = "pytorch_lora_weights.safetensors"
EMA_FILE = "pytorch_lora_weights_ema.safetensors"


def first_batch(run, dataset):
    return collate([dataset[0, position] for position in range(run.config.train_batch_size)])


@pytest.mark.parametrize("family, precision", [("sd15", "no"), ("sd15", "bf16"), ("sdxl", "no"), ("sdxl", "bf16")])
def test_attention_moves_by_matrices_of_the_rank_and_nothing_else_does(arguments, bases, tmp_path, family, precision):
    flags = (f"--lora_rank={RANK}", f"--mixed_precision={precision}", "--learning_rate=0.1", "--validation_pairs=4")
    train.main(arguments(*flags, family=family))
    assert dict(read_metrics(tmp_path / "run", "rewards/margins"))[1] == 0  # policy and reference start equal
    before = UNet2DConditionModel.from_pretrained(bases[family, "epsilon"], subfolder="unet").state_dict()
    after = weights(tmp_path / "run")
    assert after.keys() == before.keys()
    moved = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
    assert moved.keys() == {name for name in before if re.fullmatch(LAYERS, name)} != set()
    for change in moved.values():
        values = torch.linalg.svdvals(change.double())
        assert values[0] > 0 and (values[RANK:] < 1e-6 * values[0]).all()


def test_the_pipeline_of_the_base_with_the_adapters_is_the_one_that_was_saved(arguments, bases, tmp_path):
    train.main(arguments(f"--lora_rank={RANK}", "--learning_rate=0.1", "--use_ema", "--ema_decay=0.5"))
    latents, states = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 16)
    for adapters, unet in {FILE: "unet.pth", EMA_FILE: "unet_ema.pth"}.items():
        adapted = DiffusionPipeline.from_pretrained(bases["sd15", "epsilon"])
        outputs = [adapted.unet(latents, 500, states).sample]
        adapted.load_lora_weights(tmp_path / "run", weight_name=adapters)
        outputs.append(adapted.unet(latents, 500, states).sample)
        merged = DiffusionPipeline.from_pretrained(tmp_path / "run").unet
        merged.load_state_dict(weights(tmp_path / "run", unet))
        torch.testing.assert_close(outputs[1], merged(latents, 500, states).sample, rtol=0, atol=1e-5)
        assert (outputs[1] - outputs[0]).abs().max() > 1e-2
    raw, averaged = (load_file(tmp_path / "run" / name) for name in (FILE, EMA_FILE))
    assert raw.keys() == averaged.keys() and not same(raw, averaged)


@pytest.mark.parametrize("method", ["diffusion-dpo", "dspo", "sft"])
def test_gradients_are_those_of_all_weights_by_the_chain_rule(arguments, method):
    """At B = 0: the gradient of B is that of W times A transposed, and that of A is 0."""
    flags = (f"--train_method={method}", "--use_winner_preserving", "--winner_preserving_mu=0.5")
    adapted, dataset, _ = set_up(arguments(*flags, f"--lora_rank={RANK}", out="adapted"))
    plain, _, _ = set_up(arguments(*flags, out="plain"))
    losses = []
    for run in (adapted, plain):
        loss, _ = compute_loss(run, first_batch(run, dataset))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    own, gradients = (dict(run.policy.named_parameters()) for run in (adapted, plain))
    downs = [name for name in own if "lora_A" in name]
    assert len(downs) == len({name for name in gradients if re.fullmatch(LAYERS, name)})
    for name in downs:
        expected = gradients[name.replace("lora_A.default.", "")].grad @ own[name].T
        torch.testing.assert_close(own[name.replace("lora_A", "lora_B")].grad, expected, rtol=1e-3, atol=1e-8)
        assert not own[name].grad.any()
    frozen = [parameter for name, parameter in own.items() if "lora" not in name]
    assert frozen and all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)


def test_policy_and_reference_share_their_weights(arguments):
    run, _, _ = set_up(arguments(f"--lora_rank={RANK}", "--mixed_precision=bf16", "--use_ema"))
    policy, reference = ({p.data_ptr(): p for p in model.parameters()} for model in (run.policy, run.reference))
    trained = [p for p in run.policy.parameters() if p.requires_grad]
    assert policy.keys() - reference.keys() == {p.data_ptr() for p in trained} and reference.keys() < policy.keys()
    assert {p.dtype for p in policy.values()} == {torch.float32}
    size, memory = sum(p.numel() for p in trained), planned_memory(run)
    assert memory["policy"] == 4 * sum(p.numel() for p in policy.values()) and "reference" not in memory
    assert memory["gradients"] == memory["average"] == 4 * size and memory["optimizer"] == 8 * size
    assert {id(p) for group in run.optimizer.param_groups for p in group["params"]} == set(map(id, trained))


def test_adapters_are_a_function_of_the_seed(bases):
    family = load_family("sd15", str(bases["sd15", "epsilon"]))
    states = []
    for seed in (1, 1, 2):
        unet = family.load_unet("")
        add_adapters(unet, family.adapted, RANK, seed)
        states.append(unet.state_dict())
    assert same(states[0], states[1]) and not same(states[0], states[2])
    down = torch.cat([value.flatten() for name, value in states[0].items() if "lora_A" in name])
    assert down.std().item() == pytest.approx(1 / RANK, rel=0.1)
    assert same(merge(states[0]), family.load_unet("").state_dict())


def test_a_resumed_run_is_the_same_run(arguments, tmp_path):
    flags = (f"--lora_rank={RANK}", "--use_ema", "--max_train_steps=4", "--validation_pairs=4", "--validation_steps=1")
    train.main(arguments(*flags, "--checkpointing_steps=2", out="whole"))
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    fewer = ("--checkpointing_steps=0", "--gradient_checkpointing=auto", "--activation_memory=1e-4")
    train.main(arguments(*flags, f"--resume_from_checkpoint={checkpoint}", *fewer, out="resumed"))
    for name in ("unet.pth", "unet_ema.pth"):
        assert same(weights(tmp_path / "resumed", name), weights(tmp_path / "whole", name))
        assert not same(weights(checkpoint, name), weights(tmp_path / "whole", name))
    rows = {row["step"]: row for row in metrics(tmp_path / "whole") if row["step"] > 2}
    assert {row["step"]: row for row in metrics(tmp_path / "resumed")} == rows


def test_errors_of_the_reference_are_those_of_runs_that_train_all_weights(arguments, tmp_path):
    common = ("--mixed_precision=bf16", "--seed=1")
    train.main(arguments(*common, f"--reference_cache={tmp_path / 'errors'}", out="all"))
    flags = (*common, f"--lora_rank={RANK}", "--learning_rate=0.1")
    train.main(arguments(*flags, f"--reference_cache={tmp_path / 'errors'}", out="read"))
    train.main(arguments(*flags, out="computed"))
    assert same(weights(tmp_path / "read"), weights(tmp_path / "computed"))
    assert metrics(tmp_path / "read") == metrics(tmp_path / "computed")


def test_two_ranks_equal_one(arguments, tmp_path):
    flags = (
        f"--lora_rank={RANK}",
        "--use_ema",
        "--checkpointing_steps=2",
        "--max_train_steps=4",
        "--learning_rate=0.1",
    )
    run_on_ranks(2, ROOT / "train.py", arguments(*flags, "--max_train_steps=2", out="two"))
    run_on_ranks(2, ROOT / "train.py", arguments(*flags, out="two"))  # goes on
    train.main(arguments(*flags, out="one"))
    one, two = (load_file(tmp_path / out / FILE) for out in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)
    assert dict(read_metrics(tmp_path / "one", "train_loss")) == pytest.approx(
        dict(read_metrics(tmp_path / "two", "train_loss")), rel=1e-3
    )


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_activations_are_counted_as_they_are(bases, name):
    family = load_family(name, str(bases[name, "epsilon"]))
    unet = family.load_unet("")
    conditioning = family.encode_captions(["a small red circle"] * 4, 32)
    noisy = torch.randn(4, *family.latent_shape(32))
    inputs = Inputs(noisy, torch.tensor([3, 500, 3, 500]), conditioning, noisy)
    plain = choose_units(family, unet, inputs, torch.float32, float("inf"))[1]
    add_adapters(unet, family.adapted, RANK, 0)
    kept = choose_units(family, unet, inputs, torch.float32, float("inf"))[1]
    assert kept == kept_for_backward(family, unet, inputs) != plain
    kept = choose_units(family, unet, inputs, torch.bfloat16, float("inf"))[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert kept == pytest.approx(kept_for_backward(family, unet, inputs), rel=0.01)


def test_what_does_not_go_with_adapters_is_refused(arguments, tmp_path):
    for flags in (["--compile"], ["--cuda_graphs", "--latent_cache=cache"]):
        with pytest.raises(InputError, match="--lora_rank does not go with --compile and --cuda_graphs"):
            parse_flags(TrainConfig, "", "", arguments(f"--lora_rank={RANK}", *flags))
    config = parse_flags(TrainConfig, "", "", arguments(f"--lora_rank={RANK}"))
    for engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        accelerator = SimpleNamespace(distributed_type=engine, device=torch.device("cpu"), is_fsdp2=True)
        with pytest.raises(InputError, match="--lora_rank does not go with FSDP2 or DeepSpeed"):
            train.settle_engine(config, accelerator)


def test_a_checkpoint_goes_on_with_its_own_rank_and_whole_adapters(arguments, tmp_path):
    flags = ("--max_train_steps=1", "--checkpointing_steps=1")
    train.main(arguments(*flags, f"--lora_rank={RANK}"))
    for rank in (0, RANK + 1):
        for meant in ([], ["--resume_with_changes"]):
            with pytest.raises(InputError, match=f"was trained with --lora_rank {RANK}: .* --unet_init .*/unet.pth"):
                train.main(arguments(f"--lora_rank={rank}", *meant))
    other = tmp_path / "run" / "checkpoint-1" / "unet.pth"
    with pytest.raises(InputError, match=r"the adapters in .*checkpoint-1 were trained on another UNet: go on"):
        train.main(arguments(f"--lora_rank={RANK}", f"--unet_init={other}", "--resume_with_changes"))
    path = tmp_path / "run" / "checkpoint-1" / FILE
    state = load_file(path)
    save_file(state | {min(state): state[min(state)] * torch.nan}, path)
    with pytest.raises(InputError, match=r"checkpoint-1.*has changed since it was written"):
        train.main(arguments(f"--lora_rank={RANK}"))


def test_a_checkpoint_of_all_weights_does_not_go_on_with_adapters(arguments, tmp_path):
    train.main(arguments("--max_train_steps=1", "--checkpointing_steps=1"))
    checkpoint = tmp_path / "run" / "checkpoint-1"
    edit_json(checkpoint / "state.json", config={})  # of before there were any
    (checkpoint / "files.json").unlink()
    seal(checkpoint)
    with pytest.raises(InputError, match="was trained with --lora_rank 0: go on"):
        train.main(arguments(f"--lora_rank={RANK}"))


@pytest.mark.parametrize(
    "change, message",
    {
        lambda state: dict(list(state.items())[1:]): r"pytorch_lora_weights.safetensors .* 1 tensors missing",
        lambda state: state | {"unet.x.lora_A.weight": torch.ones(1)}: "1 unknown",
        lambda state: {name: value * torch.nan for name, value in state.items()}: "not finite",
    }.items(),
)
def test_adapters_that_do_not_fit_are_named(bases, tmp_path, change, message):
    family = load_family("sd15", str(bases["sd15", "epsilon"]))
    unet = family.load_unet("")
    add_adapters(unet, family.adapted, RANK, 0)
    save_adapters(unet.state_dict(), tmp_path / FILE)
    save_file(change(load_file(tmp_path / FILE)), tmp_path / FILE)
    with pytest.raises(InputError, match=message):
        load_adapters(unet, tmp_path / FILE)


def test_a_rank_that_no_layer_has_is_refused(arguments):
    with pytest.raises(InputError, match=r"--lora_rank 17 is above 16, that of the largest layers"):
        set_up(arguments("--lora_rank=17"))


@pytest.mark.parametrize("ema", [False, True])
def test_the_room_that_is_announced_is_the_room_that_is_taken(arguments, tmp_path, monkeypatch, ema):
    announced = {}
    monkeypatch.setattr(train, "space_cautions", lambda _, sizes: announced.update(sizes) or [])
    base = f"--pretrained_model_name_or_path={ROOT / 'sdpo' / 'tiny' / 'base'}"  # beside which headers are small
    train.main(arguments(base, f"--lora_rank={RANK}", f"--use_ema={ema}", "--checkpointing_steps=3"))
    run = tmp_path / "run"
    models = [*run.glob("unet*.pth"), *run.glob("pytorch_lora*"), *(run / "unet").iterdir()]
    for what, files in {"a checkpoint": (run / "checkpoint-3").iterdir(), "the trained model": models}.items():
        taken = sum(path.stat().st_size for path in files)
        assert announced[what] == pytest.approx(taken, rel=0.1)


def test_adapters_of_an_earlier_run_are_set_aside(arguments, tmp_path):
    flags = ("--max_train_steps=1", "--checkpointing_steps=0")
    train.main(arguments(*flags, f"--lora_rank={RANK}", "--use_ema"))
    train.main(arguments(*flags))
    for name in (FILE, EMA_FILE):
        assert (tmp_path / "run" / "earlier-1" / name).is_file() and not (tmp_path / "run" / name).exists()
