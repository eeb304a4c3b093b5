"""The playground without a browser: what it computes, its requests, and who may send them."""

import http.client
import json
import math
import os
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

import pytest
import torch
from conftest import TEXT
from torch.nn import functional as F

import model as model_file
import sample
from configurator import UserError
from sample import SampleConfig
from support.checkpoint import Checkpoint, save_checkpoint
from support.tokenizer import CharTokenizer
from tools import playground
from tools.playground import Playground

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


PAGE = {"/": b"<h1>", "/playground.js": b"ask(", "/engine.js": b"GPT", "/playground.css": b"{"}


@pytest.fixture
def page(place) -> Playground:
    """Return the playground of one run."""
    write_run("out/tiny")
    return Playground(["out/tiny"])


def to_write(checkpoint=CHECKPOINT, written=(), **options) -> dict:
    """Return the fields of a request to write."""
    return {"checkpoint": checkpoint, "options": OPTIONS | options, "written": list(written)}


def ask_to_write(page: Playground, *args, **changed) -> list[dict]:
    return list(page.answer("write", to_write(*args, **changed)))


def ask(page: Playground, action: str, text: str, **changed) -> dict:
    fields = {"checkpoint": CHECKPOINT, "text": text, "written": [], "count": 24, "maps": True}
    return next(page.answer(action, fields | {"masked": True, "layer": 0, "head": 0} | changed))


def ids_of(tokens: list[dict]) -> list[int]:
    return [token["id"] for token in tokens]


def bytes_of(tokens: list[dict]) -> bytes:
    return b"".join(token["bytes"].encode("latin-1") for token in tokens)


@pytest.mark.parametrize("start", ["3 times 4 is 12.", "3 times 4 is 12.\n3 times"])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 3, "top_p": 0.7, "seed": 5}])
def test_the_text_is_the_one_that_sample_py_prints(page, options, start, capsys):
    options = {"start": start, "max_new_tokens": 40, **options}
    sample.main(SampleConfig(out_dir="out/tiny", dtype="float32", **options))
    facts, *written = ask_to_write(page, **options)
    assert (facts["step"], facts["prompt"], facts["count"]) == (13, start, len(start))
    assert (facts["config"]["block_size"], facts["parameters"]) == (16, 7_136)
    assert f"{start}{bytes_of(written).decode()}\n" == capsys.readouterr().out


def test_each_token_has_its_probability_and_a_look_at_it_shows_what_the_model_computed(page):
    _, *written = ask_to_write(page, temperature=1.5, top_p=0.9)
    model = page.load(CHECKPOINT).model
    ids = TOKENIZER.encode("3 times") + ids_of(written)
    for i, token in enumerate(written, start=len("3 times")):
        seen = dict(written=ids[len("3 times") : i], id=ids[i], layer=1, head=1)
        answer = ask(page, "look", "3 times", **seen)
        context = torch.tensor(ids[max(0, i - 16) : i])
        assert ids_of(answer["context"]) == context.tolist()
        with torch.no_grad():
            x = model.transformer.wte(context) + model.transformer.wpe.weight[: len(context)]
            x = x[None]
            for block, row in zip(model.transformer.h, answer["lens"], strict=True):
                values, x = x, block(x)
                logits = model.lm_head(model.transformer.ln_f(x[0, -1]))
                best = logits.softmax(-1).topk(3)
                assert ids_of(row) == best[1].tolist()
                torch.testing.assert_close(torch.tensor([c["p"] for c in row]), best[0])
        ordered = logits.sort(descending=True)
        close = dict(rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.tensor(answer["logits"]), ordered[0], **close)
        order, candidates = ordered[1].tolist(), answer["candidates"]
        assert ids_of(candidates)[:10] == order[:10] and ids[i] in ids_of(candidates)
        assert [order.index(c["id"]) + 1 for c in candidates] == [c["rank"] for c in candidates]
        assert math.isclose(token["p"], logits.softmax(-1)[ids[i]], rel_tol=1e-3)
        assert len(answer["rows"]) == 2 and all(len(heads) == 2 for heads in answer["rows"])
        for head in (head for heads in answer["rows"] for head in heads):
            assert len(head) == len(context) and math.isclose(sum(head), 1, abs_tol=2e-3)
        assert answer["rows"][1][1] == answer["values"]["weights"][-1]
        numbers = {name: torch.tensor(x) for name, x in answer["values"].items()}
        torch.testing.assert_close(numbers["input"], values[0, -8:], **close)
        torch.testing.assert_close(numbers["output"], x[0, -8:], **close)
        added = numbers["attention"] + numbers["mlp"]
        torch.testing.assert_close(numbers["output"], numbers["input"] + added, rtol=0, atol=3e-4)
        shapes = {"normed": 16, "q": 8, "k": 8, "v": 8, "hidden": 64}
        assert {name: numbers[name].size(1) for name in shapes} == shapes
    assert any(len(ask(page, "look", "3", id=n)["candidates"]) == 11 for n in range(18))


def test_a_prompt_is_not_read_as_an_argument(page, monkeypatch):
    loaded = page.load(CHECKPOINT)._replace(tokenizer=CharTokenizer("/\\n~"))
    monkeypatch.setattr(page, "load", lambda _: loaded)
    for start in ("~/", "\\n"):
        assert next(page.answer("write", to_write(start=start)))["prompt"] == start


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0}])
def test_a_text_written_in_parts_is_the_text_written_at_once(page, options):
    _, *whole = ask_to_write(page, max_new_tokens=24, **options)
    parts = []
    for count in (1, 1, 1, 9, 1, 11):
        parts += ask_to_write(page, written=ids_of(parts), max_new_tokens=count, **options)[1:]
    assert ids_of(parts) == ids_of(whole)
    for a, b in zip(parts, whole, strict=True):
        assert math.isclose(a["p"], b["p"], rel_tol=1e-4)


def test_a_text_is_read_as_far_as_the_context_goes(page):
    text = "3 times 4 is 12.\n3"
    ids = TOKENIZER.encode(text)[:16]
    for answer in (ask(page, "read", text), ask(page, "read", text[:9], written=ids[9:])):
        assert ids_of(answer["tokens"]) == ids and bytes_of(answer["tokens"]) == text[:16].encode()
        assert len(answer["losses"]) == 15  # the next test has their values
    assert ask(page, "read", text)["count"] == 18
    answer = ask(page, "read", "3", maps=False)
    assert answer["losses"] == answer["weights"] == []


def unmasked_attention(q, k, v, dropout=0.0):
    return F.scaled_dot_product_attention(q, k, v)


def test_the_maps_have_the_attention_and_the_loss_with_and_without_the_mask(page, monkeypatch):
    model, before = page.load(CHECKPOINT).model, model_file.attention
    x = torch.tensor([TOKENIZER.encode("3 times")])
    assert len(ask(page, "read", "3 times", count=4)["tokens"]) == 4
    for masked, attention in ((True, before), (False, unmasked_attention)):
        answer = ask(page, "read", "3 times", masked=masked)
        weights = torch.tensor(answer["weights"])
        layers, _ = playground.observe(model, x, masked)
        exact = torch.stack([layer["weights"] for layer in layers])
        torch.testing.assert_close(weights, exact, rtol=0, atol=6e-5)
        assert weights.shape == (2, 2, 7, 7) and bool(weights.triu(1).any()) is not masked
        torch.testing.assert_close(exact.sum(-1), torch.ones(2, 2, 7))
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(model_file, "attention", attention)
            logits = model(x)[0][0, :-1]
        expected = F.cross_entropy(logits, x[0, 1:], reduction="none")
        torch.testing.assert_close(torch.tensor(answer["losses"]), expected)
    monkeypatch.setattr(model, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        playground.observe(model, x, masked=False)
    assert model_file.attention is before
    assert not any(module._forward_hooks for module in model.modules())


def test_a_text_stays_the_same_while_another_thread_looks_at_attention(page):
    alone = ask_to_write(page)
    model, x = page.load(CHECKPOINT).model, torch.zeros(1, 16, dtype=torch.int64)
    with ThreadPoolExecutor(1) as pool:
        writing, looks = pool.submit(ask_to_write, page), 0
        while not writing.done():
            playground.observe(model, x, False)
            looks += 1
        assert writing.result() == alone and len(alone) == 41 and looks > 1


@pytest.mark.parametrize(
    ("action", "changed", "words"),
    [
        ("write", {"options": {**OPTIONS, "start": ""}}, "the prompt is empty"),
        ("write", {"options": {**OPTIONS, "start": "Zeus"}}, "character 'Z' at position 0"),
        ("write", {"options": {**OPTIONS, "top_p": 0}}, "top_p"),
        ("write", {"written": [TOKENIZER.vocab_size]}, "the request does not have the fields"),
        ("write", {"written": [1.5]}, "the request does not have the fields"),
        ("write", {"written": None}, "the request does not have the fields"),
        ("write", {"checkpoint": ""}, "no checkpoint yet: choose a checkpoint of a run"),
        ("write", {"checkpoint": "out/other/ckpt.pt"}, "choose a checkpoint of a run"),
        ("write", {"checkpoint": "out/tiny/../tiny/ckpt.pt"}, "choose a checkpoint of a run"),
        ("read", {"text": ""}, "the prompt is empty"),
        ("look", {"text": ""}, "the prompt is empty"),
        ("look", {"id": 18}, "the request does not have the fields"),
        ("look", {"layer": 2}, "the request does not have the fields"),
        ("log", {"run": "out/other"}, "not a run of this page"),
        ("log", {"run": "out/none"}, "log.jsonl: no such file"),
        ("log", {}, "the request does not have the fields"),
    ],
)
def test_a_mistake_is_a_sentence_and_the_next_request_works(page, action, changed, words):
    shutil.copytree("out/tiny", "out/other")
    page.paths["out/none"] = []
    fields = {**to_write(), "text": "3", "id": 0, "layer": 0, "head": 0, "version": 0} | changed
    *_, answer = page.answer(action, fields)
    assert words in answer["error"] and len(ask_to_write(page)) == 41


def test_running_out_of_memory_is_a_sentence(page, monkeypatch):
    monkeypatch.setattr(torch, "stack", lambda _: torch.empty(1 << 55))
    assert "out of memory" in ask(page, "look", "3 times", id=0)["error"]


def test_a_run_is_offered_as_soon_as_it_has_a_checkpoint(page):
    page = Playground(["out/later"])
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
    page = Playground(["out/none", "out/old", "out/tiny"])
    for seconds, out_dir in enumerate(("out/tiny", "out/old"), start=10):
        log = Path(out_dir, "log.jsonl")
        os.utime(log, times=(log.stat().st_mtime + seconds,) * 2)
        assert next(page.answer("runs", {}))["newest"] == out_dir


def test_a_checkpoint_is_read_once_and_again_when_training_replaced_it(page):
    load = page.load
    assert load(CHECKPOINT) is load(CHECKPOINT) and load(CHECKPOINT).step == 13
    write_run("out/tiny", step=18)
    assert load(CHECKPOINT).step == 18


def test_the_log_is_answered_when_it_changed_without_a_half_written_line(page):
    (answer,) = page.answer("log", {"run": "out/tiny", "version": None})
    records = answer["records"]
    assert [r["step"] for r in records] == [*range(1, 13), 12, 12, 20]
    assert (records[-3]["train_loss"], records[-3]["val_loss"]) == (2.5, 2.75)
    assert records[-2]["sample"] == "4 times"
    version = {"run": "out/tiny", "version": json.loads(json.dumps(answer["version"]))}
    assert list(page.answer("log", version)) == []
    log = Path("out/tiny/log.jsonl")
    with open(log, "a", encoding="utf-8") as file:
        file.write('{"step": 21, "epoch": 2.6, "loss": 1.25}\n{"step": 22, "lo')
    os.utime(log, times=(log.stat().st_mtime + 1,) * 2)
    (longer,) = page.answer("log", version)
    assert [r["step"] for r in longer["records"][len(records) :]] == [21]


@contextmanager
def serve(page: Playground, host: str = "127.0.0.1"):
    with playground.Server(page, 0, host) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def port(page):
    with serve(page) as server:
        yield server.server_address[1]


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
    policy = "default-src 'self'; img-src data:; frame-ancestors 'none'"  # and no page can show it
    for path, words in PAGE.items():
        status, headers, body = send(port, "GET", path)
        assert status == 200 and words in body and headers["Content-Security-Policy"] == policy
    status, headers, body = send(port, "POST", "/write", json.dumps(to_write()).encode())
    assert status == 200 and len(body.splitlines()) == 41
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize("name", ["127.0.0.1", "My-PC.local"])
@pytest.mark.parametrize("request_", [("GET", "/"), ("POST", "/runs", b"{}")])
def test_only_the_names_of_this_server_and_its_own_pages_are_answered(page, request_, name):
    with serve(page, name) as server:
        port = server.server_address[1]
        own = f"http://127.0.0.1:{port}"
        assert (server.server_address[0] == "127.0.0.1") == (name == "127.0.0.1")
        for host in ("127.0.0.1", f"127.0.0.1:{port}", "localhost", "localhost:80"):
            assert send(port, *request_, Host=host)[0] == 200
        assert send(port, *request_, Origin=own)[0] == 200
        hosts = ["", "example.com", f"example.com:{port}", "127.0.0.1.example.com", "localhost:"]
        hosts += ["localhost@example.com", "127.0.0.1:80:80", "evil-localhost", "evil-my-pc.local"]
        origins = ("http://example.com", "null", "http://127.0.0.1", f"{own}0", f"https{own[4:]}")
        refused = [{"Host": host} for host in hosts] + [{"Origin": origin} for origin in origins]
        other = {"Host": f"my-pc.local:{port}"}  # as a browser sends it
        if name == "127.0.0.1":
            refused.append(other)
        else:
            refused.append(other | {"Origin": own})
            assert send(port, *request_, **other)[0] == 200
            assert send(port, *request_, **other, Origin=f"http://my-pc.local:{port}")[0] == 200
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
    monkeypatch.setattr(Playground, "write", lambda *_: repeat({"text": "a" * 1000}))
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
    assert Playground(["a"], first="best.pt").paths == {"a": ["a/best.pt", "a/ckpt.pt"]}
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: .* in use; choose another --port"):
            playground.main(playground.PlaygroundConfig(out_dir="none,out/b", port=port))
    assert capsys.readouterr().out.count(": no checkpoint yet;") == 2
    with pytest.raises(UserError, match="port=0"):
        playground.PlaygroundConfig(port=0)
