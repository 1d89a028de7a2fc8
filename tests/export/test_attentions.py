"""Graphs that give out where each layer looks: the weights are transformers' own, and everything else is as it was."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from js_engine import ask as ask_node
from js_engine import make_model as write_model
from task_pages import MINILM
from test_emit import batches, make_model, open_graph, sizes  # noqa: F401

sys.path.append(str(Path(__file__).parents[1] / "parity"))
import zoo

import lmworks
from lmworks.base.errors import InputError
from lmworks.export.emit import make_graph
from lmworks.export.onnx_folder import export_graphs
from lmworks.models.checkpoint import load_model
from lmworks.tokens.tokenizer import Tokenizer

CLOSE = 1e-5
ENCODERS = [name for name in zoo.CONFIGS if name.split()[0] in
            {"albert", "bert", "deberta-v2", "distilbert", "modernbert", "roberta", "vit", "xlm-roberta"}]  # fmt: skip
TEXTS = ["A dog runs in the park with its new ball.", "The bank raised its rates.", "Cats sleep."]


def ask(session, batch: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the weights (B, H, T, T) of every layer."""
    names = [item.name for item in session.get_outputs() if item.name.startswith("attentions.")]
    assert names == [f"attentions.{i}" for i in range(len(names))]
    return session.run(names, {item.name: batch[item.name] for item in session.get_inputs()})


def compare(given: list[np.ndarray], known: tuple[torch.Tensor, ...], mask: np.ndarray) -> float:
    """Return the largest difference at real queries; padding takes no part."""
    assert len(given) == len(known) > 1
    worst = 0.0
    for one, other in zip(given, known, strict=True):
        assert one.shape == other.shape
        for row, real in enumerate(mask == 1):
            assert one[row][:, real][..., ~real].max(initial=0) == 0, "nobody looks at padding"
            np.testing.assert_allclose(one[row][:, real].sum(-1), 1, atol=1e-5)
            worst = max(worst, float(np.abs(one[row] - other[row].numpy())[:, real].max()))
    return worst


@pytest.mark.parametrize("case", ENCODERS)
def test_the_weights_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    """Every layer and head, padding on the right; ModernBERT's windows are shorter than the texts."""
    head = "ImageClassification" if case == "vit" else "Model"
    reference = zoo.make_reference(case, head)
    reference.set_attn_implementation("eager")
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path, head)
    session = open_graph(make_graph(model, attentions=True).to_bytes())
    *_, batch, _ = batches(model)
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    with torch.no_grad():
        known = reference(**tensors, output_attentions=True).attentions
    mask = batch.get("attention_mask", np.ones((len(batch.get("pixel_values", ())), known[0].shape[-1])))
    assert compare(ask(session, batch), known, mask) < CLOSE
    uniform = np.abs(known[1].numpy() - 1 / known[1].shape[-1]).max()
    assert uniform > 0.05, "the layers look somewhere"


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "uint8", "q4", "q4f16", "bnb4"])
def test_the_other_answers_stay_as_they_were(dtype: str) -> None:
    """Where ONNX Runtime rounds to 16 bits depends on who reads a value: there, no farther from fp32 than before."""
    for case, head in (("bert", "SequenceClassification"), ("modernbert", "TokenClassification"),
                       ("deberta-v2", "QuestionAnswering"), ("albert", "MaskedLM")):  # fmt: skip
        model = make_model(case, head)
        plain, more = (make_graph(model, dtype=dtype, attentions=flag) for flag in (False, True))
        names = [item.name for item in plain.outputs]
        assert [item.name for item in more.outputs] == names + [f"attentions.{i}" for i in range(4)]
        exact, *sessions = (open_graph(graph.to_bytes()) for graph in (make_graph(model), plain, more))
        for batch in batches(model):
            feed = {item.name: batch[item.name] for item in exact.get_inputs()}
            known, before, after = (session.run(names, feed)[0] for session in (exact, *sessions))
            if "16" in dtype:
                assert np.square(after - known).mean() < 1.2 * np.square(before - known).mean()
            else:
                assert np.abs(after - before).max() <= 1e-6
        weights = ask(sessions[1], batch)
        assert all(array.dtype == np.float32 for array in weights)


def test_the_weights_of_a_real_model(tmp_path: Path) -> None:
    """A batch of three lengths, six layers of twelve heads; the folder answers and verifies as any other."""
    report = export_graphs(MINILM, tmp_path / "graphs", dtypes=["fp32"], attentions=True)
    assert report.values["attentions"] is True
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="np"))
    reference = transformers.AutoModel.from_pretrained(MINILM, attn_implementation="eager")
    with torch.no_grad():
        known = reference(**{name: torch.from_numpy(array) for name, array in batch.items()}, output_attentions=True)
    assert np.shape(known.attentions) == (6, 3, 12, *batch["input_ids"].shape[1:] * 2)
    graph = lmworks.load(tmp_path / "graphs", threads=1)
    assert compare(ask(graph.runtime.session, batch), known.attentions, batch["attention_mask"]) < CLOSE
    np.testing.assert_allclose(np.array(graph(TEXTS)), np.array(lmworks.load(MINILM)(TEXTS)), atol=1e-5)
    found = lmworks.verify(tmp_path / "graphs", runtimes=["onnx"])
    assert found.values["passed"] is True


@pytest.mark.node
@pytest.mark.parametrize(("case", "head", "task", "given"), [
    ("roberta", "QuestionAnswering", "question-answering",
     {"question": "Who was naïve?", "context": "Ada Lovelace 🙂 was in Paris. " * 20}),
    ("modernbert", "TokenClassification", "token-classification", {"text": "Unmistakably, Zoë saw 東京."}),
])  # fmt: skip
def test_javascript_reads_the_same_weights(case, head, task, given, data_folder, tmp_path) -> None:
    """Windows, layers and their mean; tokens are spelled to be read, and pieces know the word that they go on with."""
    weights = write_model(case, head, tmp_path / "weights", data_folder)
    export_graphs(weights, tmp_path / "graphs", dtypes=["fp32"], attentions=True)
    options = {"max_length": 40, "overlap": 8} if case == "roberta" else {}
    choices = [{"layer": None, "part": 0}, {"layer": 1, "part": 0}]
    choices += [{"layer": 0, "part": 2}] if case == "roberta" else []
    calls = [{"input": given, "options": options, "choice": choice} for choice in choices]
    jobs = [{"folder": str(tmp_path / "graphs"), "task": task, "dtype": "fp32", "calls": calls}]
    tokenizer = Tokenizer.from_pretrained(tmp_path / "graphs")
    session = lmworks.load(tmp_path / "graphs", threads=1).runtime.session
    if case == "roberta":
        windows = tokenizer.encode_windows(given["context"], before=given["question"], length=40, overlap=8)
    else:
        windows = tokenizer.encode_inputs([given["text"]])
    spelled = {0: "<s> Who was naïve ? </s> </s> Ada Lovelace 🙂 was in Paris . Ada Lovelace 🙂 was in Paris . "
               "Ada Lovelace 🙂 was in Paris . Ada Lovelace </s>",
               2: "<s> Who was naïve ? </s> </s> velace 🙂 was in Paris . Ada Lovelace 🙂 was in Paris . "
               "Ada Lovelace 🙂 was in Paris . Ada Lovelace 🙂 was in </s>"}  # fmt: skip
    spelled = spelled if case == "roberta" else {0: "<s> Unmistakably , Zoë saw 東京 . </s>"}
    for choice, found in zip(choices, ask_node({"jobs": jobs})[0], strict=True):
        ids = np.array([windows[choice["part"]].ids])
        layers = np.stack(ask(session, {"input_ids": ids, "attention_mask": np.ones_like(ids)}))[:, 0]
        known = layers.mean(0) if choice["layer"] is None else layers[choice["layer"]]
        assert found["heads"] == len(known)
        np.testing.assert_allclose(np.reshape(found["weights"], known.shape), known, atol=1e-5)
        assert len(found["tokens"]) == ids.size
        assert len(found["parts"]) == len(windows)
        words = "".join(("" if token["joined"] else " ") + token["text"] for token in found["tokens"])
        assert words.replace("·", "").strip() == spelled[choice["part"]]
        assert found["parts"][0].startswith(("Ada Lovelace 🙂 was in Paris.", "Unmistakably, Zoë saw"))


@pytest.mark.node
def test_layers_are_fetched_in_groups_and_pruned_ones_are_added_by_their_means() -> None:
    """30 layers of 256 tokens take 94 MB with 12 heads; a layer that lost heads has no second one to be added.

    An answer asks for its own output alone: any other would be counted as a group.
    """
    found = ask_node({"folder": str(MINILM), "layers": [2] * 40})
    assert found == {"groups": [30, 10], "heads": 2, "tokens": 256, "weights": [20.5], "length": 2 * 256**2}
    found = ask_node({"folder": str(MINILM), "layers": [2, 2, 1, 2]})
    assert found == {"groups": [4], "heads": 1, "tokens": 256, "weights": [2.5], "length": 256**2}


def test_models_that_look_back_only_are_refused(tmp_path: Path) -> None:
    for case, head in (("gpt2", "CausalLM"), ("llama", "SequenceClassification")):
        with pytest.raises(
            InputError, match=r"(?s)cannot give its attention.*BERT, RoBERTa.*without --attentions"
        ) as error:
            make_graph(make_model(case, head), attentions=True)
        assert case in str(error.value)
    zoo.make_reference("gpt2", "CausalLM").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="cannot give its attention"):
        export_graphs(tmp_path / "gpt2", tmp_path / "out", attentions=True)
    assert not (tmp_path / "out").exists()
