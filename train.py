"""Train a GPT, on one processor, one GPU, or many.

    python train.py config/phase1_char.py
    python train.py config/phase1_char.py --n_layer=4 --out_dir=out/deeper
    python train.py config/phase1_char.py --init_from=resume
    python train.py config/finetune_shakespeare.py --init_from=gpt2-medium
    torchrun --standalone --nproc_per_node=2 train.py config/phase1_char.py --batch_size=16 \\
        --gradient_accumulation_steps=2

Reads data/<dataset>/ and writes to out_dir:

    ckpt.pt      the state at the last evaluation, to go on from or to sample from
    best.pt      the weights with the lowest validation loss
    log.jsonl    a JSON object per logged step and per evaluation
    samples.md   what the model said along the way      } made from log.jsonl,
    loss.png     training and validation loss           } by report.py

A run that begins from a pretrained GPT-2 (init_from) has its shape, whatever n_layer, n_head, n_embd,
bias, tie_weights, gelu and pad_vocab_to say; of its context it may use a part (block_size), and dropout is
the run's own. It needs a data set made with the same tokenizer, and is resumed as any other.
"""

import math
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from configurator import UserError, configure, run


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT."""

    # input and output
    dataset: str = "openweb"  # the folder under data/ that a prepare script wrote
    out_dir: str = "out"  # where the run goes
    init_from: str = "scratch"  # resume: from out_dir/ckpt.pt; auto: if it is there; gpt2, owner/name, folder: finetune
    eval_interval: int = 2000  # steps between evaluations
    eval_iters: int = 0  # batches per evaluation; 0: every token of val.bin once
    eval_only: bool = False  # evaluate, print, and stop
    preflight: bool = False  # check data, model and machine, print what the run will cost, and stop
    target_val_loss: float = 0.0  # stop when the validation loss is this low
    always_save_checkpoint: bool = (
        True  # False: ckpt.pt is saved only when the validation loss has improved
    )
    checkpoint_interval: float = (
        300.0  # seconds between further saves (longer if they cost over 1%); 0: none
    )
    log_interval: int = (
        10  # steps between lines of the log; a GPU is asked no oftener whether the loss is finite
    )
    sample_interval: int = (
        0  # evaluations at multiples of it, and the first after step 0, have a sample; 0: none
    )
    sample_start: str = "\n"  # their prompt
    sample_tokens: int = 300  # their length
    tensorboard_log: bool = False  # log to event files in out_dir too, for TensorBoard
    wandb_log: bool = False  # log to Weights & Biases too
    wandb_project: str = "gpt2-from-scratch"  # project there
    wandb_run_name: str = "gpt2"  # run there
    # batch
    batch_size: int = 12  # sequences in one forward pass
    block_size: int = 1024  # tokens in a sequence
    gradient_accumulation_steps: int = 40  # forward passes in a step, over all processes
    # model
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels
    dropout: float = 0.0  # probability of zeroing an activation; 0.1 or more helps when finetuning
    bias: bool = True  # biases in linear layers and LayerNorms
    tie_weights: bool = True  # the head is the token embedding
    gelu: Literal["tanh", "exact"] = "tanh"  # GPT-2's form; exact: nanoGPT's
    pad_vocab_to: int = 0  # rows of both, 0: one per token; a GPU likes multiples of 64, and those added stand for none
    # optimizer
    optimizer: Literal["adamw", "muon"] = (
        "adamw"  # muon: for the matrices of the blocks, adamw for the rest
    )
    learning_rate: float = 6e-4  # peak of the learning rate, of adamw
    muon_lr: float = 0.02  # the same, of muon
    max_iters: int = 600000  # steps
    weight_decay: float = 0.1  # of matrices; biases and LayerNorms have none
    beta1: float = 0.9  # adamw's memory of gradients
    beta2: float = 0.95  # and of their squares
    grad_clip: float = 1.0  # longest gradient; 0: any
    # learning rate
    decay_lr: bool = True  # False: constant after the warm-up
    lr_schedule: Literal["cosine", "linear"] = "cosine"  # shape of the decay
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int = 0  # step at which the decay ends; 0: max_iters
    min_lr: float = 6e-5  # where it ends, as a rate of adamw; muon's falls in proportion
    # system
    seed: int = 1337  # of the weights, the batches, dropout and samples
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products
    compile: bool | Literal["auto"] = "auto"  # torch.compile the model
    backend: Literal["auto", "nccl", "gloo"] = (
        "auto"  # of torch.distributed: nccl on CUDA, gloo elsewhere
    )

    def __post_init__(self) -> None:
        counts = (
            "eval_interval",
            "log_interval",
            "sample_tokens",
            "batch_size",
            "block_size",
            "n_layer",
            "n_head",
        )
        for name in (*counts, "n_embd", "gradient_accumulation_steps"):
            if not 1 <= getattr(self, name) <= 1 << 31:
                raise UserError(
                    f"{name} is {getattr(self, name)} but must be at least 1 and at most 2 ** 31"
                )
        amounts = (
            "eval_iters",
            "target_val_loss",
            "sample_interval",
            "checkpoint_interval",
            "max_iters",
            "muon_lr",
        )
        amounts += (
            "weight_decay",
            "grad_clip",
            "warmup_iters",
            "lr_decay_iters",
            "min_lr",
            "seed",
            "pad_vocab_to",
        )
        for name in amounts:
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)} but must be at least 0")
            if getattr(self, name) > 1 << 31:
                raise UserError(f"{name} is {getattr(self, name)} but must be at most 2 ** 31")
        for name in ("dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"{name} is {getattr(self, name)} but must be at least 0 and below 1"
                )
        if not self.init_from:
            raise UserError(
                "init_from is empty; scratch, resume, auto, or a pretrained GPT-2 is where a run begins"
            )
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate is {self.learning_rate} but must be above 0")
        if self.decay_lr and self.min_lr > self.learning_rate:
            raise UserError(
                f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}; lower it, or decay_lr=False"
            )
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} can not be split among n_head={self.n_head}; choose a multiple"
            )
        if self.sample_interval % self.eval_interval:
            raise UserError(
                f"sample_interval={self.sample_interval}: samples go with evaluations; "
                f"choose a multiple of eval_interval={self.eval_interval}"
            )
        if self.sample_interval and not self.sample_start:
            raise UserError(
                "sample_start is empty, and a model can only go on from something; try --sample_start=A"
            )


if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    config = configure(TrainConfig)

import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig
from support import diagnosis, pictures, preflight, runtime
from support import log as report
from support.checkpoint import load_checkpoint, save_checkpoint
from support.data import Dataset, Tokens, gather, random_offsets, spread_offsets, whole_file_offsets
from support.hub import load_pretrained
from support.optimizers import Muon
from support.tokenizer import Tokenizer

OWN = ("scratch", "resume", "auto")  # any other init_from is the name of a pretrained GPT-2
SHAPE = tuple(
    field.name for field in fields(GPTConfig) if field.name != "vocab_size"
)  # options of the same names


class Processes:
    """This process among those that torchrun started; alone when it did not."""

    def __init__(self, config: TrainConfig) -> None:
        self.distributed = "RANK" in os.environ
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.is_first = self.rank == 0  # the one that writes and prints
        self.device = runtime.resolve_device(config.device)
        if config.gradient_accumulation_steps % self.count:
            raise UserError(
                f"gradient_accumulation_steps={config.gradient_accumulation_steps} can not be divided among "
                f"{self.count} processes; set it to a multiple of {self.count}"
            )
        if not self.distributed:
            return
        if self.device.type == "cuda":
            self.device = runtime.resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(self.device)
        elif self.device.type == "mps":  # which no backend serves
            self.device = torch.device("cpu")
        backend = config.backend
        if backend == "auto":
            backend = "nccl" if self.device.type == "cuda" and dist.is_nccl_available() else "gloo"
        if backend == "nccl" and (self.device.type != "cuda" or not dist.is_nccl_available()):
            raise UserError(f"backend=nccl can not be used on {self.device} here; take gloo")
        meeting = {}
        if (
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            and os.environ.get("GROUP_WORLD_SIZE") == "1"
        ):
            # Restarted workers find the store of the attempt before, and in it the addresses of dead processes, for
            # which gloo waits half an hour: a prefix keeps attempts apart. (With several machines their counts differ.)
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
            )
            store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            meeting = {"store": store, "rank": self.rank, "world_size": self.count}
        dist.init_process_group(backend, **meeting)

    def mean(self, values: Tensor) -> Tensor:
        """Figures on the device, averaged over all processes, without waiting for them."""
        if self.distributed:
            dist.all_reduce(values)
        return values / self.count

    def sum(self, value: float) -> float:
        """`value` summed over all processes."""
        if not self.distributed:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def gather(self, value: str) -> list[str]:
        """The `value` of every process."""
        values = [value] * self.count
        if self.distributed:
            dist.all_gather_object(values, value)
        return values

    def in_turn(self, function: Callable):
        """What `function` returns; the first process of each machine calls it before the others do."""
        early = int(os.environ.get("LOCAL_RANK", 0)) == 0
        result = function() if early else None
        self.gather("done")
        return result if early else function()

    def wait(self) -> None:
        """Until all processes are here.

        At its end a process waits for the others: DistributedDataParallel keeps gloo's threads alive, and one that
        still held a tensor when Python ends would abort it (https://github.com/pytorch/pytorch/pull/179291).
        """
        if self.distributed:
            dist.barrier()

    def leave(self) -> None:
        if self.distributed:
            dist.destroy_process_group()


def learning_rate(step: int, config: TrainConfig) -> float:
    """AdamW's rate at step `step`: linear warm-up, then the decay. Muon's goes in proportion."""
    peak, end = config.learning_rate, config.lr_decay_iters or config.max_iters
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return peak
    progress = min(1.0, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
    left = (
        1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    )
    return config.min_lr + left * (peak - config.min_lr)


def make_optimizers(
    model: GPT, config: TrainConfig, device: torch.device
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest."""
    groups = model.param_groups()
    matrices, optimizers = groups["hidden"] + groups["embedding"], []
    if config.optimizer == "muon":
        matrices = groups["embedding"]
        dtype = runtime.resolve_dtype("auto", device)
        optimizers.append(
            Muon(groups["hidden"], lr=config.muon_lr, weight_decay=config.weight_decay, dtype=dtype)
        )
    adamw_groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": groups["vector"], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers.append(
        torch.optim.AdamW(adamw_groups, lr=config.learning_rate, betas=betas, fused=True)
    )
    every = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(every) == len(set(every)) and set(every) == set(model.parameters())
    for o in optimizers:
        for group in o.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def in_shape_of(model: GPT, config: TrainConfig) -> TrainConfig:
    """`config` with the shape of `model`, of whose context it may use a part."""
    shape = {
        name: getattr(model.config, name) for name in SHAPE if name not in ("block_size", "dropout")
    }
    return replace(config, block_size=min(config.block_size, model.config.block_size), **shape)


class Trainer:
    """The state of a run (model, optimizers, step) and what is done with it."""

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        self.processes, self.device = processes, processes.device
        self.dtype = runtime.resolve_dtype(config.dtype, self.device)
        self.out_dir = Path(config.out_dir)
        path, model, origin = self.out_dir / "ckpt.pt", None, config.init_from
        self.resumed = origin == "resume" or (origin == "auto" and path.exists())
        if self.resumed:
            model, checkpoint = load_checkpoint(path)
            origin = checkpoint["train_config"]["init_from"]
        elif origin not in OWN:
            model, tok = processes.in_turn(lambda: load_pretrained(config.init_from))
        if (
            origin not in OWN
        ):  # the next checkpoint says it too, so that it can be resumed in its turn
            config = in_shape_of(model, replace(config, init_from=origin))
        self.config = config
        self.data = Dataset(Path("data") / config.dataset, config.block_size)
        self.tokenizer = self.data.tokenizer
        self.prompt = self.tokenizer.encode(config.sample_start) if config.sample_interval else []
        self.tokens_per_step = (
            config.gradient_accumulation_steps * config.batch_size * config.block_size
        )
        self.steps_per_epoch = len(self.data.train) / self.tokens_per_step
        share = config.gradient_accumulation_steps // processes.count
        self.micros = range(
            processes.rank * share, (processes.rank + 1) * share
        )  # this process's forward passes
        # What an evaluation reads is fixed: all of val.bin (or eval_iters batches spread over it),
        # and just as much of train.bin.
        windows = whole_file_offsets(len(self.data.val), config.block_size)
        if 0 < config.eval_iters * config.batch_size < len(windows):
            windows = windows[
                np.linspace(0, len(windows) - 1, config.eval_iters * config.batch_size).astype(int)
            ]
        self.val_windows = windows
        self.train_windows = spread_offsets(len(windows), len(self.data.train), config.block_size)

        torch.manual_seed(config.seed)
        shape = {name: getattr(config, name) for name in SHAPE}
        if 0 < config.pad_vocab_to < self.tokenizer.vocab_size:
            raise UserError(
                f"pad_vocab_to={config.pad_vocab_to} is below the {self.tokenizer.vocab_size} tokens of "
                f"data/{config.dataset}; raise it, or 0 for just as many"
            )
        self.model = GPT(GPTConfig(vocab_size=self.tokenizer.vocab_size, **shape)).to(self.device)
        self.optimizers = make_optimizers(self.model, config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.start_step, self.evaluated_step, self.best_val_loss = 0, -1, math.inf
        self.failed_step = torch.tensor(
            -1, device=self.device
        )  # the first whose loss or gradient was not finite
        # Step, learning rate, loss and length of the gradient of the last steps, to tell if one goes wrong.
        self.recent: deque[tuple] = deque(maxlen=config.log_interval + 5)
        if self.resumed:
            self.load_state(path, model, checkpoint)
        elif model:
            self.load_weights(model, tok)
        steps = set(processes.gather(f"step {self.start_step}"))
        if len(steps) > 1:
            raise UserError(
                f"the processes begin at different steps, {', '.join(steps)}: out_dir must be one for all"
            )
        self.saved_at, self.save_seconds = time.perf_counter(), 0.0
        self.step_model: nn.Module = self.model  # as the training step calls it: see prepare()

    def describe(self) -> str:
        """The run in three lines."""
        c, epochs = self.config, self.config.max_iters / self.steps_per_epoch
        return (
            f"{self.model.num_params():,} parameters: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, "
            f"context {c.block_size}, vocabulary {self.tokenizer.vocab_size:,}\n"
            f"{self.tokens_per_step:,} tokens per step, {self.steps_per_epoch:,.1f} steps per epoch, "
            f"{c.max_iters:,} steps = {epochs:.1f} epochs of data/{c.dataset}\n"
            f"{self.device} x {self.processes.count}, {runtime.dtype_name(self.dtype)}, {c.optimizer}"
        )

    def prepare(self) -> str:
        """Compile the model and wrap it for many processes. Returns a line about the former."""
        started = time.perf_counter()
        # By the length of the whole run: one that is resumed near its end must compute what it computed before.
        reason = runtime.why_not_compile(self.config.compile, self.device, self.config.max_iters)
        if not reason:
            self.step_model, reason = runtime.compile_model(self.model, self.try_out)
            failures = self.processes.sum(bool(reason))
            if failures:  # in one process: then all do without
                self.step_model, reason = (
                    self.model,
                    reason or f"failed in {failures:.0f} of the processes",
                )
        if self.processes.distributed:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.step_model = DistributedDataParallel(self.step_model, device_ids=ids)
        return (
            f"not compiled: {reason}"
            if reason
            else f"compiled in {time.perf_counter() - started:.0f} s"
        )

    def try_out(self, model: nn.Module) -> None:
        """Compilation happens when a model is first called, forwards and backwards."""
        x, y = self.micro_batch(step=0, micro=0)
        try:
            with runtime.autocast(self.device, self.dtype):
                loss = model(x, y)[1]
            loss.backward()
        finally:
            self.model.zero_grad(set_to_none=True)

    def micro_batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (B, T) each, of the step's forward pass number `micro`."""
        c = self.config
        n_sequences = c.gradient_accumulation_steps * c.batch_size
        offsets = random_offsets(c.seed, step, n_sequences, len(self.data.train), c.block_size)
        return self.batch(
            self.data.train, offsets[micro * c.batch_size : (micro + 1) * c.batch_size]
        )

    def batch(self, tokens: Tokens, offsets: np.ndarray) -> tuple[Tensor, Tensor]:
        """The windows at `offsets` as inputs and targets, (B, T) each, on the device."""
        x, y = map(torch.from_numpy, gather(tokens, offsets, self.config.block_size))
        if self.device.type == "cuda":  # from pinned memory the copy runs beside the computation
            return x.pin_memory().to(self.device, non_blocking=True), y.pin_memory().to(
                self.device, non_blocking=True
            )
        return x.to(self.device), y.to(self.device)

    def train_step(self, step: int, lr: float, stop: int = 0) -> Tensor:
        """One update of the weights. Returns, on the device: the loss before it, the length of the gradient, and
        whether any process has a `stop`, (3,).

        Nothing here waits for a GPU, which still works on one step while the next is prepared. So it is the GPU that
        notices a loss or gradient that is not finite, and leaves the weights as they are from that step on; `read`
        finds out. (Only float16 waits: its scaler does.)
        """
        c, processes = self.config, self.processes
        for group in (group for o in self.optimizers for group in o.param_groups):
            group["lr"] = group["initial_lr"] * lr / c.learning_rate
        mean_loss = torch.zeros((), device=self.device)
        for micro in self.micros:
            self.seed_dropout(step, micro)
            x, y = self.micro_batch(step, micro)
            if (
                processes.distributed
            ):  # gradients are exchanged once a step, in its last backward pass
                self.step_model.require_backward_grad_sync = micro == self.micros[-1]
            with runtime.autocast(self.device, self.dtype):
                loss = self.step_model(x, y)[1] / len(self.micros)
            self.scaler.scale(loss).backward()
            mean_loss += loss.detach()
        loss, stop = processes.mean(torch.stack((mean_loss, torch.full_like(mean_loss, stop))))
        for o in self.optimizers:
            self.scaler.unscale_(o)
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        if c.grad_clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), c.grad_clip, grad_norm)
        finite = loss.isfinite()
        if not self.scaler.is_enabled() or self.scaler.get_scale() < 1:
            finite &= grad_norm.isfinite()
        # else float16's scaler may have tried a scale that is too large: it lowers it, and leaves this one step out
        self.failed_step = torch.where((self.failed_step < 0) & ~finite, step, self.failed_step)
        for o in self.optimizers:
            o.found_inf = (
                self.failed_step >= 0
            ).float()  # 1: a fused optimizer of torch, or Muon, changes nothing
            self.scaler.step(o)
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        self.recent.append((step, lr, loss, grad_norm))
        return torch.stack((loss, grad_norm, stop))

    def read(self, figures: Tensor) -> tuple[float, float, bool]:
        """What train_step returned, as numbers. Raises UserError where a loss or gradient has not been finite."""
        loss, grad_norm, stop = figures.tolist()
        if self.failed_step >= 0:
            raise self.not_finite(int(self.failed_step))
        return loss, grad_norm, stop > 0

    def seed_dropout(self, step: int, micro: int) -> None:
        """What is dropped is, like the batch itself, a function of the seed, the step and its part."""
        if self.config.dropout > 0:
            torch.manual_seed(
                int(np.random.SeedSequence((self.config.seed, step, micro)).generate_state(1)[0])
            )

    def not_finite(self, step: int) -> Exception:
        """The error that ends a run whose loss or gradient was not finite in step `step`, with its cause."""
        lr, loss, grad_norm = next(figures for at, *figures in self.recent if at == step)
        reason = ""
        self.model.zero_grad(set_to_none=True)
        for micro in self.micros:
            batches = (
                self.micro_batch(step, micro),
                self.micro_batch(step - 1 if step else 1, micro),
            )
            autocast = runtime.autocast(self.device, self.dtype)
            reason = reason or diagnosis.explain(
                self.model,
                *batches,
                autocast,
                self.dtype,
                lambda micro=micro: self.seed_dropout(step, micro),
            )
        reasons = [reason for reason in self.processes.gather(reason) if reason]
        if not self.processes.is_first:
            return SystemExit(1)
        before = (
            ", ".join(
                f"{norm:.3g}" for at, _, _, norm in list(self.recent) if step - 5 <= at < step
            )
            or "none"
        )
        return UserError(
            f"step {step}: the loss is {loss:.4g}, the norm of the gradient {grad_norm:.4g}, at learning rate {lr:.3g} "
            f"and after norms of {before}; {(reasons or ['a repetition is finite: --compile=False may help'])[0]}; "
            f"the step was not taken, and {self.out_dir / 'ckpt.pt'} is as it was"
        )

    @torch.no_grad()
    def evaluate(self, tokens: Tokens, windows: np.ndarray) -> float:
        """Mean loss of the windows, in nats per token; the processes share the work.

        Uncompiled: another compilation, for another kind of call, would cost more than it saves.
        """
        self.model.eval()
        total, count = 0.0, 0
        mine = windows[self.processes.rank :: self.processes.count]
        for i in range(0, len(mine), self.config.batch_size):
            x, y = self.batch(tokens, mine[i : i + self.config.batch_size])
            n_targets = int((y >= 0).sum())
            with runtime.autocast(self.device, self.dtype):
                total += self.model(x, y)[1].item() * n_targets
            count += n_targets
        self.model.train()
        return self.processes.sum(total) / self.processes.sum(count)

    def losses(self) -> tuple[float, float]:
        """Training and validation loss."""
        return self.evaluate(self.data.train, self.train_windows), self.evaluate(
            self.data.val, self.val_windows
        )

    def bits_per_byte(self, val_loss: float) -> float:
        """The validation loss in bits for each byte of the text: it compares models whatever their tokens."""
        meta = self.data.meta
        return val_loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]

    def sample(self) -> str:
        """What the model says when it has been given `sample_start`."""
        c = self.config
        prompt = torch.tensor([self.prompt], device=self.device)  # (1, T)
        generator = torch.Generator(self.device).manual_seed(c.seed)
        with runtime.autocast(self.device, self.dtype):
            ids = list(
                self.model.generate(prompt, c.sample_tokens, temperature=0.8, generator=generator)
            )
        return c.sample_start + self.tokenizer.decode(torch.cat(ids, dim=1)[0].tolist())

    def save_state(self, step: int) -> None:
        """ckpt.pt: everything that a resumed run needs."""
        started = time.perf_counter()
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise UserError(
                f"the weights after step {step} are not finite any more; {self.out_dir / 'ckpt.pt'} is as it was: "
                f"lower learning_rate or raise warmup_iters, and go on with --init_from=resume"
            )
        self.save_weights(
            "ckpt.pt",
            step,
            evaluated_step=self.evaluated_step,
            optimizers=[o.state_dict() for o in self.optimizers],
            scaler=self.scaler.state_dict(),
        )
        self.saved_at = time.perf_counter()
        self.save_seconds = self.saved_at - started

    def save_is_due(self) -> bool:
        """Whether checkpoint_interval has passed, and so long that saving costs under 1% of the run."""
        c, interval = self.config, max(self.config.checkpoint_interval, 100 * self.save_seconds)
        wanted = c.checkpoint_interval > 0 and c.always_save_checkpoint
        return wanted and time.perf_counter() - self.saved_at > interval

    def save_weights(self, name: str, step: int, **state) -> None:
        """A checkpoint of the weights, enough for sampling and a third of the size, and of `state`."""
        save_checkpoint(
            self.out_dir / name,
            self.model,
            step=step,
            best_val_loss=self.best_val_loss,
            tokenizer=self.tokenizer.to_dict(),
            train_config=asdict(self.config),
            dataset=self.data.meta["sha256"],
            **state,
        )

    def load_weights(self, model: GPT, tok: Tokenizer) -> None:
        """Begin from a pretrained `model`, which `tok` belongs to."""
        if tok.to_dict() != self.tokenizer.to_dict():
            raise UserError(
                f"data/{self.config.dataset} was not made with the tokenizer of init_from={self.config.init_from}; "
                f"prepare a data set with it: for OpenAI's models, --tokenizer=gpt2 of a prepare script"
            )
        weights = model.state_dict()
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][
            : self.config.block_size
        ]
        self.model.load_state_dict(weights)

    def load_state(self, path: Path, model: GPT, checkpoint: dict) -> None:
        """Go on from the checkpoint read at `path`. Raises UserError where it contradicts the options or the data."""
        if "optimizers" not in checkpoint:
            raise UserError(
                f"{path} has weights alone, for sampling; a run goes on from a ckpt.pt with its optimizer"
            )
        here = (
            asdict(self.model.config)
            | {"optimizer": self.config.optimizer}
            | self.data.meta["sha256"]
        )
        there = (
            asdict(model.config)
            | {"optimizer": checkpoint["train_config"]["optimizer"]}
            | checkpoint["dataset"]
        )
        for name, value in here.items():
            if value != there.get(name, value):
                raise UserError(
                    f"{path} was made with {name}={there[name]} and this run has {name}={value}; "
                    f"set it back to go on, or choose another out_dir to start anew"
                )
        self.model.load_state_dict(model.state_dict())
        for o, saved in zip(self.optimizers, checkpoint["optimizers"], strict=True):
            # Rates and decays are this run's options, which may have changed, not those of the file.
            o.load_state_dict(
                {"state": saved["state"], "param_groups": o.state_dict()["param_groups"]}
            )
        if checkpoint["scaler"] and self.scaler.is_enabled():  # empty when dtype was not float16
            self.scaler.load_state_dict(checkpoint["scaler"])
        if checkpoint["step"] > self.config.max_iters:
            raise UserError(
                f"{path} is at step {checkpoint['step']}, beyond max_iters={self.config.max_iters}; raise max_iters"
            )
        self.start_step, self.evaluated_step = checkpoint["step"], checkpoint["evaluated_step"]
        self.best_val_loss = checkpoint["best_val_loss"]


class StopSignal:
    """`with StopSignal() as stop`: stop.number is the signal that told the process to stop, or 0.

    The step is finished and saved before it is obeyed; a second Ctrl-C is obeyed at once.
    """

    def __enter__(self) -> "StopSignal":
        self.number = 0
        numbers = [
            getattr(signal, name)
            for name in ("SIGINT", "SIGTERM", "SIGHUP")
            if hasattr(signal, name)
        ]
        self.before = {n: signal.getsignal(n) for n in numbers}
        for n, handler in self.before.items():
            if handler != signal.SIG_IGN:  # as nohup has it for SIGHUP
                signal.signal(n, self.receive)
        return self

    def __exit__(self, *_) -> None:
        for n, handler in self.before.items():
            signal.signal(n, handler)

    def receive(self, number: int, _frame) -> None:
        if self.number and number == signal.SIGINT:
            os._exit(128 + number)
        self.number = number


def main(config: TrainConfig) -> None:
    """Train, evaluate or check, as `config` says; under torchrun as one of several processes."""
    if config.preflight and config.init_from in OWN:
        config = replace(config, init_from="scratch")
    processes = Processes(config)
    if processes.device.type == "cpu":
        runtime.repeatable()
        runtime.keep_freed_memory()
    elif (
        processes.device.type == "cuda"
    ):  # TF32 where float32 is multiplied: on an A100 8 times as fast (data sheet)
        torch.set_float32_matmul_precision("high")
    try:
        trainer = Trainer(config, processes)
        if config.preflight:
            if not preflight.run_checks(trainer):
                raise UserError(
                    "preflight: a check has failed; the run would not do what it should"
                )
        elif config.eval_only:
            train_loss, val_loss = trainer.losses()
            if processes.is_first:
                print(
                    f"step {trainer.start_step:,}: training loss {train_loss:.4f}, validation loss {val_loss:.4f}, "
                    f"perplexity {math.exp(val_loss):,.2f}, {trainer.bits_per_byte(val_loss):.4f} bits per byte"
                )
        else:
            train(trainer)
            if processes.is_first:
                pictures.write_report(Path(config.out_dir))
                print(
                    f"{config.out_dir} has ckpt.pt, best.pt, log.jsonl, samples.md and loss.png; let it speak with"
                )
                print(f"    python sample.py --out_dir={config.out_dir}")
        processes.wait()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(
            error
        ):
            raise UserError(
                f"out of memory at batch_size={config.batch_size}; lower it, and raise gradient_accumulation_steps="
                f"{config.gradient_accumulation_steps} by the same factor to compute the same"
            ) from error
        raise
    finally:
        processes.leave()


def train(trainer: Trainer) -> None:
    """In a fixed order: evaluate and save if it is time, stop if that was the end, take a step, log it."""
    config, processes = trainer.config, trainer.processes
    with StopSignal() as stop, report.Log(trainer) as log:
        log.say(trainer.describe())
        log.say(trainer.prepare())
        log.start_clock()
        for step in range(trainer.start_step, config.max_iters + 1):
            last = step == config.max_iters or trainer.best_val_loss <= config.target_val_loss
            if (last or step % config.eval_interval == 0) and step != trainer.evaluated_step:
                last = evaluate_and_save(trainer, log, step, last)
            if last:
                break
            lr = learning_rate(step, config)
            figures = trainer.train_step(step, lr, stop.number)
            log.bar.update()
            if not look_is_due(trainer, step + 1, stop):
                continue
            loss, grad_norm, stopped = trainer.read(figures)
            stopped = stopped or (
                stop.number and not processes.distributed
            )  # several obey in the same step
            log.update(step + 1, loss, grad_norm, lr)
            if processes.is_first and (stopped or trainer.save_is_due()):
                trainer.save_state(step + 1)
            if stopped:
                log.say(
                    f"stopped after step {step + 1:,}, all of it saved; go on with --init_from=resume"
                )
                processes.wait()
                sys.exit(128 + (stop.number or signal.SIGTERM))


def look_is_due(trainer: Trainer, step: int, stop: StopSignal) -> bool:
    """Whether to read the figures of the last step. That is free on a CPU; on a GPU it means to wait for the step."""
    c, told = trainer.config, stop.number > 0 and not trainer.processes.distributed
    ends = step % c.log_interval == 0 or step % c.eval_interval == 0 or step == c.max_iters
    return trainer.device.type == "cpu" or ends or told


def evaluate_and_save(trainer: Trainer, log: report.Log, step: int, last: bool) -> bool:
    """Measure the losses, log them with a sample if one is due, save. Returns whether the run ends here."""
    c = trainer.config
    train_loss, val_loss = trainer.losses()
    if not math.isfinite(val_loss):
        raise UserError(
            f"the validation loss after step {step} is {val_loss}; {c.out_dir}/ckpt.pt is as it was before"
        )
    last = last or val_loss <= c.target_val_loss
    improved = val_loss < trainer.best_val_loss
    trainer.best_val_loss, trainer.evaluated_step = min(val_loss, trainer.best_val_loss), step
    if trainer.processes.is_first:
        due = (
            c.sample_interval
            and step
            and (last or step == c.eval_interval or step % c.sample_interval == 0)
        )
        log.evaluation(step, train_loss, val_loss, **({"sample": trainer.sample()} if due else {}))
        if improved:  # first, so that a kill between the two is followed by another evaluation
            trainer.save_weights("best.pt", step)
        if improved or c.always_save_checkpoint:
            trainer.save_state(step)
    return last


if __name__ == "__main__":
    run(main, config)
