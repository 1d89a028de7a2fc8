"""A teacher and its student side by side: scores, size, and time on the same rows in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmworks.models.heads import Model
from lmworks.runtime.predictor import read_facts
from lmworks.runtime.torch_runtime import inference
from lmworks.text.labelled import Labelled
from lmworks.training.examples import collate_rows
from lmworks.training.finetune import Setup, Tuned, long_option, make_predictor
from lmworks.training.machine import to_device
from lmworks.training.measure import measure
from lmworks.training.objectives import CausalLoss
from lmworks.training.supervision import WORDS
from lmworks.training.tuning import Tuning
from lmworks.training.validation import held_out_loss

TIMED_ROWS, ROUNDS, WARM = 16, 21, 3  # rows of a batch that is timed, how often, and how often before that
SHARED = ("accuracy", "f1", "spearman")  # of which the student should keep much


def compare(
    teacher: Model, files: Path, tuned: Tuned, setup: Setup, held_out: Labelled, *, task: str, tuning: Tuning
) -> tuple[Tuned, dict[str, Any]]:
    """Return how a teacher, with its tokenizer in `files`, and its student do on the held-out examples.

    The run comes back too: for words its loss is then that of the data alone, without the teacher's terms.
    """
    if task in WORDS:
        losses = [held_out_loss(m, CausalLoss(), setup.data.validation(), dtype="fp32") for m in (teacher, setup.model)]
        ours, theirs = ({"perplexity": exp(loss or 0.0)} for loss in losses[::-1])
        tuned = replace(tuned, result=replace(tuned.result, best_loss=losses[1]))
    else:
        facts = read_facts(teacher.config, setup.tokenizer, before=teacher.transformer.prefix.length)
        if tuning.max_length is not None:
            facts = replace(facts, max_length=tuning.max_length)
        predictor = make_predictor(teacher, files, task, setup.tokenizer, facts, **long_option(task, tuning.long))
        theirs = measure(predictor, held_out, problem=setup.problem)
        ours = measure(setup.predictor, held_out, problem=setup.problem)
    main = next((name for name in (SHARED if task != "token-classification" else ("f1",)) if name in ours), "")
    teacher.eval()
    setup.model.eval()
    first, second, share = time_pairs([teacher, setup.model], setup)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (teacher, setup.model)]
    return tuned, {
        "teacher_scores": theirs,
        "student_scores": ours,
        "main_metric": main or "perplexity",
        "kept": ours[main] / theirs[main] if main and theirs[main] else None,
        "teacher_parameters": sizes[0],
        "size_share": sizes[1] / sizes[0],
        "milliseconds_an_example": {"teacher": 1000 * first, "student": 1000 * second},
        "time_share": share,
    }


def time_pairs(models: Sequence[Model], setup: Setup) -> tuple[float, float, float]:
    """Return the median seconds an example of two models, and the median of the second's time over the first's.

    Both read the same held-out rows in turn, the first one first in every other round.
    """
    rows, pad_id, device = setup.data.held_out, setup.data.pad_id, next(models[0].parameters()).device
    found: list[list[float]] = []
    for turn in range(ROUNDS + WARM):
        start = turn * TIMED_ROWS % len(rows)
        batch = to_device(collate_rows(rows[start : start + TIMED_ROWS], pad_id=pad_id), device)
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        spent = [0.0, 0.0]
        for number in (0, 1) if turn % 2 else (1, 0):
            with inference(models[number]):
                began = time.perf_counter()
                models[number](ids, mask)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                spent[number] = (time.perf_counter() - began) / len(ids)
        found.append(spent)
    table = np.array(found[WARM:])  # (rounds, 2)
    first, second = np.median(table, axis=0).tolist()
    return first, second, float(np.median(table[:, 1] / table[:, 0]))
