"""The model in one HTML file: what is in the file, and engine.js in a real browser against PyTorch.

The tests with a browser need what test_playground_browser.py needs.
"""

import json
import random
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from playwright.sync_api import expect
from test_playground_browser import HOSTILE, chromium, opened, write_file

from configurator import UserError
from model import GPT, GPTConfig, candidates
from support.checkpoint import Checkpoint, save_checkpoint
from support.tokenizer import BPETokenizer, CharTokenizer
from tools import onepage, playground

pytestmark, browser_test = pytest.mark.usefixtures("place"), pytest.mark.browser
TEXT = "The quick brown fox's 12 dogs, they'll jump over naïve 漢字 and 🦊🦊!\n\n  Two  lines…\r\n"
# merges of characters that are white space in JavaScript alone, or in Unicode alone
MERGES = [TEXT * 3, "low lower lowest newer wider " * 9, "!\ufeff" * 30 + "\n\x85" * 30]
SMALL = dict(block_size=24, n_layer=2, n_head=4, n_embd=20)
MODELS = {  # a tokenizer, and a shape that needs each part of the engine in one of its two forms
    "char": (CharTokenizer.from_text(TEXT + HOSTILE), SMALL),
    "bpe": (
        BPETokenizer([*BPETokenizer.train(MERGES, 320).tokens, b"xyz"]),  # no pair leads to xyz
        SMALL | dict(bias=False, tie_weights=False, gelu="exact", n_layer=3),
    ),
}
PROMPT = "they'll jump over naïve 漢字"
NASTY = (  # texts, with a dot between two of them
    "· ·\n·\r\n\r\n·\t\u00a0\u3000\u2028 x·\ufeffbyte order mark·\x85next\x85 line·\x00\x1f·"
    "a!\ufeff!\ufeff \n\x85\n\x85 xyz\nxyz·🦊👩\u200d👧🇩🇪·漢字かな交じり文·e\u0301 é ǆ ß·١٢٣ ²½ Ⅷ·"
    "it's we'll they'RE don\u2019t·<|endoftext|>·a<|endoftext|><|endoftext|> b<|endof·  blanks  ·"
    "lone \ud83d surrogate \udd8a·العربية עברית हिन्दी ไทย·x  y   z\n \n·<script>&amp;'\"\\`${}"
).split("·")
COLLECT = """async ([action, fields]) => {
    const answers = [], plain = (_, x) => ArrayBuffer.isView(x) ? Array.from(x) : x;
    try {
        for await (const answer of ask(action, fields)) answers.push(answer);
    } catch (error) { answers.push({error: error.message}); }
    return JSON.parse(JSON.stringify(answers, plain));
}"""
DRAW = """window.draw = (seed, first, max_new_tokens) => {  // tokens of a model with three
    const engine = Object.create(Engine.prototype), logits = [0.5, 0.3, 0.2].map(Math.log);
    const facts = {config: {block_size: 8}}, model = {logits: () => Float32Array.from(logits)};
    Object.assign(engine, {facts, model, tokenizer: {encode: () => [0]}, token: id => ({id})});
    const options = {start: "a", temperature: 1, top_k: null, top_p: null, max_new_tokens, seed};
    return [...engine.write({options, written: Array(first).fill(0)})].slice(1).map(t => t.id);
}"""
ENCODE = """texts => {
    const {tokenizer} = JSON.parse(byId("model").textContent);
    const ours = new {char: CharTokenizer, bpe: BPETokenizer}[tokenizer.kind](tokenizer);
    const encode = text => { try { return ours.encode(text); } catch (e) { return e.message; } };
    return texts.map(encode);
}"""


def write_run(kind: str, start: str = "The", dtype=torch.float32) -> BPETokenizer | CharTokenizer:
    """Write a run with random weights, rounded to `dtype`, and return its tokenizer."""
    tokenizer, shape = MODELS[kind]
    V = tokenizer.vocab_size
    torch.manual_seed(12)
    model = GPT(GPTConfig(vocab_size=V, pad_vocab_to=V + 3, **shape)).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3, mean=float(".ln_" in name and name.endswith("weight")))
        p.data = p.data.to(dtype).float()
    state = dict(train_config={"sample_start": start}, dataset={}, step=20)
    checkpoint = Checkpoint(model.config, model.state_dict(), tokenizer.to_dict(), **state)
    save_checkpoint(Path("out", kind, "ckpt.pt"), checkpoint)
    records = [{"step": 0, "epoch": 0, "sample": HOSTILE}, {"step": 20, "epoch": 1, "loss": 2.5}]
    records.append({"step": 20, "epoch": 1, "train_loss": 2.25, "val_loss": 2.75})
    log = "".join(json.dumps(record) + "\n" for record in records)
    Path("out", kind, "log.jsonl").write_text(log, encoding="utf-8")
    return tokenizer


def test_a_file_has_the_run_and_no_path_or_html_from_it(tmp_path, capsys, monkeypatch):
    write_run("char", start=HOSTILE)
    write_file(out_dir="out/char", to="char.html")
    assert "char.html: writing 11,780 parameters, about 0.0 MB ..." in capsys.readouterr().out
    text = Path("char.html").read_text(encoding="utf-8")
    for path in (tmp_path, tmp_path.parent, Path.home(), onepage.HERE, "out/char", "ckpt.pt"):
        assert str(path) not in text
    page = json.loads(re.search(r'id="model">(.*?)</script>', text)[1])
    assert page["start"] == page["records"][0]["sample"] == HOSTILE and page["name"] == "char"
    assert text.count("<script") == text.count("</script>") == 4 and HOSTILE not in text
    assert not re.findall(r'(?:src|href)="(?!data:,")', text)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)[1]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for name in ("playground.html", "playground.css", "playground.js", "engine.js"):
        lines = (onepage.HERE / name).read_bytes().replace(b"\n", b"\r\n")  # as git on Windows does
        Path(name).write_bytes(lines)
    monkeypatch.setattr(onepage, "HERE", tmp_path)
    write_file(out_dir="out/char", to="char.html")
    assert Path("char.html").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "char.html: 11,780 parameters would make a file of 0 MB; a page takes at most 11,779"),
        ({"to": "char"}, "to=char: name the file to write, as in --to=romeo.html"),
        ({"out_dir": "out/char,out/b"}, "--to takes one run"),
        ({"checkpoint": "best.pt"}, "out/char/best.pt: no such checkpoint"),
    ],
)
def test_what_can_not_become_a_page_is_refused(options, words, monkeypatch):
    write_run("char")
    monkeypatch.setattr(onepage, "LARGEST_MODEL", 11_779)
    with pytest.raises(UserError, match=words):
        write_file(**{"out_dir": "out/char", "to": "char.html"} | options)
    assert not list(Path().glob("*.html*"))


@contextmanager
def opened_file(kind: str, **options):
    """Write the file of a run, and yield its page without a network."""
    address = write_file(out_dir=f"out/{kind}", to="a.html", **options)
    with chromium() as browser, opened(browser, address) as page:
        yield page


def assert_same(found, expected, tolerance: float, where: str = "") -> None:
    """Assert that two answers are equal, numbers with a fraction up to a tolerance."""
    if isinstance(expected, float):
        assert abs(found - expected) <= tolerance, where
    elif isinstance(expected, dict | list):
        parts = expected if isinstance(expected, dict) else range(len(expected))
        assert len(found) == len(expected), where
        for part in parts:
            assert_same(found[part], expected[part], tolerance, f"{where}, {part}")
    else:
        assert found == expected, where


@browser_test
@pytest.mark.parametrize(("weights", "tolerance"), [("float16", 1e-3), ("float32", 1e-4)])
@pytest.mark.parametrize("kind", MODELS)
def test_the_engine_answers_what_pytorch_answers(kind, weights, tolerance, monkeypatch):
    """Logits, probabilities, attention, and 200 greedy tokens, far past a context of 24."""
    monkeypatch.setattr(playground, "digits", lambda x: x.tolist())  # not rounded
    write_run(kind, dtype=getattr(torch, weights))
    server = playground.Playground([f"out/{kind}"])
    sampling = dict(temperature=0, top_k=None, top_p=None, max_new_tokens=200, seed=1)
    greedy, short = sampling | {"start": PROMPT}, {"text": "The quick brown fox's", "count": 99}
    with opened_file(kind, weights=weights) as page:

        def compare(action: str, **changed) -> list[dict]:
            fields = {"checkpoint": f"out/{kind}/ckpt.pt", "text": PROMPT, "written": []}
            fields |= {"layer": 1, "head": 3, "maps": True, **changed}
            expected = list(server.answer(action, fields))
            assert_same(page.evaluate(COLLECT, [action, fields]), expected, tolerance, action)
            return expected

        written = [token["id"] for token in compare("write", options=greedy)[1:]]
        assert len(written) == 200
        for n in (0, 1, 3, 90, 199):  # the context is not full, and is full
            compare("look", written=written[:n], id=written[n])
        for masked in (True, False):
            compare("read", written=written[:30], count=99, masked=masked)
        compare("read", **short, masked=False)
        compare("look", **short, id=1)  # keys and values that were not masked are of no use
        part = compare("write", options=greedy | {"max_new_tokens": 9}, written=written[:60])
        assert [token["id"] for token in part[1:]] == written[60:69]
        for start in ({}, {"start": ""}, {"start": "unknown: é"}):
            compare("write", options=sampling | start)


@browser_test
@pytest.mark.parametrize("kind", MODELS)
def test_token_ids_and_refusals_are_those_of_the_tokenizer(kind):
    tokenizer = write_run(kind)
    draw, pieces = random.Random(3), [*TEXT, *"".join(NASTY), "'ll", "low", "  ", "\r\n"]
    texts = [*NASTY, *("".join(draw.choices(pieces, k=draw.randrange(1, 40))) for _ in range(300))]
    if kind == "char":  # some texts that have no unknown character
        texts += ["".join(draw.choices(tokenizer.chars, k=30)) for _ in range(30)]
        texts = [text for text in texts if not re.search("[\ud800-\udfff]", text)]
    expected = []
    for text in texts:
        try:
            expected.append(tokenizer.encode(text))
        except UserError as error:
            expected.append(str(error))
    kinds = {type(result) for result in expected}
    assert kinds == ({list, str} if kind == "char" else {list})
    with opened_file(kind) as page:
        for text, ids, found in zip(texts, expected, page.evaluate(ENCODE, texts), strict=True):
            assert found == ids, ascii(text)


@browser_test
def test_labels_texts_and_probabilities_of_a_page_about_hostile_text():
    write_run("char", start=HOSTILE)
    with opened_file("char") as page:
        expect(page.locator("#text .prompt")).to_have_text(HOSTILE)
        page.get_by_role("tab", name="Learning").click()
        expect(page.locator("#sample")).to_have_text(HOSTILE)
        assert page.locator("img, main svg[onload], main script, [onclick], [onerror]").count() == 0
        shown = {b" the": "␣the", b"\n": "↵", b"\xe2\x80": r"\xe2\x80", b"\x07": r"\x07"}
        shown |= {b"a\xff\xc3\xa9": "a\\xffé", "\u2028🦊\\".encode(): "\\u2028🦊\\"}
        for token, label in shown.items():
            assert page.evaluate("labelOf", token.decode("latin-1")) == label
        fox = list("🦊".encode().decode("latin-1"))  # shown when its fourth token is there
        added = "([before, next]) => addedText(before, next)"
        parts = [page.evaluate(added, [["a", *fox[:n]], fox[n]]) for n in range(4)]
        assert parts == ["", "", "", "🦊"]
        logits = torch.randn(40, generator=torch.Generator().manual_seed(4)) * 3
        logits = logits.sort(descending=True).values
        for temperature, top_k, top_p in (
            *((1, None, None), (0.8, None, None), (0, None, None), (0.001, None, None)),
            *((1, 5, None), (0.7, None, 0.6), (1.5, 9, 0.9), (1, None, 1e-9)),
        ):
            options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
            ids, weights = candidates(logits[None], **options)
            expected = torch.zeros(40).index_put((ids[0],), weights[0] / weights[0].sum())
            arguments = [logits.tolist(), options]
            drawn = page.evaluate("([logits, options]) => drawnWith(logits, options)", arguments)
            torch.testing.assert_close(torch.tensor(drawn).float(), expected, rtol=1e-4, atol=1e-6)
        draw = "([seed, first, count]) => draw(seed, first, count)"
        page.evaluate(DRAW)
        ids = page.evaluate(draw, [1337, 0, 5000])
        counts = torch.tensor(ids).bincount()
        assert (counts - torch.tensor([2500, 1500, 1000])).abs().max() < 150
        assert page.evaluate(draw, [1337, 100, 50]) == ids[100:150]  # a text written in parts
        assert page.evaluate(draw, [1338, 0, 50]) != ids[:50]
