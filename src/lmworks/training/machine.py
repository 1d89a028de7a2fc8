"""What this processor does best: threads, memory that is kept, and the number format of matrix products.

bf16 halves the traffic and uses the matrix units of recent processors; on others it is emulated and slow. So the choice
is measured on throwaway copies of the model, and said.
"""

from __future__ import annotations

import copy
import ctypes
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lmworks.base.threads import cpu_count
from lmworks.training.objectives import Objective

ROUNDS = 3
WORTH = 1.1  # bf16 must be this much faster to be chosen: fp32 is exact
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
KEPT = 2**31 - 1


def use_threads(recorded: int | None = None) -> int:
    """Use every processor this process may have, or as many as a resumed run used before; return the number."""
    threads = min(recorded or cpu_count(), max(cpu_count(), 1))
    torch.set_num_threads(threads)
    return threads


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step instead of handing it back and faulting it in again.

    A step frees and takes the same hundreds of megabytes; without this, a tenth to a third of its time is page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_TOP_PAD, 64 * 2**20)


def has_bf16() -> bool:
    """Tell whether the processor multiplies bf16 in hardware."""
    abilities = torch.cpu.get_capabilities()
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16") or abilities.get("bf16"))


def autocast(device: str, dtype: str) -> torch.autocast:
    """Return the context in which matrix products run in this dtype; weights and sums stay fp32."""
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16")


def choose_dtype(model: nn.Module, objective: Objective, batch: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return the faster of "fp32" and "bf16" for this model and batch, and a sentence that says why."""
    device = next(model.parameters()).device.type
    if device == "cpu" and not has_bf16():
        return "fp32", "fp32: this processor has no bf16 units"
    trial = copy.deepcopy(model)
    best = {"fp32": float("inf"), "bf16": float("inf")}
    for i in range(ROUNDS + 1):
        for dtype in best:
            start = time.perf_counter()
            with autocast(device, dtype):
                loss = objective(trial, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            trial.zero_grad()
            if i > 0:  # the first round warms up
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    gain = best["fp32"] / best["bf16"]
    if gain >= WORTH:
        return "bf16", f"bf16: {gain:.1f} times as fast as fp32 here"
    return "fp32", f"fp32: bf16 would be {gain:.2f} times as fast here"
