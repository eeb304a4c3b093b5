"""GPT-2s that `transformers` and `tokenizers` have made, read, run and finetuned by ours."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import ROOT, TEXT
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import prepare_shakespeare
import sample
import train
from configurator import UserError, read_options
from model import GPT
from support.checkpoint import load_checkpoint
from support.hub import REVISIONS, TRANSPOSED, load_pretrained
from support.tokenizer import BPETokenizer

SMALL = dict(n_layer=2, n_head=2, n_embd=16, n_positions=32)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """GPT-2's kind of tokenizer, trained on TEXT by the library `tokenizers`."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        [TEXT],
        tokenizers.trainers.BpeTrainer(
            vocab_size=285, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tok


THEIRS_ALONE, THEIRS = byte_tokenizer(), byte_tokenizer()  # without and with <|endoftext|>
THEIRS.add_special_tokens(["<|endoftext|>"])
V = THEIRS.get_vocab_size()


def make_folder(folder: Path, **changed) -> GPT2LMHeadModel:
    """A GPT-2 whose every parameter is random, saved by `transformers` itself."""
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
    """A small GPT-2 in the folder `theirs` of the working directory."""
    monkeypatch.chdir(tmp_path)
    make_folder(Path("theirs"))
    return Path("theirs")


def change_json(path: Path, **changed) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changed}), encoding="utf-8")


def assert_same_model(a: GPT, b: GPT) -> None:
    assert a.config == b.config
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


# What is read


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
    ours, tok = load_pretrained(str(tmp_path))
    assert tok.vocab_size == V and ours.config.dropout == 0
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
def test_200_likeliest_tokens_are_those_of_transformers(tmp_path, tied):
    theirs = make_folder(tmp_path, n_positions=256, tie_word_embeddings=tied)
    ours, tok = load_pretrained(str(tmp_path))
    prompt = torch.tensor([tok.encode("3 times 4 is ")])
    expected = theirs.generate(
        prompt, max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    made = torch.cat([prompt, *ours.generate(prompt, 200, temperature=0)], dim=1)
    assert made.size(1) == prompt.size(1) + 200 and torch.equal(made, expected)
    assert len(set(made[0].tolist())) > 10


def test_parts_of_a_large_model_are_put_together(folder):
    whole = load_pretrained("theirs")[0]
    GPT2LMHeadModel.from_pretrained(folder).save_pretrained("parts", max_shard_size="20KB")
    THEIRS.save("parts/tokenizer.json")
    assert len(list(Path("parts").glob("model-*.safetensors"))) > 2
    assert_same_model(load_pretrained("parts")[0], whole)


def test_the_names_of_old_files_mean_the_same(folder):
    """As in openai-community/gpt2: no prefix, and the causal masks beside the parameters."""
    whole, path = load_pretrained("theirs")[0], folder / "model.safetensors"
    weights = {name.removeprefix("transformer."): w for name, w in load_file(path).items()}
    for layer in range(2):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    assert "wte.weight" in weights
    save_file(weights, path)
    assert_same_model(load_pretrained("theirs")[0], whole)


def test_a_tied_head_may_be_there_twice(folder):
    whole, path = load_pretrained("theirs")[0], folder / "model.safetensors"
    weights = load_file(path)
    assert "lm_head.weight" not in weights
    save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()}, path)
    assert_same_model(load_pretrained("theirs")[0], whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_become_float32_with_the_same_values(folder, dtype):
    GPT2LMHeadModel.from_pretrained(folder).to(dtype).save_pretrained("halves")
    THEIRS.save("halves/tokenizer.json")
    whole, halves = load_pretrained("theirs")[0], load_pretrained("halves")[0]
    for p, half in zip(whole.parameters(), halves.parameters(), strict=True):
        assert half.dtype == torch.float32 and torch.equal(p.to(dtype).float(), half)


# Tokens


def read_tokenizer(folder: Path) -> BPETokenizer:
    return load_pretrained(str(folder))[1]


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> BPETokenizer:
    folder = tmp_path_factory.mktemp("tokens")
    make_folder(folder)
    return read_tokenizer(folder)


@given(st.text() | st.text(st.sampled_from("1 times\n\t\u3000\u00a0'sll\U0001f600\u0301")))
def test_any_text_has_the_ids_of_the_library(ours, text):
    assert ours.encode_document(text)[:-1].tolist() == THEIRS_ALONE.encode(text).ids


def test_the_old_form_of_a_tokenizer_is_the_same_one(folder):
    new = read_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    THEIRS.model.save(str(folder))
    change_json(folder / "vocab.json", **{"<|endoftext|>": V - 1})  # where OpenAI's files have it
    old = AutoTokenizer.from_pretrained(folder)
    assert read_tokenizer(folder).to_dict() == new.to_dict()
    assert new.encode(TEXT) == old(TEXT)["input_ids"]


def test_old_files_do_not_say_how_words_are_cut(folder):
    path, tok = folder / "tokenizer.json", read_tokenizer(folder)
    fields = json.loads(path.read_bytes())
    del fields["pre_tokenizer"]["use_regex"]
    change_json(path, **fields)
    assert read_tokenizer(folder).to_dict() == tok.to_dict()


# The hub


@pytest.fixture
def hub(server, folder, monkeypatch):
    """The server is the hub: it has the folder as the model `gpt2`, and says its weights' checksum as the hub does."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.put = lambda repository, revision: server.files.update(
        {
            f"/{repository}/resolve/{revision}/{path.name}": path.read_bytes()
            for path in folder.iterdir()
        }
    )
    server.put("openai-community/gpt2", REVISIONS["gpt2"])
    return server


def test_a_model_is_fetched_once_from_its_pinned_commit(hub, folder):
    for _ in range(2):
        assert_same_model(load_pretrained("gpt2")[0], load_pretrained("theirs")[0])
    prefix = f"/openai-community/gpt2/resolve/{REVISIONS['gpt2']}"
    names = ("tokenizer.json", "config.json", "model.safetensors")
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


def test_parts_and_an_old_tokenizer_are_fetched_and_then_found_without_a_server(
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
def test_what_happens_on_the_way_is_made_good(hub, folder, faults):
    hub.headers = {
        "X-Linked-Etag": f'"{hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()}"'
    }
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
        ("a/none", [], "a/none/resolve/main: has no tokenizer.json and no vocab.json"),
        ("gpt2@none", [], "gpt2/resolve/none: has no tokenizer.json"),
        (
            "gpt2",
            ["", "", *[500] * 9],
            "model.safetensors: can not be downloaded (too many 500 error responses)",
        ),
        ("gpt2", ["", "", "cut", *[503] * 9], "bytes are kept"),
        ("gpt2", [401], "check the name, or set HF_TOKEN"),
        ("gpt3", [], "'gpt3': no folder here, and no name of a model; those are gpt2, gpt2-medium"),
        ("a/b/c", [], "no name of a model"),
        ("../a", [], "has no tokenizer.json"),
        ("a/b@../c", [], "no name of a model"),
    ],
    ids=str,
)
def test_what_the_hub_does_not_give_ends_in_one_line(hub, name, faults, words):
    hub.faults = list(faults)
    assert_refused(name, words)
    assert not list(Path("data").rglob("*.safetensors"))


def test_weights_of_another_checksum_are_not_taken(hub):
    hub.headers = {"X-Linked-Etag": f'"{"0" * 64}"'}
    assert_refused("gpt2", f"its sha256 is not {'0' * 64}")
    assert not [path for path in Path("data").rglob("*") if path.is_file()]


def assert_refused(name: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        load_pretrained(name)
    assert words in str(error.value) and "\n" not in str(error.value)


# Models that are not ours to compute, and files that are wrong


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (
            "activation_function",
            "relu",
            "'relu', and GPT computes 'gelu_new' or 'gelu_pytorch_tanh' or 'gelu'",
        ),
        ("layer_norm_epsilon", 1e-6, "1e-06, and GPT computes 1e-05"),
        ("scale_attn_weights", False, "False, and GPT computes True"),
        ("scale_attn_by_inverse_layer_idx", True, "True, and GPT computes False"),
        ("add_cross_attention", True, "True, and GPT computes False"),
        ("n_inner", 100, "100, and GPT computes None or 64"),
        ("model_type", "llama", "'llama', and GPT computes 'gpt2'"),
        ("quantization_config", {"bits": 4}, "{'bits': 4}, and GPT computes None"),
        ("n_positions", None, "None but must be a whole number"),
        ("n_embd", "16", "'16' but must be a whole number"),
        ("n_head", 3, "3, but must divide n_embd=16"),
        ("vocab_size", V - 1, f"{V - 1}, but the tokenizer has {V} tokens"),
    ],
)
def test_what_gpt_does_not_compute_is_refused_by_name(folder, field, value, words):
    change_json(folder / "config.json", **{field: value})
    assert_refused("theirs", f"config.json: {field} is {words}")


def test_what_config_json_leaves_out_is_as_transformers_has_it(folder):
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
    [({"n_layer": 3}, "h.2."), ({"n_positions": 31}, "wpe"), ({"vocab_size": V + 1}, "wte")],
    ids=str,
)
def test_a_shape_that_is_not_that_of_the_weights_is_refused(folder, fields, words):
    change_json(folder / "config.json", **fields)
    assert_refused("theirs", "its weights are not what config.json says")
    assert_refused("theirs", words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("transformer.h.1.mlp.c_fc.bias"), "transformer.h.1.mlp.c_fc.bias"),
        (lambda w: w.pop("transformer.wte.weight"), "transformer.wte.weight"),
        (lambda w: w.update(more=torch.zeros(1)), "transformer.more"),
        (
            lambda w: w.update({"transformer.ln_f.weight": torch.zeros(17)}),
            "transformer.ln_f.weight",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.zeros(V, 16)}),
            "tied to the embedding and yet another matrix",
        ),
        (
            lambda w: w.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(64, 16)}),
            "c_fc.weight",
        ),
    ],
    ids=["missing", "no embedding", "more", "wrong shape", "two heads", "transposed"],
)
def test_weights_that_are_not_those_of_config_json_are_refused(folder, change, words):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    assert_refused("theirs", words)


def test_a_head_that_is_not_tied_must_be_there(folder):
    change_json(folder / "config.json", tie_word_embeddings=False)
    assert_refused("theirs", "lm_head.weight")


def test_no_pickle_is_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_refused(
        "theirs", "theirs: has no model.safetensors, and a pytorch_model.bin is not read"
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
def test_an_index_names_files_beside_it(folder, weight_map):
    (folder / "model.safetensors").rename(folder / "part")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map}), encoding="utf-8"
    )
    assert_refused(
        "theirs",
        "has no 1" if weight_map == {"a": 1} else "its weight_map does not name files beside it",
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
def test_a_tokenizer_that_ours_would_not_equal_is_refused(folder, change):
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_bytes())
    change(fields)
    change_json(path, **fields)
    assert_refused("theirs", "tokenizer.json: a tokenizer of another kind than GPT-2's")


# Sampling and finetuning


def test_sampling_says_what_transformers_would(folder, capsys):
    options = dict(
        init_from="theirs",
        start="3 times",
        temperature=0.0,
        max_new_tokens=20,
        stop="",
        dtype="float32",
    )
    sample.main(sample.SampleConfig(**options))
    tok, hf = AutoTokenizer.from_pretrained(folder), GPT2LMHeadModel.from_pretrained(folder)
    ids = hf.generate(
        **tok("3 times", return_tensors="pt"), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert capsys.readouterr().out == tok.decode(ids[0]) + "\n"


@pytest.fixture
def finetune(hub, folder, monkeypatch):
    """A function: run train.py by config/finetune_shakespeare.py, with these options changed; returns its folder.

    `gpt2` is the small model, and Shakespeare is TEXT.
    """
    monkeypatch.setattr(BPETokenizer, "gpt2", lambda: read_tokenizer(folder))
    Path("text.txt").write_text(TEXT, encoding="utf-8")
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


def test_two_processes_finetune_together(finetune, hub, tmp_path):
    """One fetches, the other waits for it; what they learn is what one process learns."""
    alone = load_checkpoint(finetune(out_dir="out/alone", max_iters=2, dropout=0.0) / "ckpt.pt")[1][
        "model"
    ]
    shutil.rmtree("data/cache")
    hub.requests.clear()
    hub.seconds_per_block = 0.5  # long enough for the other process to come too early
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


def test_finetuning_begins_at_the_loss_of_the_pretrained_model(finetune, folder):
    """On a part of its context; the loss is that of `transformers` over every token of val.bin."""
    losses = logged(finetune(), "val_loss")
    tok, hf = AutoTokenizer.from_pretrained(folder), GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = torch.tensor(tok(TEXT[int(0.9 * len(TEXT)) :])["input_ids"])
    windows = [ids[start : start + 17] for start in range(0, len(ids) - 1, 16)]
    total = sum(
        F.cross_entropy(hf(w[None, :-1]).logits[0], w[1:], reduction="sum").item() for w in windows
    )
    assert losses[0] == pytest.approx(total / (len(ids) - 1), rel=1e-4)
    assert losses[-1] < losses[0]


def test_the_model_has_its_own_shape_and_the_dropout_of_the_options(finetune):
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


def test_a_resumed_finetuning_ends_with_the_same_bits(finetune, hub):
    """By the same command with init_from=resume, twice, and without the hub."""
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


def test_a_run_from_scratch_still_can_not_be_resumed_in_another_shape(finetune):
    shape = dict(n_layer=1, n_head=1, n_embd=8, out_dir="out/own")
    finetune(init_from="scratch", **shape)
    with pytest.raises(UserError, match="was made with n_layer=1 and this run has n_layer=2"):
        finetune(init_from="resume", **{**shape, "n_layer": 2})
    finetune(init_from="resume", **shape, max_iters=5)


def test_preflight_knows_that_a_pretrained_model_does_not_guess(finetune, capsys, monkeypatch):
    finetune(out_dir="out/trained", max_iters=30, learning_rate=1e-2)
    trained = load_checkpoint(Path("out/trained/ckpt.pt"))[0]
    monkeypatch.setattr(train, "load_pretrained", lambda name: (trained, BPETokenizer.gpt2()))
    finetune(preflight=True, max_iters=1)
    assert "ok   initial loss: " in capsys.readouterr().out


def test_the_data_must_be_made_of_the_tokens_of_the_model(finetune, dataset):
    with pytest.raises(
        UserError, match="data/tiny was not made with the tokenizer of init_from=gpt2; prepare"
    ):
        finetune(dataset="tiny")


def test_shakespeare_in_tokens_of_gpt2_is_the_text_and_nothing_else(finetune):
    meta = json.loads(Path("data/shakespeare/meta.json").read_bytes())
    split = int(0.9 * len(TEXT))
    counts = [len(THEIRS.encode(part).ids) for part in (TEXT[:split], TEXT[split:])]
    assert [meta["train_tokens"], meta["val_tokens"]] == counts and meta["vocab_size"] == V
