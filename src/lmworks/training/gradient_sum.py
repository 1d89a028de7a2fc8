"""The sum of gradients over processes, in buckets that leave while the backward pass is still at work.

A bucket holds gradients of one dtype and, behind them, one number a parameter: on how many ranks it has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lmworks.training.distributed import Processes

BUCKET_BYTES = 25 * 2**20  # of gradients that are sent at once


class GradientSum:
    """The sum of one process's gradients: they are already there."""

    def expect(self) -> None:
        """Say that the next backward pass is the last of this step, so that sums may start while it runs."""

    def finish(self) -> None:
        """Leave the sums of this step in `grad` on every rank."""

    def close(self) -> None:
        """Take the hooks off the parameters."""


class Bucket:
    """Gradients that are sent at once."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        sizes = [p.numel() for p in parameters]
        self.flat = torch.empty(sum(sizes) + len(parameters), dtype=parameters[0].dtype, device=parameters[0].device)
        *pieces, self.counts = torch.split(self.flat, [*sizes, len(parameters)])
        self.views = [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
        self.missing = {id(p) for p in parameters}
        self.work: Any = None

    def fill(self) -> None:
        """Copy the gradients in; zeros where this rank has none."""
        for view, p in zip(self.views, self.parameters, strict=True):
            view.zero_() if p.grad is None else view.copy_(p.grad)
        self.counts.copy_(torch.tensor([float(p.grad is not None) for p in self.parameters]))

    def empty(self) -> None:
        """Make the sums the gradients; a parameter of which no rank has one keeps none."""
        for view, p, count in zip(self.views, self.parameters, self.counts.tolist(), strict=True):
            p.grad = view if count else None
        self.missing, self.work = {id(p) for p in self.parameters}, None


class BucketSum(GradientSum):
    """Sums gradients over processes in buckets, each of which leaves as soon as the backward pass has filled it.

    Buckets go from the last parameter to the first, about the order in which gradients come, and every rank sends them
    in this order, whatever the order in which its own are filled.
    """

    def __init__(self, ranks: Processes, parameters: Sequence[nn.Parameter]) -> None:
        self.ranks, self.buckets = ranks, make_buckets(parameters)
        self.bucket_of = {id(p): bucket for bucket in self.buckets for p in bucket.parameters}
        self.hooks = [p.register_post_accumulate_grad_hook(self.arrive) for p in parameters]  # type: ignore[no-untyped-call]
        self.expected, self.sent = False, 0

    def expect(self) -> None:
        """Say that the next backward pass is the last of this step, so that sums may start while it runs."""
        self.expected = True

    def arrive(self, parameter: Tensor) -> None:
        """Send every bucket that is whole, up to the first that is not."""
        if not self.expected:
            return
        bucket = self.bucket_of[id(parameter)]
        if bucket.work is not None:
            raise RuntimeError("a gradient came twice in one backward pass, after it had been sent")
        bucket.missing.discard(id(parameter))
        while self.sent < len(self.buckets) and not self.buckets[self.sent].missing:
            self.send()

    def send(self) -> None:
        """Start the sum of the next bucket."""
        bucket = self.buckets[self.sent]
        bucket.fill()
        with self.ranks.connected():
            bucket.work = self.ranks.dist.all_reduce(bucket.flat, group=self.ranks.group, async_op=True)
        self.sent += 1

    def finish(self) -> None:
        """Leave the sums of this step in `grad` on every rank."""
        while self.sent < len(self.buckets):
            self.send()
        for bucket in self.buckets:
            with self.ranks.connected():
                bucket.work.wait()
            bucket.empty()
        self.expected, self.sent = False, 0

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self.hooks:
            hook.remove()


def make_buckets(parameters: Sequence[nn.Parameter]) -> list[Bucket]:
    """Return buckets of at most BUCKET_BYTES, or one parameter, each of one dtype and device; the last come first."""
    groups: list[list[nn.Parameter]] = []
    held = 0
    for p in reversed(parameters):
        last = groups[-1][-1] if groups else None
        if last is None or held + p.nbytes > BUCKET_BYTES or (last.dtype, last.device) != (p.dtype, p.device):
            groups.append([])
            held = 0
        groups[-1].append(p)
        held += p.nbytes
    return [Bucket(group) for group in groups]
