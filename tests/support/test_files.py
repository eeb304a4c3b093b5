"""Whole files: written completely or not at all, locked, read as UTF-8."""

import hashlib
import os
import unicodedata

import pytest
from filelock import SoftFileLock
from hypothesis import given
from hypothesis import strategies as st

from configurator import UserError
from support import files
from support.files import atomic_write, clean, file_sha256, lock_path, read_text


def write(path, content: bytes, error: BaseException | None = None) -> None:
    with atomic_write(path) as file:
        file.write(content)
        file.flush()
        if error:
            raise error


FAILURES = [KeyboardInterrupt(), RuntimeError("a bug"), OSError(28, "No space left on device")]


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "new" / "file"
    write(path, b"old")
    words = r"file: can not be written \(No space left on device\); an earlier file is unchanged"
    is_full = isinstance(error, OSError)
    with pytest.raises(UserError if is_full else type(error), match=words if is_full else None):
        write(path, b"half", error)
    assert [p.name for p in path.parent.iterdir()] == ["file"] and path.read_bytes() == b"old"


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(files.os, "fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr(files.os, "replace", lambda *_: calls.append("replace"))
    write(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace"]


def test_what_a_killed_process_left_does_no_harm(tmp_path):
    (tmp_path / "file.tmp").write_bytes(b"half of a file that is longer than the next one")
    write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.name == "nt" or [p.name for p in tmp_path.iterdir()] == ["file"]


def test_two_processes_never_hold_one_folder(tmp_path, capsys):
    folder = tmp_path / "out"
    with lock_path(folder), lock_path(tmp_path / "other"):
        with pytest.raises(UserError, match="out: another process is at work there; wait for it"):
            lock_path(folder).__enter__()
        assert not capsys.readouterr().out
        with pytest.raises(UserError, match="another process"):
            lock_path(folder, seconds=0.1).__enter__()
        assert "out: another process is at work there; waiting for it" in capsys.readouterr().out
    with lock_path(folder):
        pass
    assert os.name == "nt" or not list(tmp_path.iterdir())


def test_a_lock_that_a_lost_process_left_names_its_owner_and_the_file(tmp_path, monkeypatch):
    """Where a drive has no locks, filelock writes who holds one into the file."""
    monkeypatch.setattr(files, "FileLock", SoftFileLock)
    with lock_path(tmp_path / "out"), pytest.raises(UserError, match=r"if .* no longer runs"):
        lock_path(tmp_path / "out").__enter__()
    (tmp_path / ".out.lock").write_text("filelock-v1\npid=77\nhost=node-3\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"host=node-3 no longer runs, remove .*\.out\.lock$"):
        lock_path(tmp_path / "out").__enter__()


@pytest.mark.parametrize("system, n_errors", [("Windows", 2), ("Windows", 6), ("Linux", 2)])
def test_on_windows_a_write_waits_for_the_readers_of_the_file(
    tmp_path, monkeypatch, system, n_errors
):
    errors, replace, waits = [PermissionError("a reader")] * n_errors, os.replace, []
    monkeypatch.setattr(files.platform, "system", lambda: system)
    monkeypatch.setattr(files.time, "sleep", waits.append)

    def replace_later(*paths):
        if errors:
            raise errors.pop()
        replace(*paths)

    monkeypatch.setattr(files.os, "replace", replace_later)
    if (system, n_errors) == ("Windows", 2):
        write(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"new" and waits == [0.1, 0.3]
    else:  # on Linux it means that the folder may not be changed
        with pytest.raises(UserError, match=r"can not be written \(a reader\)"):
            write(tmp_path / "file", b"new")
        assert not list(tmp_path.iterdir()) and len(waits) == (5 if system == "Windows" else 0)


def test_checksums_and_texts(tmp_path):
    path, content = tmp_path / "file", "\ufeffnaïve\r\n日本\n".encode()
    path.write_bytes(content)
    assert file_sha256(path) == hashlib.sha256(content).hexdigest()
    assert read_text(path) == "naïve\n日本\n"
    for content, byte in ((b"abc\xe9", "3 .0xe9. is not utf-8"), ("\x00日".encode(), "0 is 0")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"file: byte {byte}.*; convert it, as in: iconv"):
            read_text(path)
    with pytest.raises(UserError, match="none: no such file"):
        read_text(tmp_path / "none")


@given(st.text())
def test_clean_text_has_form_nfc_and_no_control_characters(text):
    cleaned = clean(text)
    assert cleaned == unicodedata.normalize("NFC", cleaned)
    assert not [c for c in cleaned if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert clean(cleaned) == cleaned
    assert clean("a\r\nb\rc\x00 e\u0301") == "a\nb\nc \u00e9"
