"""Comparison of training runs by their errors on the same held-out pairs."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import stats

import train
from sdpo import compare
from sdpo.command import InputError
from sdpo.heldout import STEP
from sdpo.metrics import read_metrics

PROMPTS = ["a", "a", "b", "b", "c", "c", "d", "d"]  # two pairs of each, so standard errors are those of their means
RNG = np.random.default_rng(0)
REFERENCE = RNG.uniform(0.05, 0.2, (8, 2))


def write_run(folder, policy, average=None, pairs=range(8), reference=REFERENCE, prompts=PROMPTS, **settings):
    """An output folder with errors (8, 2) of its models, of which it could read some pairs."""
    folder.mkdir()
    pairs = list(pairs)
    columns = {"pair": pairs, "caption": [prompts[number] for number in pairs]}
    for name, errors in {"reference": reference, "policy": policy, "average": average}.items():
        if errors is not None:
            columns[f"{name}_winner_error"], columns[f"{name}_loser_error"] = errors[pairs].T
    pq.write_table(pa.table(columns).replace_schema_metadata({STEP: "20"}), folder / "heldout.parquet")
    content = {"config": {"beta_dpo": 100.0, "output_dir": str(folder), **settings}, "plan": {"steps": 40}}
    (folder / "config.json").write_text(json.dumps(content))
    lines = [{"step": 15, "avg_lose_l_scale": 0.2}, {"step": 20, "avg_lose_l_scale": 0.4}]
    lines.append({"step": 20, "heldout/winner_error_change": 0.1, "heldout/loser_error_change": 0.1})
    lines.append({"step": 30, "avg_lose_l_scale": 0.9})  # after the measurement
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def of_prompts(values):
    """Mean and standard error of values (8,) whose pairs of a prompt are not independent."""
    means = np.asarray(values).reshape(4, 2).mean(1)
    return means.mean(), stats.sem(means)


def test_runs_are_compared_pair_by_pair(tmp_path, capsys):
    a, b = (REFERENCE + RNG.normal(0.01, 0.01, (8, 2)) for _ in range(2))
    averaged = b - 0.005
    runs = [
        f"pl|ain={write_run(tmp_path / 'a', a)}",
        f"new={write_run(tmp_path / 'b', b, averaged, train_method='dmpo')}",
    ]
    compare.main([*runs, "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [(row["run"], row["weights"]) for row in rows] == [("pl|ain", "raw"), ("new", "raw"), ("new", "averaged")]
    assert "winner_error_difference" not in rows[0]
    for row, errors in zip(rows, (a, b, averaged), strict=True):
        change = errors - REFERENCE
        assert (row["winner_error_change"], row["winner_error_change_se"]) == pytest.approx(of_prompts(change[:, 0]))
        assert (row["loser_error_change"], row["loser_error_change_se"]) == pytest.approx(of_prompts(change[:, 1]))
        assert row["margin"] == pytest.approx(-50 * (change[:, 0] - change[:, 1]).mean())
        assert (row["updates"], row["lambda"]) == (20, pytest.approx((15 * 0.2 + 5 * 0.4) / 20))  # over updates
    for row, errors in ((rows[1], b), (rows[2], averaged)):
        expected = of_prompts((errors - a)[:, 0])
        assert (row["winner_error_difference"], row["winner_error_difference_se"]) == pytest.approx(expected)
    said = capsys.readouterr().out
    assert said.startswith("| run |") and r"| pl\|ain | raw | 20 |" in said
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8").strip() in said
    assert "train_method: pl|ain None, new dmpo" in said and "output_dir" not in said
    assert "8 held-out pairs of 4 captions" in said
    Image.open(tmp_path / "out" / "errors.png").verify()


def test_pairs_that_a_run_could_not_read_are_left_out_of_all(tmp_path):
    a, b = REFERENCE + 0.01, REFERENCE + np.arange(8)[:, None]
    write_run(tmp_path / "a", a, pairs=[0, 1, 2, 4, 5, 7])
    write_run(tmp_path / "b", b, pairs=[1, 2, 3, 4, 5, 6, 7])
    first, second = compare.read_runs({"a": str(tmp_path / "a"), "b": str(tmp_path / "b")})
    assert first.pairs.tolist() == second.pairs.tolist() == [1, 2, 4, 5, 7]
    (row,) = compare.describe(second, first)
    assert row["winner_error_change"] == pytest.approx((1 + 2 + 4 + 5 + 7) / 5)
    assert row["winner_error_difference"] == pytest.approx((1 + 2 + 4 + 5 + 7) / 5 - 0.01)


def test_errors_that_are_not_finite_are_null_on_file(tmp_path):
    broken = write_run(tmp_path / "a", np.where(np.arange(16).reshape(8, 2) == 3, np.nan, REFERENCE))
    compare.main([f"a={broken}", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "table.json").read_text()
    (row,) = json.loads(text, parse_constant=pytest.fail)
    assert row["winner_error_change"] == 0 and row["loser_error_change"] is None


def test_rows_in_another_order_are_the_same_run(tmp_path):
    folder = tmp_path / "a"
    write_run(folder, REFERENCE + RNG.normal(0.01, 0.01, (8, 2)))
    (before,) = compare.describe(*[compare.read_run("a", folder)] * 2)
    table = pq.read_table(folder / "heldout.parquet")
    pq.write_table(table.take(list(range(8))[::-1]), folder / "heldout.parquet")
    (after,) = compare.describe(*[compare.read_runs({"a": str(folder)})[0]] * 2)
    assert after == pytest.approx(before)
    pq.write_table(table.take([0, 1, 1]), folder / "heldout.parquet")
    with pytest.raises(InputError, match="a pair twice"):
        compare.read_run("a", folder)


def test_labels_are_shown_as_they_are(tmp_path):
    run = write_run(tmp_path / "a", REFERENCE)
    compare.main([f"mu $0.9_$={run}", f"_x\ny={run}", "--out", str(tmp_path / "out")])
    assert "| _x y | raw |" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name, value",
    [
        ("loser_error_change", '"0.5"'),
        ("loser_error_change", "[]"),
        ("loser_error_change", "1" + "0" * 400),
        ("winner_error_change_se", "-1"),
    ],
)
def test_figures_that_cannot_be_are_named(tmp_path, name, value):
    run = write_run(tmp_path / "a", REFERENCE)
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": 30, "heldout/{name}": {value}}}\n')
    with pytest.raises(InputError, match=rf"metrics.jsonl: heldout/{name} in the line .* cannot be .*: remove the"):
        compare.main([f"a={run}", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("step", ["-5", "1" + "0" * 400])
def test_lines_of_no_number_of_updates_are_left_out(tmp_path, caplog, step):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": {step}, "x": 1.0}}\n{{"step": 5, "x": 2.0}}\n')
    assert read_metrics(tmp_path, "x") == [(5, 2.0)]
    assert "metrics.jsonl, line 1 is damaged and left out" in caplog.text


@pytest.mark.parametrize(
    "name, values, wrong",
    [
        ("pair", [0.5, 1.5, 2.5], "pair and caption are not numbers and texts"),
        ("pair", [None, 1, 2], "values are missing"),
        ("caption", [1, 2, 3], "pair and caption are not numbers and texts"),
        ("caption", [None, "b", "c"], "values are missing"),
        ("policy_loser_error", [None, 0.1, 0.2], "values are missing"),
    ],
)
def test_held_out_errors_that_no_run_wrote_are_refused(tmp_path, name, values, wrong):
    write_run(tmp_path / "a", REFERENCE)
    path = tmp_path / "a" / "heldout.parquet"
    table = pq.read_table(path).slice(0, 3)
    number = table.column_names.index(name)
    pq.write_table(table.set_column(number, name, pa.array(values)), path)
    with pytest.raises(InputError, match=rf"heldout.parquet is not one of train.py, or damaged \({wrong}\): measure"):
        compare.read_run("a", tmp_path / "a")


@pytest.mark.parametrize(
    "steps, logging_steps, expected",
    [((10, 20, 23), 10, [10, 10, 3]), ((1005, 1010), 5, [5, 5]), ((3,), 5, [3]), ((0,), 1, [1]), ((4, 2), 1, [1, 1])],
)
def test_log_lines_count_as_the_updates_that_they_are_of(steps, logging_steps, expected):
    """Also of a run that went on from elsewhere, whose lines begin later, and of files that were edited."""
    assert compare.count_updates(steps, logging_steps).tolist() == expected


def test_runs_that_were_not_measured_alike_are_not_compared(tmp_path, caplog):
    first = write_run(tmp_path / "a", REFERENCE)
    rounded = write_run(tmp_path / "rounded", REFERENCE, reference=REFERENCE * 1.01)
    compare.read_runs({"a": first, "rounded": rounded})
    assert "CAUTION: errors of the references of a and rounded differ by up to 1.00%" in caplog.text
    others = {
        "other pairs, the first pair 4 of 'c' and 'x'": {"prompts": [*PROMPTS[:4], "x", *PROMPTS[5:]]},
        "errors of their references differ": {"reference": REFERENCE[::-1]},
        "no held-out pair in common": {"pairs": []},
    }
    for number, (message, changes) in enumerate(others.items()):
        other = write_run(tmp_path / str(number), REFERENCE, **changes)
        with pytest.raises(InputError, match=f"{message}: compare runs of the same base"):
            compare.read_runs({"a": first, "b": other})


def test_folders_that_are_no_runs_are_named(tmp_path):
    good = tmp_path / "good"
    write_run(good, REFERENCE)
    with pytest.raises(InputError, match="nowhere is no run that measured held-out pairs: train it with"):
        compare.read_run("a", tmp_path / "nowhere")
    damages = {
        "heldout.parquet is not one of train.py, or damaged": ("heldout.parquet", b"PAR1"),
        "config.json: not valid JSON": ("config.json", b"{"),
        "config.json does not have the settings": ("config.json", b'{"config": [], "plan": {}}'),
        "config.json does not have the settings and": ("config.json", b'{"config": {"beta_dpo": NaN}, "plan": {}}'),
        "config.json does not have the settings and plan": (
            "config.json",
            b'{"config": {"beta_dpo": 1.0, "logging_steps": "x"}, "plan": {}}',
        ),
    }
    for number, (message, (name, content)) in enumerate(damages.items()):
        bad = tmp_path / str(number)
        shutil.copytree(good, bad)
        (bad / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            compare.read_run("a", bad)
    table = pq.read_table(good / "heldout.parquet").drop_columns(["policy_loser_error"])
    pq.write_table(table, good / "heldout.parquet")
    with pytest.raises(InputError, match="is not one of train"):
        compare.read_run("a", good)
    with pytest.raises(InputError, match="--out is empty"):
        compare.main(["a=x", "--out="])


def test_a_run_leaves_the_errors_that_its_figures_are_of(arguments, tmp_path):
    """In table.json are the last figures of metrics.jsonl; a run that is measured at its start compares too."""
    flags = ["--validation_split=validation", "--validation_pairs=10", "--use_ema", "--ema_decay=0.9"]
    train.main(arguments(*flags, "--max_train_steps=2"))
    run = tmp_path / "run"
    table = pq.read_table(run / "heldout.parquet")
    assert table["pair"].to_pylist() == list(range(10)) and table.schema.metadata[STEP] == b"2"
    compare.main([f"a={run}", "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    for row, prefix in zip(rows, ("heldout", "heldout_ema"), strict=True):
        for name in ("winner_error_change", "loser_error_change_se", "margin", "margin_accuracy"):
            assert row[name] == read_metrics(run, f"{prefix}/{name}")[-1][1], name
