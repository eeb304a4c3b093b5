"""GPT-2 in one file: it reads Shakespeare's plays and learns to write more of them.

    python prepare_shakespeare.py    # once: gets the text
    python docs/gpt.py               # trains for about two minutes on two CPU cores, then writes

The rest of the project does the same for real; tests check that model.py and train.py compute
what this file computes. Letters for shapes: B sequences in a batch, T tokens in a sequence, C
channels of a token, V tokens in the vocabulary, nh attention heads with hs = C / nh channels each.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

n_layer, n_head, n_embd = 2, 4, 128  # blocks, attention heads, channels
block_size, batch_size = 128, 32  # tokens in a sequence, sequences in a batch
max_iters, warmup_iters = 800, 50  # all steps; the first ones, in which the learning rate rises
learning_rate, grad_clip = 1e-2, 1.0  # the highest learning rate, the largest gradient norm
weight_decay, beta1, beta2 = 0.1, 0.9, 0.95  # AdamW: pull of matrices towards 0, memory of means
seed = 1337  # all options have the names that they have in train.py


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(hs)) v, where no token sees a later one. All: (B, nh, T, hs)."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, T): query i fits key j
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)  # True where token j is after token i
    weights = scores.masked_fill(later, -math.inf).softmax(dim=-1)  # later tokens get 0; sum 1
    return weights @ v  # for each token a weighted mean of the values


class CausalSelfAttention(nn.Module):
    """Every token collects information from itself and earlier tokens, in n_head different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)  # query (what do I look for?), key, value
        self.c_proj = nn.Linear(n_embd, n_embd)  # mixes what the heads found

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        # Each head gets hs of the C channels. The transpose makes a head a matrix of T rows.
        q, k, v = (t.view(B, T, n_head, C // n_head).transpose(1, 2) for t in (q, k, v))
        y = attention(q, k, v)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # the heads side by side again


class Block(nn.Module):
    """Attention moves information between tokens, then the MLP works on each token."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention()
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = nn.Module()
        self.mlp.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.mlp.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))  # both only add to x: gradients pass through any depth
        wide = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh")  # (B, T, 4C)
        return x + self.mlp.c_proj(wide)  # (B, T, C)


class GPT(nn.Module):
    """Token ids in, logits of the next token out."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.transformer = nn.Module()  # the names are those of OpenAI's model
        self.transformer.wte = nn.Embedding(vocab_size, n_embd)  # a vector for each token
        self.transformer.wpe = nn.Embedding(block_size, n_embd)  # and one for each position
        self.transformer.h = nn.ModuleList(Block() for _ in range(n_layer))
        self.transformer.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # one matrix reads tokens and writes them
        for name, p in self.named_parameters():
            if p.dim() == 2:  # small: at first all tokens are about equally likely
                n_sums = 2 * n_layer if name.endswith("c_proj.weight") else 1  # results added to x
                nn.init.normal_(p, std=0.02 / math.sqrt(n_sums))
            elif name.endswith(".bias"):
                nn.init.zeros_(p)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[: idx.size(1)]  # (B, T, C)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))  # (B, T, V)


def mean_loss(model: GPT, windows: Tensor) -> Tensor:
    """Return the mean of -log(probability of the right next token) in windows (B, T + 1) of ids."""
    x, y = windows[:, :-1], windows[:, 1:]  # the target of each token is the token after it
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def generate(model: GPT, idx: Tensor, count: int, temperature: float = 0.8) -> Tensor:
    """Return idx (B, T) and `count` more tokens: draw one, append it, and so on."""
    for _ in range(count):
        logits = model(idx[:, -block_size:])[:, -1]  # (B, V): what may follow the last token
        probabilities = (logits / temperature).softmax(dim=-1)  # below 1: fewer surprises
        idx = torch.cat((idx, torch.multinomial(probabilities, 1)), dim=1)
    return idx


def main(folder: str = "data/shakespeare_char") -> list[float]:
    """Train on the text in `folder`, write a sample, and return the loss of each step."""
    if not Path(folder, "meta.json").exists():
        raise SystemExit(f"{folder}: no such data set; first run: python prepare_shakespeare.py")
    # A token is a character. Its id is its place in the alphabet: "ROMEO:" is 30 27 25 17 27 10.
    chars = json.loads(Path(folder, "meta.json").read_text("utf-8"))["tokenizer"]["chars"]
    files = (np.fromfile(Path(folder, name), "<u2") for name in ("train.bin", "val.bin"))
    train_ids, val_ids = (torch.from_numpy(ids.astype(np.int64)) for ids in files)
    windows = train_ids.unfold(0, block_size + 1, 1)  # one starts at each token: (N, T + 1)
    torch.manual_seed(seed)
    model, losses = GPT(len(chars)), []
    matrices, vectors = ([p for p in model.parameters() if p.dim() == n] for n in (2, 1))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(beta1, beta2), weight_decay=weight_decay)

    for step in range(max_iters):
        starts = np.random.default_rng((seed, step)).integers(len(windows), size=batch_size)
        loss = mean_loss(model, windows[starts])
        loss.backward()  # the gradient: how the loss changes with each weight
        nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        up, down = (step + 1) / (warmup_iters + 1), (max_iters - step) / (max_iters - warmup_iters)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(up, down)
        optimizer.step()  # a small step of each weight against its gradient
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step:4} of {max_iters}  loss {np.mean(losses[-50:]):.4f}")
    windows = val_ids.unfold(0, block_size + 1, block_size)  # text that the model has not seen
    total = sum(mean_loss(model, some).item() * len(some) for some in windows.split(batch_size))
    print(f"validation loss {total / len(windows):.4f}\n")
    start = torch.zeros((1, 1), dtype=torch.long)  # one token: 0, in this alphabet a line break
    print("".join(chars[i] for i in generate(model, start, 500)[0]))
    return losses


if __name__ == "__main__":
    main()
