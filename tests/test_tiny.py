"""The embedded default: pictures and their checks, pairs, the committed base model, the comparison of runs."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageFilter
from recording import same
from scipy import stats

import train
from sdpo.command import InputError
from sdpo.compare import write_table
from sdpo.families import load_family
from sdpo.metrics import read_metrics
from sdpo.tiny import compare, make_pairs, pictures, train_base
from sdpo.tiny.train_base import build_tokenizer, measure


@pytest.mark.parametrize("spec", pictures.SPECS[::7], ids=lambda spec: spec.caption)
def test_a_picture_passes_every_check_wherever_it_is(spec):
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert all(pictures.check(pictures.render(spec, pictures.draw_centre(spec, rng)), spec).values())


INSIDE = {  # of a shape of half the extent r at the origin, y downwards
    "circle": lambda x, y, r: x**2 + y**2 < r**2,
    "square": lambda x, y, r: (abs(x) < r) & (abs(y) < r),
    "triangle": lambda x, y, r: (abs(x) < (y + r) / 2) & (y < r),
}


@pytest.mark.parametrize("shape", INSIDE)
@pytest.mark.parametrize("size", pictures.SIZES)
def test_pixels_are_coloured_as_far_as_the_shape_covers_them(shape, size):
    centre, fine = (15.3, 16.8), 16
    places = (np.arange(pictures.SIDE * fine) + 0.5) / fine
    inside = INSIDE[shape](places - centre[0], places[:, None] - centre[1], pictures.SIZES[size])
    covered = inside.reshape(pictures.SIDE, fine, pictures.SIDE, fine).mean((1, 3))
    picture = pictures.render(pictures.Spec(size, "white", shape, "blue"), centre).astype(float)
    blue, white = (np.array(pictures.COLOURS[colour]) for colour in ("blue", "white"))
    share = (picture - blue) / (white - blue)  # of the shape's colour, in every channel
    assert abs(share - covered[..., None]).max() < 0.25  # at corners, which the distance to the outline rounds
    assert abs(share.mean(-1) - covered).mean() < 0.003


@pytest.mark.parametrize(
    "attribute, value", [("size", "large"), ("colour", "green"), ("shape", "square"), ("background", "yellow")]
)
def test_a_wrong_attribute_fails_its_own_check_only(attribute, value):
    spec = pictures.Spec("small", "red", "circle", "blue")
    checks = pictures.check(pictures.render(replace(spec, **{attribute: value}), (16.0, 16.0)), spec)
    assert [name for name, passed in checks.items() if not passed] == [attribute]


def test_blur_noise_and_emptiness_fail():
    spec = pictures.Spec("large", "white", "triangle", "green")
    picture = pictures.render(spec, (16.0, 16.0))
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(3)))
    noisy = (picture + np.random.default_rng(0).normal(0, 45, picture.shape)).clip(0, 255).astype(np.uint8)
    for broken in (blurred, noisy):
        assert not pictures.check(broken, spec)["clean"]
    empty = np.broadcast_to(np.array(pictures.COLOURS["green"], np.uint8), (32, 32, 3))
    assert pictures.score(empty, spec.caption) == pytest.approx(1 / 5)  # the background is right
    checkered = np.indices((32, 32)).sum(0) % 2 * 255  # the median of half the frame is between its two colours
    checks = pictures.check(np.stack([checkered] * 3, -1).astype(np.uint8), spec)
    assert not any(passed for name, passed in checks.items() if name != "background")


def test_pairs_are_not_written_over_others(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"train.parquet is there already: name another --out"):
        make_pairs.main([f"--out={tmp_path}"])
    assert (tmp_path / "train.parquet").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "command, message",
    [
        (lambda: make_pairs.main(["--out="]), "--out is empty: name a folder"),
        (lambda: train_base.main(["--out="]), "--out '' is empty or cannot be written: name a folder"),
        (lambda: train_base.main(["--out=x", "--faulty=15"]), r"--faulty must lie in \[0, 1\], got 15.0"),
        (lambda: train_base.main(["--out=x", "--faulty=nan"]), r"--faulty must lie in \[0, 1\], got nan"),
    ],
)
def test_flags_that_would_be_found_wrong_too_late_are_refused(tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        command()
    assert not list(tmp_path.iterdir())


def test_only_its_own_captions_can_be_scored():
    with pytest.raises(ValueError, match="is not a caption of the tiny pictures"):
        pictures.score(np.zeros((32, 32, 3), np.uint8), "a photo of a cat")


def test_held_out_captions_are_not_trained():
    assert len(pictures.SPECS) == len(pictures.TRAINED) + len(pictures.HELD_OUT) == 120
    assert not {spec.caption for spec in pictures.TRAINED} & {spec.caption for spec in pictures.HELD_OUT}


def test_pairs_prefer_the_better_picture(tmp_path):
    make_pairs.write_split(pictures.TRAINED, 300, 0, tmp_path / "train.parquet")
    rows = [row for row in pq.read_table(tmp_path / "train.parquet").to_pylist() if row["label_0"] != 0.5]
    assert 0.9 < len(rows) / 300 < 0.98
    scores = np.array(
        [
            [
                pictures.score(np.asarray(Image.open(io.BytesIO(row[name]))), row["caption"])
                for name in ("jpg_0", "jpg_1")
            ]
            for row in rows
        ]
    )
    first_won = np.array([row["label_0"] == 1 for row in rows])
    winners, losers = np.where(first_won, *scores.T), np.where(first_won, *scores.T[::-1])
    assert winners.mean() > losers.mean() + 0.1
    assert 0.85 < (winners == 1).mean() < 0.97


def test_words_are_single_tokens():
    tokenizer = build_tokenizer()
    for spec in pictures.SPECS:
        assert [token.removesuffix("</w>") for token in tokenizer.tokenize(spec.caption)] == spec.caption.split()


def test_committed_base_does_what_is_written_beside_it():
    """Its measurement, repeated on fewer samples, agrees within five standard errors; all of it is at most 4 MB."""
    written = json.loads((compare.BASE / "measured.json").read_text())
    assert written["all"] > 0.6
    figures = measure(
        DiffusionPipeline.from_pretrained(compare.BASE, torch_dtype=torch.float32), pictures_per_caption=3
    )
    assert figures["all"] == pytest.approx(written["all"], abs=5 * (written["all"] * (1 - written["all"]) / 60) ** 0.5)
    assert sum(file.stat().st_size for file in compare.BASE.rglob("*")) <= 4_000_000
    assert not [file for file in compare.BASE.rglob("*") if file.suffix in (".bin", ".pth", ".pkl")]


def test_scores_are_those_of_the_weights_given(tmp_path, monkeypatch):
    family = load_family(None, str(compare.BASE))
    changed = {name: value + 1 for name, value in family.load_unet().state_dict().items()}
    torch.save(changed, tmp_path / "unet.pth")

    def sample(family, unet, captions, noise, *_):
        """Pictures of the captions, every third in another colour."""
        assert same(unet.state_dict(), changed)
        assert len(noise.flatten(1).unique(dim=0)) == len(captions)
        specs = [pictures.parse(caption) for caption in captions]
        others = [next(c for c in pictures.COLOURS if c not in (spec.colour, spec.background)) for spec in specs]
        shown = [replace(s, colour=c) if i % 3 == 0 else s for i, (s, c) in enumerate(zip(specs, others, strict=True))]
        return np.stack([pictures.render(spec, (16.0, 16.0)) for spec in shown])

    monkeypatch.setattr(compare, "sample", sample)
    figures, _ = compare.evaluate(family, tmp_path / "unet.pth")
    expected = np.where(np.arange(20 * compare.PER_CAPTION) % 3, 1.0, 0.8)  # four of five checks passed
    error = stats.sem(expected.reshape(20, -1).mean(1))  # pictures of one caption are not independent
    wanted = {"score": expected.mean(), "score_se": error, "all_correct": (expected == 1).mean()}
    assert figures == pytest.approx(wanted)


def test_the_reading_states_the_tables_own_figures(tmp_path):
    def row(method, weights, score, winner=0.0):
        errors = {"winner_error_change": winner, "loser_error_change": 0.003}
        return {"run": method, "weights": weights, "score": score, "all_correct": 0.5, **errors}

    rows = [row("base", "", 0.9), row("plain", "raw", 0.7, 0.002), row("plain", "averaged", 0.8, 0.001)]
    text = " ".join(compare.reading(rows).split())
    assert "plain: winner error +2.00e-3, loser error +3.00e-3, sample score changed by -0.200." in text
    assert "lowered the winner's error in 1 of 1 runs" in text
    columns = {"Δ winner error x 1e3": ("winner_error_change", 1e3, 2), **compare.SCORE_COLUMNS}
    table = write_table(rows, tmp_path / "table.md", columns).split("\n")
    assert table[3] == "| plain | raw | +2.00 | 0.700 | 0.50 |"


def test_runs_of_other_pairs_or_bases_are_not_compared(tmp_path):
    base = "pretrained_model_name_or_path"
    settings = {"seed": 0, base: str(compare.BASE), "unet_init": "", "beta_dpo": 200, "steps": 100}
    changes = {"a": {}, "b": {"beta_dpo": 300}, "c": {"seed": 1, "unet_init": "x"}, "d": {"pairs": 5, "split": "x"}}
    runs = {
        name: SimpleNamespace(label=name, folder=tmp_path, settings=settings | changes[name], errors={})
        for name in changes
    }
    with pytest.raises(InputError, match="is no run that ended"):
        compare.refuse_unlike([runs["a"]])
    (tmp_path / "unet.pth").touch()
    compare.refuse_unlike([runs["a"], runs["b"]])
    with pytest.raises(InputError, match="a and c differ in unet_init, seed: compare runs that do not"):
        compare.refuse_unlike([runs["a"], runs["b"], runs["c"]])
    with pytest.raises(InputError, match="a and d differ in split, pairs: compare runs that do not"):
        compare.refuse_unlike([runs["a"], runs["d"]])
    for other in ({base: "another"}, {"unet_init": "x"}, {"pretrained_vae_model_name_or_path": "x"}):
        runs["a"].settings = settings | other
        with pytest.raises(InputError, match="a did not begin with the tiny base model in"):
            compare.refuse_unlike([runs["a"]])


def test_runs_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "PER_CAPTION", 1)
    monkeypatch.setattr(compare, "STEPS", 4)
    make_pairs.write_split(pictures.TRAINED, 60, 0, tmp_path / "train.parquet")
    flags = {
        "pretrained_model_name_or_path": compare.BASE, "train_data_dir": tmp_path, "resolution": 32, "mixed_precision": "no",
        "train_batch_size": 4, "max_train_steps": 2, "lr_warmup_steps": 1, "learning_rate": 1e-4, "beta_dpo": 200, "seed": 0,
        "report_to": "none", "output_dir": tmp_path / "run", "use_ema": True, "validation_pairs": 5, "validation_steps": 1,
    }  # fmt: skip
    train.main([f"--{name}={value}" for name, value in flags.items()])
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")  # fp32 throughout, though the base is stored in fp16
    assert {p.dtype for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae) for p in part.parameters()} == {
        torch.float32
    }
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text('{"step": 1, "train_loss": 0.1}\n')
    for run, message in {
        f"plain={tmp_path / 'other'}": "is no run that measured held-out pairs",
        "plain": "expected NAME=VALUE",
    }.items():
        with pytest.raises(InputError, match=message):
            compare.main([run, "--out", str(tmp_path / "out")])
    compare.main([f"plain={tmp_path / 'run'}", "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [(row["run"], row["weights"]) for row in rows] == [("base", ""), ("plain", "raw"), ("plain", "averaged")]
    for row, prefix in ((rows[1], "heldout"), (rows[2], "heldout_ema")):
        assert row["winner_error_change"] == pytest.approx(
            read_metrics(tmp_path / "run", f"{prefix}/winner_error_change")[-1][1]
        )
        assert row["lambda"] == 1
    for file in ("errors.png", "samples.png"):
        Image.open(tmp_path / "out" / file).verify()
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert f"{rows[0]['score']:.3f}" in table
    assert table.strip() in capsys.readouterr().out
