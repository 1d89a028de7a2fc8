"""Folders that peft wrote are opened by every verb, numbered labels are taken as numbers, a whole run says so.

The oracle is peft over transformers, with the same folders.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t

sys.path.insert(0, str(Path(__file__).with_name("training")))
from tuning_models import POSITIONS, make_body, write_rows, write_vocabulary

from lmworks import api
from lmworks.base.errors import InputError
from lmworks.models.families import read_config, read_kind
from lmworks.training.finetune import open_predictor
from lmworks.verbs.finetuning import evaluate_task, finetune

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a small dog runs home", "the old cat sleeps", "rain falls on the sea", "two birds sing in a tree"]
CLOSE = 1e-5
ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def adapt(base: Path, model: Any, folder: Path, **settings: Any) -> Any:
    """Save a model as a base, let peft put a random adapter on it, save that, and return it."""
    model.save_pretrained(base)
    again = type(model).from_pretrained(base).eval()
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D, which peft mends by itself
        theirs = peft.get_peft_model(again, peft.LoraConfig(r=4, init_lora_weights=False, **settings)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    theirs.save_pretrained(folder)
    return theirs


def make_classifier(root: Path, *, labels: int = 2, named: bool = True, **settings: Any) -> Any:
    """Leave a base and an adapter of peft's that classifies texts; return peft's model."""
    size = write_vocabulary(root / "base", TEXTS)
    names = {"id2label": dict(enumerate("xyz"[:labels]))} if named else {"num_labels": labels}
    torch.manual_seed(0)
    config = t.BertConfig(vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                          intermediate_size=64, max_position_embeddings=POSITIONS, **names)  # fmt: skip
    return adapt(root / "base", t.BertForSequenceClassification(config), root / "adapter",
                 **{"task_type": "SEQ_CLS", **settings})  # fmt: skip


def make_decoder(root: Path) -> Any:
    """Leave a base and an adapter of peft's that writes; return peft's model."""
    size = write_vocabulary(root / "base", TEXTS)
    torch.manual_seed(0)
    config = t.GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=POSITIONS, **ENDS)
    return adapt(root / "base", t.GPT2LMHeadModel(config), root / "adapter", task_type="CAUSAL_LM",
                 target_modules=["c_attn"], fan_in_fan_out=True)  # fmt: skip


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def logits_of(model: Any, root: Path) -> torch.Tensor:
    """Return what peft's model says of the texts, one at a time."""
    tokenizer = t.AutoTokenizer.from_pretrained(root / "base")
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])


# ------------------------------------------------------------------------------------------- folders that peft wrote


@pytest.mark.parametrize("place", ["absolute", "relative"])
@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_a_classifier_of_peft_is_opened(
    place: str, task_type: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {} if task_type else {"modules_to_save": ["classifier"], "target_modules": ["query", "value"]}
    expected = logits_of(make_classifier(tmp_path, task_type=task_type, **own), tmp_path)
    if place == "relative":
        monkeypatch.chdir(tmp_path)
        edit(tmp_path / "adapter", base_model_name_or_path="base")
    said = api.load(tmp_path / "adapter")(TEXTS, top_k=None)
    scores = torch.tensor([[{one.label: one.score for one in row}[name] for name in "xy"] for row in said])
    labels = ["xy"[i] for i in expected.argmax(1)]
    assert [row[0].label for row in said] == labels
    assert (scores - expected.softmax(1)).abs().max() <= CLOSE
    model: Any = api.load(tmp_path / "adapter").runtime.model  # type: ignore[attr-defined]
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        ours = torch.cat([model(torch.tensor([tokenizer(text)["input_ids"]])) for text in TEXTS])
    assert (ours - expected).abs().max() <= CLOSE
    file = write_rows(tmp_path / "data.jsonl", [(text, "x") for text in TEXTS])
    for report in (evaluate_task(tmp_path / "adapter", file), api.evaluate(tmp_path / "adapter", file)):
        assert report.values["accuracy"] == labels.count("x") / len(TEXTS)


def test_the_saved_head_says_how_many_labels_there_are(tmp_path: Path) -> None:
    theirs = make_classifier(tmp_path, labels=3, named=False)
    path = tmp_path / "base/config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in whole.items() if key not in ("id2label", "label2id")}))
    config = read_config(tmp_path / "adapter")
    assert read_kind(config) == "SequenceClassification"
    assert config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    said = [row[0].label for row in api.load(tmp_path / "adapter")(TEXTS)]
    assert said == [f"LABEL_{i}" for i in logits_of(theirs, tmp_path).argmax(1)]


def test_a_decoder_of_peft_writes_and_is_scored(tmp_path: Path) -> None:
    theirs = make_decoder(tmp_path)
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "base")
    stream = api.generate(tmp_path / "adapter", "the old cat", temperature=0.0, max_tokens=8)
    text = "".join(stream)
    predictor = open_predictor(tmp_path / "adapter", "text-generation")
    ids = torch.tensor([predictor.tokenizer.encode_prompt("the old cat")])  # type: ignore[union-attr]
    with torch.no_grad():
        made = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        network: Any = predictor.runtime.model  # type: ignore[attr-defined]
        assert (network(ids) - theirs(input_ids=ids).logits).abs().max() <= CLOSE
    assert text.split() == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).split()
    rows = [{"prompt": "the old", "completion": " cat sleeps"}]
    (tmp_path / "pc.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert api.evaluate(tmp_path / "adapter", tmp_path / "pc.jsonl").values["perplexity"] > 1


def test_a_base_that_is_not_to_be_had_is_named(tmp_path: Path) -> None:
    make_classifier(tmp_path)
    for base, named in (
        (str(tmp_path / "gone"), "base model was not found"), ("no-such-org/no-such-model", "base model was not found"),
        (None, "does not say which model"), (str(tmp_path / "adapter"), "base is an adapter itself"),
    ):  # fmt: skip
        edit(tmp_path / "adapter", base_model_name_or_path=base)
        with pytest.raises(InputError, match=named):
            api.load(tmp_path / "adapter")
        with pytest.raises(InputError, match=named):
            evaluate_task(tmp_path / "adapter", tmp_path / "data.jsonl")


# -------------------------------------------------------------------------------------------- labels that are numbers


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A classifier with the usual names of labels, and data labelled 0 and 1."""
    make_classifier(tmp_path, named=False)
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(TEXTS)))
    return tmp_path


def test_numbers_are_the_labels_of_a_numbered_head(numbered: Path) -> None:
    base = t.BertForSequenceClassification.from_pretrained(numbered / "base").eval()
    said = logits_of(base, numbered).argmax(1).tolist()
    right = sum(i % 2 == label for i, label in enumerate(said)) / len(TEXTS)
    assert evaluate_task(numbered / "base", numbered / "data.csv").values["accuracy"] == right
    report = finetune(numbered / "base", numbered / "data.csv", numbered / "out", validation=numbered / "data.csv",
                      method="head", epochs=1, lr=1e-8, dtype="fp32")  # fmt: skip
    assert not report.values["new_head"]
    assert read_config(numbered / "out").labels == ("0", "1")
    assert [int(row[0].label) for row in api.load(numbered / "out")(TEXTS)] == said
    assert evaluate_task(numbered / "out", numbered / "data.csv").values["accuracy"] == right


def test_a_label_that_the_model_lacks_is_called_so(numbered: Path) -> None:
    for label in ("2", "nice"):
        (numbered / "other.csv").write_text(f"text,label\na dog,0\na cat,{label}\n")
        with pytest.raises(InputError, match=f'"{label}" is not one of the model\'s labels'):
            evaluate_task(numbered / "base", numbered / "other.csv")


def test_several_labels_at_once_are_not_for_a_head_that_names_no_problem(numbered: Path) -> None:
    rows = [{"text": text, "label": ["LABEL_0", "LABEL_1"]} for text in TEXTS]
    (numbered / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="another kind of label"):
        evaluate_task(numbered / "base", numbered / "many.jsonl")


# ------------------------------------------------------------------------------------------------------ whole already


def test_a_run_that_is_complete_says_so_to_resume(tmp_path: Path) -> None:
    make_body(tmp_path / "body", TEXTS)
    file = write_rows(tmp_path / "data.jsonl", [(text, "ab"[i % 2]) for i, text in enumerate(TEXTS)])
    more: dict[str, Any] = {"validation": file, "task": "text-classification", "epochs": 1, "dtype": "fp32"}
    finetune(tmp_path / "body", file, tmp_path / "out", method="head", **more)
    with pytest.raises(InputError, match="already holds a model"):
        finetune(tmp_path / "body", file, tmp_path / "out", method="head", **more)
    with pytest.raises(InputError, match="complete: there is nothing to resume"):
        finetune(tmp_path / "body", file, tmp_path / "out", method="head", resume=True, **more)
    (tmp_path / "out.partial").mkdir()  # of another run, which replaces this one
    with pytest.raises(InputError, match="already holds a model"):
        finetune(tmp_path / "body", file, tmp_path / "out", method="head", resume=True, **more)
