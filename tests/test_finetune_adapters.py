"""`--method adapter` and `prefix` by the verbs: every family, its tasks, and what reads the folders that they leave."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t

sys.path.insert(0, str(Path(__file__).with_name("training")))
from tuning_models import POSITIONS, make_body, two_languages, write_rows, write_vocabulary

from lmworks import api
from lmworks.base.errors import InputError
from lmworks.export.receipt import check_receipt
from lmworks.training.finetune import open_predictor
from lmworks.verbs.finetuning import evaluate_task, finetune
from lmworks.verbs.inspection import inspect_folder

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"epochs": 2, "batch_size": 8, "dtype": "fp32"}
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
FAMILIES: dict[str, Any] = {
    "roberta": lambda size: t.RobertaModel(t.RobertaConfig(**SMALL, vocab_size=size, pad_token_id=0)),
    "distilbert": lambda size: t.DistilBertModel(
        t.DistilBertConfig(vocab_size=size, dim=32, n_layers=2, n_heads=2, hidden_dim=64,
                           max_position_embeddings=POSITIONS)
    ),
    "modernbert": lambda size: t.ModernBertModel(
        t.ModernBertConfig(**SMALL, **ENDS, vocab_size=size, cls_token_id=2, sep_token_id=3, local_attention=8)
    ),
    "gpt2": lambda size: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=POSITIONS, **ENDS)
    ),
    "llama": lambda size: t.LlamaForCausalLM(
        t.LlamaConfig(**SMALL, **ENDS, vocab_size=size, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "mistral": lambda size: t.MistralForCausalLM(
        t.MistralConfig(**SMALL, **ENDS, vocab_size=size, num_key_value_heads=1, sliding_window=8)
    ),
    "qwen2": lambda size: t.Qwen2ForCausalLM(t.Qwen2Config(**SMALL, **ENDS, vocab_size=size, num_key_value_heads=1)),
    "phi": lambda size: t.PhiForCausalLM(t.PhiConfig(**SMALL, **ENDS, vocab_size=size)),
}  # fmt: skip
METHODS = ("adapter", "prefix")
WRITERS = ("llama", "mistral", "qwen2", "phi")
FAST, SLOW = ("bert", "modernbert", "llama"), ("roberta", "distilbert", "gpt2", "mistral", "qwen2")


@pytest.fixture(scope="module")
def languages(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A body of each family, and English and German sentences to tell apart."""
    root = tmp_path_factory.mktemp("languages")
    train = two_languages(data_folder, skip=0, count=40)
    texts = [text for text, _ in train]
    make_body(root / "bert", texts)
    for family, make in FAMILIES.items():
        torch.manual_seed(0)
        make(write_vocabulary(root / family, texts)).save_pretrained(root / family)
        settings = json.loads((root / family / "tokenizer_config.json").read_text())
        (root / family / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "[SEP]"}))
    write_rows(root / "train.jsonl", train)
    write_rows(root / "validation.jsonl", two_languages(data_folder, skip=500, count=20))
    (root / "texts.txt").write_text("\n\n".join(texts))
    (root / "more.txt").write_text("\n\n".join(text for text, _ in two_languages(data_folder, skip=500, count=10)))
    return root


def tune(root: Path, out: Path, family: str, **changes: Any) -> dict[str, Any]:
    """Fine-tune a family's body on the languages; return the report's values."""
    settings = {"validation": root / "validation.jsonl", "task": "text-classification", **QUICK, **changes}
    return finetune(root / family, root / "train.jsonl", out, **settings).values


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_each_family_learns_to_classify(family: str, method: str, languages: Path, tmp_path: Path) -> None:
    """The loss falls, the folder answers as the run did, and says what it is."""
    out = tmp_path / "out"
    values = tune(languages, out, family, method=method)
    losses = [row["loss"] for row in read_rows(out / "training/metrics.jsonl") if "loss" in row]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert values["trainable"] < 0.5 * values["parameters"]
    scored = evaluate_task(out, languages / "validation.jsonl").values
    assert {name: scored[name] for name in values["metrics"]} == values["metrics"]
    kind = {"adapter": "LMWORKS_BOTTLENECK", "prefix": "PREFIX_TUNING"}[method]
    assert inspect_folder(out).values["adapter"]["peft_type"] == kind
    assert check_receipt(out)["passed"] and not (out / "model.safetensors").exists()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("family", "task"),
    [
        *(("bert", "fill-mask"), ("gpt2", "text-generation")),
        *(
            pytest.param(name, "text-generation", marks=pytest.mark.slow)
            for name in ("llama", "mistral", "qwen2", "phi")
        ),
    ],
)
def test_words_are_learned(family: str, task: str, method: str, languages: Path, tmp_path: Path) -> None:
    values = finetune(
        languages / family, languages / "texts.txt", tmp_path / "out", validation=languages / "more.txt", task=task,
        method=method, **{**QUICK, "epochs": 2},
    ).values  # fmt: skip
    losses = [row["val_loss"] for row in read_rows(tmp_path / "out/training/metrics.jsonl") if "val_loss" in row]
    assert values["validation_loss"] == min(losses) < losses[0]
    if task == "text-generation":
        said = "".join(api.generate(tmp_path / "out", "a man", max_tokens=5, temperature=0))
        assert isinstance(said, str)
        scored = api.evaluate(tmp_path / "out", languages / "more.txt").values
        assert scored["perplexity"] < api.evaluate(languages / family, languages / "more.txt").values["perplexity"]


@pytest.mark.parametrize("method", METHODS)
def test_the_verbs_open_the_folder(method: str, languages: Path, tmp_path: Path) -> None:
    """classify gives the answers of the run; of another task there is one clear error; a dry run counts."""
    out = tmp_path / "out"
    dry = tune(languages, out, "bert", method=method, dry_run=True)
    assert not out.exists()
    values = tune(languages, out, "bert", method=method)
    assert dry["trainable"] == values["trainable"]
    assert dry["trainable_share"] == values["trainable"] / values["parameters"] < 0.4
    texts = [row["text"] for row in read_rows(languages / "validation.jsonl")]
    answers = api.predict(out, texts)
    direct = open_predictor(out, "text-classification")(texts)
    assert [a[0].label for a in answers] == [a[0].label for a in direct]
    assert max(abs(a[0].score - b[0].score) for a, b in zip(answers, direct, strict=True)) <= 1e-5
    with pytest.raises(InputError, match="trained for another task"):
        api.predict(out, texts, task="token-classification")
    with pytest.raises(InputError, match="runs in torch only"):
        api.predict(out, texts, runtime="onnx")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_gives_the_answers_of_a_prefix_run(languages: Path, tmp_path: Path) -> None:
    values = tune(languages, tmp_path / "out", "bert", method="prefix", prefix_length=7)
    base = t.BertForSequenceClassification.from_pretrained(languages / "bert", num_labels=2)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    assert model.active_peft_config.num_virtual_tokens == 7
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = read_rows(languages / "validation.jsonl")
    right = 0
    with torch.no_grad():
        for row in rows:
            said = model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()
            right += values["labels"][int(said)] == row["label"]
    assert right / len(rows) == values["accuracy"]


def test_a_prefix_leaves_less_room_for_the_text(languages: Path, tmp_path: Path) -> None:
    """A text that only the bare model has room for is refused with its length, not cut."""
    long = "a " * (POSITIONS - 2 - 8)
    rows = [(long, "en"), ("ein", "de")] * 4
    write_rows(tmp_path / "long.jsonl", rows)
    for length, fits in ((8, True), (9, False)):
        settings = {"method": "prefix", "prefix_length": length, "dry_run": True, "task": "text-classification"}
        if fits:
            finetune(languages / "bert", tmp_path / "long.jsonl", tmp_path / "out", **settings)
        else:
            with pytest.raises(InputError, match="longer than the model"):
                finetune(languages / "bert", tmp_path / "long.jsonl", tmp_path / "out", **settings)
