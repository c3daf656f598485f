"""Manifests, score files and win rates against the official code's files, closed forms and scipy."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from sdpo import winrates
from sdpo.command import InputError
from sdpo.files import sha256
from sdpo.manifest import (
    MADE_WITH,
    Entry,
    _last_line,
    append_scores,
    compact_scores,
    find_score,
    match_scores,
    read_manifest,
    read_scores,
    require_images,
    write_manifest,
)
from sdpo.winrates import (
    OFFICIAL_METRICS,
    ScoredRun,
    bootstrap_interval,
    check_labels,
    collect_run,
    compare,
    compare_all,
    format_comparison,
    format_matrix,
    holm,
    pair_by_prompt,
    sign_test,
    wilson_interval,
    win_matrix,
    write_comparison,
    write_matrix,
)

OFFICIAL = Path(__file__).parent / "data" / "winrate_simple"
ROOT = Path(__file__).parents[1]
NOON = datetime(2026, 3, 9, 12, 0, 5)


def official(name):
    return json.loads((OFFICIAL / name).read_text())


def official_run(side):
    """A run of the official example: its manifest and the scores that its pair files hold."""
    results = {metric: official(f"pair_{metric.lower()}.json")["results"] for metric in OFFICIAL_METRICS}
    scores = {metric: [row[f"score_{side}"] for row in rows] for metric, rows in results.items()}
    label = official("summary.json")["pair"][f"model_{side}"]
    return ScoredRun(label, read_manifest(OFFICIAL / f"{side.upper()}.json"), scores)


def make_run(label, prompts, scores, metric="CLIP"):
    entries = [
        Entry(prompt, f"{label}/{i}.png", Path(f"/{label}/{i}.png"), f"{label}.json, entry {i}")
        for i, prompt in enumerate(prompts)
    ]
    return ScoredRun(label, entries, {metric: scores})


def random_runs(labels, pairs=50, seed=0):
    draw = np.random.default_rng(seed)
    entries = make_run("x", [f"prompt {i}" for i in range(pairs)], [0.0] * pairs).entries
    return [
        ScoredRun(label, entries, {m: draw.integers(0, 5, pairs) / 4 for m in OFFICIAL_METRICS[:3]}) for label in labels
    ]


def official_part(ours, theirs):
    """Ours without the keys that theirs lacks, all the way down; the order of keys is kept."""
    if isinstance(theirs, dict):
        return {key: official_part(value, theirs[key]) for key, value in ours.items() if key in theirs}
    if isinstance(theirs, list):
        return [official_part(a, b) for a, b in zip(ours, theirs, strict=True)]
    return ours


# The official example


def test_official_files_are_reproduced(tmp_path):
    folder = write_comparison(compare(official_run("a"), official_run("b")), tmp_path, NOON)
    assert folder == tmp_path / "model-A_vs_model-B_0309-120005"
    names = sorted(path.name for path in OFFICIAL.glob("*.json") if path.stem not in ("A", "B"))
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        theirs = (OFFICIAL / name).read_text()
        ours = official_part(json.loads((folder / name).read_text()), json.loads(theirs))
        assert json.dumps(ours, indent=2) == theirs.rstrip()


def test_manifest_round_trip(tmp_path):
    """Written from the least that is needed, the official manifest comes out byte for byte; further keys are kept."""
    rows = official("A.json")
    least = [{"gen_image_path": row["gen_image_path"], "prompt": row["prompt"]} for row in rows]
    write_manifest(tmp_path / "A.json", least)
    assert (tmp_path / "A.json").read_text() == (OFFICIAL / "A.json").read_text().rstrip()
    write_manifest(tmp_path / "more.json", [{**row, "seed": 0, "metadata": {"n": 1}} for row in rows])
    assert json.loads((tmp_path / "more.json").read_text()) == [
        {**row, "seed": 0, "metadata": {"n": 1}} for row in rows
    ]
    assert not list(tmp_path.glob("*.partial"))


def test_scores_on_file_make_the_same_summary(tmp_path):
    """Through scores.jsonl, one line per image and metric, as scorers that run one after another leave them."""
    runs = []
    for side in "ab":
        run = official_run(side)
        for metric in OFFICIAL_METRICS:
            rows = zip(run.entries, run.scores[metric], strict=True)
            append_scores(tmp_path / side, [{"image": e.image, "prompt": e.prompt, metric: s} for e, s in rows])
        runs.append(collect_run(run.label, run.entries, read_scores(tmp_path / side), OFFICIAL_METRICS))
    assert compare(*runs) == compare(official_run("a"), official_run("b"))


def test_torch_is_not_needed():
    code = "import sys, sdpo.winrates; print([m for m in ('torch', 'transformers', 'PIL') if m in sys.modules])"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert result.stdout.strip() == "[]"


# Statistics


@pytest.mark.parametrize("trials", [1, 7, 27, 46, 487, 3200])
def test_wilson_interval_equals_scipy(trials):
    for successes in {0, 1, trials // 3, trials}:
        expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
        low, high = wilson_interval(successes, trials)
        assert (low, high) == pytest.approx(tuple(expected), abs=1e-12)
        assert 0 <= low < high <= 1


@pytest.mark.parametrize("successes, trials", [(0.5, 1), (2.5, 7), (243.5, 487)])
def test_wilson_bounds_lie_two_standard_errors_from_a_rate_with_halves(successes, trials):
    for bound in wilson_interval(successes, trials, confidence=0.9544997361036416):
        standard_error = (bound * (1 - bound) / trials) ** 0.5
        assert abs(successes / trials - bound) == pytest.approx(2 * standard_error, rel=1e-9)


@pytest.mark.parametrize("win, tie", [(0.4, 0.2), (0.3, 0.4), (0.5, 0.1), (0.05, 0.9), (0.7, 0.2)])
def test_wilson_interval_with_ties_covers_the_rate(win, tie):
    """Exact coverage, summed over all outcomes of 40 pairs; without ties it is 0.93 at a rate of 0.8."""
    trials, rate, covered = 40, win + tie / 2, 0.0
    for wins, ties in product(range(trials + 1), repeat=2):
        low, high = wilson_interval(wins + ties / 2, trials) if wins + ties <= trials else (1, 0)
        if low <= rate <= high:
            covered += stats.multinomial.pmf([wins, ties, trials - wins - ties], trials, [win, tie, 1 - win - tie])
    assert covered >= 0.95


@pytest.mark.parametrize("wins_a, wins_b", [(0, 0), (1, 2), (0, 9), (14, 5), (7, 7)])
def test_sign_test_counts_coin_tosses(wins_a, wins_b):
    tosses = wins_a + wins_b
    tail = sum(comb(tosses, k) for k in range(min(wins_a, wins_b) + 1)) / 2**tosses
    assert sign_test(wins_a, wins_b) == pytest.approx(min(1, 2 * tail))


def test_holm_of_a_worked_example():
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_holm_rejects_what_the_procedure_rejects(seed):
    """Smallest p first, each against alpha / (hypotheses left), until one fails."""
    p_values = np.random.default_rng(seed).beta(0.3, 3, 6)
    corrected = holm(p_values)
    for alpha in (0.001, 0.01, 0.05, 0.2):
        left, rejected = sorted(range(6), key=lambda i: p_values[i]), set()
        while left and p_values[left[0]] <= alpha / len(left):
            rejected.add(left.pop(0))
        assert rejected == {i for i in range(6) if corrected[i] <= alpha}


def test_bootstrap_resamples_pairs():
    draw = np.random.default_rng(0)
    a = draw.normal(size=60)
    b = a + draw.normal(0.1, 0.2, 60)  # so that resampling A and B apart would give a far wider interval
    expected = stats.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True, method="percentile", batch=500,
        n_resamples=2000, rng=np.random.default_rng(7),
    ).confidence_interval  # fmt: skip
    assert bootstrap_interval(a - b, seed=7, resamples=2000) == pytest.approx((expected.low, expected.high))
    assert bootstrap_interval(a - b, seed=7) == bootstrap_interval(a - b, seed=7) != bootstrap_interval(a - b, seed=8)


def test_bootstrap_interval_is_students_on_many_pairs():
    differences = np.random.default_rng(1).normal(0.3, 1, 2000)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert bootstrap_interval(differences) == pytest.approx((expected.low, expected.high), abs=0.004)


def test_bootstrap_interval_covers_the_mean():
    draw = np.random.default_rng(2)
    intervals = [bootstrap_interval(draw.exponential(size=80), seed, resamples=500) for seed in range(300)]
    assert 0.9 < np.mean([low <= 1 <= high for low, high in intervals]) < 0.98


def test_bootstrap_of_one_pair_of_two_and_of_equal_differences():
    assert bootstrap_interval([0.5]) is None
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


# Ties and pairs


@pytest.mark.parametrize("ties, rate", [("half", 0.5), ("loss_for_a", 0.25)])
def test_ties_policies(ties, rate):
    a, b = make_run("a", "wxyz", [1.0, 0.0, 0.5, 0.5]), make_run("b", "wxyz", [0.0, 1.0, 0.5, 0.5])
    summary = compare(a, b, ties=ties).summary
    (row,) = summary["metrics"]
    assert summary["pair"]["ties_policy"] == ties
    assert (row["wins_a"], row["wins_b"], row["ties"], row["win_rate_a_over_b"]) == (1, 1, 2, rate)
    assert row["win_rate_ci95"] == wilson_interval(4 * rate, 4)


def test_equal_floats_tie_and_neighbours_do_not():
    scores = np.float32([0.1, 0.1])
    detail = compare(make_run("a", "xy", scores), make_run("b", "xy", [scores[0], np.nextafter(scores[1], 1)]))
    assert [result["winner"] for result in detail.details["CLIP"]["results"]] == ["tie", "b"]


def test_pairs_are_sorted_and_duplicates_pair_in_file_order():
    a, b = ["dog", "cat", "dog", "Ému", "dog"], ["cat", "dog", "bird", "dog", "cat"]
    assert pair_by_prompt(a, b) == [(1, 0), (0, 1), (2, 3)]
    comparison = compare(make_run("a", a, [1, 2, 3, 4, 5]), make_run("b", b, [2, 0, 9, 4, 9]))
    results = comparison.details["CLIP"]["results"]
    assert [(r["prompt"], r["image_a"], r["image_b"], r["winner"]) for r in results] == [
        ("cat", "a/1.png", "b/0.png", "tie"), ("dog", "a/0.png", "b/1.png", "a"), ("dog", "a/2.png", "b/3.png", "b"),
    ]  # fmt: skip
    pairing = comparison.summary["pairing"]
    assert (pairing["dropped_a"], pairing["dropped_b"]) == (["Ému", "dog"], ["bird", "cat"])
    assert "a: 2 without a partner dropped" in format_comparison(comparison)


def test_prompts_pair_by_their_exact_text():
    assert pair_by_prompt(["cat ", "cat"], ["cat", "Cat"]) == [(1, 0)]


def test_index_pairing_must_be_asked_for():
    a, b = make_run("a", ["x", "y", "z"], [1, 1, 1]), make_run("b", ["u", "y2"], [0, 2])
    with pytest.raises(InputError, match=r"no prompt in common \(a.json, entry 0: 'x'; b.json, entry 0: 'u'\).*index"):
        compare(a, b)
    comparison = compare(a, b, pair_by="index")
    results = comparison.details["CLIP"]["results"]
    assert [(r["prompt"], r["prompt_b"], r["winner"]) for r in results] == [("x", "u", "a"), ("y", "y2", "b")]
    dropped = {"dropped_a": ["z"], "dropped_b": []}
    assert comparison.summary["pairing"] == {"by": "index", **dropped, "differing": {}, "share_noise": True}


def test_a_row_of_the_summary_is_about_a_minus_b_and_leaves_ties_out_of_the_sign_test():
    a = make_run("a", "uvwxyz", [3.0, 2.0, 2.0, 1.0, 1.0, 0.0])
    b = make_run("b", "uvwxyz", [1.0, 1.0, 1.0, 1.0, 1.0, 0.5])
    (row,) = compare(a, b).summary["metrics"]
    assert (row["mean_a"], row["mean_b"]) == pytest.approx((1.5, 5.5 / 6))
    assert row["mean_difference"] == pytest.approx(1.5 - 5.5 / 6)
    low, high = row["mean_difference_ci95"]
    assert low < row["mean_difference"] < high
    assert row["sign_test_p"] == pytest.approx(stats.binomtest(3, 4).pvalue)  # of 6 pairs, 2 are ties


def test_the_bootstrap_follows_the_seed_and_names_it():
    a, b = (make_run(label, "uvwxyz", np.random.default_rng(i).normal(size=6)) for i, label in enumerate("ab"))
    summaries = [compare(a, b, seed=seed).summary for seed in (3, 3, 4)]
    assert [summary["bootstrap"]["seed"] for summary in summaries] == [3, 3, 4]
    one, same, other = (summary["metrics"][0]["mean_difference_ci95"] for summary in summaries)
    assert one == same != other


def test_averages_and_correction_over_metrics():
    a, b = random_runs("ab")
    summary = compare(a, b).summary
    rates = [row["win_rate_a_over_b"] for row in summary["metrics"]]
    for average in summary["averages"].values():
        assert average == pytest.approx(sum(rates) / 3)
    p_values = [row["sign_test_p"] for row in summary["metrics"]]
    assert [row["sign_test_p_holm"] for row in summary["metrics"]] == holm(p_values)


def test_further_metrics_follow_the_official_ones():
    a, b = (make_run(label, "xy", [0, 1]) for label in "ab")
    for run in (a, b):
        run.scores.update({"PixelCheck": [1, 1], "PickScore": [0, 0]})
    comparison = compare(a, b)
    assert [row["metric"] for row in comparison.summary["metrics"]] == ["PickScore", "CLIP", "PixelCheck"]


# Several runs, files, console


@pytest.mark.parametrize("ties", ["half", "loss_for_a"])
def test_matrix_agrees_with_comparisons_both_ways(ties):
    runs = random_runs(["one", "two", "three"])
    comparisons = compare_all(runs, ties=ties)
    matrix = win_matrix(comparisons)
    assert matrix["labels"] == ["one", "two", "three"]
    for (i, a), (j, b) in product(enumerate(runs), repeat=2):
        for metric, matrices in matrix["metrics"].items():
            rows = compare(a, b, ties=ties).summary["metrics"] if i != j else []
            expected = [row["win_rate_a_over_b"] for row in rows if row["metric"] == metric] or [None]
            assert matrices["win_rate"][i][j] == expected[0]
    p_values = [row["sign_test_p"] for c in comparisons for row in c.summary["metrics"]]
    cells = [m["p_holm"][i][j] for i, j in ((0, 1), (0, 2), (1, 2)) for m in matrix["metrics"].values()]
    assert cells == holm(p_values)


def test_matrix_on_file_and_console(tmp_path):
    matrix = win_matrix(compare_all(random_runs(["one", "two", "three"])))
    path = write_matrix(matrix, tmp_path / "new", NOON)
    assert path.name == "matrix_0309-120005.json"
    assert json.loads(path.read_text()) == matrix
    text = format_matrix(matrix)
    for metric in OFFICIAL_METRICS[:3]:
        rate = matrix["metrics"][metric]["win_rate"][0][1]
        first = text.split(f"{metric} ")[1].splitlines()[1].split()
        assert (first[0], first[1], first[2].lstrip("*")) == ("one", "-", f"{rate:.1%}")


def test_console_table_shows_percent():
    text = format_comparison(compare(official_run("a"), official_run("b")))
    lines = {line.split()[0]: line.split() for line in text.splitlines()}
    for metric in OFFICIAL_METRICS:
        expected = official(f"pair_{metric.lower()}.json")["win_rate_a_over_b"]
        assert lines[metric][1] == f"{expected:.1%}"
    assert "average over metrics: macro 42.5%, micro 42.5%" in text.splitlines()


def test_the_console_table_has_each_figure_in_its_column():
    prompts = [f"p{i}" for i in range(12)]
    comparison = compare(
        make_run("a", prompts, [1.0] * 9 + [0.5, 0.5, 0.0]), make_run("b", prompts, [0.0] * 9 + [0.5, 0.5, 1.0])
    )
    low, high = comparison.summary["metrics"][0]["win_rate_ci95"]
    cells = format_comparison(comparison).splitlines()[2].split()
    assert cells[:6] == ["CLIP", "83.3%", f"{low:.1%}", "to", f"{high:.1%}", "9/2/1"]
    assert cells[6:11] == ["0.021", "0.021", f"{10 / 12:.4f}", f"{2 / 12:.4f}", "+0.6667"]


def test_a_single_pair_has_no_interval_of_its_difference():
    text = format_comparison(compare(make_run("a", "x", [1.0]), make_run("b", "x", [0.0])))
    assert text.splitlines()[2].split()[-2:] == ["+1.0000", "-"]


@pytest.mark.parametrize(
    "wins, cells",
    [(11, ["*91.7%", "*8.3%"]), (8, ["66.7%", "33.3%"]), (6, ["50.0%", "50.0%"])],  # p = 0.006, 0.39, 1
)
def test_the_console_matrix_marks_what_is_no_accident(wins, cells):
    prompts = [f"p{i}" for i in range(12)]
    a, b = make_run("a", prompts, [1.0] * wins + [0.0] * (12 - wins)), make_run("b", prompts, [0.5] * 12)
    text = format_matrix(win_matrix([compare(a, b)]))
    assert [cell for cell in text.split() if "%" in cell] == cells


def test_comparison_folder_is_whole_and_never_overwritten(tmp_path):
    comparison = compare(official_run("a"), official_run("b"))
    folder = write_comparison(comparison, tmp_path, NOON)
    (folder / "summary.json").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        write_comparison(comparison, tmp_path, NOON)
    assert (folder / "summary.json").read_text() == "mine" and list(tmp_path.iterdir()) == [folder]
    matrix = win_matrix([comparison])
    path = write_matrix(matrix, tmp_path, NOON)
    with pytest.raises(InputError, match=f"{path} exists already"):
        write_matrix(matrix, tmp_path, NOON)
    again = [write(result, tmp_path) for write, result in ((write_comparison, comparison), (write_matrix, matrix)) * 2]
    assert len({*again, folder, path}) == 6  # within two seconds, of which each has a name of its own


def test_two_commands_of_one_second_do_not_mix(tmp_path, monkeypatch):
    comparison = compare(official_run("a"), official_run("b"))
    write, others = winrates.write_json, []

    def write_after_the_other(path, value):
        if not others:
            others.append(None)
            others[0] = write_comparison(comparison, tmp_path, NOON)
        write(path, value)

    monkeypatch.setattr(winrates, "write_json", write_after_the_other)
    with pytest.raises(InputError, match="exists already"):
        write_comparison(comparison, tmp_path, NOON)
    assert list(tmp_path.iterdir()) == others and len(list(others[0].iterdir())) == 6


# Manifests: paths, and runs that cannot be compared (files that are refused: test_bad_input.py)


def image_manifest(folder, images):
    """A manifest in the folder that lists these image paths."""
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder / "m.json", [{"prompt": f"p{i}", "gen_image_path": im} for i, im in enumerate(images)])
    return folder / "m.json"


def test_images_are_found_in_the_manifests_folder_and_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    manifest = image_manifest(run, ["0.png", "run/1.png", "2.png", str(run / "3.png"), ["", None, "4.png", "5.png"]])
    for place in ("0.png", "run/0.png", "2.png", "run/1.png", "run/2.png", "run/3.png", "run/4.png"):
        (tmp_path / place).touch()
    places = ["run/0.png", "run/1.png", "run/2.png", "run/3.png", "run/4.png"]
    for spelling in (manifest, "run/m.json", "../" + tmp_path.name + "/run/m.json"):
        entries = read_manifest(spelling)
        require_images(entries)
        assert [entry.path for entry in entries] == [tmp_path / place for place in places]
    assert entries[4].image == "4.png"


def test_images_are_found_from_another_working_directory_and_in_a_moved_folder(tmp_path, monkeypatch, caplog):
    """The generator writes paths as seen from where it ran."""
    run, elsewhere = tmp_path / "out" / "run", tmp_path / "elsewhere"
    manifest = image_manifest(run, ["out/run/group/0.png", str(tmp_path / "gone" / "run" / "group" / "0.png")])
    for place in (run / "group", elsewhere):
        place.mkdir()
        (place / "0.png").touch()
    monkeypatch.chdir(elsewhere)
    entries = read_manifest(manifest)
    require_images(entries)
    assert [entry.path for entry in entries] == [run / "group" / "0.png"] * 2
    assert f"CAUTION: {manifest}: 1 of 2 images are read from other folders than it says" in caplog.text
    caplog.clear()
    read_manifest(manifest.rename(run / "group.json"))  # named like its folder, as official ones are
    monkeypatch.chdir(tmp_path)
    read_manifest(run / "group.json")
    assert caplog.text == ""
    (run / "0.png").touch()
    (run / "group" / "0.png").unlink()
    with pytest.raises(InputError, match="is neither in the working directory"):  # the image's own folder counts
        require_images(read_manifest(run / "group.json"))


def test_an_official_output_folder_outside_the_working_directory(tmp_path, monkeypatch):
    """Official paths are relative to the directory the tool ran in, and may climb out of it; absolute ones always may."""
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    monkeypatch.chdir(work)
    manifest = image_manifest(out, ["../out/images/0.png", str(tmp_path / "images" / "0.png")])
    for folder in (out, tmp_path):
        (folder / "images").mkdir()
        (folder / "images" / "0.png").touch()
    require_images(read_manifest(os.path.relpath(manifest)))


def test_missing_images_are_named_and_counted(tmp_path):
    manifest = image_manifest(tmp_path, ["0.png", "1.png", "2.png"])
    (tmp_path / "0.png").touch()
    with pytest.raises(InputError, match=r"m\.json, entry 1 .*: image 1\.png \(and 1 more\) is neither .* generate"):
        require_images(read_manifest(manifest))


@pytest.mark.parametrize(
    "labels, sentence",
    [
        (["a", "c\n"], "cannot name an output folder"),
        (["x", "y_vs_z", "x_vs_y", "z"], "results of two pairs of x, y_vs_z, x_vs_y, z would have the same folder"),
    ],
)
def test_bad_labels_are_refused(labels, sentence):
    with pytest.raises(InputError, match=sentence):
        check_labels(labels)
    check_labels(["sd1.5 dpo", "Émile_2"])


def test_both_labels_of_a_comparison_are_checked():
    for labels in (("x/y", "a"), ("a", "x/y")):
        with pytest.raises(InputError, match="label 'x/y' cannot name"):
            compare(*(make_run(label, "x", [0.0]) for label in labels))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, True, "0.2"])
def test_scores_that_are_not_numbers_are_refused_with_the_image(tmp_path, value):
    with pytest.raises(InputError, match=r"b\.json, entry 1: CLIP of b/1\.png is .*, not a finite number"):
        compare(make_run("a", "xy", [0, 0]), make_run("b", "xy", [0, value]))
    with pytest.raises(InputError, match=r"CLIP of 0\.png is .*, not a finite number"):
        append_scores(tmp_path / "s.jsonl", [{"image": "0.png", "prompt": "p", "CLIP": value}])
    assert not (tmp_path / "s.jsonl").exists()


def test_runs_that_were_not_scored_alike_are_refused():
    with pytest.raises(InputError, match="only one of a and b has CLIP, HPSv2; score both"):
        compare(make_run("a", "xy", [0, 0]), make_run("b", "xy", [0, 0], metric="HPSv2"))
    entries = make_run("a", "xyz", [0, 0, 0]).entries
    scores = {entries[0].key: {"CLIP": 0.1}}
    with pytest.raises(InputError, match=r"a has no CLIP for 2 of 3 images, the first is a/1.png \(a.json, entry 1\)"):
        collect_run("a", entries, scores, ["CLIP"])


# Score files


def rows(count):
    return [{"image": f"{i}.png", "prompt": f"größe {i}", "CLIP": i / 7} for i in range(count)]


def test_a_crash_at_any_byte_costs_only_the_last_line(tmp_path):
    path = tmp_path / "scores.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(3)]  # cuts fall inside characters, too
    path.write_text("".join(lines), encoding="utf-8")
    whole, content = read_scores(path), path.read_bytes()
    start = len(b"".join(content.splitlines(keepends=True)[:2]))
    for size in range(start, len(content) + 1):
        path.write_bytes(content[:size])
        kept = 3 if size >= len(content) - 1 else 2  # a line that lacks only its line feed is whole
        assert read_scores(path) == dict(list(whole.items())[:kept])
        append_scores(path, rows(3)[kept:] + rows(4)[3:])
        assert list(read_scores(path).values()) == rows(4)
        assert len(path.read_text(encoding="utf-8").splitlines()) == 4


def test_lines_of_an_image_complete_each_other(tmp_path):
    path, about = tmp_path / "new" / "scores.jsonl", {"image": "0.png", "prompt": "p"}
    append_scores(path, [{**about, "CLIP": 0.1, "HPSv2": 0.2, "models": {"CLIP": "old", "HPSv2": "v2.0"}}])
    append_scores(path, [{**about, "CLIP": 0.3}, {**about, "prompt": "q", "CLIP": 0.4}])
    expected = {**about, "CLIP": 0.3, "HPSv2": 0.2, "models": {"HPSv2": "v2.0"}}
    assert list(read_scores(path).values()) == [expected, {**about, "prompt": "q", "CLIP": 0.4}]
    append_scores(path, [{**about, "HPSv2": 0.3}])  # of no known model any more
    assert read_scores(path)["0.png", "p"] == {**about, "CLIP": 0.3, "HPSv2": 0.3}
    append_scores(path, [{**about, "HPSv2": 0.2, "models": {"HPSv2": "v2.0"}}])
    compact_scores(path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == list(read_scores(path).values())
    append_scores(path, [{**about, "sha256": "an image", "PickScore": 0.5}])  # of which the other lines may be, too
    assert read_scores(path)["0.png", "p"] == {**expected, "sha256": "an image", "PickScore": 0.5}
    append_scores(path, [{**about, "sha256": "another image", "PickScore": 0.6}])
    assert read_scores(path)["0.png", "p"] == {**about, "sha256": "another image", "PickScore": 0.6}


def test_a_last_line_that_was_cut_off_is_no_line_however_deep(tmp_path):
    path = tmp_path / "scores.jsonl"
    append_scores(path, [{"image": "0.png", "prompt": "p", "CLIP": 0.1}])
    with path.open("a") as file:
        file.write("[" * 200_000)
    append_scores(path, [{"image": "1.png", "prompt": "p", "CLIP": 0.2}])
    assert [row["CLIP"] for row in read_scores(path).values()] == [0.1, 0.2]


def test_scores_tie_as_the_floats_that_are_written():
    entries = make_run("a", "x", [0.0]).entries
    runs = [
        collect_run(label, entries, {entries[0].key: {"CLIP": 2**53 + more}}, ["CLIP"])
        for label, more in (("a", 1), ("b", 0))
    ]
    (result,) = compare(*runs).details["CLIP"]["results"]
    assert (result["score_a"], result["winner"]) == (float(2**53), "tie")


@pytest.mark.parametrize("block", [1, 7, 2**16])
@pytest.mark.parametrize("content", [b"", b"\n", b"a", b"a\n", b"a\nbc", b"\n" * 9 + b"b" * 20, b"a" * 30])
def test_what_follows_the_last_line_feed_is_read_from_the_end(content, block):
    assert _last_line(io.BytesIO(content), block) == content.split(b"\n")[-1]


def test_repeated_prompts_are_pointed_out():
    comparison = compare(make_run("a", "xxy", [1.0, 2.0, 3.0]), make_run("b", "xxy", [0.0, 0.0, 0.0]))
    assert "CAUTION: only 2 prompts are distinct" in format_comparison(comparison)
    comparison = compare(make_run("a", ["A x", "a  X"], [1.0, 2.0]), make_run("b", ["A x", "a  X"], [0.0, 0.0]))
    assert "CAUTION: only 1 prompts are distinct" in format_comparison(comparison)
    comparison = compare(make_run("a", "xy", [1.0, 2.0]), make_run("b", "xy", [0.0, 0.0]))
    assert "are distinct" not in format_comparison(comparison)


def test_a_bootstrap_of_few_pairs_is_pointed_out():
    for count in (49, 50):
        prompts = [f"prompt {number}" for number in range(count)]
        runs = (make_run(label, prompts, [float(number % 7)] * count) for number, label in enumerate("ab"))
        said = format_comparison(compare(*runs))
        assert (f"of {count} pairs the interval of the mean difference, a bootstrap's, is too narrow" in said) == (
            count < 50
        )


def test_mere_ties_and_images_that_entries_share_are_pointed_out():
    a, b = make_run("a", "xy", [1.0, 2.0]), make_run("b", "xy", [1.0, 0.0])
    same = replace(b, entries=[replace(entry, image="x.png") for entry in b.entries])
    assert "every pair is a tie" in format_comparison(compare(a, replace(a, label="b")))
    assert "the images of B are only 1 different ones" in format_comparison(compare(a, same))
    said = format_comparison(compare(a, b))
    assert "every pair is a tie" not in said and "different ones" not in said


@pytest.mark.parametrize("noise, shared", [("shared", True), (None, True), ("per-prompt", False)])
def test_noise_that_all_images_share_is_pointed_out(noise, shared):
    """Intervals over prompts say nothing of it; official manifests, whose images share it, do not mention it."""
    runs = [make_run(label, "xyz", [1.0, 2.0, 3.0]) for label in "ab"]
    for entry in [*runs[0].entries, *runs[1].entries]:
        entry.made_with.update({} if noise is None else {"noise": noise})
    comparison = compare(*runs)
    assert comparison.summary["pairing"]["share_noise"] == shared
    assert ("CAUTION: all images of a run began with the same noise" in format_comparison(comparison)) == shared
    assert not compare(*(make_run(label, "x", [1.0]) for label in "ab")).summary["pairing"]["share_noise"]


def test_scores_serve_only_the_image_and_model_they_were_made_for(tmp_path, caplog):
    (entry,) = read_manifest(image_manifest(tmp_path, ["0.png"]))
    entry.path.write_bytes(b"first picture")
    row = {"image": "0.png", "prompt": "p0", "HPSv2": 0.2, "CLIP": 0.1, "models": {"HPSv2": "v2.0"}}
    scores = {entry.key: {**row, "sha256": sha256(entry.path)}}
    assert [find_score(entry, scores, "HPSv2", model) for model in (None, "v2.0", "v2.1")] == [0.2, 0.2, None]
    assert find_score(entry, scores, "CLIP", "any") == 0.1
    assert find_score(entry, scores, "PickScore") is None
    assert match_scores([entry], scores) == scores
    entry.path.write_bytes(b"second picture")
    assert match_scores([entry], scores) == {}
    assert "1 images have changed since they were scored" in caplog.text
    entry.path.unlink()  # a published score file without its images
    assert match_scores([entry], scores) == scores


def test_scores_are_found_whatever_the_spelling_of_the_path(tmp_path):
    (entry,) = read_manifest(image_manifest(tmp_path, ["0.png"]))
    entry.path.write_bytes(b"a picture")
    elsewhere = Entry(entry.prompt, f"../{tmp_path.name}/0.png", entry.path, "")
    row = {"image": "0.png", "prompt": entry.prompt, "CLIP": 0.1, "sha256": sha256(entry.path)}
    scores = {entry.key: row}
    assert find_score(elsewhere, match_scores([elsewhere], scores), "CLIP") == 0.1
    other = Entry("another prompt", elsewhere.image, entry.path, "")
    assert match_scores([other], scores) == {}


def test_images_beside_a_moved_manifest_come_before_those_where_they_were(tmp_path, monkeypatch):
    """A run that was renamed, and another one made in its old place."""
    monkeypatch.chdir(tmp_path)
    for run in ("old", "run"):
        Path(run, "p").mkdir(parents=True)
        Path(run, "p", "0.png").write_bytes(run.encode())
        Path(run, "p.json").write_text(json.dumps([{"prompt": "a cat", "gen_image_path": "run/p/0.png"}]))
    assert [read_manifest(f"{run}/p.json")[0].path.read_bytes() for run in ("old", "run")] == [b"old", b"run"]


APPEND = """
import sys
from sdpo.manifest import append_scores, compact_scores

for number in range(60):
    append_scores(sys.argv[1], [{"image": f"{number}.png", "prompt": sys.argv[2], "CLIP": 0.5}])
    compact_scores(sys.argv[1])
"""


def test_several_processes_may_score_into_one_file(tmp_path):
    path = tmp_path / "scores.jsonl"
    processes = [subprocess.Popen([sys.executable, "-c", APPEND, path, prompt], cwd=ROOT) for prompt in "abc"]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert len(read_scores(path)) == 180


def test_images_that_were_made_otherwise_are_pointed_out():
    runs = [make_run(label, "xy", [1.0, 2.0]) for label in "ab"]
    for run, seed in zip(runs, (0, 1), strict=True):
        for entry in run.entries:
            entry.made_with.update(seed=seed, guidance="official")
    comparison = compare(*runs)
    assert comparison.summary["pairing"]["differing"] == {"seed": 2}
    assert "CAUTION: the images of 2 pairs were made with another seed" in format_comparison(comparison)


@pytest.mark.parametrize("name", [*MADE_WITH])
def test_every_setting_by_which_images_differ_is_counted_where_both_have_it(name):
    a, b, silent = (make_run(label, "xy", [1.0, 2.0]) for label in "abc")
    for value, run in enumerate((a, b)):
        run.entries[1].made_with[name] = value
    assert compare(a, b).summary["pairing"]["differing"] == {name: 1}
    assert compare(a, silent).summary["pairing"]["differing"] == {}  # official manifests do not say


def test_images_that_were_never_scored_have_not_changed(tmp_path, caplog):
    entries = read_manifest(image_manifest(tmp_path, ["0.png", "1.png"]))
    for entry in entries:
        entry.path.write_bytes(entry.image.encode())
    row = {"image": "0.png", "prompt": entries[0].prompt, "CLIP": 0.1, "sha256": sha256(entries[0].path)}
    assert match_scores(entries, {entries[0].key: row}) == {entries[0].key: row}
    assert "CAUTION" not in caplog.text


@pytest.mark.parametrize("last", [b"no row", b'"image"', b"[1, 2"])
def test_a_last_line_that_no_crash_has_left_is_refused(tmp_path, last):
    (tmp_path / "s.jsonl").write_bytes(b'{"image": "0.png", "prompt": "p", "CLIP": 0.1}\n' + last)
    with pytest.raises(InputError, match=r"s\.jsonl, line 2: not"):
        read_scores(tmp_path / "s.jsonl")


def test_no_score_file_is_no_scores(tmp_path):
    assert read_scores(tmp_path / "none.jsonl") == {}


def test_seed_and_guidance_are_read_from_a_manifest(tmp_path):
    about = {"seed": 3, "guidance": "standard", "checkpoint": "0" * 64}
    write_manifest(tmp_path / "m.json", [{"prompt": "p", "gen_image_path": "0.png", **about}])
    (entry,) = read_manifest(tmp_path / "m.json")
    assert entry.made_with == {"seed": 3, "guidance": "standard"}
