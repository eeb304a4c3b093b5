"""Train a GPT on one processor, one GPU, or many.

    python train.py config/phase1_char.py
    python train.py config/phase1_char.py --n_layer=4 --out_dir=out/deeper
    python train.py config/phase1_char.py --init_from=resume
    torchrun --standalone --nproc_per_node=2 train.py config/phase3_gpt2.py

Reads data/<dataset>/ and writes to out_dir:

    ckpt.pt      the last saved state: resume the run from it, or sample from it
    best.pt      the weights with the lowest validation loss
    log.jsonl    a JSON object per logged step, evaluation and sample
    samples.md   texts that the model wrote along the way      } drawn from log.jsonl
    loss.png     training and validation loss                  } at the end
"""

import math
import signal
import sys
import time
from collections import deque
from configurator import UserError, check_range, configure, run
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from model import GPT
from support import diagnosis, pictures, preflight, runtime
from support.checkpoint import save_checkpoint
from support.data import Dataset, Tokens, gather, random_offsets
from support.log import Log, describe, lock_run, move_earlier_run
from support.optimizers import make_optimizers
from support.processes import Processes
from support.start import model_config, restore, starting_point


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT."""

    # input and output
    dataset: str = "openweb"  # folder under data/ that a prepare script wrote
    out_dir: str = "out"  # folder of the run
    init_from: str = "scratch"  # or resume, auto (resume if possible), gpt2, owner/name
    eval_interval: int = 2000  # steps between evaluations
    eval_iters: int = 0  # batches per evaluation; 0: every token of val.bin once
    eval_only: bool = False  # print the losses and stop
    preflight: bool = False  # check data, model and machine, print the cost and stop
    dollars_per_hour: float = 0.0  # preflight: rent of the machine
    target_val_loss: float = 0.0  # stop when the validation loss is this low
    always_save_checkpoint: bool = True  # False: save ckpt.pt only when the loss improved
    checkpoint_interval: float = 300.0  # seconds between saves outside evaluations; 0: none
    log_interval: int = 10  # steps between log lines, and between NaN checks on a GPU
    sample_interval: int = 0  # steps between samples; also after 0, 25, 50, 100; 0: none
    sample_start: str = "\n"  # prompt of the samples
    sample_tokens: int = 300  # tokens per sample
    tensorboard_log: bool = False  # also log to TensorBoard files in out_dir
    wandb_log: bool = False  # also log to Weights & Biases
    wandb_project: str = "gpt2-from-scratch"  # wandb project
    wandb_run_name: str = "gpt2"  # wandb run name
    # batch
    batch_size: int = 12  # sequences in one forward pass
    block_size: int = 1024  # tokens in a sequence: the context length
    gradient_accumulation_steps: int = 40  # forward passes per step, over all processes
    # model
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels
    dropout: float = 0.0  # probability of zeroing an activation
    bias: bool = True  # biases in linear layers and LayerNorms
    tie_weights: bool = True  # use the token embedding as the head
    gelu: Literal["tanh", "exact"] = "tanh"  # GPT-2 has tanh, nanoGPT has exact
    pad_vocab_to: int = 0  # pad the vocabulary to this many rows; 0: no padding
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks
    learning_rate: float = 6e-4  # AdamW: peak learning rate
    muon_lr: float = 0.02  # Muon: peak learning rate
    muon_momentum: float = 0.95  # Muon: decay of the running mean of gradients
    max_iters: int = 600000  # steps
    weight_decay: float = 0.1  # pull of matrices towards 0; biases and LayerNorms have none
    beta1: float = 0.9  # AdamW: decay of the running mean of gradients
    beta2: float = 0.95  # AdamW: decay of the running mean of squared gradients
    grad_clip: float = 1.0  # largest gradient norm; 0: no limit
    # learning rate
    decay_lr: bool = True  # False: constant after the warm-up
    lr_schedule: Literal["cosine", "linear"] = "cosine"  # shape of the decay
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int = 0  # step at which the decay ends; 0: max_iters
    min_lr: float = 6e-5  # AdamW's rate at the end; Muon's falls in proportion
    # system
    seed: int = 1337  # random seed of weights, batches, dropout and samples
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # type of matrix products
    compile: bool | Literal["auto"] = "auto"  # torch.compile the model
    deterministic: bool = False  # on a GPU: ask torch for the same bits in every run
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # communication of torch.distributed

    def __post_init__(self) -> None:
        counts = ("eval_interval", "log_interval", "sample_tokens", "batch_size", "block_size")
        counts += ("n_layer", "n_head", "n_embd", "gradient_accumulation_steps")
        check_range(self, 1, 1 << 31, *counts)
        amounts = ("eval_iters", "target_val_loss", "sample_interval", "checkpoint_interval")
        amounts += ("seed", "max_iters", "muon_lr", "weight_decay", "grad_clip", "warmup_iters")
        amounts += ("lr_decay_iters", "min_lr", "pad_vocab_to", "dollars_per_hour")
        check_range(self, 0, 1 << 31, *amounts)
        check_range(self, 0, 0.99, "dropout")
        check_range(self, 0, 0.99999, "beta1", "beta2", "muon_momentum")
        check_range(self, 1e-12, 1e6, "learning_rate")
        if not self.init_from:
            raise UserError("init_from is empty; use scratch, resume, auto or a pretrained GPT-2")
        if self.decay_lr and self.min_lr > self.learning_rate:
            raise UserError(
                f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}; lower it, or "
                "set decay_lr=False"
            )
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if self.sample_interval and not self.sample_start:
            raise UserError("sample_start is empty; give a prompt, as in --sample_start=A")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return AdamW's rate at `step`: linear warm-up, then decay. Muon's is in proportion to it."""
    peak, end = config.learning_rate, config.lr_decay_iters or config.max_iters
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    if not config.decay_lr:
        return peak
    progress = min(1.0, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
    linear = config.lr_schedule == "linear"
    left = 1 - progress if linear else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + left * (peak - config.min_lr)


class Trainer:
    """The state of a run: data, model, optimizers, and the step it is at."""

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        self.processes, self.device = processes, processes.device
        start = starting_point(config, processes)
        self.config = c = start.config
        self.out_dir = Path(c.out_dir)
        self.dtype = runtime.resolve_dtype(c.dtype, self.device)

        self.data = Dataset(Path("data") / c.dataset, c.block_size)
        self.tokenizer = self.data.tokenizer
        self.prompt = self.tokenizer.encode(c.sample_start) if c.sample_interval else []
        self.tokens_per_step = c.gradient_accumulation_steps * c.batch_size * c.block_size
        self.steps_per_epoch = len(self.data.train) / self.tokens_per_step
        limit = c.eval_iters * c.batch_size
        self.eval_windows = self.data.eval_windows(c.block_size, limit)  # of train.bin and val.bin
        self.micros = processes.share(c.gradient_accumulation_steps)  # our forward passes

        torch.manual_seed(c.seed)
        shape = model_config(c, self.tokenizer.vocab_size)
        self.model = GPT(shape).to(self.device)
        self.ddp = self.step_model = self.model  # see runtime.compile_model
        muon_dtype = runtime.resolve_dtype("auto", self.device)
        self.optimizers = make_optimizers(self.model, c, muon_dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.failed_step = torch.tensor(-1, device=self.device)  # first step with a NaN or infinity
        self.recent = deque(maxlen=c.log_interval + 5)  # (step, lr, loss, norm): to explain a NaN

        self.start_step, self.evaluated_step, self.best_val_loss = 0, -1, math.inf
        self.notes = restore(self, start)
        self.saved_at, self.save_seconds = time.perf_counter(), 0.0

    def micro_batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, (B, T) each, of forward pass number `micro` of a step."""
        c = self.config
        n_sequences = c.gradient_accumulation_steps * c.batch_size
        offsets = random_offsets(c.seed, step, n_sequences, len(self.data.train), c.block_size)
        first = micro * c.batch_size
        return self.batch(self.data.train, offsets[first : first + c.batch_size])

    def batch(self, tokens: Tokens, offsets: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the sequences at `offsets` as inputs and targets, (B, T) each, on the device."""
        pair = map(torch.from_numpy, gather(tokens, offsets, self.config.block_size))
        if self.device.type == "cuda":  # from pinned memory the CPU does not wait for the copy
            pair = (ids.pin_memory() for ids in pair)
        x, y = (ids.to(self.device, non_blocking=True) for ids in pair)
        return x, y

    def seed_dropout(self, step: int, micro: int) -> None:
        """Make dropout, like the batch, depend on the seed, the step and the forward pass alone."""
        if self.config.dropout > 0:
            seeds = np.random.SeedSequence((self.config.seed, step, micro))
            torch.manual_seed(int(seeds.generate_state(1)[0]))

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Return the training and the validation loss, in nats per token.

        The processes share the work. Not compiled: compiling the model once more, for calls without
        gradients, would cost more than it saves.
        """
        self.model.eval()
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # mps has no float64
        total = torch.zeros(2, 2, dtype=exact, device=self.device)  # losses and number of targets
        for i, tokens in enumerate((self.data.train, self.data.val)):
            mine = self.eval_windows[i][self.processes.rank :: self.processes.count]
            for first in range(0, len(mine), self.config.batch_size):
                x, y = self.batch(tokens, mine[first : first + self.config.batch_size])
                n_targets = (y >= 0).sum()
                with runtime.autocast(self.device, self.dtype):
                    loss = self.model(x, y)[1]
                total[i] += torch.stack((loss.to(exact) * n_targets, n_targets))
        self.model.train()
        losses, targets = self.processes.sum(total).T
        return tuple((losses / targets).tolist())

    def sample(self) -> str:
        """Return a text that the model writes after sample_start."""
        c = self.config
        prompt = torch.tensor([self.prompt], device=self.device)  # (1, T)
        generator = torch.Generator(self.device).manual_seed(c.seed)
        with runtime.autocast(self.device, self.dtype):
            new = self.model.generate(prompt, c.sample_tokens, temperature=0.8, generator=generator)
            ids = torch.cat(list(new), dim=1)[0].tolist()
        return c.sample_start + self.tokenizer.decode(ids)

    def save(self, name: str, step: int, **state) -> None:
        """Write a checkpoint of the weights and of `state` to the run's folder."""
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

    def save_state(self, step: int) -> None:
        """Write ckpt.pt with everything that a resumed run needs."""
        started = time.perf_counter()
        self.save(
            "ckpt.pt",
            step,
            evaluated_step=self.evaluated_step,
            optimizers=[o.state_dict() for o in self.optimizers],
            scaler=self.scaler.state_dict(),
        )
        self.saved_at = time.perf_counter()
        self.save_seconds = self.saved_at - started

    def save_is_due(self, interval: float) -> bool:
        """Return whether `interval` seconds and 100 times the last save's duration have passed."""
        pause = min(100 * self.save_seconds, 3600.0)  # one slow save must not stop saves for days
        return time.perf_counter() - self.saved_at > max(interval, pause)

    def train_step(self, step: int, lr: float, stop: int = 0, batches=None) -> Tensor:
        """Update the weights. Returns loss, gradient norm and whether (> 0) any process got `stop`.

        Nothing here waits for a GPU, which still computes one step while the next is prepared. So
        the GPU itself notices a loss or gradient that is not finite and from then on leaves the
        weights unchanged; `read` reports it. Benchmarks give their own `batches`.
        """
        c = self.config
        batches = batches or [self.micro_batch(step, micro) for micro in self.micros]
        loss = torch.zeros((), device=self.device)
        for i, (x, y) in enumerate(batches):
            self.seed_dropout(step, self.micros[i])
            if self.processes.distributed:  # exchange gradients in the last backward pass alone
                self.ddp.require_backward_grad_sync = i == len(batches) - 1
            with runtime.autocast(self.device, self.dtype):
                micro_loss = self.step_model(x, y)[1] / len(batches)
            self.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        loss, stop = self.processes.mean(torch.stack((loss, torch.full_like(loss, stop))))

        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        if c.grad_clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), c.grad_clip, grad_norm)

        finite = loss.isfinite()
        if not self.scaler.is_enabled():  # float16's scaler tries large scales: see `read`
            finite &= grad_norm.isfinite()
        self.failed_step = torch.where((self.failed_step < 0) & ~finite, step, self.failed_step)

        skip = ((self.failed_step >= 0) | ~grad_norm.isfinite()).float()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr / c.learning_rate
            optimizer.found_inf = skip  # 1: step() changes nothing
            optimizer.step()
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        self.recent.append((step, lr, loss, grad_norm))
        return torch.stack((loss, grad_norm, stop))

    def read(self, figures: Tensor) -> tuple[float, float, bool]:
        """Return train_step's figures as numbers. Raises UserError if one was not finite."""
        loss, grad_norm, stop = figures.tolist()
        if self.failed_step >= 0:
            raise diagnosis.explain_step(self, int(self.failed_step))
        if not math.isfinite(grad_norm) and self.scaler.get_scale() < 1:  # no scale is small enough
            raise diagnosis.explain_step(self, self.recent[-1][0])
        return loss, grad_norm, stop > 0


def train(trainer: Trainer) -> None:
    """Run the training loop: evaluate and save, stop at the end, update, log, obey a signal."""
    c, processes = trainer.config, trainer.processes
    if processes.is_first and trainer.evaluated_step < 0:  # not resumed
        move_earlier_run(trainer.out_dir)
    with runtime.StopSignal() as signals, Log(trainer) as log:
        log.say("\n".join((describe(trainer), *trainer.notes)))
        log.say(runtime.compile_model(trainer, log.say))
        log.start_clock()
        for step in range(trainer.start_step, c.max_iters + 1):
            last = step == c.max_iters or trainer.best_val_loss <= c.target_val_loss
            if (last or step % c.eval_interval == 0) and step != trainer.evaluated_step:
                log.status("evaluating ...")
                last = evaluate_and_save(trainer, log, step, last)
            if log.sample_is_due(step, last):
                log.status("writing ...")
                log.sample(step, trainer.sample())
            if last:
                break
            lr = learning_rate(step, c)
            figures = trainer.train_step(step, lr, signals.number)
            # Reading the figures waits for a GPU, so read them only when they are needed.
            obey = signals.number > 0 and not processes.distributed  # several stop together, below
            due = (step + 1) % c.log_interval == 0 or (step + 1) % c.eval_interval == 0
            if not (due or obey or trainer.device.type == "cpu" or step + 1 == c.max_iters):
                continue
            loss, grad_norm, stop = trainer.read(figures)
            log.training(step + 1, loss, grad_norm, lr)
            save = c.checkpoint_interval > 0 and c.always_save_checkpoint
            save = save and trainer.save_is_due(c.checkpoint_interval)
            if processes.is_first and (stop or obey or save):
                trainer.save_state(step + 1)
            if stop or obey:
                log.say(f"saved and stopped after step {step + 1:,}; continue: --init_from=resume")
                sys.exit(128 + (signals.number or signal.SIGTERM))
        if processes.is_first:
            pictures.write_report(trainer.out_dir)


def evaluate_and_save(trainer: Trainer, log: Log, step: int, last: bool) -> bool:
    """Log the losses after `step` updates and save. Returns whether the run ends here."""
    c = trainer.config
    train_loss, val_loss = trainer.evaluate()
    if not math.isfinite(val_loss):
        raise UserError(f"the validation loss after step {step} is {val_loss}; nothing was saved")
    last = last or val_loss <= c.target_val_loss
    improved = val_loss < trainer.best_val_loss
    trainer.best_val_loss, trainer.evaluated_step = min(val_loss, trainer.best_val_loss), step
    if trainer.processes.is_first:
        log.evaluation(step, train_loss, val_loss)
        if improved:  # first: after a kill in between, a resumed run evaluates again
            trainer.save("best.pt", step)
        if (improved or c.always_save_checkpoint) and (last or not step or trainer.save_is_due(0)):
            trainer.save_state(step)
    return last


def main(config: TrainConfig) -> None:
    """Train, check or evaluate, as the options say."""
    if config.preflight:
        config = preflight.begin(config)
    memory = runtime.explain_out_of_memory(config.batch_size, config.gradient_accumulation_steps)
    with Processes(config.device, config.backend) as processes, memory, lock_run(config, processes):
        runtime.set_up(processes.device, config.deterministic)
        trainer = Trainer(config, processes)
        if config.preflight:
            preflight.run_checks(trainer)
        elif config.eval_only:
            train_loss, val_loss = trainer.evaluate()
            if processes.is_first:
                print(
                    f"step {trainer.start_step:,}: training loss {train_loss:.4f}, validation loss "
                    f"{val_loss:.4f}, perplexity {math.exp(val_loss):,.2f}, "
                    f"{trainer.data.bits_per_byte(val_loss):.4f} bits per byte"
                )
        else:
            train(trainer)
            if processes.is_first:
                print(f"loss.png and samples.md are in {config.out_dir}; let the model write:")
                print(f"    python sample.py --out_dir={config.out_dir}")


if __name__ == "__main__":
    run(main, configure(TrainConfig))
