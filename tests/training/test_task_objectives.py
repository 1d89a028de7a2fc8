"""Every task's loss equals the one that transformers computes from `labels=`, and splitting a batch changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from small import make_data
from torch import nn
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel, ViTConfig

from lmworks.models.checkpoint import load_model
from lmworks.tasks.base import Feature
from lmworks.training.data import IGNORED, split
from lmworks.training.examples import Examples, Row
from lmworks.training.objectives import BinaryLoss, CausalLoss, ClassLoss, Objective, SpanLoss, SquaredLoss
from lmworks.training.train_config import TrainConfig
from lmworks.training.trainer import Trainer

ROWS, LONGEST, VOCAB, LABELS = 5, 11, 61, 3
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "num_labels": LABELS,
}


def reference(kind: str, folder: Path, **settings: Any) -> nn.Module:
    """Save a random model of transformers, moved away from its start, and return it."""
    torch.manual_seed(3)
    model = getattr(transformers, f"BertFor{kind}")(BertConfig(**{**TINY, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def inputs(*, padded: bool = True) -> dict[str, torch.Tensor]:
    """Return rows of unlike length, padded on the right."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([LONGEST, 7, 4, 9, 2]) if padded else torch.full((ROWS,), LONGEST)
    mask = (torch.arange(LONGEST) < lengths[:, None]).long()
    ids = torch.randint(1, VOCAB, (ROWS, LONGEST), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (torch.arange(LONGEST) > 2).long() * mask}


def mean_loss(objective: Objective, model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Return the sum over the count, as the trainer computes it."""
    with torch.no_grad():
        total = float(objective(model, batch))
    return total / objective.count({name: value.numpy() for name, value in batch.items()})


@pytest.mark.parametrize(
    ("kind", "objective", "settings", "labels"),
    [
        ("SequenceClassification", ClassLoss(), {}, torch.tensor([0, 2, 1, 1, 0])),
        (
            "SequenceClassification",
            BinaryLoss(),
            {"problem_type": "multi_label_classification"},
            torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]]),
        ),
        (
            "SequenceClassification",
            SquaredLoss(),
            {"problem_type": "regression", "num_labels": 1},
            torch.tensor([0.5, -2.0, 3.0, 1.5, 0.0]),
        ),
        ("TokenClassification", ClassLoss(), {}, torch.randint(0, LABELS, (ROWS, LONGEST))),
        ("MaskedLM", CausalLoss(), {}, torch.randint(0, VOCAB, (ROWS, LONGEST))),
    ],
    ids=["single label", "multi-label", "regression", "tokens", "masked words"],
)
def test_a_loss_equals_transformers(
    kind: str, objective: Objective, settings: dict[str, Any], labels: torch.Tensor, tmp_path: Path
) -> None:
    batch = inputs()
    if kind == "MaskedLM":
        batch["token_type_ids"].zero_()  # the hidden words of one text
    if labels.shape == batch["input_ids"].shape:  # -100 on padding, and on half of the rest
        scored = (torch.arange(LONGEST) % 2 == 0) & batch["attention_mask"].bool()
        labels = labels.where(scored, torch.tensor(IGNORED))
    theirs = reference(kind, tmp_path, **settings)
    with torch.no_grad():
        expected = float(theirs(**batch, labels=labels).loss)
    found = mean_loss(objective, load_model(tmp_path, kind), {**batch, "labels": labels})
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_loss_of_spans_equals_transformers_and_ignores_padding(tmp_path: Path) -> None:
    """Without padding the numbers are theirs; with it, each row's is what it would be alone."""
    theirs, start = reference("QuestionAnswering", tmp_path, num_labels=2), torch.tensor([3, 0, 2, 5, 1])
    end = start + torch.tensor([2, 0, 1, 3, 0])
    whole, ragged = inputs(padded=False), inputs()
    model, objective = load_model(tmp_path, "QuestionAnswering"), SpanLoss()
    spans = {"start_positions": start, "end_positions": end}
    with torch.no_grad():
        expected = float(theirs(**whole, **spans).loss)
    assert mean_loss(objective, model, {**whole, **spans}) == pytest.approx(expected, abs=1e-6)
    alone = []
    for row, length in enumerate(ragged["attention_mask"].sum(1).tolist()):
        one = {name: value[row : row + 1, :length] for name, value in ragged.items()}
        place = {name: value[row : row + 1].clamp(max=length - 1) for name, value in spans.items()}
        with torch.no_grad():
            alone.append(float(theirs(**one, **place).loss))
    lengths = ragged["attention_mask"].sum(1)
    clamped = {name: torch.minimum(value, lengths - 1) for name, value in spans.items()}
    found = mean_loss(objective, model, {**ragged, **clamped})
    assert found == pytest.approx(sum(alone) / len(alone), abs=1e-6)


def test_the_loss_of_answers_equals_transformers(tmp_path: Path) -> None:
    """Instruction data: the prompt is read and not scored; our labels are shifted already, theirs are not."""
    torch.manual_seed(1)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=24, n_layer=2, n_head=2)).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, VOCAB, (4, 10))
    wanted = ids.clone()
    wanted[:, :4] = IGNORED
    with torch.no_grad():
        expected = float(theirs(ids, labels=wanted).loss)
    batch = {"input_ids": ids[:, :-1], "labels": wanted[:, 1:]}
    assert mean_loss(CausalLoss(), load_model(tmp_path), batch) == pytest.approx(expected, abs=1e-6)


def test_the_loss_of_pictures_equals_transformers(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=4,
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    batch = {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([3, 0, 2])}
    with torch.no_grad():
        expected = float(theirs(**batch).loss)
    assert mean_loss(ClassLoss(), load_model(tmp_path), batch) == pytest.approx(expected, abs=1e-6)


class Fixed(nn.Module):
    """Gives these numbers, whatever it reads."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.logits


def test_smoothing_is_transformers_and_weights_multiply_their_class() -> None:
    logits, labels = torch.randn(6, LABELS), torch.tensor([0, 1, 2, 1, IGNORED, 0])
    smoother = transformers.trainer_pt_utils.LabelSmoother(epsilon=0.2)
    expected = float(smoother({"logits": logits[None]}, labels[None]))
    batch = {"input_ids": labels, "labels": labels}
    assert mean_loss(ClassLoss(smoothing=0.2), Fixed(logits), batch) == pytest.approx(expected, abs=1e-6)
    weights = [0.5, 2.0, 1.0]
    terms = -logits.log_softmax(-1)[torch.arange(6), labels.clamp(min=0)] * torch.tensor(weights)[labels.clamp(min=0)]
    expected = float(terms[labels != IGNORED].sum()) / 5
    assert mean_loss(ClassLoss(weights=weights), Fixed(logits), batch) == pytest.approx(expected, abs=1e-6)


def test_accumulation_divides_by_what_is_scored_in_the_whole_batch(tmp_path: Path) -> None:
    """The gradient-accumulation fault of 2024: a mean over the means of ragged parts is another loss."""
    reference("TokenClassification", tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    generator = np.random.default_rng(0)
    rows = []
    for place, length in enumerate((11, 2, 7, 3, 9, 2, 4, 5)):
        ids = generator.integers(1, VOCAB, length).tolist()
        labels = [int(label) if i % (1 + place % 3) == 0 else IGNORED for i, label in enumerate(ids)]
        rows.append(Row(Feature({"input_ids": ids}, place), {"labels": [min(x, 1) if x > 0 else x for x in labels]}))
    losses, gradients = [], []
    for parts in (1, 2, 8):
        model, data = load_model(tmp_path), Examples(rows, epochs=1, batch_size=8)
        config = TrainConfig(steps=1, lr=1e-3, accumulation=parts, dtype="fp32", compile="never")
        folder = tmp_path / f"run{parts}"
        trainer = Trainer(model, objective=ClassLoss(), data=data, config=config, folder=folder, stream=None)
        count = trainer.objective.count(data.batch(0))
        loss = sum(trainer.accumulate(part, i, count) for i, part in enumerate(split(data.batch(0), parts)))
        losses.append(loss)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-6)
    for gradient in gradients[1:]:
        assert float((gradient - gradients[0]).norm() / gradients[0].norm()) < 1e-5


def test_the_best_weights_may_be_chosen_by_a_measured_number(tmp_path: Path) -> None:
    """Of equal scores the lower loss decides; what was measured stands in metrics.jsonl."""
    from small import make_trainer

    scores = iter([0.5, 0.75, 0.75, 0.25])
    trainer = make_trainer(tmp_path, data=make_data(), criterion="accuracy", patience=9)
    trainer.measure = lambda: {"accuracy": next(scores)}
    result = trainer.fit()
    assert [row["accuracy"] for row in result.history.measured] == [0.5, 0.75, 0.75, 0.25]
    second, third = (dict(result.history.validation)[step] for step in (6, 9))
    assert result.best_step == (6 if second <= third else 9)
    assert result.best_loss == min(second, third)
