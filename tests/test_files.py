"""Files of ours: whole or absent, also where several processes write the same one or a write fails."""

import hashlib
import json
import os
import resource
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from sdpo.checkpoint import damage, put_in_place, remove, seal
from sdpo.command import NO_ROOM
from sdpo.files import can_be_written, remove_abandoned, sha256, write_file, write_json, write_text


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
        monkeypatch.setattr(os, "link", Mock(side_effect=PermissionError("no links here")))
    for value in (1, 2):
        write_json(path, value, replace=False)
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]


def test_only_what_has_not_grown_for_long_is_abandoned(tmp_path):
    """Others write there too."""
    for name in ("old.bin.0123abcd.partial", "new.bin.0123abcd.partial", "old.bin", "old.partial"):
        (tmp_path / name).touch()
        if name.startswith("old"):
            os.utime(tmp_path / name, times=(time.time() - 4000,) * 2)
    remove_abandoned(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["new.bin.0123abcd.partial", "old.bin", "old.partial"]


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as caught:
        write_file(
            tmp_path / "a.txt", lambda partial: (partial.touch(), os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        )
    assert caught.value.filename == str(tmp_path / "a.txt")


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_full_disk_is_one_whoever_writes(tmp_path, save):
    """safetensors and torch have errors of their own for it."""
    path, limits = tmp_path / "weights", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"No space|File too large") as caught:
            write_file(path, lambda partial: save({"a": torch.zeros(100_000)}, partial))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    assert caught.value.errno in NO_ROOM and caught.value.filename == str(path)


def test_what_safetensors_says_of_a_folder_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_file(tmp_path / "gone" / "weights", lambda partial: save_file({"a": torch.zeros(1)}, partial))
    assert caught.value.filename == str(tmp_path / "gone" / "weights")


def test_contents_are_on_the_disk_before_their_names(tmp_path, monkeypatch):
    """Else a power cut leaves whole names of empty files, or two checkpoints gone for one that was written."""
    done, fsync, replace = [], os.fsync, os.replace

    def note_sync(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_name(source, target):
        done.append(f"{Path(source).name} -> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_name)
    write_text(tmp_path / "a.txt", "text")
    partial = done[0]
    assert done == [partial, f"{partial} -> a.txt", tmp_path.name]
    done.clear()
    folder = tmp_path / "checkpoint-1"
    whole = folder.with_name("checkpoint-1.partial")
    (whole / "states").mkdir(parents=True)
    for name in ("unet.pth", "states/optimizer.bin"):
        (whole / name).write_bytes(b"weights")
    seal(whole)
    put_in_place(whole, folder)
    *before, name, after = done
    assert {"unet.pth", "optimizer.bin", "states", "checkpoint-1.partial"} <= set(before)
    assert (name, after) == ("checkpoint-1.partial -> checkpoint-1", tmp_path.name)
    done.clear()
    remove(folder)
    assert done == ["checkpoint-1 -> checkpoint-1.removed", tmp_path.name] and not any(tmp_path.glob("checkpoint*"))


@pytest.mark.parametrize("name", ["state.json", "unet.pth"])
def test_a_checkpoint_whose_list_lacks_weights_or_state_is_not_whole(tmp_path, name):
    for file in ("state.json", "unet.pth", "optimizer.bin"):
        (tmp_path / file).write_text(file)
    seal(tmp_path)
    assert damage(tmp_path) is None
    listed = json.loads((tmp_path / "files.json").read_text())
    del listed[name]
    (tmp_path / "files.json").write_text(json.dumps(listed))
    assert damage(tmp_path) == f"files.json does not list {name}"


def test_a_file_is_hashed_anew_when_it_changes(tmp_path):
    path, seen = tmp_path / "a", []
    for content in (b"one", b"two", b"two"):
        path.write_bytes(content)
        seen.append(sha256(path))
    assert seen == [hashlib.sha256(content).hexdigest() for content in (b"one", b"two", b"two")]


def test_where_files_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    assert all(can_be_written(place) for place in (tmp_path, tmp_path / "a" / "b"))
    assert not any(can_be_written(tmp_path / name) for name in ("file", "file/x", "nowhere", "nowhere/x"))
