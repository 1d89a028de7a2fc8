"""One run on several processes, one a device: all that the training loop knows of the others.

The batch of a step is the same whatever the number of ranks. It is computed in P parts, which are dealt to the ranks
in order, and the gradient is the sum over ranks of

    d/dw  (sum of the loss over the rank's parts) / (count of the whole batch)

so it equals that of one process, however unevenly rows and tokens are spread. torch's DistributedDataParallel gives
another one, the average of each rank's mean, in which a token counts more on a rank that has few of them; and it hooks
a model's forward, which objectives do not call: they ask for hidden_states, and for the head where a label is scored.

P and the share of the rows in each part are part of a run's state. A resumed run keeps them whatever its number of
ranks, so the dropout of a part, which follows from (seed, step, part), is the same too.

Only rank 0 touches the run folder: the others get their state, weights and moments from it, so the folder need not be
shared between machines.

Shapes: P parts, W ranks.
"""

from __future__ import annotations

import atexit
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lmworks.base.errors import InputError, LmworksError, TrainingError
from lmworks.base.launch import Launch, read_launch
from lmworks.training.gradient_sum import BucketSum, GradientSum

T = TypeVar("T")
TIMEOUT = timedelta(hours=6)  # the others wait while rank 0 scores, saves or publishes
LINGER = timedelta(seconds=10)  # for the rank that tells an error: a launcher ends it as soon as another has failed


class Ranks:
    """A process that trains alone, and what it would ask of others if there were any."""

    rank, world = 0, 1
    device: torch.device | None = None  # where the model must be; None: where it is

    def once(self, make: Callable[[], T]) -> T:
        """Call on rank 0 alone and give every rank what it returned; its error is raised on every rank."""
        return make()

    def together(self) -> AbstractContextManager[None]:
        """Return the context of what every rank does for itself: the error of one is raised on all, and told once."""
        return nullcontext()

    def on_first(self, context: AbstractContextManager[T]) -> AbstractContextManager[T]:
        """Enter a context on rank 0 alone; every rank gets its value, or its error."""
        return context

    def same(self, error: LmworksError) -> LmworksError:
        """Return an error that every rank raises at this point: rank 0 alone tells it."""
        return error

    def sum(self, *values: float) -> tuple[float, ...]:
        """Return the sum over ranks of each value, the same bits on each rank."""
        return values

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on some rank."""
        return flag

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks."""
        return [value]

    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite these tensors with those of rank 0."""

    def copy_named(self, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors that rank 0 makes, on every rank."""
        return make()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> GradientSum:
        """Return what sums the gradients of these parameters over the ranks."""
        return GradientSum()

    def place(self, model: nn.Module, objective: object = None) -> None:
        """Bring the model to this rank's device; raise InputError for an objective whose rows cannot be dealt."""

    def check_same(self, name: str, value: str) -> None:
        """Raise InputError where the ranks have different values."""

    def choose(self, callbacks: Sequence[T]) -> list[T]:
        """Return those that are called on this rank: on others than the first only where `every_rank` is set."""
        return list(callbacks)


class Processes(Ranks):
    """The processes that a launcher started, joined by torch.distributed: gloo between CPUs, NCCL between GPUs."""

    def __init__(self, launch: Launch) -> None:
        import torch.distributed as dist

        self.dist, self.rank, self.world = dist, launch.rank, launch.world
        backend = "gloo"
        if torch.cuda.is_available():
            if launch.local_rank >= torch.cuda.device_count():
                raise InputError(
                    "there are more processes than GPUs on this machine",
                    found=f"{launch.local_world} processes, {torch.cuda.device_count()} GPUs",
                    fix="start one process a GPU with --nproc-per-node",
                )
            self.device, backend = torch.device("cuda", launch.local_rank), "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(self.device)
        self.healthy, self.group = True, None
        with self.connected():
            if dist.is_initialized():  # by a cluster's library, with a backend and a patience of its own
                self.group = dist.new_group(backend=backend, timeout=TIMEOUT)
            else:
                dist.init_process_group(backend, timeout=TIMEOUT)
                atexit.register(self.leave)

    def leave(self) -> None:
        """Take leave of the others; after an error there is nobody to take leave of."""
        if self.healthy and self.dist.is_initialized():
            self.dist.destroy_process_group()

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Turn a broken connection into a TrainingError that rank 0 alone tells."""
        try:
            yield
        except RuntimeError as error:
            self.healthy = False
            raise self.hush(
                TrainingError(
                    "another process of this run has ended",
                    found=str(error).splitlines()[0][:200],
                    fix="see why above; then run the same command with --resume",
                )
            ) from error

    def hush(self, error: LmworksError) -> LmworksError:
        """Mark an error as told by rank 0, where this is another."""
        error.silent = self.rank != 0
        return error

    def once(self, make: Callable[[], T]) -> T:
        """Call on rank 0 alone and give every rank what it returned; its error is raised on every rank."""
        own: Exception | None = None
        data = b""
        if self.rank == 0:
            try:
                data = pickle.dumps((make(), None))
            except Exception as error:
                own = error
                data = pickle.dumps((None, error if isinstance(error, LmworksError) else LmworksError(str(error))))
        with self.connected():
            (data,) = self.broadcast([data])
        if own is not None:
            self.healthy = False
            raise own
        value, told = pickle.loads(data)
        if told is not None:
            raise self.told(told, by=0)
        return cast(T, value)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Return the context of what every rank does for itself: the error of one is raised on all, and told once."""
        own: Exception | None = None
        try:
            yield
        except (LmworksError, OSError) as error:
            own = error
        told = None if own is None else own if isinstance(own, LmworksError) else LmworksError(str(own))
        for by, other in enumerate(self.gather(told)):
            if other is not None:
                self.healthy = False
                raise own if own is not None and by == self.rank else self.told(other, by=by)

    def told(self, error: LmworksError, *, by: int) -> LmworksError:
        """Return an error that another rank tells, once that rank has gone or had time to speak."""
        error.silent, self.healthy = True, False
        with suppress(RuntimeError):
            work: Any = self.dist.irecv(torch.empty(1), src=by, group=self.group)
            work.wait(LINGER)  # nothing is ever sent: it ends with the connection
        return error

    def same(self, error: LmworksError) -> LmworksError:
        """Return an error that every rank raises at this point: rank 0 alone tells it."""
        self.gather(None)  # until rank 0 has saved what it had to
        self.healthy = False
        return error if self.rank == 0 else self.told(error, by=0)

    @contextmanager
    def on_first(self, context: AbstractContextManager[T]) -> Iterator[T]:
        """Enter a context on rank 0 alone; every rank gets its value, or its error."""
        with ExitStack() as stack:
            yield self.once(lambda: stack.enter_context(context))
            self.once(stack.close)  # the others wait until it is left

    def sum(self, *values: float) -> tuple[float, ...]:
        """Return the sum over ranks of each value, added in their order, so that each rank has the same bits."""
        mine = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(self.world)]
        with self.connected():
            self.dist.all_gather(rows, mine, group=self.group)
        return tuple(sum(column) for column in zip(*(row.tolist() for row in rows), strict=True))

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on some rank."""
        return self.sum(float(flag))[0] > 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks."""
        values: list[Any] = [None] * self.world
        with self.connected():
            self.dist.all_gather_object(values, value, group=self.group)
        return values

    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite these tensors with those of rank 0."""
        with self.connected(), torch.no_grad():
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                data = whole.view(-1).view(torch.uint8)  # every dtype can be sent as bytes
                self.dist.broadcast(data, src=0, group=self.group)
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.copy_(whole)

    def copy_named(self, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors that rank 0 makes, on every rank."""
        mine = make() if self.rank == 0 else {}
        shapes = self.once(lambda: [(name, tensor.shape, tensor.dtype) for name, tensor in mine.items()])
        for name, shape, dtype in shapes if self.rank else ():
            mine[name] = torch.empty(shape, dtype=dtype, device=self.device)
        self.copy(mine.values())
        return mine

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> GradientSum:
        """Return what sums the gradients of these parameters over the ranks."""
        return BucketSum(self, parameters)

    def place(self, model: nn.Module, objective: object = None) -> None:
        """Bring the model to this rank's device; raise InputError for an objective whose rows cannot be dealt."""
        if self.device is not None:
            model.to(self.device)
        if getattr(objective, "compares_rows", False):
            raise self.same(
                InputError("texts that are compared with each other need one process", fix="start without torchrun")
            )

    def check_same(self, name: str, value: str) -> None:
        """Raise InputError where the ranks have different values."""
        values = self.gather(value)
        if len(set(values)) > 1:
            other = next(rank for rank, one in enumerate(values) if one != values[0])
            raise self.same(
                InputError(
                    f"the processes have different {name}",
                    found=f"those of rank {other} are not those of rank 0",
                    fix="give every machine the same files at the same paths, and the same version of lmworks",
                )
            )

    def choose(self, callbacks: Sequence[T]) -> list[T]:
        """Return those that are called on this rank: on others than the first only where `every_rank` is set."""
        return [one for one in callbacks if self.rank == 0 or getattr(one, "every_rank", False)]

    def broadcast(self, values: list[T]) -> list[T]:
        """Return the list of rank 0."""
        self.dist.broadcast_object_list(values, src=0, group=self.group)
        return values


@cache
def find_ranks() -> Ranks:
    """Return the processes that a launcher started together with this one, joined; else this process alone."""
    launch = read_launch()
    return Ranks() if launch.world == 1 else Processes(launch)
