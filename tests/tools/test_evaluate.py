"""Loss, perplexity and bits per byte against a plain loop over the tokens of a file."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, logged

from configurator import UserError
from model import GPT, GPTConfig
from support.checkpoint import Checkpoint, save_checkpoint
from support.data import write_dataset
from support.tokenizer import BPETokenizer
from tools import evaluate
from tools.evaluate import EvaluateConfig

T = 24  # tokens in the model's context
STORY = f"{TEXT[:200]}caf\u00e9 \u4f60\u597d walked away\n<|endoftext|> is text here.  "


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train([TEXT], 280)


@pytest.fixture
def model(tokenizer, place) -> GPT:
    """A random model, saved in out/tiny with dropout, which evaluation must turn off."""
    torch.manual_seed(0)
    shape = dict(block_size=T, n_layer=1, n_head=2, n_embd=16, dropout=0.5)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    state = dict(train_config={"dataset": "tiny"}, dataset={}, step=1, best_val_loss=2.0)
    checkpoint = Checkpoint(model.config, model.state_dict(), tokenizer.to_dict(), **state)
    save_checkpoint(Path("out/tiny/ckpt.pt"), checkpoint)
    Path("text.txt").write_bytes(STORY.replace("\n", "\r\n").encode())  # cleaned as when preparing
    return model.eval()


@pytest.fixture
def figures(capsys):
    """A function: evaluate with these options; returns the JSON line."""

    def run_main(**options) -> dict:
        capsys.readouterr()
        evaluate.main(EvaluateConfig(**{"out_dir": "out/tiny", "dtype": "float32", **options}))
        *table, line = capsys.readouterr().out.splitlines()
        result = json.loads(line)
        assert [row.split()[0] for row in table] == list(result)
        return result

    return run_main


@torch.no_grad()
def plain_loss(model: GPT, ids: list[int], stride: int) -> float:
    """Return the mean of -ln p. A token is predicted in the first window that contains it."""
    nats = 0.0
    for i in range(1, len(ids)):
        start = stride * max(0, math.ceil((i - T) / stride))
        nats -= model(torch.tensor([ids[start:i]]))[0][0, -1].log_softmax(-1)[ids[i]].item()
    return nats / (len(ids) - 1)


@pytest.mark.parametrize(("stride", "batch_size"), [(1, 3), (11, 1), (11, 1000), (T, 2)])
def test_the_figures_of_a_text(model, tokenizer, figures, stride, batch_size):
    ids = tokenizer.encoding.encode(STORY, allowed_special="all")
    n_bytes = len(STORY.replace("<|endoftext|>", "").encode())
    loss = plain_loss(model, [tokenizer.end_of_text, *ids], stride)
    result = figures(data="text.txt", stride=stride, batch_size=batch_size)
    assert result["tokens"] == len(ids) and result["bytes"] == n_bytes
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    bits = loss * len(ids) / math.log(2) / n_bytes
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_a_line_end_behind_the_mark_and_a_mark_at_the_start_change_nothing(model, figures):
    results = []
    for mark in ("<|endoftext|>", "<|endoftext|>\r\n"):
        Path("a.txt").write_bytes(f"{mark}some text\r\n{mark}more".encode())
        results.append(figures(data="a.txt"))
    Path("a.txt").write_bytes(b"some text\n<|endoftext|>more")
    assert results[0] == results[1] == figures(data="a.txt")


@pytest.mark.parametrize("stride", [1, 3, T])
@pytest.mark.parametrize("length", [1, 2, T - 1, T, T + 1, 2 * T, 2 * T + 1, 100])
def test_every_token_but_the_first_is_predicted_once_and_with_enough_context(length, stride):
    predicted = []
    for x, y in evaluate.batches(np.arange(length + 1), T, stride, batch_size=2):
        for window, targets in zip(x, y, strict=True):
            places = (targets >= 0).nonzero().flatten().tolist()
            assert places and torch.equal(targets[places], window[places] + 1)
            assert window[0] == 0 or places[0] == T - stride
            predicted += targets[places].tolist()
    assert predicted == list(range(1, length + 1))


def test_a_bin_has_the_bytes_of_its_texts_and_the_models_tokenizer(model, tokenizer, figures):
    """val_bytes without the first token. <|endoftext|> has 0 bytes; a character may span tokens."""
    documents = [f"{word} \U0001f642 \u4f60{word}" for word in ("a", "cat", "sat")]
    ids = [int(i) for document in documents for i in tokenizer.encode_document(document)]
    val_bytes = sum(len(document.encode()) for document in documents)
    write_dataset(Path("data/tiny"), tokenizer, ids, ids, val_bytes, {})
    result = figures()
    assert result["data"] == str(Path("data/tiny/val.bin")) and result["tokens"] == len(ids) - 1
    assert result["bytes"] == val_bytes - len(tokenizer.decode_bytes(ids[:1]))
    assert result["loss"] == pytest.approx(plain_loss(model, ids, T), rel=1e-5)
    write_dataset(Path("data/tiny"), BPETokenizer.train(["ab"], 270), [1], [1, 2], 2, {})
    with pytest.raises(UserError, match="not made with the model's tokenizer"):
        figures()


def test_a_pretrained_model_is_scored(model, tokenizer, figures, monkeypatch):
    expected = {**figures(data="text.txt"), "model": "gpt2"}
    monkeypatch.setattr(evaluate, "load_model", {"gpt2": (model, tokenizer, None)}.get)
    assert figures(init_from="gpt2", out_dir="none", data="text.txt") == expected
    with pytest.raises(UserError, match=r"init_from=gpt2 has no val\.bin; name"):
        figures(init_from="gpt2")
    torch.nn.init.constant_(model.transformer.ln_f.weight, 1e38)
    with pytest.raises(UserError, match="loss is not finite"):
        figures(init_from="gpt2", data="text.txt")


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("none.txt", None, {}, "none.txt: no such file"),
        ("none.bin", None, {}, "none.bin: not a .txt or .bin file"),
        ("a.txt", b"", {}, "a.txt: has no text to predict"),
        ("a.bin", b"", {}, "a.bin: 0 bytes are not uint16 token ids"),
        ("a.bin", b"a\0", {}, "a.bin: has no text to predict"),
        ("a.bin", b"abc", {}, "a.bin: 3 bytes are not uint16 token ids"),
        ("a.bin", b"\1\0\xff\xff", {}, "a.bin: token id 65535 is not in the vocabulary"),
        ("text.txt", None, {"stride": T + 1}, f"stride is {T + 1} but must be at most {T}"),
        ("text.txt", None, {"stride": -1}, "stride=-1 must be at least 0"),
    ],
)
def test_mistakes_are_named(model, figures, name, content, options, words):
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(words)}"):
        figures(data=name, **options)


def test_the_loss_on_val_bin_is_the_validation_loss_of_training(tiny_run, figures):
    out_dir = tiny_run(dtype="float32", dropout=0.2)
    val_losses = [r["val_loss"] for r in logged(out_dir) if "val_loss" in r]
    result = figures(out_dir=str(out_dir))
    assert result["loss"] == pytest.approx(val_losses[-1], rel=1e-6)
    Path("val.txt").write_bytes(TEXT[-1 - result["tokens"] :].encode())
    assert figures(out_dir=str(out_dir), data="val.txt") == {**result, "data": "val.txt"}
    meta = Path("data/tiny/meta.json")
    meta.write_bytes(meta.read_bytes().replace(b'"val.bin": "', b'"val.bin": "0'))
    with pytest.raises(UserError, match=r"val\.bin: was prepared again after this run"):
        figures(out_dir=str(out_dir))
