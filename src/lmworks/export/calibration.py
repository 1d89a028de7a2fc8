"""What each dtype of a graph should do with each matrix, by real inputs: a user's, or the built-in ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lmworks.base.types import Batch
from lmworks.compress.precision import LARGEST, LIMIT, choose_precision
from lmworks.compress.rounding import Precision
from lmworks.compress.texts import TEXTS
from lmworks.export.probe import make_probes
from lmworks.models.folder import has_tokenizer
from lmworks.models.heads import Model

SAME = {"q4f16": "q4"}  # the same whole numbers
CALIBRATED = ("q4", *LARGEST)
MOST_RANKED = 50_000_000  # parameters of a model whose matrices are tried one by one: it is run once for each
MOST_PARAMETERS = 150_000_000  # of one whose 4 bits are rounded for its inputs
GROUPS = ("texts", "pairs", "images")


def find_precisions(
    model: Model, source: Path, dtypes: Sequence[str], *, batches: Sequence[Batch] = ()
) -> dict[str, Precision]:
    """Return what was chosen for each dtype that gains by it; {} for a model that is too large, or has no inputs."""
    size = sum(p.numel() for p in model.parameters())
    ranked = size <= MOST_RANKED
    able = CALIBRATED if ranked else ("q4",) if size <= MOST_PARAMETERS else ()
    wanted = [dtype for dtype in dict.fromkeys(SAME.get(dtype, dtype) for dtype in dtypes) if dtype in able]
    if not wanted or model.parts:
        return {}
    inputs, limit = list(batches) or built_in(model, source), LIMIT if ranked else math.inf
    found = {dtype: choose_precision(model, inputs, dtype, limit=limit) for dtype in wanted if inputs}
    return {dtype: found[SAME.get(dtype, dtype)] for dtype in dtypes if SAME.get(dtype, dtype) in found}


def built_in(model: Model, source: Path) -> list[Batch]:
    """Return the built-in texts, or random ids and images where a model reads no texts, each a batch of one row."""
    readable = model.config.vision is None and has_tokenizer(source)
    groups = make_probes(source, model.config, TEXTS if readable else ())
    rows = [row for group in GROUPS for row in groups.get(group, ())]
    names = ("input_ids", "token_type_ids", "pixel_values")
    return [{name: row[name][None] for name in names if name in row} for row in rows]
