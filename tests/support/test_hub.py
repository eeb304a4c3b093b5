"""Models that `transformers` and `tokenizers` wrote, loaded, run and finetuned here."""

import hashlib
import json
import shutil
import subprocess
import sys
from configurator import UserError, read_options
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import ROOT, TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import prepare_shakespeare
import sample
import train
from model import GPT
from support.checkpoint import load_checkpoint
from support.hub import REVISIONS, TRANSPOSED, load_model, load_pretrained
from support.runtime import peak_memory
from support.tokenizer import BPETokenizer

SMALL = dict(n_layer=2, n_head=2, n_embd=16, n_positions=32)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer of GPT-2's kind that the library `tokenizers` trained on TEXT."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT],
        tokenizers.trainers.BpeTrainer(
            vocab_size=285, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


THEIRS_ALONE, THEIRS = byte_tokenizer(), byte_tokenizer()  # without and with <|endoftext|>
THEIRS.add_special_tokens(["<|endoftext|>"])
V = THEIRS.get_vocab_size()


def make_folder(folder: Path, **changed) -> GPT2LMHeadModel:
    """Save a GPT-2 with random parameters, biases included, as `transformers` saves it."""
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(
        GPT2Config(**{"vocab_size": V, **SMALL, **changed}, attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    hf.save_pretrained(folder)
    THEIRS.save(str(folder / "tokenizer.json"))
    return hf


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A small GPT-2 in the folder `theirs` of the current directory."""
    monkeypatch.chdir(tmp_path)
    make_folder(Path("theirs"))
    return Path("theirs")


def change_json(path: Path, **changed) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changed}), encoding="utf-8")


def assert_same_model(a: GPT, b: GPT) -> None:
    assert a.config == b.config
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"tie_word_embeddings": False},
        {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 7},
        {
            "n_layer": 3,
            "n_head": 4,
            "n_embd": 48,
            "tie_word_embeddings": False,
            "activation_function": "gelu_pytorch_tanh",
        },
        {"vocab_size": V + 18},
    ],
    ids=str,
)
def test_logits_and_gradients_equal_those_of_transformers(tmp_path, changed):
    theirs = make_folder(tmp_path, **changed)
    ours, tokenizer = load_pretrained(str(tmp_path))
    assert tokenizer.vocab_size == V and ours.config.dropout == 0
    x = torch.randint(
        0, V, (2, theirs.config.n_positions), generator=torch.Generator().manual_seed(1)
    )
    logits, loss = ours(x, x.roll(-1, 1))
    their_logits = theirs(x).logits[..., :V]
    torch.testing.assert_close(logits, their_logits, rtol=1e-4, atol=1e-4)
    loss.backward()
    F.cross_entropy(their_logits.flatten(0, 1), x.roll(-1, 1).flatten()).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert len(gradients) == len(list(theirs.parameters()))
    for name, p in theirs.named_parameters():
        gradient = gradients[name].t() if name.endswith(TRANSPOSED) else gradients[name]
        torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_generation_gives_the_tokens_of_transformers(tmp_path, tied):
    theirs = make_folder(tmp_path, n_positions=256, tie_word_embeddings=tied)
    ours, tokenizer = load_pretrained(str(tmp_path))
    prompt = torch.tensor([tokenizer.encode("3 times 4 is ")])
    expected = theirs.generate(
        prompt, max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    made = torch.cat([prompt, *ours.generate(prompt, 200, temperature=0)], dim=1)
    assert made.size(1) == prompt.size(1) + 200 and torch.equal(made, expected)
    assert len(set(made[0].tolist())) > 10


def test_a_model_in_several_files_is_the_same_model(folder):
    whole = load_pretrained("theirs")[0]
    GPT2LMHeadModel.from_pretrained(folder).save_pretrained("parts", max_shard_size="20KB")
    THEIRS.save("parts/tokenizer.json")
    assert len(list(Path("parts").glob("model-*.safetensors"))) > 2
    assert_same_model(load_pretrained("parts")[0], whole)


def test_old_files_without_the_prefix_and_with_masks_give_the_same_model(folder):
    whole, path = load_pretrained("theirs")[0], folder / "model.safetensors"
    weights = {name.removeprefix("transformer."): w for name, w in load_file(path).items()}
    for layer in range(2):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    assert "wte.weight" in weights
    save_file(weights, path)
    assert_same_model(load_pretrained("theirs")[0], whole)


def test_a_tied_head_may_be_stored_twice(folder):
    whole, path = load_pretrained("theirs")[0], folder / "model.safetensors"
    weights = load_file(path)
    assert "lm_head.weight" not in weights
    save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()}, path)
    assert_same_model(load_pretrained("theirs")[0], whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_with_the_same_values(folder, dtype):
    GPT2LMHeadModel.from_pretrained(folder).to(dtype).save_pretrained("halves")
    THEIRS.save("halves/tokenizer.json")
    whole, halves = load_pretrained("theirs")[0], load_pretrained("halves")[0]
    for p, half in zip(whole.parameters(), halves.parameters(), strict=True):
        assert half.dtype == torch.float32 and torch.equal(p.to(dtype).float(), half)


def read_tokenizer(folder: Path) -> BPETokenizer:
    return load_pretrained(str(folder))[1]


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> BPETokenizer:
    folder = tmp_path_factory.mktemp("tokens")
    make_folder(folder)
    return read_tokenizer(folder)


@given(st.text() | st.text(st.sampled_from("1 times\n\t\u3000\u00a0'sll\U0001f600\u0301")))
def test_any_text_has_the_same_ids_as_in_the_library_tokenizers(ours, text):
    assert ours.encode_document(text)[:-1].tolist() == THEIRS_ALONE.encode(text).ids


def test_vocab_json_and_merges_txt_give_the_same_tokenizer(folder):
    new = read_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    THEIRS.model.save(str(folder))
    change_json(folder / "vocab.json", **{"<|endoftext|>": V - 1})  # where OpenAI's files have it
    old = AutoTokenizer.from_pretrained(folder)
    assert read_tokenizer(folder).to_dict() == new.to_dict()
    assert new.encode(TEXT) == old(TEXT)["input_ids"]


def test_an_old_tokenizer_json_without_use_regex_gives_the_same_tokenizer(folder):
    path, tokenizer = folder / "tokenizer.json", read_tokenizer(folder)
    fields = json.loads(path.read_bytes())
    del fields["pre_tokenizer"]["use_regex"]
    change_json(path, **fields)
    assert read_tokenizer(folder).to_dict() == tokenizer.to_dict()


@pytest.fixture
def hub(server, folder, monkeypatch):
    """A server in place of the hub; its model `gpt2` is the folder `theirs`."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.put = lambda repository, revision: server.files.update(
        {
            f"/{repository}/resolve/{revision}/{path.name}": path.read_bytes()
            for path in folder.iterdir()
        }
    )
    server.put("openai-community/gpt2", REVISIONS["gpt2"])
    return server


def test_a_model_is_downloaded_once_from_its_pinned_commit(hub, folder):
    for _ in range(2):
        assert_same_model(load_pretrained("gpt2")[0], load_pretrained("theirs")[0])
    prefix = f"/openai-community/gpt2/resolve/{REVISIONS['gpt2']}"
    names = ("config.json", "tokenizer.json", "model.safetensors")
    assert [path for path, _ in hub.requests] == [f"{prefix}/{name}" for name in names]
    cached = Path("data/cache/openai-community--gpt2") / REVISIONS["gpt2"]
    assert sorted(path.name for path in cached.iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("gpt2-xl", "openai-community/gpt2-xl", REVISIONS["gpt2-xl"]),
        ("gpt2@v1", "openai-community/gpt2", "v1"),
        ("some.one/her-GPT_2", "some.one/her-GPT_2", "main"),
        ("someone/gpt2@refs/pr/5", "someone/gpt2", "refs%2Fpr%2F5"),
    ],
)
def test_a_name_is_an_address_on_the_hub(hub, name, repository, revision):
    hub.files.clear()
    hub.put(repository, revision)
    assert_same_model(load_pretrained(name)[0], load_pretrained("theirs")[0])


def test_a_folder_wins_over_a_name(hub, folder):
    folder.rename("gpt2")
    load_pretrained("gpt2")
    assert not hub.requests


def test_several_files_and_an_old_tokenizer_are_downloaded_and_then_work_offline(
    hub, folder, monkeypatch
):
    whole = load_pretrained("theirs")[0]
    GPT2LMHeadModel.from_pretrained(folder).save_pretrained("parts", max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    THEIRS.model.save(str(folder))
    change_json(folder / "vocab.json", **{"<|endoftext|>": V - 1})
    for path in Path("parts").glob("model*"):
        path.rename(folder / path.name)
    hub.put("a/b", "main")
    assert_same_model(load_pretrained("a/b")[0], whole)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert_same_model(load_pretrained("a/b")[0], whole)


@pytest.mark.parametrize(
    "faults", [[500, 503, 429], ["cut", "cut"], ["wrong"], ["long", "shift"]], ids=str
)
def test_a_download_with_faults_gives_the_same_model(hub, folder, faults):
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    hub.headers = {"X-Linked-Etag": f'"{sha256}"'}
    cache = Path("data/cache/openai-community--gpt2") / REVISIONS["gpt2"]
    cache.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (cache / name).write_bytes((folder / name).read_bytes())
    hub.faults = list(faults)
    assert_same_model(load_pretrained("gpt2")[0], load_pretrained("theirs")[0])
    assert not hub.faults


@pytest.mark.parametrize(
    ("name", "faults", "words"),
    [
        ("a/none", [], "a/none/resolve/main: has no config.json"),
        ("gpt2@none", [], "gpt2/resolve/none: has no config.json"),
        ("gpt2", ["", "", *[500] * 9], "model.safetensors (status 500"),
        ("gpt2", ["", "", "cut", *[503] * 9], "bytes are kept"),
        ("gpt2", [401], "set HF_TOKEN"),
        ("gpt3", [], "'gpt3': no such folder or model (gpt2, gpt2-medium"),
        ("a/b/c", [], "no such folder or model"),
        ("../a", [], "has no config.json"),
        ("a/b@../c", [], "no such folder or model"),
    ],
    ids=str,
)
def test_a_failed_download_ends_in_one_line(hub, name, faults, words):
    hub.faults = list(faults)
    assert_refused(name, words)
    assert not list(Path("data").rglob("*.safetensors"))


def test_files_with_a_wrong_checksum_are_refused(hub):
    hub.headers = {"X-Linked-Etag": f'"{"0" * 64}"'}
    assert_refused("gpt2", f"sha256 of the file is not {'0' * 64}")
    assert not [path for path in Path("data").rglob("*") if path.is_file()]


def assert_refused(name: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load_pretrained(name)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("activation_function", "relu", "'relu', not 'gelu_new' or 'gelu_pytorch_tanh' or 'gelu'"),
        ("layer_norm_epsilon", 1e-6, "1e-06, not 1e-05"),
        ("scale_attn_weights", False, "False, not True"),
        ("scale_attn_by_inverse_layer_idx", True, "True, not False"),
        ("add_cross_attention", True, "True, not False"),
        ("model_type", "gptj", "'gptj', not 'gpt2'"),
        ("quantization_config", {"bits": 4}, "{'bits': 4}, not None"),
        ("n_positions", None, "None, not a whole number"),
        ("n_embd", "16", "'16', not a whole number"),
        ("n_layer", True, "True, not a whole number"),
        ("n_head", -2, "-2, not a whole number"),
        ("n_head", 3, "3, which does not divide n_embd"),
    ],
)
def test_a_config_that_gpt_does_not_compute_is_refused_by_name(folder, field, value, words):
    change_json(folder / "config.json", **{field: value})
    assert_refused("theirs", f"config.json: {field} is {words}")


def test_missing_keys_of_config_json_have_the_defaults_of_transformers(folder):
    whole, fields = load_pretrained("theirs")[0], json.loads((folder / "config.json").read_bytes())
    kept = ("model_type", "vocab_size", *SMALL)
    (folder / "config.json").write_text(
        json.dumps({name: fields[name] for name in kept}), encoding="utf-8"
    )
    assert_same_model(load_pretrained("theirs")[0], whole)
    again = GPT2LMHeadModel.from_pretrained(folder)
    assert again.config.activation_function == "gelu_new" and again.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_layer": 3}, "h.2."),
        ({"n_positions": 31}, "wpe"),
        ({"vocab_size": V + 1}, "lm_head"),
        ({"vocab_size": V - 1}, f"vocab_size is {V - 1}, but the tokenizer has {V} tokens"),
        ({"n_layer": 10**30}, "config.json and the weights do not match"),
        ({"n_layer": 10**6}, "config.json and the weights do not match"),
        ({"n_embd": 20000}, "20000"),
        ({"n_positions": 10**10}, "wpe"),
        ({"n_positions": 10**30}, "config.json and the weights do not match"),
        ({"vocab_size": 10**9}, "lm_head"),
    ],
    ids=str,
)
def test_a_shape_that_the_weights_do_not_have_is_refused_without_taking_memory(
    folder, fields, words
):
    change_json(folder / "config.json", **fields)
    before = peak_memory(torch.device("cpu"))
    assert_refused("theirs", words)
    assert peak_memory(torch.device("cpu")) - before < 200e6


def test_a_wider_mlp_is_refused(tmp_path):
    make_folder(tmp_path, n_inner=100)
    assert_refused(str(tmp_path), "mlp.c_fc.bias has shape (100,) where the model needs (64,)")


def test_a_folder_of_another_kind_of_model_is_refused_by_its_model_type(tmp_path):
    fields = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": V}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    assert_refused(str(tmp_path), "config.json: model_type is 'llama', not 'gpt2'; use a GPT-2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("transformer.h.1.mlp.c_fc.bias"), "transformer.h.1.mlp.c_fc.bias"),
        (
            lambda w: w.pop("transformer.wte.weight"),
            f"has shape None where the model needs ({V}, 16)",
        ),
        (lambda w: w.update(more=torch.zeros(1)), "transformer.more"),
        (
            lambda w: w.update({"transformer.ln_f.weight": torch.zeros(17)}),
            "transformer.ln_f.weight",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.zeros(V, 16)}),
            "lm_head.weight is not transformer.wte.weight",
        ),
        (
            lambda w: w.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(64, 16)}),
            "c_fc.weight",
        ),
        (
            lambda w: w["transformer.h.1.ln_2.bias"].fill_(torch.nan),
            "transformer.h.1.ln_2.bias has values that are not finite",
        ),
        (
            lambda w: w.update({"transformer.ln_f.bias": torch.zeros(16, dtype=torch.int32)}),
            "transformer.ln_f.bias has values that are not finite floating-point numbers",
        ),
    ],
    ids=["missing", "no embedding", "more", "shape", "two heads", "transposed", "nan", "integers"],
)
def test_weights_that_do_not_fit_config_json_are_refused_by_name(folder, change, words):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    assert_refused("theirs", words)


def test_an_untied_head_must_be_stored(folder):
    change_json(folder / "config.json", tie_word_embeddings=False)
    assert_refused("theirs", "lm_head.weight")


def test_no_pickle_is_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_refused(
        "theirs", "theirs: has no model.safetensors and no model.safetensors.index.json; use"
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"model": 1}', bytes(range(256))], ids=repr
)
def test_damaged_files_are_named(folder, name, content):
    (folder / name).write_bytes(content)
    assert_refused("theirs", name)


@pytest.mark.parametrize(
    "weight_map", [None, {}, {"a": "../theirs/model.safetensors"}, {"a": "/etc/passwd"}, {"a": 1}]
)
def test_an_index_may_only_name_files_in_its_folder(folder, weight_map):
    (folder / "model.safetensors").rename(folder / "part")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map}), encoding="utf-8"
    )
    assert_refused(
        "theirs",
        "has no 1" if weight_map == {"a": 1} else "weight_map does not list files in its folder",
    )


def swap_merges(fields):
    merges = fields["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


@pytest.mark.parametrize(
    "change",
    [
        swap_merges,
        lambda fields: fields["model"]["merges"].pop(),
        lambda fields: fields["model"]["merges"].reverse(),
        lambda fields: fields["model"]["vocab"].pop("!"),
        lambda fields: fields["model"]["vocab"].update(more=V),
        lambda fields: fields["model"]["vocab"].update({"\u4f60": V}),
        lambda fields: fields["added_tokens"].clear(),
        lambda fields: fields["added_tokens"][0].update(id=0),
        lambda fields: fields["pre_tokenizer"].update(add_prefix_space=True),
        lambda fields: fields["pre_tokenizer"].update(use_regex=False),
        lambda fields: fields["pre_tokenizer"].update(type="Whitespace"),
        lambda fields: fields.update(normalizer={"type": "NFC"}),
        lambda fields: fields.update(pre_tokenizer=None),
        lambda fields: fields["model"].update(type="Unigram", vocab=[["a", -1.0]]),
    ],
)
def test_a_tokenizer_that_would_give_other_ids_is_refused(folder, change):
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_bytes())
    change(fields)
    change_json(path, **fields)
    assert_refused("theirs", "tokenizer.json: not a tokenizer like GPT-2's")


def add_token(folder: Path, name: str) -> None:
    """Save a tokenizer with one more token, as `transformers` does after add_special_tokens."""
    added = tokenizers.Tokenizer.from_str(THEIRS.to_str())
    added.add_special_tokens([name])
    added.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["[PAD]", "<|pad|>"])
def test_an_added_padding_token_is_a_row_of_padding(tmp_path, name):
    theirs = make_folder(tmp_path, vocab_size=V + 1)
    add_token(tmp_path, name)
    ours, tokenizer = load_pretrained(str(tmp_path))
    assert (ours.config.vocab_size, ours.config.pad_vocab_to) == (V, V + 1)
    assert tokenizer.vocab_size == V and tokenizer.decode([V - 1]) == "<|endoftext|>"
    x = torch.arange(32)[None]
    torch.testing.assert_close(ours(x)[0], theirs(x).logits[..., :V], rtol=1e-4, atol=1e-4)


def test_any_other_added_token_is_refused_by_name(tmp_path):
    make_folder(tmp_path, vocab_size=V + 1)
    add_token(tmp_path, "<|im_start|>")
    assert_refused(str(tmp_path), "not a tokenizer like GPT-2's (it adds '<|im_start|>')")


OTHER_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([-1, 0, 1, 2, 3, 16, 17, V, 20000, 10**6, 10**30])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def mutate(content: bytes, draw) -> bytes:
    """Return a JSON file with one value changed, removed or added, or with other bytes."""
    if draw(st.integers(0, 3)) == 0:
        start, length = draw(st.integers(0, len(content))), draw(st.integers(0, 50))
        return content[:start] + draw(st.binary(max_size=5)) + content[start + length :]
    fields = json.loads(content)
    inside = fields
    while True:
        keys = sorted(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key = draw(st.sampled_from(keys))
        if not isinstance(inside[key], dict | list) or not inside[key] or draw(st.booleans()):
            break
        inside = inside[key]
    match draw(st.sampled_from(["change", "remove", "add"])):
        case "change":
            inside[key] = draw(OTHER_VALUES)
        case "remove":
            del inside[key]
        case "add" if isinstance(inside, dict):
            inside[draw(st.text(max_size=3))] = draw(OTHER_VALUES)
        case "add":
            inside.insert(key, draw(OTHER_VALUES))
    return json.dumps(fields).encode()


@pytest.mark.parametrize("examples", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_mutated_json_files_end_in_one_line_or_in_a_model(tmp_path, examples):
    make_folder(tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in ("config.json", "tokenizer.json")}

    @settings(max_examples=examples)
    @given(st.data())
    def check(data):
        name = data.draw(st.sampled_from(sorted(whole)))
        mutated = mutate(whole[name], data.draw)
        (tmp_path / name).write_bytes(mutated)
        try:
            model, tokenizer = load_pretrained(str(tmp_path))
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        else:
            assert model(torch.tensor([tokenizer.encode("3 times")]))[0].isfinite().all()
        finally:
            (tmp_path / name).write_bytes(whole[name])

    check()


def test_a_run_or_a_pretrained_name_gives_model_tokenizer_and_checkpoint(tiny_run):
    out_dir = tiny_run(max_iters=2, eval_interval=2)
    model, tokenizer, checkpoint = load_model("resume", str(out_dir), "ckpt.pt")
    assert checkpoint["step"] == 2 and tokenizer.to_dict() == checkpoint["tokenizer"]
    make_folder(Path("theirs"))
    model, tokenizer, checkpoint = load_model("theirs", "none", "none")
    assert checkpoint is None and tokenizer.vocab_size == model.config.vocab_size == V


def test_sampling_prints_what_transformers_would(folder, capsys):
    options = dict(
        init_from="theirs",
        start="3 times",
        temperature=0.0,
        max_new_tokens=20,
        stop="",
        dtype="float32",
    )
    sample.main(sample.SampleConfig(**options))
    tokenizer, hf = AutoTokenizer.from_pretrained(folder), GPT2LMHeadModel.from_pretrained(folder)
    ids = hf.generate(
        **tokenizer("3 times", return_tensors="pt"),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
    )
    assert capsys.readouterr().out == tokenizer.decode(ids[0]) + "\n"


@pytest.fixture
def finetune(hub, folder, monkeypatch):
    """A function: run config/finetune_shakespeare.py with these options; returns the run's folder.

    `gpt2` is the small model, and Shakespeare is TEXT.
    """
    monkeypatch.setattr(BPETokenizer, "gpt2", lambda: read_tokenizer(folder))
    Path("text.txt").write_text(TEXT, encoding="utf-8", newline="\n")
    prepare_shakespeare.main(prepare_shakespeare.PrepareConfig(input="text.txt", tokenizer="gpt2"))

    def run(**changed) -> Path:
        options = dict(
            block_size=16,
            max_iters=4,
            eval_interval=2,
            eval_iters=0,
            sample_interval=0,
            compile=False,
        )
        arguments = [
            f"--{name}={value}"
            for name, value in {**options, "dtype": "float32", **changed}.items()
        ]
        config = read_options(
            train.TrainConfig, [str(ROOT / "config/finetune_shakespeare.py"), *arguments]
        )
        train.main(config)
        return Path(config.out_dir)

    return run


@pytest.mark.slow
def test_two_processes_finetune_together(finetune, hub, tmp_path):
    """One downloads while the other waits, and together they learn what one process learns."""
    alone = load_checkpoint(finetune(out_dir="out/alone", max_iters=2, dropout=0.0) / "ckpt.pt")[1][
        "model"
    ]
    shutil.rmtree("data/cache")
    hub.requests.clear()
    hub.seconds_per_block = 0.5  # so that the other process comes before the end
    options = dict(
        block_size=16, max_iters=2, eval_iters=0, sample_interval=0, compile=False, dtype="float32"
    )
    options |= dict(out_dir="out/two", eval_interval=2, dropout=0.0, device="cpu")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        ROOT / "train.py",
    ]
    command += [
        ROOT / "config/finetune_shakespeare.py",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(hub.requests) == 3
    torch.testing.assert_close(
        load_checkpoint(Path("out/two/ckpt.pt"))[1]["model"], alone, rtol=1e-3, atol=1e-4
    )


def logged(out_dir: Path, name: str) -> list[float]:
    records = map(json.loads, (out_dir / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [record[name] for record in records if name in record]


def test_finetuning_starts_at_the_loss_of_the_pretrained_model(finetune, folder):
    """With a shorter context. `transformers` computes the loss over every token of val.bin."""
    losses = logged(finetune(), "val_loss")
    tokenizer, hf = (
        AutoTokenizer.from_pretrained(folder),
        GPT2LMHeadModel.from_pretrained(folder).eval(),
    )
    ids = torch.tensor(tokenizer(TEXT[int(0.9 * len(TEXT)) :])["input_ids"])
    windows = [ids[start : start + 17] for start in range(0, len(ids) - 1, 16)]
    total = sum(
        F.cross_entropy(hf(w[None, :-1]).logits[0], w[1:], reduction="sum").item() for w in windows
    )
    assert losses[0] == pytest.approx(total / (len(ids) - 1), rel=1e-4)
    assert losses[-1] < losses[0]


def test_finetuning_keeps_the_shape_of_the_model_and_takes_the_dropout_of_the_options(finetune):
    model, checkpoint = load_checkpoint(
        finetune(n_layer=5, n_embd=24, tie_weights=False, max_iters=1) / "ckpt.pt"
    )
    c = model.config
    assert (c.n_layer, c.n_head, c.n_embd, c.block_size, c.tie_weights, c.dropout) == (
        2,
        2,
        16,
        16,
        True,
        0.1,
    )
    assert (
        checkpoint["train_config"]["n_layer"] == 2
        and checkpoint["train_config"]["init_from"] == "gpt2"
    )
    assert (
        load_checkpoint(finetune(block_size=1024, max_iters=1) / "ckpt.pt")[0].config.block_size
        == 32
    )


def test_a_resumed_finetuning_run_ends_with_the_same_bits(finetune, hub):
    """With the same command and init_from=resume, twice, without the hub."""
    whole = load_checkpoint(finetune(out_dir="out/whole", max_iters=6) / "ckpt.pt")[1]
    finetune(out_dir="out/parts", max_iters=2)
    hub.files.clear()
    for max_iters in (4, 6):
        parts = finetune(out_dir="out/parts", init_from="resume", max_iters=max_iters)
    parts = load_checkpoint(parts / "ckpt.pt")[1]
    assert parts["step"] == 6
    for name in ("model", "optimizers", "best_val_loss"):
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=0)
    with pytest.raises(
        UserError, match="was made with block_size=16 and this run has block_size=8"
    ):
        finetune(out_dir="out/parts", init_from="resume", block_size=8)


def test_a_run_from_scratch_can_not_be_resumed_in_another_shape(finetune):
    shape = dict(n_layer=1, n_head=1, n_embd=8, out_dir="out/own")
    finetune(init_from="scratch", **shape)
    with pytest.raises(UserError, match="was made with n_layer=1 and this run has n_layer=2"):
        finetune(init_from="resume", **{**shape, "n_layer": 2})
    finetune(init_from="resume", **shape, max_iters=5)


def test_preflight_expects_a_low_first_loss_of_a_pretrained_model(finetune, capsys, monkeypatch):
    finetune(out_dir="out/trained", max_iters=30, learning_rate=1e-2)
    trained = load_checkpoint(Path("out/trained/ckpt.pt"))[0]
    load = lambda name: (trained, BPETokenizer.gpt2())  # noqa: E731
    monkeypatch.setattr("support.hub.load_pretrained", load)
    finetune(preflight=True, max_iters=1)
    assert "ok   initial loss: " in capsys.readouterr().out


def test_data_of_another_tokenizer_than_the_models_is_refused(finetune, dataset):
    with pytest.raises(
        UserError, match="data/tiny was not made with the tokenizer of init_from=gpt2; prepare"
    ):
        finetune(dataset="tiny")


def test_shakespeare_in_gpt2s_tokens_has_no_other_tokens(finetune):
    meta = json.loads(Path("data/shakespeare/meta.json").read_bytes())
    split = int(0.9 * len(TEXT))
    counts = [len(THEIRS.encode(part).ids) for part in (TEXT[:split], TEXT[split:])]
    assert [meta["train_tokens"], meta["val_tokens"]] == counts and meta["vocab_size"] == V
