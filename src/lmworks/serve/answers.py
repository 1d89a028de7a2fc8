"""Answers of the tasks as JSON has them."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np


def labelled(labels: list[Any]) -> dict[str, Any]:
    """Return the first of some labels, and all of them."""
    return {"label": labels[0].label, "score": labels[0].score, "labels": plain(labels)}


def plain(answers: Any) -> Any:
    """Return answers as JSON has them."""
    if isinstance(answers, np.ndarray):
        return answers.tolist()
    if isinstance(answers, list):
        return [plain(answer) for answer in answers]
    return asdict(answers) if is_dataclass(answers) and not isinstance(answers, type) else answers
