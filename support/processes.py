"""One process, or the several processes that torchrun started."""

import atexit
import os
import sys
from collections.abc import Callable
from configurator import UserError
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from support.runtime import resolve_device


class Processes:
    """This process among those of torchrun: its rank, their count, its device.

    Without torchrun rank is 0, count is 1, and every method works as if on one process.
    """

    def __init__(self, device: str = "auto", backend: str = "auto") -> None:
        self.distributed = "RANK" in os.environ
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.is_first = self.rank == 0  # the only one that writes and prints
        self.device = resolve_device(device)
        if self.distributed:
            self._join(backend)

    def _join(self, backend: str) -> None:
        """Meet the other processes. Raises UserError for what can not work here."""
        for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(
                    f"the environment has RANK but no {name}; start with torchrun, or unset RANK"
                )
        if self.device.type == "cuda":
            rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if rank >= count:
                raise UserError(f"torch finds {count} GPUs here; use --nproc_per_node={count}")
            self.device = resolve_device(f"cuda:{rank}")
            torch.cuda.set_device(self.device)
        elif self.device.type == "mps":  # no backend works with it
            self.device = torch.device("cpu")
        has_nccl = self.device.type == "cuda" and dist.is_nccl_available()
        if backend == "auto":
            backend = "nccl" if has_nccl else "gloo"
        if backend == "nccl" and not has_nccl:
            raise UserError(f"backend=nccl does not work on {self.device} here; use --backend=gloo")
        options = {"device_id": self.device} if backend == "nccl" else {}
        env = os.environ
        if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and env.get("GROUP_WORLD_SIZE") == "1":
            # Restarted workers find the store of the attempt before, with the addresses of dead
            # processes, and gloo waits half an hour for them. A prefix keeps the attempts apart.
            # (On several machines the attempts are counted apart, so the prefix would not match.)
            store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
            store = dist.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", store)
            options |= {"store": store, "rank": self.rank, "world_size": self.count}
        # The timeout is short while the processes connect, because a restarted worker may wait for
        # a dead address. Later it is long: rank 0 may download a model while the others wait.
        dist.init_process_group(backend, timeout=timedelta(minutes=2), **options)
        dist.barrier()  # none may end, in an error, while another still connects
        dist.distributed_c10d._set_pg_timeout(timedelta(hours=1))

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind, error, _) -> None:
        """Wait for the others at the end of a run; after an error, leave without waiting.

        When the first process ends in an error, the others lose their connection. They end without
        a traceback, so that the error of the first process is the last line on the screen.
        """
        if not self.distributed:
            return
        if kind is None or (kind is SystemExit and error.code >= 128):  # or stopped by a signal
            # DistributedDataParallel keeps gloo's threads alive, and a thread that holds a tensor
            # when Python ends aborts it (https://github.com/pytorch/pytorch/pull/179291).
            try:
                dist.barrier()
                dist.destroy_process_group()
                return
            except RuntimeError:  # another process has ended in an error, and has said why
                atexit.register(end_at_once)
                raise SystemExit(1) from None
        # Without such a meeting the threads may still be at work, so end as soon as the error is
        # on the screen: to close the connections first may abort Python, or wait for the others.
        atexit.register(end_at_once)
        words = str(error).lower()
        lost = isinstance(error, RuntimeError) and ("connection" in words or "gloo" in words)
        if lost and not self.is_first:
            raise SystemExit(1)

    def share(self, passes: int) -> range:
        """Return which of a step's forward passes are this process's. Raises UserError."""
        if passes % self.count:
            raise UserError(
                f"gradient_accumulation_steps={passes} can not be divided among {self.count} "
                f"processes; set it to a multiple of {self.count}"
            )
        each = passes // self.count
        return range(self.rank * each, (self.rank + 1) * each)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return `model`, made to average its gradients over all processes while they are computed.

        Wrap before torch.compile, which then splits the graph: the gradients of the last layers
        are exchanged while the backward pass of the first layers still runs.
        """
        if not self.distributed:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def mean(self, values: Tensor) -> Tensor:
        """Return the average of `values` over all processes, without waiting for the device."""
        return self.sum(values) / self.count

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes, without waiting for the device."""
        if self.distributed:
            dist.all_reduce(values)
        return values

    def gather(self, value: str) -> list[str]:
        """Return the `value` of every process."""
        values = [value] * self.count
        if self.distributed:
            dist.all_gather_object(values, value)
        return values

    def in_turn(self, function: Callable):
        """Return function(); on each machine one process calls it before the others do."""
        early = int(os.environ.get("LOCAL_RANK", 0)) == 0
        result = function() if early else None
        self.gather("done")
        return result if early else function()


def end_at_once() -> None:
    """End this process with exit code 1, without Python's clean-up, which waits for threads."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(1)
