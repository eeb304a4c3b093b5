"""What export.py writes, loaded by `transformers`, by `tokenizers`, and by ours again."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import TEXT
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import sample
from configurator import UserError
from model import GPT, GPTConfig
from support.checkpoint import load_checkpoint, save_checkpoint
from support.hub import load_pretrained
from support.tokenizer import BPETokenizer, CharTokenizer
from tools import export

TOKENIZERS = {
    "char": CharTokenizer.from_text(TEXT + "\n\t\r \u00e9\u0301\u3000\U0001f600<|>"),
    "bpe": BPETokenizer.train(
        [TEXT + "the cat's mat, isn't it? \U0001f600\n\n  the end.\n" * 3], 300
    ),
}
V = {kind: tok.vocab_size for kind, tok in TOKENIZERS.items()}


def make_model(kind: str, **changed) -> GPT:
    """A small model whose every parameter, the biases and norms too, is random."""
    torch.manual_seed(0)
    shape = dict(vocab_size=V[kind], block_size=32, n_layer=2, n_head=2, n_embd=16, dropout=0.1)
    model = GPT(GPTConfig(**{**shape, **changed}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def save_run(kind: str, model: GPT) -> None:
    """out/run/ckpt.pt, as train.py would leave it."""
    about = dict(step=1, best_val_loss=2.0, train_config={"init_from": "scratch"}, dataset={})
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    tok = TOKENIZERS[kind].to_dict()
    save_checkpoint(
        Path("out/run/ckpt.pt"), model, tokenizer=tok, optimizers=[optimizer.state_dict()], **about
    )


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """A function: export a model of these tokens and options to the folder `there`; returns the model."""
    monkeypatch.chdir(tmp_path)

    def make(kind: str, **changed) -> GPT:
        model = make_model(kind, **changed)
        save_run(kind, model)
        export.main(export.ExportConfig(out_dir="out/run", to="there"))
        return model

    return make


def some_tokens(kind: str) -> torch.Tensor:
    return torch.randint(0, V[kind], (2, 32), generator=torch.Generator().manual_seed(1))


MODELS = [
    {},
    {"tie_weights": False},
    {"pad_vocab_to": 384},
    {"pad_vocab_to": 384, "tie_weights": False},
]
MODELS.append({"gelu": "exact"})


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("changed", MODELS, ids=str)
def test_ours_to_theirs_to_ours_is_equal_to_the_bit(exported, kind, changed):
    """But for rows that stand for no token, which are not written."""
    ours = exported(kind, **changed)
    again, tok = load_pretrained("there")
    assert tok.to_dict() == TOKENIZERS[kind].to_dict()
    assert asdict(again.config) == {**asdict(ours.config), "pad_vocab_to": 0, "dropout": 0.0}
    before, after = ours.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, w in after.items():
        assert torch.equal(w, before[name][: len(w)])


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("changed", [*MODELS, {"bias": False}], ids=str)
def test_logits_are_those_that_transformers_computes(exported, kind, changed):
    ours, x = exported(kind, **changed), some_tokens(kind)
    theirs, loading = AutoModelForCausalLM.from_pretrained("there", output_loading_info=True)
    assert not any(loading.values())  # no parameter is missing, none is left over
    assert (
        theirs.config.vocab_size == V[kind]
        and theirs.dtype == torch.float32
        and not theirs.training
    )
    torch.testing.assert_close(theirs(x).logits, ours(x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_200_likeliest_tokens_are_those_of_transformers(exported, kind):
    ours = exported(kind, block_size=256)
    theirs, tok = (
        AutoModelForCausalLM.from_pretrained("there"),
        AutoTokenizer.from_pretrained("there"),
    )
    prompt = tok("3 times 4 is ", return_tensors="pt")
    expected = theirs.generate(**prompt, max_new_tokens=200, do_sample=False, eos_token_id=None)
    made = torch.cat(
        [prompt["input_ids"], *ours.generate(prompt["input_ids"], 200, temperature=0)], dim=1
    )
    assert torch.equal(made, expected) and expected.size(1) > 200


def test_theirs_to_ours_to_theirs_has_the_same_bytes(exported):
    exported("bpe", tie_weights=False)
    AutoModelForCausalLM.from_pretrained("there").save_pretrained("theirs")
    AutoTokenizer.from_pretrained("there").save_pretrained("theirs")
    model, tok = load_pretrained("theirs")
    export.write_folder(Path("again"), model, tok)
    first, again = (load_file(Path(folder) / "model.safetensors") for folder in ("there", "again"))
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert Path("again/tokenizer.json").read_bytes() == Path("there/tokenizer.json").read_bytes()


# Tokens


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The exported tokenizers, as `transformers` loads them."""
    loaded = {}
    for kind, tok in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp(kind)
        export.write_folder(folder, make_model(kind), tok)
        loaded[kind] = AutoTokenizer.from_pretrained(folder)
    return loaded


ODD = "  a  b \r\n\n\t\u3000\u00a0\u2028\u200b'll 'S \u00e9e\u0301 \U0001f468\u200d\U0001f469 \x00\x1f\x7f\x85 \ufeff"
PIECES = [
    "<|endoftext|>",
    "<|endoftext|",
    " ",
    "\n",
    "\t",
    "a",
    "'s",
    "12",
    " .",
    " ,",
    "n't",
    "\u00e9",
    "\U0001f600",
]


@given(st.text() | st.text(st.sampled_from(ODD)) | st.lists(st.sampled_from(PIECES)).map("".join))
@example(ODD)
@example(TEXT)
def test_any_text_has_the_same_tokens_and_comes_back(theirs, text):
    ids = theirs["bpe"](text)["input_ids"]
    assert ids == TOKENIZERS["bpe"].encode(text)
    assert theirs["bpe"].decode(ids) == text


@given(st.text())
def test_alone_the_tokenizer_of_a_text_is_that_of_a_document(theirs, text):
    ids = theirs["bpe"](text, split_special_tokens=True)["input_ids"]
    assert ids == TOKENIZERS["bpe"].encode_document(text)[:-1].tolist()


@given(st.text(st.sampled_from(TOKENIZERS["char"].chars)))
def test_any_text_of_known_characters_has_the_same_tokens_and_comes_back(theirs, text):
    ids = theirs["char"](text)["input_ids"]
    assert ids == TOKENIZERS["char"].encode(text)
    assert theirs["char"].decode(ids) == text


def test_an_unknown_character_is_an_error_there_too(theirs):
    with pytest.raises(Exception, match="WordLevel error"):
        theirs["char"]("3 times Z")


def test_no_version_of_transformers_is_to_clean_up_spaces(theirs):
    assert not any(tok.clean_up_tokenization_spaces for tok in theirs.values())


def test_only_a_bpe_vocabulary_has_ends(theirs, exported):
    end = TOKENIZERS["bpe"].end_of_text
    assert (
        theirs["bpe"].eos_token_id == theirs["bpe"].bos_token_id == end
        and len(theirs["bpe"]) == V["bpe"]
    )
    assert theirs["char"].eos_token_id is None and len(theirs["char"]) == V["char"]
    exported("bpe")
    generation = GenerationConfig.from_pretrained("there")
    assert (generation.bos_token_id, generation.eos_token_id) == (end, end)


# The program


def test_weights_only_is_a_third_and_says_the_same(exported, capsys):
    exported("char", n_embd=64)
    export.main(export.ExportConfig(out_dir="out/run", to="small/er", weights_only=True))
    assert "small/er: ckpt.pt\n" in capsys.readouterr().out
    sizes = [Path(folder, "ckpt.pt").stat().st_size for folder in ("out/run", "small/er")]
    assert sizes[1] < 0.4 * sizes[0]
    whole, small = (load_checkpoint(Path(folder) / "ckpt.pt") for folder in ("out/run", "small/er"))
    assert (
        small[1].keys() == whole[1].keys() - {"optimizers"} and small[0].config == whole[0].config
    )
    texts = []
    for folder in ("out/run", "small/er"):
        sample.main(sample.SampleConfig(out_dir=folder, start="3", max_new_tokens=20))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 20


def test_best_weights_of_a_real_run_can_be_exported(tiny_run):
    run = tiny_run()
    export.main(export.ExportConfig(out_dir=str(run), checkpoint="best.pt", to="best"))
    export.main(
        export.ExportConfig(out_dir=str(run), checkpoint="best.pt", to="small", weights_only=True)
    )
    best = load_checkpoint(run / "best.pt")[0].state_dict()
    torch.testing.assert_close(load_pretrained("best")[0].state_dict(), best, rtol=0, atol=0)


def test_nothing_is_written_over(exported):
    exported("char")
    before = {path: path.read_bytes() for path in Path("there").iterdir()}
    for options in (
        {"to": "there"},
        {"to": "there", "weights_only": True},
        {"to": "out/run/ckpt.pt"},
    ):
        with pytest.raises(
            UserError, match=f"to={options['to']}: there is something already; name a new folder"
        ):
            export.main(export.ExportConfig(out_dir="out/run", **options))
    assert {path: path.read_bytes() for path in Path("there").iterdir()} == before
    Path("empty").mkdir()
    export.main(export.ExportConfig(out_dir="out/run", to="empty"))
    assert sorted(path.name for path in Path("empty").iterdir()) == sorted(
        path.name for path in before
    )


def test_a_folder_must_be_named_and_a_checkpoint_there(exported):
    with pytest.raises(UserError, match="to is empty; name the folder"):
        export.ExportConfig()
    exported("char")
    with pytest.raises(UserError, match=r"other\.pt: no such checkpoint"):
        export.main(export.ExportConfig(out_dir="out/run", checkpoint="other.pt", to="new"))
    assert not Path("new").exists()


def test_an_export_that_breaks_off_is_no_model(exported, monkeypatch):
    exported("char")
    written = export.json.dumps

    def fails(content, **options):
        if "model" in content:  # tokenizer.json
            raise OSError("no space left")
        return written(content, **options)

    monkeypatch.setattr(export.json, "dumps", fails)
    with pytest.raises(OSError, match="no space"):
        export.main(export.ExportConfig(out_dir="out/run", to="new"))
    monkeypatch.undo()
    assert not Path("new/config.json").exists()


def test_config_json_is_what_transformers_itself_would_say(exported):
    exported("bpe", tie_weights=False)
    theirs = AutoModelForCausalLM.from_pretrained("there").config.to_dict()
    ours = json.loads(Path("there/config.json").read_bytes())
    assert {name: theirs[name] for name in ours if name != "architectures"} == {
        name: value for name, value in ours.items() if name != "architectures"
    }
    assert (
        ours["n_positions"],
        ours["n_ctx"],
        ours["resid_pdrop"],
        ours["tie_word_embeddings"],
    ) == (32, 32, 0.1, False)
