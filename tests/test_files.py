"""Files of ours: whole or absent, also where several processes write the same one or a write fails."""

import os

import pytest

from sdpo.files import write_file, write_json, write_text


def test_writers_of_the_same_file_do_not_meet(tmp_path):
    path = tmp_path / "shared.txt"

    def slow(partial):
        partial.write_text("first, begin")
        write_text(path, "second")  # another process, in the middle
        assert path.read_text() == "second" and partial.read_text() == "first, begin"
        partial.write_text("first, whole")

    write_file(path, slow)
    assert path.read_text() == "first, whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "kept.txt"
    write_text(path, "old")

    def fail(partial):
        partial.write_text("half")
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_file(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False])
def test_the_first_one_stays_where_it_is_not_to_be_replaced(tmp_path, monkeypatch, links):
    path = tmp_path / "claim.json"
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links here")))
    for value in (1, 2):
        write_json(path, value, replace=False)
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as caught:
        write_file(
            tmp_path / "a.txt", lambda partial: (partial.touch(), os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        )
    assert caught.value.filename == str(tmp_path / "a.txt")
