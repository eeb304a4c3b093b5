"""Exported folders, loaded by `transformers`, by `tokenizers` and by our own loader."""

import errno
import json
import os
import re
from configurator import UserError
from contextlib import contextmanager
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
from model import GPT, GPTConfig
from support import hub
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
V = {kind: tokenizer.vocab_size for kind, tokenizer in TOKENIZERS.items()}


def make_model(kind: str, **changed) -> GPT:
    """Return a small model with random parameters, biases and norms included."""
    torch.manual_seed(0)
    shape = dict(vocab_size=V[kind], block_size=32, n_layer=2, n_head=2, n_embd=16, dropout=0.1)
    model = GPT(GPTConfig(**{**shape, **changed}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def save_run(kind: str, model: GPT) -> None:
    """Write out/run/ckpt.pt as train.py does."""
    about = dict(step=1, best_val_loss=2.0, train_config={"init_from": "scratch"}, dataset={})
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    tokenizer = TOKENIZERS[kind].to_dict()
    state = dict(evaluated_step=1, optimizers=[optimizer.state_dict()], scaler={})
    save_checkpoint(Path("out/run/ckpt.pt"), model, tokenizer=tokenizer, **about, **state)


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """A function: export a model with these options to the folder `there`; returns the model."""
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
def test_an_exported_model_loads_again_with_the_same_bits(exported, kind, changed):
    """Except for rows of padding, which are not written."""
    ours = exported(kind, **changed)
    again, tokenizer = load_pretrained("there")
    assert tokenizer.to_dict() == TOKENIZERS[kind].to_dict()
    assert asdict(again.config) == {**asdict(ours.config), "pad_vocab_to": 0, "dropout": 0.0}
    before, after = ours.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, w in after.items():
        assert torch.equal(w, before[name][: len(w)])


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("changed", [*MODELS, {"bias": False}], ids=str)
def test_transformers_computes_the_same_logits(exported, kind, changed):
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
def test_transformers_generates_the_same_greedy_tokens(exported, kind):
    ours = exported(kind, block_size=256)
    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained("there"),
        AutoTokenizer.from_pretrained("there"),
    )
    prompt = tokenizer("3 times 4 is ", return_tensors="pt")
    expected = theirs.generate(**prompt, max_new_tokens=200, do_sample=False, eos_token_id=None)
    made = torch.cat(
        [prompt["input_ids"], *ours.generate(prompt["input_ids"], 200, temperature=0)], dim=1
    )
    assert torch.equal(made, expected) and expected.size(1) > 200


def test_a_folder_that_transformers_wrote_again_exports_to_the_same_bytes(exported):
    exported("bpe", tie_weights=False)
    AutoModelForCausalLM.from_pretrained("there").save_pretrained("theirs")
    AutoTokenizer.from_pretrained("there").save_pretrained("theirs")
    model, tokenizer = load_pretrained("theirs")
    hub.write_folder(Path("again"), model, tokenizer)
    first, again = (load_file(Path(folder) / "model.safetensors") for folder in ("there", "again"))
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert Path("again/tokenizer.json").read_bytes() == Path("there/tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The exported tokenizers, as `transformers` loads them."""
    loaded = {}
    for kind, tokenizer in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp(kind)
        hub.write_folder(folder, make_model(kind), tokenizer)
        loaded[kind] = AutoTokenizer.from_pretrained(folder)
    return loaded


ODD = "  a  b \r\n\n\t\u3000\u00a0\u2028\u200b'll 'S \u00e9e\u0301 \U0001f468\u200d\U0001f469 "
ODD += "\x00\x1f\x7f\x85 \ufeff"
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
def test_any_text_has_the_same_ids_in_transformers_and_decodes_to_itself(theirs, text):
    ids = theirs["bpe"](text)["input_ids"]
    assert ids == TOKENIZERS["bpe"].encode(text)
    assert theirs["bpe"].decode(ids) == text


@given(st.text())
def test_a_document_has_the_same_ids_in_transformers(theirs, text):
    ids = theirs["bpe"](text, split_special_tokens=True)["input_ids"]
    assert ids == TOKENIZERS["bpe"].encode_document(text)[:-1].tolist()


@given(st.text(st.sampled_from(TOKENIZERS["char"].chars)))
def test_any_known_characters_have_the_same_ids_in_transformers_and_decode_to_themselves(
    theirs, text
):
    ids = theirs["char"](text)["input_ids"]
    assert ids == TOKENIZERS["char"].encode(text)
    assert theirs["char"].decode(ids) == text


def test_an_unknown_character_is_an_error_in_transformers_too(theirs):
    with pytest.raises(Exception, match="WordLevel error"):
        theirs["char"]("3 times Z")


def test_transformers_keeps_spaces_when_it_decodes(theirs):
    assert not any(tokenizer.clean_up_tokenization_spaces for tokenizer in theirs.values())


def test_a_bpe_vocabulary_has_an_end_token_and_characters_have_none(theirs, exported):
    end = TOKENIZERS["bpe"].end_of_text
    assert (
        theirs["bpe"].eos_token_id == theirs["bpe"].bos_token_id == end
        and len(theirs["bpe"]) == V["bpe"]
    )
    assert theirs["char"].eos_token_id is None and len(theirs["char"]) == V["char"]
    exported("bpe")
    generation = GenerationConfig.from_pretrained("there")
    assert (generation.bos_token_id, generation.eos_token_id) == (end, end)


def test_weights_only_writes_a_third_of_the_bytes_that_samples_the_same(exported, capsys):
    exported("char", n_embd=64)
    export.main(export.ExportConfig(out_dir="out/run", to="small/er", weights_only=True))
    assert "small/er: ckpt.pt\n" in capsys.readouterr().out
    sizes = [Path(folder, "ckpt.pt").stat().st_size for folder in ("out/run", "small/er")]
    assert sizes[1] < 0.4 * sizes[0]
    whole, small = (load_checkpoint(Path(folder) / "ckpt.pt") for folder in ("out/run", "small/er"))
    assert (
        small[1].keys() == whole[1].keys() - {"optimizers", "scaler", "evaluated_step"}
        and small[0].config == whole[0].config
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


def test_existing_files_are_never_overwritten(exported):
    exported("char")
    before = {path: path.read_bytes() for path in Path("there").iterdir()}
    for options in (
        {"to": "there"},
        {"to": "there", "weights_only": True},
        {"to": "out/run/ckpt.pt"},
    ):
        with pytest.raises(
            UserError,
            match=f"to={options['to']}: exists and is not an empty folder; name a new folder",
        ):
            export.main(export.ExportConfig(out_dir="out/run", **options))
    assert {path: path.read_bytes() for path in Path("there").iterdir()} == before
    Path("empty").mkdir()
    export.main(export.ExportConfig(out_dir="out/run", to="empty"))
    assert sorted(path.name for path in Path("empty").iterdir()) == sorted(
        path.name for path in before
    )


def test_a_missing_folder_name_or_checkpoint_is_named(exported):
    with pytest.raises(UserError, match="to is empty; name the folder"):
        export.ExportConfig()
    exported("char")
    with pytest.raises(UserError, match=r"other\.pt: no such checkpoint"):
        export.main(export.ExportConfig(out_dir="out/run", checkpoint="other.pt", to="new"))
    assert not Path("new").exists()


@contextmanager
def largest_file(size: int):
    """Inside, the system refuses to write a file beyond `size` bytes."""
    resource = pytest.importorskip("resource")  # Windows does not have it
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("weights_only", "name"), [(False, "model.safetensors"), (True, "ckpt.pt")]
)
def test_a_failed_write_names_the_file_and_the_bytes(exported, weights_only, name):
    exported("char", n_embd=64)
    options = export.ExportConfig(out_dir="out/run", to="new", weights_only=weights_only)
    with largest_file(100_000), pytest.raises(UserError) as error:
        export.main(options)
    words = rf"new/{name}: can not be written \(File too large\); [\d,]{{7}} bytes are needed"
    assert re.match(words, str(error.value))
    assert "\n" not in str(error.value) and not list(Path("new").iterdir())


def test_an_export_that_fails_half_way_is_not_taken_for_a_model(exported, monkeypatch):
    exported("char")
    replace = os.replace

    def fail(temporary, path):
        if path.name == "tokenizer.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=r"tokenizer.json: can not be written \(No space"):
        export.main(export.ExportConfig(out_dir="out/run", to="new"))
    assert Path("new/model.safetensors").exists() and not Path("new/config.json").exists()


def test_config_json_is_what_transformers_makes_of_it(exported):
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
