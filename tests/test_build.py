"""The main job, small but whole: text -> tokenizer -> model -> graphs -> page -> certificate, by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmworks.cli import main

SMALL = "--steps 40 --layers 2 --hidden-size 64 --heads 2 --context 64 --batch-size 8 --vocab-size 512 --dtype fp32"
LISTED = (
    "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json lmworks.json index.html "
    "selftest.json certificate.json report.html report.json onnx/model.onnx onnx/model_quantized.onnx "
    "training/metrics.jsonl"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A model of the built-in language, verified in all four runtimes; and what --json printed."""
    out = tmp_path_factory.mktemp("build") / "model"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("sys.stdout.write", printed.append)
        code = main(["build", "-o", str(out), "--json", *SMALL.split()])
    assert code == 0
    return out, json.loads("".join(printed))


@pytest.mark.browser
@pytest.mark.node
def test_every_runtime_gives_the_same_tokens(built: tuple[Path, dict[str, Any]]) -> None:
    """C12: the same ONNX file, another text in JavaScript."""
    _, values = built
    assert values["verified"] is True
    for runtime in ("torch", "onnx", "node", "browser"):
        equal, checked = values["certificate"][runtime]["fp32"]["tokens_equal"]
        assert equal == checked >= 256
    for runtime in ("onnx", "node", "browser"):
        assert values["certificate"][runtime]["int8"]["tokens_equal"][1] >= 256


def test_the_folder_is_complete_and_nothing_is_left_beside_it(built: tuple[Path, dict[str, Any]]) -> None:
    out, _ = built
    for name in LISTED.split():
        assert (out / name).is_file(), name
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    assert not [p for p in out.rglob("*") if "staged" in p.name or p.name.endswith((".tmp", ".partial"))]


def test_the_scores_are_those_of_an_independent_count(built: tuple[Path, dict[str, Any]]) -> None:
    """C29: perplexity and bits per byte follow from each other and from the text."""
    _, values = built
    nats = values["validation_loss"] * values["validation_tokens"]
    assert values["perplexity"] == pytest.approx(np.exp(values["validation_loss"]))
    assert values["bits_per_byte"] == pytest.approx(nats / np.log(2) / values["validation_bytes"])
    better = min(values["bits_per_byte"], values["ngram_bits_per_byte"])
    assert values["mixture_bits_per_byte"] <= better + 1e-3  # forty steps teach the network nothing to add
    assert values["entropy_bits_per_byte"] < values["ngram_bits_per_byte"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_opens_the_folder(built: tuple[Path, dict[str, Any]]) -> None:
    """C21: a scratch model that cannot be taken elsewhere."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lmworks

    out, _ = built
    theirs, ours = AutoModelForCausalLM.from_pretrained(out), lmworks.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    recorded = json.loads((out / "selftest.json").read_text())["prompts"]
    assert max(len(prompt["ids"]) for prompt in recorded) == 32  # half of the context, and so many are read otherwise
    for prompt in recorded:
        ids = tokenizer(prompt["text"])["input_ids"]
        assert ids == prompt["ids"]
        with torch.inference_mode():
            difference = theirs(torch.tensor([ids])).logits - ours(torch.tensor([ids]))
        assert difference.abs().max() <= 1e-5


def test_generate_and_evaluate_read_the_folder(
    built: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, _ = built
    prompt = json.loads((out / "selftest.json").read_text())["prompts"][0]
    words = ["--temperature", "0", "--max-tokens", "32", "--json"]
    texts = []
    for runtime in ("torch", "onnx"):
        assert main(["generate", str(out), prompt["text"], "--runtime", runtime, *words]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["tokens"] == texts[1]["tokens"] == prompt["tokens"][: len(texts[0]["tokens"])]
    (tmp_path / "held_out.txt").write_text(prompt["text"] * 20)
    scores = []
    for runtime in ("torch", "onnx"):
        assert main(["evaluate", str(out), str(tmp_path / "held_out.txt"), "--runtime", runtime, "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0]["bits_per_byte"] == pytest.approx(scores[1]["bits_per_byte"], abs=1e-4)


@pytest.mark.parametrize("name", ["onnx/model.onnx", "tokenizer.json", "web/worker.js"])
def test_verify_notices_a_changed_file_and_names_it(
    built: tuple[Path, dict[str, Any]], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """B14: the receipt is rechecked; a certificate is worth nothing if the files may change under it."""
    out, _ = built
    copy = shutil.copytree(out, tmp_path / "copy")
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    assert main(["verify", str(copy), "--runtimes", "torch", "--json"]) == 1
    certificate = json.loads(capsys.readouterr().out)
    assert certificate["passed"] is False
    assert name in certificate["receipt"]["changed"]


def test_an_existing_model_is_not_overwritten_by_accident(built: tuple[Path, dict[str, Any]], capsys) -> None:
    out, _ = built
    before = (out / "lmworks.json").read_bytes()
    assert main(["build", "-o", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "lmworks.json").read_bytes() == before
