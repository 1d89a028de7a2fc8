"""What this processor does best: threads, memory that is kept, the number format of products, compiled blocks.

bf16 halves the traffic and uses the matrix units of recent processors; on others it is emulated and slow. Compiling
fuses the small operations around the products, but takes a while and a C++ compiler. So both are measured on throwaway
copies of the model before the first step, and what was chosen is said and recorded.
"""

from __future__ import annotations

import copy
import ctypes
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmworks.base.errors import InputError
from lmworks.base.threads import thread_count
from lmworks.base.types import Batch
from lmworks.training.objectives import Objective

ROUNDS = 3
WORTH = 1.1  # bf16, or compiling, must be this much faster to be chosen
WORTH_COMPILING = 600.0  # seconds of training from which compiling, which takes about 20, is tried
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
KEPT = 2**31 - 1
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_LOSS_SCALE, GROWTH_STEPS = 2.0**16, 2000  # of fp16, as torch.amp.GradScaler has them


def use_threads(before: int | None, say: Callable[[str], None]) -> int:
    """Use every processor this process may have, or the number of `before` a resume; return the number.

    Sums are split by threads, so another number gives other last bits: that is said.
    """
    threads = min(before or thread_count(), thread_count())
    if before and threads != before:
        say(f"{threads} threads instead of {before}: the last bits may differ")
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


def find_device() -> torch.device:
    """Return where to train: the graphics card in use, where there is one; LMWORKS_DEVICE names another."""
    named = os.environ.get("LMWORKS_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=named).device
    except (RuntimeError, AssertionError) as error:
        raise InputError("LMWORKS_DEVICE names no device that works here", found=named, expected="cpu or cuda",
                         fix=str(error).splitlines()[0]) from None  # fmt: skip


def has_bf16() -> bool:
    """Tell whether the processor multiplies bf16 in hardware."""
    abilities = torch.cpu.get_capabilities()
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16") or abilities.get("bf16"))


def autocast(device: str, dtype: str) -> torch.autocast:
    """Return the context in which matrix products run in this dtype; weights and sums stay fp32."""
    return torch.autocast(device, HALVES.get(dtype, torch.bfloat16), enabled=dtype in HALVES)


def check_dtype(dtype: str, device: str) -> None:
    """Raise InputError for fp16 on a processor: only CUDA devices gain from it."""
    if dtype == "fp16" and device != "cuda":
        raise InputError("fp16 needs a CUDA device", found=device, expected="cuda", fix="--dtype bf16, or auto")


def next_loss_scale(scale: float, good_steps: int, *, overflow: bool) -> tuple[float, int]:
    """Return the loss scale after a step, and the steps since it changed: halved by an overflow, doubled by patience.

    fp16 cannot hold gradients below 6e-8; multiplied by the scale they are kept (Micikevicius et al. 2018).
    """
    if overflow:
        return scale / 2, 0
    return (scale * 2, 0) if good_steps + 1 == GROWTH_STEPS else (scale, good_steps + 1)


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return the arrays of a batch as tensors on this device."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in batch.items()}


def choose_speed(
    model: nn.Module, objective: Objective, batch: Mapping[str, Tensor], *, dtype: str, compiling: str, parts: int
) -> tuple[str, bool, str]:
    """Return the dtype, whether to compile, and a sentence that says why, for a run of `parts` batches like this one.

    `dtype` "auto" measures fp32 and bf16; `compiling` "auto" tries it where the run is long enough to win it back.
    """
    if dtype != "auto" and compiling == "never":
        return dtype, False, f"{dtype} (as asked)"
    trial = copy.deepcopy(model)
    device = next(model.parameters()).device.type
    why = "as asked"
    if dtype == "auto" and device == "cpu" and not has_bf16():
        dtype, why = "fp32", "this processor has no bf16 units"
    seconds = measure(trial, objective, batch, ("fp32", "bf16") if dtype == "auto" else (dtype,))
    if dtype == "auto":
        gain = seconds["fp32"] / seconds["bf16"]
        dtype = "bf16" if gain >= WORTH else "fp32"
        why = f"bf16 is {gain:.2g} times as fast here"
    long_run = seconds[dtype] * parts >= WORTH_COMPILING and can_compile()
    if compiling == "always" or (compiling == "auto" and long_run):
        try:
            compile_blocks(trial)
            gain = seconds[dtype] / measure(trial, objective, batch, (dtype,))[dtype]
        except Exception as error:  # the compiler's errors have no common class
            return dtype, False, f"{dtype} ({why}); not compiled: {str(error).splitlines()[0]}"
        if compiling == "always" or gain >= WORTH:
            return dtype, True, f"{dtype} ({why}), compiled blocks: {gain:.2g} times as fast as without"
        why = f"{why}; compiling would bring {gain:.2g} times the speed"
    return dtype, False, f"{dtype} ({why})"


def measure(
    model: nn.Module, objective: Objective, batch: Mapping[str, Tensor], dtypes: tuple[str, ...]
) -> dict[str, float]:
    """Return the seconds of the fastest forward and backward pass in each dtype; they take turns."""
    device = next(model.parameters()).device.type
    best = dict.fromkeys(dtypes, math.inf)
    for i in range(ROUNDS + 1):
        for dtype in dtypes:
            start = time.perf_counter()
            with autocast(device, dtype):
                loss = objective(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            model.zero_grad()
            if i > 0:  # the first round warms up
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best


def can_compile() -> bool:
    """Tell whether there is a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of every stack: equal blocks share one compilation, so that depth costs nothing."""
    from torch._inductor import config

    config.compile_threads = 1  # no pool of processes that outlives a Ctrl-C
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            for block in stack:
                block.compile(dynamic=False)  # one kernel a shape: the order of shapes cannot matter on resume


def as_written(compiled: bool) -> AbstractContextManager[Any]:
    """Return the context in which compiled blocks run as they are written: validation has other shapes."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def uncompile_blocks(model: nn.Module) -> None:
    """Let every module run as it is written again."""
    for module in model.modules():
        module._compiled_call_impl = None


@contextmanager
def recompute_blocks(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Keep only each block's input for the backward pass and compute the rest again (Chen et al. 2016).

    Costs about two fifths more time and saves the activations of all blocks but one. The block's dropout is drawn again
    from the same random state, so the gradients are the same. Validation and other modes than training are as before.
    """
    blocks = [block for stack in model.modules() if isinstance(stack, nn.ModuleList) for block in stack]
    if not enabled:
        yield
        return
    try:
        for block in blocks:
            block.forward = partial(run_block, block, block.forward)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)  # that of its class again


def run_block(block: nn.Module, forward: Callable[..., Any], *arguments: Any) -> Any:
    """Run a block, without keeping its activations where gradients will be taken."""
    if block.training and torch.is_grad_enabled():
        return checkpoint(forward, *arguments, use_reentrant=False)
    return forward(*arguments)
