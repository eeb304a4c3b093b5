"""What nanoGPT's users have works as it is: config files, token files, checkpoints."""

import math
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from conftest import ROOT
from transformers import GPT2Config, GPT2LMHeadModel

import sample
import train
from configurator import UserError, read_options
from support import data
from support.checkpoint import load_checkpoint
from support.tokenizer import SPLIT_PATTERN, BPETokenizer

SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=16)


def make_reference(vocab_size: int) -> GPT2LMHeadModel:
    """nanoGPT's model as transformers has it: GPT-2 with an exact GELU."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=vocab_size, activation_function="gelu",
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2, use_cache=False,
        )
    )  # fmt: skip


def theirs(
    reference: GPT2LMHeadModel, prefix: str = "", dataset: str = "tiny", buffers: bool = False
) -> dict:
    """A checkpoint as nanoGPT's train.py saves it, 5 steps of AdamW after `reference`, which takes these steps too."""
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
        conv = p.dim() == 2 and ".h." in name  # transformers keeps these the other way round
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
    """A vocabulary of as many tokens as GPT-2's, in its place."""
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
def test_a_checkpoint_gives_its_logits(dataset, prefix, buffers):
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


def test_training_goes_on_with_its_weights_and_moments(tiny_run, monkeypatch):
    """The next step is the one that torch's AdamW takes, in nanoGPT's own order of parameters."""
    reference = make_reference(18)
    out_dir = Path("out/tiny")
    out_dir.mkdir(parents=True)
    saved = theirs(reference)
    torch.save(saved, out_dir / "ckpt.pt")
    options = tiny_run.options | dict(
        init_from="resume", gelu="exact", max_iters=6, learning_rate=1e-3, decay_lr=False
    )
    config = train.TrainConfig(
        **options | dict(warmup_iters=0, grad_clip=0.0, dtype="float32", device="cpu")
    )
    trainer = train.Trainer(config, train.Processes(config))
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


def test_options_that_contradict_a_checkpoint_are_named(tiny_run):
    Path("out/tiny").mkdir(parents=True)
    torch.save(theirs(make_reference(18)), "out/tiny/ckpt.pt")
    with pytest.raises(UserError, match="made with gelu=exact and this run has gelu=tanh"):
        tiny_run(init_from="resume")


def test_a_padded_gpt2_vocabulary_is_known_as_such(tmp_path, monkeypatch, gpt2):
    monkeypatch.chdir(tmp_path)
    torch.save(theirs(make_reference(50304), dataset="openwebtext"), "ckpt.pt")
    model, checkpoint = load_checkpoint(Path("ckpt.pt"))
    assert model.config.vocab_size == 50257 and model.config.padded_vocab_size == 50304
    assert model(torch.tensor([[1, 2]]))[0].size(2) == 50257
    assert checkpoint["tokenizer"] == gpt2.to_dict()


def test_a_checkpoint_whose_tokenizer_is_not_there_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(theirs(make_reference(18)), "ckpt.pt")
    with pytest.raises(UserError, match=r"data/tiny/meta.json has not one of 18 tokens; prepare"):
        load_checkpoint(Path("ckpt.pt"))


def test_token_files_without_meta_json_have_gpt2s_ids(tmp_path, gpt2):
    text = "abab<|endoftext|>xyz \U0001f600" * 20
    ids = gpt2.encode(text)
    for name in ("train.bin", "val.bin"):
        np.array(ids, dtype=np.uint16).tofile(tmp_path / name)
    opened = data.Dataset(tmp_path, block_size=8)
    assert opened.tokenizer.tokens == gpt2.tokens and opened.meta["vocab_size"] == 50257
    assert opened.meta["val_bytes"] == len(text.replace("<|endoftext|>", "").encode())
    assert opened.val.open().tolist() == ids
    assert not (tmp_path / "meta.json").exists()


def test_a_meta_pkl_is_not_read(tmp_path):
    for name in ("train.bin", "val.bin", "meta.pkl"):
        (tmp_path / name).write_bytes(b"\x80\x04 some pickle")
    with pytest.raises(UserError, match="pickle, which may run any code") as error:
        data.Dataset(tmp_path, block_size=2)
    assert f"--dataset={tmp_path.name}" in str(error.value)


def test_a_config_file_of_its_kind_runs_unchanged(tmp_path):
    """All the names that nanoGPT's own config files assign to, as they do: imports and expressions too."""
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
def test_our_own_config_files_are_sound(name):
    read_options(train.TrainConfig, [str(ROOT / "config" / name)])
