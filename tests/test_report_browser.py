"""The report page in headless Chromium, from disk: order, filters, keyboard, lazy images, no layout shift, no errors."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdpo.manifest import Entry
from sdpo.report import write_report
from sdpo.tiny import pictures
from sdpo.winrates import ScoredRun, compare

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no chromium, chromium-browser or google-chrome on the PATH", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
pytestmark = pytest.mark.browser

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
HOSTILE = "</script><img src=x onerror='window.broken = 1'> \"quoted\" 🦊"
SHIFTS = """window.shift = 0;
new PerformanceObserver(list => list.getEntries().forEach(entry => { window.shift += entry.value; }))
  .observe({type: "layout-shift", buffered: true});"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page that records errors and requests; any error fails the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.errors, page.images = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: page.images.append(request.url) if request.resource_type == "image" else None)
    page.add_init_script(SHIFTS)
    yield page
    assert page.errors == []
    page.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 pictures, drawn in their colours and, in bad/, partly in others."""
    folder = tmp_path_factory.mktemp("report")
    for label in ("good", "bad"):
        (folder / label).mkdir()
        for index, spec in enumerate(pictures.HELD_OUT):
            picture = pictures.render(spec, (16.0, 16.0))
            if label == "bad" and index % 3:
                picture = np.roll(picture, index % 3, axis=-1)
            Image.fromarray(picture).resize((128, 128), Image.Resampling.NEAREST).save(folder / label / f"{index}.png")
    return folder


def make_run(folder, label, count, seed):
    rng = np.random.default_rng(seed)
    specs = pictures.HELD_OUT
    prompts = [HOSTILE, *(f"{specs[i % 20].caption}, number {i}" for i in range(1, count))]
    images = [Path(label, f"{i % 20}.png") for i in range(count)]
    entries = [
        Entry(p, f"{i}.png", folder / image, "x") for i, (p, image) in enumerate(zip(prompts, images, strict=True))
    ]
    names, scales = ("PickScore", "HPSv2", "CLIP", "Aesthetics", "ImageReward"), (0.1, 0.02, 0.03, 0.5, 1)
    return ScoredRun(
        label, entries, {m: (s * rng.normal(2, 1, count)).round(3).tolist() for m, s in zip(names, scales, strict=True)}
    )


@pytest.fixture(scope="module")
def pair(folder):
    runs = make_run(folder, "good", 60, 0), make_run(folder, "bad", 60, 1)
    return write_report(folder / "pair.html", runs, [compare(*runs)])


def shown(page, column):
    """Numbers of the first metric in the rendered cards: column 1 is A, 2 is B, 3 is the difference."""
    texts = page.locator(f"#cards tbody tr:nth-child(1) > :nth-child({column + 1})").all_inner_texts()
    return [float(text.replace("\u2212", "-")) for text in texts]


def test_prompts_are_text_and_images_load(page, pair):
    page.goto(pair.as_uri())
    page.locator("#cards article").first.scroll_into_view_if_needed()
    assert page.evaluate("window.broken") is None
    assert page.locator("#count").inner_text() == "60 of 60 pairs"
    page.fill("#filter", "onerror")
    playwright.expect(page.locator("#count")).to_have_text("1 of 60 pairs")
    assert page.locator("#cards h3").inner_text() == HOSTILE
    assert page.locator("#cards img").first.get_attribute("alt") == f"good: {HOSTILE}"
    page.wait_for_function(
        "[...document.querySelectorAll('#cards img')].every(i => i.complete && i.naturalWidth === 128)"
    )


def test_no_script_but_its_own_runs(page, folder, pair):
    text = pair.read_text(encoding="utf-8")
    hostile = "<script>window.broken = 1</script><img src='none.png' onerror='window.broken = 1'>"
    changed = folder / "changed.html"
    changed.write_text(text.replace("</body>", f"{hostile}</body>"), encoding="utf-8")
    page.goto(changed.as_uri())
    assert page.locator("#count").inner_text() == "60 of 60 pairs"
    assert page.evaluate("window.broken") is None
    assert any("Content Security Policy" in error for error in page.errors)
    page.errors.clear()


def test_order_by_difference(page, pair):
    page.goto(pair.as_uri())
    page.select_option("#order", "high")
    differences = shown(page, 3)
    assert len(differences) >= 24 and differences == sorted(differences, reverse=True) and differences[0] > 0
    page.select_option("#order", "low")
    assert shown(page, 3) == sorted(shown(page, 3)) and shown(page, 3)[0] < 0
    page.select_option("#order", "far")
    assert [abs(d) for d in shown(page, 3)] == sorted((abs(d) for d in shown(page, 3)), reverse=True)
    page.select_option("#order", "near")
    assert [abs(d) for d in shown(page, 3)] == sorted(abs(d) for d in shown(page, 3))
    before = page.locator("#cards h3").all_inner_texts()
    page.select_option("#metric", "Aesthetics")
    assert page.locator("#cards h3").all_inner_texts() != before


def test_filters_by_winner_and_text(page, pair):
    page.goto(pair.as_uri())
    counts = []
    for winner, sign in (("1", 1), ("-1", -1), ("0", 0)):
        page.select_option("#winner", winner)
        counts.append(int(page.locator("#count").inner_text().split()[0]))
        assert all(np.sign(a - b) == sign for a, b in zip(shown(page, 1), shown(page, 2), strict=True))
    assert sum(counts) == 60 and min(counts[:2]) > 0
    page.select_option("#winner", "")
    page.fill("#filter", "CIRCLE red")
    playwright.expect(page.locator("#count")).not_to_have_text("60 of 60 pairs")
    titles = page.locator("#cards h3").all_inner_texts()
    assert titles and all("circle" in title and "red" in title for title in titles)
    page.fill("#filter", "no such words")
    playwright.expect(page.locator("#count")).to_have_text("0 of 60 pairs")


def test_keyboard(page, pair):
    page.goto(pair.as_uri())
    place = "Number(document.activeElement.dataset.place)"
    for key, expected in (
        ("j", 0),
        ("j", 1),
        ("ArrowRight", 2),
        ("ArrowDown", 3),
        ("ArrowLeft", 2),
        ("k", 1),
        ("k", 0),
        ("k", 0),
    ):
        page.keyboard.press(key)
        assert page.evaluate(place) == expected, key
    for _ in range(70):  # past the cards rendered at first, to the last one
        page.keyboard.press("j")
    assert page.evaluate(place) == 59
    box, controls = (page.locator(name).bounding_box() for name in ("article:focus", "#controls"))
    assert box["y"] >= controls["y"] + controls["height"] - 1  # not under the controls
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "filter"
    page.keyboard.type("j/k")  # letters again
    assert page.input_value("#filter") == "j/k"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") != "filter"


def test_3200_prompts_stay_light(page, folder):
    runs = make_run(folder, "good", 3200, 0), make_run(folder, "bad", 3200, 1)
    for run in runs:  # an address of its own for each image, so that each is a request
        for index, entry in enumerate(run.entries):
            path = folder / run.label / f"many-{index}.png"
            path.hardlink_to(entry.path)
            object.__setattr__(entry, "path", path)
    page.goto(write_report(folder / "many.html", runs, [compare(*runs)]).as_uri())
    page.wait_for_timeout(500)
    assert page.locator("#cards article").count() <= 48
    assert 0 < len(page.images) <= 96
    assert page.locator("#count").inner_text() == "3200 of 3200 pairs"
    for _ in range(6):
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        page.wait_for_timeout(150)
    assert 48 < page.locator("#cards article").count() < 400
    assert page.evaluate("window.shift") == 0
    milliseconds = page.evaluate(
        "() => { const t = performance.now(); $('order').value = 'far'; update(); return performance.now() - t; }"
    )
    assert milliseconds < 1000


def test_one_run_and_a_narrow_dark_page(page, folder):
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(write_report(folder / "one.html", [make_run(folder, "good", 60, 0)]).as_uri())
    assert not page.locator("#winner").is_visible() and not page.locator("#view").is_visible()
    page.select_option("#order", "low")
    assert shown(page, 1) == sorted(shown(page, 1))
    assert page.locator("#cards article").first.locator("img").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("window.shift") == 0
