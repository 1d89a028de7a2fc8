"""What a run will cost, before it starts: parameters, memory and disk by arithmetic, time by measuring a few steps."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lmworks.base.report import Cell, Report, Table, counted
from lmworks.base.threads import thread_count
from lmworks.training.train_config import count_moments
from lmworks.verbs.corpus import Corpus
from lmworks.verbs.run import disk_needed, make_model, make_network, train_config
from lmworks.verbs.settings import Settings

WARM_UP_STEPS, MEASURED_STEPS = 2, 4
BYTES_A_PARAMETER = 8  # weight and gradient, float32 each
BYTES_A_MOMENT = 4  # what the optimizer remembers of a parameter
BYTES_AN_ACTIVATION = 34 * 4  # kept for the backward pass, for each token, layer and unit of width
FIXED_MEMORY = 350_000_000  # the interpreter with torch


def estimate(corpus: Corpus, settings: Settings) -> Report:
    """Return parameters, memory, time and disk of a run; nothing is written."""
    tokens = (settings.batch_size or 0) * (settings.context or 0)
    layers = 1 if settings.gradient_checkpointing else settings.layers or 0  # of which all is kept at once
    activations = tokens // settings.accumulation * layers * (settings.hidden_size or 0)
    moments = count_moments(settings.optimizer, settings.momentum)
    network = make_model(make_network(settings, vocab_size=settings.vocab_size or 0), seed=None)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    memory = (
        FIXED_MEMORY + parameters * (BYTES_A_PARAMETER + moments * BYTES_A_MOMENT) + activations * BYTES_AN_ACTIVATION
    )
    seconds = measure_step(settings) * (settings.steps or 0)
    disk = disk_needed(settings)
    values = {
        "parameters": parameters,
        "train_bytes": corpus.train_bytes,
        "validation_bytes": corpus.validation_bytes,
        "memory_bytes": memory,
        "disk_bytes": disk,
        "train_seconds": round(seconds),
        "tokens_per_second": round(tokens * (settings.steps or 0) / seconds),
        "threads": thread_count(),
        "settings": settings.to_dict(),
    }
    rows: tuple[tuple[Cell, ...], ...] = (
        ("text", f"{corpus.train_bytes / 1e6:.2f} MB to train on, {corpus.validation_bytes / 1e6:.2f} MB held out"),
        ("parameters", f"{parameters:,}"),
        ("memory", f"about {memory / 1e9:.1f} GB"),
        ("disk", f"at most {disk / 1e6:,.0f} MB"),
        (
            "time",
            f"about {max(1, round(seconds / 60))} min of training: {counted(settings.steps or 0, 'step')} on "
            f"{counted(thread_count(), 'thread')}",
        ),
    )
    return Report("What this run would cost", values, tables=(Table("Estimate", ("what", "value"), rows),))


def measure_step(settings: Settings) -> float:
    """Return the seconds of one optimizer step of such a network on random tokens: the best of a few."""
    from lmworks.training.data import DataSource, TokenWindows
    from lmworks.training.distributed import Ranks
    from lmworks.training.masked import MaskedWindows
    from lmworks.training.objectives import CausalLoss
    from lmworks.training.trainer import Trainer

    steps = WARM_UP_STEPS + MEASURED_STEPS
    quick = replace(settings, steps=steps, eval_every=steps, warmup=1)
    stream = np.random.default_rng(0).integers(3, quick.vocab_size or 0, 64 * (quick.context or 0)).astype(np.uint32)
    size: dict[str, Any] = {"context": quick.context or 0, "batch_size": quick.batch_size or 0}
    data: DataSource = TokenWindows(stream, **size)
    if quick.is_masked:
        words = np.arange(len(stream), dtype=np.int32)
        data = MaskedWindows((stream, words), frame=(0, 1), mask_id=2, vocab_size=quick.vocab_size or 0, **size)
    model = make_model(make_network(quick, vocab_size=quick.vocab_size or 0))
    with TemporaryDirectory() as folder:
        config = train_config(quick)
        alone: dict[str, Any] = {"folder": folder, "stream": None, "ranks": Ranks()}
        Trainer(model, objective=CausalLoss(), data=data, config=config, **alone).fit()
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    times = [row["seconds"] for row in rows if "loss" in row]
    return float(min(after - before for before, after in pairwise(times[WARM_UP_STEPS - 1 :])))
