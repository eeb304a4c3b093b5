"""Read and write whole files: atomic writes, locks, checksums, UTF-8 text."""

import hashlib
import os
import platform
import shutil
import time
from collections.abc import Iterator
from configurator import UserError
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def atomic_write(path: Path) -> Iterator:
    """Yield a binary file that appears at `path` complete and on the disk, or not at all.

    Raises UserError if the disk does not take it. Two processes must not write the same file at
    once: `lock_path` keeps them apart. What a killed process left is overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError from the OSError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        reason = f"can not be written ({cause.strerror or cause})"
        raise UserError(f"{path}: {reason}; an earlier file is unchanged") from error
    finally:
        temporary.unlink(missing_ok=True)


def replace(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`. On Windows, wait up to 14 s for programs that read `path`."""
    for seconds in (0.1, 0.3, 1, 3, 10, 0):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            if platform.system() != "Windows" or not seconds:
                raise
            time.sleep(seconds)


@contextmanager
def lock_path(path: Path, seconds: float = 0) -> Iterator[None]:
    """Hold the only lock on a folder or file inside the block: two processes never write there.

    Waits up to `seconds` for another process, then raises UserError. The lock ends with the
    process, even if that is killed. It is a file beside `path`, because a folder may be moved.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    for wait in (0, seconds):
        with suppress(Timeout):
            lock.acquire(timeout=wait)
            break
        if wait == seconds:
            raise UserError(f"{path}: another process is at work there; wait for it to end")
        print(f"{path}: another process is at work there; waiting for it ...")
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            Path(lock.lock_file).unlink()
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
