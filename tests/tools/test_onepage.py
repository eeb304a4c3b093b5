"""The model in one HTML file: what is in the file, and engine.js in a real browser against PyTorch.

The tests with a browser need what test_playground_browser.py needs.
"""

import json
import random
import re
from configurator import UserError
from pathlib import Path

import pytest
import torch
from test_playground_browser import HOSTILE, chromium, opened
from torch.nn import functional as F

from model import GPT, GPTConfig, candidates
from support.checkpoint import Checkpoint, save_checkpoint
from support.tokenizer import BPETokenizer, CharTokenizer
from tools import onepage, playground

browser_test = pytest.mark.browser
TEXT = "The quick brown fox's 12 dogs, they'll jump over naïve 漢字 and 🦊🦊!\n\n  Two  lines…\r\n"
SMALL = dict(block_size=24, n_layer=2, n_head=4, n_embd=20)
MODELS = {  # a tokenizer, and a shape that needs each part of the engine in one of its two forms
    "char": (CharTokenizer.from_text(TEXT + HOSTILE), SMALL),
    "bpe": (
        BPETokenizer.train([TEXT * 3, "low lower lowest newer wider " * 9], 300),
        SMALL | dict(bias=False, tie_weights=False, gelu="exact", n_layer=3),
    ),
}
NASTY = (
    "",
    " ",
    "\n",
    "\r\n\r\n",
    "\t\u00a0\u3000\u2028 x",
    "\ufeffbyte order mark",
    "\x85next\x85 line",
    "\x00\x1f",
    "🦊👩‍👩‍👧‍👦🇩🇪",
    "漢字かな交じり文",
    "e\u0301 é ǆ ß",
    "١٢٣ ²½ Ⅷ",
    "it's we'll they'RE 's",
    "don\u2019t",
    "<|endoftext|>",
    "a<|endoftext|><|endoftext|> b<|endof",
    "   leading and trailing   ",
    "a" * 300,
    "lone \ud83d surrogate \udd8a",
    "العربية עברית हिन्दी ไทย",
    "x  y   z\n \n",
    "<script>&amp;'\"\\`${}",
)
COLLECT = """async ([action, fields]) => {
    const answers = [], plain = (_, x) => ArrayBuffer.isView(x) ? Array.from(x) : x;
    for await (const answer of ask(action, fields)) answers.push(answer);
    return JSON.parse(JSON.stringify(answers, plain));
}"""
ENCODE = """texts => {
    const {tokenizer} = JSON.parse(byId("model").textContent);
    const ours = new {char: CharTokenizer, bpe: BPETokenizer}[tokenizer.kind](tokenizer);
    const encode = text => { try { return ours.encode(text); } catch (e) { return e.message; } };
    return texts.map(encode);
}"""


def write_run(kind: str, start: str = "The") -> tuple[GPT, BPETokenizer | CharTokenizer]:
    """Write a run with a random model to out/<kind>, and return the model and its tokenizer."""
    tokenizer, shape = MODELS[kind]
    V = tokenizer.vocab_size
    torch.manual_seed(7)
    model = GPT(GPTConfig(vocab_size=V, pad_vocab_to=V + 3, **shape)).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3, mean=float(".ln_" in name and name.endswith("weight")))
    state = dict(train_config={"sample_start": start}, dataset={}, step=20)
    checkpoint = Checkpoint(model.config, model.state_dict(), tokenizer.to_dict(), **state)
    save_checkpoint(Path("out", kind, "ckpt.pt"), checkpoint)
    records = [{"step": 0, "epoch": 0, "sample": HOSTILE}, {"step": 20, "epoch": 1, "loss": 2.5}]
    records.append({"step": 20, "epoch": 1, "train_loss": 2.25, "val_loss": 2.75})
    log = "".join(json.dumps(record) + "\n" for record in records)
    Path("out", kind, "log.jsonl").write_text(log, encoding="utf-8")
    return model, tokenizer


def write_file(kind: str, **options) -> str:
    """Write the file of a run and return its address."""
    config = dict(out_dir=f"out/{kind}", to=f"{kind}.html", device="cpu") | options
    playground.main(playground.PlaygroundConfig(**config))
    return Path(config["to"]).resolve().as_uri()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_file_has_the_run_and_neither_a_path_nor_html_from_it(tmp_path, capsys):
    write_run("char", start=HOSTILE)
    write_file("char")
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {},
            r"char.html: 11,780 parameters would make a file of 0 MB; a page takes at most 11,779",
        ),
        ({"to": "char"}, "to=char: name the file to write, as in --to=romeo.html"),
        ({"out_dir": "out/char,out/b"}, "--to takes one run"),
        ({"checkpoint": "best.pt"}, "out/char/best.pt: no such checkpoint"),
    ],
)
def test_what_can_not_become_a_page_is_refused(options, words, monkeypatch):
    write_run("char")
    monkeypatch.setattr(onepage, "LARGEST_MODEL", 11_779)
    with pytest.raises(UserError, match=words):
        write_file("char", **options)
    assert not list(Path().glob("*.html*"))


@browser_test
@pytest.mark.parametrize("weights", ["float16", "float32"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_engine_computes_what_pytorch_computes(kind, weights):
    model, tokenizer = write_run(kind)
    if weights == "float16":
        for p in model.parameters():
            p.data = p.half().float()
    close, T = dict(rtol=0, atol=1e-3 if weights == "float16" else 1e-4), model.config.block_size
    prompt = "they'll jump over naïve 漢字"
    with chromium() as browser, opened(browser, write_file(kind, weights=weights)) as page:

        def ask(action: str, **fields) -> list[dict]:
            fields = {"text": prompt, "written": [], "layer": 1, "head": 3} | fields
            return page.evaluate(COLLECT, [action, fields])

        options = dict(start=prompt, temperature=0, max_new_tokens=200, seed=1)
        facts, *written = ask("write", options=options | {"top_k": None, "top_p": None})
        ids = tokenizer.encode(prompt)
        end = getattr(tokenizer, "end_of_text", None)
        expected = [t.item() for t in model.generate(torch.tensor([ids]), 200, temperature=0)]
        assert end not in expected and [token["id"] for token in written] == expected
        assert (facts["count"], facts["config"]["block_size"]) == (len(ids), T)

        for n in (0, 1, 3, 90, 199):  # the context is not full, and is full
            context = torch.tensor([(ids + expected[:n])[-T:]])
            layers, logits = playground.observe(model, context)
            (seen,) = ask("look", written=expected[:n], id=expected[n])
            ordered = logits[-1].sort(descending=True)
            torch.testing.assert_close(torch.tensor(seen["logits"]), ordered[0], **close)
            order = ordered[1].tolist()
            assert [c["id"] for c in seen["candidates"]][:10] == order[:10]
            assert [c["rank"] for c in seen["candidates"]] == list(range(1, 11))
            assert [t["id"] for t in seen["context"]] == context[0].tolist()
            p = logits[-1].softmax(-1)[expected[n]].item()
            assert written[n]["p"] == pytest.approx(p, abs=close["atol"])
            rows = torch.tensor(seen["rows"])
            torch.testing.assert_close(
                rows, torch.stack([layer["weights"][:, -1] for layer in layers]), **close
            )
            for name, x in layers[1].items():
                x = x if x.dim() == 2 else x[3]
                torch.testing.assert_close(torch.tensor(seen["values"][name]), x[-8:], **close)
            states = torch.stack([layer["output"][-1] for layer in layers])
            lens = model.lm_head(model.transformer.ln_f(states))[:, : model.config.vocab_size]
            best = lens.softmax(-1).topk(3)
            shown = torch.tensor([[token["p"] for token in row] for row in seen["lens"]])
            torch.testing.assert_close(shown, best[0], **close)
            assert [[t["id"] for t in row] for row in seen["lens"]] == best[1].tolist()

        for masked in (True, False):
            context = torch.tensor([(ids + expected)[:T]])
            layers, logits = playground.observe(model, context, masked)
            fields = dict(written=expected, count=999, masked=masked, maps=True)
            (seen,) = ask("read", **fields)
            losses = F.cross_entropy(logits[:-1], context[0, 1:], reduction="none")
            torch.testing.assert_close(torch.tensor(seen["losses"]), losses, rtol=1e-3, atol=1e-3)
            maps = torch.stack([layer["weights"] for layer in layers])
            torch.testing.assert_close(torch.tensor(seen["weights"]), maps, **close)
            assert seen["count"] == len(ids) + 200
        assert [
            t["id"] for t in ask("write", options=options, written=expected[:50])[1:151]
        ] == expected[50:]


@browser_test
@pytest.mark.parametrize("kind", MODELS)
def test_token_ids_and_refusals_are_those_of_the_tokenizer(kind):
    _, tokenizer = write_run(kind)
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
    with chromium() as browser, opened(browser, write_file(kind)) as page:
        for text, ids, found in zip(texts, expected, page.evaluate(ENCODE, texts), strict=True):
            assert found == ids, ascii(text)


@browser_test
def test_labels_texts_and_probabilities_of_the_page():
    write_run("char")
    with chromium() as browser, opened(browser, write_file("char")) as page:
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
        draws = "Array.from({length: 20000}, (_, n) => random(1337, n))"
        counts = torch.tensor(page.evaluate(draws)).histc(20, 0, 1)
        assert counts.sum() == 20_000 and (counts - 1000).abs().max() < 150
