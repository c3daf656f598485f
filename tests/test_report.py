"""The report page without a browser: its data are the scores, prompts cannot break out, images are relative."""

import json
import math
import re
from html.parser import HTMLParser
from statistics import fmean, stdev
from urllib.parse import unquote

import numpy as np
import pytest

from sdpo.command import InputError
from sdpo.manifest import Entry
from sdpo.report import BINS, HEIGHT, write_report
from sdpo.winrates import ScoredRun, compare, compare_all

HOSTILE = [
    "</script><script>window.broken = 1</script>",
    "\"quoted\" and 'quoted' \\ <b>bold</b> &amp; <!-- comment",
    "emoji 🦊, Ünïcode, \u2028 and a lone \ud800",
    "<!--slot:summary--> <img src=x onerror=alert(1)>",
]


def make_run(folder, label, prompts, seed, metrics=("PickScore", "CLIP")):
    rng = np.random.default_rng(seed)
    entries = [Entry(p, f"{i}.png", folder / label / f"{i} #1.png", f"{label}, {i}") for i, p in enumerate(prompts)]
    return ScoredRun(label, entries, {metric: rng.normal(size=len(prompts)).tolist() for metric in metrics})


class Page(HTMLParser):
    """Elements of a page, the text of its data script and the cells of its tables."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.data, self.rows, self.inside = [], "", [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = "data" if dict(attributes).get("id") == "data" else tag
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside == "data":
            self.data += text
        if self.inside in ("th", "td"):
            self.rows[-1].append(text)

    @property
    def views(self):
        return json.loads(self.data)["views"]


def test_data_of_a_comparison_are_the_scores_of_its_pairs(tmp_path):
    prompts = [f"prompt {i}" for i in range(7)]
    a, b = make_run(tmp_path, "plain", prompts, 0), make_run(tmp_path, "safe", prompts[::-1], 1)
    (view,) = Page(write_report(tmp_path / "out" / "report.html", [a, b], [compare(a, b)])).views
    assert (view["labels"], sorted(view["metrics"])) == (["plain", "safe"], ["CLIP", "PickScore"])
    for card in view["cards"]:
        i = int(card["prompt"].split()[1])
        assert [unquote(image) for image in card["images"]] == [f"../plain/{i} #1.png", f"../safe/{6 - i} #1.png"]
        assert card["scores"] == [[run.scores[m][k] for m in view["metrics"]] for run, k in ((a, i), (b, 6 - i))]
    assert len(view["cards"]) == 7


def test_tables_state_mean_error_count_and_win_rates(tmp_path):
    prompts = [f"prompt {i}" for i in range(9)]
    a, b = make_run(tmp_path, "plain", prompts, 0), make_run(tmp_path, "safe", prompts, 1)
    comparison = compare(a, b)
    rows = Page(write_report(tmp_path / "report.html", [a, b], [comparison])).rows
    values = a.scores["CLIP"]
    assert ["plain", "CLIP", f"{fmean(values):.4f}", f"{stdev(values) / math.sqrt(9):.4f}", "9"] in rows
    wins = sum(x > y for x, y in zip(values, b.scores["CLIP"], strict=True))
    row = next(row for row in rows if row[0] == "CLIP")
    low, high = comparison.summary["metrics"][1]["win_rate_ci95"]
    assert row[1:4] == [f"{wins / 9:.1%}", f"{low:.1%} to {high:.1%}", f"{wins}/0/{9 - wins}"]


def test_bars_and_whiskers_are_the_win_rates_and_their_intervals(tmp_path):
    """100 % is 400 units, and 0 % is at 110."""
    runs = [make_run(tmp_path, label, [*"abcdefghi"], seed) for seed, label in enumerate(("plain", "safe"))]
    comparison = compare(*runs)
    tags = Page(write_report(tmp_path / "report.html", runs, [comparison])).tags
    bars = [float(attributes["width"]) for _, attributes in tags if attributes.get("class") == "bar"]
    whiskers = [attributes["d"] for _, attributes in tags if attributes.get("class") == "whisker"]
    ends = [list(map(float, re.match(r"M([\d.]+) \d+H([\d.]+)M", path).groups())) for path in whiskers]
    rows = comparison.summary["metrics"]
    assert bars == pytest.approx([400 * row["win_rate_a_over_b"] for row in rows], abs=0.05)
    assert ends == [pytest.approx([110 + 400 * x for x in row["win_rate_ci95"]], abs=0.05) for row in rows]


def test_outlines_are_the_shares_of_a_runs_images_in_common_bins(tmp_path):
    runs = [
        make_run(tmp_path, label, [*map(str, range(n))], n, ["CLIP"]) for label, n in (("plain", 40), ("safe", 100))
    ]
    tags = Page(write_report(tmp_path / "report.html", runs)).tags
    outlines = [attributes["d"] for _, attributes in tags if attributes.get("class", "").startswith("series ")]
    heights = [[HEIGHT - float(y) for y in re.findall(r"V([\d.]+)h", outline)] for outline in outlines]
    values = [np.array(run.scores["CLIP"]) for run in runs]
    everything = np.concatenate(values)
    bins = np.linspace(everything.min(), everything.max(), BINS + 1)
    places = [np.searchsorted(bins[1:-1], value, side="right") for value in values]
    shares = np.array([np.bincount(place, minlength=BINS) / len(place) for place in places])
    assert np.allclose(heights, 120 * shares / shares.max(), atol=0.05)


def test_one_run_several_runs_and_a_single_image(tmp_path):
    runs = [make_run(tmp_path, label, ["x", "y"], seed) for seed, label in enumerate("abc")]
    assert [view["labels"] for view in Page(write_report(tmp_path / "1.html", runs[:1])).views] == [["a"]]
    assert len(Page(write_report(tmp_path / "2.html", runs)).views) == 3
    pairs = [view["labels"] for view in Page(write_report(tmp_path / "3.html", runs, compare_all(runs))).views]
    assert pairs == [["a", "b"], ["a", "c"], ["b", "c"]]
    alone = [make_run(tmp_path, "a", ["x"], 0), make_run(tmp_path, "b", ["x"], 0)]
    assert "0/1/0" in write_report(tmp_path / "4.html", alone, compare_all(alone)).read_text()
    unscored = ScoredRun("a", runs[0].entries, {})
    assert Page(write_report(tmp_path / "5.html", [unscored])).views[0]["cards"][1]["scores"] == [[]]


def test_different_prompts_paired_by_index_are_both_kept(tmp_path):
    a, b = make_run(tmp_path, "a", ["x", "y"], 0), make_run(tmp_path, "b", ["x", "z"], 1)
    (view,) = Page(write_report(tmp_path / "report.html", [a, b], [compare(a, b, pair_by="index")])).views
    assert [card.get("prompt_b") for card in view["cards"]] == [None, "z"]


def test_hostile_prompts_and_labels_stay_text(tmp_path):
    labels = ['<i>"a"&', "b' onload='x"]
    runs = [make_run(tmp_path, label, HOSTILE, seed, metrics=["<u>m"]) for seed, label in enumerate(labels)]
    page = Page(write_report(tmp_path / "report.html", runs, [compare(*runs)]))
    harmless = make_run(tmp_path, "a", [*"wxyz"], 0, ["m"]), make_run(tmp_path, "b", [*"wxyz"], 1, ["m"])
    expected = Page(write_report(tmp_path / "plain.html", harmless, [compare(*harmless)]))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in expected.tags]
    assert [list(attributes) for _, attributes in page.tags] == [list(attributes) for _, attributes in expected.tags]
    assert sorted(card["prompt"] for card in page.views[0]["cards"]) == sorted(HOSTILE)
    assert page.views[0]["labels"] == labels


def test_what_the_console_cautions_of_is_on_the_page(tmp_path):
    runs = [make_run(tmp_path, label, ["x", "x", "y"], seed) for seed, label in enumerate("ab")]
    for run, steps in zip(runs, (20, 50), strict=True):
        for entry in run.entries:
            entry.made_with["steps"] = steps
    page = write_report(tmp_path / "report.html", runs, compare_all(runs)).read_text()
    assert "only 2 prompts are distinct, but intervals and p count pairs as independent" in page
    assert "the images of 3 pairs were made with another steps for A than for B" in page


def test_nothing_is_fetched_and_tables_are_labelled(tmp_path):
    runs = [make_run(tmp_path, label, ["x", "y"], seed) for seed, label in enumerate("ab")]
    path = write_report(tmp_path / "report.html", runs, [compare(*runs)])
    assert not re.search(r"https?://|innerHTML|@import|url\(", path.read_text().replace('xmlns="http://', ""))
    tags = Page(path).tags
    assert not [attributes for _, attributes in tags if "src" in attributes or "href" in attributes]
    assert all("scope" in attributes for tag, attributes in tags if tag == "th")
    count = [sum(tag == name for tag, _ in tags) for name in ("table", "caption")]
    assert count[0] == count[1] == 2
    assert all("aria-label" in attributes for tag, attributes in tags if tag == "svg")


def test_3200_prompts_give_a_page_of_bounded_size(tmp_path):
    prompts = [f"prompt number {i}, a photograph of something in some style, detailed" for i in range(3200)]
    runs = [make_run(tmp_path, label, prompts, seed, list("12345")) for seed, label in enumerate("ab")]
    path = write_report(tmp_path / "report.html", runs, [compare(*runs)])
    assert path.stat().st_size < 3200 * 500
    assert not list(tmp_path.glob("*.partial"))


def test_runs_that_do_not_fit_are_refused(tmp_path):
    runs = [make_run(tmp_path, label, ["x"], seed) for seed, label in enumerate("ab")]
    with pytest.raises(InputError, match="at least one run"):
        write_report(tmp_path / "report.html", [])
    with pytest.raises(InputError, match="of b, which is not among"):
        write_report(tmp_path / "report.html", runs[:1], [compare(*runs)])


def test_a_title_that_is_no_text(tmp_path):
    """Such as the name of a file that is not UTF-8."""
    path = write_report(tmp_path / "report.html", [make_run(tmp_path, "a", ["p"], 0)], title="\udcff/unet.pth")
    assert "<title>?/unet.pth</title>" in path.read_text()
