"""Packed documents have the loss and the gradients that transformers gives each alone, and batches lose no token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lmworks.models.checkpoint import load_model
from lmworks.tasks.base import Feature
from lmworks.training.data import IGNORED
from lmworks.training.examples import Examples, Masking, Row, join_rows
from lmworks.training.objectives import CausalLoss
from lmworks.training.packing import DOCUMENTS, first_fit, join_words, sort_documents

VOCAB, SIZE = 61, {"vocab_size": 61, "num_hidden_layers": 2}
WIDE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
ROPE = {**SIZE, **WIDE, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS: dict[str, tuple[Any, Any]] = {
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_head=4, n_layer=2, n_positions=32, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
        ),
    ),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**ROPE)),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig(**ROPE, sliding_window=5)),
    "bert": (
        transformers.BertForMaskedLM,
        transformers.BertConfig(
            **SIZE, **WIDE, max_position_embeddings=32, hidden_dropout_prob=0, attention_probs_dropout_prob=0
        ),
    ),
    "albert": (
        transformers.AlbertForMaskedLM,
        transformers.AlbertConfig(**SIZE, **WIDE, embedding_size=16, max_position_embeddings=32),
    ),
    "deberta": (
        transformers.DebertaV2ForMaskedLM,
        transformers.DebertaV2Config(
            **SIZE, **WIDE, max_position_embeddings=32, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
            relative_attention=True, position_buckets=8, pos_att_type="p2c|c2p", share_att_key=True, conv_kernel_size=3,
            norm_rel_ebd="layer_norm", position_biased_input=False,
        ),
    ),
}  # fmt: skip
MASKED = ("bert", "albert", "deberta")
LENGTHS = [3, 30, 7, 7, 1, 12, 3, 25, 9, 2, 14, 7]


def save_model(family: str, folder: Path) -> Any:
    """Save a random model of transformers, its norms away from identity; return it."""
    make, config = MODELS[family]
    torch.manual_seed(3)
    model = make(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


def documents_of(lengths: list[int], *, masked: bool) -> list[Row]:
    """Return documents with labels; of a masked model's some tokens, of a causal model's prompts none, are scored."""
    rng, rows = np.random.default_rng(0), []
    for i, length in enumerate(lengths):
        ids = rng.integers(1, VOCAB, length + 1)
        scored = rng.random(length) < (0.4 if masked else 0.7)
        scored[-1] = True
        labels = np.where(scored, ids[:-1] if masked else ids[1:], IGNORED)
        rows.append(Row(Feature({"input_ids": ids[:-1].tolist()}, i), {"labels": labels.tolist()}))
    return rows


@pytest.mark.parametrize("family", MODELS)
def test_loss_and_gradients_are_those_of_each_document_alone(family: str, tmp_path: Path) -> None:
    """transformers runs every document by itself: no attention crosses documents, positions restart."""
    theirs = save_model(family, tmp_path)
    rows = documents_of(LENGTHS, masked=family in MASKED)
    expected = torch.zeros(())
    for row in rows:
        logits = theirs(torch.tensor([row.feature.inputs["input_ids"]])).logits[0]
        labels = torch.tensor(row.targets["labels"])
        expected = expected + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    expected.backward()
    theirs.save_pretrained(tmp_path / "grad", state_dict={k: p.grad for k, p in theirs.named_parameters()})
    gradients = dict(load_model(tmp_path / "grad").named_parameters())

    model = load_model(tmp_path).train()
    data = Examples(rows, epochs=1, batch_size=8, packing=32)
    batch = data.batch(0)
    assert data.steps == 1 and batch["input_ids"].shape == (4, 32) and DOCUMENTS in batch  # 120 tokens in 128 places
    loss = CausalLoss()(model, {name: torch.from_numpy(array) for name, array in batch.items()})
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = gradients[name].abs().max().clamp(min=1)
        assert (found - gradients[name]).abs().max() <= 1e-5 * scale, name


def test_parts_of_a_packed_batch_have_its_loss(tmp_path: Path) -> None:
    """Accumulation splits a batch along its rows."""
    save_model("llama", tmp_path)
    model, rows = load_model(tmp_path), documents_of(LENGTHS, masked=False)
    batch = {n: torch.from_numpy(a) for n, a in Examples(rows, epochs=1, batch_size=8, packing=32).batch(0).items()}
    whole = CausalLoss()(model, batch).item()
    parts = [CausalLoss()(model, {n: a[i : i + 1] for n, a in batch.items()}).item() for i in range(4)]
    assert sum(parts) == pytest.approx(whole, rel=1e-6)


def slow_first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for i, length in enumerate(lengths):
        for row in rows:
            if sum(lengths[k] for k in row) + length <= capacity:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


def test_first_fit() -> None:
    lengths = np.random.default_rng(1).integers(1, 70, 400)
    found = [row.tolist() for row in first_fit(lengths, 64)]
    assert found == slow_first_fit(lengths.tolist(), 64)
    assert first_fit(np.array([100, 3]), 64)[0].tolist() == [0]  # too long for any: alone
    assert first_fit(np.array([], np.int64), 64) == []


def test_packed_batches_are_a_function_of_seed_and_step_and_lose_nothing() -> None:
    lengths = np.random.default_rng(2).integers(1, 40, 3000).tolist()
    rows = documents_of(lengths, masked=False)
    data, again = (Examples(rows, rows[:100], epochs=2, batch_size=4, packing=64, seed=5) for _ in range(2))
    other = Examples(rows, epochs=2, batch_size=4, packing=64, seed=6)
    assert data.fingerprint() == again.fingerprint() != other.fingerprint()
    for step in (data.steps - 1, 0, 11):
        one, two = data.batch(step), again.batch(step)
        assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(data.batch(0)["input_ids"], other.batch(0)["input_ids"])
    tokens = places = 0
    for step in range(data.steps):
        batch = data.batch(step)
        assert batch["input_ids"].shape[0] <= 4 and batch["input_ids"].shape[1] <= 64
        tokens, places = tokens + int((batch[DOCUMENTS] > 0).sum()), places + batch["input_ids"].size
    assert tokens == 2 * sum(lengths) and tokens / places > 0.95
    read = np.concatenate(data.plan)
    assert sorted(read[:3000].tolist()) == sorted(read[3000:].tolist()) == list(range(3000))
    assert sum(int((batch[DOCUMENTS] > 0).sum()) for batch in data.validation()) == sum(lengths[:100])


def test_words_do_not_go_on_in_the_next_document() -> None:
    """Whole-word masking hides what one number names: it must not name parts of two documents."""
    assert join_words([[-1, 0, 0, 1], [0, 0, -1]]) == [-1, 0, 0, 1, 2, 2, -1]
    rows = [Row(Feature({"input_ids": [5, 6]}, i), {"words": [0, 0]}) for i in range(40)]
    data = Examples(rows, epochs=1, batch_size=1, packing=80, masking=Masking(9, 50, whole_words=True))
    hidden = data.batch(0)["labels"][0].reshape(40, 2) != IGNORED
    assert (hidden[:, 0] == hidden[:, 1]).all() and 0 < hidden.sum() < 40


def test_documents_are_sorted_by_length_and_padding_is_left_out() -> None:
    documents = np.array([[1, 1, 1, 2, 2, IGNORED], [1, 2, 2, 2, 2, 3]])
    places, lengths = sort_documents(documents)
    assert lengths.tolist() == [1, 1, 2, 3, 4]
    assert places.tolist() == [6, 11, 3, 4, 0, 1, 2, 7, 8, 9, 10]
    assert join_rows(documents_of([2, 3], masked=False)).targets[DOCUMENTS] == [1, 1, 2, 2, 2]
