"""Read and write whole files: atomic writes, locks, checksums, text."""

import codecs
import hashlib
import os
import platform
import re
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from configurator import UserError, one_line
from support.tokenizer import END_OF_TEXT

MARKS = {  # byte order marks; that of UTF-32 begins with that of UTF-16
    "utf-8-sig": codecs.BOM_UTF8,
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
CONVERT = "convert it, as in: iconv -f CP1252 -t UTF-8 old.txt > new.txt (or -f UTF-16LE)"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 and C1 without tab and newline


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
    lock, hint = FileLock(path.with_name(f".{path.name}.lock")), "wait for it to end"
    for wait in (0, seconds):
        with suppress(Timeout):
            lock.acquire(timeout=wait)
            break
        if wait == seconds:
            # Network drives without locks get a file instead, which names the process and its host.
            with suppress(OSError):  # Windows does not let others read a locked file
                if owner := one_line(Path(lock.lock_file).read_text("utf-8")):
                    hint = f"if {owner} no longer runs, remove {lock.lock_file}"
            raise UserError(f"{path}: another process is at work there; {hint}")
        print(f"{path}: another process is at work there; waiting for it ...")
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            Path(lock.lock_file).unlink()
        lock.release()


def progress_bar(
    total: float | None, done: float = 0, unit: str = "B", hidden: bool = False, **settings
) -> tqdm:
    """Return a progress bar, shown on a terminal and in a notebook; by default it counts bytes."""
    hidden = hidden or not (sys.stderr.isatty() or "ipykernel" in sys.modules)
    settings |= {"total": total, "initial": done, "unit": unit, "disable": hidden}
    return tqdm(unit_scale=unit == "B", leave=unit != "B", **settings)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encoding_of(start: bytes) -> str:
    """Return the encoding of a text by the byte order mark at its start; without one, UTF-8."""
    return next((name for name, marks in MARKS.items() if start.startswith(marks)), "utf-8")


def clean(text: str) -> str:
    """Return the text in Unicode's form NFC, with \\n at line ends, without control characters."""
    # A line end behind <|endoftext|> belongs to the mark, as in a file with the mark on lines.
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace(END_OF_TEXT + "\n", END_OF_TEXT)
    return unicodedata.normalize("NFC", CONTROL.sub("", text))


def read_text(path: Path) -> str:
    """Return the text of a file, cleaned. Raises UserError if it is in an unknown encoding."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    content = path.read_bytes()
    try:
        text = content.decode(encoding_of(content))
    except UnicodeDecodeError as error:
        what = f"byte {error.start} (0x{content[error.start]:02x}) is not {error.encoding}"
        raise UserError(f"{path}: {what}; {CONVERT}") from None
    if "\0" in text:
        raise UserError(f"{path}: byte {content.index(0)} is 0, so this is no UTF-8; {CONVERT}")
    return clean(text)
