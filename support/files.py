"""Read and write whole files: atomic writes, UTF-8 text, checksums, free space, locks."""

import hashlib
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from configurator import UserError
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def atomic_write(path: Path, size: int = 0) -> Iterator:
    """Yield a binary file that appears at `path` complete and on the disk, or not at all.

    The content goes to a temporary file in the same folder, which then replaces `path`. Raises
    UserError if the disk does not take it; `size`, if known, tells the user how many bytes it has.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        with open(new, "xb") as file:  # with the usual permissions, which tempfile's files lack
            temporary = new
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError; its context is the reason of the system.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        cause, needed = reason.strerror or reason, f"{size:,} bytes are needed, " if size else ""
        raise UserError(
            f"{path}: can not be written ({cause}); {needed}{free_bytes(path.parent):,} bytes are "
            "free; an earlier file is unchanged"
        ) from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def replace(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`. On Windows, wait up to 14 s for programs that read `path`."""
    for seconds in (0.1, 0.3, 1, 3, 10):
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            if platform.system() != "Windows":
                raise
            time.sleep(seconds)
    os.replace(temporary, path)


@contextmanager
def lock_path(path: Path, seconds: float = 0) -> Iterator[None]:
    """Hold the only lock on a folder or file inside the block: two processes never write there.

    Waits up to `seconds` for another process, then raises UserError. The lock is a file beside it,
    because a folder may be moved meanwhile. It ends with the process, even if that is killed.
    """
    path = path.resolve()
    beside = path.parent / f".{path.name}.lock"
    lock, is_new = FileLock(beside), not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(Timeout):
            lock.acquire(timeout=0)
        if not lock.is_locked:
            if seconds:
                print(f"{path}: another process is at work there; waiting for it ...")
            lock.acquire(timeout=seconds)
    except Timeout:
        raise UserError(f"{path}: another process is at work there; wait for it to end") from None
    except OSError as error:
        raise UserError(f"{path}: can not be used ({error.strerror}); choose another") from error
    try:
        for leftover in path.glob("*.????????.tmp"):  # of an atomic_write that was killed
            leftover.unlink(missing_ok=True)
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            beside.unlink()
            if is_new:  # and still empty
                path.parent.rmdir()
        lock.release()


def free_bytes(path: Path) -> int:
    """Return the free space, in bytes, of the disk where `path` is or will be."""
    existing = next((p for p in (path, *path.absolute().parents) if p.exists()), None)
    return shutil.disk_usage(existing).free if existing else 0  # Windows: a drive may not exist


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file without changing its line ends. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return path.read_bytes().decode("utf-8-sig")  # without the mark that Windows may write
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file") from None
