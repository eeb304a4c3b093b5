"""Train a GPT on one processor, one GPU, or many.

    python train.py config/phase1_char.py
    python train.py config/phase1_char.py --init_from=resume
    torchrun --standalone --nproc_per_node=2 train.py config/phase3_gpt2.py

Reads data/<dataset>/ and writes to out_dir:

    ckpt.pt      the last saved state: resume the run from it, or sample from it
    best.pt      the weights with the lowest validation loss
    log.jsonl    a JSON object per logged step, evaluation and sample
    samples.md   texts that the model wrote along the way   (made from log.jsonl at the end)
    loss.png     training and validation loss               (made from log.jsonl at the end)
"""

import itertools
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from configurator import UserError, check_range, configure, quote, run
from model import GPT
from support import data, runtime
from support.checkpoint import save_checkpoint
from support.diagnosis import explain
from support.log import Log
from support.optimizers import load_optimizers, make_optimizers
from support.pictures import write_report
from support.processes import Processes
from support.start import find_start, lock_run, make_run_folder


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT."""

    # input and output
    dataset: str = "openweb"  # folder under data/ that a prepare script wrote
    out_dir: str = "out"  # folder of the run
    init_from: str = "scratch"  # or resume, auto (resume if possible), gpt2, owner/name
    eval_interval: int = 2000  # steps between evaluations
    eval_iters: int = 0  # batches of 16 sequences per evaluation; 0: all of val.bin
    eval_only: bool = False  # print the losses and stop
    target_val_loss: float = 0.0  # stop when the validation loss is this low
    always_save_checkpoint: bool = True  # False: only when the loss improved, or at a signal
    checkpoint_interval: float = 300.0  # seconds between saves outside evaluations; 0: none
    log_interval: int = 10  # steps between log lines
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
    decay_lr: bool = True  # False: constant, also without a warm-up
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
        check_range(self, 0, 1 << 31, *(f.name for f in fields(self) if f.type in (int, float)))
        counts = "eval_interval log_interval sample_tokens batch_size block_size n_layer n_head"
        check_range(self, 1, 1 << 31, *counts.split(), "n_embd", "gradient_accumulation_steps")
        check_range(self, 0, 0.99, "dropout")
        check_range(self, 0, 0.99999, "beta1", "beta2", "muon_momentum")
        check_range(self, 1e-12, 1e6, "learning_rate")
        if self.decay_lr and self.min_lr > self.learning_rate:
            rates = f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}"
            raise UserError(f"{rates}; lower it, or set decay_lr=False")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if not self.out_dir:
            raise UserError("out_dir is empty; name a folder, as in --out_dir=out/mine")
        if self.sample_interval and not self.sample_start:
            raise UserError("sample_start is empty; give a prompt, as in --sample_start=A")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return AdamW's learning rate at `step`: warm-up, then decay. Muon's is proportional to it."""
    peak, end = config.learning_rate, config.lr_decay_iters or config.max_iters
    if not config.decay_lr:
        return peak
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    progress = min(1.0, (step - config.warmup_iters) / max(1, end - config.warmup_iters))
    cosine = config.lr_schedule == "cosine"
    left = 0.5 * (1 + math.cos(math.pi * progress)) if cosine else 1 - progress
    return config.min_lr + left * (peak - config.min_lr)


def load_batch(tokens, offsets: np.ndarray, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the sequences at `offsets` as inputs and targets, (B, T) each, on the device."""
    pair = map(torch.from_numpy, data.gather(tokens, offsets, T))
    if device.type == "cuda":  # from pinned memory the CPU does not wait for the copy
        pair = (ids.pin_memory() for ids in pair)
    x, y = (ids.to(device, non_blocking=True) for ids in pair)
    return x, y


def micro_batches(tokens, config: TrainConfig, T: int, device, micros, step: int) -> Iterator:
    """Yield inputs and targets, (B, T) each, of the passes `micros` of all steps from `step` on."""
    # `micros` are the numbers of the forward passes of a step that this process computes.
    B, n_sequences = config.batch_size, config.batch_size * config.gradient_accumulation_steps
    for current in itertools.count(step):
        offsets = data.random_offsets(config.seed, current, n_sequences, len(tokens), T)
        for micro in micros:
            yield load_batch(tokens, offsets[micro * B : (micro + 1) * B], T, device)


def seed_dropout(config: TrainConfig, step: int, micro: int) -> None:
    """Seed dropout by the run's seed, the step and the forward pass: a resumed run repeats it."""
    if config.dropout > 0:  # seeding takes 0.1 ms
        seeds = np.random.SeedSequence((config.seed, step, micro))
        torch.manual_seed(int(seeds.generate_state(1)[0]))


@torch.no_grad()
def evaluate(model: GPT, parts, batch_size: int, processes: Processes, precision) -> list[float]:
    """Return the mean loss on each of `parts`, tokens and offsets of sequences, in nats per token.

    The processes share the work. Not compiled: compiling once more would cost more than it saves.
    """
    model.eval()
    losses, device = [], processes.device
    exact = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
    for tokens, offsets in parts:
        mine = offsets[processes.rank :: processes.count]
        total = torch.zeros(2, dtype=exact, device=device)  # losses, and number of targets
        for first in range(0, len(mine), batch_size):
            some = mine[first : first + batch_size]
            x, y = load_batch(tokens, some, model.config.block_size, device)
            n_targets = (y >= 0).sum()
            with precision:
                loss = model(x, y)[1]
            total += torch.stack((loss.to(exact) * n_targets, n_targets))
        loss, n_targets = processes.sum(total).tolist()
        losses.append(loss / n_targets)
    model.train()
    return losses


def write_sample(model: GPT, prompt: list[int], count: int, seed: int) -> list[int]:
    """Return the prompt and `count` token ids that the model writes after it."""
    device = model.lm_head.weight.device
    idx, generator = torch.tensor([prompt], device=device), torch.Generator(device)  # (1, T)
    new = model.generate(idx, count, temperature=0.8, generator=generator.manual_seed(seed))
    return torch.cat((idx, *new), dim=1)[0].tolist()


def why_not_finite(model, config, step, micros, batches, dtype, processes) -> str:
    """Return why a loss or gradient is not finite. Only the first process returns, others exit."""
    reason = ""
    for micro in micros:
        seed_dropout(config, step, micro)
        batch, another = (next(batches([micro], s)) for s in (step, step + 1))
        with suppress(torch.OutOfMemoryError):  # not compiled, it may need more than a step
            reason = reason or explain(model, batch, another, dtype)
    reasons = list(filter(None, processes.gather(reason)))
    if not processes.is_first:
        sys.exit(1)
    return reasons[0] if reasons else "no cause was found: try --compile=False, or smaller batches"


def train(config: TrainConfig, processes: Processes) -> None:
    """Train a model (with eval_only, evaluate it). The first process saves and logs."""
    # The machine
    device, out_dir = processes.device, Path(config.out_dir)
    runtime.set_up(device, config.deterministic)
    dtype = runtime.resolve_dtype(config.dtype, device)
    precision = runtime.autocast(device, dtype)  # around every forward pass
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    micros = processes.share(config.gradient_accumulation_steps)  # our forward passes of a step

    # The data
    meta, tokenizer, train_tokens, val_tokens = data.open_dataset(Path("data") / config.dataset)
    state = find_start(config, meta, tokenizer, processes)
    shape, T, first_step = state.shape, state.shape.block_size, state.step
    parts = data.eval_parts(train_tokens, val_tokens, T, config.eval_iters * 16)
    tokens_per_step = config.gradient_accumulation_steps * config.batch_size * T
    steps_per_epoch = len(train_tokens) / tokens_per_step
    epochs = (state.tokens / tokens_per_step + config.max_iters - first_step) / steps_per_epoch
    prompt = tokenizer.encode(config.sample_start if config.sample_interval else "")

    # The model and its optimizers: new, pretrained, or from a checkpoint
    torch.manual_seed(config.seed)
    model = GPT(shape).to(device)
    optimizers = make_optimizers(model, config, runtime.resolve_dtype("auto", device))
    if state.weights:
        model.load_state_dict(state.weights)
    if resumed := state.optimizers is not None:
        load_optimizers(optimizers, state.optimizers)
    if state.scaler and scaler.is_enabled():  # empty if dtype was not float16
        scaler.load_state_dict(state.scaler)
    # From here on, its weights are the model's own tensors. The loaded ones are freed.
    state = replace(state, weights=model.state_dict(), optimizers=None, scaler=None)

    losses = partial(evaluate, model, parts, config.batch_size, processes, precision)
    if config.eval_only:
        processes.say("evaluating ...")
        words = "step {:,}: training loss {:.4f}, validation loss {:.4f}"
        return processes.say(words.format(first_step, *losses()))

    # The run
    if processes.is_first and not resumed:
        make_run_folder(out_dir)
    processes.say(
        f"{model.num_params():,} parameters: {shape.n_layer} layers, {shape.n_head} heads, "
        f"{shape.n_embd} wide, context {T}, vocabulary {shape.vocab_size:,}\n"
        f"{tokens_per_step:,} tokens per step, {steps_per_epoch:,.1f} steps per epoch, "
        f"{config.max_iters:,} steps = {epochs:.1f} epochs of data/{config.dataset}\n"
        f"{device} x {processes.count}, {runtime.dtype_name(dtype)}, {config.optimizer}"
    )
    batches = partial(micro_batches, train_tokens, config, T, device)
    upcoming = batches(micros, first_step)
    x, y = next(upcoming)
    ddp = processes.wrap(model)
    step_model = runtime.compile_model(ddp, config, (x, y), precision, processes)
    read = (state.tokens, tokens_per_step, len(train_tokens))
    log = Log(config, first_step, *read, processes.is_first)
    saved_at = time.perf_counter()
    with runtime.catch_signals() as signals, log:
        for step in range(first_step, config.max_iters + 1):
            # `step` updates are done. After a signal: save and exit. Otherwise evaluate, write a
            # sample and save, each if it is due; end at max_iters or at target_val_loss.
            stop = processes.any(bool(signals))  # several processes stop together
            improved = False
            due = step % config.eval_interval == 0 or step == config.max_iters
            due = due and step != state.evaluated_step and not stop
            if due:
                log.status("evaluating ...")
                train_loss, val_loss = losses()
                if not math.isfinite(val_loss):
                    raise UserError(f"step {step}: the validation loss is {val_loss}; not saved")
                log.evaluation(step, train_loss, val_loss)
                improved, best = val_loss < state.best_val_loss, min(val_loss, state.best_val_loss)
                state = replace(state, evaluated_step=step, best_val_loss=best)
            done = step == config.max_iters or state.best_val_loss <= config.target_val_loss
            sample = done or step % (config.sample_interval or 1) == 0 or step in (25, 50, 100)
            if prompt and sample and not stop and processes.is_first:
                with precision:
                    ids = write_sample(model, prompt, config.sample_tokens, config.seed)
                log.sample(step, tokenizer.decode(ids))
            timer = 0 < config.checkpoint_interval < time.perf_counter() - saved_at
            save = stop or improved or (config.always_save_checkpoint and (due or timer))
            if save and processes.is_first:
                new = (step - state.step) * tokens_per_step
                state = replace(state, step=step, tokens=state.tokens + new)
                if improved:  # first: after a kill in between, a resumed run evaluates again
                    save_checkpoint(out_dir / "best.pt", state)
                moments = [optimizer.state_dict() for optimizer in optimizers]
                whole = replace(state, optimizers=moments, scaler=scaler.state_dict())
                save_checkpoint(out_dir / "ckpt.pt", whole)
                saved_at = log.pause(step)
            if stop:
                log.say(f"saved and stopped after step {step:,}; continue: --init_from=resume")
                # Without a signal here, another process got it.
                sys.exit(128 + (signals or [signal.SIGTERM])[0])
            if done:
                break

            # Update number step + 1: forward and backward passes, clip, check, and take the step.
            lr = learning_rate(step, config)
            loss = torch.zeros((), device=device)
            for micro in micros:
                seed_dropout(config, step, micro)
                if processes.distributed:  # average gradients in the last backward pass alone
                    ddp.require_backward_grad_sync = micro == micros[-1]
                with precision:
                    micro_loss = step_model(x, y)[1] / len(micros)
                x, y = next(upcoming)  # read and copied while a GPU still computes
                scaler.scale(micro_loss).backward()
                loss += micro_loss.detach()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            if config.grad_clip:
                nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, grad_norm)
            loss = processes.sum(loss) / processes.count
            loss, grad_norm = torch.stack((loss, grad_norm)).tolist()  # waits for a GPU
            # float16's scaler may cause an overflow: skip the step. update() lowers its factor.
            overflow = not math.isfinite(grad_norm)
            if not math.isfinite(loss) or (overflow and scaler.get_scale() <= 1):
                reason = why_not_finite(model, config, step, micros, batches, dtype, processes)
                what = f"the loss is {loss:.4g} and the gradient norm {grad_norm:.4g}, at learning "
                what += f"rate {lr:.3g}; {reason}; the step was not taken"
                raise UserError(f"step {step}: {what}, ckpt.pt is unchanged")
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * lr / config.learning_rate
                if not overflow:
                    scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
            log.training(step + 1, loss, grad_norm, lr)

    if processes.is_first and log.path.exists():
        write_report(out_dir)
        command = f"python sample.py --out_dir={quote(out_dir)}"
        print(f"{out_dir} has loss.png and samples.md; next: {command}")


def main(config: TrainConfig) -> None:
    """Train in this process, or together with the others that torchrun started."""
    memory = runtime.explain_out_of_memory(config.batch_size, config.gradient_accumulation_steps)
    with Processes(config.device, config.backend) as processes, memory, lock_run(config, processes):
        train(config, processes)


if __name__ == "__main__":
    run(main, configure(TrainConfig))
