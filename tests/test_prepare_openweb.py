"""Web text to token files: the same bytes as from a plain loop, whatever happens on the way."""

import gzip
import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import unicodedata
from collections import Counter, deque
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rustbpe
from conftest import ROOT

import prepare_openweb as prepare
from configurator import UserError
from support import corpus, data, tokenizer
from support.files import clean, lock_path
from support.formats import read_documents

FILES = ("train.bin", "val.bin", "meta.json")
SHARD = "datasets/some/text/resolve/1/train-{:02}.parquet"


def make_documents(n: int, seed: int = 0) -> list[str]:
    """Return texts of made-up words; some are short, some repeated, some need to be cleaned."""
    random.seed(seed)
    letters = "abcdefgh\u00e9\u4f60"
    words = ["".join(random.choices(letters, k=random.randint(2, 8))) for _ in range(300)]
    documents = [" ".join(random.choices(words, k=random.randint(20, 400))) for _ in range(n)]
    documents[3] = documents[1]
    documents[5] = "short"
    documents[6] += " cafe\u0301 \x00\x1b[0m <|endoftext|> \r\n end\x85"
    return documents


def parquet(documents: list[str | None]) -> bytes:
    table, file = pa.table({"id": range(len(documents)), "text": documents}), io.BytesIO()
    pq.write_table(table, file, row_group_size=20)
    return file.getvalue()


@pytest.fixture
def hub(server, place, monkeypatch):
    """Return the documents of a small source of 6 shards on the test server."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setitem(prepare.SOURCES, "openwebtext", (SHARD, 6))
    monkeypatch.setattr(corpus, "SAVE_BYTES", 1)  # after every one of these small shards
    documents = make_documents(600)
    documents[450] = documents[2]
    for n in range(6):
        shard = parquet([*documents[100 * n : 100 * n + 100], None])
        server.files[f"/{SHARD.format(n)}"] = shard
    return documents


def run(**options) -> Path:
    """Prepare a data set with these options and return its folder."""
    small = {"vocab_size": 400, "size": "all", "val_fraction": 0.1}
    config = prepare.PrepareConfig(**small | options)
    prepare.main(config)
    return Path("data") / config.dataset


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def read_meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def assert_same_as_naive(folder: Path, documents: list[str], min_chars: int = 200) -> None:
    """Assert that the token files are those that the simplest loop makes of the documents."""
    meta = read_meta(folder)
    encoding = tokenizer.from_dict(meta["tokenizer"]).encoding
    seen, ids = set(), {"train": [], "val": []}
    for text in "<|endoftext|>".join(documents).split("<|endoftext|>"):
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
        text = unicodedata.normalize("NFC", text)
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if len(text) < min_chars or digest in seen:
            continue
        seen.add(digest)
        chosen = int.from_bytes(digest, "little") / 2**64 < 0.1
        ids["val" if chosen else "train"] += [*encoding.encode_ordinary(text), encoding.eot_token]
    short = round(0.1 * (len(ids["train"]) + len(ids["val"]))) - len(ids["val"])
    if abs(short) > (short + len(ids["val"])) / 4:  # the share is far from a tenth
        taker, giver = ("val", "train") if short > 0 else ("train", "val")
        ids[taker] += ids[giver][-abs(short) :]
        ids[giver] = ids[giver][: -abs(short)]
    val_bytes = len(encoding.decode([i for i in ids["val"] if i != encoding.eot_token]).encode())
    for name, expected in ids.items():
        assert np.fromfile(folder / f"{name}.bin", "<u2").tolist() == expected
        assert meta[f"{name}_tokens"] == len(expected)
    assert meta["val_bytes"] == val_bytes


def test_the_token_files_equal_those_of_a_plain_loop(hub, capsys):
    folder = run()
    assert_same_as_naive(folder, hub)
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert not list(Path("data/cache").rglob("*.parquet"))
    counts = read_meta(folder)["source"]["documents"]
    assert counts["read"] == 601 and counts["dropped: shorter than min_chars"] >= 1
    # One copy is in the same shard, one in a later shard.
    assert counts["dropped: the same as an earlier one"] == 2
    assert counts["cleaned: line ends, control characters, form NFC"] == 1
    assert counts["skipped: rows without a text"] == 6
    assert sum(n for name, n in counts.items() if name.startswith(("kept", "dropped"))) == 601
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "training a tokenizer of 400 tokens on up to 32 MB of text ..."
    assert printed[-1].startswith("documents: 1 cleaned: ") and len(printed) == 9


def test_the_tokenizer_is_trained_by_rustbpe_on_the_first_documents(hub, monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 50_000)
    config = prepare.PrepareConfig(val_fraction=0.1)
    sample = list(prepare.training_sample(config, prepare.list_shards(config)[0]))
    assert 50_000 <= sum(len(text.encode()) for text in sample) < 60_000
    texts = [clean(text) for text in "<|endoftext|>".join(hub[:100]).split("<|endoftext|>")]
    texts = [t for t in texts if len(t) >= 200 and not corpus.hash_document(t.encode(), 0.1)[1]]
    assert "".join(texts).startswith("".join(sample))
    Path("word.jsonl").write_text(json.dumps({"text": "x" * 10**6}))  # rustbpe needs much memory
    long = prepare.training_sample(config, {Path("word.jsonl"): ""})  # for a word of many MB
    assert max(map(len, long)) < 10**6
    theirs = rustbpe.Tokenizer()
    theirs.train_from_iterator(sample, 399, pattern=tokenizer.SPLIT_PATTERN)
    ours = [t.encode("latin-1") for t in read_meta(run(size="100KB"))["tokenizer"]["tokens"]]
    assert ours == [bytes(token) for token, _ in theirs.get_mergeable_ranks()]


def test_shards_come_one_at_a_time_and_none_beyond_the_size(hub, server, monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 50_000)
    n_files, add_shard = [], corpus.Writer.add_shard

    def count_files(*args, **options):
        n_files.append(len(list(Path("data/cache").rglob("*.parquet*"))))
        add_shard(*args, **options)

    monkeypatch.setattr(corpus.Writer, "add_shard", count_files)
    source = read_meta(run(size="150KB", dataset="small"))["source"]
    assert 150_000 <= source["text_bytes"] < 160_000
    assert len({path for path, _ in server.requests}) == len(n_files) < 6
    run()
    assert set(n_files) == {1}


def test_a_complete_data_set_is_prepared_again_only_for_a_reason(hub, server, capsys):
    before, path = contents(run()), Path("data/openweb/train.bin")
    server.requests.clear()
    assert contents(run()) == before and not server.requests
    assert "openweb is there already; remove it" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-2])
    assert contents(run()) == before
    path.unlink()
    assert contents(run()) == before
    (path.parent / "meta.json").write_bytes(b"{")
    assert contents(run()) == before
    assert capsys.readouterr().out.count("has damaged files; preparing it again ...") == 3
    with pytest.raises(UserError, match="prepared with other values of size, min_chars; use anoth"):
        run(min_chars=100, size="100KB")
    assert contents(path.parent) == before


def test_keep_shards_keeps_the_downloads_and_other_data_sets_delete_what_they_use(hub, server):
    first = contents(run(keep_shards=True))
    server.requests.clear()
    assert contents(run(keep_shards=True, dataset="again")) == first and not server.requests
    run(dataset="small", size="100KB")
    left = sorted(path.name for path in Path("data/cache/openwebtext").glob("*.parquet"))
    assert "train-00.parquet" not in left and "train-05.parquet" in left


def test_a_list_of_files_may_end_in_a_comma_and_be_long(place):
    names = [f"a_long_name_of_a_file_{n:03}.txt" for n in range(12)]  # longer than a name may be
    for name in [*names, "other.txt"]:
        Path(name).touch()
    shards, _ = prepare.list_shards(prepare.PrepareConfig(input=",".join(names) + ","))
    assert list(shards) == [Path(name) for name in names]


SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")


def encode_documents(documents: list[str], suffix: str) -> bytes:
    """Return the content of a file with these documents in the format of the suffix."""
    if suffix == ".parquet":
        return parquet(documents)
    lines = "".join(json.dumps({"text": d}) + "\n" for d in documents)
    text = (lines if "jsonl" in suffix else "<|endoftext|>\n".join(documents)).encode()
    text = gzip.compress(text) if suffix.endswith(".gz") else text
    return pa.Codec("zstd").compress(text, asbytes=True) if suffix.endswith(".zst") else text


COMMAND = """
import sys
sys.path.insert(0, {root!r})
import configurator, prepare_openweb
from support import corpus
corpus.SAVE_BYTES = 1
prepare_openweb.SOURCES["openwebtext"] = ({shard!r}, 6)
options = dict(vocab_size=400, size="all", val_fraction=0.1, dataset="killed")
configurator.run(prepare_openweb.main, prepare_openweb.PrepareConfig(**options))
"""
COMMAND = [sys.executable, "-c", COMMAND.format(root=str(ROOT), shard=SHARD)]


@pytest.mark.slow
def test_the_result_is_the_same_after_20_kills_at_random_moments(hub, server):
    expected = contents(run())
    random.seed(0)
    kills, ended, found = 0, False, set()
    while not ended or kills < 20:
        if ended:  # from the beginning again, until there were enough kills
            assert contents(Path("data/killed")) == expected
            for name in FILES:
                (Path("data/killed") / name).unlink()
        server.seconds_per_block = random.choice([0.0, 0.05])
        child = subprocess.Popen(COMMAND)
        try:
            child.wait(random.uniform(0.3, 2.5))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            kills += 1
            found |= {path.suffix for path in Path("data").rglob("*") if path.is_file()}
        ended = child.returncode == 0
        assert ended or child.returncode == -signal.SIGKILL
    assert contents(Path("data/killed")) == expected
    assert {".part", ".json"} <= found


class Interrupted(BaseException):
    """Ends a preparation in the middle, as a kill does."""


KILL = Interrupted()


def interrupt_at(monkeypatch, owner, function: str, call: int, error=KILL, **options):
    """Prepare a data set until the given call of `owner.function`, which raises `error`."""
    original, calls = getattr(owner, function), []

    def count_and_call(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(owner, function, count_and_call)
        run(**options)


FULL = OSError(28, "No space left on device")
PLACES = {  # owner, function, which call, error, how many shards are saved then
    "the first download": (prepare, "download", 1, KILL, None),
    "the tokenizer": (tokenizer.BPETokenizer, "train", 1, KILL, None),
    "the first shard": (corpus.Writer, "add_shard", 1, KILL, 0),
    "a document of the third shard": (corpus, "hash_document", 600 + 250, KILL, 2),
    "a full disk": (corpus.Writer, "save", 4, FULL, 2),
    "progress.json": (corpus, "atomic_write", 4, KILL, 2),
    "the first new name": (corpus, "replace", 1, KILL, 6),
    "the second new name": (corpus, "replace", 2, KILL, 6),
    "meta.json": (corpus, "write_meta", 1, KILL, 6),
}


@pytest.mark.parametrize("moment", PLACES)
def test_an_interrupted_run_continues(hub, monkeypatch, moment):
    """As with the kills above, but at the places that matter, each for certain."""
    expected = contents(run(dataset="whole"))
    run(dataset="again", size="100KB")
    Path("data/again/val.bin").unlink()  # of an earlier data set in the same folder
    *where, shards = PLACES[moment]
    interrupt_at(monkeypatch, *where, dataset="again")
    if shards is not None:
        progress = Path("data/again/progress.json").read_text(encoding="utf-8")
        assert json.loads(progress)["shards"] == shards
    if shards == 6:  # no meta.json that describes other token files
        assert not Path("data/again/meta.json").exists()
    assert contents(run(dataset="again")) == expected
    assert sorted(p.name for p in Path("data/again").iterdir()) == sorted(FILES)


def test_many_small_files_are_saved_together(place, monkeypatch):
    monkeypatch.setattr(corpus, "SAVE_BYTES", 20_000)
    Path("texts").mkdir()
    for i, text in enumerate(make_documents(60)):
        Path(f"texts/{i:02}.txt").write_text(text, encoding="utf-8")
    saves, syncs, write = [], [], corpus.atomic_write
    with monkeypatch.context() as patch:
        patch.setattr(corpus.os, "fsync", syncs.append)
        patch.setattr(corpus, "atomic_write", lambda path: saves.append(1) or write(path))
        expected = contents(run(dataset="whole", input="texts"))
    text_bytes = json.loads(expected[2])["source"]["text_bytes"]
    assert 2 < len(saves) <= 2 + text_bytes / 20_000  # one at the start, one at the end
    assert len(syncs) == 4 * len(saves) + 1  # three parts and progress.json; in the end meta.json
    interrupt_at(monkeypatch, corpus.Writer, "add_shard", 36, dataset="again", input="texts")
    assert 0 < json.loads(Path("data/again/progress.json").read_text())["shards"] < 35
    assert contents(run(dataset="again", input="texts")) == expected


@pytest.fixture
def half_done(place, monkeypatch) -> Path:
    """Return the folder of a data set that was interrupted after 2 of 4 files."""
    monkeypatch.setattr(corpus, "SAVE_BYTES", 1)
    Path("texts").mkdir()
    for n in range(4):
        Path(f"texts/{n}.parquet").write_bytes(parquet(make_documents(60, seed=n)))
    interrupt_at(monkeypatch, corpus.Writer, "add_shard", 3, input="texts", dataset="mine")
    return Path("data/mine")


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "wrong types": lambda content: json.dumps(dict.fromkeys(json.loads(content), "x")).encode(),
    "an earlier version": lambda content: content[:-1] + b', "sha256": {}}',
}


@pytest.mark.parametrize("damage", [*DAMAGES, "train.bin.part", "val.bin.part", "seen.part"])
def test_a_damaged_state_is_refused_and_names_the_remedy(half_done, damage):
    if damage in DAMAGES:
        path = half_done / "progress.json"
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
        words = "progress.json: damaged, or of an earlier version; remove .*progress.json"
    else:
        path = half_done / damage
        path.write_bytes(path.read_bytes()[:-2])
        words = f"{damage} is shorter than in progress.json; remove"
    before = {p.name: p.read_bytes() for p in half_done.iterdir()}
    with pytest.raises(UserError, match=words) as error:
        run(input="texts", dataset="mine")
    assert "\n" not in str(error.value)
    assert {p.name: p.read_bytes() for p in half_done.iterdir()} == before
    (half_done / "progress.json").unlink()
    assert contents(run(input="texts", dataset="mine")) == contents(run(input="texts"))


def test_an_interrupted_run_refuses_other_options_and_changed_files(half_done, capsys):
    with pytest.raises(UserError, match="prepared with other values of size, min_chars; use anoth"):
        run(input="texts", dataset="mine", size="1MB", min_chars=100)
    Path("texts/1.parquet").write_bytes(parquet(make_documents(60, seed=9)))
    with pytest.raises(
        UserError, match=r"prepared with other values of inputs; .*remove .*progres"
    ):
        run(input="texts", dataset="mine")
    (half_done / "progress.json").unlink()
    run(input="texts", dataset="mine")
    Path("texts/1.parquet").write_bytes(parquet(make_documents(60, seed=1)))
    with pytest.raises(UserError, match="was prepared with other values of inputs; use another"):
        run(input="texts", dataset="mine")


def test_a_larger_share_for_validation_contains_a_smaller_one():
    texts = [str(n).encode() for n in range(2000)]
    few, many = ({t for t in texts if corpus.hash_document(t, share)[1]} for share in (0.1, 0.3))
    assert few < many and 100 < len(few) < 300 and 500 < len(many) < 700


def test_an_input_that_was_corrected_after_an_error_continues(place, monkeypatch):
    monkeypatch.setattr(corpus, "SAVE_BYTES", 1)
    Path("texts").mkdir()
    for n in range(3):
        lines = [json.dumps({"text": d}) for d in make_documents(60, seed=n)]
        Path(f"texts/{n}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    whole = Path("texts/1.jsonl").read_text(encoding="utf-8")
    expected = contents(run(input="texts", dataset="whole"))
    Path("texts/1.jsonl").write_text(whole.replace('{"text"', '{text"', 1), encoding="utf-8")
    first = "data/whole/meta.json"  # a new tokenizer would meet the error before anything else
    with pytest.raises(UserError, match=r"1.jsonl: line 1 is not JSON"):
        run(input="texts", dataset="mine", tokenizer=first)
    assert json.loads(Path("data/mine/progress.json").read_text(encoding="utf-8"))["shards"] == 1
    Path("texts/1.jsonl").write_text(whole, encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "read_documents", read := Mock(wraps=corpus.read_documents))
        assert contents(run(input="texts", dataset="mine", tokenizer=first))[:2] == expected[:2]
    assert [call.args[0].name for call in read.mock_calls] == ["1.jsonl", "2.jsonl"]


def test_an_input_that_is_removed_after_an_error_leaves_a_complete_data_set(place, monkeypatch):
    monkeypatch.setattr(corpus, "SAVE_BYTES", 1)
    Path("texts").mkdir()
    lines = [json.dumps({"text": d}) for d in make_documents(9)[7:]]
    Path("texts/a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    expected = contents(run(input="texts", dataset="whole", val_fraction=0.4))
    Path("texts/b.jsonl").write_text("{broken", encoding="utf-8")
    tokenizer = "data/whole/meta.json"
    with pytest.raises(UserError, match=r"b.jsonl: line 1"):
        run(input="texts", dataset="mine", val_fraction=0.4, tokenizer=tokenizer)
    Path("texts/b.jsonl").unlink()
    done = contents(run(input="texts", dataset="mine", val_fraction=0.4, tokenizer=tokenizer))
    assert done[:2] == expected[:2]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("n_documents", [1, 2, 11])
def test_few_documents_give_the_share_that_one_asked_for(place, share, n_documents):
    texts = make_documents(60)[7:]
    for order in range(4):
        random.Random(order).shuffle(texts)
        step = -(-len(texts) // n_documents)
        documents = ["\n".join(texts[i : i + step]) for i in range(0, len(texts), step)]
        lines = [json.dumps({"text": document}) for document in documents]
        Path(f"{order}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        folder = run(input=f"{order}.jsonl", dataset=f"d{order}", val_fraction=share)
        train, val = (np.fromfile(folder / f"{name}.bin", "<u2") for name in ("train", "val"))
        assert 0.74 * share <= len(val) / (len(train) + len(val)) <= 1.26 * share
        meta = read_meta(folder)
        encoding = tokenizer.from_dict(meta["tokenizer"]).encoding
        both = (ids[ids != encoding.eot_token].tolist() for ids in (train, val))
        written = [encoding.decode_bytes(ids) for ids in both]
        assert meta["val_bytes"] == len(written[1])
        assert Counter(b"".join(written)) == Counter("".join(documents).encode())  # nothing is lost


def test_links_are_followed_and_what_is_left_out_is_named(place, capsys):
    for folder, name in (("a", "x.txt"), ("b", "y.TXT"), ("b", "notes.md"), ("a/.git/c", "z.txt")):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, name).write_text(name, encoding="utf-8")
    Path("a/more").symlink_to("../b")
    Path("b/back").symlink_to("../a")
    Path("a/lost.txt").symlink_to("nowhere")
    shards, _ = prepare.list_shards(prepare.PrepareConfig(input="a"))
    assert list(shards) == [Path("a/more/y.TXT"), Path("a/x.txt")]
    assert capsys.readouterr().out.endswith("formats or broken links: lost.txt, notes.md\n")


MISTAKES = [
    ({"input": "none.txt"}, "input=none.txt: no such file"),
    ({"input": "a.pdf"}, "input=a.pdf: no such file, or none of .*pandoc"),
    ({"input": "broken.txt.gz"}, "broken.txt.gz: not readable .*is it whole"),
    ({"column": "body"}, "--column=body is not a text column among .*'id': 'int64', 'text': 'str"),
    ({"column": "id"}, "--column=id is not a text column"),
    ({"min_chars": 10**6}, "no text is left for data.* lower --min_chars"),
    ({"tokenizer": "data/tiny/meta.json"}, "not BPE with at most 65,536 tokens"),
    ({"tokenizer": "data/endless"}, r"not BPE with at most 65,536 tokens and <\|endoftext\|>"),
    ({"vocab_size": 65537}, "at most 65,536"),
    ({"vocab_size": 256}, "at least 257"),
    ({"size": "12 parsecs"}, "a number with a unit, as 250MB"),
    ({"size": "0MB"}, "a number with a unit, as 250MB"),
    ({"val_fraction": 1.0}, "at most 0.999"),
    ({"num_threads": -1}, "num_threads=-1"),
    ({"min_chars": 0}, "min_chars=0"),
]


@pytest.mark.parametrize("options, words", MISTAKES, ids=str)
def test_a_mistake_ends_in_one_line(dataset, options, words):
    Path("a.pdf").touch()
    Path("broken.txt.gz").write_bytes(gzip.compress(b"some text\n" * 50)[:-20])
    endless = tokenizer.BPETokenizer([bytes([i]) for i in range(256)], special={})
    data.write_dataset(Path("data/endless"), endless, [1], [1], 1, {})
    Path("good.parquet").write_bytes(parquet(make_documents(100)))
    with pytest.raises(UserError, match=words) as error:
        run(**{"input": "good.parquet", "dataset": "mine"} | options)
    assert "\n" not in str(error.value) and not Path("data/mine/meta.json").exists()
    if "no text" in str(error.value):  # put right, the same command works
        run(dataset="mine", input="good.parquet")


def test_sizes_are_decimal():
    sizes = [prepare.parse_size(size) for size in ("1B", "1.5KB", "250MB", "12gb", "all")]
    assert sizes == [1, 1500, 250e6, 12e9, float("inf")]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_file_gives_documents_or_one_line(tmp_path, suffix):
    path, draw = tmp_path / f"some{suffix}", random.Random(suffix)
    content = encode_documents(make_documents(30), suffix)
    for n in range(120):
        at = draw.randrange(len(content))
        flipped = bytes([content[at] ^ 1 << draw.randrange(8)])
        damages = content[:at], content[:at] + flipped + content[at + 1 :], draw.randbytes(300)
        path.write_bytes(damages[n % 3])
        try:
            documents = read_documents(path, "text", Counter())
            assert all(isinstance(document, str) for document in documents)
        except UserError as error:
            assert "\n" not in str(error) and f"some{suffix}: " in str(error)


def test_a_data_set_and_its_downloads_are_locked_from_the_first_to_the_last_step(hub, monkeypatch):
    def check_and(function):
        def checked(*args):
            for folder in ("data/openweb", "data/cache/openwebtext"):
                with pytest.raises(UserError, match="another process"), lock_path(Path(folder)):
                    pass
            calls.append(function.__name__)
            return function(*args)

        return checked

    calls = []
    monkeypatch.setattr(prepare, "download", check_and(prepare.download))
    monkeypatch.setattr(corpus, "finish", check_and(corpus.finish))
    run()
    assert (calls[0], calls[-1]) == ("download", "finish")


def test_few_documents_wait_in_memory_together(place, monkeypatch):
    waiting = []

    class Recorder(deque):
        def popleft(self):
            waiting.append(len(self))
            return super().popleft()

    monkeypatch.setattr(corpus, "deque", Recorder)
    Path("a.parquet").write_bytes(parquet(make_documents(150)))
    run(input="a.parquet", num_threads=2)
    assert len(waiting) > 100 and set(waiting) == {9}  # a document may be huge
