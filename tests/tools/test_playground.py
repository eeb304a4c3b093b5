"""The playground without a browser: its figures against references, and mistakes that end in a sentence."""

import math
import re
import shutil
import threading
from html.parser import HTMLParser
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

import model as gpt
import sample
from configurator import UserError
from sample import SampleConfig
from support.checkpoint import load_checkpoint
from tools import playground
from tools.playground import WITH_TEXT, Candidate, Checkpoints, Page, Text, Token

DRAWS = [(0.8, None, None), (1.3, 5, None), (0.7, None, 0.6), (1.0, 12, 0.8), (1.0, None, 1e-6)]
CONTROLS = ("3 times", 0.8, 0, 1, 40, 1337)  # prompt, temperature, top-k, top-p, tokens, seed


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trained") / "tiny"


@pytest.fixture
def page(tiny_run, trained) -> Page:
    """That of one tiny run, which is trained once and copied; its context is 16 tokens."""
    if trained.exists():
        shutil.copytree(trained, "out/tiny")
    else:
        shutil.copytree(tiny_run(), trained)
    return Page(Checkpoints(["out/tiny"]))


def last(answers):
    *_, answer = answers
    return answer


class Plain(HTMLParser):
    """The text that a browser shows, and the tags that it sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags = "", set()
        self.feed(html)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)

    def handle_data(self, data) -> None:
        self.text += data


# What a token was drawn from


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), DRAWS)
def test_probabilities_equal_those_of_transformers(temperature, top_k, top_p):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p else []
    before, after = playground.probabilities(logits, temperature, top_k, top_p)
    torch.testing.assert_close(before, logits.softmax(-1))
    torch.testing.assert_close(after, warpers(None, logits[None])[0].softmax(-1))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), DRAWS)
def test_probabilities_after_are_those_that_a_token_is_drawn_with(
    temperature, top_k, top_p, monkeypatch
):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(4)) * 3
    given = []
    monkeypatch.setattr(
        torch, "multinomial", lambda probs, *_, **__: given.append(probs) or torch.tensor([[0]])
    )
    gpt.sample_token(logits[None], temperature, top_k, top_p)
    after = playground.probabilities(logits, temperature, top_k, top_p)[1]
    drawn = given[0][0] / given[0].sum()
    assert torch.equal(
        after.sort(descending=True).values[: len(drawn)], drawn.sort(descending=True).values
    )


def test_at_temperature_zero_the_likeliest_token_is_certain():
    after = playground.probabilities(torch.tensor([0.0, 2.0, 1.0]), 0)[1]
    assert after.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.7, "seed": 5}]
)
def test_the_text_is_that_of_sample_py(page, options, capsys):
    loaded = page.checkpoints.load("out/tiny/ckpt.pt")
    sampling = SampleConfig(
        out_dir="out/tiny", start="3 times", max_new_tokens=40, dtype="float32", **options
    )
    capsys.readouterr()
    sample.main(sampling)
    assert (
        str(Text(sampling, list(playground.write(loaded, sampling)))) + "\n"
        == capsys.readouterr().out
    )


def test_each_token_comes_with_the_ten_likeliest_and_their_probabilities(page):
    loaded = page.checkpoints.load("out/tiny/ckpt.pt")
    sampling = SampleConfig(start="3 times", max_new_tokens=40, temperature=1.5, top_p=0.9)
    written = list(playground.write(loaded, sampling))
    ids = loaded.tok.encode(str(Text(sampling, written)))
    for i, token in enumerate(written, start=len("3 times")):
        with torch.no_grad():
            logits = loaded.net(torch.tensor([ids[max(0, i - 16) : i]]))[0][0, -1]
        before, after = playground.probabilities(logits, 1.5, None, 0.9)
        best = before.topk(10).indices.tolist()
        names = [playground.label(loaded.tok.decode_bytes([n])) for n in best]
        assert [c.label for c in token.candidates[:10]] == names
        assert [c.rank for c in token.candidates[:10]] == list(range(1, 11))
        assert token.drawn.label == playground.label(token.text.encode())
        assert token.drawn.rank == before.argsort(descending=True).tolist().index(ids[i]) + 1
        for c, n in zip(token.candidates, best, strict=False):
            assert math.isclose(c.before, before[n], rel_tol=1e-3) and math.isclose(
                c.after, after[n], rel_tol=1e-3
            )
    beyond = [token for token in written if len(token.candidates) == 11]
    assert beyond and all(token.drawn == token.candidates[10] for token in beyond)


# Attention


def test_attention_and_loss_equal_those_of_transformers_with_and_without_the_mask():
    ours, x = small_model(), tokens(1, 24)
    theirs = reference(ours)
    for masked, mask in ((True, None), (False, torch.zeros(1, 1, 24, 24))):
        layers, loss = playground.look(ours, x, masked)
        with torch.no_grad():
            answer = theirs(x, attention_mask=mask, output_attentions=True)
        assert len(layers) == 3 and layers[0].shape == (4, 24, 24)
        torch.testing.assert_close(
            layers, [weights[0] for weights in answer.attentions], rtol=1e-4, atol=1e-5
        )
        expected = F.cross_entropy(answer.logits[0, :-1], x[0, 1:])
        assert math.isclose(loss, expected, rel_tol=1e-4)
        assert (layers[2].triu(1) > 0).any() == (not masked)


def test_the_model_has_its_own_attention_back_afterwards(monkeypatch):
    before, net = gpt.attention, small_model()
    playground.look(net, tokens(1, 5), masked=False)
    assert gpt.attention is before
    monkeypatch.setattr(net, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        playground.look(net, tokens(1, 5), masked=False)
    assert gpt.attention is before


def test_a_text_is_written_as_ever_while_attention_is_changed_in_another_thread(page):
    loaded = page.checkpoints.load("out/tiny/ckpt.pt")
    sampling = SampleConfig(start="3 times", max_new_tokens=60)
    alone = list(playground.write(loaded, sampling))
    stop, x = threading.Event(), torch.zeros(1, 16, dtype=torch.int64)

    def look_on() -> None:
        while not stop.is_set():
            playground.look(loaded.net, x, masked=False)

    thread = threading.Thread(target=look_on)
    thread.start()
    together = list(playground.write(loaded, sampling))
    stop.set()
    thread.join()
    assert together == alone


def unmasked(q, k, v, dropout=0.0):
    return F.scaled_dot_product_attention(q, k, v)


def test_only_a_model_trained_without_the_mask_has_an_impossibly_good_loss(
    page, tiny_run, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(gpt, "attention", unmasked)
        options = dict(
            n_layer=1, n_embd=32, batch_size=16, gradient_accumulation_steps=1, optimizer="muon"
        )
        tiny_run(out_dir="out/seer", max_iters=200, eval_interval=200, **options)
    for out_dir, sees in (("out/tiny", False), ("out/seer", True)):
        loaded = page.checkpoints.load(f"{out_dir}/ckpt.pt")
        x = torch.tensor([loaded.tok.encode("3 times 4 is 12.")])
        with_mask, without = (playground.look(loaded.net, x, masked)[1] for masked in (True, False))
        said = page.on_attention(str(loaded.path), "3 times 4 is 12.", None, WITH_TEXT, 1, 1, 64)[0]
        assert ("trained without the mask" in said) == sees and (
            "python lessons.py" in said
        ) != sees
        assert f"{with_mask:.3f} to {without:.3f}" in said


def test_the_maps_have_a_cell_for_each_pair_of_tokens_that_may_look(page):
    said, maps, layers, heads = page.on_attention(
        "out/tiny/ckpt.pt", "3 times", None, WITH_TEXT, 2, 1, 24
    )
    with_mask, without = re.findall("<svg.*?</svg>", maps)
    assert with_mask.count("<rect") == with_mask.count('class="past"') == 7 * 8 / 2
    assert without.count('class="past"') == 28 and without.count('class="future"') == 21
    loaded = page.checkpoints.load("out/tiny/ckpt.pt")
    weights = playground.look(loaded.net, torch.tensor([loaded.tok.encode("3 times")]))[0][1][0]
    tips = re.findall("<title>(.*?)</title>", with_mask)
    expected = [
        f"{a} looks at {b}: {playground.percent(weights[i, j].item())}"
        for i, a in enumerate("3␣times")
        for j, b in enumerate("3␣times"[: i + 1])
    ]
    assert tips == expected
    assert "7 tokens" in said and layers.choices == [("1", 1), ("2", 2)] and heads.value == 1


# HTML


def test_text_is_shown_as_text():
    nasty = "<b>&amp;\"'</b>\n<script>"
    drawn = Candidate(1, nasty, 0.25, 1.0, True)
    text = Text(SampleConfig(start=nasty), [Token(nasty, [drawn])])
    for made, tags, shows in (
        (playground.prompt_html(nasty), {"span"}, nasty),
        (playground.token_html(text.tokens[0], 0), {"span", "i"}, nasty.replace("\n", "↵\n")),
        (
            playground.candidates_html(text, 0),
            {"p", "b", "table", "thead", "tbody", "tr", "td", "th"},
            nasty,
        ),
        (playground.notice(UserError(nasty)), {"p"}, nasty),
        (playground.card_html(nasty, nasty, ""), {"article", "h3", "p", "div"}, nasty),
        (
            playground.heat_map(torch.eye(2), ["<b>", "&lt;"], True),
            {"svg", "path", "rect", "title", "text"},
            "&lt; looks at <b>",
        ),
    ):
        plain = Plain(made)
        assert plain.tags == tags and shows in plain.text


def test_the_shown_tokens_are_the_text(page):
    text, shown = last(page.on_write({}, "out/tiny/ckpt.pt", *CONTROLS))[2:0:-1]
    shown = shown if isinstance(shown, str) else shown.value
    assert Plain(shown).text.replace("↵\n", "\n") == str(text) and len(text.tokens) == 40


@pytest.mark.parametrize(
    ("piece", "label"),
    [
        (b" the", "␣the"),
        (b"\n", "↵"),
        (b"\xe2\x80", r"\xe2\x80"),
        ("é".encode(), "é"),
        (b"\x07", r"\x07"),
    ],
)
def test_labels_show_what_can_not_be_seen(piece, label):
    assert playground.label(piece) == label


def test_a_character_in_two_tokens_is_shown_when_it_is_whole(monkeypatch):
    pieces = [b"\xc3", b"\xa9", b"!"]
    tok = SimpleNamespace(encode=lambda text: [0], decode_bytes=lambda ids: pieces[ids[0]])
    net = gpt.GPT(gpt.GPTConfig(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=4)).eval()
    monkeypatch.setattr(
        net,
        "generate",
        lambda *_: ((net(torch.tensor([[0]])), torch.tensor([[i]]))[1] for i in range(3)),
    )
    loaded = playground.Loaded(Path("x"), net, tok, 0, "")
    assert [token.text for token in playground.write(loaded, SampleConfig(start="a"))] == [
        "",
        "é",
        "!",
    ]


# Mistakes, and runs that come and change


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({0: ""}, "The prompt is empty"),
        ({0: "Zeus"}, "character 'Z' at position 0"),
        ({1: -1}, "temperature is -1 but must be at least 0"),
        ({3: 0}, "top_p is 0 but must be above 0"),
        ({5: None}, "seed each need a number"),
    ],
)
def test_mistakes_are_sentences(page, changed, words):
    controls = [changed.get(i, value) for i, value in enumerate(CONTROLS)]
    said, shown, text, candidates = last(page.on_write({}, "out/tiny/ckpt.pt", *controls))
    assert (
        'class="notice"' in said
        and words in Plain(said).text
        and (shown, text, candidates) == ("", None, "")
    )
    assert words in Plain(last(page.on_compare({}, ["out/tiny/ckpt.pt"], *controls))).text
    assert last(page.on_write({}, "out/tiny/ckpt.pt", *CONTROLS))[2].tokens, "it goes on"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("", "The prompt is empty"), ("3", "'3' has 1 tokens"), ("Zeus", "character 'Z'")],
)
def test_mistakes_are_sentences_beside_the_maps_too(page, prompt, words):
    said, maps, *_ = page.on_attention("out/tiny/ckpt.pt", prompt, None, WITH_TEXT, 1, 1, 24)
    assert 'class="notice"' in said and words in Plain(said).text and maps == ""


def test_a_prompt_longer_than_the_context_is_cut_and_said_to_be(page):
    said, _, text, _ = last(
        page.on_write({}, "out/tiny/ckpt.pt", "3 times 4 is 12.\n3 times", *CONTROLS[1:])
    )
    assert (
        "of the prompt's 24 tokens this model sees the last 16" in Plain(said).text
        and len(text.tokens) == 40
    )


def test_a_run_without_a_checkpoint_is_offered_as_soon_as_it_has_one(page, tiny_run):
    page = Page(Checkpoints(["out/later"]))
    page.blocks()
    assert "No checkpoint yet in out/later" in page.title_html(page.checkpoints.found())
    assert "no checkpoint yet in out/later" in last(page.on_write({}, None, *CONTROLS))[0]
    tiny_run(out_dir="out/later")
    path, compared, title, known = page.on_tick(None, [], [])
    assert path.value == "out/later/ckpt.pt" and compared.value == known == page.checkpoints.found()
    assert "No checkpoint" not in title
    assert last(page.on_write({}, path.value, *CONTROLS))[2].tokens


def test_what_is_chosen_stays_chosen_while_its_run_is_replaced(page, tiny_run):
    page.checkpoints.out_dirs.append(tiny_run(out_dir="out/other"))
    known = page.checkpoints.found()
    shutil.rmtree("out/tiny")
    path, compared, *_ = page.on_tick("out/tiny/ckpt.pt", known, known)
    others = ["out/other/ckpt.pt", "out/other/best.pt"]
    assert path.value == "out/tiny/ckpt.pt" and [name for name, _ in path.choices] == [
        "out/tiny/ckpt.pt",
        *others,
    ]
    assert compared.value == others
    assert (
        "out/tiny/ckpt.pt: no such checkpoint" in last(page.on_write({}, path.value, *CONTROLS))[0]
    )


def test_a_checkpoint_is_read_once_and_again_when_training_has_replaced_it(
    page, tiny_run, monkeypatch
):
    reads = []
    monkeypatch.setattr(
        playground, "load_checkpoint", lambda path: reads.append(path) or load_checkpoint(path)
    )
    load = page.checkpoints.load
    assert load("out/tiny/ckpt.pt") is load("out/tiny/ckpt.pt") and len(reads) == 1
    assert load("out/tiny/ckpt.pt").step == 12
    tiny_run(init_from="resume", max_iters=18)
    assert load("out/tiny/ckpt.pt").step == 18 and len(reads) == 2
    assert playground.describe(load("out/tiny/ckpt.pt")).startswith("step 18, epoch")


def test_cards_have_step_and_loss_and_do_not_repeat_a_text(page):
    shutil.copytree("out/tiny", "out/copy")
    cards = last(
        page.on_compare({}, ["out/tiny/ckpt.pt", "out/copy/ckpt.pt", "out/none/ckpt.pt"], *CONTROLS)
    )
    first, second, third = cards.split("</article>")[:3]
    said = playground.describe(page.checkpoints.load("out/tiny/ckpt.pt"))
    assert re.match(r"step 12, epoch [\d.]+, validation loss \d\.\d{3}$", said)
    assert said in first and first.count('class="token"') == 40
    assert "the same weights as out/tiny/ckpt.pt" in second and "token" not in second
    assert "out/none/ckpt.pt: no such checkpoint" in third


def test_the_curve_is_that_of_the_log_and_a_half_written_line_does_not_matter(page):
    said, curve, seen = page.on_loss("out/tiny", None)
    assert (
        "step 12," in said
        and len(curve) == 12 + 2 * 3
        and set(curve["of"]) == {"each batch", "training", "validation"}
    )
    unchanged = page.on_loss("out/tiny", seen)
    with open("out/tiny/log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 13, "epoch": 1.5, "loss": 1.25}\n{"step": 14, "lo')
    said, longer, seen = page.on_loss("out/tiny", seen)
    assert (
        not isinstance(unchanged[1], type(curve))
        and len(longer) == len(curve) + 1
        and "step 13," in said
    )
    assert longer[longer["step"] == 13]["loss"].tolist() == [1.25]
    said, curve, seen = page.on_loss("out/none", seen)
    assert (
        'class="notice"' in said and "out/none/log.jsonl" in said and curve is None and seen is None
    )


def test_a_later_turn_or_a_stop_ends_a_text(page):
    turns = {}
    first = page.on_write(turns, "out/tiny/ckpt.pt", *CONTROLS)
    assert len(next(first)[2].tokens) == 1
    assert len(last(page.on_write(turns, "out/tiny/ckpt.pt", *CONTROLS))[2].tokens) == 40
    assert list(first) == []


def test_options():
    assert Checkpoints(["a", "b", "a"], "best.pt").out_dirs == [Path("a"), Path("b")]
    assert Checkpoints(["a"], "best.pt").names == ["best.pt", "ckpt.pt"]
    with pytest.raises(UserError, match="port is 0"):
        playground.PlaygroundConfig(port=0)
