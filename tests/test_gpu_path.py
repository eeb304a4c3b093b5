"""What a GPU would run, checked without one: waits, devices, graphs, precision, operations."""

import socket

import pytest
import torch
import torch.distributed as dist
from conftest import logged
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.flop_counter import FlopCounterMode

import model
import train
from configurator import UserError
from model import GPT, GPTConfig
from support import runtime
from support.processes import Processes

# Waiting, and tensors on the wrong device: the meta device has shapes and dtypes but no values, so
# every read of a value raises, and so does every product with a tensor on the CPU.


@pytest.fixture
def meta_run(tiny_run, monkeypatch):
    """A function: train on the meta device, and return "batch" and "wait" as they happened."""
    from torch.optim import optimizer as torch_optimizer

    kinds = torch_optimizer._get_fused_kernels_supported_devices()
    fused = [*kinds, "meta"]
    monkeypatch.setattr(torch_optimizer, "_get_fused_kernels_supported_devices", lambda: fused)
    monkeypatch.setattr(runtime, "resolve_dtype", lambda _name, _device: torch.bfloat16)
    monkeypatch.setattr(runtime, "autocast", lambda *_: torch.autograd.set_grad_enabled(True))
    monkeypatch.setattr(train, "save_checkpoint", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: events.append("wait") or [2.0, 1.0])
    events, gather = [], train.data.gather

    def gather_and_note(*args):
        events.append("batch")
        return gather(*args)

    def run(**changed) -> list[str]:
        processes = Processes("cpu")
        processes.device = torch.device("meta")
        train.train(train.TrainConfig(**tiny_run.options | changed), processes)
        return events

    monkeypatch.setattr(train.data, "gather", gather_and_note)
    return run


@pytest.mark.parametrize("changed", [{}, {"optimizer": "muon", "dropout": 0.1}], ids=str)
def test_a_step_waits_once_for_the_device_and_has_drawn_the_next_batch_before(meta_run, changed):
    events = meta_run(max_iters=3, eval_iters=1, **changed)
    evaluation = [*["batch"] * 4, "wait"] * 2  # 16 sequences of train.bin and of val.bin
    assert events == ["batch", *evaluation, *["batch", "batch", "wait"] * 3, *evaluation]


def test_a_compiled_model_exchanges_gradients_while_the_backward_pass_runs(tiny_run, monkeypatch):
    """DistributedDataParallel splits the graph only if it is inside torch.compile."""
    shape = {"n_layer": 3, "n_embd": 128, "dtype": "float32", "max_iters": 3}
    plain = logged(tiny_run(out_dir="out/plain", **shape))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    for name, value in (place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
        monkeypatch.setenv(name, str(value))
    graphs, compile_, compile_model, counts = [], torch.compile, runtime.compile_model, []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def compile_and_count(*args):
        compiled = compile_model(*args)
        counts.append(len(graphs))
        return compiled

    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend=backend))
    monkeypatch.setattr(runtime, "compile_model", compile_and_count)
    compiled = logged(tiny_run(compile=True, **shape))
    assert counts[0] > 1 and len(graphs) == counts[0]  # and nothing is compiled again
    assert not dist.is_initialized()
    for a, b in zip(plain, compiled, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_auto_asks_about_the_device_that_is_used(monkeypatch):
    capabilities = {"cuda:0": (8, 0), "cuda:1": (7, 5)}  # an A100 and a T4
    ask = lambda device: capabilities[str(device)]  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_capability", ask)
    assert runtime.resolve_dtype("auto", torch.device("cuda:0")) == torch.bfloat16
    assert runtime.resolve_dtype("auto", torch.device("cuda:1")) == torch.float32


def test_more_processes_than_gpus_are_refused_with_the_number_of_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "5")
    with pytest.raises(UserError, match="torch finds 4 GPUs here; use --nproc_per_node=4"):
        Processes()


def test_deterministic_reaches_a_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", calls.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.append)
    runtime.set_up(torch.device("cuda"))
    runtime.set_up(torch.device("cuda"), deterministic=True)
    assert calls == ["high", "high", True]


def test_generation_never_uses_cudnn_attention(monkeypatch):
    """On Hopper cuDNN would build a new plan for every length of the cache: seconds per text."""
    allowed, fused = [], model.F.scaled_dot_product_attention

    def watch(*args, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return fused(*args, **options)

    monkeypatch.setattr(model.F, "scaled_dot_product_attention", watch)
    small = GPT(GPTConfig(vocab_size=7, block_size=8, n_layer=1, n_head=1, n_embd=4))
    list(small.generate(torch.zeros(1, 2, dtype=torch.int64), 4))
    assert allowed == [False] * 3  # the prompt of two tokens takes the CPU's own path
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("tie_weights", [True, False])
def test_operations_per_token_are_those_that_torch_counts(tie_weights):
    config = GPTConfig(vocab_size=32000, block_size=512, tie_weights=tie_weights)
    with torch.device("meta"):
        gpt, ids = GPT(config), torch.zeros(1, 512, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        gpt(ids, ids)[1].backward()
    assert gpt.flops_per_token(512) * 512 == counter.get_total_flops()
    assert gpt.flops_per_token(512) == 713_687_040  # phase 3
