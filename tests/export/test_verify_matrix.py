"""Every family with every task that it has, in every dtype: torch, ONNX Runtime and Node decide alike; one table.

Small networks of transformers, random and moved away from identity, with MiniLM's real tokenizer: this is about
arithmetic, layouts and conventions of each family; `test_selftest_tasks.py` is about real weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from minilm_heads import MINILM

import lmworks
from lmworks.export.onnx_folder import export_graphs
from lmworks.models.families import TASKS
from lmworks.runtime.onnx_runtime import FILES

sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))
import zoo

pytestmark = [pytest.mark.slow, pytest.mark.node, pytest.mark.timeout(3600)]
WORDS = 30522  # of MiniLM's tokenizer
CHOSEN = [
    ("bert", "TokenClassification"), ("roberta", "SequenceClassification"), ("modernbert", "QuestionAnswering"),
    ("distilbert", "MaskedLM"), ("gpt2", "Model"), ("llama", "CausalLM"), ("vit", "ImageClassification"),
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def sizes() -> Iterator[None]:
    """Give the zoo's configs MiniLM's vocabulary, and heads wide enough for every kernel, while this file runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "VOCAB", WORDS)
        for table in (zoo.TEXT, zoo.DECODER, zoo.MODERN, zoo.DEBERTA):
            patch.setitem(table, "vocab_size", WORDS)
            patch.setitem(table, "hidden_size", 128)
        yield


def make_folder(case: str, head: str, folder: Path) -> Path:
    """Save a network with the files that its task reads."""
    model = zoo.make_reference(case, head)
    model.save_pretrained(folder)
    if case == "vit":
        size = {"height": 32, "width": 32}
        transformers.ViTImageProcessor(size=size).save_pretrained(folder)
        return folder
    longest = model.config.max_position_embeddings
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM, model_max_length=longest)
    tokenizer.save_pretrained(folder)
    if head == "CausalLM":  # what is continued has no [SEP] at its end
        path = folder / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": None}))
    return folder


def cells(case: str) -> list[str]:
    """Return the heads of a family that a task has and this test can ask."""
    family = case.partition(" ")[0]
    heads = [head for head in zoo.HEADS[family].split() if head in TASKS.values()]
    return [head for head in heads if not (family in zoo.READS_BOTH_WAYS and head == "CausalLM")
            and not (family == "vit" and head == "Model")]  # fmt: skip


@pytest.mark.parametrize("case", list(zoo.CONFIGS))
def test_a_family_gives_torchs_decisions_everywhere(case, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    certificates = {}
    for head in cells(case):
        weights = make_folder(case, head, tmp_path / head)
        export_graphs(weights, tmp_path / f"{head} graphs", dtypes=list(FILES))
        report = lmworks.verify(tmp_path / f"{head} graphs", runtimes=["torch", "onnx", "node"], weights=weights)
        with capsys.disabled():
            print()
            report.print()
        certificates[head] = report.values
    assert certificates
    for head, certificate in certificates.items():
        assert not any("fp32" in problem for problem in certificate["problems"]), (head, certificate["problems"])
        check(certificate, head)


def check(certificate: dict[str, Any], head: str) -> None:
    """Hold fp32 to everything; random weights feel rounding more than trained ones: lossy dtypes need to be finite."""
    assert certificate["receipt"]["passed"] and certificate["selftest"]["passed"]
    for runtime, row in certificate["runtimes"].items():
        cell = row["fp32"]
        equal, checked = cell.get("decisions_equal") or cell["tokens_equal"]
        assert cell["passed"] and equal == checked > 0, (head, runtime, cell)
        assert cell["max_abs_diff"] <= 1e-4, (head, runtime, cell)
        assert all(cell["max_abs_diff"] is not None for cell in row.values()), (head, runtime)
        if runtime != "torch":
            assert set(row) == set(FILES)


@pytest.mark.browser
@pytest.mark.parametrize(("case", "head"), CHOSEN, ids=lambda value: value)
def test_the_page_of_a_family_gives_torchs_decisions(case, head, tmp_path) -> None:
    weights = make_folder(case, head, tmp_path / "weights")
    export_graphs(weights, tmp_path / "page", to="web", dtypes=list(FILES))
    certificate = lmworks.verify(tmp_path / "page", runtimes=["browser"]).values
    assert set(certificate["runtimes"]) == {"browser", "browser-2"}
    check(certificate, head)
