"""Prompt groups: what files may hold, and fetching the official ones (what is refused: test_bad_input.py)."""

import functools
import hashlib
import http.server
import json
import threading
from pathlib import Path

import pytest

from sdpo import prompts
from sdpo.command import InputError
from sdpo.prompts import GROUPS, OFFICIAL, Prompt, read_prompts
from sdpo.tiny import pictures

SHARED = Path(__file__).parents[2] / "shared" / "data" / "prompts"  # copies of the official files, where there are some
ROW = {"prompt": "雪 ", "neg_prompt": "rain", "raw_image_path": "a.png", "metadata": {"style": "photo"}}
CONTENTS = {
    "a.json": json.dumps([{"prompt": "a cat "}, "a dog", ROW]),
    "a.jsonl": "\n".join([json.dumps({"prompt": "a cat "}), "", json.dumps("a dog"), json.dumps(ROW)]) + "\n",
    "bom.json": "\ufeff" + json.dumps(["a cat ", "a dog", ROW], ensure_ascii=False),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_files_are_read_as_they_stand(tmp_path, name):
    (tmp_path / name).write_text(CONTENTS[name], encoding="utf-8")
    expected = [Prompt("a cat "), Prompt("a dog"), Prompt("雪 ", "rain", "a.png", {"style": "photo"})]
    assert read_prompts(tmp_path / name) == expected


def test_text_files_hold_a_prompt_per_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("a cat\r\n\r\n  two\u2028halves \n".encode())
    assert [prompt.text for prompt in read_prompts(tmp_path / "a.txt")] == ["a cat", "two\u2028halves"]


def test_own_groups():
    smoke, tiny = GROUPS["smoke"](), GROUPS["tiny"]()
    assert len(smoke) == 24 and len({prompt.text for prompt in smoke}) == 24
    covers = {"counting", "colours", "text", "people", "styles", "long", "unicode"}
    assert covers <= {prompt.metadata["covers"] for prompt in smoke}
    assert max(len(prompt.text.split()) for prompt in smoke) > 77 and any(not prompt.text.isascii() for prompt in smoke)
    assert [prompt.text for prompt in tiny] == [spec.caption for spec in pictures.HELD_OUT for _ in range(4)]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A web server in place of the official source; its one file is `papv2.json`. Yields the list of its requests."""
    served, requests = tmp_path / "served", []
    served.mkdir()
    (served / "papv2.json").write_text(json.dumps([{"prompt": "a cat"}]))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(prompts, "SOURCE", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(prompts, "FOLDER", tmp_path / "prompts")
    monkeypatch.setitem(OFFICIAL, "papv2", hashlib.sha256((served / "papv2.json").read_bytes()).hexdigest())
    yield requests
    server.shutdown()
    server.server_close()


def test_official_groups_are_fetched_once_and_checked(source, tmp_path):
    for _ in range(2):
        assert GROUPS["papv2"]() == [Prompt("a cat")]
    assert source == ["/papv2.json"]
    (tmp_path / "prompts" / "papv2.json").write_text('["another"]')
    with pytest.raises(InputError, match=r"papv2\.json is not the official file .* remove it"):
        GROUPS["papv2"]()


def test_another_file_at_the_source_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setitem(OFFICIAL, "papv2", "0" * 64)
    with pytest.raises(InputError, match=r"prompts of papv2: download http.* and put it at .*papv2\.json \(.*hash"):
        GROUPS["papv2"]()
    assert not list((tmp_path / "prompts").glob("*"))


def test_without_network_the_fix_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "SOURCE", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(prompts, "FOLDER", tmp_path)
    with pytest.raises(InputError, match=r"prompts of hpsv2: download http://127\.0\.0\.1:9/hpsv2\.json") as e:
        GROUPS["hpsv2"]()
    assert str(tmp_path / "hpsv2.json") in str(e.value) and "\n" not in str(e.value)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the official prompt files")
@pytest.mark.parametrize(("group", "count", "unique"), [("papv2", 487, 487), ("hpsv2", 3200, 3172), ("partiprompts", 1632, 1632)])  # fmt: skip
def test_official_files_pass_the_check(monkeypatch, group, count, unique):
    monkeypatch.setattr(prompts, "FOLDER", SHARED)
    texts = [prompt.text for prompt in GROUPS[group]()]
    assert (len(texts), len(set(texts))) == (count, unique)
