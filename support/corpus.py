"""From documents to token files: drop short and repeated ones, and write train.bin and val.bin.

`Writer` appends to files called NAME.part. progress.json says how many bytes of each file count.
So the work can be interrupted: the next run cuts off what was written after the last save.
"""

import hashlib
import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from configurator import UserError
from support.data import TOKEN, write_meta
from support.files import atomic_write, progress_bar, replace
from support.formats import read_documents
from support.tokenizer import BPETokenizer

SAVE_BYTES = 10_000_000  # save after a file if there is so much new text: a save takes time
BINS = ("train.bin", "val.bin")
PARTS = (*BINS, "seen")  # seen: the hash of every document, 8 bytes each


def hash_document(text: bytes, val_fraction: float) -> tuple[int, bool]:
    """Return 64 bits of BLAKE2 and, decided by them alone, whether the text is for validation."""
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return number, number < val_fraction * 2**64


@dataclass
class Progress:
    """The content of progress.json: what is done of an unfinished data set."""

    options: dict  # the options that decide the content; the next run must have the same
    tokenizer: dict  # its to_dict()
    shards: int = 0  # number of files that are done
    complete: bool = False  # only the renaming of the files is left
    text_bytes: int = 0
    val_bytes: int = 0
    counts: Counter = field(default_factory=Counter)  # documents that were read, kept, ...
    lengths: dict = field(default_factory=lambda: dict.fromkeys(PARTS, 0))  # valid bytes


def load_progress(folder: Path, options: dict) -> Progress | None:
    """Return the progress of an interrupted run with the same options; None if there is none.

    Input files that are not done may have changed since: an error in one of them was corrected.
    """
    path = folder / "progress.json"
    try:
        progress = Progress(**json.loads(path.read_bytes()))
        done = None if progress.complete else progress.shards
        then, now = (
            {k: v[:done] if type(v) is list else v for k, v in o.items()}
            for o in (progress.options, options)
        )
        progress.counts = Counter(progress.counts)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError):
        again = f"remove {path} to start again"
        raise UserError(f"{path}: damaged, or of an earlier version; {again}") from None
    check_options(folder, then, now, path)
    progress.options = options
    return progress


def check_options(folder: Path, then: dict, now: dict, path: Path) -> None:
    """Raise UserError if a data set was made with other options. Hours of work are not replaced."""
    if changed := [name for name, value in now.items() if then.get(name) != value]:
        what = f"{folder} was prepared with other values of {', '.join(changed)}"
        raise UserError(f"{what}; use another --dataset, or remove {path} to start again")


class Writer:
    """Appends shard after shard to an unfinished data set, up to `limit` bytes of text."""

    def __init__(self, folder: Path, progress: Progress, limit: float, n_threads: int) -> None:
        self.folder, self.progress, self.limit = folder, progress, limit
        self.n_threads = n_threads or os.cpu_count()
        folder.mkdir(parents=True, exist_ok=True)
        self.files = {name: open(folder / f"{name}.part", "ab") for name in PARTS}  # noqa: SIM115
        for name, file in self.files.items():
            if file.tell() < progress.lengths[name]:
                raise UserError(f"{file.name} is shorter than in progress.json; remove the latter")
            file.seek(progress.lengths[name])
            file.truncate()
        # The hashes take some 100 bytes each: 0.25 GB for 12 GB of OpenWebText.
        self.seen = set(np.fromfile(folder / "seen.part", dtype="<u8").tolist())
        self.save()

    def add_shard(self, path: Path, tokenizer: BPETokenizer) -> None:
        """Append a file's documents, tokenized, up to `limit`. Saves if SAVE_BYTES are new."""
        progress, waiting = self.progress, deque()  # of documents, in order
        bar = progress_bar(self.limit, progress.text_bytes)

        def encode(text: str) -> bytes:
            return tokenizer.encode_document(text).astype(TOKEN).tobytes()

        with bar, ThreadPoolExecutor(self.n_threads) as pool:  # tiktoken releases Python's lock
            for file, text in self.keep_documents(path):
                waiting.append((file, pool.submit(encode, text)))
                if len(waiting) > 4 * self.n_threads:
                    first, ids = waiting.popleft()
                    first.write(ids.result())
                bar.update(progress.text_bytes - bar.n)
            for file, ids in waiting:
                file.write(ids.result())
        progress.shards += 1
        new, seconds = progress.text_bytes - self.saved_bytes, time.perf_counter() - self.saved_at
        if progress.text_bytes >= self.limit or new >= SAVE_BYTES:
            self.save()
            done = f"{progress.text_bytes / 1e6:,.1f} MB of text so far"
            print(f"{path.name}: {done}, {new / 1e6 / seconds:.1f} MB/s")

    def keep_documents(self, path: Path) -> Iterator[tuple[BinaryIO, str]]:
        """Yield the documents to keep, up to `limit`, and the file for their tokens. Count all."""
        progress, options = self.progress, self.progress.options
        for text in read_documents(path, options["column"], progress.counts):
            progress.counts["read"] += 1
            encoded = text.encode()
            number, for_val = hash_document(encoded, options["val_fraction"])
            if len(text) < options["min_chars"]:
                progress.counts["dropped: shorter than min_chars"] += 1
            elif number in self.seen:
                progress.counts["dropped: the same as an earlier one"] += 1
            else:
                progress.counts["kept for validation" if for_val else "kept for training"] += 1
                progress.text_bytes += len(encoded)
                progress.val_bytes += len(encoded) * for_val
                self.seen.add(number)
                self.files["seen"].write(number.to_bytes(8, "little"))
                yield self.files["val.bin" if for_val else "train.bin"], text
            if progress.text_bytes >= self.limit:
                break

    def complete(self, tokenizer: BPETokenizer) -> None:
        """Correct the share of validation, if it is off by over a quarter, and save.

        A document's hash decides where it goes, so few or very long documents give any share: then
        one file's last tokens move to the other. Raises UserError if there is no text at all.
        """
        train, val = self.files["train.bin"], self.files["val.bin"]
        n_train, n_val = (file.tell() // TOKEN.itemsize for file in (train, val))
        total = n_train + n_val
        wanted = min(max(1, round(self.progress.options["val_fraction"] * total)), total - 1)
        if total > 1 and abs(n_val - wanted) > wanted / 4:
            source, target = (train, val) if n_val < wanted else (val, train)
            end = source.tell() - abs(n_val - wanted) * TOKEN.itemsize
            source.flush()
            ids = np.fromfile(source.name, dtype=TOKEN, offset=end)
            target.write(ids.tobytes())
            text = tokenizer.decode_bytes(ids[ids != tokenizer.end_of_text].tolist())
            self.progress.val_bytes += len(text) if target is val else -len(text)
            source.seek(end)  # `finish` cuts the file off there, after this is saved
        self.progress.complete = True
        self.save()

    def save(self) -> None:
        """Record on the disk what is done."""
        progress = self.progress
        for name, file in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            progress.lengths[name] = file.tell()
            if progress.complete:
                file.close()  # Windows can not rename an open file
        if progress.complete and not all(progress.lengths[name] for name in BINS):
            (self.folder / "progress.json").unlink()
            read = "; ".join(f"{n:,} {what}" for what, n in progress.counts.items() if n)
            raise UserError(f"no text is left for {self.folder} ({read}); lower --min_chars?")
        with atomic_write(self.folder / "progress.json") as file:
            file.write(json.dumps(vars(progress)).encode())
        self.saved_at, self.saved_bytes = time.perf_counter(), progress.text_bytes


def finish(folder: Path, progress: Progress, tokenizer: BPETokenizer) -> None:
    """Give the complete files their names and write meta.json. Can be repeated after a kill."""
    (folder / "meta.json").unlink(missing_ok=True)  # an old one would describe the new files
    for path in (folder / "train.bin.part", folder / "val.bin.part"):
        if path.exists():
            os.truncate(path, progress.lengths[path.stem])
            replace(path, folder / path.stem)
    done = {"text_bytes": progress.text_bytes, "documents": progress.counts}
    write_meta(folder, tokenizer, progress.val_bytes, progress.options | done)
    for name in ("progress.json", "seen.part"):
        (folder / name).unlink(missing_ok=True)
