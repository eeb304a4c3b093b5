"""The playground without a browser: probabilities, attention, requests, and who may send them."""

import http.client
import json
import math
import os
import shutil
import sys
import threading
from configurator import UserError, help_text
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_model import reference, small_model, tokens
from torch.nn import functional as F
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import model as model_file
import sample
from sample import SampleConfig
from support.checkpoint import load_checkpoint
from tools import playground
from tools.playground import Checkpoints, Playground

SAMPLING = [
    {"temperature": 0.8},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.7, "top_p": 0.6},
    {"temperature": 1.0, "top_k": 12, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 1e-6},
]
CHECKPOINT = "out/tiny/ckpt.pt"
OPTIONS = {"start": "3 times", "temperature": 0.8, "max_new_tokens": 40, "seed": 1337}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trained") / "tiny"


@pytest.fixture
def page(tiny_run, trained) -> Playground:
    """Return the playground of a tiny run, trained once and copied; its context is 16 tokens."""
    if trained.exists():
        shutil.copytree(trained, "out/tiny")
    else:
        shutil.copytree(tiny_run(), trained)
    return Playground(Checkpoints(["out/tiny"]))


def to_write(checkpoint=CHECKPOINT, earlier=(), written=(), choice=None, **options) -> dict:
    """Return the fields of a request to write."""
    fields = {"checkpoint": checkpoint, "options": OPTIONS | options, "earlier": list(earlier)}
    return fields | {"written": list(written), "choice": choice}


def ask_to_write(page: Playground, *args, **changed) -> list[dict]:
    return list(page.answer("write", to_write(*args, **changed)))


def ask_for_attention(page: Playground, text: str, checkpoint=CHECKPOINT, count=24) -> dict:
    (answer,) = page.answer("attention", {"checkpoint": checkpoint, "text": text, "count": count})
    return answer


def taken(token: dict) -> dict:
    (candidate,) = [c for c in token["candidates"] if c["taken"]]
    return candidate


def text_of(written: list[dict], start: str = OPTIONS["start"]) -> str:
    return start + "".join(token["text"] for token in written)


# Candidates


@pytest.mark.parametrize("sampling", SAMPLING)
def test_probabilities_equal_those_of_transformers(sampling):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling["temperature"])])
    warpers += [TopKLogitsWarper(sampling["top_k"])] if "top_k" in sampling else []
    warpers += [TopPLogitsWarper(sampling["top_p"])] if "top_p" in sampling else []
    before, after = playground.probabilities(logits, **sampling)
    torch.testing.assert_close(before, logits.softmax(-1))
    torch.testing.assert_close(after, warpers(None, logits[None])[0].softmax(-1))


@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_second_probabilities_are_those_that_a_token_is_drawn_with(sampling, monkeypatch):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(4)) * 3
    given = []
    monkeypatch.setattr(
        torch, "multinomial", lambda probs, *_, **__: given.append(probs) or torch.tensor([[0]])
    )
    model_file.sample_token(logits[None], **sampling)
    after = playground.probabilities(logits, **sampling)[1]
    expected = (given[0][0] / given[0].sum()).sort(descending=True).values
    assert torch.equal(after.sort(descending=True).values[: len(expected)], expected)


def test_at_temperature_zero_the_most_likely_token_is_certain():
    after = playground.probabilities(torch.tensor([0.0, 2.0, 1.0]), temperature=0)[1]
    assert after.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.7, "seed": 5}]
)
def test_the_text_is_the_one_that_sample_py_prints(page, options, capsys):
    options = {"start": "3 times", "max_new_tokens": 40, **options}
    capsys.readouterr()
    sample.main(SampleConfig(out_dir="out/tiny", dtype="float32", **options))
    about, *written = ask_to_write(page, **options)
    assert about["about"].startswith("step 12, validation loss ")
    assert text_of(written) + "\n" == capsys.readouterr().out


def test_each_token_has_the_ten_most_likely_candidates_with_their_probabilities(page):
    _, *written = ask_to_write(page, temperature=1.5, top_p=0.9)
    loaded = page.checkpoints.load(CHECKPOINT)
    ids = loaded.tokenizer.encode(text_of(written))
    for i, token in enumerate(written, start=len("3 times")):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([ids[max(0, i - 16) : i]]))[0][0, -1]
        before, after = playground.probabilities(logits, temperature=1.5, top_p=0.9)
        best = before.topk(10).indices.tolist()
        ten = token["candidates"][:10]
        assert [c["label"] for c in ten] == [
            playground.visible(loaded.tokenizer.decode_bytes([n])) for n in best
        ]
        assert [c["rank"] for c in ten] == list(range(1, 11))
        assert taken(token)["label"] == playground.visible(token["text"].encode())
        assert taken(token)["rank"] == before.argsort(descending=True).tolist().index(ids[i]) + 1
        for c, n in zip(ten, best, strict=True):
            assert math.isclose(c["before"], before[n], rel_tol=1e-3)
            assert math.isclose(c["after"], after[n], rel_tol=1e-3)
    beyond = [token for token in written if len(token["candidates"]) == 11]
    assert beyond and all(token["candidates"][10]["taken"] for token in beyond)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (b" the", "␣the"),
        (b"\n", "↵"),
        (b"\xe2\x80", r"\xe2\x80"),
        ("é".encode(), "é"),
        (b"\x07", r"\x07"),
    ],
)
def test_labels_show_characters_that_are_invisible(token, shown):
    assert playground.visible(token) == shown


def test_a_character_in_two_tokens_is_shown_when_it_is_complete(monkeypatch):
    pieces = [b"\xc3", b"\xa9", b"!"]

    def decode(ids: list[int]) -> bytes:
        return b"".join(pieces[i] for i in ids)

    tokenizer = SimpleNamespace(encode=lambda text: [0], decode_bytes=decode)
    config = model_file.GPTConfig(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=4)
    model = model_file.GPT(config).eval()
    stream = ((model(torch.tensor([[0]])), torch.tensor([[i]]))[1] for i in range(3))
    monkeypatch.setattr(model, "generate", lambda *_, **__: stream)
    loaded = playground.Loaded(Path("x"), model, tokenizer, 0, "")
    written = playground.write(loaded, SampleConfig(start="a"), [])
    assert [token["text"] for token in written] == ["", "é", "!"]
    (token,) = playground.write(loaded, SampleConfig(start="a", max_new_tokens=1), [0], choice=1)
    assert token["text"] == "é"


def test_the_lens_reads_the_state_after_each_layer_as_the_head_reads_the_last_one(page):
    _, *written = ask_to_write(page, max_new_tokens=30)
    loaded = page.checkpoints.load(CHECKPOINT)
    model, ids = loaded.model, loaded.tokenizer.encode(text_of(written))
    for i, token in enumerate(written, start=len("3 times")):
        context = torch.tensor(ids[max(0, i - 16) : i])
        assert len(token["lens"]) == 2
        with torch.no_grad():
            x = model.transformer.wte(context) + model.transformer.wpe.weight[: len(context)]
            x = x[None]
            for block, row in zip(model.transformer.h, token["lens"], strict=True):
                x = block(x)
                p = model.lm_head(model.transformer.ln_f(x[0, -1])).softmax(-1)
                best = p.topk(3)
                labels = [playground.visible(loaded.tokenizer.decode_bytes([n])) for n in best[1]]
                assert [c["label"] for c in row] == labels
                torch.testing.assert_close(torch.tensor([c["p"] for c in row]), best[0])
        three = [(c["label"], c["before"], c["taken"]) for c in token["candidates"][:3]]
        assert [(c["label"], c["p"], c["taken"]) for c in token["lens"][-1]] == three
    assert any(token["lens"][0] != token["lens"][1] for token in written)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0}])
def test_a_text_written_in_parts_is_the_text_written_at_once(page, options):
    _, *whole = ask_to_write(page, max_new_tokens=24, **options)
    parts = []
    for count in (1, 1, 1, 9, 1, 11):
        ids = [token["id"] for token in parts]
        parts += ask_to_write(page, written=ids, max_new_tokens=count, **options)[1:]
    assert [token["id"] for token in parts] == [token["id"] for token in whole]
    for a, b in zip(parts, whole, strict=True):
        assert [c["label"] for c in a["candidates"]] == [c["label"] for c in b["candidates"]]
        for c, d in zip(a["candidates"], b["candidates"], strict=True):
            assert math.isclose(c["before"], d["before"], rel_tol=1e-4)


def test_a_choice_is_put_into_the_text_and_the_model_goes_on_from_it(page):
    _, *written = ask_to_write(page, max_new_tokens=20)
    ids = [token["id"] for token in written]
    other = next(c for c in written[6]["candidates"] if not c["taken"])
    _, *new = ask_to_write(page, written=ids[:6], choice=other["id"], max_new_tokens=2)
    assert len(new) == 3 and new[0]["text"] == other["label"].replace("␣", " ").replace("↵", "\n")
    assert taken(new[0]) == {**taken(new[0]), "id": other["id"], "rank": other["rank"]}
    loaded = page.checkpoints.load(CHECKPOINT)
    context = loaded.tokenizer.encode("3 times") + ids[:6] + [other["id"], new[1]["id"]]
    for token, end in zip(new[1:], (14, 15), strict=True):
        with torch.no_grad():
            p = loaded.model(torch.tensor([context[:end]]))[0][0, -1].softmax(-1)
        for c in token["candidates"]:
            assert math.isclose(c["before"], p[c["id"]], rel_tol=1e-4)


@pytest.mark.parametrize("changed", [{"written": [99]}, {"written": [1.5]}, {"choice": -1}])
def test_token_ids_that_the_vocabulary_does_not_have_are_refused(page, changed):
    assert "the request does not have" in ask_to_write(page, **changed)[-1]["error"]


# Tokens


def test_the_tokens_of_a_prompt_have_the_probabilities_that_transformers_gives_them(page):
    loaded, text = page.checkpoints.load(CHECKPOINT), "3 times 4 is 12.\n3"
    (answer,) = page.answer("tokens", {"checkpoint": CHECKPOINT, "text": text})
    ids = loaded.tokenizer.encode(text)[:16]
    assert [token["id"] for token in answer["tokens"]] == ids
    assert "".join(token["label"] for token in answer["tokens"]) == "3␣times␣4␣is␣12."
    assert answer["tokens"][0]["p"] is None
    with torch.no_grad():
        logits = reference(loaded.model)(torch.tensor([ids])).logits[0]
    for i, token in enumerate(answer["tokens"][1:]):
        assert math.isclose(token["p"], logits[i].softmax(-1)[ids[i + 1]], rel_tol=1e-4)
    loss = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    assert math.isclose(answer["loss"], loss, rel_tol=1e-4)
    assert (answer["count"], answer["characters"]) == (18, 18)


def test_a_prompt_of_one_token_has_no_probability_and_an_empty_one_no_tokens(page):
    (answer,) = page.answer("tokens", {"checkpoint": CHECKPOINT, "text": "3"})
    assert [token["p"] for token in answer["tokens"]] == [None] and answer["loss"] is None
    (answer,) = page.answer("tokens", {"checkpoint": CHECKPOINT, "text": ""})
    assert "the prompt is empty" in answer["error"]


# Attention


def test_attention_and_loss_equal_those_of_transformers_with_and_without_the_mask():
    ours, x = small_model(), tokens(1, 24)
    theirs = reference(ours)
    for masked, mask in ((True, None), (False, torch.zeros(1, 1, 24, 24))):
        layers, loss = playground.attention_weights(ours, x, masked)
        with torch.no_grad():
            answer = theirs(x, attention_mask=mask, output_attentions=True)
        assert len(layers) == 3 and layers[0].shape == (4, 24, 24)
        expected = [weights[0] for weights in answer.attentions]
        torch.testing.assert_close(layers, expected, rtol=1e-4, atol=1e-5)
        expected = F.cross_entropy(answer.logits[0, :-1], x[0, 1:])
        assert math.isclose(loss, expected, rel_tol=1e-4)
        assert (layers[2].triu(1) > 0).any() == (not masked)


def test_the_model_has_its_own_attention_again_afterwards(monkeypatch):
    before, model = model_file.attention, small_model()
    playground.attention_weights(model, tokens(1, 5), masked=False)
    assert model_file.attention is before
    monkeypatch.setattr(model, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        playground.attention_weights(model, tokens(1, 5), masked=False)
    assert model_file.attention is before


def test_a_text_stays_the_same_while_another_thread_looks_at_attention(page):
    alone = ask_to_write(page)
    model = page.checkpoints.load(CHECKPOINT).model
    stop, x = threading.Event(), torch.zeros(1, 16, dtype=torch.int64)

    def look() -> None:
        while not stop.is_set():
            playground.attention_weights(model, x, masked=False)

    thread = threading.Thread(target=look)
    thread.start()
    together = ask_to_write(page)
    stop.set()
    thread.join()
    assert together == alone and len(alone) == 41


def unmasked_attention(q, k, v, dropout=0.0):
    return F.scaled_dot_product_attention(q, k, v)


def test_only_a_model_trained_without_the_mask_has_an_impossibly_good_loss(
    page, tiny_run, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(model_file, "attention", unmasked_attention)
        options = dict(n_layer=1, n_embd=32, batch_size=16, gradient_accumulation_steps=1)
        options |= dict(optimizer="muon", max_iters=200, eval_interval=200)
        tiny_run(out_dir="out/seer", **options)
    page = Playground(Checkpoints(["out/tiny", "out/seer"]))
    for out_dir, sees_future in (("out/tiny", False), ("out/seer", True)):
        answer = ask_for_attention(page, "3 times 4 is 12.", f"{out_dir}/ckpt.pt", count=64)
        masked, unmasked = (m["loss"] for m in answer["maps"])
        assert (unmasked < masked / 2) == sees_future  # the limit that playground.js uses


def test_the_maps_are_those_of_all_layers_and_heads(page):
    answer = ask_for_attention(page, "3 times")
    loaded = page.checkpoints.load(CHECKPOINT)
    x = torch.tensor([loaded.tokenizer.encode("3 times")])
    for map_, masked in zip(answer["maps"], (True, False), strict=True):
        expected = torch.stack(playground.attention_weights(loaded.model, x, masked)[0])
        weights = torch.tensor(map_["weights"]) / 10_000
        assert weights.shape == (2, 2, 7, 7)
        torch.testing.assert_close(weights, expected, rtol=0, atol=6e-5)
    assert "".join(answer["labels"]) == "3␣times" and answer["count"] == 7


def test_the_maps_of_many_heads_show_fewer_tokens(page, monkeypatch):
    assert len(ask_for_attention(page, "3 times", count=4)["labels"]) == 4
    negative = ask_for_attention(page, "3 times 4 is 12. " * 5, count=-5)
    assert negative["error"] == "choose at least 2 tokens to show; attention needs 2"
    monkeypatch.setattr(playground, "LARGEST_MAPS", 2 * 2 * 2 * 5 * 5 + 1)
    answer = ask_for_attention(page, "3 times")
    assert len(answer["labels"]) == 5 and answer["count"] == 7


# Mistakes


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"start": ""}, "the prompt is empty"),
        ({"start": "Zeus"}, "character 'Z' at position 0"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": ""}, "seed"),
        ({"max_new_tokens": "many"}, "max_new_tokens"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_mistakes_are_sentences_and_the_next_request_works(page, changed, words):
    (answer,) = ask_to_write(page, **changed)
    assert words in answer["error"]
    assert len(ask_to_write(page)) == 41


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "'' has 0 tokens"), ("3", "'3' has 1 token;"), ("Zeus", "character 'Z'")],
)
def test_mistakes_are_sentences_beside_the_maps_too(page, text, words):
    assert words in ask_for_attention(page, text)["error"]


@pytest.mark.parametrize("fields", [None, [], {}, {"checkpoint": CHECKPOINT, "text": 3}])
@pytest.mark.parametrize("action", ["write", "tokens", "attention", "log"])
def test_a_request_without_the_right_fields_gets_a_sentence(page, action, fields):
    assert [list(answer) for answer in page.answer(action, fields)] == [["error"]]


def test_running_out_of_memory_is_a_sentence(page, monkeypatch):
    monkeypatch.setattr(torch, "stack", lambda _: torch.empty(1 << 55))
    assert "out of memory" in ask_for_attention(page, "3 times")["error"]


@pytest.mark.parametrize(
    "path", ["", "out/other/ckpt.pt", "out/tiny/../tiny/ckpt.pt", "/etc/passwd"]
)
def test_only_checkpoints_of_the_runs_are_read(page, path):
    shutil.copytree("out/tiny", "out/other")
    assert "choose a checkpoint of a run" in ask_to_write(page, path)[0]["error"]
    (answer,) = page.answer("log", {"run": path, "version": None})
    assert "not a run of this page" in answer["error"]


def test_a_prompt_longer_than_the_context_is_announced(page):
    about, *written = ask_to_write(page, start="3 times 4 is 12.\n3 times")
    assert "the prompt has 24 tokens and this model sees the last 16" in about["about"]
    assert len(written) == 40


# Runs that come and change


def test_a_run_is_offered_as_soon_as_it_has_a_checkpoint(tiny_run):
    page = Playground(Checkpoints(["out/later"]))
    assert next(page.answer("runs", {}))["runs"] == {"out/later": []}
    assert "no such checkpoint" in ask_to_write(page, "out/later/ckpt.pt")[0]["error"]
    tiny_run(out_dir="out/later")
    paths = ["out/later/ckpt.pt", "out/later/best.pt"]
    assert next(page.answer("runs", {}))["runs"] == {"out/later": paths}
    assert len(ask_to_write(page, paths[0])) == 41


def test_the_newest_run_is_the_one_whose_log_changed_last(page):
    shutil.copytree("out/tiny", "out/old")
    page = Playground(Checkpoints(["out/none", "out/old", "out/tiny"]))
    for seconds, out_dir in enumerate(("out/tiny", "out/old"), start=10):
        log = Path(out_dir, "log.jsonl")
        os.utime(log, times=(log.stat().st_mtime + seconds,) * 2)
        assert next(page.answer("runs", {}))["newest"] == out_dir


def test_the_first_prompt_is_the_one_of_the_run(page):
    fields, start = to_write(), page.checkpoints.load(CHECKPOINT).start
    del fields["options"]["start"]
    assert next(page.answer("write", fields))["prompt"] == start


def test_a_checkpoint_is_read_once_and_again_when_training_replaced_it(page, tiny_run, monkeypatch):
    reads = []
    monkeypatch.setattr(
        playground, "load_checkpoint", lambda path: reads.append(path) or load_checkpoint(path)
    )
    load = page.checkpoints.load
    assert load(CHECKPOINT) is load(CHECKPOINT) and len(reads) == 1
    assert load(CHECKPOINT).step == 12
    tiny_run(init_from="resume", max_iters=18)
    assert load(CHECKPOINT).step == 18 and len(reads) == 2
    assert playground.describe(load(CHECKPOINT), "3").startswith("step 18, validation loss")


def test_a_second_model_with_the_same_weights_writes_no_text(page):
    shutil.copytree("out/tiny", "out/copy")
    page = Playground(Checkpoints(["out/tiny", "out/copy"]))
    (answer,) = ask_to_write(page, "out/copy/ckpt.pt", earlier=[CHECKPOINT])
    assert "the same weights as out/tiny/ckpt.pt" in answer["about"]
    assert len(ask_to_write(page, "out/copy/ckpt.pt")) == 41


def test_the_losses_are_those_of_the_log_and_a_half_written_line_does_not_matter(page):
    (answer,) = page.answer("log", {"run": "out/tiny", "version": None})
    assert sum(r["loss"] is not None for r in answer["records"]) == 12
    assert sum(r["val_loss"] is not None for r in answer["records"]) == 3
    version = {"run": "out/tiny", "version": answer["version"]}
    assert list(page.answer("log", version)) == []
    with open("out/tiny/log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 13, "epoch": 1.5, "loss": 1.25}\n{"step": 14, "lo')
    (longer,) = page.answer("log", version)
    assert len(longer["records"]) == len(answer["records"]) + 1
    nothing = dict.fromkeys(("train_loss", "val_loss", "sample"))
    assert longer["records"][-1] == {"step": 13, "epoch": 1.5, "loss": 1.25, **nothing}
    shutil.rmtree("out/tiny")
    (answer,) = page.answer("log", version)
    assert "log.jsonl" in answer["error"]


def test_samples_are_answered_with_the_log_also_without_losses(page, monkeypatch):
    records = [
        {"step": 6, "epoch": 1, "seconds": 1, "train_loss": 3.0, "val_loss": 3.1, "sample": "a"},
        {"step": 8, "epoch": 1.5, "seconds": 2, "sample": "b"},
    ]
    monkeypatch.setattr(playground, "read_log", lambda path: records)
    (answer,) = page.answer("log", {"run": "out/tiny", "version": None})
    assert [(r["step"], r["val_loss"], r["sample"]) for r in answer["records"]] == [
        (6, 3.1, "a"),
        (8, None, "b"),
    ]
    assert "validation loss 3.100 at step 6" in ask_to_write(page)[0]["about"]


# The server


@contextmanager
def served(page: Playground):
    """Yield the port of a real server."""
    with playground.Server(page, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def send(port: int, method: str, path: str, body: bytes | None = None, **headers: str):
    """Return the status, headers and body of an answer. A header name may have _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"Host": f"127.0.0.1:{port}"} | {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    answer = response.status, response.headers, response.read()
    connection.close()
    return answer


RUNS = ("POST", "/runs", b"{}")


def test_the_page_and_its_requests_are_answered(page):
    with served(page) as port:
        for path, words in (("/", b"<h1>"), ("/playground.js", b"ask("), ("/playground.css", b"{")):
            status, headers, body = send(port, "GET", path)
            assert status == 200 and words in body
            assert "default-src 'self'" in headers["Content-Security-Policy"]
        status, headers, body = send(port, "POST", "/write", json.dumps(to_write()).encode())
        assert status == 200 and len(body.splitlines()) == 41
        assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize("request_", [("GET", "/"), ("GET", "/playground.js"), RUNS])
def test_only_127_0_0_1_and_localhost_are_answered(page, request_):
    with served(page) as port:
        for host in ("127.0.0.1", f"127.0.0.1:{port}", "localhost", "localhost:80"):
            assert send(port, *request_, Host=host)[0] == 200
        for host in (
            "",
            "example.com",
            f"example.com:{port}",
            "127.0.0.1.example.com",
            "localhost@example.com",
            "localhost:",
            "127.0.0.1:80:80",
            "evil-localhost",
        ):
            status, _, body = send(port, *request_, Host=host)
            assert status == 403 and b"out/tiny" not in body, host


@pytest.mark.parametrize("request_", [("GET", "/"), RUNS, ("POST", "/write", b"{}")])
def test_requests_from_other_pages_are_refused(page, request_):
    with served(page) as port:
        own = f"http://127.0.0.1:{port}"
        assert send(port, *request_, Origin=own)[0] == 200
        for origin in (
            "http://example.com",
            "null",
            "http://127.0.0.1",
            f"{own}0",
            f"https{own[4:]}",
        ):
            status, headers, _ = send(port, *request_, Origin=origin)
            assert status == 403 and "Access-Control-Allow-Origin" not in headers, origin


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/gradio_api/upload", b"--x\r\n\r\nfile\r\n--x--", 404),
        ("POST", "/upload", b"file", 404),
        ("POST", "/", b"{}", 404),
        ("POST", "/answer", b"{}", 404),
        ("POST", "/__init__", b"{}", 404),
        ("POST", "/runs", None, 413),
        ("PUT", "/runs", b"{}", 501),
        ("OPTIONS", "/runs", None, 501),
        ("GET", "/playground.py", None, 404),
        ("GET", "/../train.py", None, 404),
        ("GET", "/out/tiny/ckpt.pt", None, 404),
    ],
)
def test_nothing_but_the_page_is_served_and_nothing_is_stored(page, method, path, body, status):
    before = sorted(Path().rglob("*"))
    with served(page) as port:
        headers = {"Content_Length": "0x1"} if status == 413 else {}
        assert send(port, method, path, body, **headers)[0] == status
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b"3", b"null"])
def test_a_body_that_is_not_an_object_gets_a_sentence(page, body, capsys):
    with served(page) as port:
        status, _, answer = send(port, "POST", "/write", body)
        assert status == 200 and "error" in json.loads(answer)
    assert "Traceback" not in capsys.readouterr().err


def test_a_large_request_is_refused_before_it_is_read(page):
    with served(page) as port:
        assert send(port, "POST", "/write", Content_Length=str(1 << 40))[0] == 413


def test_a_text_ends_when_the_page_closes_the_connection(page, capsys, monkeypatch):
    ended = threading.Event()

    def endless(*_):
        try:
            while True:
                yield {"text": "a" * 1000}
        finally:
            ended.set()

    monkeypatch.setattr(playground, "write", endless)
    with served(page) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/write", json.dumps(to_write()).encode())
        response = connection.getresponse()
        assert response.read(10_000)
        response.close()
        connection.close()
        assert ended.wait(20)
    assert "Traceback" not in capsys.readouterr().err


# The command


def test_out_dir_may_be_repeated(monkeypatch, capsys):
    made = []

    class NoServer:
        def __init__(self, page, port):
            made.append(page.checkpoints)
            raise OSError(98, "Address already in use")

    monkeypatch.setattr(playground, "Server", NoServer)
    monkeypatch.setattr(sys, "argv", ["x", "--out_dir=a", "--out_dir=b", "--out_dir=a/"])
    with pytest.raises(UserError, match="port 7860: Address already in use; choose another --port"):
        playground.main(playground.PlaygroundConfig(out_dir="a", checkpoint="best.pt"))
    assert list(made[0].runs) == ["a", "b"]
    assert made[0].runs["a"] == ["a/best.pt", "a/ckpt.pt"]
    assert "a: no checkpoint yet" in capsys.readouterr().out


def test_a_port_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="port"):
        playground.PlaygroundConfig(port=0)


def test_help_fits_on_100_columns():
    lines = help_text(playground.PlaygroundConfig).splitlines()
    assert any("--out_dir=" in line for line in lines) and max(map(len, lines)) <= 100
