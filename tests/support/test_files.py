"""Whole files: written completely or not at all, locked, read as UTF-8."""

import hashlib
import os
from configurator import UserError

import pytest

from support import files
from support.files import atomic_write, file_sha256, free_bytes, lock_path, read_text


def write(path, content: bytes, error: Exception | None = None) -> None:
    with atomic_write(path) as file:
        file.write(content)
        file.flush()
        if error:
            raise error


@pytest.mark.parametrize("error", [ValueError("a mistake"), KeyboardInterrupt()], ids=repr)
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "file"
    write(path, b"old")
    with pytest.raises(type(error)):
        write(path, b"half", error)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"
    write(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"new"


def test_a_full_disk_is_named_with_the_size(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(UserError, match=r"file: can not be written \(No space left on device\)"):
        write(path, b"half", OSError(28, "No space left on device"))
    with pytest.raises(UserError, match="1,234,567 bytes are needed"), atomic_write(path, 1234567):
        raise OSError(28, "No space left on device")


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(files.os, "fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr(files.os, "replace", lambda *_: calls.append("replace"))
    write(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace"]


def test_missing_folders_are_made(tmp_path):
    write(tmp_path / "a" / "b" / "file", b"content")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"content"


def test_a_wait_for_another_process_is_announced(tmp_path, capsys):
    with lock_path(tmp_path / "out", seconds=60):
        assert not capsys.readouterr().out
        with pytest.raises(UserError, match="another process is at work there; wait for it"):
            lock_path(tmp_path / "out", seconds=0.1).__enter__()
    assert "out: another process is at work there; waiting for it" in capsys.readouterr().out


def test_two_processes_never_hold_one_folder(tmp_path):
    folder = tmp_path / "out"
    with lock_path(folder):
        with pytest.raises(UserError, match="out: another process is at work there"):
            lock_path(folder).__enter__()
        with lock_path(tmp_path / "other"):
            pass
    with lock_path(folder):
        pass
    assert os.name == "nt" or not list(tmp_path.glob(".*.lock"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_file_has_the_permissions_that_the_user_gives_to_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "file", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("system", ["Windows", "Linux"])
def test_on_windows_a_write_waits_for_the_readers_of_the_file(tmp_path, monkeypatch, system):
    errors, replace = [PermissionError("a reader"), PermissionError("a scanner")], os.replace

    def replace_later(*paths):
        if errors:
            raise errors.pop()
        replace(*paths)

    monkeypatch.setattr(files.platform, "system", lambda: system)
    monkeypatch.setattr(files.os, "replace", replace_later)
    waits = []
    monkeypatch.setattr(files.time, "sleep", waits.append)
    if system == "Linux":  # where it means that the folder may not be changed
        with pytest.raises(UserError, match="can not be written"):
            write(tmp_path / "file", b"new")
        assert list(tmp_path.iterdir()) == waits == []
    else:
        write(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"new" and waits == [0.1, 0.3]


def test_what_killed_writes_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "ckpt.pt.abcd1234.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_bytes(b"mine")
    with lock_path(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["notes.tmp"]


def test_free_space_is_known_for_folders_that_do_not_exist_yet(tmp_path):
    assert free_bytes(tmp_path / "not" / "yet") > 0


def test_sha256_is_that_of_hashlib(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()


def test_text_is_read_as_utf_8_with_its_line_ends(tmp_path):
    path = tmp_path / "file"
    path.write_bytes("naïve\r\n日本\n".encode())
    assert read_text(path) == "naïve\r\n日本\n"
    path.write_bytes(b"abc\xe9")
    with pytest.raises(UserError, match="file: byte 3 is not UTF-8; convert the file"):
        read_text(path)
    with pytest.raises(UserError, match="none: no such file"):
        read_text(tmp_path / "none")
