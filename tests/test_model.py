"""The model against `transformers`, and the properties that make it a causal language model."""

import math
from dataclasses import fields

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, TopKLogitsWarper, TopPLogitsWarper

import model as model_module
from configurator import read_options
from model import GPT, GPTConfig, attention, sample_token
from train import TrainConfig

SMALL = dict(vocab_size=97, block_size=24, n_layer=3, n_head=4, n_embd=32)


def small_model(**changed) -> GPT:
    """Return a small model in which every parameter, biases and norms included, is random."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **changed}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def reference(model: GPT) -> GPT2LMHeadModel:
    """Return transformers' GPT-2 with the same weights; its linear layers store them transposed."""
    c = model.config
    shape = dict(vocab_size=c.vocab_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head)
    shape |= dict(n_positions=c.block_size, tie_word_embeddings=c.tie_weights)
    hf = GPT2LMHeadModel(GPT2Config(**shape, attn_implementation="eager")).eval()
    ours = model.state_dict()
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.copy_(ours[name].t() if is_transposed(name) else ours[name])
    return hf


def is_transposed(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


@pytest.mark.parametrize("tie_weights", [True, False])
def test_logits_and_gradients_equal_transformers(tie_weights):
    ours = small_model(tie_weights=tie_weights)
    theirs = reference(ours)
    x, y = tokens(2, 24), tokens(2, 24).flip(0)
    logits, loss = ours(x, y)
    their_logits = theirs(x).logits
    torch.testing.assert_close(logits, their_logits, rtol=1e-4, atol=1e-4)
    loss.backward()
    F.cross_entropy(their_logits.flatten(0, 1), y.flatten()).backward()
    ours_by_name = dict(ours.named_parameters())
    assert len(ours_by_name) == len(list(theirs.parameters()))
    for name, p in theirs.named_parameters():
        gradient = ours_by_name[name].grad
        gradient = gradient.t() if is_transposed(name) else gradient
        torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-5)


def test_targets_of_minus_one_do_not_count():
    model, x, y = small_model(), tokens(2, 24), tokens(2, 24).flip(1)
    y[:, 10:] = -1
    expected = F.cross_entropy(model(x)[0][:, :10].flatten(0, 1), y[:, :10].flatten())
    torch.testing.assert_close(model(x, y)[1], expected)


def test_logits_do_not_change_when_a_later_token_changes():
    model, x = small_model(), tokens(1, 24)
    before = model(x)[0]
    for t in range(1, 24):
        changed = x.clone()
        changed[0, t] = (x[0, t] + 1) % 97
        after = model(changed)[0]
        assert torch.equal(after[0, :t], before[0, :t])
        assert not torch.allclose(after[0, t:], before[0, t:])


def test_gradient_reaches_every_earlier_position_and_no_later_one():
    model, embedded = small_model(), []
    keep = lambda *args: embedded.append(args[-1]) or args[-1].retain_grad()  # noqa: E731
    model.transformer.drop.register_forward_hook(keep)
    for t in range(24):
        model(tokens(1, 24))[0][0, t].square().sum().backward()
        reached = embedded.pop().grad[0].abs().sum(dim=-1) > 0
        assert reached.tolist() == [position <= t for position in range(24)]


def test_without_positions_order_is_invisible_and_with_them_it_is_not():
    model = small_model(n_layer=1)  # in one layer, the last token sees the others as a set
    x = tokens(1, 24)
    shuffled = torch.cat((x[:, :-1].flip(1), x[:, -1:]), dim=1)
    assert not torch.allclose(model(x)[0][0, -1], model(shuffled)[0][0, -1], atol=1e-3)
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    torch.testing.assert_close(model(x)[0][0, -1], model(shuffled)[0][0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_attention_equals_scaled_dot_product_attention(bf16):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 24, 8, dtype=torch.bfloat16 if bf16 else torch.float32)
    tolerance = dict(rtol=4e-2, atol=4e-2) if bf16 else dict(rtol=1e-5, atol=1e-5)
    both = []
    for function in (attention, lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        y = function(*inputs)
        y.float().square().sum().backward()
        both.append((y, *[t.grad for t in inputs]))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("part", ["transformer.drop", "resid_dropout", "mlp.dropout", "weights"])
def test_every_dropout_is_active_in_training_only(part):
    """The last one is that of the attention weights, which is no module."""
    model, x = small_model(dropout=0.5), tokens(2, 24)
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and not name.endswith(part):
            module.p = 0.0
        if isinstance(module, model_module.CausalSelfAttention) and part != "weights":
            module.dropout = 0.0
    assert not torch.equal(model(x)[0], model(x)[0])


def test_initial_weights_have_the_spread_of_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1000, block_size=64, n_layer=4, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all()


@pytest.mark.parametrize(
    ("name", "vocab_size", "parameters"),
    [
        ("phase1_quick", 65, 108_352),
        ("phase1_char", 65, 421_504),
        ("phase2_bpe", 8192, 10_101_760),
        ("phase3_gpt2", 32000, 134_601_216),
        ("gpt2_124m", 50257, 124_439_808 + 47 * 768),  # OpenAI's GPT-2 Small and padded rows
    ],
)
def test_the_models_of_the_config_files_have_their_sizes(name, vocab_size, parameters):
    config = read_options(TrainConfig, [str(ROOT / "config" / f"{name}.py")])
    names = [field.name for field in fields(GPTConfig) if field.name != "vocab_size"]
    shape = {name: getattr(config, name) for name in names}
    with torch.device("meta"):
        assert GPT(GPTConfig(vocab_size, **shape)).num_params() == parameters


def test_padded_rows_of_the_vocabulary_change_nothing_and_are_never_sampled():
    plain, padded = small_model(), small_model(pad_vocab_to=128)
    weights = padded.state_dict()
    for name, p in plain.state_dict().items():
        weights[name][: len(p)] = p
    weights["lm_head.weight"][97:] = 100.0  # were they tokens, they would be the most likely
    padded.load_state_dict(weights)
    x = tokens(2, 24)
    logits, loss = padded(x, x.flip(1))
    torch.testing.assert_close((logits, loss), plain(x, x.flip(1)), rtol=1e-5, atol=1e-5)
    loss.backward()
    assert not padded.lm_head.weight.grad[97:].any() and padded.lm_head.weight.grad[:97].any()
    for temperature in (0, 5.0):
        assert torch.cat(list(padded.generate(x, 50, temperature=temperature))).max() < 97


def test_gelu_has_both_its_forms_also_where_it_is_compiled(monkeypatch):
    x = torch.linspace(-6, 6, 1000)
    assert torch.equal(model_module.gelu(x), F.gelu(x, approximate="tanh"))
    assert torch.equal(model_module.gelu(x, "exact"), F.gelu(x))
    assert not torch.equal(model_module.gelu(x), model_module.gelu(x, "exact"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(model_module.gelu(x), F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("prompt_length", [1, 10, 24, 40])
def test_cached_generation_equals_recomputing_the_context_also_past_block_size(prompt_length):
    model, prompt = small_model(), tokens(2, prompt_length)
    theirs = reference(model)
    expected = prompt
    for _ in range(50):
        logits = theirs(expected[:, -24:]).logits[:, -1]
        expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
    made = list(model.generate(prompt, 50, temperature=0))
    assert torch.equal(torch.cat((prompt, *made), dim=1), expected)


def test_cache_is_used():
    model, lengths = small_model(), []
    note = lambda _module, args, _output: lengths.append(args[0].size(1))  # noqa: E731
    model.transformer.wte.register_forward_hook(note)
    list(model.generate(tokens(1, 5), 10, temperature=0))
    assert lengths == [5] + [1] * 9


def test_generation_leaves_the_model_as_it_was():
    model = small_model(dropout=0.1).train()
    for _ in model.generate(tokens(1, 3), 5):
        assert not model.training
        break
    assert model.training


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, None), (5, None), (1000, None), (None, 0.6), (None, 1e-6), (7, 0.8)]
)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_are_drawn_with_the_probabilities_of_transformers(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(1, 30) * 2
    kept = logits / temperature
    if top_k:
        kept = TopKLogitsWarper(min(top_k, 30))(None, kept)
    if top_p:
        kept = TopPLogitsWarper(top_p)(None, kept)
    expected = kept.softmax(-1)[0]
    n, options = 20_000, dict(temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = sample_token(logits.expand(n, -1), **options).flatten()
    frequency = torch.bincount(drawn, minlength=30) / n
    assert not frequency[expected == 0].any()
    torch.testing.assert_close(frequency, expected, rtol=0, atol=0.02)


def test_other_devices_take_the_fused_attention(monkeypatch):
    """What a GPU runs is `scaled_dot_product_attention`; the meta device stands for one here."""
    calls, fused = [], F.scaled_dot_product_attention
    watched = lambda *a, **k: calls.append(k) or fused(*a, **k)  # noqa: E731
    monkeypatch.setattr(model_module.F, "scaled_dot_product_attention", watched)
    with torch.device("meta"):
        model = GPT(GPTConfig(**SMALL))
        caches = [model_module.KVCache(SMALL["block_size"]) for _ in range(3)]
        model(torch.zeros(2, 23, dtype=torch.int64), caches=caches)
        model(torch.zeros(2, 1, dtype=torch.int64), caches=caches)  # one query sees all keys
    assert [call["is_causal"] for call in calls] == [True] * 3 + [False] * 3
