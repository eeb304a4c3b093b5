"""Models that `transformers` and `tokenizers` wrote, loaded here."""

import json
import socket
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
import tokenizers
import torch
from conftest import TEXT
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from configurator import UserError
from support.checkpoint import Checkpoint, save_checkpoint
from support.hub import EMBEDDING, HEAD, REVISIONS, load_model
from support.tokenizer import END_OF_TEXT, from_dict
from tools.export import write_folder

THEIRS = tokenizers.ByteLevelBPETokenizer()
THEIRS.train_from_iterator([TEXT], vocab_size=285, show_progress=False)
THEIRS.add_special_tokens(["<|endoftext|>"])
V = THEIRS.get_vocab_size()
ODD = "  It's a\t\r\n\n \u3000'LL e\u0301\xe9\x00\x85\u4f60\u597d \U0001f468\u200d\U0001f469 x\n"


def make_folder(folder: Path, **changed) -> GPT2LMHeadModel:
    """Save a GPT-2 with random parameters, biases included, as `transformers` saves it."""
    torch.manual_seed(0)
    shape = {"vocab_size": V, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}
    hf = GPT2LMHeadModel(GPT2Config(**shape | changed)).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    hf.save_pretrained(folder)
    torch.save(hf.state_dict(), folder / "pytorch_model.bin")  # never read
    THEIRS.save(str(folder / "tokenizer.json"))
    # With this class transformers takes tokenizer.json as it is.
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    return hf


def edit(path: Path, change) -> None:
    """Change a file: its values (a dict or a function), its bytes, or remove it (None)."""
    if change is None or isinstance(change, bytes):
        return path.unlink() if change is None else path.write_bytes(change)
    is_json = path.suffix == ".json"
    values = json.loads(path.read_bytes()) if is_json else load_file(path)
    values.update(change) if isinstance(change, dict) else change(values)
    if is_json:
        path.write_text(json.dumps(values), encoding="utf-8")
    else:
        save_file(values, path, {"format": "pt"})


def add_token(name: str):
    token = {"id": V, "content": name}
    return lambda values: values["added_tokens"].append(values["added_tokens"][0] | token)


@pytest.fixture
def folder(place, monkeypatch) -> Path:
    """A small GPT-2 in the folder `theirs` of the current directory, and no network."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it needs a network"))
    make_folder(Path("theirs"))
    return Path("theirs")


SHAPES = [
    {"activation_function": "gelu_pytorch_tanh", "vocab_size": V + 18},  # rows of padding
    {"activation_function": "gelu", "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 7},
    {"tie_word_embeddings": False, "vocab_size": V + 18},
]


@pytest.mark.parametrize("changed", SHAPES, ids=str)
def test_logits_and_token_ids_equal_those_of_transformers(folder, changed):
    theirs = make_folder(folder, **changed)
    if "vocab_size" in changed:
        edit(folder / "tokenizer.json", add_token("[PAD]"))  # no text contains it
    ours, tokenizer, _ = load_model("theirs")
    c = ours.config
    assert (tokenizer.vocab_size, c.vocab_size, c.dropout) == (V, V, 0)
    assert c.pad_vocab_to == (V + 18 if "vocab_size" in changed else 0)
    assert c.tie_weights == changed.get("tie_word_embeddings", True)
    x = torch.randint(0, V, (2, c.block_size), generator=torch.Generator().manual_seed(1))
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in ours.parameters())
    torch.testing.assert_close(ours(x)[0], theirs(x).logits[..., :V], rtol=1e-4, atol=1e-4)
    for text in (TEXT, ODD, ODD[::-1], "a <|endoftext|> b"):
        assert tokenizer.encode(text) == THEIRS.encode(text).ids


@pytest.mark.parametrize("last", [[], ["<|im_start|>", "<|im_end|>"]], ids=str)
@pytest.mark.parametrize(
    "first", [[], ["<|endoftext|>"], ["<pad>", "<|endoftext|>", "<s>"]], ids=str
)
def test_special_tokens_may_have_any_ids(folder, first, last):
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([TEXT], vocab_size=285, show_progress=False, special_tokens=first)
    theirs.add_special_tokens(last)
    make_folder(folder, vocab_size=theirs.get_vocab_size())
    theirs.save(str(folder / "tokenizer.json"))
    text = TEXT + ODD + "a".join(["", *first, *last, ""])
    model, ours, _ = load_model("theirs")
    write_folder(Path("again"), model, ours)
    saved = from_dict(json.loads(json.dumps(ours.to_dict())))
    for tokenizer in (ours, saved, load_model("again")[1]):
        assert tokenizer.encode(text) == theirs.encode(text).ids
        assert tokenizer.vocab_size == theirs.get_vocab_size()
        assert tokenizer.end_of_text == (first.index(END_OF_TEXT) if first else None)


def test_weights_of_old_files_give_the_same_model(folder):
    def change(stored: dict) -> None:
        for name in list(stored):
            stored[name.removeprefix("transformer.")] = stored.pop(name)
        for i in range(2):  # causal masks
            stored[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
            stored[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        stored[HEAD] = stored["wte.weight"].clone()

    before = load_model("theirs")[0].state_dict()
    edit(folder / "model.safetensors", change)
    edit(folder / "config.json", {"auto_map": {"AutoConfig": "code.Config"}})  # never run
    torch.testing.assert_close(load_model("theirs")[0].state_dict(), before, rtol=0, atol=0)


TOKENIZER = "its tokenizer is not like GPT-2's"
REFUSED = [  # file, what is changed, words of the error
    ("config", {"activation_function": "relu"}, "activation_function is 'relu', not 'gelu_new' or"),
    ("config", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06, not 1e-05"),
    ("config", {"scale_attn_weights": False}, "scale_attn_weights is False, not True"),
    ("config", {"scale_attn_by_inverse_layer_idx": True}, "layer_idx is True, not False"),
    ("config", {"add_cross_attention": True}, "add_cross_attention is True, not False"),
    ("config", {"quantization_config": {"bits": 4}}, "config is {'bits': 4}, not None"),
    ("config", {"model_type": "llama"}, "model_type is 'llama', not 'gpt2'"),
    ("config", {"n_inner": 100}, "mismatched_keys in the weights: ('transformer.h.0.mlp.c_fc.b"),
    ("config", {"n_layer": 3}, "missing_keys in the weights: transformer.h.2."),
    ("config", {"tie_word_embeddings": False}, f"missing_keys in the weights: {HEAD}"),
    ("config", b"{", "config.json"),
    ("model", {"more": torch.zeros(1)}, "unexpected_keys in the weights: more"),
    ("model", {"transformer.ln_f.bias": torch.full((16,), torch.nan)}, "finite"),
    ("model", {HEAD: torch.zeros(V, 16)}, f"{HEAD} is not {EMBEDDING}"),
    ("model", None, "no file named model.safetensors"),  # only a pickle is there
    ("tokenizer", None, "tokenizer"),
    ("tokenizer", lambda t: t["model"]["merges"].reverse(), TOKENIZER),
    ("tokenizer", lambda t: t["pre_tokenizer"].update(add_prefix_space=True), TOKENIZER),
    ("tokenizer", {"normalizer": {"type": "NFC"}}, TOKENIZER),
    ("tokenizer", {"pre_tokenizer": None}, TOKENIZER),
]


@pytest.mark.parametrize(("file", "change", "words"), REFUSED)
def test_what_gpt_would_compute_otherwise_is_refused_in_one_line(folder, file, change, words):
    edit(folder / f"{file}{'.safetensors' if file == 'model' else '.json'}", change)
    assert_refused("theirs", words)


def assert_refused(name: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load_model(name)
    text = str(error.value)
    assert text.startswith(name) and words in text and "\n" not in text and len(text) < 400


def test_an_unknown_name_and_a_missing_package_are_one_line(folder, monkeypatch):
    assert_refused("a/b/c", "'a/b/c'")  # the library's own check
    old = types.SimpleNamespace(__version__="4.57.1")
    monkeypatch.setitem(sys.modules, "transformers", old)
    assert_refused("theirs", "transformers 4.57.1 is too old; run: pip install -U")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("theirs", "a/b"):
        assert_refused(name, "transformers is not installed; run: pip install")
    for name in ("gpt3", "theirs/none"):  # a mistyped name is found without the package
        assert_refused(name, "no such folder or model; use resume, gpt2, gpt2-medium")


def test_a_name_is_a_commit_on_the_hub_and_no_pickle_is_downloaded(folder, monkeypatch):
    expected = []

    def download(repository, *, revision, **patterns):
        assert [repository, revision] == expected
        files = ["config.json", "merges.txt", "model-1.safetensors", "a/b.safetensors", "m.bin"]
        assert list(huggingface_hub.utils.filter_repo_objects(files, **patterns)) == files[:3]
        return "theirs"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name, repository, revision in [
        ("gpt2", "openai-community/gpt2", REVISIONS["gpt2"]),
        ("gpt2-xl@v1", "openai-community/gpt2-xl", "v1"),
        ("some.one/her-GPT_2@refs/pr/5", "some.one/her-GPT_2", "refs/pr/5"),
        ("someone/gpt2", "someone/gpt2", None),
    ]:
        expected[:] = repository, revision
        assert load_model(name)[0].config == load_model("theirs")[0].config


def test_a_run_or_a_pretrained_name_gives_model_tokenizer_and_checkpoint(folder):
    loaded, tokenizer, none = load_model("theirs")
    saved = Checkpoint(loaded.config, loaded.state_dict(), tokenizer.to_dict(), {}, {}, 2, 1.5)
    save_checkpoint(Path("run/ckpt.pt"), saved)
    model, again, checkpoint = load_model("run")
    assert checkpoint.step == 2 and again.to_dict() == tokenizer.to_dict()
    torch.testing.assert_close(model.state_dict(), loaded.state_dict(), rtol=0, atol=0)
    assert none is None and load_model("run/ckpt.pt")[2].step == 2
