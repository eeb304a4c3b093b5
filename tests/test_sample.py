"""Sampling from a checkpoint."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import sample
from sample import SampleConfig


@pytest.fixture
def run(tiny_run) -> str:
    return str(tiny_run())


def said(capsys, run, **options) -> str:
    capsys.readouterr()
    sample.main(SampleConfig(out_dir=run, **{"max_new_tokens": 40, "start": "3", **options}))
    return capsys.readouterr().out


def test_a_seed_repeats_its_texts_exactly(run, capsys):
    first = said(capsys, run, num_samples=3)
    texts = first.removesuffix("\n").split("\n" + "-" * 80 + "\n")
    assert len(texts) == 3 and len(set(texts)) == 3
    assert all(text.startswith("3") and len(text) == 41 for text in texts)
    assert said(capsys, run, num_samples=3) == first
    assert said(capsys, run, num_samples=3, seed=7) != first


def test_prompt_may_come_from_a_file(run, capsys):
    Path("prompt.txt").write_bytes(b"1 times 1\n")
    assert said(capsys, run, start="FILE:prompt.txt") == said(capsys, run, start="1 times 1\n")


def test_top_k_of_one_and_temperature_zero_are_the_most_likely_text(run, capsys):
    choices = ({"top_k": 1}, {"temperature": 0.0}, {"top_p": 1e-6})
    # in bfloat16 two tokens may be equally likely
    texts = {said(capsys, run, dtype="float32", **choice) for choice in choices}
    assert len(texts) == 1


def test_a_text_ends_where_the_stop_is_complete(run, capsys):
    options = {"temperature": 0.0, "dtype": "float32", "stop": ""}
    whole = said(capsys, run, **options)
    stop = whole[3:6]  # of three tokens
    end = whole.index(stop, 1) + 3
    assert said(capsys, run, **options | {"stop": stop}) == whole[:end] + "\n"


def test_a_character_of_two_tokens_is_printed_when_it_is_complete(monkeypatch, capsys):
    pieces = [b"\xc3", b"\xa9", b"!"]

    class Model(torch.nn.Linear):
        def generate(self, *_, **__):
            return (torch.tensor([[i]]) for i in range(3))

    tokenizer = SimpleNamespace(encode=lambda _: [0], decode_bytes=lambda ids: pieces[ids[0]])
    monkeypatch.setattr(sample, "load_model", lambda *_: (Model(1, 1), tokenizer, {}))
    sample.main(SampleConfig(start="a"))
    assert capsys.readouterr().out == "a\u00e9!\n"


def test_a_reader_that_closes_the_pipe_is_no_error(run):
    options = [f"--out_dir={run}", "--start=3", "--device=cpu", "--max_new_tokens=3000"]
    command = [sys.executable, ROOT / "sample.py", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(5)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141
