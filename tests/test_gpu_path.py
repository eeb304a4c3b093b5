"""What a GPU would run, checked without one: waits, devices, graphs, precision, operations."""

import contextlib
import math
import socket
from configurator import UserError, read_options
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.flop_counter import FlopCounterMode

import model
from model import GPT, GPTConfig
from support import runtime
from support.processes import Processes
from train import TrainConfig, Trainer


def make_trainer(tiny_run, processes: Processes | None = None, **changed) -> Trainer:
    arguments = [f"--{name}={value}" for name, value in {**tiny_run.options, **changed}.items()]
    config = read_options(TrainConfig, arguments)
    return Trainer(config, processes or Processes("cpu"))


# Waiting, and tensors on the wrong device: the meta device has shapes and dtypes but no values, so
# every read of a value raises, and so does every product with a tensor on the CPU.


@pytest.fixture
def meta_trainer(tiny_run, monkeypatch):
    """Return a function: a trainer whose model, optimizers and batches are on the meta device."""
    from torch.optim import optimizer as torch_optimizer

    kinds = torch_optimizer._get_fused_kernels_supported_devices()
    fused = [*kinds, "meta"]
    monkeypatch.setattr(torch_optimizer, "_get_fused_kernels_supported_devices", lambda: fused)
    monkeypatch.setattr(runtime, "resolve_dtype", lambda _name, _device: torch.bfloat16)
    monkeypatch.setattr(runtime, "autocast", lambda *_: contextlib.nullcontext())

    def make(**changed) -> Trainer:
        processes = Processes("cpu")
        processes.device = torch.device("meta")
        return make_trainer(tiny_run, processes, **changed)

    return make


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_step_reads_no_value_from_the_device(meta_trainer, optimizer):
    trainer = meta_trainer(optimizer=optimizer, dropout=0.1)
    for step in range(3):
        figures = trainer.train_step(step, lr=1e-3)
    assert figures.device.type == "meta" and figures.shape == (3,)
    with pytest.raises(NotImplementedError, match="no data"):  # this is where a run waits
        trainer.read(figures)


def test_a_batch_that_stays_on_the_cpu_is_noticed(meta_trainer, monkeypatch):
    """The test above would see a mix of devices: here is one."""
    trainer = meta_trainer()
    on_cpu = [(torch.zeros(4, 16, dtype=torch.int64),) * 2]
    with pytest.raises(RuntimeError, match="device"):
        trainer.train_step(0, lr=1e-3, batches=on_cpu)


# Several processes


def test_a_compiled_model_exchanges_gradients_while_the_backward_pass_runs(tiny_run, monkeypatch):
    """DistributedDataParallel splits the graph only if it is inside torch.compile."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    for name, value in (place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
        monkeypatch.setenv(name, str(value))
    graphs, compile_ = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend=backend))
    shape = {"n_layer": 3, "n_embd": 128, "compile": True, "dtype": "float32"}
    plain = make_trainer_alone(tiny_run, monkeypatch, **shape)
    with Processes("cpu", "gloo") as processes:
        trainer = make_trainer(tiny_run, processes, **shape)
        assert "compiled in" in runtime.compile_model(trainer)
        compiled = len(graphs)
        losses = [trainer.read(trainer.train_step(step, lr=1e-3))[0] for step in range(3)]
        assert compiled > 1 and len(graphs) == compiled  # and nothing is compiled again
    assert not dist.is_initialized()
    expected = [plain.read(plain.train_step(step, lr=1e-3))[0] for step in range(3)]
    assert losses == pytest.approx(expected, rel=1e-5)


def make_trainer_alone(tiny_run, monkeypatch, **shape) -> Trainer:
    with monkeypatch.context() as context:
        context.delenv("RANK")
        context.delenv("WORLD_SIZE")
        return make_trainer(tiny_run, **shape)


# Precision


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_after_a_loss_of_nan_no_step_changes_a_weight(tiny_run, dtype, optimizer):
    """Also if later losses are finite, and nobody has read the figures yet."""
    trainer = make_trainer(tiny_run, dtype=dtype, optimizer=optimizer)
    step_model = trainer.step_model
    weights = []
    for step in range(6):
        factor = math.nan if step == 3 else 1.0
        trainer.step_model = lambda x, y, factor=factor: (None, step_model(x, y)[1] * factor)
        figures = trainer.train_step(step, lr=0.01)
        weights.append([p.detach().clone() for p in step_model.parameters()])
    moved = [not all(map(torch.equal, *pair)) for pair in pairwise(weights)]
    assert moved == [True, True, False, False, False]
    trainer.step_model = step_model
    with pytest.raises(UserError, match="step 3: the loss is nan"):
        trainer.read(figures)


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


# Operations


@pytest.mark.parametrize("tie_weights", [True, False])
def test_operations_per_token_are_those_that_torch_counts(tie_weights):
    config = GPTConfig(vocab_size=32000, block_size=512, tie_weights=tie_weights)
    with torch.device("meta"):
        gpt, ids = GPT(config), torch.zeros(1, 512, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        gpt(ids, ids)[1].backward()
    assert gpt.flops_per_token(512) * 512 == counter.get_total_flops()
    assert gpt.flops_per_token(512) == 713_687_040  # phase 3
