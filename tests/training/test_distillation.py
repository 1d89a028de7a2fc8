"""The distillation loss beside torch's own terms on transformers' models, its gradients, and a student's start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_task_objectives import LABELS, ROWS, TINY, VOCAB, inputs
from torch import Tensor, nn
from transformers import BertConfig, GPT2Config, ModernBertConfig

from lmworks.base.errors import InputError
from lmworks.models.checkpoint import load_model, save_model
from lmworks.models.heads import Model
from lmworks.training.data import IGNORED, split
from lmworks.training.distillation import (
    DistillationLoss,
    add_match,
    choose_layers,
    cut_layers,
    drop_match,
    spread_layers,
)
from lmworks.training.objectives import BinaryLoss, CausalLoss, ClassLoss, SpanLoss, SquaredLoss

DEEP = {**TINY, "num_hidden_layers": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PAIRS, T, ALPHA, BETA = [(0, 0), (1, 3)], 3.0, 0.3, 0.7
SEQUENCE = torch.randint(0, VOCAB, (ROWS, 11), generator=torch.Generator().manual_seed(2))
REAL = inputs()["attention_mask"].bool()
TAGS = torch.where((SEQUENCE % 3 == 0) | ~REAL, IGNORED, SEQUENCE % LABELS)
KINDS: dict[str, tuple[str, Any, dict[str, Any], dict[str, Tensor]]] = {
    "classes": ("SequenceClassification", ClassLoss(weights=[1.0, 2.0, 0.5]), {}, {"labels": torch.arange(ROWS) % 3}),
    "several": (
        "SequenceClassification", BinaryLoss(), {"problem_type": "multi_label_classification"},
        {"labels": (torch.arange(ROWS * 3).reshape(ROWS, 3) % 2).float()},
    ),
    "number": (
        "SequenceClassification", SquaredLoss(), {"problem_type": "regression", "num_labels": 1},
        {"labels": torch.tensor([0.5, -2.0, 3.0, 1.5, 0.0])},
    ),
    "tags": ("TokenClassification", ClassLoss(), {}, {"labels": TAGS}),
    "masked": ("MaskedLM", CausalLoss(), {}, {"labels": torch.where((SEQUENCE % 4 == 0) & REAL, SEQUENCE, IGNORED)}),
    "spans": (
        "QuestionAnswering", SpanLoss(), {"num_labels": 2},
        {"start_positions": torch.tensor([0, 3, 1, 2, 1]), "end_positions": torch.tensor([4, 5, 2, 6, 1])},
    ),
}  # fmt: skip


def save(kind: str, folder: Path, *, layers: int, seed: int, **settings: Any) -> nn.Module:
    """Save a random BERT of transformers and return it, in evaluation mode."""
    torch.manual_seed(seed)
    config = BertConfig(**{**DEEP, **settings, "num_hidden_layers": layers})
    model = getattr(transformers, f"BertFor{kind}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def published(name: str, student: Any, teacher: Any, batch: dict[str, Tensor], maps: Any, hidden: str) -> Tensor:
    """Compute the sum of the loss as DistilBERT's recipe writes its terms, from transformers' models."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    given = {key: batch[key] for key in names}
    ours = student(**given, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(**given, output_hidden_states=True)
    mask = batch["attention_mask"].bool()
    task: Any = 0.0
    soft: Any = 0.0
    kl = nn.KLDivLoss(reduction="batchmean")
    chosen, share, terms = mask, None, 1
    if name == "spans":
        for side, key in (("start_logits", "start_positions"), ("end_logits", "end_positions")):
            for row in range(ROWS):
                a, b = ours[side][row][mask[row]], theirs[side][row][mask[row]]
                task = task + F.cross_entropy(a[None], batch[key][row : row + 1]) / 2
                soft = soft + kl((a / T).log_softmax(-1)[None], (b / T).softmax(-1)[None]) * T**2 / 2
    elif name == "number":
        task = (ours.logits[:, 0] - batch["labels"]).square().sum()
        soft = (ours.logits - theirs.logits).square().sum()
    elif name == "several":
        p, terms = (theirs.logits / T).sigmoid(), LABELS
        q = (ours.logits / T).sigmoid()
        task = F.binary_cross_entropy(ours.logits.sigmoid(), batch["labels"], reduction="sum")
        soft = -(p * q.log() + (1 - p) * (1 - q).log()).sum() * T**2
    else:
        labels = batch["labels"]
        kept = labels != IGNORED
        a, b, right = ours.logits[kept], theirs.logits[kept], labels[kept]
        weights = torch.tensor([1.0, 2.0, 0.5]) if name == "classes" else torch.ones(a.shape[-1])
        task = (nn.CrossEntropyLoss(reduction="none")(a, right) * weights[right]).sum()
        soft = kl((a / T).log_softmax(-1), (b / T).softmax(-1)) * len(a) * T**2
        chosen = kept if kept.ndim == 2 else mask
    if chosen is mask:
        share = (terms * mask / mask.sum(1, keepdim=True))[mask]
    states: Any = 0.0
    for number, (i, j) in enumerate(PAIRS):
        x, y = ours.hidden_states[i + 1], theirs.hidden_states[j + 1]
        x = x if maps is None else x @ maps[number].weight.t()
        x, y = x[chosen], y[chosen]
        each = nn.CosineEmbeddingLoss(reduction="none")(x, y, torch.ones(len(x)))
        each = nn.MSELoss(reduction="none")(x, y).mean(-1) if hidden == "mse" else each
        states = states + (each if share is None else each * share).sum() / len(PAIRS)
    return ALPHA * soft + (1 - ALPHA) * task + BETA * states


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("hidden", "width"), [("cosine", 24), ("mse", 32)])
def test_the_loss_and_its_gradient_are_the_published_ones(name: str, hidden: Any, width: int, tmp_path: Path) -> None:
    """Beside transformers' models from the same folders; split into parts the sum stays the same."""
    kind, task, settings, labels = KINDS[name]
    theirs = save(kind, tmp_path / "teacher", layers=4, seed=1, **{**settings, "hidden_size": width})
    reference = save(kind, tmp_path / "student", layers=2, seed=2, **settings)
    teacher, student = (load_model(tmp_path / which, kind) for which in ("teacher", "student"))
    maps = None
    if width != 24:
        add_match(student, width, len(PAIRS), seed=0)
        maps = student.match
    batch = {**inputs(), **labels}
    loss = DistillationLoss(teacher, task, pairs=PAIRS, temperature=T, alpha=ALPHA, hidden_weight=BETA, hidden=hidden)
    ours, expected = loss(student, batch), published(name, reference, theirs, batch, maps, hidden)
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-5)
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    loss(student, batch).backward()
    ours_of_maps = [] if maps is None else [one.weight.grad.clone() for one in maps]
    if maps is not None:
        maps.zero_grad()
    expected.backward()
    for one, grad in zip(maps or [], ours_of_maps, strict=True):
        torch.testing.assert_close(one.weight.grad, grad, rtol=1e-4, atol=1e-4)
    ours_query = student.transformer.layers[0].attention.q_proj.weight.grad
    query = reference.bert.encoder.layer[0].attention.self.query.weight.grad
    torch.testing.assert_close(ours_query, query, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        student.transformer.embeddings.tokens.weight.grad, reference.bert.embeddings.word_embeddings.weight.grad,
        rtol=1e-3, atol=2e-4,
    )  # fmt: skip
    assert all(parameter.grad is None for parameter in teacher.parameters())
    arrays = {key: value.numpy() for key, value in batch.items()}
    parts = [{key: torch.from_numpy(value) for key, value in part.items()} for part in split(arrays, 3)]
    assert len(parts) == 3
    with torch.no_grad():
        torch.testing.assert_close(sum(loss(student, part) for part in parts), ours.detach(), rtol=1e-5, atol=1e-5)
    assert loss.count(arrays) == task.count(arrays)


def test_a_causal_model_learns_every_predicted_token(tmp_path: Path) -> None:
    """GPT-2: the last state is the one after the final norm, as in transformers; padding counts for nothing."""
    models = []
    for layers, seed in ((3, 1), (2, 2)):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=layers, n_head=2, n_positions=16)
        models.append(transformers.GPT2LMHeadModel(config).eval())
        models[-1].save_pretrained(tmp_path / str(layers))
    teacher, student = (load_model(tmp_path / str(layers), "CausalLM") for layers in (3, 2))
    given = {name: value for name, value in inputs().items() if name != "token_type_ids"}
    mask = given["attention_mask"].bool()
    labels = torch.where(mask, SEQUENCE, IGNORED)
    loss = DistillationLoss(teacher, CausalLoss(), pairs=[(0, 0), (1, 2)], temperature=T, alpha=ALPHA)
    ours = loss(student, {**given, "labels": labels})
    big, small = (model(**given, output_hidden_states=True) for model in models)
    a, b = small.logits[mask], big.logits[mask]
    soft = F.kl_div((a / T).log_softmax(-1), (b / T).softmax(-1), reduction="sum") * T**2
    states = sum(
        nn.CosineEmbeddingLoss(reduction="sum")(small.hidden_states[i + 1][mask], big.hidden_states[j + 1][mask],
                                                torch.ones(int(mask.sum())))
        for i, j in ((0, 0), (1, 2))
    ) / 2  # fmt: skip
    expected = ALPHA * soft + (1 - ALPHA) * F.cross_entropy(a, labels[mask], reduction="sum") + states
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-5)


def test_layers_are_spread_as_distilbert_has_them() -> None:
    assert spread_layers(6, 12) == [0, 2, 4, 7, 9, 11]
    assert spread_layers(3, 6) == [0, 2, 5]
    assert spread_layers(1, 6) == [0] and spread_layers(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["SequenceClassification", "MaskedLM"])
def test_a_student_begins_with_the_teachers_weights_and_shares_none(kind: str, tmp_path: Path) -> None:
    """transformers reads it, and every tensor is the teacher's at the layer it came from; all layers say the same."""
    theirs = save(kind, tmp_path / "teacher", layers=4, seed=1)
    teacher = load_model(tmp_path / "teacher", kind)
    add_match(student := cut_layers(teacher, [0, 3]), 7, 2, seed=0)
    drop_match(student)
    save_model(student, tmp_path / "student")
    state = getattr(transformers, f"BertFor{kind}").from_pretrained(tmp_path / "student").state_dict()
    before = theirs.state_dict()
    for name, tensor in state.items():
        source = name.replace("layer.1.", "layer.3.") if "encoder" in name else name
        torch.testing.assert_close(tensor, before[source], rtol=0, atol=0)
    assert "bert.encoder.layer.2.output.dense.weight" not in state
    given = inputs()
    whole = cut_layers(teacher, [0, 1, 2, 3])
    assert torch.equal(whole(given["input_ids"]), teacher(given["input_ids"]))
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.zero_()
    again = load_model(tmp_path / "teacher", kind)
    assert all(torch.equal(p, kept) for p, kept in zip(teacher.parameters(), again.parameters(), strict=True))


def test_local_layers_stay_local_and_a_first_layer_of_its_own_kind_stays_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=6, num_attention_heads=2,
        local_attention=4, global_attn_every_n_layers=3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    transformers.ModernBertForMaskedLM(config).save_pretrained(tmp_path / "teacher")
    teacher = load_model(tmp_path / "teacher", "MaskedLM")
    student = cut_layers(teacher, [0, 2, 3])
    assert teacher.config.local_layers == (1, 2, 4, 5) and student.config.local_layers == (1,)
    save_model(student, tmp_path / "student")
    again = load_model(tmp_path / "student", "MaskedLM")
    assert replace(again.config, source={}) == replace(student.config, source={})
    with pytest.raises(InputError, match="must begin with it"):
        cut_layers(teacher, [2, 5])


def test_layers_that_the_teacher_lacks_are_refused(tmp_path: Path) -> None:
    save("MaskedLM", tmp_path / "teacher", layers=4, seed=1)
    teacher: Model = load_model(tmp_path / "teacher", "MaskedLM")
    assert choose_layers(teacher, 2) == [0, 3] and choose_layers(teacher, 0, [1, 2]) == [1, 2]
    for layers, keep in ((5, []), (0, []), (0, [0, 4]), (0, [2, 1]), (0, [1, 1])):
        with pytest.raises(InputError, match=r"fewer layers|no such layers"):
            choose_layers(teacher, layers, keep)
