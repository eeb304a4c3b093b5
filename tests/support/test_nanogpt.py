"""nanoGPT's checkpoints, token files, config files and model work here without changes."""

import math
from configurator import UserError, read_options
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from conftest import ROOT
from transformers import GPT2Config, GPT2LMHeadModel

import sample
import train
from model import GPTConfig
from support import data
from support.checkpoint import load_checkpoint
from support.nanogpt import build_original
from support.processes import Processes
from support.runtime import peak_memory
from support.tokenizer import SPLIT_PATTERN, BPETokenizer

SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=16)


def make_reference(vocab_size: int) -> GPT2LMHeadModel:
    """Return nanoGPT's model in transformers: a GPT-2 with an exact GELU."""
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=vocab_size)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    other = dict(activation_function="gelu", initializer_range=0.2, use_cache=False)
    return GPT2LMHeadModel(GPT2Config(**shape, **no_dropout, **other))


def theirs(
    reference: GPT2LMHeadModel, prefix: str = "", dataset: str = "tiny", buffers: bool = False
) -> dict:
    """Train `reference` for 5 steps of AdamW; return the checkpoint that nanoGPT would write."""
    names = dict(reference.named_parameters())
    matrices = [p for p in names.values() if p.dim() >= 2]
    vectors = [p for p in names.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for step in range(5):
        idx = torch.randint(
            reference.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(step)
        )
        reference(idx, labels=idx).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {}
    for name, p in {**names, "lm_head.weight": names["transformer.wte.weight"]}.items():
        conv = p.dim() == 2 and ".h." in name  # transformers stores these transposed
        weights[prefix + name] = p.detach().t().contiguous() if conv else p.detach().clone()
    state = optimizer.state_dict()
    for number, p in enumerate(matrices + vectors):
        name = next(n for n, q in names.items() if q is p)
        if p.dim() == 2 and ".h." in name:
            for key in ("exp_avg", "exp_avg_sq"):
                state["state"][number][key] = state["state"][number][key].t().contiguous()
    if buffers:
        weights |= {
            f"{prefix}transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril()
            for i in range(2)
        }
    return {
        "model": weights,
        "optimizer": state,
        "model_args": SHAPE | dict(bias=True, vocab_size=reference.config.vocab_size, dropout=0.0),
        "iter_num": 5,
        "best_val_loss": torch.tensor(2.5),
        "config": {
            "dataset": dataset,
            "init_from": "scratch",
            "learning_rate": 1e-3,
            "out_dir": "out/tiny",
            "compile": True,
        },
    }


@pytest.fixture
def gpt2(monkeypatch) -> BPETokenizer:
    """A tokenizer with as many tokens as GPT-2's, which needs no download, in its place."""
    tokens = [bytes([i]) for i in range(256)]
    tokens += [
        bytes([97 + i % 26, 97 + i // 26 % 26, 97 + i // 676 % 26, 48 + i // 17576])
        for i in range(50000)
    ]
    ranks = {token: i for i, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _name: encoding)
    return BPETokenizer.gpt2()


@pytest.mark.parametrize(
    ("prefix", "buffers"),
    [("", False), ("_orig_mod.", False), ("", True)],
    ids=["plain", "compiled", "masks"],
)
def test_a_checkpoint_gives_the_same_logits(dataset, prefix, buffers):
    reference = make_reference(18)
    Path("out").mkdir()
    torch.save(theirs(reference, prefix, buffers=buffers), "out/ckpt.pt")
    model, checkpoint = load_checkpoint(Path("out/ckpt.pt"))
    idx = torch.randint(18, (2, 16))
    torch.testing.assert_close(model(idx)[0], reference(idx).logits, rtol=1e-4, atol=1e-5)
    assert checkpoint["step"] == 5 and checkpoint["best_val_loss"] == 2.5


def test_a_checkpoint_can_be_sampled_from(dataset, capsys):
    Path("out").mkdir()
    torch.save(theirs(make_reference(18)), "out/ckpt.pt")
    sample.main(sample.SampleConfig(out_dir="out", start="7", max_new_tokens=5, device="cpu"))
    assert len(capsys.readouterr().out) == 1 + 5 + 1


def test_training_continues_with_the_weights_and_moments(tiny_run):
    """The next step is the one that torch's AdamW takes with nanoGPT's order of parameters."""
    reference = make_reference(18)
    out_dir = Path("out/tiny")
    out_dir.mkdir(parents=True)
    saved = theirs(reference)
    torch.save(saved, out_dir / "ckpt.pt")
    options = tiny_run.options | dict(
        init_from="resume", max_iters=6, learning_rate=1e-3, decay_lr=False
    )
    config = train.TrainConfig(
        **options | dict(warmup_iters=0, grad_clip=0.0, dtype="float32", device="cpu")
    )
    with Processes(config.device, config.backend) as processes:
        trainer = train.Trainer(config, processes)
        assert trainer.start_step == 5
        micros = [trainer.micro_batch(5, micro) for micro in range(2)]
        trainer.train_step(5, lr=1e-3)

    model, _ = load_checkpoint(out_dir / "ckpt.pt")
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    optimizer.load_state_dict(saved["optimizer"])
    for x, y in micros:
        (model(x, y)[1] / 2).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), p, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_takes_its_shape_from_the_checkpoint(tiny_run):
    Path("out/tiny").mkdir(parents=True)
    torch.save(theirs(make_reference(18)), "out/tiny/ckpt.pt")
    model, checkpoint = load_checkpoint(tiny_run(init_from="resume", max_iters=6) / "ckpt.pt")
    assert model.config.gelu == "exact" and checkpoint["step"] == 6


def test_a_padded_bpe_checkpoint_resumes_on_nanogpts_own_data(tiny_run, gpt2):
    ids = np.array(gpt2.encode("abab<|endoftext|>xyz " * 100), dtype=np.uint16)
    Path("data/openwebtext").mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        ids.tofile(f"data/openwebtext/{name}")
    Path("out/tiny").mkdir(parents=True)
    torch.save(theirs(make_reference(50304), dataset="openwebtext"), "out/tiny/ckpt.pt")
    out_dir = tiny_run(init_from="resume", dataset="openwebtext", max_iters=6, eval_iters=1)
    model, checkpoint = load_checkpoint(out_dir / "ckpt.pt")
    assert (model.config.vocab_size, model.config.pad_vocab_to) == (50257, 50304)
    assert checkpoint["step"] == 6


def test_an_option_that_contradicts_a_checkpoint_is_named(tiny_run):
    Path("out/tiny").mkdir(parents=True)
    torch.save(theirs(make_reference(18)), "out/tiny/ckpt.pt")
    with pytest.raises(UserError, match="made with n_layer=2 and this run has n_layer=3"):
        tiny_run(init_from="resume", n_layer=3)


@pytest.mark.parametrize("name", ["n_layer", "n_embd", "block_size"])
def test_a_checkpoint_with_a_huge_shape_takes_no_memory(dataset, name):
    checkpoint = theirs(make_reference(18))
    checkpoint["model_args"][name] = 10**30 if name == "n_layer" else 20000
    torch.save(checkpoint, "ckpt.pt")
    before = peak_memory(torch.device("cpu"))
    with pytest.raises(UserError, match=r"^ckpt\.pt: ") as error:
        load_checkpoint(Path("ckpt.pt"))
    assert "\n" not in str(error.value)
    assert peak_memory(torch.device("cpu")) - before < 200e6


def test_a_vocabulary_of_50304_is_gpt2s_and_padding(tmp_path, monkeypatch, gpt2):
    monkeypatch.chdir(tmp_path)
    torch.save(theirs(make_reference(50304), dataset="openwebtext"), "ckpt.pt")
    model, checkpoint = load_checkpoint(Path("ckpt.pt"))
    assert model.config.vocab_size == 50257 and model.config.pad_vocab_to == 50304
    assert model(torch.tensor([[1, 2]]))[0].size(2) == 50257
    assert checkpoint["tokenizer"] == gpt2.to_dict()


def test_a_checkpoint_without_its_data_set_names_the_data_set_to_prepare(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(theirs(make_reference(18)), "ckpt.pt")
    with pytest.raises(
        UserError, match=r"meta\.json: has no tokenizer of 18 tokens; prepare data/tiny"
    ):
        load_checkpoint(Path("ckpt.pt"))


def test_token_files_without_meta_json_are_read_as_gpt2s_ids(tmp_path, gpt2):
    text = "abab<|endoftext|>xyz \U0001f600" * 20
    ids = gpt2.encode(text)
    for name in ("train.bin", "val.bin"):
        np.array(ids, dtype=np.uint16).tofile(tmp_path / name)
    opened = data.Dataset(tmp_path, block_size=8)
    assert opened.tokenizer.tokens == gpt2.tokens and opened.meta["vocab_size"] == 50257
    assert opened.meta["val_bytes"] == len(text.replace("<|endoftext|>", "").encode())
    assert opened.val.open().tolist() == ids
    assert not (tmp_path / "meta.json").exists()


def test_ids_that_are_not_gpt2s_need_a_meta_json(tmp_path):
    for name in ("train.bin", "val.bin"):
        np.arange(99, dtype=np.uint16).tofile(tmp_path / name)
    with pytest.raises(UserError, match=r"has no meta\.json, and its ids are not GPT-2's"):
        data.Dataset(tmp_path, block_size=2)


def test_half_a_token_id_ends_in_one_line(tmp_path):
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(bytes(99))
    with pytest.raises(UserError, match=r"has no meta\.json"):
        data.Dataset(tmp_path, block_size=2)


def test_a_meta_pkl_is_not_read(tmp_path):
    for name in ("train.bin", "val.bin", "meta.pkl"):
        (tmp_path / name).write_bytes(b"\x80\x04 some pickle")
    with pytest.raises(UserError, match=r"meta\.pkl: pickles are unsafe; run python") as error:
        data.Dataset(tmp_path, block_size=2)
    assert f"--dataset={tmp_path.name}" in str(error.value)


def test_an_interrupted_preparation_is_not_taken_for_nanogpts_data(dataset):
    (dataset / "meta.json").rename(dataset / "progress.json")
    with pytest.raises(UserError, match=r"meta\.json: no such file; run a prepare script"):
        data.Dataset(dataset, block_size=2)


def test_a_config_file_for_nanogpt_is_accepted_unchanged(tmp_path):
    """It has every name that nanoGPT's own config files use, imports and expressions."""
    (tmp_path / "theirs.py").write_text(
        """# comment
import time

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
eval_only = True
log_interval = 1
always_save_checkpoint = False
wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())
dataset = "shakespeare"
init_from = "scratch"
batch_size = 1
block_size = 256
gradient_accumulation_steps = 5 * 8
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 600000
lr_decay_iters = 600000
min_lr = 1e-4
beta2 = 0.99
weight_decay = 1e-1
warmup_iters = 100
decay_lr = False
device = "cpu"
compile = False
""",
        encoding="utf-8",
    )
    config = read_options(train.TrainConfig, [str(tmp_path / "theirs.py")])
    assert config.gradient_accumulation_steps == 40 and config.wandb_run_name.startswith("ft-")
    assert math.isclose(config.min_lr, 1e-4) and config.compile is False


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "config").glob("*.py"))])
def test_our_own_config_files_are_accepted(name):
    read_options(train.TrainConfig, [str(ROOT / "config" / name)])


MODEL = """
from dataclasses import dataclass
import torch.nn as nn

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.wte = config, nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
"""


@pytest.mark.parametrize("tied", [True, False])
def test_a_copy_of_nanogpt_builds_a_model_of_the_same_shape(tmp_path, tied):
    (tmp_path / "model.py").write_text(MODEL, encoding="utf-8")
    config = GPTConfig(vocab_size=18, **SHAPE, bias=False, tie_weights=tied)
    model = build_original(tmp_path, config)
    assert all(getattr(config, name) == value for name, value in vars(model.config).items())
    assert (model.lm_head.weight is model.wte.weight) == tied


def test_a_folder_without_nanogpt_is_named(tmp_path):
    with pytest.raises(UserError, match=r"model\.py: no such file; nanogpt is the folder"):
        build_original(tmp_path, GPTConfig())
