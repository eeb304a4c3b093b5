"""Exported folders, loaded by `transformers` and by our own loader."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TEXT
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2LMHeadModel

import sample
from configurator import UserError
from model import GPT, GPTConfig
from support import hub
from support.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from support.tokenizer import BPETokenizer, CharTokenizer
from tools import export

pytestmark = pytest.mark.usefixtures("place")
ODD = " a  b\r\n\n\t\u3000\xa0\u2028'll 'S n't . ,\xe9e\u0301 \u4f60\U0001f468\u200d\U0001f469 "
OURS = {
    "char": CharTokenizer.from_text(TEXT + ODD + "<|endoftext|>"),
    "bpe": BPETokenizer.train([TEXT + "the cat's mat, isn't it? \U0001f600\n\n  the end.\n"], 300),
}


def save_run(kind: str, **changed) -> GPT:
    """Write out/run/ckpt.pt as train.py does, with random biases and norms; return the model."""
    torch.manual_seed(0)
    shape = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.1} | changed
    model = GPT(GPTConfig(OURS[kind].vocab_size, **shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    fields = (model.config, model.state_dict(), OURS[kind].to_dict(), {}, {}, 1, 2.0, 1)
    saved = Checkpoint(*fields, optimizers=[optimizer.state_dict()], scaler={})
    save_checkpoint(Path("out/run/ckpt.pt"), saved)
    return model


def write(to: str, **options) -> None:
    export.main(export.ExportConfig(out_dir="out/run", to=to, **options))


SHAPES = [{}, {"tie_weights": False, "pad_vocab_to": 384}]
SHAPES += [{"gelu": "exact", "bias": False, "pad_vocab_to": 384}]


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("changed", SHAPES, ids=str)
def test_transformers_and_we_load_the_same_model_from_an_exported_folder(kind, changed):
    ours, V = save_run(kind, **changed), OURS[kind].vocab_size
    write("there")
    theirs, report = AutoModelForCausalLM.from_pretrained("there", output_loading_info=True)
    assert not any(report.values())  # every parameter, and no other
    c, end = theirs.config, getattr(OURS[kind], "end_of_text", None)
    assert (c.vocab_size, c.n_ctx, c.resid_pdrop, c.eos_token_id) == (V, 32, 0.1, end)
    assert GenerationConfig.from_pretrained("there").eos_token_id == end
    x = torch.randint(0, V, (2, 32), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(theirs(x).logits, ours(x)[0], rtol=1e-4, atol=1e-4)

    again, tokenizer = hub.load_model("there")[:2]
    assert tokenizer.to_dict() == OURS[kind].to_dict()
    assert again.config == replace(ours.config, pad_vocab_to=0, dropout=0.0, bias=True)
    for name, w in ours.state_dict().items():  # rows of padding are not written
        assert torch.equal(again.state_dict()[name], w[: len(again.state_dict()[name])])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The exported tokenizers, as `transformers` loads them."""
    folder, loaded = tmp_path_factory.mktemp("exported"), {}
    for kind, ours in OURS.items():
        model = GPT(GPTConfig(ours.vocab_size, block_size=8, n_layer=1, n_head=1, n_embd=8))
        export.write_folder(folder / kind, model, ours)
        loaded[kind] = AutoTokenizer.from_pretrained(folder / kind)
    return loaded


@given(st.text() | st.text(st.sampled_from(ODD)))
@example("3 times Z")
@example(TEXT + "<|endoftext|>" + ODD)
def test_any_text_has_the_same_ids_in_transformers_and_decodes_to_itself(theirs, text):
    for kind, ours in OURS.items():
        if kind == "bpe" or {*text} <= {*ours.chars}:
            ids = theirs[kind](text)["input_ids"]
            assert ids == ours.encode(text) and theirs[kind].decode(ids) == text
        else:
            with pytest.raises(Exception, match="WordLevel error"):
                theirs[kind](text)


@pytest.mark.parametrize("to", ["empty", "a/new"])
def test_an_export_appears_complete_or_not_at_all(monkeypatch, to):
    def fail(model, folder):
        Path(folder).mkdir()
        Path(folder, "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    save_run("char")
    Path("empty").mkdir()
    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"^{to}: can not be writ"):
        patch.setattr(GPT2LMHeadModel, "save_pretrained", fail)
        write(to)
    assert not [*Path().rglob("*.safetensors")]
    write(to)
    assert {"config.json", "tokenizer.json"} < {path.name for path in Path(to).iterdir()}
    assert len([*Path(to).parent.iterdir()]) == (1 if to == "a/new" else 2)  # no leftovers


def test_existing_files_are_never_overwritten():
    save_run("char")
    Path("full").mkdir()
    Path("full/mine").write_text("1")
    for options in ({"to": "full"}, {"to": "full", "weights_only": True}, {"to": "full/mine"}):
        with pytest.raises(UserError, match="exists and is not an empty folder; name a new"):
            write(**options)
    assert [path.read_text() for path in Path("full").iterdir()] == ["1"]
    for options, words in [({"to": ""}, "to is empty"), ({"checkpoint": "x.pt"}, "no such check")]:
        with pytest.raises(UserError, match=words):
            write(**{"to": "new", **options})
    assert not Path("new").exists()


def test_weights_only_samples_the_same_and_has_no_optimizer(capsys, monkeypatch):
    save_run("char")
    monkeypatch.setattr(hub, "import_transformers", lambda: pytest.fail("it is not needed"))
    write("small/er", weights_only=True)
    assert "small/er: ckpt.pt\n" in capsys.readouterr().out
    whole, small = (load_checkpoint(Path(run, "ckpt.pt")) for run in ("out/run", "small/er"))
    assert replace(whole, weights={}, optimizers=None, scaler=None) == replace(small, weights={})
    assert whole.optimizers and small.optimizers is None
    texts = []
    for run in ("out/run", "small/er"):
        sample.main(sample.SampleConfig(out_dir=run, start="3", max_new_tokens=20))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 20
