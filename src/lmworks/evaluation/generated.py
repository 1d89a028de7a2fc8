"""Texts that a model wrote, against what should be written: BLEU and chrF as sacrebleu computes them, and exact match.

    bleu          of the whole set, 0 to 100: n-grams of 1 to 4 words of sacrebleu's tokenizer "13a" (Post 2018)
    chrf          chrF2, 0 to 100: n-grams of 1 to 6 characters, recall weighted twice (Popović 2015)
    exact_match   share of texts that are the reference, blanks at their ends apart

Intervals are the middle 95 % of sacrebleu's own draws. (Its mean ± half of them can leave 0 to 100, and fails where
some draws have nothing in common.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmworks.base.errors import InputError
from lmworks.base.optional import require
from lmworks.evaluation.significance import DRAWS, LEVEL

ENDS = (1 - LEVEL) / 2, (1 + LEVEL) / 2
FEWEST = 2  # texts, for an interval


def score_generated(written: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Return bleu, chrf and exact_match, the intervals of the first two, and the signatures that make them repeatable.

    Raises InputError unless there is one reference a text, and for no text at all.
    """
    sacrebleu = require("sacrebleu", extra="metrics")
    if len(written) != len(references) or not written:
        raise InputError("there must be one reference for each text, and at least one",
                         found=f"{len(written)} texts, {len(references)} references")  # fmt: skip
    draw = require("sacrebleu.significance", extra="metrics")._bootstrap_resample
    found: dict[str, Any] = {"intervals": {}, "signatures": {}}
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        score = metric.corpus_score(list(written), [list(references)])
        found[name] = float(score.score)
        if len(written) >= FEWEST:
            metric.n_bootstrap = DRAWS
            metric.seed, drawn = draw(metric._extract_corpus_statistics(written, [references]), metric, DRAWS)
            found["intervals"][name] = np.quantile([float(one.score) for one in drawn], ENDS).tolist()
        found["signatures"][name] = str(metric.get_signature())
    same = sum(a.strip() == b.strip() for a, b in zip(written, references, strict=True))
    return {**found, "exact_match": same / len(written)}
