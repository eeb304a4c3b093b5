"""One process, or the several processes that torchrun started."""

import atexit
import os
import sys
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError
from support.runtime import resolve_device


class Processes:
    """This process among those of torchrun: its rank, their count, its device.

    Without torchrun rank is 0, count is 1, and every method works as if on one process.
    """

    def __init__(self, device: str = "auto", backend: str = "auto") -> None:
        self.distributed = os.environ.get("RANK", "").isdecimal()  # torchrun's is a number
        self.rank = int(os.environ["RANK"]) if self.distributed else 0
        self.count = int(os.environ.get("WORLD_SIZE") or 1) if self.distributed else 1
        self.is_first = self.rank == 0  # the only one that writes and prints
        self.device = resolve_device(device)
        if self.distributed:
            self._join(backend)

    def _join(self, backend: str) -> None:
        """Meet the other processes. Raises UserError for what can not work here."""
        env = os.environ
        needed = {"WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
        if missing := sorted(needed - env.keys()):
            what = f"the environment has RANK but no {missing[0]}"
            raise UserError(f"{what}; start with torchrun, or unset RANK")
        if self.device.type == "cuda":
            rank, count = int(env["LOCAL_RANK"]), torch.cuda.device_count()
            if rank >= count:
                raise UserError(f"torch finds {count} GPUs here; use --nproc_per_node={count}")
            self.device = resolve_device(f"cuda:{rank}")
            torch.cuda.set_device(self.device)
        elif self.device.type == "mps":  # no backend works with it
            self.device = torch.device("cpu")
        if self.device.type != "cuda" or not dist.is_nccl_available():
            backend = "gloo"  # nccl needs a GPU of NVIDIA, and has no Windows build
        elif backend == "auto":
            backend = "nccl"
        options = {"device_id": self.device} if backend == "nccl" else {}
        if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and env.get("GROUP_WORLD_SIZE") == "1":
            # Restarted workers find the store of the attempt before, with the addresses of dead
            # processes, and gloo waits half an hour for them. A prefix keeps the attempts apart.
            # (On several machines the attempts are counted apart, so the prefix would not match.)
            store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
            store = dist.PrefixStore(f"attempt {env['TORCHELASTIC_RESTART_COUNT']}", store)
            options |= {"store": store, "rank": self.rank, "world_size": self.count}
        # Long, because the others wait while the first process saves and writes samples.
        dist.init_process_group(backend, timeout=timedelta(hours=1), **options)
        dist.barrier()  # none may end, in an error, while another still connects

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
                pass
        # Without such a meeting the threads may still be at work, so end as soon as the error is
        # on the screen: to close the connections first may abort Python, or wait for the others.
        atexit.register(end_at_once)
        lost = isinstance(error, RuntimeError) and not self.is_first
        lost = lost and any(word in str(error).lower() for word in ("connection", "gloo"))
        if lost or kind in (None, SystemExit):
            raise SystemExit(1) from None

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

    def sum(self, values: Tensor) -> Tensor:
        """Return `values`, overwritten by their sum over all processes. Does not wait for a GPU."""
        if self.distributed:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true in any process. With several, this waits for the device."""
        if not self.distributed:
            return flag
        return self.sum(torch.tensor(float(flag), device=self.device)).item() > 0

    def gather(self, value: str) -> list[str]:
        """Return the `value` of every process."""
        values = [value] * self.count
        if self.distributed:
            dist.all_gather_object(values, value)
        return values

    def say(self, line: str) -> None:
        """Print a line, in the first process alone."""
        if self.is_first:
            print(line, flush=True)


def end_at_once() -> None:
    """End this process with exit code 1, without Python's clean-up, which waits for threads."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(1)
