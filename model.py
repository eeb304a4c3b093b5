"""GPT-2 in one file: the attention, the block, the model, and text generation with it.

Letters used for shapes, here and in every other file:
    B   sequences in a batch            nh  attention heads (`n_head`)
    T   tokens in a sequence            hs  width of one head, C / nh
    C   channels, `n_embd`              V   `vocab_size`

The model is that of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners":
the decoder of Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762) with LayerNorm moved to the
input of each sub-layer, learned positions and GELU. With the same weights it computes what
`transformers.GPT2LMHeadModel` computes; parameters have the names that GPT-2 gave them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """What defines the model's shape. The defaults are GPT-2 Small."""

    vocab_size: int = 50257
    pad_vocab_to: int = (
        0  # rows of the embedding and the head, 0: vocab_size; a GPU likes multiples of 64
    )
    block_size: int = 1024  # the longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms
    tie_weights: bool = True  # one matrix embeds tokens and, transposed, gives the logits
    gelu: Literal["tanh", "exact"] = (
        "tanh"  # the form that GPT-2 was trained with; nanoGPT's models have the other
    )

    def __post_init__(self) -> None:
        assert self.n_embd % self.n_head == 0, "n_embd must be a multiple of n_head"
        assert self.pad_vocab_to == 0 or self.pad_vocab_to >= self.vocab_size, (
            "pad_vocab_to is below vocab_size"
        )

    @property
    def padded_vocab_size(self) -> int:
        return self.pad_vocab_to or self.vocab_size


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention, softmax(q k^T / sqrt(hs)) v: formula 1 of Vaswani et al. 2017.

    q is (B, nh, T, hs), k and v are (B, nh, S, hs) with S >= T, and the queries stand at the last
    T of the S positions; each sees its own position and those before it. Returns (B, nh, T, hs).
    """
    B, nh, T, hs = q.size()
    S = k.size(2)
    if q.device.type != "cpu" or T == 1:
        assert T in (1, S), "is_causal aligns the mask to the first key, so T must be S"
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
    # On a CPU the backward pass of scaled_dot_product_attention takes half of a training step at
    # these lengths. Two batched products are faster; adding the mask is part of the first one.
    mask = torch.full((T, S), -math.inf, dtype=q.dtype).triu(S - T + 1)
    q, k, v = q.reshape(B * nh, T, hs), k.reshape(B * nh, S, hs), v.reshape(B * nh, S, hs)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(hs))  # (B * nh, T, S)
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return (weights @ v).view(B, nh, T, hs)


def gelu(x: Tensor, form: Literal["tanh", "exact"] = "tanh") -> Tensor:
    """GELU (https://arxiv.org/abs/1606.08415, section 2), by default in its tanh form, with which GPT-2 was trained."""
    if form == "exact":
        return F.gelu(x)
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        # (1 + tanh(u)) / 2 is sigmoid(2 u), which a compiled CPU kernel does in half the time of tanh.
        u = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return x * torch.sigmoid(2 * u)
    return F.gelu(x, approximate="tanh")


class KVCache:
    """Keys and values of the tokens seen so far, for one layer.

    There is room for `block_size` of them from the start: a tensor that grows would be copied for each token.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size, self.length = block_size, 0
        self.keys_values: Tensor | None = None  # (2, B, nh, block_size, hs)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of T tokens, (B, nh, T, hs) each; returns all, (B, nh, length, hs)."""
        B, nh, T, hs = k.size()
        if self.keys_values is None:
            self.keys_values = k.new_empty(2, B, nh, self.block_size, hs)
        start, self.length = self.length, self.length + T
        (
            self.keys_values[0, :, :, start : self.length],
            self.keys_values[1, :, :, start : self.length],
        ) = k, v
        return self.keys_values[0, :, :, : self.length], self.keys_values[1, :, :, : self.length]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)
        y = attention(q, k, v, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gelu = config.gelu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(gelu(self.c_fc(x), self.gelu)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights as GPT-2 did, so that the first loss is about ln(V).

        2 * n_layer sub-layers add to the residual stream; their last projections are scaled by
        1 / sqrt(2 * n_layer) so that its variance does not grow with depth (Radford et al. 2019,
        section 2.3).
        """
        for name, p in self.named_parameters():
            if name.endswith(".bias"):
                p.zero_()
            elif ".ln_" in name:
                p.fill_(1.0)
            elif name.endswith("c_proj.weight"):
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                assert name.endswith(
                    ("wte.weight", "wpe.weight", "lm_head.weight", "c_attn.weight", "c_fc.weight")
                )
                p.normal_(std=0.02)

    def num_params(self) -> int:
        """Number of parameters, positions included; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations of training on one token of T: forwards once, backwards twice.

        A multiplication and an addition for each parameter (Kaplan et al. 2020,
        https://arxiv.org/abs/2001.08361, section 2.1), and the two products of attention.
        """
        return 6 * self.num_params() + 12 * self.config.n_layer * self.config.n_embd * T

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, caches: list[KVCache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Token ids (B, T), int64, to logits (B, T, V) and, with `targets` (B, T), the mean loss.

        The loss is the cross-entropy in nats per token; a target of -1 is left out of it. With
        `caches`, one per layer, idx holds only the tokens that come after the cached ones, and
        the logits, (B, 1, V), are those of the last.
        """
        T = idx.size(1)
        past = caches[0].length if caches else 0
        assert past + T <= self.config.block_size, (
            f"{past + T} tokens in a context of {self.config.block_size}"
        )
        positions = torch.arange(past, past + T, device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, caches[i] if caches else None)
        if caches:
            x = x[:, -1:]  # what comes after the others is known
        logits = self.lm_head(self.transformer.ln_f(x))[..., : self.config.vocab_size]  # (B, T, V)
        if targets is None:
            return logits, None
        # In float32 whatever the dtype of the products: a sum of V exponentials needs the digits.
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
        # Detached: whoever gives targets wants the gradient of this loss, and torch.compile would
        # else pass on another one, of zeros, as large as the logits.
        return logits.detach(), loss

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter in exactly one of three groups.

        "hidden": the matrices of the blocks. "embedding": token and position embeddings and the
        head. "vector": biases and LayerNorms, which no optimizer decays.
        """
        groups: dict[str, list[nn.Parameter]] = {"hidden": [], "embedding": [], "vector": []}
        for name, p in self.named_parameters():
            group = (
                "vector"
                if p.dim() < 2
                else "hidden"
                if name.startswith("transformer.h.")
                else "embedding"
            )
            groups[group].append(p)
        assert sum(map(len, groups.values())) == len(list(self.parameters()))
        return groups

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue the prompt idx, (B, T) with T >= 1, and yield each new token, (B, 1), as it is made.

        The context is the last `block_size` tokens. While it grows, a step computes one token and
        finds the others in the cache; once it is full every step moves each token by one position,
        so nothing cached is right any more and the window is computed anew.

        temperature  divides the logits; 0 takes the likeliest token
        top_k        keeps the k likeliest tokens
        top_p        keeps the likeliest tokens that together reach this probability
                     (nucleus sampling, https://arxiv.org/abs/1904.09751)
        """
        was_training = self.training
        self.eval()
        block_size = self.config.block_size
        idx = idx[:, -block_size:]
        caches, new = [KVCache(block_size) for _ in self.transformer.h], idx
        try:
            for _ in range(max_new_tokens):
                logits = self(new, caches=caches)[0][:, -1]  # (B, V)
                new = sample_token(logits.float(), temperature, top_k, top_p, generator)
                yield new
                idx = torch.cat((idx, new), dim=1)
                if idx.size(1) > block_size:
                    idx = idx[:, -block_size:]
                    caches, new = [KVCache(block_size) for _ in self.transformer.h], idx
        finally:
            self.train(was_training)


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row of the logits (B, V), float32. Returns ids (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    ids, probs = candidates(logits, temperature, top_k, top_p)
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator))


def candidates(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """What `sample_token` draws from: ids (B, K) and their weights (B, K), with K = `top_k` or else V.

    They come likeliest first if there is a choice to be made; sorting a large vocabulary takes a
    tenth of the time of a token. What `top_p` leaves out has the weight 0.
    """
    V = logits.size(-1)
    if top_k is None and top_p is None:
        ids = torch.arange(V, device=logits.device).expand_as(logits)
    else:
        logits, ids = logits.topk(min(top_k or V, V), dim=-1)
    logits = (
        logits - logits.max(dim=-1, keepdim=True).values
    )  # so that no temperature makes one infinite
    probs = (logits / temperature).softmax(dim=-1)
    if top_p is not None:
        # A token stays if those before it have not reached top_p yet; so the first always does.
        probs[probs.cumsum(dim=-1) - probs >= top_p] = 0
    return ids, probs
