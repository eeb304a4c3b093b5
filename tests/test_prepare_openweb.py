"""Web text to token files: the same bytes as a plain loop gives, whatever happens on the way."""

import gzip
import io
import json
import random
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

import prepare_openweb as prepare
from configurator import UserError
from support import tokenizer

FILES = ("train.bin", "val.bin", "meta.json")


def make_documents(n: int, seed: int = 0) -> list[str]:
    """Texts of 20 to 3,000 made-up words; some short, some twice, some with what has to be cleaned."""
    random.seed(seed)
    words = [
        "".join(random.choices("abcdefgh\u00e9\u4f60", k=random.randint(2, 8))) for _ in range(300)
    ]
    documents = [" ".join(random.choices(words, k=random.randint(20, 400))) for _ in range(n)]
    documents[3] = documents[1]
    documents[5] = "short"
    documents[6] += " cafe\u0301 \x00\x1b[0m <|endoftext|> \r\n end\x85"
    return documents


def parquet(documents: list[str | None], column: str = "text") -> bytes:
    file = io.BytesIO()
    pq.write_table(
        pa.table({"id": range(len(documents)), column: documents}), file, row_group_size=20
    )
    return file.getvalue()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The server has a small source of 6 shards; the working directory is empty. Gives its documents."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setitem(
        prepare.SOURCES, "openwebtext", ("datasets/some/text/resolve/1", "train-{:02}.parquet", 6)
    )
    documents = make_documents(600)
    documents[450] = documents[2]
    for n in range(6):
        shard = parquet([*documents[100 * n : 100 * n + 100], None])
        server.files[f"/datasets/some/text/resolve/1/train-{n:02}.parquet"] = shard
    return documents


def run(**options) -> Path:
    config = prepare.PrepareConfig(
        **{"vocab_size": 400, "size": "all", "val_fraction": 0.1} | options
    )
    prepare.main(config)
    return Path("data") / config.dataset


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def naive(
    documents: list[str], encoding, fraction: float, min_chars: int = 200
) -> tuple[list, list, int]:
    """What the program does, document by document, as one would write it without thinking of speed."""
    import hashlib

    seen, train, val, val_bytes = set(), [], [], 0
    for text in documents:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
        text = unicodedata.normalize("NFC", text)
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if len(text) < min_chars or digest in seen:
            continue
        seen.add(digest)
        chosen = int.from_bytes(digest, "little") / 2**64 < fraction
        (val if chosen else train).extend([*encoding.encode_ordinary(text), encoding.eot_token])
        val_bytes += len(text.encode()) * chosen
    return train, val, val_bytes


def test_bins_equal_those_of_a_plain_loop(hub, server):
    folder = run()
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    train, val, val_bytes = naive(hub, tokenizer.from_dict(meta["tokenizer"]).encoding, 0.1)
    assert np.fromfile(folder / "train.bin", "<u2").tolist() == train
    assert np.fromfile(folder / "val.bin", "<u2").tolist() == val
    assert (meta["train_tokens"], meta["val_tokens"], meta["val_bytes"]) == (
        len(train),
        len(val),
        val_bytes,
    )
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert not list(Path("data/cache").rglob("*.parquet"))
    told = meta["source"]["documents"]
    assert told["read"] == 600 and told["dropped: shorter than min_chars"] >= 1
    assert (
        told["dropped: the same as an earlier one"] == 2
    )  # one in the same shard, one in a later one
    assert told["mended: control characters"] == told["mended: not in Unicode's form NFC"] == 1
    assert sum(told[k] for k in told if k.startswith(("kept", "dropped"))) == 600


def test_the_tokenizer_is_the_one_that_rustbpe_trains_on_the_sample(hub, monkeypatch):
    import rustbpe

    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 50_000)
    folder = run(size="100KB")
    clean = [d for d in hub[:3] + hub[4:5]]
    assert all(len(d) >= 200 for d in clean)
    sample = list(
        prepare.training_sample(
            prepare.PrepareConfig(val_fraction=0.1), prepare.list_shards(prepare.PrepareConfig())
        )
    )
    assert 50_000 <= sum(len(text.encode()) for text in sample) < 60_000
    theirs = rustbpe.Tokenizer()
    theirs.train_from_iterator(sample, 399, pattern=tokenizer.SPLIT_PATTERN)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert [t.encode("latin-1") for t in meta["tokenizer"]["tokens"]] == [
        bytes(t) for t, _ in theirs.get_mergeable_ranks()
    ]


def test_size_ends_the_data_set_and_no_more_is_downloaded(hub, server, monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 50_000)
    folder = run(size="150KB")
    source = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["source"]
    assert 150_000 <= source["text_bytes"] < 160_000
    asked = {path for path, _ in server.requests}
    assert len(asked) < 6


def test_no_more_than_one_shard_is_on_the_disk(hub, monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 50_000)
    seen, add_shard = [], prepare.add_shard

    def look(*args):
        seen.append(len(list(Path("data/cache").rglob("*.parquet*"))))
        add_shard(*args)

    monkeypatch.setattr(prepare, "add_shard", look)
    run()
    assert seen == [1] * 6


def test_what_is_in_validation_does_not_depend_on_size(hub):
    tok = run(dataset="first") / "meta.json"
    small, large = (run(size=s, dataset=s, tokenizer=str(tok)) for s in ("150KB", "all"))
    for name in ("train.bin", "val.bin"):
        few, many = (folder / name for folder in (small, large))
        assert (
            many.read_bytes().startswith(few.read_bytes())
            and few.stat().st_size < many.stat().st_size
        )


def test_a_data_set_that_is_there_is_not_made_again(hub, server, capsys):
    before = contents(run())
    server.requests.clear()
    assert contents(run()) == before and not server.requests
    assert "there already" in capsys.readouterr().out


def test_shards_are_kept_when_asked_for(hub, server):
    first = contents(run(keep_shards=True))
    server.requests.clear()
    assert contents(run(keep_shards=True, dataset="again")) == first
    assert [path for path, _ in server.requests] == []


def test_a_server_with_faults_makes_no_difference(hub, server):
    expected = contents(run())
    server.headers = {}
    server.faults = ["cut", 500, "cut", "ignore", "long", "shift", 503, "silent"]
    assert contents(run(dataset="again")) == expected


@pytest.mark.parametrize(
    "suffix", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst"]
)
def test_every_kind_of_file_gives_the_same_documents(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    documents = [f"{d}\n" for d in make_documents(200) if "<|" not in d]
    as_text = {
        ".parquet": "",
        ".jsonl": "".join(json.dumps({"text": d}) + "\n" for d in documents),
        ".txt": "<|endoftext|>\n".join(documents),
    }[next(s for s in (".parquet", ".jsonl", ".txt") if s in suffix)].encode()
    content = {
        ".parquet": lambda: parquet(documents),
        ".gz": lambda: gzip.compress(as_text),
        ".zst": lambda: pa.Codec("zstd").compress(as_text, asbytes=True),
    }.get(Path(f"some{suffix}").suffix, lambda: as_text)()
    Path("texts").mkdir()
    (Path("texts") / f"some{suffix}").write_bytes(content)
    Path("texts/notes.md").write_text("not a text to train on")
    folder = run(input="texts", dataset="mine")
    tok = tokenizer.from_dict(
        json.loads((folder / "meta.json").read_text(encoding="utf-8"))["tokenizer"]
    )
    train, val, _ = naive(documents, tok.encoding, 0.1)
    assert np.fromfile(folder / "train.bin", "<u2").tolist() == train
    assert np.fromfile(folder / "val.bin", "<u2").tolist() == val


def test_a_long_text_file_is_cut_at_ends_of_lines(tmp_path):
    lines = [f"line {i} of a long book\n" for i in range(20_000)]
    (tmp_path / "book.txt").write_text("".join(lines), encoding="utf-8")
    documents = [d.decode() for d in prepare.read_documents(tmp_path / "book.txt", "text")]
    assert "".join(documents) == "".join(lines) and len(documents) > 4
    assert all(d.endswith("\n") and len(d) < 100_100 for d in documents if d)


def test_bytes_that_are_no_utf8_are_mended_and_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [f"number {i} " * 40 + "\n" for i in range(60)]
    Path("a.txt").write_bytes(
        "<|endoftext|>\n".join(texts).encode() + b"<|endoftext|>\nbad \xff byte" + b" more" * 60
    )
    folder = run(input="a.txt", dataset="mine", tokenizer="bpe")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert meta["source"]["documents"]["mended: bytes that were no UTF-8"] == 1
    tok = tokenizer.from_dict(meta["tokenizer"])
    text = tok.decode(
        np.concatenate([np.fromfile(folder / n, "<u2") for n in ("train.bin", "val.bin")]).tolist()
    )
    assert "bad \ufffd byte" in text


COMMAND = """
import sys
sys.path.insert(0, {root!r})
import prepare_openweb
prepare_openweb.SOURCES["openwebtext"] = ("datasets/some/text/resolve/1", "train-{{:02}}.parquet", 6)
prepare_openweb.main(prepare_openweb.PrepareConfig(vocab_size=400, size="all", val_fraction=0.1, dataset="killed"))
"""


@pytest.mark.slow
def test_killed_at_20_random_moments_it_ends_with_the_same_bytes(hub, server):
    expected = contents(run())
    random.seed(0)
    command = [sys.executable, "-c", COMMAND.format(root=str(ROOT))]
    kills, ended, found = 0, False, set()
    while not ended or kills < 20:
        if ended:  # from the beginning again, until there were enough kills
            assert contents(Path("data/killed")) == expected
            for name in FILES:
                (Path("data/killed") / name).unlink()
        server.seconds_per_block = random.choice([0.0, 0.05])
        child = subprocess.Popen(command)
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


@pytest.mark.parametrize("after", ["tokenizer", "shard_done", "files", "meta"])
def test_interrupted_at_each_step_it_goes_on(hub, monkeypatch, after):
    """As the kills above, but at the places that matter, each for certain."""
    expected = contents(run(dataset="whole"))

    class Interrupted(BaseException):
        pass

    def interrupt(*_args, **_options):
        raise Interrupted

    with monkeypatch.context() as patch:
        if after == "tokenizer":
            patch.setattr(prepare, "add_shards", interrupt)
        elif after == "shard_done":
            sort, calls = prepare.Unfinished.sort_seen, []
            patch.setattr(
                prepare.Unfinished,
                "sort_seen",
                lambda w: calls.append(1) or (interrupt() if len(calls) == 3 else sort(w)),
            )
        elif after == "files":
            patch.setattr(prepare, "write_meta", interrupt)
        else:
            patch.setattr(
                prepare.Path,
                "unlink",
                lambda path, **_: interrupt() if path.name == "progress.json" else None,
            )
        with pytest.raises(Interrupted):
            run(dataset="again")
    assert contents(run(dataset="again")) == expected
    assert sorted(p.name for p in Path("data/again").iterdir()) == sorted(FILES)


def test_other_options_do_not_go_on_with_what_was_begun(hub, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "add_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run()
    with pytest.raises(UserError, match="begun with size=all and not 1MB"):
        run(size="1MB")
    assert Path("data/openweb/progress.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input": "none.txt"}, "none.txt: no such file"),
        ({"input": "a.csv"}, "unknown kind of file; it must end with .parquet"),
        ({"input": "empty_folder"}, "no file in this folder ends with"),
        ({"input": "empty.parquet"}, "can not be read as parquet"),
        ({"input": "empty.txt"}, "too few"),
        ({"input": "empty.jsonl"}, "too few"),
        ({"input": "broken.txt.gz"}, "can not be unpacked"),
        ({"input": "bad.jsonl"}, "line 2 is no JSON"),
        ({"input": "good.jsonl", "column": "body"}, "line 1 has no text named 'body'"),
        ({"input": "good.parquet", "column": "body"}, "no column 'body'; choose among id, text"),
        ({"input": "good.parquet", "column": "id"}, "column 'id' has no text but int64"),
        ({"input": "good.parquet", "val_fraction": 1e-9}, "raise --val_fraction"),
        ({"input": "good.parquet", "min_chars": 10**6}, "lower --min_chars"),
        ({"input": "good.parquet", "tokenizer": "none.json"}, "none.json: no such file"),
        ({"input": "good.parquet", "tokenizer": "data/tiny/meta.json"}, "one of characters"),
    ],
    ids=str,
)
def test_a_bad_input_gets_one_line(dataset, options, words):
    documents = make_documents(100)
    Path("empty_folder").mkdir()
    for name in ("a.csv", "empty.parquet", "empty.txt", "empty.jsonl"):
        Path(name).write_bytes(b"")
    Path("broken.txt.gz").write_bytes(gzip.compress(b"some text\n" * 50)[:-20])
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text"\n', encoding="utf-8")
    Path("good.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    Path("good.parquet").write_bytes(parquet(documents))
    with pytest.raises(UserError, match=words) as error:
        run(dataset="mine", **options)
    assert "\n" not in str(error.value)
    assert not (Path("data/mine") / "meta.json").exists()
    if "val_fraction" in options:  # put right, the same command works
        run(dataset="mine", input="good.parquet")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_size": 65537}, "at most 65536"),
        ({"vocab_size": 256}, "at least 257"),
        ({"size": "12 parsecs"}, "as 250MB or 12GB"),
        ({"size": "0MB"}, "as 250MB or 12GB"),
        ({"val_fraction": 1.0}, "between 0 and 1"),
        ({"num_threads": -1}, "num_threads=-1"),
    ],
    ids=str,
)
def test_an_option_out_of_range_gets_one_line(options, words):
    with pytest.raises(UserError, match=words):
        prepare.PrepareConfig(**options)


def test_sizes_are_decimal():
    assert [prepare.parse_size(s) for s in ("1B", "1.5KB", "250MB", "12gb")] == [
        1,
        1500,
        250e6,
        12e9,
    ]


def test_a_full_disk_is_noticed_before_the_start(hub, monkeypatch):
    monkeypatch.setattr(prepare, "free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match=r"will need about .* GB, and 0.00 GB are free"):
        run(size="12GB")


def test_a_disk_that_fills_up_on_the_way_costs_nothing(hub, monkeypatch):
    expected = contents(run(dataset="whole"))
    done, shard_done = [], prepare.Unfinished.shard_done

    def full(work, complete):
        done.append(1)
        if len(done) == 3:
            raise OSError(28, "No space left on device")
        shard_done(work, complete)

    with monkeypatch.context() as patch:
        patch.setattr(prepare.Unfinished, "shard_done", full)
        with pytest.raises(
            UserError, match=r"No space left on device, with .* bytes free; what is done is kept"
        ):
            run(dataset="again")
    assert json.loads(Path("data/again/progress.json").read_text())["shards"] == 2
    assert contents(run(dataset="again")) == expected


def test_without_a_network_one_line_says_so(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="can not be downloaded"):
        run()


@pytest.mark.parametrize("size", [100, 10_000])
def test_what_is_no_parquet_file_is_not_kept(hub, server, size):
    path = "/datasets/some/text/resolve/1/train-01.parquet"
    good, server.files[path] = server.files[path], b"<html>" * size
    with pytest.raises(UserError, match="no parquet file"):
        run()
    server.files[path] = good
    expected = contents(run())
    assert contents(run(dataset="again")) == expected


def test_a_token_goes_to_the_hub(hub, server, monkeypatch):
    seen = []
    import requests

    send = requests.Session.send
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(
        requests.Session,
        "send",
        lambda s, r, **o: seen.append(r.headers.get("Authorization")) or send(s, r, **o),
    )
    run(size="100KB")
    assert set(seen) == {"Bearer hf_secret"}


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    """The peak of Python's own memory is the same for four times the text."""
    import tracemalloc

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 100_000)
    peaks = []
    for n in (400, 1600):
        Path("a.parquet").write_bytes(parquet(make_documents(n)))
        tracemalloc.start()
        run(input="a.parquet", dataset=str(n))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
