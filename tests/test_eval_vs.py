"""eval_vs.py from manifests to results: official scores reproduced, missing ones computed once, several runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image

import eval_vs
from sdpo import scorers, scoring
from sdpo.command import InputError
from sdpo.manifest import append_scores, read_manifest, read_scores
from sdpo.scoring import ScoringOptions, score_manifests
from sdpo.tiny import pictures

ROOT = Path(__file__).parents[1]
OFFICIAL = Path(__file__).parent / "data" / "winrate_simple"


@pytest.fixture
def official(tmp_path):
    """The official manifests, with the scores of the official pair files as scores.jsonl."""
    for label in "AB":
        folder = tmp_path / label
        folder.mkdir()
        (folder / f"{label}.json").write_bytes((OFFICIAL / f"{label}.json").read_bytes())
        rows = {}
        for metric in ("PickScore", "HPSv2", "CLIP", "Aesthetics", "ImageReward"):
            results = json.loads((OFFICIAL / f"pair_{metric.lower()}.json").read_text())["results"]
            for row in results:
                image, score = row[f"image_{label.lower()}"], row[f"score_{label.lower()}"]
                rows.setdefault((image, row["prompt"]), {"image": image, "prompt": row["prompt"]})[metric] = score
        (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    return tmp_path


def versus(json_a, json_b, *more, labels="ab"):
    """Flags of two runs."""
    return [f"--json_a={json_a}", f"--json_b={json_b}", f"--label_a={labels[0]}", f"--label_b={labels[1]}", *more]


def test_official_results_from_existing_scores_without_torch(official):
    pair = json.loads((OFFICIAL / "summary.json").read_text())["pair"]
    files = [official / label / f"{label}.json" for label in "AB"]
    flags = versus(*files, f"--outdir={official / 'out'}", labels=(pair["model_a"], pair["model_b"]))
    code = f"import sys, eval_vs; eval_vs.main({flags!r}); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == "False"
    (folder,) = (official / "out").iterdir()
    summary, expected = (json.loads((path / "summary.json").read_text()) for path in (folder, OFFICIAL))
    for row, wanted in zip(summary["metrics"], expected["metrics"], strict=True):
        assert wanted.items() <= row.items()
    assert summary["averages"] == expected["averages"]
    assert all(
        f'"prompt":{json.dumps(row["prompt"])}' in (folder / "report.html").read_text()
        for row in json.loads((OFFICIAL / "A.json").read_text())
    )


def picture_run(folder, faulty):
    """Images of a few captions, some of the wrong colour, with their manifest."""
    folder.mkdir()
    rows = []
    for index, spec in enumerate(pictures.HELD_OUT[:8]):
        other = next(name for name in pictures.COLOURS if name not in (spec.colour, spec.background))
        shown = pictures.Spec(spec.size, other, spec.shape, spec.background) if index < faulty else spec
        Image.fromarray(pictures.render(shown, (16.0, 16.0))).save(folder / f"{index}.png")
        rows.append({"prompt": spec.caption, "gen_image_path": f"{index}.png", "raw_image_path": "", "metadata": {}})
    (folder / "manifest.json").write_text(json.dumps(rows))
    return folder / "manifest.json"


def test_flags_may_have_dashes_as_those_of_other_commands():
    given = ["--json-a", "a-b.json", "--json-b=c-d.json", "--label-a=-x", "--label_b", "y", "--batch-size=3"]
    args = eval_vs.parse_arguments(given)
    assert (args.json_a, args.json_b, args.label_a, args.batch_size) == ("a-b.json", "c-d.json", "-x", 3)


def test_a_caption_without_pixel_checks_is_named(tmp_path):
    a, b = (picture_run(tmp_path / label, 0) for label in "ab")
    for path in (a, b):
        rows = json.loads(path.read_text())
        path.write_text(json.dumps([*rows[:2], rows[2] | {"prompt": "a cat"}]))
    with pytest.raises(InputError, match=r"a/manifest.json, entry 2 .*'a cat' is not a caption .*other --metrics"):
        eval_vs.main(versus(a, b, "--metrics=Pixels", f"--outdir={tmp_path / 'out'}"))


def test_a_picture_of_another_size_than_the_metric_takes_is_named(tmp_path):
    a, b = (picture_run(tmp_path / label, 0) for label in "ab")
    Image.new("RGB", (40, 32)).save(b.parent / "5.png")
    message = r"b/manifest.json, entry 5 .*pixel checks are of 32 x 32 pixels, images have \(32, 40\); drop it"
    with pytest.raises(InputError, match=message):
        eval_vs.main(versus(a, b, "--metrics=Pixels", f"--outdir={tmp_path / 'out'}"))
    assert not list(tmp_path.rglob("scores.jsonl"))


@pytest.mark.parametrize("fault", ["manifest", "image", "prompts"])
def test_nothing_is_scored_before_all_runs_are_known_to_be_comparable(tmp_path, fault):
    a, b = (picture_run(tmp_path / label, 0) for label in "ab")
    if fault == "manifest":
        b.write_text("[")
    elif fault == "image":
        (tmp_path / "b" / "3.png").unlink()
    else:
        other = {"prompt": pictures.TRAINED[0].caption}
        b.write_text(json.dumps([row | other for row in json.loads(b.read_text())]))
    message = {
        "manifest": "not valid JSON",
        "image": "image 3.png is neither .* lacks its Pixels; generate it again",
        "prompts": "no prompt in common",
    }
    with pytest.raises(InputError, match=message[fault]):
        eval_vs.main(versus(a, b, "--metrics=Pixels", f"--outdir={tmp_path / 'out'}"))
    assert not list(tmp_path.rglob("scores.jsonl"))


def test_scores_that_are_there_but_not_asked_for_are_pointed_out(tmp_path, caplog):
    a, b = (picture_run(tmp_path / label, faulty) for label, faulty in (("a", 0), ("b", 3)))
    for _ in range(2):
        eval_vs.main(versus(a, b, "--metrics=Pixels", f"--outdir={tmp_path / 'out'}"))
    assert not caplog.text
    with pytest.raises(InputError):  # its weights are out of reach
        eval_vs.main(versus(a, b, "--metrics=PickScore", f"--outdir={tmp_path / 'out'}"))
    assert "all images have those of Pixels: see --metrics" in caplog.text


def test_missing_scores_are_computed_once_and_several_runs_give_a_matrix(tmp_path, capsys):
    good, fair, bad = (picture_run(tmp_path / label, n) for label, n in (("good", 0), ("fair", 3), ("bad", 6)))
    command = versus(good, fair, f"--more=bad={bad}", "--metrics=Pixels", labels=("good", "fair"))
    eval_vs.main([*command, f"--outdir={tmp_path / 'out'}"])
    scores = [json.loads(line) for line in (tmp_path / "fair" / "scores.jsonl").read_text().splitlines()]
    assert [row["Pixels"] for row in scores] == pytest.approx([0.8] * 3 + [1.0] * 5)
    (summary,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("good_vs_bad_*/summary.json"))
    assert summary["metrics"][0]["win_rate_a_over_b"] == (6 + 2 / 2) / 8
    assert len(list((tmp_path / "out").glob("matrix_*.json"))) == 1
    (report,) = (path.read_text() for path in (tmp_path / "out").glob("report_*.html"))
    assert all(f"Win rates of {a} over {b}" in report for a, b in (("good", "fair"), ("good", "bad"), ("fair", "bad")))
    (tmp_path / "fair" / "0.png").unlink()  # its score is kept, so the image is not needed again
    before = (tmp_path / "fair" / "scores.jsonl").read_bytes()
    eval_vs.main([*command, f"--outdir={tmp_path / 'again'}", f"--more=good again={good}"])  # one more, by another flag
    assert (tmp_path / "fair" / "scores.jsonl").read_bytes() == before
    (matrix,) = (json.loads(path.read_text()) for path in (tmp_path / "again").glob("matrix_*.json"))
    assert matrix["labels"] == ["good", "fair", "bad", "good again"]
    assert "good" in capsys.readouterr().out


def test_a_changed_image_is_scored_again(tmp_path):
    command = versus(*(picture_run(tmp_path / label, 0) for label in "ab"), "--metrics=Pixels")
    eval_vs.main([*command, f"--outdir={tmp_path / 'one'}"])
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "b" / "0.png")
    eval_vs.main([*command, f"--outdir={tmp_path / 'two'}"])
    rates = [
        json.loads(path.read_text())["metrics"][0]["win_rate_a_over_b"]
        for out in ("one", "two")
        for path in (tmp_path / out).glob("*/summary.json")
    ]
    assert rates == [0.5, (1 + 7 / 2) / 8]


def test_scores_of_other_models_are_made_again_and_not_mixed(tmp_path):
    a, b = (picture_run(tmp_path / label, 2) for label in "ab")
    command = versus(a, b, "--metrics=Pixels", f"--outdir={tmp_path / 'out'}")
    path = tmp_path / "a" / "scores.jsonl"

    def models():
        return [json.loads(line)["models"]["Pixels"] for line in path.read_text().splitlines()]

    eval_vs.main(command)
    assert models() == ["official"] * 8
    official = path.read_text().splitlines(keepends=True)
    eval_vs.main([*command, "--score_dtype", "bf16", "--outdir", str(tmp_path / "low")])
    assert models() == ["bf16"] * 8
    low = path.read_text().splitlines(keepends=True)
    eval_vs.main([*command, "--outdir", str(tmp_path / "again")])  # nothing was said, so what exists is used
    assert path.read_text().splitlines(keepends=True) == low
    path.write_text("".join(official))
    with pytest.raises(InputError, match=r"different models \(a: official, b: bf16\); score all runs alike"):
        eval_vs.main(command)
    path.write_text("".join(official + low[:4]))
    with pytest.raises(InputError, match=r"different models \(bf16; official\); say which one with --weights"):
        eval_vs.main(command)


def test_scores_made_by_hand_are_kept_when_others_are_computed(tmp_path):
    manifests = [picture_run(tmp_path / label, 2) for label in "ab"]
    for label, manifest in zip("ab", manifests, strict=True):
        rows = [{"image": row["gen_image_path"], "prompt": row["prompt"]} for row in json.loads(manifest.read_text())]
        lines = [json.dumps(row | {"PickScore": 0.1 * (label == "a") + i}) + "\n" for i, row in enumerate(rows)]
        manifest.with_name("scores.jsonl").write_text("".join(lines))
    eval_vs.main(versus(*manifests, "--metrics", "PickScore", "Pixels", f"--outdir={tmp_path / 'out'}"))
    (summary,) = (tmp_path / "out").glob("*/summary.json")
    pick, _ = json.loads(summary.read_text())["metrics"]
    assert (pick["metric"], pick["wins_a"], pick["total_pairs"]) == ("PickScore", 8, 8)
    rows = [json.loads(line) for line in manifests[0].with_name("scores.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all({"PickScore", "Pixels", "sha256"} <= row.keys() for row in rows)


def test_weights_of_no_metric_are_refused_where_all_scores_exist(tmp_path):
    manifest = picture_run(tmp_path / "run", 0)
    command = versus(manifest, manifest, "--metrics=Pixels")
    eval_vs.main([*command, f"--outdir={tmp_path / 'out'}"])
    for flag, message in {
        "hpsv2.weights=x": r"there is no 'hpsv2\.weights'; choose from",
        "hpsv2.checkpoint=x": r"hpsv2\.checkpoint belongs to a metric that is not scored: score that too",
    }.items():
        with pytest.raises(InputError, match=message):
            eval_vs.main([*command, f"--outdir={tmp_path / 'again'}", "--weights", flag])


def test_scores_of_another_model_are_not_passed_off_as_official(tmp_path, caplog):
    manifest = picture_run(tmp_path / "run", 0)
    command = versus(manifest, manifest, "--metrics=Pixels")
    eval_vs.main([*command, f"--outdir={tmp_path / 'out'}"])
    assert caplog.text == ""
    path = manifest.parent / "scores.jsonl"
    path.write_text(path.read_text().replace('"models": {"Pixels": "official"}', '"models": {"Pixels": "bf16"}'))
    eval_vs.main([*command, f"--outdir={tmp_path / 'again'}"])
    assert f"CAUTION: scores of Pixels in {path} are not of the official model in fp32, but of bf16" in caplog.text


@pytest.mark.parametrize("reader", ["ascii", "gone"])
def test_results_are_on_file_whatever_becomes_of_the_console(tmp_path, reader):
    rows = [{"prompt": prompt, "gen_image_path": f"{prompt}.png"} for prompt in ("東京", "both")]
    scores = "".join(
        json.dumps({"image": r["gen_image_path"], "prompt": r["prompt"], "CLIP": 0.5}) + "\n" for r in rows
    )
    for run, kept in {"a": rows, "b": rows[1:]}.items():
        (tmp_path / run).mkdir()
        (tmp_path / run / "m.json").write_text(json.dumps(kept))
        (tmp_path / run / "scores.jsonl").write_text(scores)
    flags = versus(*(tmp_path / run / "m.json" for run in "ab"), "--metrics=CLIP", f"--outdir={tmp_path / 'out'}")
    command = [sys.executable, ROOT / "eval_vs.py", *flags]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"} if reader == "ascii" else dict(os.environ)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    if reader == "gone":
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(60) == 141
    else:
        out, said = process.communicate(timeout=60)
        assert process.returncode == 0 and "\\u6771" in out
    assert said == ""
    (folder,) = (tmp_path / "out").iterdir()
    assert {path.name for path in folder.iterdir()} == {"pair_clip.json", "summary.json", "report.html"}


def test_model_names_the_weights_of_a_metric(tmp_path, monkeypatch):
    (tmp_path / "x.pt").write_bytes(b"abc")
    monkeypatch.chdir(tmp_path)
    options = ScoringOptions([], {"hpsv2.checkpoint": "x.pt", "clip.checkpoint": "me/clip:y.bin"}, "bf16")
    assert options.model("HPSv2") == "checkpoint=sha256:ba7816bf8f01cfea, bf16"  # as FIPS 180 has it
    assert options.model("CLIP") == "checkpoint=me/clip:y.bin, bf16"
    assert (options.model("HPSv2.1"), ScoringOptions([]).model("HPSv2")) == ("bf16", "official")


def test_weights_are_told_apart_by_content_not_by_place(tmp_path):
    names = {}
    for place, content in {"one": "a", "copy": "a", "other": "b"}.items():
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "sub" / "model.bin").write_text(content)
        (tmp_path / f"{place}.pt").write_text(content)
        sources = {"pickscore.model": str(tmp_path / place), "hpsv2.checkpoint": str(tmp_path / f"{place}.pt")}
        names[place] = [ScoringOptions([], sources).model(metric) for metric in ("PickScore", "HPSv2")]
    assert names["one"] == names["copy"]
    assert all(a != b for a, b in zip(names["one"], names["other"], strict=True))
    (tmp_path / "one.pt").write_text("changed")
    assert ScoringOptions([], {"hpsv2.checkpoint": str(tmp_path / "one.pt")}).model("HPSv2") != names["one"][1]


def test_scores_of_another_model_count_unless_weights_or_precision_are_named():
    one = ScoringOptions([], {"clip.checkpoint": "me/clip:y.bin"})
    assert (one.accepts("CLIP"), one.accepts("HPSv2")) == ("checkpoint=me/clip:y.bin", None)
    assert ScoringOptions([]).accepts("CLIP") is None and ScoringOptions([], dtype="fp32").accepts("CLIP") == "official"
    alike = ScoringOptions([], {"hpsv21.checkpoint": "me/hps:y.bin"})  # its name begins with the other's
    assert alike.accepts("HPSv2") is None


def test_the_name_of_a_metrics_weights_does_not_depend_on_the_order_of_flags():
    sources = {"imagereward.tokenizer": "me/bert", "imagereward.checkpoint": "me/reward:x.pt"}
    names = [
        ScoringOptions([], dict(items)).model("ImageReward") for items in (sources.items(), reversed(sources.items()))
    ]
    assert names[0] == names[1] == "checkpoint=me/reward:x.pt, tokenizer=me/bert"


def test_scores_are_computed_as_asked_and_kept_under_their_names(tmp_path, monkeypatch):
    asked = {}

    def score_rows(rows, loaded, *, device, batch_size):
        asked.update(device=str(device), batch_size=batch_size)
        return ({"hpsv2": 10.0 + i, "clip": 20.0 + i} for i, _ in enumerate(rows))

    def load_scorers(names, sources, dtype):
        asked.update(names=names, dtype=dtype)
        return {}

    monkeypatch.setattr(scorers, "load_scorers", load_scorers)
    monkeypatch.setattr(scorers, "score_rows", score_rows)
    options = ScoringOptions(["HPSv2", "CLIP"], dtype="bf16", device="cpu", batch_size=5)
    entries, scores = score_manifests({"run": picture_run(tmp_path / "run", 0)}, options)["run"]
    assert asked == {"names": ["hpsv2", "clip"], "dtype": torch.bfloat16, "device": "cpu", "batch_size": 5}
    found = [[scores[entry.key][metric] for metric in ("HPSv2", "CLIP")] for entry in entries]
    assert found == [[10.0 + i, 20.0 + i] for i in range(8)]


def test_scores_in_fp32_that_are_asked_for_take_the_place_of_others(tmp_path):
    manifest = picture_run(tmp_path / "run", 0)
    file = tmp_path / "run" / "scores.jsonl"
    entries = read_manifest(manifest)
    low = [{"image": e.image, "prompt": e.prompt, "Pixels": 7.0, "models": {"Pixels": "bf16"}} for e in entries]
    for rows in (low, low[:4]):
        file.unlink(missing_ok=True)
        append_scores(file, rows)
        if len(rows) == len(entries):  # nothing said, so what exists is used
            _, scores = score_manifests({"run": manifest}, ScoringOptions(["Pixels"]))["run"]
            assert {row["Pixels"] for row in scores.values()} == {7.0}
        _, scores = score_manifests({"run": manifest}, ScoringOptions(["Pixels"], dtype="fp32"))["run"]
        assert all(row["Pixels"] <= 1 and row["models"] == {"Pixels": "official"} for row in scores.values())


def test_models_that_will_differ_are_refused_before_anything_is_scored(tmp_path, monkeypatch):
    a, b = (picture_run(tmp_path / name, seed) for seed, name in enumerate("ab"))
    monkeypatch.setattr(scoring, "_compute", None)
    row = {"Pixels": 0.5, "models": {"Pixels": "weights=/mine"}}
    entries = read_manifest(a)
    append_scores(tmp_path / "a" / "scores.jsonl", [{"image": e.image, "prompt": e.prompt, **row} for e in entries])
    with pytest.raises(InputError, match=r"Pixels come from different models \(a: weights=/mine, b: official\)"):
        eval_vs.main(versus(a, b, "--metrics=Pixels", f"--outdir={tmp_path / 'out'}"))
    first = entries[0]
    append_scores(tmp_path / "b" / "scores.jsonl", [{"image": first.image, "prompt": first.prompt, **row}])
    with pytest.raises(InputError, match=r"scores.jsonl: scores of Pixels come from different models \(official; w"):
        scoring.main([str(b), "--metrics=Pixels"])


def test_a_manifest_is_scored_and_summed_up_by_itself(tmp_path, capsys):
    manifests = [str(picture_run(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    scoring.main([*manifests, "--metrics", "Pixels"])
    said = capsys.readouterr().out
    for name in "ab":
        values = [row["Pixels"] for row in read_scores(tmp_path / name / "scores.jsonl").values()]
        assert len(values) == 8 and f"{fmean(values):.4f}" in said
    with pytest.raises(InputError, match=r"none.json is not a file; give the manifest"):
        scoring.main([str(tmp_path / "none.json")])


def test_weights_are_loaded_once_for_all_manifests_and_an_image_named_twice_is_scored_once(tmp_path, monkeypatch):
    loaded, scored = [], []
    monkeypatch.setattr(scorers, "load_scorers", lambda names, *_: loaded.append(names) or {})

    def score_rows(rows, *_, **__):
        for row in rows:
            scored.append(row)
            yield {"clip": 0.25}

    monkeypatch.setattr(scorers, "score_rows", score_rows)
    manifests = [str(picture_run(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    scoring.main([*manifests, manifests[0], "--metrics=CLIP"])
    assert loaded == [["clip"]] and len(scored) == len(set(scored)) == 16
    assert all(len(read_scores(tmp_path / name / "scores.jsonl")) == 8 for name in "ab")


def test_a_damaged_image_is_named_before_any_is_scored(tmp_path, monkeypatch):
    manifest = picture_run(tmp_path / "run", 0)
    monkeypatch.setattr(scoring, "_compute", None)
    last = read_manifest(manifest)[-1].path
    last.write_bytes(last.read_bytes()[:-30])
    with pytest.raises(InputError, match=rf"entry 7 .*image {last} cannot be scored: .*; make it again or drop it"):
        scoring.main([str(manifest), "--metrics=Pixels"])


def test_an_image_of_unknown_range_is_named_before_any_is_scored(tmp_path, monkeypatch):
    manifest = picture_run(tmp_path / "run", 0)
    monkeypatch.setattr(scoring, "_compute", None)
    last = read_manifest(manifest)[-1].path
    Image.new("F", (32, 32)).save(last, format="TIFF")
    with pytest.raises(InputError, match=rf"entry 7 .*image {last} cannot be scored: pixels of mode F have no known"):
        scoring.main([str(manifest), "--metrics=Pixels"])


def test_a_folder_that_cannot_hold_scores_is_named_before_any_is_computed(tmp_path, monkeypatch):
    manifest = picture_run(tmp_path / "run", 0)
    monkeypatch.setattr(scoring, "_compute", None)
    (tmp_path / "run" / ".scores.jsonl.lock").mkdir()
    with pytest.raises(InputError, match=rf"{tmp_path / 'run'} cannot be written \(.*\), .*: copy it, with its images"):
        scoring.main([str(manifest), "--metrics=Pixels"])


def test_weights_of_all_missing_scores_are_tried_before_the_first_are_computed(tmp_path, monkeypatch):
    a, b = (str(picture_run(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    for manifest in (a, b):  # all scores of HPSv2 are there
        rows = [{"image": entry.image, "prompt": entry.prompt, "HPSv2": 0.25} for entry in read_manifest(manifest)]
        append_scores(Path(manifest).with_name("scores.jsonl"), rows)
    scoring.main([a, "--metrics=Pixels"])
    before = (tmp_path / "a" / "scores.jsonl").read_text()
    monkeypatch.setattr(scoring, "_compute", None)
    monkeypatch.setattr(ScoringOptions, "load", lambda self, metrics: tried.append(metrics) or {})
    tried = []
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):  # what would compute
        scoring.main([a, b, "--metrics", "Pixels", "HPSv2", "CLIP"])
    assert tried == [["Pixels"], ["CLIP"]] and (tmp_path / "a" / "scores.jsonl").read_text() == before


def test_exhausted_memory_while_scoring_is_one_sentence(tmp_path, monkeypatch):
    def score_rows(*_, **__):
        yield from ()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(scorers, "score_rows", score_rows)
    with pytest.raises(InputError, match=r"memory is exhausted \(CUDA out of memory\): score fewer images at a time"):
        scoring.main([str(picture_run(tmp_path / "run", 0)), "--metrics=Pixels"])


def test_ranks_share_the_scores_that_are_missing(tmp_path, monkeypatch):
    manifest, options = picture_run(tmp_path / "run", 3), ScoringOptions(["Pixels"])
    with pytest.raises(InputError, match=r"has not all scores of .*manifest.json in Pixels"):
        scoring.read_complete(manifest, options)
    for rank in range(3):
        scoring.score_share([manifest], options, rank, 3)
    shares = [read_scores(path) for path in sorted((tmp_path / "run").glob("scores.rank*.jsonl"))]
    assert [len(share) for share in shares] == [3, 3, 2]
    assert not shares[0].keys() & shares[1].keys() and len(shares[0] | shares[1] | shares[2]) == 8
    monkeypatch.setattr(scoring, "_compute", None)
    entries, scores = score_manifests({"run": manifest}, options)["run"]
    assert len((tmp_path / "run" / "scores.jsonl").read_text().splitlines()) == 8
    assert [scores[entry.key]["Pixels"] for entry in entries] == [
        next(share[entry.key]["Pixels"] for share in shares if entry.key in share) for entry in entries
    ]
    assert not list((tmp_path / "run").glob("scores.rank*.jsonl"))
    assert scoring.read_complete(manifest, options) == (entries, scores)


def test_scorers_are_tried_out_with_the_weights_given(monkeypatch):
    asked = []
    monkeypatch.setattr(scorers, "load_scorers", lambda *given: asked.append(given) or {})
    sources = {"clip.checkpoint": "a.pt"}
    ScoringOptions(["HPSv2", "CLIP"], sources, dtype="bf16").try_out()
    assert asked == [([name], sources, torch.bfloat16) for name in ("hpsv2", "clip")]
