"""What makes training faster or smaller does not change what is trained."""

import dataclasses
import itertools
import shutil
import weakref

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from activations import kept_for_backward
from conftest import build_pipeline
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from recording import same, set_up, weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train
from benchmarks.architectures import BASES, SDXL
from benchmarks.contestants import OurLoop, Variant
from benchmarks.counting import like_a_gpu
from sdpo import step
from sdpo.arithmetic import recompute
from sdpo.batch import collate
from sdpo.families import load_family
from sdpo.inputs import Inputs, make_inputs
from sdpo.memory import ActivationCounter, checkpoint_units, choose_units, planned_memory, room_for_activations
from sdpo.metrics import read_metrics

GIB = 2**30


@pytest.fixture(params=["sd15", "sdxl"])
def case(request, bases):
    """A family, its UNet, and inputs of a micro-batch of two pairs."""
    family = load_family(request.param, str(bases[request.param, "epsilon"]))
    unet = family.load_unet("").train()
    conditioning = family.encode_captions(["a small red circle"] * 4, 32)
    noisy = torch.randn(4, *family.latent_shape(32))
    return family, unet, Inputs(noisy, torch.tensor([3, 500, 3, 500]), conditioning, noisy)


def test_kept_activations_are_counted_as_they_are(case):
    family, unet, inputs = case
    chosen, kept = choose_units(family, unet, inputs, torch.float32, float("inf"))
    assert chosen == set()
    assert kept == kept_for_backward(family, unet, inputs)
    chosen, kept = choose_units(family, unet, inputs, torch.bfloat16, float("inf"))
    with torch.autocast("cpu", torch.bfloat16):
        real = kept_for_backward(family, unet, inputs)
    assert kept == pytest.approx(real, rel=0.01) and kept < 0.9 * kept_for_backward(family, unet, inputs)


def test_unfused_attention_and_checkpointing_are_counted_as_they_are(case):
    family, unet, inputs = case
    fused = choose_units(family, unet, inputs, torch.float32, float("inf"))[1]
    unet.set_attn_processor(AttnProcessor())
    unfused = choose_units(family, unet, inputs, torch.float32, float("inf"))[1]
    assert unfused == kept_for_backward(family, unet, inputs) > fused
    unet.enable_gradient_checkpointing(recompute)
    assert choose_units(family, unet, inputs, torch.float32, 0)[1] == kept_for_backward(family, unet, inputs)


class WeightCopies(TorchDispatchMode):
    """Notes copies of weights in another precision; `alive` counts the numbers of those that somebody still holds."""

    def __init__(self):
        super().__init__()
        self.copies = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
            self.copies.append(weakref.ref(out))
        return out

    def alive(self):
        return sum(copy.numel() for copy in (copy() for copy in self.copies) if copy is not None)


def test_checkpointed_units_leave_no_copies_of_their_weights(arguments):
    """Which autocast would otherwise hold until the end of the pass."""
    flags = arguments("--mixed_precision=bf16", "--gradient_checkpointing")
    run, dataset, _ = set_up(flags)
    inputs = make_inputs(run.family, collate([dataset[0, 0]]))
    unet, alive, results = run.accelerator.unwrap_model(run.policy, keep_fp32_wrapper=False), {}, []
    for name, autocast in {"ours": run.accelerator.autocast(), "plain": torch.autocast("cpu", torch.bfloat16)}.items():
        with WeightCopies() as copies, autocast:
            prediction = run.family.predict(unet, inputs.noisy, inputs.timesteps, inputs.conditioning)
            alive[name] = copies.alive()
        prediction.square().sum().backward()
        results.append([prediction.detach(), *(parameter.grad for parameter in unet.parameters())])
        unet.zero_grad()
    assert 0 < alive["ours"] < 0.4 * alive["plain"]
    assert all(map(torch.equal, *results))  # the same bits


def test_as_few_units_as_the_budget_needs_are_computed_again(case):
    family, unet, inputs = case
    everything = choose_units(family, unet, inputs, torch.float32, float("inf"))[1]
    all_units, least = choose_units(family, unet, inputs, torch.float32, 0)
    assert all_units == set(checkpoint_units(unet)) and least < 0.8 * everything
    sizes = []
    for share in (0.9, 0.6, 0.3):
        budget = least + share * (everything - least)
        chosen, kept = choose_units(family, unet, inputs, torch.float32, budget)
        assert kept <= budget
        with FakeTensorMode():
            counter = ActivationCounter(family, unet, inputs, torch.float32)
            by_unit = counter.by_unit()
            assert counter.total(chosen - {min(chosen, key=by_unit.get)}) > budget  # one fewer would be too few
        sizes.append(len(chosen))
    assert 0 < sizes[0] <= sizes[1] <= sizes[2] < len(all_units)


def test_units_of_one_shape_keep_as_much_and_not_what_comes_after_them(case):
    family, unet, inputs = case
    with FakeTensorMode():
        by_unit = ActivationCounter(family, unet, inputs, torch.float32).by_unit()
    alike = ("up_blocks.0.attentions.0", "up_blocks.0.attentions.1", "mid_block.attentions.0")
    assert len({by_unit[name] for name in alike}) == 1


class Plain:
    """What counting asks of a family."""

    def predict(self, unet, noisy, timesteps, conditioning):
        return unet(noisy, timesteps, **conditioning).sample.float()


def micro_batch(side, text, device):
    """Inputs of 8 pairs without data."""
    with FakeTensorMode(), torch.device(device):
        conditioning = {"encoder_hidden_states": torch.empty(16, *text)}
        return Inputs(torch.empty(16, 4, side, side), torch.empty(16), conditioning, torch.empty(0))


def test_activations_of_sd15_are_counted_without_memory():
    """The real architecture at 8 pairs of 512 pixels, whose activations would take 20 GiB on a GPU."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    inputs = micro_batch(64, (77, 768), "cuda")
    with like_a_gpu():
        kept = {gib: choose_units(Plain(), unet, inputs, torch.bfloat16, gib * GIB)[1] for gib in (1000, 8)}
    assert 19 * GIB < kept[1000] < 21 * GIB
    assert 6 * GIB < kept[8] <= 8 * GIB


def test_norms_that_a_gpu_computes_in_fp32_are_counted_so():
    """Against a real pass on the CPU whose norms are in fp32, which is what autocast does on a GPU."""
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=2, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    batches = {device: micro_batch(16, (8, 32), device) for device in ("cuda", "cpu")}
    with like_a_gpu():
        gpu = choose_units(Plain(), unet, batches["cuda"], torch.bfloat16, float("inf"))[1]
    cpu = choose_units(Plain(), unet, batches["cpu"], torch.bfloat16, float("inf"))[1]
    text = {"encoder_hidden_states": torch.randn(16, 8, 32)}
    inputs = Inputs(torch.randn(16, 4, 16, 16), torch.arange(16), text, None)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        for name in ("group_norm", "layer_norm"):
            norm = getattr(F, name)
            patch.setattr(F, name, lambda x, *rest, norm=norm, **options: norm(x.float(), *rest, **options))
        assert gpu == pytest.approx(kept_for_backward(Plain(), unet, inputs), rel=0.01)
    assert gpu > 1.2 * cpu


def test_room_for_activations_is_what_gradients_and_new_optimizer_state_leave(arguments, monkeypatch):
    run = set_up(arguments())[0]
    weights = sum(parameter.numel() for parameter in run.policy.parameters())
    assert room_for_activations(run, 20 * weights) == pytest.approx(0.85 * (20 - 4 - 8) * weights)
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "num_processes", 4)
        assert room_for_activations(run, 20 * weights) == pytest.approx(0.85 * (20 - 4 - 8) * weights)
        patch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
        assert room_for_activations(run, 20 * weights) == pytest.approx(0.85 * (20 - (4 + 8) / 4) * weights)
    for parameter in run.policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()  # from now on its state is in memory, as after a resume
    assert room_for_activations(run, 20 * weights) == pytest.approx(0.85 * (20 - 4) * weights)


class NumbersMadeTensors(TorchFunctionMode):
    """Notes calls that copy numbers from the host, which wait on a GPU but are invisible on the meta device."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.Tensor.new_tensor, torch.tensor) and out.device.type != "cpu":
            self.calls.append(func.__name__)
        return out


class WaitingCopies(TorchDispatchMode):
    """Notes the shapes of copies between devices for which the host waits."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source, rest = (args[1], args[2:]) if func is torch.ops.aten.copy_.default else (args[0], ())
            if source.device != out.device and not any(rest) and not kwargs.get("non_blocking"):
                self.shapes.append(tuple(source.shape))
        return out


SHALLOW = {  # of the depths of SDXL, one layer each
    "text_encoder_2": SDXL["text_encoder_2"] | {"num_hidden_layers": 1},
    "unet": SDXL["unet"] | {"transformer_layers_per_block": 1},
}


@pytest.mark.parametrize("cached", [False, True], ids=["encoded", "cached"])
@pytest.mark.parametrize(
    "base, flags",
    [
        (BASES["tiny"], {}),
        (dataclasses.replace(BASES["sdxl"], parts=SDXL | SHALLOW), {"train_method": "dspo"}),
        (BASES["tiny"], {"train_method": "dmpo"}),
        (BASES["tiny"], {"use_winner_preserving": False, "winner_preserving_mu": 0.0}),
    ],
    ids=["diffusion-dpo", "sdxl dspo", "dmpo", "plain"],
)
def test_nothing_but_the_decision_to_step_waits_for_the_device(base, flags, cached, monkeypatch):
    """On the meta device, from which nothing can be fetched: .item() or .cpu() would raise."""
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    monkeypatch.setattr(step, "make_step", lambda run, norm: True)
    flags = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "optimizer": "adafactor"} | flags
    contestant = OurLoop(base.config(**flags), base.build("meta"), Variant())  # fused AdamW refuses meta
    batch = next(contestant.batches)
    if cached:
        moments = torch.zeros(2, 2, *batch.posterior_noise.shape[1:])
        texts = contestant.family.encode_texts(batch.captions)
        texts = {name: torch.zeros(value.shape) for name, value in texts.items()}
        batch = dataclasses.replace(batch, pixels=None, moments=moments, texts=texts)
    with NumbersMadeTensors() as numbers, WaitingCopies() as waiting:
        assert step.update(contestant.run, itertools.repeat(batch)) is None
    assert contestant.run.step == 1
    assert numbers.calls == waiting.shapes == []


def test_the_number_that_deepspeed_gives_for_the_norm_goes_to_the_device(monkeypatch):
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda self, parameters, limit: 0.5)
    monkeypatch.setattr(step, "make_step", lambda run, norm: True)
    flags = {"train_batch_size": 1, "optimizer": "adafactor"}
    contestant = OurLoop(BASES["tiny"].config(**flags), BASES["tiny"].build("meta"), Variant())
    assert step.update(contestant.run, contestant.batches) is None
    assert {total.device.type for total in contestant.run.meter.sums.values()} == {"meta"}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_checkpointing_does_not_change_the_weights(arguments, tmp_path, family, capsys):
    modes = {"none": [], "full": [], "auto": ["--activation_memory=0.0005"]}
    for mode, flags in modes.items():
        train.main(arguments(f"--gradient_checkpointing={mode}", *flags, family=family, out=mode))
        assert same(weights(tmp_path / "none"), weights(tmp_path / mode))
    said = capsys.readouterr().err
    assert "of 0.0005 GiB, " in said and " 0 units are" not in said


@pytest.mark.parametrize("flag", ["--channels_last", "--optimizer=adamw"])
def test_layout_and_optimizer_for_sdxl(arguments, tmp_path, flag):
    train.main(arguments(flag, family="sdxl"))
    state = weights(tmp_path / "run")
    assert all(value.isfinite().all() and value.is_contiguous() for value in state.values())
    train.main(arguments(family="sdxl", out="default"))
    losses = [dict(read_metrics(tmp_path / out, "train_loss"))[1] for out in ("run", "default")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("flag, last", [("--channels_last", True), ("--channels_last=false", False)])
def test_layout_is_as_asked(arguments, flag, last):
    run, *_ = set_up(arguments(flag))
    for unet in (run.policy, run.reference):
        assert unet.down_blocks[0].resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last) == last


def test_adamw_with_8_bit_state_resumes(arguments, tmp_path):
    pytest.importorskip("bitsandbytes")
    flags = ["--optimizer=adamw8bit", "--checkpointing_steps=1"]
    train.main(arguments(*flags, out="whole"))
    train.main(arguments("--optimizer=adamw", out="plain"))
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "plain"))
    (tmp_path / "cut").mkdir()
    shutil.move(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut")
    train.main(arguments(*flags, out="cut"))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def check_count_of_what_is_kept(run, inputs):
    """By a compiled policy, of which no unit is computed again; and by what is not compiled."""
    unet = run.accelerator.unwrap_model(run.policy, keep_fp32_wrapper=False)
    plain, kept = (
        choose_units(run.family, unet, inputs, torch.bfloat16, float("inf"), compiled)[1] for compiled in (False, True)
    )
    units = checkpoint_units(unet).values()
    for unit in units:
        unit.gradient_checkpointing = False
    with run.accelerator.autocast():
        assert kept == pytest.approx(kept_for_backward(run.family, unet, inputs), rel=0.01)
    for unit in units:
        unit.gradient_checkpointing = True
    assert kept < 0.6 * plain


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
def test_compiled_blocks_keep_the_margin_exact_and_are_compiled_once(arguments, tmp_path):
    """bf16, where the compiler rounds a training graph and an inference graph differently."""
    build_pipeline("sd15", widths=(8, 8)).save_pretrained(tmp_path / "base")  # few shapes, for they take minutes
    flags = ["--mixed_precision=bf16", "--compile", "--validation_pairs=5", "--use_ema", "--max_train_steps=4"]
    flags += ["--channels_last", "--gradient_checkpointing=full"]
    flags += [f"--pretrained_model_name_or_path={tmp_path / 'base'}"]
    run, dataset, held_out = set_up(arguments(*flags))
    config = run.config
    assert all(value == 0 for name, value in train.validate(run, held_out).items() if "change" in name)
    batches = train.train_batches(config, dataset, run.plan, 0, 0)
    step.update(run, batches)
    check_count_of_what_is_kept(run, make_inputs(run.family, collate([dataset[0, 0]] * config.train_batch_size)))
    first = run.meter.reduce()
    assert first["rewards/margins"] == 0 and first["avg_lose_diff_loss"] == 0
    with torch.compiler.set_stance("fail_on_recompile"):
        step.update(run, batches)
        train.validate(run, held_out)
        step.update(run, batches)
    AcceleratorState._reset_state(reset_partial_state=True)  # holds the precision
    train.main(arguments(*flags[2:], out="fp32"))
    exact = dict(read_metrics(tmp_path / "fp32", "grad_norm"))
    assert first["grad_norm"] == pytest.approx(exact[1], rel=0.1)  # 4 %; 9 % where bf16 is not compiled
    assert not any(parameter.grad is not None for parameter in run.reference.parameters())


def test_compiled_the_reference_runs_the_policys_graphs(arguments):
    """A graph depends on the precision of weights, and a GPU's compiler does not round what autocast would."""
    dtypes = []
    for flags in (["--compile"], []):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = set_up(arguments("--mixed_precision=bf16", *flags))[0]
        dtypes += [{name: p.dtype for name, p in unet.named_parameters()} for unet in (run.policy, run.reference)]
    assert dtypes[0] == dtypes[1] == dtypes[2] != dtypes[3]


@pytest.mark.parametrize(
    "flags",
    [
        ["--use_ema"],
        ["--mixed_precision=bf16", "--optimizer=adafactor"],
        ["--mixed_precision=bf16", "--compile"],
    ],
)
def test_planned_memory_is_that_of_the_tensors(arguments, flags):
    run = set_up(arguments(*flags))[0]
    planned, weights = planned_memory(run), list(run.policy.parameters())
    count = sum(p.numel() for p in weights)
    assert planned["policy"] == planned["gradients"] == sum(p.nbytes for p in weights) == 4 * count
    low = "--mixed_precision=bf16" in flags and "--compile" not in flags
    assert planned["reference"] == count * (2 if low else 4)
    frozen = [run.family.vae, *run.family.text_encoders]
    assert planned["encoders"] == sum(p.nbytes for model in frozen for p in model.parameters())
    assert planned.get("average", 0) == (sum(value.nbytes for value in run.average.values) if run.average else 0)
    for parameter in weights:
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    state = [value for values in run.optimizer.state.values() for value in values.values()]
    assert planned["optimizer"] == sum(x.nbytes for x in state if isinstance(x, torch.Tensor) and x.dim())
    run.family.vae.to("meta")  # as where a latent cache is read
    run.reference = None  # as for sft
    planned = planned_memory(run)
    assert planned["encoders"] == sum(p.nbytes for model in frozen[1:] for p in model.parameters())
    assert "reference" not in planned


@pytest.mark.parametrize(
    "family, flags, again",
    [
        ("sd15", "", False),
        ("sdxl", "", True),
        ("sd15", "--gradient_checkpointing", True),
        ("sdxl", "--gradient_checkpointing=none", False),
        ("sd15", "--gradient_checkpointing=auto --activation_memory=100", False),
        ("sd15", "--gradient_checkpointing=auto --activation_memory=1e-9", True),
    ],
)
def test_units_are_computed_again_as_the_flags_or_the_base_say(arguments, family, flags, again):
    unet = set_up(arguments(*flags.split(), family=family))[0].policy
    assert {unit.gradient_checkpointing for unit in checkpoint_units(unet).values()} == {again}
