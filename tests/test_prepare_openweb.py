"""Web text to token files: the same bytes as from a plain loop, whatever happens on the way."""

import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import deque
from configurator import UserError
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_openweb as prepare
from support import corpus, tokenizer
from support.files import lock_path

FILES = ("train.bin", "val.bin", "meta.json")


def make_documents(n: int, seed: int = 0) -> list[str]:
    """Return texts of made-up words; some are short, some repeated, some need to be cleaned."""
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
    """Return the documents of a small source of 6 shards on the test server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setitem(
        prepare.SOURCES, "openwebtext", ("datasets/some/text/resolve/1", "train-{:02}.parquet", 6)
    )
    monkeypatch.setattr(corpus, "SAVE_BYTES", 1)  # after every one of these small shards
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
    """Return train ids, val ids and bytes of val text, computed in the simplest way."""
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


def test_the_token_files_equal_those_of_a_plain_loop(hub, server):
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
    counts = meta["source"]["documents"]
    assert counts["read"] == 600 and counts["dropped: shorter than min_chars"] >= 1
    # One copy is in the same shard, one in a later shard.
    assert counts["dropped: the same as an earlier one"] == 2
    assert counts["mended: control characters"] == counts["mended: not in Unicode's form NFC"] == 1
    assert sum(n for name, n in counts.items() if name.startswith(("kept", "dropped"))) == 600


def test_the_tokenizer_is_trained_by_rustbpe_on_the_first_documents(hub, monkeypatch):
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


def test_nothing_is_downloaded_beyond_the_size(hub, server, monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 50_000)
    folder = run(size="150KB")
    source = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["source"]
    assert 150_000 <= source["text_bytes"] < 160_000
    asked = {path for path, _ in server.requests}
    assert len(asked) < 6


def test_only_one_shard_at_a_time_is_on_the_disk(hub, monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 50_000)
    n_files, add_shard = [], corpus.Writer.add_shard

    def count_files(*args, **options):
        n_files.append(len(list(Path("data/cache").rglob("*.parquet*"))))
        add_shard(*args, **options)

    monkeypatch.setattr(corpus.Writer, "add_shard", count_files)
    run()
    assert n_files == [1] * 6


def test_the_size_does_not_change_which_documents_are_for_validation(hub):
    first = run(dataset="first") / "meta.json"
    small, large = (run(size=s, dataset=s, tokenizer=str(first)) for s in ("150KB", "all"))
    for name in ("train.bin", "val.bin"):
        few, many = (folder / name for folder in (small, large))
        assert (
            many.read_bytes().startswith(few.read_bytes())
            and few.stat().st_size < many.stat().st_size
        )


def test_a_complete_data_set_is_not_prepared_again(hub, server, capsys):
    before = contents(run())
    server.requests.clear()
    assert contents(run()) == before and not server.requests
    assert "is there already" in capsys.readouterr().out


def test_keep_shards_keeps_the_downloads(hub, server):
    first = contents(run(keep_shards=True))
    server.requests.clear()
    assert contents(run(keep_shards=True, dataset="again")) == first
    assert [path for path, _ in server.requests] == []


def test_another_data_set_deletes_only_the_downloads_that_it_used(hub):
    run(keep_shards=True)
    run(dataset="small", size="100KB")
    left = sorted(path.name for path in Path("data/cache/openwebtext").glob("*.parquet"))
    assert "train-00.parquet" not in left and "train-05.parquet" in left


def test_a_data_set_with_a_damaged_file_is_prepared_again(hub, capsys):
    before, path = contents(run()), Path("data/openweb/train.bin")
    path.write_bytes(path.read_bytes()[:-2])
    assert contents(run()) == before
    path.unlink()
    assert contents(run()) == before
    assert capsys.readouterr().out.count("was prepared with damaged files; preparing it") == 2


def test_a_list_of_files_may_end_in_a_comma_and_be_long(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"a_long_name_of_a_file_{n:03}.txt" for n in range(12)]
    for name in names:
        Path(name).write_text(f"{name} " * 20, encoding="utf-8")
    Path("other.txt").write_text("not in the list " * 20, encoding="utf-8")
    shards = prepare.list_shards(prepare.PrepareConfig(input=",".join(names) + ","))
    assert list(shards) == [Path(name) for name in names]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_not_text(tmp_path, name):
    line = "text" if name == "a.txt" else '{"text": "text"}'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\n")
    assert b"".join(corpus.read_documents(tmp_path / name, "text")).strip() == b"text"


def test_faults_of_the_server_do_not_change_the_result(hub, server):
    expected = contents(run())
    server.headers = {}
    server.faults = ["cut", 500, "cut", "ignore", "long", "shift", 503, "silent"]
    assert contents(run(dataset="again")) == expected


@pytest.mark.parametrize(
    "suffix", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst"]
)
def test_every_file_format_gives_the_same_documents(tmp_path, monkeypatch, suffix):
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
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    train, val, _ = naive(documents, tokenizer.from_dict(meta["tokenizer"]).encoding, 0.1)
    assert np.fromfile(folder / "train.bin", "<u2").tolist() == train
    assert np.fromfile(folder / "val.bin", "<u2").tolist() == val


def test_bytes_that_are_not_utf8_are_replaced_and_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [f"number {i} " * 40 + "\n" for i in range(60)]
    Path("a.txt").write_bytes(
        "<|endoftext|>\n".join(texts).encode() + b"<|endoftext|>\nbad \xff byte" + b" more" * 60
    )
    folder = run(input="a.txt", dataset="mine", tokenizer="bpe")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert meta["source"]["documents"]["mended: bytes that were no UTF-8"] == 1
    ids = np.concatenate([np.fromfile(folder / n, "<u2") for n in ("train.bin", "val.bin")])
    assert "bad \ufffd byte" in tokenizer.from_dict(meta["tokenizer"]).decode(ids.tolist())


COMMAND = """
import sys
sys.path.insert(0, {root!r})
import configurator, prepare_openweb
from support import corpus
corpus.SAVE_BYTES = 1
source = ("datasets/some/text/resolve/1", "train-{{:02}}.parquet", 6)
prepare_openweb.SOURCES["openwebtext"] = source
options = dict(vocab_size=400, size="all", val_fraction=0.1, dataset="killed")
config = prepare_openweb.PrepareConfig(**options)
configurator.run(prepare_openweb.main, config)
"""


@pytest.mark.slow
def test_the_result_is_the_same_after_20_kills_at_random_moments(hub, server):
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


class Interrupted(BaseException):
    pass


def interrupt(*_args, **_options):
    raise Interrupted


def run_until(monkeypatch, function: str, call: int = 1, **options) -> None:
    """Run, and interrupt the given call of a method of corpus.Writer."""
    original, calls = getattr(corpus.Writer, function), []

    def count_and_call(*args, **kwargs):
        calls.append(1)
        return (interrupt if len(calls) == call else original)(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(corpus.Writer, function, count_and_call)
        run(**options)


@pytest.mark.parametrize("at", ["the first shard", "third save", "the new names", "the end"])
def test_an_interrupted_run_continues(hub, monkeypatch, at):
    """As with the kills above, but at the places that matter, each for certain."""
    expected = contents(run(dataset="whole"))
    if at == "the first shard":
        run_until(monkeypatch, "add_shard", dataset="again")
    elif at == "third save":
        run_until(monkeypatch, "save", call=3, dataset="again")
    else:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            if at == "the new names":
                patch.setattr(corpus, "write_meta", interrupt)
            else:
                patch.setattr(
                    Path,
                    "unlink",
                    lambda path, **_: interrupt() if path.name == "progress.json" else None,
                )
            run(dataset="again")
    assert contents(run(dataset="again")) == expected
    assert sorted(p.name for p in Path("data/again").iterdir()) == sorted(FILES)


def test_many_small_files_are_saved_together_and_an_interrupted_run_continues(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "SAVE_BYTES", 20_000)
    Path("texts").mkdir()
    for i, text in enumerate(make_documents(60)):
        Path(f"texts/{i:02}.txt").write_text(text, encoding="utf-8")
    options = dict(input="texts", tokenizer="bpe")
    saves, save = [], corpus.Progress.save
    with monkeypatch.context() as patch:
        patch.setattr(corpus.Progress, "save", lambda *args: (saves.append(1), save(*args)))
        expected = contents(run(dataset="whole", **options))
    text_bytes = json.loads(expected[2])["source"]["text_bytes"]
    assert 2 < len(saves) <= 2 + text_bytes / 20_000  # one at the start, one at the end
    run_until(monkeypatch, "add_shard", call=36, dataset="again", **options)
    progress = json.loads(Path("data/again/progress.json").read_text(encoding="utf-8"))
    assert 0 < progress["shards"] < 35
    assert contents(run(dataset="again", **options)) == expected


def test_an_interrupted_run_refuses_other_options(hub, monkeypatch):
    run_until(monkeypatch, "add_shard")
    with pytest.raises(UserError, match="begun with size=all instead of 1MB"):
        run(size="1MB")
    assert Path("data/openweb/progress.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input": "none.txt"}, "none.txt: no such file or folder"),
        ({"input": "a.csv"}, "no such file that ends with .parquet"),
        ({"input": "empty_folder"}, "no such file that ends with"),
        ({"input": "empty.parquet"}, "empty.parquet: not readable"),
        ({"input": "empty.txt"}, "too few"),
        ({"input": "empty.jsonl"}, "too few"),
        ({"input": "broken.txt.gz"}, "broken.txt.gz: not readable"),
        ({"input": "bad.jsonl"}, "line 2 is not JSON with a text 'text'"),
        ({"input": "good.jsonl", "column": "body"}, "line 1 is not JSON with a text 'body'"),
        (
            {"input": "good.parquet", "column": "body"},
            "--column=body is not one text column among id .int64., text .string.",
        ),
        (
            {"input": "good.parquet", "column": "id"},
            "--column=id is not one text column among id .int64.",
        ),
        ({"input": "twice.parquet"}, "--column=text is not one text column among text"),
        ({"input": "good.parquet", "tokenizer": "slow.json"}, "Max limit for backtracking"),
        ({"input": "good.parquet", "val_fraction": 1e-9}, "raise --val_fraction"),
        ({"input": "good.parquet", "min_chars": 10**6}, "lower --min_chars"),
        ({"input": "good.parquet", "tokenizer": "none.json"}, "none.json: no such file"),
        ({"input": "good.parquet", "tokenizer": "data/tiny/meta.json"}, "not BPE"),
    ],
    ids=str,
)
def test_a_mistake_in_the_input_ends_in_one_line(dataset, options, words):
    documents = make_documents(100)
    Path("empty_folder").mkdir()
    for name in ("a.csv", "empty.parquet", "empty.txt", "empty.jsonl"):
        Path(name).write_bytes(b"")
    Path("broken.txt.gz").write_bytes(gzip.compress(b"some text\n" * 50)[:-20])
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text"\n', encoding="utf-8")
    Path("good.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    Path("good.parquet").write_bytes(parquet(documents))
    two = pa.Table.from_arrays([pa.array(documents)] * 2, names=["text", "text"])
    pq.write_table(two, "twice.parquet")
    write_meta_with_pattern(Path("slow.json"), r"(?:a|aa|aaa)+(?=!)|[\s\S]")
    Path("slow.parquet").write_bytes(parquet(["a" * 300 + str(n) for n in range(50)]))
    if options.get("tokenizer") == "slow.json":
        options["input"] = "slow.parquet"
    with pytest.raises(UserError, match=words) as error:
        run(dataset="mine", **options)
    assert "\n" not in str(error.value)
    assert not (Path("data/mine") / "meta.json").exists()
    if "val_fraction" in options:  # put right, the same command works
        run(dataset="mine", input="good.parquet")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_size": 65537}, "at most 65,536"),
        ({"vocab_size": 256}, "at least 257"),
        ({"size": "12 parsecs"}, "a number with a unit, as 250MB"),
        ({"size": "0MB"}, "a number with a unit, as 250MB"),
        ({"val_fraction": 1.0}, "at most 0.999"),
        ({"num_threads": -1}, "num_threads=-1"),
    ],
    ids=str,
)
def test_an_option_out_of_range_ends_in_one_line(options, words):
    with pytest.raises(UserError, match=words):
        prepare.PrepareConfig(**options)


def test_sizes_are_decimal():
    assert [prepare.parse_size(s) for s in ("1B", "1.5KB", "250MB", "12gb")] == [
        1,
        1500,
        250e6,
        12e9,
    ]


def test_too_little_disk_space_is_noticed_at_the_start(hub, monkeypatch):
    monkeypatch.setattr(prepare, "free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match=r"will need about .* GB, and 0.00 GB are free"):
        run(size="12GB")


def test_a_disk_that_fills_up_loses_nothing(hub, monkeypatch):
    expected = contents(run(dataset="whole"))
    calls, save = [], corpus.Writer.save

    def fill_up(writer, complete):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save(writer, complete)

    with monkeypatch.context() as patch:
        patch.setattr(corpus.Writer, "save", fill_up)
        with pytest.raises(UserError, match=r"No space left on device.*the same command continues"):
            run(dataset="again")
    assert json.loads(Path("data/again/progress.json").read_text())["shards"] == 2
    assert contents(run(dataset="again")) == expected


FULL = """
mount -t tmpfs -o {limit} none {folder} && cd {folder} && {python} {script} --input={input} \\
    --vocab_size=400 --dataset=mine --val_fraction=0.1
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a small file system of its own")
@pytest.mark.parametrize(
    ("limit", "words"), [("size=200k", "make"), ("nr_inodes=7", "number of files")]
)
def test_a_full_disk_is_explained_by_what_is_full(tmp_path, limit, words):
    (tmp_path / "a.parquet").write_bytes(parquet(make_documents(400)))
    (tmp_path / "full").mkdir()
    command = FULL.format(
        limit=limit,
        folder=tmp_path / "full",
        python=sys.executable,
        script=ROOT / "prepare_openweb.py",
        input=tmp_path / "a.parquet",
    )
    isolated = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    probe = f"mount -t tmpfs none {tmp_path / 'full'}"
    try:
        subprocess.run([*isolated, probe], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not let us mount a small file system")
    ended = subprocess.run([*isolated, command], capture_output=True, encoding="utf-8")
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert words in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_without_a_network_there_is_one_line(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"could not download .*(Connection refused|refused it)"):
        run()


@pytest.mark.parametrize("size", [100, 10_000])
def test_a_download_that_is_not_parquet_is_deleted(hub, server, size):
    path = "/datasets/some/text/resolve/1/train-01.parquet"
    good, server.files[path] = server.files[path], b"<html>" * size
    with pytest.raises(UserError, match="not a parquet file"):
        run()
    server.files[path] = good
    expected = contents(run())
    assert contents(run(dataset="again")) == expected


def test_hf_token_is_sent_to_the_hub(hub, server, monkeypatch):
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
    """The peak of Python's own memory is the same for four times as much text."""
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


def write_meta_with_pattern(path: Path, pattern: str) -> None:
    """Write the meta.json of a data set whose tokenizer splits text by `pattern`."""
    bpe = {"kind": "bpe", "pattern": pattern, "tokens": [chr(i) for i in range(256)]}
    counts = dict.fromkeys(("vocab_size", "train_tokens", "val_tokens", "val_bytes"), 257)
    sha256 = {"train.bin": "", "val.bin": ""}
    meta = {"tokenizer": bpe, "source": {}, "sha256": sha256} | counts
    path.write_text(json.dumps(meta), encoding="utf-8")


def test_a_second_process_ends_in_one_line_and_does_no_harm(hub, server):
    expected = contents(run())
    server.requests.clear()
    server.gate.clear()
    command = [sys.executable, "-c", COMMAND.format(root=str(ROOT))]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not any(path.endswith("train-00.parquet") for path, _ in server.requests):
        assert first.poll() is None
        time.sleep(0.05)
    second = subprocess.run(command, capture_output=True, encoding="utf-8")
    server.gate.set()
    assert second.returncode == 1 and len(second.stderr.splitlines()) == 1
    assert "data/killed: another process is at work there" in second.stderr.replace("\\", "/")
    assert first.wait() == 0 and contents(Path("data/killed")) == expected


def test_two_data_sets_from_one_source_do_not_share_a_download(hub, server):
    with lock_path(Path("data/cache/openwebtext")), pytest.raises(UserError, match="cache"):
        run()


DAMAGES = {
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "truncated": lambda content: content[: len(content) // 2],
    "a list": lambda content: b"[1, 2]",
    "a key missing": lambda content: json.dumps(
        dict(list(json.loads(content).items())[1:])
    ).encode(),
    "a wrong type": lambda content: json.dumps(dict.fromkeys(json.loads(content), "x")).encode(),
    "nested": lambda content: b"[" * 100_000,
}


@pytest.fixture
def half_done(tmp_path, monkeypatch) -> Path:
    """Return the folder of a data set that was interrupted after 2 of 4 files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "SAVE_BYTES", 1)
    Path("texts").mkdir()
    for n in range(4):
        Path(f"texts/{n}.parquet").write_bytes(parquet(make_documents(60, seed=n)))
    run_until(monkeypatch, "add_shard", call=3, input="texts", dataset="mine")
    return Path("data/mine")


@pytest.mark.parametrize("name", ["progress.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_names_the_file_and_the_remedy(half_done, name, damage):
    path = half_done / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(UserError, match=f"{name}: damaged.*remove .*progress.json") as error:
        run(input="texts", dataset="mine")
    assert "\n" not in str(error.value)
    (half_done / "progress.json").unlink()
    run(input="texts", dataset="mine")


def test_a_state_that_ends_before_the_last_shard_is_refused(half_done):
    path = half_done / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shards": 4}))
    with pytest.raises(UserError, match="damaged"):
        run(input="texts", dataset="mine")


@pytest.mark.parametrize("name", ["train.bin.part", "val.bin.part", "seen.part"])
@pytest.mark.parametrize("complete", [False, True])
def test_other_bytes_of_the_right_length_are_refused(half_done, monkeypatch, name, complete):
    if complete:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(corpus, "finish", interrupt)
            run(input="texts", dataset="mine")
    path = half_done / name
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))
    if complete and name == "seen.part":
        return run(input="texts", dataset="mine") and None  # no longer needed
    with pytest.raises(UserError, match=f"{name} does not fit progress.json; remove"):
        run(input="texts", dataset="mine")


def test_a_state_of_an_earlier_version_continues(half_done):
    expected = contents(run(input="texts", dataset="whole"))
    path = half_done / "progress.json"
    state = json.loads(path.read_text())
    del state["sha256"], state["options"]["inputs"]
    path.write_text(json.dumps(state, indent=2))
    assert contents(run(input="texts", dataset="mine"))[:2] == expected[:2]


def test_changed_input_files_are_noticed(half_done, capsys):
    Path("texts/1.parquet").write_bytes(parquet(make_documents(60, seed=9)))
    with pytest.raises(UserError, match="begun with other input files, or they have changed"):
        run(input="texts", dataset="mine")
    (half_done / "progress.json").unlink()
    before = contents(run(input="texts", dataset="mine"))
    capsys.readouterr()
    assert contents(run(input="texts", dataset="mine")) == before
    assert "is there already" in capsys.readouterr().out
    Path("texts/1.parquet").write_bytes(parquet(make_documents(60, seed=1)))
    assert contents(run(input="texts", dataset="mine"))[0] != before[0]
    assert "other input files, or they have changed" in capsys.readouterr().out


def test_a_damaged_meta_json_is_replaced(half_done, capsys):
    before = contents(run(input="texts", dataset="mine"))
    (half_done / "meta.json").write_bytes(b"{")
    assert contents(run(input="texts", dataset="mine")) == before
    assert "was prepared with damaged files; preparing it again" in capsys.readouterr().out


def test_the_training_of_the_tokenizer_is_announced(half_done, capsys):
    run(input="texts", dataset="new")
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "training a tokenizer of 400 tokens on up to 32 MB of text ..."


MEMORY = """
import sys
sys.path.insert(0, {root!r})
import prepare_openweb, psutil, threading, time
base, peak, this = psutil.Process().memory_info().rss, 0, psutil.Process()

def watch():
    global peak
    while True:
        peak = max(peak, this.memory_info().rss)
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
prepare_openweb.main(prepare_openweb.PrepareConfig(
    input="long.jsonl", vocab_size=300, val_fraction=0.3, dataset="mine", num_threads=1))
print((peak - base) // 10**6)
"""


def test_a_document_of_one_long_word_needs_little_memory(tmp_path):
    """A word of 8 MB that is tokenized whole takes more than 300 MB."""
    texts = ["x" * 8_000_000, *make_documents(100)]
    with open(tmp_path / "long.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    command = [sys.executable, "-c", MEMORY.format(root=str(ROOT))]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=True)
    assert int(ended.stdout.split()[-1]) < 250


def test_huge_documents_do_not_wait_in_memory_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    waiting = []

    class Recorder(deque):
        def popleft(self):
            waiting.append(len(self))
            return super().popleft()

    monkeypatch.setattr(corpus, "deque", Recorder)
    monkeypatch.setattr(corpus, "HUGE", 100)
    Path("a.parquet").write_bytes(parquet(make_documents(150)))
    run(input="a.parquet", dataset="mine")
    assert len(waiting) > 100 and set(waiting) == {1}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


def mutate_json(draw, content: bytes) -> bytes:
    """Replace or delete one value somewhere in a JSON object."""
    whole = json.loads(content)
    place = whole
    while True:
        key = draw(st.sampled_from(list(place)))
        inner = place[key]
        if not isinstance(inner, dict) or not inner or draw(st.booleans()):
            break
        place = inner
    if draw(st.booleans()):
        place[key] = draw(json_values)
    else:
        del place[key]
    return json.dumps(whole).encode()


def mutate_bytes(draw, content: bytes) -> bytes:
    """Replace some bytes by zero to eight others."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 8)) | st.just(len(content)))
    return content[:start] + draw(st.binary(max_size=8)) + content[end:]


def check_mutations(data, folder: Path) -> None:
    """Change one file of an interrupted preparation; the next run ends well or in one line."""
    work = folder.parent.parent
    saved = {p: p.read_bytes() for p in work.rglob("*") if p.is_file() and p.suffix != ".lock"}
    path = data.draw(
        st.sampled_from(
            [
                folder / "progress.json",
                folder / "tokenizer.json",
                Path("texts/2.parquet"),
                Path("texts/3.jsonl"),
            ]
        )
    )
    kinds = [mutate_bytes, mutate_json] if path.parent == folder else [mutate_bytes]
    path.write_bytes(data.draw(st.sampled_from(kinds))(data.draw, path.read_bytes()))
    if path.parent != folder:  # otherwise the run ends because this file has changed
        progress = json.loads((folder / "progress.json").read_text())
        del progress["options"]["inputs"]
        (folder / "progress.json").write_text(json.dumps(progress))
    try:
        run(input="texts", dataset="mine")
    except UserError as error:
        assert "\n" not in str(error).strip()
    finally:
        shutil.rmtree(folder)
        folder.mkdir()
        for p, content in saved.items():
            p.write_bytes(content)
            os.utime(p, ns=(0, 0))


@pytest.fixture
def mutable(half_done, monkeypatch) -> Path:
    """Like half_done, but smaller, and with a jsonl file."""
    shutil.rmtree("data")
    for n in range(3):
        Path(f"texts/{n}.parquet").write_bytes(parquet(make_documents(20, seed=n)))
    Path("texts/3.parquet").unlink()
    Path("texts/3.jsonl").write_text(
        "".join(json.dumps({"text": d}) + "\n" for d in make_documents(20))
    )
    for path in Path("texts").iterdir():
        os.utime(path, ns=(0, 0))
    run_until(monkeypatch, "add_shard", call=2, input="texts", dataset="mine")
    return Path("data/mine").absolute()


@settings(max_examples=200)
@given(st.data())
def test_no_change_of_a_byte_or_a_value_ends_in_a_traceback(mutable, data):
    check_mutations(data, mutable)


@pytest.mark.slow
@settings(max_examples=2000)
@given(st.data())
def test_none_of_2000_changes_ends_in_a_traceback(mutable, data):
    check_mutations(data, mutable)
