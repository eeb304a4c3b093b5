"""Checkpoints: what is written, what is read, and models from their weights."""

import math
from dataclasses import replace

import pytest
import torch

import sample
from configurator import UserError
from model import GPT, GPTConfig
from support.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint

SHAPE = GPTConfig(vocab_size=18, block_size=16, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    weights, moments = GPT(SHAPE).state_dict(), [{"state": {0: {"exp_avg": torch.ones(3)}}}]
    fields = ({"kind": "char", "chars": "ab"}, {"seed": 1}, {"train.bin": "0f"}, 7, 1.5, 6)
    return Checkpoint(SHAPE, weights, *fields, moments, {"scale": 2.0})


def test_a_checkpoint_is_read_as_it_was_written(checkpoint, tmp_path):
    for written in (checkpoint, replace(checkpoint, optimizers=None, scaler=None)):
        save_checkpoint(tmp_path / "ckpt.pt", written)
        read = load_checkpoint(tmp_path / "ckpt.pt")
        assert read.shape == SHAPE and list(read.weights) == list(checkpoint.weights)
        for name, w in read.weights.items():
            assert torch.equal(w, checkpoint.weights[name])
        assert str(replace(read, weights={})) == str(replace(written, weights={}))


def test_a_file_has_plain_values_and_the_names_of_earlier_versions(checkpoint, tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    fields = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert fields["format"] == 1 and fields["model_config"]["n_embd"] == 16
    assert fields["model"].keys() == checkpoint.weights.keys()
    assert fields["versions"]["torch"] == torch.__version__
    more = {"another": 1} | {k: v for k, v in fields.items() if k != "evaluated_step"}
    torch.save(more, tmp_path / "ckpt.pt")  # a later version may add a field, an earlier lack one
    assert load_checkpoint(tmp_path / "ckpt.pt").evaluated_step == -1


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_has_a_copy_of_the_weights_in_float32_and_a_tied_head(tied):
    shape = replace(SHAPE, tie_weights=tied)
    source = GPT(shape)
    half = {name: w.bfloat16() for name, w in source.state_dict().items()}
    model = build_model(shape, half)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert (model.lm_head.weight is model.transformer.wte.weight) is tied
    for name, w in model.state_dict().items():
        torch.testing.assert_close(w, half[name].float(), rtol=0, atol=0)
    exact = build_model(shape, source.state_dict())
    with torch.no_grad():
        exact.transformer.wpe.weight.zero_()
    assert source.transformer.wpe.weight.any()  # not the same memory


@pytest.mark.parametrize(
    ("shape", "change", "words"),
    [
        ({}, {"lm_head.weight": torch.full((18, 16), math.nan)}, "not all of them are finite"),
        ({}, {"transformer.wpe.weight": None}, "do not fit the shape"),
        ({}, {"another": torch.zeros(2)}, "do not fit the shape"),
        ({"n_embd": 32}, {}, "size mismatch"),
        ({"n_layer": 10**9}, {}, "do not fit the shape"),  # at once, and with little memory
        ({"n_embd": 200_000, "block_size": 1 << 40}, {}, "do not fit the shape"),
    ],
    ids=["NaN", "a missing one", "one too many", "width", "layers", "huge"],
)
def test_weights_that_do_not_fit_are_refused(checkpoint, shape, change, words):
    weights = {k: w for k, w in (checkpoint.weights | change).items() if w is not None}
    with pytest.raises(UserError, match=words):
        build_model(replace(SHAPE, tie_weights=False, **shape), weights)


def test_weights_that_are_not_finite_are_not_saved(checkpoint, tmp_path):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, checkpoint)
    before = path.read_bytes()
    checkpoint.weights["transformer.wpe.weight"][3, 3] = math.inf
    with pytest.raises(UserError, match="not saved, the weights are not finite"):
        save_checkpoint(path, checkpoint)
    assert path.read_bytes() == before


def test_weights_alone_can_not_be_resumed_but_sampled(tiny_run, capsys):
    out_dir = tiny_run(max_iters=1)
    (out_dir / "best.pt").replace(out_dir / "ckpt.pt")
    with pytest.raises(UserError, match="has no optimizer state, so it can be sampled from but"):
        tiny_run(init_from="resume")
    capsys.readouterr()
    sample.main(sample.SampleConfig(out_dir=str(out_dir), start="3", max_new_tokens=4))
    assert len(capsys.readouterr().out) == 6
