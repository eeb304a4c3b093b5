"""A checkpoint of nanoGPT becomes one of ours: same logits, same next step, same tokenizer."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import weights

import train
from configurator import UserError
from model import GPT, GPTConfig
from support.checkpoint import build_model, load_checkpoint
from support.data import open_dataset
from support.tokenizer import BPETokenizer, CharTokenizer
from tools.import_nanogpt import ImportConfig, main

SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, dropout=0.0)


def nanogpt(**changed) -> tuple[GPT, torch.optim.Optimizer, dict]:
    """Return a model trained for 5 steps, its optimizer, and the checkpoint that nanoGPT writes."""
    arguments = {**SHAPE, "vocab_size": 18, "bias": True, **changed}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**arguments, gelu="exact"))
    for p in model.transformer.h.parameters():
        p.data.mul_(10)  # with small values both forms of GELU are nearly the same
    matrices = {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1}
    vectors = {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=1e-3, betas=(0.9, 0.95))
    for _ in range(5):
        model(*torch.randint(18, (2, 2, 16)))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs = {"model": {name: w.clone() for name, w in model.state_dict().items()}, "iter_num": 5}
    theirs |= {"optimizer": optimizer.state_dict(), "model_args": arguments}
    theirs |= {"best_val_loss": torch.tensor(2.5), "config": {"dataset": "tiny", **SHAPE}}
    return model, optimizer, theirs


def imported(theirs: dict) -> Path:
    torch.save(theirs, "theirs.pt")
    main(ImportConfig(checkpoint="theirs.pt", out_dir="out/tiny"))
    return Path("out/tiny/ckpt.pt")


@pytest.mark.parametrize("kind", ["plain", "compiled", "with masks", "without biases"])
def test_the_imported_model_gives_the_same_logits(dataset, kind):
    model, _, theirs = nanogpt(bias=kind != "without biases")
    if kind == "compiled":
        theirs["model"] = {f"_orig_mod.{name}": w for name, w in theirs["model"].items()}
    if kind == "with masks":  # nanoGPT without flash attention
        theirs["model"]["transformer.h.1.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    ours, idx = load_checkpoint(imported(theirs)), torch.arange(16)[None]
    assert torch.equal(build_model(ours.shape, ours.weights)(idx)[0], model(idx)[0])
    assert (ours.step, ours.evaluated_step, ours.best_val_loss) == (5, 5, 2.5)
    assert ours.tokenizer == open_dataset(dataset)[1].to_dict()


def test_a_checkpoint_of_build_nanogpt_gives_the_same_logits(dataset, monkeypatch):
    @dataclass
    class TheirConfig:  # pickled by its name
        block_size: int = 16
        vocab_size: int = 18
        n_layer: int = 2
        n_head: int = 2
        n_embd: int = 16

    TheirConfig.__module__, TheirConfig.__qualname__ = "__main__", "GPTConfig"
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", TheirConfig, raising=False)
    model = GPT(GPTConfig(**SHAPE, vocab_size=18))
    theirs = {"model": model.state_dict(), "config": TheirConfig(), "step": 7, "val_loss": 3.0}
    monkeypatch.setattr("tools.import_nanogpt.find_tokenizer", lambda *_: CharTokenizer("abc"))
    ours, idx = load_checkpoint(imported(theirs)), torch.arange(16)[None]
    assert torch.equal(build_model(ours.shape, ours.weights)(idx)[0], model(idx)[0])
    assert ours.step == 7 and ours.optimizers is None


def test_the_next_step_is_that_of_nanogpts_optimizer(tiny_run, dataset):
    model, optimizer, theirs = nanogpt()
    imported(theirs)
    changed = dict(init_from="resume", max_iters=6, learning_rate=1e-3, dtype="float32")
    out_dir = tiny_run(**changed, decay_lr=False, warmup_iters=0, grad_clip=0.0, eval_interval=9)
    config, tokens = train.TrainConfig(**tiny_run.options), open_dataset(dataset)[2]
    batches = train.micro_batches(tokens, config, 16, torch.device("cpu"), range(2), step=5)
    for _ in range(2):
        (model(*next(batches))[1] / 2).backward()
    optimizer.step()
    torch.testing.assert_close(weights(out_dir), dict(model.state_dict()), rtol=1e-5, atol=1e-6)


def test_a_padded_vocabulary_resumes_on_nanogpts_own_token_files(tiny_run, monkeypatch):
    tokens = [bytes([i]) for i in range(256)] + [b"%05d" % i for i in range(50000)]
    gpt2 = BPETokenizer(tokens)  # as many as GPT-2's, without a download
    monkeypatch.setattr(BPETokenizer, "gpt2", lambda: gpt2)
    Path("data/theirs").mkdir()
    for name in ("train.bin", "val.bin"):
        np.array([97, 200, 50256] * 100, dtype=np.uint16).tofile(f"data/theirs/{name}")
    ours = load_checkpoint(imported(nanogpt(vocab_size=50304)[2]))
    expected = GPTConfig(50257, 50304, **SHAPE, gelu="exact"), gpt2.to_dict()
    assert (ours.shape, ours.tokenizer) == expected
    tiny_run(init_from="resume", dataset="theirs", max_iters=6, eval_iters=1)


@pytest.mark.parametrize(
    ("words", "damage"),
    [
        ("it is not nanoGPT's", lambda theirs: theirs.pop("iter_num")),
        ("weights do not fit the shape", lambda theirs: theirs["model"].popitem()),
        ("prepare data/no first", lambda theirs: theirs["config"].update(dataset="no")),
        ("weights_only", lambda theirs: theirs.update(code=main)),
        ("checksum", lambda theirs: theirs["model"]["lm_head.weight"].numpy().tobytes()),
    ],
)
def test_what_can_not_be_imported_ends_in_one_line_and_writes_nothing(dataset, words, damage):
    part, path = damage(theirs := nanogpt()[2]), Path("theirs.pt")
    torch.save(theirs, path)
    if words == "checksum":
        path.write_bytes(path.read_bytes().replace(part, bytes(len(part))))
    with pytest.raises(UserError, match=rf"theirs\.pt: .*{words}") as error:
        main(ImportConfig(checkpoint="theirs.pt", out_dir="out/tiny"))
    assert "\n" not in str(error.value) and not Path("out").exists()


@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt"])
def test_a_folder_with_a_checkpoint_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="has a checkpoint; choose another --out_dir"):
        main(ImportConfig(out_dir=str(tmp_path)))
