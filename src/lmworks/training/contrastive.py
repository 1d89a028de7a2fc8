"""Vectors that are near where texts mean the same: batches of pairs, triplets and labelled texts, and their losses.

    pairs      each anchor finds its partner among all partners of the batch (van den Oord et al. 2018):
               -log softmax over j of (cos(a_i, p_j) / temperature), at j = i; hard negatives of triplets join the p_j
    scores     (cos(a, b) - score)²
    triplets   max(0, |a - p| - |a - n| + MARGIN), where asked for
    labels     -mean over texts p of the same label of log softmax over j ≠ i of (cos_ij / temperature), at p (Khosla et
               al. 2020); every row brings another text of its label along

The first and the last look at all texts of a batch, so a batch cannot be cut and its parts added up. `parts` saves the
memory all the same, and exactly: vectors are made part by part without their graph, the loss is over all of them, and
each part is run again when its gradient is needed (GradCache, Gao et al. 2021).

Shapes: B rows, K texts of a row, T tokens, D numbers of a vector, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmworks.base.errors import InputError
from lmworks.base.types import Batch
from lmworks.models.heads import pool
from lmworks.tasks.base import Feature, Task, collate
from lmworks.tasks.embed import FeatureExtraction
from lmworks.training.data import draw
from lmworks.training.examples import MASKS, Examples, Row

MARGIN = 5.0  # of distances in triplets: sentence-transformers' own
PARTNERS, HELD_PARTNERS = 2**32 + 20, 2**32 + 21  # random streams
PLACES = {"mean": "mean", "cls": "first", "last": "last"}  # what the heads call these poolings
Vectors = Callable[[Any, Tensor, Tensor | None, Tensor | None], Tensor]  # model, ids, mask, types -> (B, D)


def make_group_rows(task: Task, examples: Sequence[Any], references: Sequence[Any]) -> list[Row]:
    """Return the rows of pairs, scored pairs, triplets or labelled texts; raise InputError for a text in windows."""
    groups = [(example,) if isinstance(example, str) else tuple(example) for example in examples]
    features = task.encode([text for group in groups for text in group])
    if len(features) != sum(map(len, groups)):
        raise InputError("a text is read whole or cut to be compared, not in windows", fix="choose --long truncate")
    labels = {name: i for i, name in enumerate(dict.fromkeys(r for r in references if isinstance(r, str)))}
    rows, start = [], 0
    for i, (group, reference) in enumerate(zip(groups, references, strict=True)):
        own = features[start : start + len(group)]
        start += len(group)
        targets: dict[str, Any] = {"texts": [feature.inputs for feature in own]} if len(own) > 1 else {}
        if isinstance(reference, str):
            targets["labels"] = labels[reference]
        elif isinstance(reference, float):
            targets["scores"] = reference
        longest = max(own, key=len)
        rows.append(Row(Feature(longest.inputs, i, longest.encoding), targets))
    return rows


class TextGroups(Examples):
    """Batches of rows of K texts: input_ids (B, K, T), what belongs to them, and `texts` (B, K), equal for equal texts.

    A row of one text with a label is joined by another text of its label, a new one in every batch.
    """

    def __init__(self, rows: Sequence[Row], held_out: Sequence[Row] = (), **settings: Any) -> None:
        super().__init__(rows, held_out, **settings)
        self.names: dict[tuple[int, ...], int] = {}
        self.alike: list[dict[int, list[Row]]] = [{}, {}]  # rows by label, to train on and held out
        for by_label, side in zip(self.alike, (rows, held_out), strict=True):
            for row in side:
                for inputs in texts_of(row):
                    self.names.setdefault(tuple(inputs["input_ids"]), len(self.names))
                if "labels" in row.targets:
                    by_label.setdefault(row.targets["labels"], []).append(row)

    def collate(self, rows: Sequence[Row], number: int, stream: int) -> Batch:
        """Return rows as a batch, labelled texts with their partners."""
        groups = [texts_of(row) for row in rows]
        if "labels" in rows[0].targets:
            training = stream == MASKS
            chances = draw(self.seed, number, len(rows), stream=PARTNERS if training else HELD_PARTNERS)
            for group, row, chance in zip(groups, rows, chances.tolist(), strict=True):
                others = self.alike[0 if training else 1][row.targets["labels"]]
                place = chance % len(others)
                partner = others[(place + 1) % len(others)] if others[place] is row else others[place]
                group.append(partner.feature.inputs)
        flat = collate([Feature(inputs, 0) for group in groups for inputs in group], pad_id=self.pad_id)
        if flat["attention_mask"].all():  # attention is faster without
            del flat["attention_mask"]
        batch = {name: array.reshape(len(rows), -1, array.shape[1]) for name, array in flat.items()}  # (B, K, T)
        batch["texts"] = np.array([[self.names[tuple(one["input_ids"])] for one in group] for group in groups])
        for name, dtype in (("labels", np.int64), ("scores", np.float32)):
            if name in rows[0].targets:
                batch[name] = np.array([row.targets[name] for row in rows], dtype)  # (B,)
        return batch


def texts_of(row: Row) -> list[dict[str, Any]]:
    """Return the inputs of a row's texts."""
    return list(row.targets.get("texts", [row.feature.inputs]))


def pooled(task: FeatureExtraction) -> Vectors:
    """Return what makes the vectors that this task gives."""
    if task.pooling == "none":
        raise InputError("this recipe gives a vector for each token, not for a text")
    return partial(pool_states, pooling=task.pooling, normalize=task.normalize)


def pool_states(
    model: Any, ids: Tensor, mask: Tensor | None, types: Tensor | None, *, pooling: str, normalize: bool
) -> Tensor:
    """Return the vectors (B, D) of texts (B, T)."""
    states = model.hidden_states(ids, mask, token_type_ids=types)  # (B, T, D)
    if pooling == "max":
        x = (states if mask is None else states.masked_fill(mask[:, :, None] == 0, float("-inf"))).amax(1)
    else:
        x = pool(states, PLACES[pooling], mask)  # (B, D)
    return F.normalize(x.float(), dim=-1, eps=1e-12) if normalize else x.float()


def read_by_head(model: Any, ids: Tensor, mask: Tensor | None, types: Tensor | None) -> Tensor:
    """Return the very vectors (B, D) that a classifier's last projection reads."""
    head = model.head
    x = pool(model.hidden_states(ids, mask, token_type_ids=types), head.pool, mask)  # (B, D)
    x = x if head.dense is None else head.act(head.dense(x))
    x = x if head.norm is None else head.norm(x)
    return x.float()


class GroupLoss:
    """A loss over the vectors (B, K, D) of all texts of a batch."""

    unit = "rows"
    compares_rows = True  # so a batch cannot be dealt to several processes

    def __init__(self, vectors: Vectors, *, parts: int = 1, temperature: float = 0.05) -> None:
        self.vectors, self.parts, self.temperature = vectors, parts, temperature

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss summed over the rows."""
        vectors = self.embed(model, batch).float()
        with torch.autocast(vectors.device.type, enabled=False):  # cosines are compared in fp32
            return self.compare(vectors, batch)

    def count(self, batch: Batch) -> int:
        """Return the number of rows."""
        return len(batch["texts"])

    def embed(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the vectors (B, K, D), made in parts of the batch; their graphs are not held at once."""
        shape = batch["texts"].shape
        ids = batch["input_ids"].flatten(0, 1)  # (B·K, T)
        mask, types = (batch[n].flatten(0, 1) if n in batch else None for n in ("attention_mask", "token_type_ids"))
        parts = min(self.parts, len(batch["texts"]))
        if parts == 1 or not torch.is_grad_enabled():
            return self.vectors(model, ids, mask, types).reshape(*shape, -1)
        made = []
        for places in torch.tensor_split(torch.arange(len(ids)), parts):
            part = [None if array is None else array[places] for array in (ids, mask, types)]
            made.append(checkpoint(self.vectors, model, *part, use_reentrant=False))
        return torch.cat(made).reshape(*shape, -1)

    def compare(self, vectors: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed loss of vectors (B, K, D)."""
        raise NotImplementedError


class RankingLoss(GroupLoss):
    """Each anchor must find its own partner; with `symmetric` also each partner its anchor, and the mean counts.

    What is the same text as the partner, or a partner of the same anchor, is no negative.
    """

    def __init__(self, vectors: Vectors, *, symmetric: bool = False, **settings: Any) -> None:
        super().__init__(vectors, **settings)
        self.symmetric = symmetric

    def compare(self, vectors: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed cross-entropy of cosines (B, C) with the diagonal."""
        x, texts = F.normalize(vectors, dim=-1, eps=1e-12), batch["texts"]
        anchors, names = x[:, 0], texts[:, 0]
        found = x[:, 1:].transpose(0, 1).flatten(0, 1)  # (C, D): all partners, then all negatives
        found_names = texts[:, 1:].t().flatten()  # (C,)
        rows = len(x)
        same = names[:, None] == names  # (B, B)
        right = found_names == texts[:, 1, None]  # (B, C)
        right[:, :rows] |= same
        loss = rank(anchors @ found.t() / self.temperature, right)
        if not self.symmetric:
            return loss
        partners = x[:, 1]
        right = same | (texts[:, 1, None] == texts[:, 1])  # (B, B)
        return (loss + rank(partners @ anchors.t() / self.temperature, right)) / 2


def rank(scores: Tensor, right: Tensor) -> Tensor:
    """Return the summed cross-entropy of scores (B, C) with the diagonal; other right ones are left out."""
    place = torch.arange(len(scores), device=scores.device)
    right = right.clone()
    right[place, place] = False
    return F.cross_entropy(scores.masked_fill(right, float("-inf")), place, reduction="sum")


class CosineLoss(GroupLoss):
    """The squared difference of a cosine and its score: scores (B,)."""

    def compare(self, vectors: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed squared error."""
        return F.mse_loss(torch.cosine_similarity(vectors[:, 0], vectors[:, 1]), batch["scores"], reduction="sum")


class TripletLoss(GroupLoss):
    """The anchor must be nearer to its partner than to its negative, by MARGIN (Schroff et al. 2015)."""

    def compare(self, vectors: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed hinge of Euclidean distances."""
        near, far = (F.pairwise_distance(vectors[:, 0], vectors[:, k]) for k in (1, 2))  # (B,)
        return F.relu(near - far + MARGIN).sum()


class LabelLoss(GroupLoss):
    """Texts of one label must be nearer to each other than to the rest: labels (B,), each for all texts of its row."""

    unit = "texts"

    def count(self, batch: Batch) -> int:
        """Return the number of texts with another of their label."""
        texts, labels = batch["texts"], np.repeat(batch["labels"], batch["texts"].shape[1])
        names = texts.reshape(-1)
        alike = (labels[:, None] == labels) & (names[:, None] != names)
        return max(1, int(alike.any(1).sum()))

    def compare(self, vectors: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the summed loss; a text is not compared with itself."""
        x = F.normalize(vectors.flatten(0, 1), dim=-1, eps=1e-12)  # (B·K, D)
        names, labels = batch["texts"].flatten(), batch["labels"].repeat_interleave(vectors.shape[1])
        other = names[:, None] != names  # (B·K, B·K)
        alike = (labels[:, None] == labels) & other
        scores = (x @ x.t() / self.temperature).masked_fill(~other, torch.finfo(x.dtype).min)
        logp = scores.log_softmax(1)
        total = torch.where(alike, logp, 0.0).sum(1) / alike.sum(1).clamp(min=1)
        return -total.sum()


def make_group_objective(
    rows: Sequence[Row], vectors: Vectors, *, parts: int, temperature: float, symmetric: bool = False,
    triplet: bool = False,
) -> GroupLoss:  # fmt: skip
    """Return the loss that goes with what the rows hold; raise InputError for an option that does not."""
    targets = rows[0].targets
    kind = next((kind for kind in ("labels", "scores") if kind in targets), "")
    if symmetric and kind:
        raise InputError("--symmetric is for pairs and triplets without a score or a label", fix="leave it out")
    if triplet and len(targets.get("texts", ())) != 3:
        raise InputError("--triplet-loss is for triplets", fix="leave it out")
    if triplet and symmetric:
        raise InputError("--symmetric and --triplet-loss exclude each other", fix="leave one out")
    settings: dict[str, Any] = {"parts": parts, "temperature": temperature}
    if kind:
        return (LabelLoss if kind == "labels" else CosineLoss)(vectors, **settings)
    return TripletLoss(vectors, **settings) if triplet else RankingLoss(vectors, symmetric=symmetric, **settings)
