"""GPT-2: the attention, the block, the model, and text generation.

Letters for shapes, the same in every file:

    B   sequences in a batch            nh  attention heads (n_head)
    T   tokens in a sequence            hs  channels of one head, C / nh
    S   tokens that can be looked at    V   tokens in the vocabulary (vocab_size)
    C   channels (n_embd)

The model of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": the decoder
of Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), with LayerNorm at the input of each
sub-layer, learned positions and GELU. With the same weights it computes the same logits as
`transformers.GPT2LMHeadModel`, and its parameters have the names that OpenAI gave them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# For generation on Hopper: cuDNN's attention would build a new plan for each length of the cache.
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the model. The defaults are GPT-2 Small."""

    vocab_size: int = 50257
    pad_vocab_to: int = 0  # rows of the embedding and the head; 0: vocab_size
    block_size: int = 1024  # the longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms
    tie_weights: bool = True  # use the token embedding as the head, too
    gelu: Literal["tanh", "exact"] = "tanh"  # GPT-2 has tanh, nanoGPT has exact

    def __post_init__(self) -> None:
        assert self.n_embd % self.n_head == 0
        assert self.pad_vocab_to == 0 or self.pad_vocab_to >= self.vocab_size


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Return softmax(q k^T / sqrt(hs) + mask) v: formula 1 of Vaswani et al. 2017.

    q is (B, nh, T, hs); k and v are (B, nh, S, hs) with S >= T. The T queries belong to the last T
    of the S positions; each sees its own position and all earlier ones. Returns (B, nh, T, hs).
    """
    T, S, hs = q.size(2), k.size(2), q.size(3)
    mask = torch.full((T, S), -math.inf, dtype=q.dtype).triu(S - T + 1)  # -inf where key > query
    scores = q / math.sqrt(hs) @ k.mT + mask  # (B, nh, T, S)
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return weights @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Return what `attention` returns, computed in one piece, without a (T, S) matrix in memory.

    Faster on a GPU and for a single query. On a CPU its backward pass would take half of a training
    step; that of the formula costs 0 to 3% of a step more than the fastest code that we found.
    """
    T, S = q.size(2), k.size(2)
    assert T in (1, S), "is_causal aligns the mask with the first key, so T must be S"
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and the tokens before it, in n_head different ways."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: "KVCache | None" = None) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)
        attend = attention if x.device.type == "cpu" and T > 1 else fused_attention
        y = attend(q, k, v, self.dropout if self.training else 0.0)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # put the heads side by side again
        return self.resid_dropout(self.c_proj(y))


def gelu(x: Tensor, form: Literal["tanh", "exact"] = "tanh") -> Tensor:
    """Return GELU(x), by default in GPT-2's tanh form (https://arxiv.org/abs/1606.08415)."""
    if form == "exact":
        return F.gelu(x)
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        # (1 + tanh(u)) / 2 = sigmoid(2u), and a compiled CPU kernel computes sigmoid twice as fast.
        u = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return x * torch.sigmoid(2 * u)
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """Every token by itself: four times as many channels, GELU, and back."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gelu = config.gelu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(gelu(self.c_fc(x), self.gelu)))


class Block(nn.Module):
    """Attention moves information between tokens, then the MLP works on each token."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: "KVCache | None" = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """Token ids in, logits of the next token out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        rows = config.pad_vocab_to or config.vocab_size
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(rows, config.n_embd)
        self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.drop = nn.Dropout(config.dropout)
        self.transformer.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights as GPT-2 did, so that the first loss is about ln(V).

        Each block adds two projections to x. Scaling them by 1 / sqrt(2 * n_layer) keeps the
        variance of x from growing with the depth (Radford et al. 2019, section 2.3).
        """
        for name, p in self.named_parameters():
            if name.endswith(".bias"):
                p.zero_()
            elif ".ln_" in name:
                p.fill_(1.0)
            elif name.endswith("c_proj.weight"):
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                assert name.split(".")[-2] in ("wte", "wpe", "lm_head", "c_attn", "c_fc"), name
                p.normal_(std=0.02)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, caches: "list[KVCache] | None" = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits (B, T, V) of token ids idx (B, T) and, with `targets` (B, T), the loss.

        The loss is the mean cross-entropy in nats per token; targets of -1 do not count. With one
        cache per layer, idx has only the new tokens, and the logits are the last one's, (B, 1, V).
        """
        T = idx.size(1)
        past = caches[0].length if caches else 0
        assert past + T <= self.config.block_size, f"{past + T} tokens exceed block_size"
        positions = torch.arange(past, past + T, device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, caches[i] if caches else None)
        if caches:
            x = x[:, -1:]  # generation needs the last token's logits only
        logits = self.lm_head(self.transformer.ln_f(x))[..., : self.config.vocab_size]  # (B, T, V)
        if targets is None:
            return logits, None
        # In float32 whatever the dtype of the products: a sum of V exponentials needs the digits.
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        # Detached: torch.compile would otherwise also propagate a gradient of zeros through them.
        return logits.detach(), loss

    def num_params(self) -> int:
        """Return the number of parameters, positions included. A tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """Return the floating-point operations of training on one token in a sequence of T.

        A forward pass multiplies and adds once per weight of the linear layers, and T * C times in
        each product of attention; embeddings are looked up. A backward pass costs twice as much.
        """
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * T

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, **sampling) -> Iterator[Tensor]:
        """Continue the prompt idx (B, T), T >= 1, and yield each new token (B, 1) when it is drawn.

        The context is the last block_size tokens. Until it is full, a step computes one token and
        takes the earlier keys and values from the cache. After that every token moves by one
        position per step, and all are computed again. `sampling`: the options of `candidates`.
        """
        was_training, block_size = self.training, self.config.block_size
        self.eval()
        idx, caches = idx[:, -block_size:], None
        try:
            for _ in range(max_new_tokens):
                if caches is None or idx.size(1) > block_size:
                    new = idx = idx[:, -block_size:]
                    caches = [KVCache(block_size) for _ in self.transformer.h]
                with sdpa_kernel(NOT_CUDNN):
                    logits = self(new, caches=caches)[0][:, -1]  # (B, V)
                new = sample_token(logits.float(), **sampling)
                yield new
                idx = torch.cat((idx, new), dim=1)
        finally:
            self.train(was_training)


class KVCache:
    """Keys and values of the tokens so far, for one layer, with room for block_size tokens."""

    def __init__(self, block_size: int) -> None:
        self.block_size, self.length = block_size, 0
        self.keys_values: Tensor | None = None  # (2, B, nh, block_size, hs)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v of T tokens, (B, nh, T, hs), and return all of them, (B, nh, length, hs)."""
        B, nh, T, hs = k.size()
        if self.keys_values is None:
            self.keys_values = k.new_empty(2, B, nh, self.block_size, hs)
        keys, values = self.keys_values[0], self.keys_values[1]
        start, self.length = self.length, self.length + T
        keys[:, :, start : self.length], values[:, :, start : self.length] = k, v
        return keys[:, :, : self.length], values[:, :, : self.length]


def sample_token(logits: Tensor, generator: torch.Generator | None = None, **options) -> Tensor:
    """Draw one of the `candidates` for each row of the logits (B, V). Returns ids (B, 1)."""
    ids, weights = candidates(logits, **options)
    return ids.gather(-1, torch.multinomial(weights, 1, generator=generator))


def candidates(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the ids that may be drawn next and their weights, (B, K) each, for logits (B, V).

    temperature  divides the logits; 0 leaves only the most likely token
    top_k        leaves the k most likely tokens
    top_p        leaves the most likely tokens that together have this probability
                 (nucleus sampling, https://arxiv.org/abs/1904.09751)
    """
    V = logits.size(-1)
    if temperature == 0:
        ids = logits.argmax(dim=-1, keepdim=True)
        return ids, torch.ones_like(ids, dtype=torch.float)
    if top_k is None and top_p is None:  # no need to sort all ids, which takes milliseconds
        ids = torch.arange(V, device=logits.device).expand_as(logits)
    else:
        logits, ids = logits.topk(min(top_k or V, V), dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values  # a tiny temperature can not overflow
    weights = (logits / temperature).softmax(dim=-1)
    if top_p is not None:
        # Keep a token if the tokens before it have not reached top_p; the first one always stays.
        weights[weights.cumsum(dim=-1) - weights >= top_p] = 0
    return ids, weights
