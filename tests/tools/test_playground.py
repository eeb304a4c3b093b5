"""The playground without a browser: probabilities, attention, requests, and who may send them."""

import http.client
import json
import math
import os
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from configurator import UserError
from itertools import repeat
from pathlib import Path

import pytest
import torch
from conftest import TEXT
from torch.nn import functional as F

import model as model_file
import sample
from sample import SampleConfig
from support.checkpoint import Checkpoint, save_checkpoint
from support.tokenizer import BPETokenizer, CharTokenizer
from tools import playground
from tools.playground import Checkpoints, Playground

CHECKPOINT = "out/tiny/ckpt.pt"
OPTIONS = {"start": "3 times", "temperature": 0.8, "max_new_tokens": 40, "seed": 1337}
TOKENIZER = CharTokenizer.from_text(TEXT)


def write_run(out_dir: str, step: int = 13) -> None:
    """Write a random model, whose context is 16 tokens, and a log."""
    torch.manual_seed(step)
    shape = dict(block_size=16, n_layer=2, n_head=2, n_embd=16)
    model = model_file.GPT(model_file.GPTConfig(vocab_size=TOKENIZER.vocab_size, **shape))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    state = dict(train_config={"sample_start": "4 times"}, dataset={}, step=step, best_val_loss=2.0)
    checkpoint = Checkpoint(model.config, model.state_dict(), TOKENIZER.to_dict(), **state)
    for name in ("ckpt.pt", "best.pt"):
        save_checkpoint(Path(out_dir, name), checkpoint)
    records = [{"step": n, "epoch": n / 8, "loss": 3.0} for n in range(1, 13)]
    records += [{"step": 12, "epoch": 1.5, "train_loss": 2.5, "val_loss": 2.75}]
    records += [{"step": 12, "epoch": 1.5, "sample": "4 times"}]
    records += [{"step": 20, "epoch": 2.5, "train_loss": 2.0, "val_loss": 2.25}]
    Path(out_dir, "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def page(tmp_path, monkeypatch) -> Playground:
    """Return the playground of one run."""
    monkeypatch.chdir(tmp_path)
    write_run("out/tiny")
    return Playground(Checkpoints(["out/tiny"]))


def to_write(checkpoint=CHECKPOINT, written=(), choice=None, **options) -> dict:
    """Return the fields of a request to write."""
    fields = {"checkpoint": checkpoint, "options": OPTIONS | options}
    return fields | {"written": list(written), "choice": choice}


def ask_to_write(page: Playground, *args, **changed) -> list[dict]:
    return list(page.answer("write", to_write(*args, **changed)))


def ask_for_attention(page: Playground, text: str, count=24) -> dict:
    return next(page.answer("attention", {"checkpoint": CHECKPOINT, "text": text, "count": count}))


def taken(token: dict) -> dict:
    (candidate,) = [c for c in token["candidates"] if c["taken"]]
    return candidate


def label(i: int) -> str:
    return playground.visible(TOKENIZER.decode_bytes([i]))


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.8}, {"top_k": 5}, {"temperature": 0.7, "top_p": 0.6}]
)
def test_the_second_probabilities_are_those_that_a_token_is_drawn_with(sampling, monkeypatch):
    logits, given = torch.randn(40, generator=torch.Generator().manual_seed(4)) * 3, []
    monkeypatch.setattr(
        torch, "multinomial", lambda probs, *_, **__: given.append(probs) or torch.tensor([[0]])
    )
    model_file.sample_token(logits[None], **sampling)
    before, after = playground.probabilities(logits, **sampling)
    assert torch.equal(before, logits.softmax(-1)) and after.argmax() == before.argmax()
    expected = (given[0][0] / given[0].sum()).sort(descending=True).values
    assert torch.equal(after.sort(descending=True).values[: len(expected)], expected)
    assert math.isclose(after.sum(), 1, rel_tol=1e-5)
    after = playground.probabilities(torch.tensor([0.0, 2.0, 1.0]), temperature=0)[1]
    assert after.tolist() == [0, 1, 0]


@pytest.mark.parametrize("start", ["3 times 4 is 12.", "3 times 4 is 12.\n3 times"])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 3, "top_p": 0.7, "seed": 5}])
def test_the_text_is_the_one_that_sample_py_prints(page, options, start, capsys):
    options = {"start": start, "max_new_tokens": 40, **options}
    sample.main(SampleConfig(out_dir="out/tiny", dtype="float32", **options))
    about, *written = ask_to_write(page, **options)
    assert about["about"].startswith("step 13, validation loss 2.750 at step 12 (epoch 1.5)")
    note = "; the prompt has 24 tokens and this model sees the last 16"
    assert about["about"].endswith(note) == (len(start) > 16)
    text = "".join(token["text"] for token in written)
    assert f"{start}{text}\n" == capsys.readouterr().out


def test_each_token_has_its_candidates_and_the_most_likely_tokens_after_each_layer(page):
    _, *written = ask_to_write(page, temperature=1.5, top_p=0.9)
    model = page.checkpoints.load(CHECKPOINT).model
    ids = TOKENIZER.encode("3 times") + [token["id"] for token in written]
    for i, token in enumerate(written, start=len("3 times")):
        context = torch.tensor(ids[max(0, i - 16) : i])
        with torch.no_grad():
            x = model.transformer.wte(context) + model.transformer.wpe.weight[: len(context)]
            x = x[None]
            for block, row in zip(model.transformer.h, token["lens"], strict=True):
                x = block(x)
                logits = model.lm_head(model.transformer.ln_f(x[0, -1]))
                best = logits.softmax(-1).topk(3)
                shown = [(c["label"], c["taken"]) for c in row]
                assert shown == [(label(n), n == ids[i]) for n in best[1]]
                torch.testing.assert_close(torch.tensor([c["p"] for c in row]), best[0])
        before, after = playground.probabilities(logits, temperature=1.5, top_p=0.9)
        order = before.argsort(descending=True).tolist()
        assert [c["id"] for c in token["candidates"]][:10] == order[:10]
        assert taken(token)["label"] == playground.visible(token["text"].encode())
        for c in token["candidates"]:
            n = c["id"]
            shown = (c["rank"], c["label"], c["taken"])
            assert shown == (order.index(n) + 1, label(n), n == ids[i])
            assert math.isclose(c["before"], before[n], rel_tol=1e-3)
            assert math.isclose(c["after"], after[n], rel_tol=1e-3)
    beyond = [token for token in written if len(token["candidates"]) == 11]
    assert beyond and all(token["candidates"][10]["taken"] for token in beyond)


def test_labels_show_characters_that_are_invisible():
    shown = {b" the": "␣the", b"\n": "↵", b"\xe2\x80": r"\xe2\x80", b"\x07": r"\x07"}
    assert {token: playground.visible(token) for token in shown} == shown


def test_a_character_in_two_tokens_is_shown_when_it_is_complete():
    tokenizer = BPETokenizer.train(["a"], 257)
    shape = dict(vocab_size=257, block_size=8, n_layer=1, n_head=1, n_embd=4)
    model = model_file.GPT(model_file.GPTConfig(**shape)).eval()
    loaded = playground.Loaded(Path("x"), model, tokenizer, 0, "")
    first, second = (tokenizer.tokens.index(token) for token in (b"\xc3", b"\xa9"))
    options = SampleConfig(start="a", max_new_tokens=1)
    assert next(playground.write(loaded, options, [], choice=first))["text"] == ""
    assert next(playground.write(loaded, options, [first], choice=second))["text"] == "é"


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0}])
def test_a_text_written_in_parts_is_the_text_written_at_once(page, options):
    _, *whole = ask_to_write(page, max_new_tokens=24, **options)
    parts = []
    for count in (1, 1, 1, 9, 1, 11):
        ids = [token["id"] for token in parts]
        parts += ask_to_write(page, written=ids, max_new_tokens=count, **options)[1:]
    for a, b in zip(parts, whole, strict=True):
        for c, d in zip(a["candidates"], b["candidates"], strict=True):
            assert (c["id"], c["taken"]) == (d["id"], d["taken"])
            assert math.isclose(c["before"], d["before"], rel_tol=1e-4)


def test_a_choice_is_put_into_the_text_and_the_model_goes_on_from_it(page):
    _, *written = ask_to_write(page, max_new_tokens=20)
    ids = [token["id"] for token in written]
    other = next(c for c in written[6]["candidates"] if not c["taken"])
    _, *new = ask_to_write(page, written=ids[:6], choice=other["id"], max_new_tokens=2)
    assert (taken(new[0])["id"], taken(new[0])["rank"]) == (other["id"], other["rank"])
    _, *same = ask_to_write(page, written=[*ids[:6], other["id"]], max_new_tokens=2)
    assert [token["id"] for token in new[1:]] == [token["id"] for token in same]
    for a, b in zip(new, [written[6], *same], strict=True):
        for c, d in zip(a["candidates"][:10], b["candidates"][:10], strict=True):
            assert c["id"] == d["id"] and math.isclose(c["before"], d["before"], rel_tol=1e-4)


def test_each_token_of_a_prompt_has_its_probability(page):
    model, text = page.checkpoints.load(CHECKPOINT).model, "3 times 4 is 12.\n3"
    (answer,) = page.answer("tokens", {"checkpoint": CHECKPOINT, "text": text})
    ids = TOKENIZER.encode(text)[:16]
    assert [token["id"] for token in answer["tokens"]] == ids
    assert "".join(token["label"] for token in answer["tokens"]) == "3␣times␣4␣is␣12."
    with torch.no_grad():
        p = model(torch.tensor([ids]))[0][0, :-1].softmax(-1)[range(15), ids[1:]]
    assert [token["p"] for token in answer["tokens"]] == [None, *map(pytest.approx, p.tolist())]
    assert math.isclose(answer["loss"], -p.log().mean(), rel_tol=1e-4)
    assert (answer["count"], answer["characters"]) == (18, 18)
    (answer,) = page.answer("tokens", {"checkpoint": CHECKPOINT, "text": "3"})
    assert [token["p"] for token in answer["tokens"]] == [None] and answer["loss"] is None


def unmasked_attention(q, k, v, dropout=0.0):
    return F.scaled_dot_product_attention(q, k, v)


def test_the_maps_have_the_attention_and_the_loss_with_and_without_the_mask(page, monkeypatch):
    model, before = page.checkpoints.load(CHECKPOINT).model, model_file.attention
    x = torch.tensor([TOKENIZER.encode("3 times")])
    assert len(ask_for_attention(page, "3 times", count=4)["labels"]) == 4
    answer = ask_for_attention(page, "3 times")
    assert "".join(answer["labels"]) == "3␣times" and answer["count"] == 7
    assert model_file.attention is before
    for map_, masked, attention in zip(
        answer["maps"], (True, False), (before, unmasked_attention), strict=True
    ):
        layers, loss = playground.attention_weights(model, x, masked)
        weights = torch.tensor(map_["weights"]) / 10_000
        torch.testing.assert_close(weights, torch.stack(layers), rtol=0, atol=6e-5)
        assert weights.shape == (2, 2, 7, 7) and bool(weights.triu(1).any()) is not masked
        torch.testing.assert_close(torch.stack(layers).sum(-1), torch.ones(2, 2, 7))
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(model_file, "attention", attention)
            expected = F.cross_entropy(model(x)[0][0, :-1], x[0, 1:])
        assert math.isclose(loss, expected, rel_tol=1e-5) and map_["loss"] == loss
    monkeypatch.setattr(playground, "LARGEST_MAPS", 2 * 2 * 2 * 5 * 5 + 1)
    assert len(ask_for_attention(page, "3 times")["labels"]) == 5  # many heads: fewer tokens
    monkeypatch.setattr(model, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        playground.attention_weights(model, x, masked=False)
    assert model_file.attention is before


def test_a_text_stays_the_same_while_another_thread_looks_at_attention(page):
    alone = ask_to_write(page)
    model, x = page.checkpoints.load(CHECKPOINT).model, torch.zeros(1, 16, dtype=torch.int64)
    with ThreadPoolExecutor(1) as pool:
        looks = [pool.submit(playground.attention_weights, model, x, False) for _ in range(300)]
        assert ask_to_write(page) == alone and len(alone) == 41
        assert looks[0].done() and not looks[-1].done()


@pytest.mark.parametrize(
    ("action", "changed", "words"),
    [
        ("write", {"options": {**OPTIONS, "start": ""}}, "the prompt is empty"),
        ("write", {"options": {**OPTIONS, "start": "Zeus"}}, "character 'Z' at position 0"),
        ("write", {"options": {**OPTIONS, "top_p": 0}}, "top_p"),
        ("write", {"written": [TOKENIZER.vocab_size]}, "the request does not have the fields"),
        ("write", {"written": [1.5]}, "the request does not have the fields"),
        ("write", {"choice": -1}, "the request does not have the fields"),
        ("write", {"checkpoint": ""}, "no checkpoint yet: choose a checkpoint of a run"),
        ("write", {"checkpoint": "out/other/ckpt.pt"}, "choose a checkpoint of a run"),
        ("write", {"checkpoint": "out/tiny/../tiny/ckpt.pt"}, "choose a checkpoint of a run"),
        ("tokens", {"text": ""}, "the prompt is empty"),
        ("attention", {"text": "3"}, "1 of 1 tokens are shown, but attention needs 2"),
        ("attention", {"text": "3 times", "count": -5}, "0 of 7 tokens are shown"),
        ("log", {"run": "out/other"}, "not a run of this page"),
        ("log", {"run": "out/none"}, "log.jsonl: no such file"),
        ("log", {}, "the request does not have the fields"),
    ],
)
def test_a_mistake_is_a_sentence_and_the_next_request_works(page, action, changed, words):
    shutil.copytree("out/tiny", "out/other")
    page.checkpoints.runs["out/none"] = []
    fields = {**to_write(), "count": 24, "version": 0} | changed
    *_, answer = page.answer(action, fields)
    assert words in answer["error"] and len(ask_to_write(page)) == 41


def test_running_out_of_memory_is_a_sentence(page, monkeypatch):
    monkeypatch.setattr(torch, "stack", lambda _: torch.empty(1 << 55))
    assert "out of memory" in ask_for_attention(page, "3 times")["error"]


def test_a_run_is_offered_as_soon_as_it_has_a_checkpoint(page):
    page = Playground(Checkpoints(["out/later"]))
    assert next(page.answer("runs", {}))["runs"] == {"out/later": []}
    assert "no such checkpoint" in ask_to_write(page, "out/later/ckpt.pt")[0]["error"]
    write_run("out/later")
    paths = ["out/later/ckpt.pt", "out/later/best.pt"]
    assert next(page.answer("runs", {}))["runs"] == {"out/later": paths}
    fields = to_write(paths[0])
    del fields["options"]["start"]  # the first prompt is the one of the run's own samples
    about, *written = page.answer("write", fields)
    assert about["prompt"] == "4 times" and len(written) == 40


def test_the_newest_run_is_the_one_whose_log_changed_last(page):
    shutil.copytree("out/tiny", "out/old")
    page = Playground(Checkpoints(["out/none", "out/old", "out/tiny"]))
    for seconds, out_dir in enumerate(("out/tiny", "out/old"), start=10):
        log = Path(out_dir, "log.jsonl")
        os.utime(log, times=(log.stat().st_mtime + seconds,) * 2)
        assert next(page.answer("runs", {}))["newest"] == out_dir


def test_a_checkpoint_is_read_once_and_again_when_training_replaced_it(page):
    load = page.checkpoints.load
    assert load(CHECKPOINT) is load(CHECKPOINT) and load(CHECKPOINT).step == 13
    write_run("out/tiny", step=18)
    assert load(CHECKPOINT).step == 18
    Path("out/tiny/log.jsonl").unlink()
    assert ask_to_write(page)[0]["about"] == "step 18, no validation loss in its log"


def test_the_log_is_answered_when_it_changed_without_a_half_written_line(page):
    (answer,) = page.answer("log", {"run": "out/tiny", "version": None})
    records = answer["records"]
    assert [r["step"] for r in records] == [*range(1, 13), 12, 12, 20]
    assert list(records[-3].values()) == [12, 1.5, None, 2.5, 2.75, None]
    assert list(records[-2].values()) == [12, 1.5, None, None, None, "4 times"]
    version = {"run": "out/tiny", "version": json.loads(json.dumps(answer["version"]))}
    assert list(page.answer("log", version)) == []
    log = Path("out/tiny/log.jsonl")
    with open(log, "a", encoding="utf-8") as file:
        file.write('{"step": 21, "epoch": 2.6, "loss": 1.25}\n{"step": 22, "lo')
    os.utime(log, times=(log.stat().st_mtime + 1,) * 2)
    (longer,) = page.answer("log", version)
    assert [r["step"] for r in longer["records"][len(records) :]] == [21]


@pytest.fixture
def port(page):
    with playground.Server(page, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def send(port: int, method: str, path: str, body=None, **headers: str) -> tuple:
    """Return the status, headers and body of an answer. A header name may have _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"Host": f"127.0.0.1:{port}"} | {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    answer = response.status, response.headers, response.read()
    connection.close()
    return answer


def test_the_page_and_its_requests_are_answered(port):
    for path, words in (("/", b"<h1>"), ("/playground.js", b"ask("), ("/playground.css", b"{")):
        status, headers, body = send(port, "GET", path)
        assert status == 200 and words in body
        assert "default-src 'self'" in headers["Content-Security-Policy"]
    status, headers, body = send(port, "POST", "/write", json.dumps(to_write()).encode())
    assert status == 200 and len(body.splitlines()) == 41
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize("request_", [("GET", "/"), ("POST", "/runs", b"{}")])
def test_only_127_0_0_1_and_localhost_and_pages_of_this_server_are_answered(port, request_):
    own = f"http://127.0.0.1:{port}"
    for host in ("127.0.0.1", f"127.0.0.1:{port}", "localhost", "localhost:80"):
        assert send(port, *request_, Host=host)[0] == 200
    assert send(port, *request_, Origin=own)[0] == 200
    hosts = ("", "example.com", f"example.com:{port}", "127.0.0.1.example.com", "localhost:")
    hosts += ("localhost@example.com", "127.0.0.1:80:80", "evil-localhost")
    origins = ("http://example.com", "null", "http://127.0.0.1", f"{own}0", f"https{own[4:]}")
    refused = [{"Host": host} for host in hosts] + [{"Origin": origin} for origin in origins]
    for headers in refused:
        status, answered, body = send(port, *request_, **headers)
        assert status == 403 and b"out/tiny" not in body, headers
        assert "Access-Control-Allow-Origin" not in answered


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/__init__", b"{}", 404),
        ("POST", "/runs", "0x1", 413),
        ("POST", "/write", str(1 << 40), 413),  # refused before it is read
        ("OPTIONS", "/runs", None, 501),
        ("GET", "/playground.py", None, 404),
        ("GET", "/../train.py", None, 404),
    ],
)
def test_nothing_but_the_page_is_served_and_nothing_is_stored(port, method, path, body, status):
    before = sorted(Path().rglob("*"))
    headers = {"Content_Length": body} if status == 413 else {}
    assert send(port, method, path, None if headers else body, **headers)[0] == status
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b"3", b"[]", b"null"])
def test_a_body_that_is_not_an_object_gets_a_sentence(port, body, capsys):
    status, _, answer = send(port, "POST", "/write", body)
    assert status == 200 and "error" in json.loads(answer)
    assert "Traceback" not in capsys.readouterr().err


def test_a_text_ends_when_the_page_closes_the_connection(port, capsys, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(playground, "write", lambda *_: repeat({"text": "a" * 1000}))
    monkeypatch.setattr(playground.Server, "shutdown_request", lambda *_: ended.set())
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/write", json.dumps(to_write()).encode())
    response = connection.getresponse()
    assert response.read(10_000)
    response.close()
    connection.close()
    assert ended.wait(20)
    assert "Traceback" not in capsys.readouterr().err


def test_out_dir_may_name_several_runs_and_a_port_in_use_is_named(capsys):
    assert Checkpoints(["a"], first="best.pt").runs == {"a": ["a/best.pt", "a/ckpt.pt"]}
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: .* in use; choose another --port"):
            playground.main(playground.PlaygroundConfig(out_dir="none,out/b", port=port))
    assert capsys.readouterr().out.count(": no checkpoint yet;") == 2
    with pytest.raises(UserError, match="port=0"):
        playground.PlaygroundConfig(port=0)
