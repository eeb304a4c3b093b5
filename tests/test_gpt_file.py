"""docs/gpt.py, the whole in one file, computes what model.py and train.py compute."""

import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import ROOT, logged
from test_layout import imports, parse

import model
import train

PATH = ROOT / "docs" / "gpt.py"


@pytest.fixture
def gpt():
    """The file as a module, with a smaller model."""
    spec = importlib.util.spec_from_file_location("gpt", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 24, "batch_size": 8}
    vars(module).update(shape)
    return module


def options(gpt) -> dict:
    """Return the options of the file that train.py has, too."""
    names = [field.name for field in fields(train.TrainConfig)]
    return {name: vars(gpt)[name] for name in names if name in vars(gpt)}


@pytest.fixture
def both(gpt):
    """Its model and the one of model.py, with the same random weights, biases and norms."""
    shape = {k: v for k, v in options(gpt).items() if k in model.GPTConfig.__annotations__}
    torch.manual_seed(0)
    ours, theirs = gpt.GPT(97), model.GPT(model.GPTConfig(vocab_size=97, **shape))
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    theirs.load_state_dict(ours.state_dict())  # the names are the same
    return ours, theirs


def test_its_model_has_the_logits_and_gradients_of_model_py(gpt, both):
    both = ours, theirs = [each.double() for each in both]
    windows = torch.randint(97, (4, 25))
    x, y = windows[:, :-1], windows[:, 1:]
    factors = torch.randn(4, 24, 97, dtype=torch.double)
    logits = [each(x) if each is ours else each(x)[0] for each in both]
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gpt.mean_loss(ours, windows).float(), theirs(x, y)[1])
    for each in logits:
        (each * factors).sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-8)


def test_it_writes_what_model_py_writes(gpt, both):
    ours, theirs = both
    prompt, texts = torch.randint(97, (2, 5)), []
    torch.manual_seed(1)
    texts.append(gpt.generate(ours, prompt, 60, temperature=0.7))
    torch.manual_seed(1)
    texts.append(torch.cat((prompt, *theirs.generate(prompt, 60, temperature=0.7)), dim=1))
    assert torch.equal(*texts) and texts[0].size(1) == 65


def test_its_losses_are_those_of_train_py_with_the_same_options(gpt, dataset, capsys):
    gpt.max_iters, gpt.warmup_iters = 20, 5
    losses = gpt.main(str(dataset))
    run = dict(dataset="tiny", out_dir="out/tiny", device="cpu", dtype="float32", compile=False)
    same = dict(gradient_accumulation_steps=1, lr_schedule="linear", min_lr=0.0, log_interval=1)
    train.main(train.TrainConfig(**run, **same, **options(gpt)))
    records = logged(Path("out/tiny"))
    expected = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 20 and losses == pytest.approx(expected, rel=1e-6)
    assert losses[0] - losses[-1] > 0.5
    printed = re.findall(r"loss (\d\S+)$", capsys.readouterr().out, re.MULTILINE)[:2]
    val_losses = [record["val_loss"] for record in records if "val_loss" in record]
    assert float(printed[0]) == pytest.approx(losses[0], abs=1e-4)
    # The tokens after the last whole window of val.bin are left out.
    assert float(printed[1]) == pytest.approx(val_losses[-1], abs=0.01)


def test_it_needs_numpy_and_torch_alone_and_says_where_the_text_comes_from(gpt, tmp_path):
    packages = {name.split(".")[0] for name in imports(parse(PATH))}
    assert packages - sys.stdlib_module_names == {"numpy", "torch"}
    with pytest.raises(SystemExit, match="first run: python prepare_shakespeare"):
        gpt.main(str(tmp_path))
