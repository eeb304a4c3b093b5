"""Scores against plain loops over `transformers`, with the same weights, texts and questions."""

import json
import math
import random
from configurator import UserError
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPT, GPTConfig
from support import hub
from support.checkpoint import save_checkpoint
from support.data import write_dataset
from support.hub import transpose
from support.tokenizer import BPETokenizer
from tools import evaluate
from tools.evaluate import EvaluateConfig

T = 24  # tokens in our model's context
WORDS = "the cat sat on a mat and then caf\u00e9 \u4f60\u597d walked away from every house".split()
STORY = (
    TEXT[:400]
    + " ".join(random.Random(0).choices(WORDS, k=120))
    + "\n<|endoftext|> is text here.  "
)


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train([TEXT, " ".join(WORDS * 999)], 330)


@pytest.fixture(scope="module")
def theirs(tokenizer) -> GPT2LMHeadModel:
    """A random GPT-2 with one position more, because its windows include the last target."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_positions=T + 1,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config).eval()


def save_run(model: GPT, tokenizer: BPETokenizer) -> None:
    about = dict(step=1, best_val_loss=2.0, train_config={"dataset": "tiny"}, dataset={})
    save_checkpoint(Path("out/tiny/ckpt.pt"), model, tokenizer=tokenizer.to_dict(), **about)


@pytest.fixture
def run(theirs, tokenizer, tmp_path, monkeypatch):
    """Save the same weights in out/tiny/ckpt.pt, with dropout, which evaluation must turn off."""
    monkeypatch.chdir(tmp_path)
    ours = GPT(
        GPTConfig(
            vocab_size=tokenizer.vocab_size,
            block_size=T,
            n_layer=2,
            n_head=4,
            n_embd=32,
            dropout=0.5,
        )
    )
    weights = transpose(theirs.state_dict())
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:T]
    ours.load_state_dict(weights)
    save_run(ours, tokenizer)
    Path("text.txt").write_bytes(STORY.encode())
    return ours


@pytest.fixture
def figures(capsys):
    """A function: evaluate with these options; returns the JSON line."""

    def run_main(**options) -> dict:
        capsys.readouterr()
        evaluate.main(EvaluateConfig(**{"out_dir": "out/tiny", "dtype": "float32", **options}))
        output = capsys.readouterr()
        assert output.err == ""
        *table, line = output.out.splitlines()
        result = json.loads(line)
        assert [row.split()[0] for row in table] == list(result)
        return result

    return run_main


def guide(model: GPT2LMHeadModel, ids: list[int], stride: int) -> tuple[float, int]:
    """Return nats and tokens as https://huggingface.co/docs/transformers/perplexity counts them."""
    nats, count, reached = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + model.config.n_positions, len(ids))
        window = torch.tensor([ids[begin:end]])
        labels = window.clone()
        labels[:, : reached - begin] = -100  # the window before predicted these
        n = int((labels[:, 1:] != -100).sum())  # a window's first token is not predicted
        with torch.no_grad():
            nats += model(window, labels=labels).loss.item() * n
        count, reached = count + n, end
        if end == len(ids):
            return nats, count


@pytest.mark.parametrize("stride", [1, 3, 11, T])
def test_loss_perplexity_and_bits_per_byte_of_a_text_are_those_of_transformers(
    run, theirs, tokenizer, figures, stride
):
    result = figures(data="text.txt", stride=stride)
    ids = tokenizer.encoding.encode_ordinary(STORY)
    nats, count = guide(theirs, [tokenizer.end_of_text, *ids], stride)
    assert result["tokens"] == count == len(ids)
    assert result["bytes"] == len(STORY.encode())
    assert result["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / len(STORY.encode()), rel=1e-5
    )


@pytest.mark.parametrize("stride", [1, 3, T])
@pytest.mark.parametrize("length", [1, 2, T - 1, T, T + 1, 2 * T, 2 * T + 1, 100])
def test_every_token_but_the_first_is_predicted_once_and_with_enough_context(length, stride):
    ids, predicted = np.arange(length + 1), []
    for window, n in evaluate.windows(ids, T, stride):
        assert n >= 1 and len(window) <= T + 1
        assert window.tolist() == list(range(window[0], window[-1] + 1))
        assert window[-n] - window[0] >= min(
            window[-n], T - stride + 1
        )  # tokens before the first that is predicted
        predicted += window[-n:].tolist()
    assert predicted == ids[1:].tolist()


def test_batch_size_does_not_change_the_results(run, figures, hellaswag):
    for options in ({"data": "text.txt", "stride": 5}, {"task": "hellaswag", "data": "h.jsonl"}):
        one, *others = (figures(**options, batch_size=batch_size) for batch_size in (1, 3, 1000))
        for other in others:
            assert list(other.values()) == [
                pytest.approx(v, rel=1e-5) if type(v) is float else v for v in one.values()
            ]


def test_the_loss_on_val_bin_is_the_validation_loss_of_training(tiny_run, figures):
    out_dir = tiny_run(dtype="float32", dropout=0.2)
    logged = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    result = figures(out_dir=str(out_dir))
    assert result["loss"] == pytest.approx(
        [r["val_loss"] for r in logged if "val_loss" in r][-1], rel=1e-6
    )
    meta = json.loads(Path("data/tiny/meta.json").read_text(encoding="utf-8"))
    assert result["tokens"] == meta["val_tokens"] - 1 and result["bytes"] == meta["val_bytes"] - 1
    chars = meta["tokenizer"]["chars"]
    val = "".join(chars[i] for i in np.fromfile("data/tiny/val.bin", dtype="<u2"))
    Path("val.txt").write_bytes(val.encode())
    same = figures(out_dir=str(out_dir), data="val.txt")
    assert same == {**result, "data": "val.txt"}


def test_a_bin_has_the_bytes_of_its_texts(run, theirs, tokenizer, figures):
    """val_bytes without the first token. <|endoftext|> has 0 bytes; a character may span tokens."""
    documents = [f"{word} \U0001f642 \u4f60{word}" for word in WORDS]
    ids = [int(i) for document in documents for i in tokenizer.encode_document(document)]
    val_bytes = sum(len(document.encode()) for document in documents)
    write_dataset(Path("data/tiny"), tokenizer, ids, ids, val_bytes, {})
    result = figures()
    nats, count = guide(theirs, ids, T)
    assert result["data"] == str(Path("data/tiny/val.bin"))
    assert result["bytes"] == val_bytes - len(tokenizer.decode_bytes(ids[:1]))
    assert result["tokens"] == count == len(ids) - 1
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / result["bytes"], rel=1e-5)
    Path("data/tiny/val.bin").rename("other.bin")
    assert figures(data="other.bin") == {**result, "data": "other.bin"}


def write_jsonl(path: str, lines: list) -> None:
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def words(rng: random.Random, n: int) -> str:
    return " ".join(rng.choices(WORDS, k=n))


def transformers_score(
    model: GPT2LMHeadModel, tokenizer, context: str, continuation: str
) -> tuple[float, bool]:
    """Return ln p of the continuation and whether greedy decoding gives it."""
    ids = tokenizer.encode(context + continuation)
    n = len(ids) - len(tokenizer.encode(context.rstrip()))
    ids = ids[-(T + 1) :]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids[:-1]])).logits[0, -n:].log_softmax(-1)
    return log_probs[range(n), ids[-n:]].sum().item(), log_probs.argmax(-1).tolist() == ids[-n:]


@pytest.fixture
def hellaswag(run) -> list[tuple[str, list[str], int]]:
    """Write h.jsonl; return the context, endings and answer that the harness makes of each."""
    rng, lines, meant = random.Random(1), [], []
    for n in range(40):
        start, rest, label = (
            words(rng, 2 if n % 2 else 40),
            "HE THEN" if n % 3 else "",
            rng.randrange(4),
        )
        endings = [words(rng, rng.randint(1, 5)) for _ in range(4)]
        line = {
            "ind": n,
            "activity_label": "Mats",
            "ctx_a": f"[header] {start} [title] A  cat. [step]",
            "ctx_b": rest,
        }
        line |= {
            "ctx": "",
            "endings": [f"[substeps] {e} " for e in endings],
            "label": label if n % 2 else str(label),
        }
        lines.append(line)
        meant.append(
            (
                f"Mats: {start}. A cat. " + ("He then" if rest else ""),
                [f" {e}" for e in endings],
                label,
            )
        )
    write_jsonl("h.jsonl", lines)
    return meant


@pytest.fixture
def lambada(run, theirs, tokenizer) -> list[tuple[str, str]]:
    """Write l.jsonl; return contexts and words: the model's own, longer ones and random ones."""
    rng, meant = random.Random(2), []
    while len(meant) < 60:
        context = words(rng, rng.choice((2, 40)))
        with torch.no_grad():
            likeliest = (
                theirs(torch.tensor([tokenizer.encode(context)[-T:]])).logits[0, -1].argmax().item()
            )
        space, word = tokenizer.decode([likeliest])[:1], tokenizer.decode([likeliest])[1:]
        if space == " " and word.isalpha():
            meant += [(context, word), (context, word + "?"), (context, rng.choice(WORDS))]
    write_jsonl("l.jsonl", [{"text": f"{context} {word}"} for context, word in meant])
    return meant


def share(hits: list[bool]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return pytest.approx(np.mean(hits)), pytest.approx(np.std(hits, ddof=1) / math.sqrt(len(hits)))


def test_hellaswag_scores_are_those_of_a_plain_loop_over_transformers(
    hellaswag, theirs, tokenizer, figures
):
    hits, hits_norm = [], []
    for context, endings, label in hellaswag:
        log_p = [
            transformers_score(theirs, tokenizer, context, " " + ending)[0] for ending in endings
        ]
        per_character = [value / len(ending) for value, ending in zip(log_p, endings, strict=True)]
        hits.append(log_p.index(max(log_p)) == label)
        hits_norm.append(per_character.index(max(per_character)) == label)
    assert hits != hits_norm and 0 < sum(hits) < 40
    result = figures(task="hellaswag", data="h.jsonl")
    assert result["examples"] == 40
    assert (result["acc"], result["acc_stderr"]) == share(hits)
    assert (result["acc_norm"], result["acc_norm_stderr"]) == share(hits_norm)
    assert figures(task="hellaswag", data="h.jsonl", limit=7)["acc_norm"] == pytest.approx(
        np.mean(hits_norm[:7])
    )


def test_lambada_scores_are_those_of_a_plain_loop_over_transformers(
    lambada, theirs, tokenizer, figures
):
    scores = [
        transformers_score(theirs, tokenizer, context, " " + word) for context, word in lambada
    ]
    greedy = [is_greedy for _, is_greedy in scores]
    assert 3 < sum(greedy) < len(greedy) - 3
    result = figures(task="lambada", data="l.jsonl")
    assert (result["acc"], result["acc_stderr"]) == share(greedy)
    assert result["perplexity"] == pytest.approx(
        math.exp(-np.mean([log_p for log_p, _ in scores])), rel=1e-4
    )


def test_every_continuation_has_the_log_probability_of_transformers_in_any_batch(
    run, hellaswag, theirs, tokenizer
):
    pairs = [(context, " " + ending) for context, endings, _ in hellaswag for ending in endings]
    scores = evaluate.score(
        run.eval(), [evaluate.encode_pair(tokenizer, *pair) for pair in pairs], batch_size=7
    )
    for (log_p, greedy), pair in zip(scores, pairs, strict=True):
        expected, expected_greedy = transformers_score(theirs, tokenizer, *pair)
        assert log_p == pytest.approx(expected, rel=1e-4) and greedy == expected_greedy


def test_a_url_is_downloaded_once(run, hellaswag, figures, server):
    server.files["/some/h.jsonl"] = Path("h.jsonl").read_bytes()
    options = {"task": "hellaswag", "data": f"{server.url}/some/h.jsonl"}
    assert (
        figures(**options)["acc"]
        == figures(**options)["acc"]
        == figures(task="hellaswag", data="h.jsonl")["acc"]
    )
    assert len(server.requests) == 1
    with pytest.raises(UserError, match=r"/none\.jsonl: status 404"):
        figures(task="hellaswag", data=f"{server.url}/none.jsonl")


def test_init_from_names_a_pretrained_model(run, tokenizer, figures, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "load_pretrained", lambda name: asked.append(name) or (run, tokenizer))
    expected = figures(data="text.txt")
    assert figures(init_from="gpt2", out_dir="none", data="text.txt") == {
        **expected,
        "model": "gpt2",
    }
    assert asked == ["gpt2"]
    with pytest.raises(UserError, match=r"init_from=gpt2 has no val\.bin; name"):
        figures(init_from="gpt2")


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("none.txt", None, {}, "none.txt: no such file"),
        ("a.txt", b"", {}, "a.txt: has no text to predict"),
        ("a.txt", b"a\xe9", {}, "a.txt: byte 1 is not UTF-8"),
        ("a.csv", b"a", {}, "a.csv: must end in .txt or .bin"),
        ("a.bin", b"", {}, "a.bin: 0 bytes are not uint16 token ids"),
        ("a.bin", b"a\0", {}, "a.bin: has no text to predict"),
        ("a.bin", b"abc", {}, "a.bin: 3 bytes are not uint16 token ids"),
        ("a.bin", b"\1\0\xff\xff", {}, r"a.bin: token id 65535 is not one of the model's \d+"),
        ("text.txt", None, {"stride": T + 1}, f"stride is {T + 1} but must be at most {T}"),
    ],
)
def test_bad_files_are_named_in_one_line(run, figures, name, content, options, words):
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        figures(data=name, **options)
    assert "\n" not in str(error.value)


QUESTION = {"activity_label": "A", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": 1}


@pytest.mark.parametrize(
    ("task", "content", "words"),
    [
        ("lambada", b"", "has no examples"),
        ("lambada", b'{"text": "a b"}\n{"text"', "line 2 is damaged"),
        ("lambada", b"\xff", "line 1 is damaged"),
        ("lambada", b"[1]", "line 1 is damaged"),
        ("lambada", b'{"texts": "a b"}', "line 1 has no 'text'"),
        ("lambada", b'{"text": " word"}', "line 1 is damaged"),
        ("hellaswag", {"endings": [1, 2]}, "line 1 is damaged"),
        ("hellaswag", {"endings": ["a", "[step]"]}, "line 1 is damaged"),
        (
            "hellaswag",
            {"endings": ["q" * 99, "q"]},
            f"an answer has .* tokens, but block_size is {T}",
        ),
        ("hellaswag", {"label": 2}, "line 1 is damaged"),
        ("hellaswag", {"label": ""}, "line 1 is damaged"),
    ],
)
def test_bad_lines_are_named_in_one_line(run, figures, task, content, words):
    if isinstance(content, dict):
        content = json.dumps(QUESTION | content).encode()
    Path("a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"^a.jsonl: {words}") as error:
        figures(task=task, data="a.jsonl")
    assert "\n" not in str(error.value)


def test_a_bin_of_another_tokenizer_is_refused(run, dataset, figures):
    with pytest.raises(UserError, match="not made with the model's tokenizer"):
        figures(data=str(dataset / "val.bin"))


def test_a_loss_that_overflows_is_an_error_and_no_score(run, tokenizer, figures):
    with torch.no_grad():
        run.transformer.ln_f.weight.fill_(1e38)
    save_run(run, tokenizer)
    with pytest.raises(UserError, match="loss is not finite"):
        figures(data="text.txt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stride": -1}, "stride=-1 must be at least 0"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"task": "lambada", "stride": 5}, "stride=5 is for files"),
        ({"limit": 5}, "limit=5 is for tasks"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        EvaluateConfig(**options)
