"""Files whole or not there, folders of one run at a time, hints in the user's own words, names that moved."""
import errno
import os
import subprocess
import sys
import threading
import warnings

import pytest

from scformer_nb import io


@pytest.mark.parametrize("made, said", [("folder", "is a folder"), ("pipe", "is a pipe or a device"), ("nothing", "does not exist"),
    ("link", "leads to nothing"), ("device", "is a pipe or a device")])
def test_what_is_no_file_is_named(tmp_path, made, said):
    path = tmp_path / made
    make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to(tmp_path / "nowhere")}
    make.get(made, lambda: None)()
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        io.regular_file("/dev/zero" if made == "device" else path)


def test_a_link_to_a_file_is_a_file(tmp_path):
    (tmp_path / "cells").write_text("here")
    (tmp_path / "link").symlink_to(tmp_path / "cells")
    assert io.regular_file(str(tmp_path / "link")).read_text() == "here"


def test_nothing_stays_of_a_file_that_failed(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OSError, match="cannot write .*/a: no space is left for it"), io.new_file(tmp_path / "a", overwrite=True) as new:
        new.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "mine"}


def test_who_writes_is_told_of_what_a_killed_process_left(tmp_path):
    "It may as well be of one that writes now, so it is not removed."
    left = tmp_path / ".cells.h5ad.0123456789abcdef"
    for path in (left, tmp_path / ".other.h5ad.0123456789abcdef", tmp_path / ".cells.h5ad.swp"):
        path.write_text("half")
    with pytest.warns(UserWarning, match=f"{left.name} in {tmp_path} is of a process that was killed, or writes cells.h5ad now"):
        io.write_text(tmp_path / "cells.h5ad", "whole")
    assert io.leftovers(tmp_path, "cells.h5ad") == [left] and len(io.leftovers(tmp_path)) == 2 and io.leftovers(tmp_path / "none") == []


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(io.os, "fsync", lambda file: calls.append("fsync"))
    monkeypatch.setattr(io.os, "replace", lambda *names: calls.append("replace") or replace(*names))
    io.write_text(tmp_path / "a", "whole")
    assert calls == ["fsync", "replace"]


def test_who_may_wait_for_a_lock_gets_it(tmp_path):
    code = "import sys, time; from scformer_nb.io import lock_folder\nwith lock_folder(sys.argv[1]): print(flush=True); time.sleep(.3)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with io.lock_folder(tmp_path, wait=60):
            other.wait(60)


def test_a_name_that_is_taken_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(FileExistsError, match="is there already; choose another name"), io.new_file(tmp_path / "a") as new:
        new.write_text("ours")
        (tmp_path / "a").write_text("theirs")
    assert (tmp_path / "a").read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "a").symlink_to(tmp_path / "target")
    io.write_text(tmp_path / "a", "new")
    assert (tmp_path / "target").read_text() == "mine" and not (tmp_path / "a").is_symlink()
    with pytest.raises(FileExistsError), io.new_file(tmp_path / "a"):
        pytest.fail("it is there already")


def test_folders_are_made_and_names_may_be_long(tmp_path):
    path = tmp_path / "new" / "folder" / ("n" * 200)
    assert io.write_bytes(path, b"1").read_bytes() == b"1" and len(list(path.parent.iterdir())) == 1


def test_what_cannot_be_written_says_why(unwritable):
    with pytest.raises(OSError, match="cannot write .*: [A-Z]"):
        io.write_text(unwritable / "a", "")


def test_a_lock_is_given_back_after_an_error_and_may_be_taken_twice(tmp_path):
    with pytest.raises(ZeroDivisionError), io.lock_folder(tmp_path / "run"), io.lock_folder(tmp_path / "run"):
        1 / 0  # noqa: B018
    with io.lock_folder(tmp_path / "run") as folder:
        assert folder == tmp_path / "run"
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; choose another folder"), io.lock_folder(tmp_path / "file"):
        pytest.fail("a file is no folder")


def test_hints_are_of_the_block_and_of_the_thread():
    with pytest.raises(ZeroDivisionError), io.speaking_shell():
        assert io.hint("python", "shell") == "shell"
        heard = []
        other = threading.Thread(target=lambda: heard.append(io.hint("python", "shell")))
        other.start()
        other.join()
        assert heard == ["python"]
        1 / 0  # noqa: B018
    assert io.hint("python", "shell") == "python"


@pytest.mark.parametrize("name, said", [("BATCH", "; did you mean 'batch'?"),
    ("zzz", "; known are 'batch', 'cell_type'"), (3, "; known are")])
def test_the_nearest_name(name, said):
    assert io.nearest_name(name, ["batch", "cell_type"]).startswith(said)


def test_names_that_never_were_are_unknown():
    forward = io.moved("scformer_nb.old", "io")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert forward("hint") is io.hint
    assert str(caught[0].message) == "scformer_nb.old.hint is now scformer_nb.io.hint"
    with pytest.raises(AttributeError, match="'scformer_nb.old' has no attribute 'nothing'"):
        forward("nothing")
