"""Base models: encoding, parametrisation, saving, and equal arithmetic of policy and reference."""

import copy
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from recording import change_part, edit_json, same, set_up
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel

from sdpo import families
from sdpo.arithmetic import compile_blocks, fuses_attention, group_norm, to_channels_last
from sdpo.batch import collate
from sdpo.command import InputError
from sdpo.families import FAMILIES, hold_matmul_weights, load_family
from sdpo.files import sha256
from sdpo.hub import DTYPES, load_state
from sdpo.inputs import make_inputs
from sdpo.losses import pair_terms

KEYS = [("sd15", "epsilon"), ("sd15", "v_prediction"), ("sdxl", "epsilon")]


def random_inputs(family, samples=4):
    draw = torch.Generator().manual_seed(0)
    shape = (samples, *family.latent_shape(32))
    noisy, target = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    timesteps = torch.randint(0, 1000, (samples,), generator=draw)
    return noisy, timesteps, family.encode_captions(["a red circle", "a blue square"] * (samples // 2), 32), target


@pytest.mark.parametrize("key", KEYS, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_margin_of_equal_models_is_exactly_zero(bases, key, dtype):
    family = load_family(key[0], str(bases[key])).to(torch.device("cpu"), dtype)
    policy = family.load_unet()
    reference = hold_matmul_weights(copy.deepcopy(policy).requires_grad_(False), dtype)
    noisy, timesteps, conditioning, target = random_inputs(family)
    low = dtype != torch.float32
    with torch.autocast("cpu", dtype if low else torch.bfloat16, enabled=low):
        prediction = family.predict(policy, noisy, timesteps, conditioning)
        with torch.no_grad():
            frozen = family.predict(reference, noisy, timesteps, conditioning)
    terms = pair_terms(prediction, frozen, target, beta=5000.0)
    assert terms.margin.abs().max() == 0
    if low:  # most weights are in fact held in low precision, and casting all of them breaks the equality
        held = sum(p.numel() for p in reference.parameters() if p.dtype == dtype)
        assert held > 0.95 * sum(p.numel() for p in reference.parameters())
        with torch.autocast("cpu", dtype), torch.no_grad():
            cast = family.predict(copy.deepcopy(policy).to(dtype), noisy, timesteps, conditioning)
        assert not torch.equal(cast, frozen)


@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_captions_are_encoded_as_the_pipeline_does(bases, key):
    family = load_family(key[0], str(bases[key]))
    pipeline = DiffusionPipeline.from_pretrained(bases[key])
    captions = ["a small red circle on a blue background", ""]
    conditioning = family.encode_captions(captions, 32)
    if key[0] == "sdxl":
        embeddings, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
        torch.testing.assert_close(conditioning["text_embeds"], pooled)
        assert conditioning["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2
    else:
        embeddings, _ = pipeline.encode_prompt(captions, "cpu", 1, False)
    torch.testing.assert_close(conditioning["encoder_hidden_states"], embeddings)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_target_follow_the_closed_form(bases, kind):
    family = load_family("sd15", str(bases["sd15", kind]))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = torch.tensor(np.cumprod(1 - betas), dtype=torch.float32)
    draw = torch.Generator().manual_seed(1)
    latents, noise, other = (torch.randn(3, 4, 8, 8, generator=draw) for _ in range(3))
    timesteps = torch.tensor([0, 500, 999])
    a, b = (x.view(3, 1, 1, 1) for x in (signal[timesteps].sqrt(), (1 - signal[timesteps]).sqrt()))
    noisy, target = family.add_noise(latents, noise, timesteps, perturbed=other)
    torch.testing.assert_close(noisy, a * latents + b * other, atol=1e-5, rtol=1e-4)
    expected = noise if kind == "epsilon" else a * noise - b * latents
    torch.testing.assert_close(target, expected, atol=1e-5, rtol=1e-4)


def test_latents_are_the_posterior_sample_times_the_scaling_factor(bases):
    family = load_family("sd15", str(bases["sd15", "epsilon"]))
    pixels, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 8, 8)
    posterior = family.vae.encode(pixels).latent_dist
    expected = (posterior.mean + torch.exp(0.5 * posterior.logvar) * noise) * family.vae.config.scaling_factor
    torch.testing.assert_close(family.sample_posterior(family.encode_moments(pixels), noise), expected)


def test_timesteps_cover_the_schedule(bases):
    family = load_family("sd15", str(bases["sd15", "epsilon"]))
    assert family.timesteps(torch.tensor([0.0, 0.5, 1 - 1e-12], dtype=torch.float64)).tolist() == [0, 500, 999]


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "pipeline", "folder", "checkpoint"])
def test_unet_init_replaces_the_weights(bases, tmp_path, suffix):
    family = load_family("sd15", str(bases["sd15", "epsilon"]))
    unet = family.load_unet()
    changed = {name: value + 1 for name, value in unet.state_dict().items()}
    if suffix in ("pth", "checkpoint"):
        torch.save(changed, tmp_path / "unet.pth")
    elif suffix == "safetensors":
        save_file(changed, tmp_path / "unet.safetensors")
    else:
        unet.load_state_dict(changed)
        unet.save_pretrained(tmp_path / "unet")
    init = tmp_path / {"pipeline": "", "folder": "unet", "checkpoint": ""}.get(suffix, f"unet.{suffix}")
    again = load_family("sd15", str(bases["sd15", "epsilon"])).load_unet(str(init))
    assert all(torch.equal(value, changed[name]) for name, value in again.state_dict().items())
    if suffix == "checkpoint":
        assert family.fingerprint_unet(str(init)) == sha256(init / "unet.pth")


@pytest.mark.parametrize("precision, processor", [("no", AttnProcessor2_0), ("bf16", AttnProcessor)])
def test_attention_is_fused_where_that_pays(arguments, precision, processor):
    run = set_up(arguments(f"--mixed_precision={precision}"))[0]
    for unet in (run.policy, run.reference):
        assert {type(used) for used in unet.attn_processors.values()} == {processor}
    assert fuses_attention(torch.device("cuda"), DTYPES[precision])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_policy_and_reference_ask_for_the_same_attention(arguments, monkeypatch, family):
    """Kernels are chosen by whether gradients are wanted; the reference wants none, and keeps nothing for them."""
    run, dataset, _ = set_up(arguments(family=family))
    inputs = make_inputs(run.family, collate([dataset[0, 0]]))
    given = (inputs.noisy, inputs.timesteps, inputs.conditioning)
    asked, attend = [], F.scaled_dot_product_attention

    def noting(query, *rest, **options):
        asked.append(torch.is_grad_enabled() and query.requires_grad)
        return attend(query, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    policy = run.family.predict(run.policy, *given)
    calls = len(asked)
    with torch.no_grad():
        reference, again = run.family.predict(run.reference, *given), run.family.predict(run.policy, *given)
    assert calls and len(asked) == 3 * calls and all(asked)
    assert policy.requires_grad and not reference.requires_grad and not again.requires_grad
    assert torch.equal(policy, reference) and torch.equal(policy, again)


def test_a_vae_kept_in_fp32_decodes_in_fp32_under_autocast(bases):
    family = load_family("sd15", str(bases["sd15", "epsilon"]))
    latents = torch.randn(2, *family.latent_shape(32))
    with torch.autocast("cpu", torch.bfloat16):
        pixels = family.decode_latents(latents)
    assert torch.equal(pixels, family.decode_latents(latents))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("nested", [False, True])
def test_weights_as_wrappers_name_them_are_read(tmp_path, prefix, nested):
    state = {"a": torch.ones(2), "module.b": torch.zeros(1)}
    named = {prefix + name: value for name, value in state.items()}
    torch.save({"state_dict": named} if nested else named, tmp_path / "unet.pth")
    assert same(load_state(tmp_path / "unet.pth"), state)


def test_unusable_models_are_refused(bases, tmp_path):
    family = load_family("sd15", str(bases["sd15", "epsilon"]))
    with pytest.raises(InputError, match="multiple of 4"):
        family.latent_shape(30)
    other = load_family("sdxl", str(bases["sdxl", "epsilon"])).load_unet()
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth belongs to another architecture"):
        family.load_unet(str(tmp_path / "other.pth"))
    broader = shutil.copytree(bases["sd15", "epsilon"], tmp_path / "broader")
    config = CLIPTextConfig.from_pretrained(broader / "text_encoder")
    config.hidden_size = 32
    CLIPTextModel(config).save_pretrained(broader / "text_encoder")
    with pytest.raises(InputError, match=r"text encoders of .*broader are 32 wide, the UNet takes 16: they belong"):
        load_family("sd15", str(broader)).load_unet()
    with pytest.raises(InputError, match="belongs to another architecture: cross_attention_dim is 32, 16 in"):
        family.load_unet(str(bases["sdxl", "epsilon"]))


def test_families_have_the_official_settings():
    """Of the official launchers: 512 pixels, AdamW and no checkpointing; 1024 pixels, Adafactor and gradient checkpointing."""
    settings = ("resolution", "optimizer", "gradient_checkpointing", "dspo_form")
    found = {name: tuple(getattr(family, setting) for setting in settings) for name, family in FAMILIES.items()}
    assert found == {"sd15": (512, "adamw", "none", "score"), "sdxl": (1024, "adafactor", "full", "switched")}


@pytest.mark.parametrize("key", [("sd15", "epsilon"), ("sdxl", "epsilon")], ids="-".join)
def test_captions_that_are_too_long_are_cut_as_the_pipeline_does(bases, key):
    captions = ["a small red circle on a blue background " * 20, "a blue square"]
    conditioning = load_family(key[0], str(bases[key])).encode_captions(captions, 32)
    pipeline = DiffusionPipeline.from_pretrained(bases[key])
    if key[0] == "sdxl":
        embeddings = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)[0]
    else:
        embeddings = pipeline.encode_prompt(captions, "cpu", 1, False)[0]
    torch.testing.assert_close(conditioning["encoder_hidden_states"], embeddings)


def test_conditioning_is_fp32_whatever_the_encoders_hold(bases):
    family = load_family("sdxl", str(bases["sdxl", "epsilon"])).to(torch.device("cpu"), torch.bfloat16)
    assert {value.dtype for value in family.encode_captions(["a red circle"], 1032).values()} == {torch.float32}
    assert family.encode_captions(["a red circle"], 1021)["time_ids"].tolist() == [[1021, 1021, 0, 0, 1021, 1021]]
    assert family.encode_captions(["a red circle"], 1021, 8)["time_ids"].tolist() == [[1021, 8, 0, 0, 1021, 8]]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("upcast", [False, True])
def test_a_vae_that_overflows_in_fp16_is_kept_in_fp32(bases, name, upcast):
    """As in diffusers' pipelines: SD1.5's does not overflow, and its config says so only by a default."""
    family = load_family(name, str(bases[name, "epsilon"]))
    family.vae.register_to_config(force_upcast=upcast)
    found = [family.vae_dtype(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    in_fp16 = torch.float32 if upcast and name == "sdxl" else torch.float16
    assert found == [in_fp16, torch.bfloat16, torch.float32]


def test_a_vae_that_overflows_in_fp16_is_tried_out_in_fp32(bases):
    """Under autocast too, as where a run is set up; training encodes outside it."""
    family = load_family("sdxl", str(bases["sdxl", "epsilon"]))
    family.vae.register_to_config(force_upcast=True)
    with torch.no_grad():
        for parameter in family.vae.encoder.conv_in.parameters():
            parameter.mul_(3e5)  # activations above 65504, which a norm takes back
    family.to(torch.device("cpu"), torch.float16)
    unet = family.load_unet()
    with torch.autocast("cpu", torch.float16):
        assert not family.encode_moments(torch.zeros(1, 3, 32, 32)).isfinite().all()
        family.try_out(unet)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_captions_are_mended_before_they_become_tokens(bases, name):
    """As the tokenizer of the official code does it."""
    family = load_family(name, str(bases[name, "epsilon"]))
    typed = ["a corgi\u2019s \u201chead\u201d", "\ufb01re &amp; ice", "cafÃ©", "a red circle"]
    plain = ['a corgi\'s "head"', "fire & ice", "café", "a red circle"]
    for tokenizer, ids, expected in zip(family.tokenizers, family.tokenize(typed), family.tokenize(plain), strict=True):
        raw = tokenizer(typed, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(ids, expected) and torch.equal(ids[3], raw[3])
        assert not torch.equal(ids, raw)


def test_what_a_run_begins_with_is_described_part_by_part(bases, tmp_path):
    def describe():
        return load_family("sdxl", str(tmp_path / "base"), encoders=False).describe()

    shutil.copytree(bases["sdxl", "epsilon"], tmp_path / "base")
    parts = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoders", "text_encoder_2": "text encoders"}
    for folder, name in parts.items():
        before = describe()
        change_part(tmp_path / "base" / folder)
        after = describe()
        assert [key for key in after if after[key] != before.get(key)] == [name]
    edit_json(tmp_path / "base" / "scheduler" / "scheduler_config.json", beta_end=0.013)
    assert [key for key, value in describe().items() if value != after.get(key)] == ["noise schedule"]


def test_every_part_is_of_the_revision_that_was_asked_for(bases, tmp_path, monkeypatch):
    asked = []

    def record(name):
        original = getattr(families, name)

        def call(*given, **options):
            asked.append((name, options.get("revision"), options.get("cache_dir")))
            return original(*given, **options)

        monkeypatch.setattr(families, name, call)

    base = bases["sdxl", "epsilon"]
    shutil.copytree(base / "vae", tmp_path / "vae")
    for name in ("load_part", "hash_part", "read_pipeline_class"):
        record(name)
    family = families.load_family("sdxl", str(base), revision="v1", cache_dir="models")
    family.load_unet()
    family.describe()
    assert len(asked) == 1 + 6 + 1 + 6 and set(entry[1:] for entry in asked) == {("v1", "models")}
    asked.clear()
    families.load_family("sdxl", str(base), vae=str(tmp_path / "vae"), revision="v1", cache_dir="models")
    assert [entry[1] for entry in asked].count(None) == 1  # the VAE, whose repository has other revisions


def test_the_saved_pipeline_has_the_vae_trained_with(bases, tmp_path):
    base = bases["sd15", "epsilon"]
    shutil.copytree(base / "vae", tmp_path / "vae")
    change_part(tmp_path / "vae")
    family = load_family("sd15", str(base), vae=str(tmp_path / "vae"))
    unet = family.load_unet()
    state = {name: value + 1 for name, value in unet.state_dict().items()}
    family.to(torch.device("cpu"), torch.bfloat16).save_pipeline(unet.config, state, tmp_path / "saved")
    saved, own = DiffusionPipeline.from_pretrained(tmp_path / "saved"), load_family("sd15", str(base))
    assert same(saved.unet.state_dict(), state)
    assert same(saved.text_encoder.state_dict(), own.text_encoders[0].state_dict())
    assert same(saved.vae.state_dict(), load_family("sd15", str(base), vae=str(tmp_path / "vae")).vae.state_dict())
    assert not same(saved.vae.state_dict(), own.vae.state_dict())
    of_pipeline = load_family("sd15", str(base), vae=str(tmp_path / "saved"))  # a pipeline in place of its VAE
    assert same(of_pipeline.vae.state_dict(), saved.vae.state_dict())
    assert of_pipeline.fingerprints()["VAE"] != own.fingerprints()["VAE"]


@pytest.mark.parametrize("linear", [False, True])  # as SDXL has it
def test_nothing_leaves_channels_last_format(bases, linear):
    model, wrong = load_family("sd15", str(bases["sd15", "epsilon"])), []
    plain = UNet2DConditionModel.from_config(model.load_unet().config, use_linear_projection=linear).eval()
    last = copy.deepcopy(plain)
    to_channels_last(last)

    def check(block, given, output):
        values = [x for x in (*given, *(output if isinstance(output, tuple) else (output,))) if x.dim() == 4]
        wrong.extend(block for x in values if not x.is_contiguous(memory_format=torch.channels_last))

    for block in last.modules():
        if isinstance(block, Transformer2DModel | ResnetBlock2D | torch.nn.Conv2d) and block is not last.conv_in:
            block.register_forward_hook(check)
    noisy, timesteps, conditioning, _ = random_inputs(model)
    with torch.no_grad():
        expected = model.predict(plain, noisy, timesteps, conditioning)
        torch.testing.assert_close(model.predict(last, noisy, timesteps, conditioning), expected)
    assert not wrong


class KernelSides(TorchDispatchMode):
    """Sides of the kernels of all convolutions, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        weights = {torch.ops.aten.convolution.default: 1, torch.ops.aten.convolution_backward.default: 2}
        if function in weights:
            self.seen.add(args[weights[function]].shape[-1])
        return function(*args, **(kwargs or {}))


def test_convolutions_of_single_pixels_are_matrix_products_in_channels_last_format(bases):
    """With the same gradients, in the format of their weights, as DDP and fused AdamW want them."""
    model = load_family("sd15", str(bases["sd15", "epsilon"]))
    noisy, timesteps, conditioning, _ = random_inputs(model)
    gradients, sides = [], []
    for change in (lambda unet: None, to_channels_last):
        unet = model.load_unet()
        change(unet)
        with KernelSides() as kernels:
            model.predict(unet, noisy, timesteps, conditioning).square().mean().backward()
        sides.append(kernels.seen)
        gradients.append({name: parameter.grad for name, parameter in unet.named_parameters()})
    assert sides == [{1, 3}, {3}]
    torch.testing.assert_close(gradients[1], gradients[0], check_stride=False)
    assert all(parameter.grad.stride() == parameter.stride() for parameter in unet.parameters())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pixels_are_multiplied_alike_whether_the_weight_is_frozen(memory_format):
    """Of images in either format: on a GPU norms leave channels-last."""
    layer, operations = torch.nn.Conv2d(8, 4, 1), []
    to_channels_last(torch.nn.Sequential(layer))

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations[-1].append(str(function))
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 8, 4, 4).to(memory_format=memory_format)
    for trained in (True, False):
        operations.append([])
        with Operations():
            layer.requires_grad_(trained)(x)
    assert operations[0] == operations[1] and "aten.addmm.default" in operations[0]


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"groups": 2}, {"kernel_size": 3}])
def test_only_convolutions_of_single_pixels_become_matrix_products(options):
    layer, x = torch.nn.Conv2d(8, 4, **{"kernel_size": 1} | options), torch.randn(2, 8, 4, 4)
    expected = layer(x)
    to_channels_last(torch.nn.Sequential(layer))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("last", [False, True])
def test_compiled_blocks_hold_norms_upsampling_and_products_of_pixels(bases, last):
    sides, operations, norms = set(), set(), set()

    def note(graph, _):
        operations.update(node.target for node in graph.graph.nodes)
        norms.update(node.args[-1] for node in graph.graph.find_nodes(op="call_function", target=F.group_norm))
        convolutions = graph.graph.find_nodes(op="call_function", target=torch.conv2d)
        sides.update(node.args[1].meta["example_value"].shape[-1] for node in convolutions)
        return graph

    model = load_family("sd15", str(bases["sd15", "epsilon"]))
    unet = model.load_unet()
    if last:
        to_channels_last(unet)
    compile_blocks(unet, note)
    noisy, timesteps, conditioning, _ = random_inputs(model)
    model.predict(unet, noisy, timesteps, conditioning)
    assert sides == ({3} if last else {1, 3})
    assert {F.layer_norm, F.interpolate} <= operations
    assert norms == {1e-5, 1e-6}  # the epsilons of residual blocks and of transformers


@pytest.mark.parametrize("last", [False, True])
def test_group_norm_is_torchs_and_keeps_the_memory_format(last):
    """Of gradients too, which torch's own on CUDA leaves in the usual format, for convolutions to copy back."""
    norm, memory_format = torch.nn.GroupNorm(4, 12, eps=1e-3), torch.channels_last if last else torch.contiguous_format
    norm.weight.data, norm.bias.data = torch.linspace(-1, 2, 12), torch.linspace(3, -1, 12)
    x, upstream = (1 + torch.randn(2, 12, 6, 8).to(memory_format=memory_format) for _ in range(2))
    results = []
    for forward in (norm, partial(group_norm, norm)):
        x = x.detach().requires_grad_()
        out = forward(x)
        results.append([out, *torch.autograd.grad(out, (x, norm.weight, norm.bias), upstream)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    assert all(tensor.is_contiguous(memory_format=memory_format) for tensor in results[1][:2])
    assert group_norm(norm, x.bfloat16()).dtype == torch.float32  # as under autocast on a GPU, where weights are fp32
    assert group_norm(norm.bfloat16(), x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_compiled_norms_keep_the_memory_format_where_torchs_do_not(device):
    def note(graph, _):
        operations.update(node.target for node in graph.graph.nodes)
        return graph

    operations, last = set(), {"memory_format": torch.channels_last}
    with torch.device(device):
        block, x = ResnetBlock2D(in_channels=32, temb_channels=None), torch.ones(2, 32, 8, 8).to(**last)
    assert block.norm1(x).is_contiguous(**last) == (device == "cpu")
    compile_blocks(block, note)
    assert block.norm1(x).is_contiguous(**last)
    block(x, None)
    assert {F.group_norm, torch.rsqrt} & operations == {F.group_norm if device == "cpu" else torch.rsqrt}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_policy_and_reference_ask_for_the_same_graphs(bases, monkeypatch, family):
    """A compiler partitions a block by which of its inputs and weights need gradients."""

    def compile_nothing(forward, **_):
        compiled.append(forward.__self__)

        def call(*inputs, **options):
            values = [*inputs, *options.values()]
            asked.append([isinstance(value, torch.Tensor) and value.requires_grad for value in values])
            return forward(*inputs, **options)

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    model, asked, kept, compiled = load_family(family, str(bases[family, "epsilon"])), [], [], []
    policy, reference = model.load_unet(), model.load_unet().requires_grad_(False)
    noisy, timesteps, conditioning, _ = random_inputs(model)
    for unet in (policy, reference):
        compile_blocks(unet)
    assert all(parameter.requires_grad for block in compiled for parameter in block.parameters())
    model.predict(policy, noisy, timesteps, conditioning)
    trained = list(asked)
    asked.clear()
    for block in reference.modules():
        if type(block).__name__ in ("BasicTransformerBlock", "ResnetBlock2D"):  # nothing is kept for a backward pass
            block.register_forward_hook(
                lambda module, given, output: kept.extend([given[0].requires_grad, output.requires_grad])
            )
    with torch.no_grad():
        assert not model.predict(reference, noisy, timesteps, conditioning).requires_grad
    assert kept and not any(kept)
    assert asked == trained and max(map(sum, trained)) == 2  # a residual block's input and the timestep's embedding


def test_every_family_has_a_pipeline_class_of_its_own():
    """By which a base is told to be of it."""
    assert len({family.pipeline_class for family in FAMILIES.values()}) == len(FAMILIES)


def test_a_model_of_which_nothing_would_be_compiled_is_refused():
    with pytest.raises(InputError, match="--compile knows no block of a Sequential: drop it"):
        compile_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)))
