"""Damaged files: each kind of damage ends in one line, or does no harm."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import logged

from configurator import UserError, one_line
from support.log import read_log
from support.pictures import write_report


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


def edit(**changed) -> Callable:
    """Return a damage: other values in a JSON file or checkpoint; None removes a key."""

    def apply(path: Path) -> None:
        is_json = path.suffix == ".json"
        fields = json.loads(path.read_bytes()) if is_json else torch.load(path, weights_only=True)
        fields = {k: v for k, v in (fields | changed).items() if v is not None}
        path.write_text(json.dumps(fields)) if is_json else torch.save(fields, path)

    return apply


def cut(part: float) -> Callable:
    return lambda path: os.truncate(path, int(path.stat().st_size * part))


def write(content: bytes) -> Callable:
    return lambda path: path.write_bytes(content)


def flip(part: float) -> Callable:
    """Return a damage: one bit is flipped at this part of the file."""

    def apply(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(part * len(content))] ^= 1
        path.write_bytes(content)

    return apply


def saved(content: dict) -> Callable:
    """Return a damage: the file has this content, as torch.save writes it."""
    return lambda path: torch.save(content, path)


CHECKPOINT = "ckpt.pt: can not be used as a checkpoint: "
DAMAGES = [
    ("ckpt.pt", cut(0.5), CHECKPOINT + "torch did not write it, or it is cut; a folder in Hugging"),
    ("ckpt.pt", flip(0.6), "a checksum inside is wrong; take another copy of it"),
    ("ckpt.pt", edit(step=Malicious()), CHECKPOINT),
    ("ckpt.pt", edit(format=2), "its format is 2, not 1"),
    ("ckpt.pt", edit(model=None), CHECKPOINT + "'model'"),
    ("ckpt.pt", edit(model_config={"n_head": 3, "n_embd": 16}), CHECKPOINT),
    ("ckpt.pt", saved({"model_args": {}, "iter_num": 3}), "nanogpt; run: python -m tools.import_"),
    ("ckpt.pt", saved({"transformer.wte.weight": torch.ones(1)}), "GPT-2's weights alone"),
    ("ckpt.pt", saved({"state_dict": {}}), "it is of another program, with state_dict"),
    ("ckpt.pt", saved({"hparams": Path()}), "it is of another program, with objects of pathlib"),
    ("meta.json", cut(0.5), "meta.json: "),
    ("meta.json", write(b"[" * 100_000), "meta.json: "),
    ("meta.json", edit(tokenizer=None), "meta.json: has no 'tokenizer'; run a prepare script"),
    ("meta.json", edit(val_bytes=0), "a count is not positive"),
    ("meta.json", edit(train_tokens="many"), "a count is not positive"),
    ("meta.json", edit(sha256=[]), "tokenizer or sha256 is not an object"),
    ("train.bin", cut(0.5), "train.bin: has 6454 bytes, but meta.json says 12908; run a prepare"),
    ("val.bin", write(b"\x12\0" * 718), "val.bin: token id 18 is not in the vocabulary; run a"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGES)
def test_a_damaged_file_ends_a_run_in_one_line(tiny_run, name, damage, words):
    run = tiny_run(max_iters=0)
    damage({"ckpt.pt": run}.get(name, Path("data/tiny")) / name)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UserError) as error:
        tiny_run(init_from="resume")
    assert words in one_line(error.value) and not Path("was-run").exists()
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


LINES = ["nonsense", "3", "null", "[]", "", "\udcff", '{"step": 7}', '{"step": "7", "loss": 1.0}']
LINES += ['{"loss": 1.0}']


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:30])
def test_a_damaged_line_of_a_log_is_left_out_and_never_ends_a_run(tiny_run, line):
    path = tiny_run(max_iters=4, eval_interval=4) / "log.jsonl"
    good, lines = read_log(path), path.read_bytes().splitlines(keepends=True)
    lines.insert(2, line.encode("utf-8", "surrogateescape") + b"\n")
    path.write_bytes(b"".join(lines) + b'{"step": 1')  # and the last line was cut
    assert read_log(path) == good
    write_report(path.parent)
    out_dir = tiny_run(init_from="resume", max_iters=6)
    assert [r["step"] for r in logged(out_dir) if "loss" in r] == list(range(1, 7))
