"""load, Predictor and AutoModelForCausalLM: the same text from torch and ONNX Runtime, with and without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LLAMA, make_reference
from transformers import AutoModelForCausalLM as TheirAutoModel
from transformers import LlamaConfig, LlamaForCausalLM

from lmworks import AutoModelForCausalLM
from lmworks.base.errors import FormatError, InputError
from lmworks.export.onnx import export_onnx
from lmworks.runtime import choice
from lmworks.runtime.decoding import generate
from lmworks.runtime.predictor import Predictor, load
from lmworks.tokens.train import train_tokenizer

TEXT = "the cat sat on the mat. 日本語 🙂 naïve café. the dog ran; " * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random Llama with the tokenizer that it goes with: its text is full of broken characters."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT], vocab_size=280)
    tokenizer.save(path)
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "vocab_size": tokenizer.vocab_size, "eos_token_id": 0}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    (path / "generation_config.json").write_text('{"eos_token_id": []}')
    export_onnx(path, path)
    return path


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """A copy of the folder that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def open_both(folder: Path) -> dict[str, Predictor]:
    return {runtime: load(folder, runtime=runtime, threads=1) for runtime in ("torch", "onnx")}


SAMPLED = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "repeat_penalty": 1.2, "repeat_last_n": 8, "seed": 5}


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_torch_and_onnx_write_the_same(folder, settings):
    torch_text, onnx_text = (p.generate("the cat", max_tokens=40, **settings) for p in open_both(folder).values())
    assert len(torch_text.tokens) == 40
    assert torch_text.tokens == onnx_text.tokens
    assert torch_text.text == onnx_text.text
    assert torch_text.tokens_per_second > 0


def test_a_seed_repeats_and_settings_matter(folder):
    predictor = load(folder, threads=1)
    first = predictor.generate("the", max_tokens=30, **SAMPLED)
    assert predictor.generate("the", max_tokens=30, **SAMPLED).tokens == first.tokens
    assert predictor.generate("the", max_tokens=30, **{**SAMPLED, "seed": 6}).tokens != first.tokens
    greedy = predictor.generate("the", max_tokens=30)
    assert greedy.tokens != first.tokens
    assert predictor.generate("the", max_tokens=30, temperature=-1, top_k=3).tokens == greedy.tokens


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_streamed_pieces_are_the_decoded_tokens(folder, settings):
    predictor = load(folder, threads=1)
    stream = predictor.generate("日本", stream=True, max_tokens=60, **settings)
    pieces = list(stream)
    assert len(pieces) > 10
    assert "".join(pieces) == stream.result.text == predictor.tokenizer.decode(stream.result.tokens)
    assert "\ufffd" in stream.result.text, "this random model should have broken a character"


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_the_cache_changes_nothing(folder, runtime):
    p = load(folder, runtime=runtime, threads=1)
    texts = [generate(p.runtime, p.tokenizer, TEXT[:30], max_tokens=32, eos_ids=[], use_cache=c) for c in (True, False)]
    assert "".join(texts[0]) == "".join(texts[1])
    assert texts[0].result.tokens == texts[1].result.tokens
    assert len(texts[0].result.tokens) == 32


def test_greedy_text_equals_transformers(folder):
    """C12: the same tokens in every runtime."""
    model = TheirAutoModel.from_pretrained(folder)
    predictor = load(folder, runtime="onnx", threads=1)
    prompt = torch.tensor([predictor.tokenizer.encode("the dog")])
    model.generation_config.eos_token_id = None
    theirs = model.generate(prompt, max_new_tokens=32, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert predictor.generate("the dog", max_tokens=32).tokens == theirs


@pytest.mark.parametrize("ends", ["int", "list", "config"])
def test_end_tokens_come_from_the_folder(copy, ends):
    tokens = load(copy, threads=1).generate("the cat", max_tokens=20).tokens
    at = next(i for i in range(5, 20) if tokens[i] not in tokens[:i])
    value = [279, tokens[at]] if ends == "list" else tokens[at]
    if ends == "config":
        (copy / "generation_config.json").unlink()
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "eos_token_id": value}))
    else:
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    for predictor in open_both(copy).values():
        result = predictor.generate("the cat", max_tokens=20)
        assert result.tokens == tokens[: at + 1]
        assert result.finish_reason == "stop"


def test_without_any_the_tokenizers_end_token_counts(copy):
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    assert load(copy, threads=1).eos_ids == [0]


def test_auto_keeps_the_answers_with_what_is_there(copy, monkeypatch):
    """Which of float32's runtimes is taken is test_choice.py's matter; int8 only where there is nothing else."""
    assert load(copy).runtime.dtype == "fp32"
    monkeypatch.setattr(choice, "is_installed", lambda name: name == "torch")
    assert load(copy).runtime.name == "torch"
    monkeypatch.undo()
    (copy / "onnx" / "model.onnx").unlink()
    assert (load(copy).runtime.name, load(copy).runtime.dtype) == ("torch", "fp32")
    (copy / "model.safetensors").rename(copy / "elsewhere")
    assert (load(copy).runtime.name, load(copy).runtime.dtype) == ("onnx", "int8")
    (copy / "elsewhere").rename(copy / "model.safetensors")
    shutil.rmtree(copy / "onnx")
    assert (load(copy).runtime.name, load(copy).runtime.dtype) == ("torch", "fp32")


def test_errors_name_the_path_and_the_fix(copy, tmp_path):
    with pytest.raises(InputError, match="no such model folder") as caught:
        load(tmp_path / "nowhere")
    assert "nowhere" in caught.value.where
    with pytest.raises(InputError, match="no such runtime"):
        load(copy, runtime="tflite")
    shutil.rmtree(copy / "onnx")
    with pytest.raises(InputError) as caught:
        load(copy, runtime="onnx")
    assert caught.value.where.endswith("model.onnx")


def test_a_foreign_tokenizer_is_refused(copy):
    """C5: a tokenizer with more tokens than the embedding has rows."""
    words = " ".join(f"word{i} other{i}" for i in range(300))
    train_tokenizer([words], vocab_size=400).save(copy)
    with pytest.raises(FormatError, match="does not belong"):
        load(copy)


def test_too_long_a_prompt_is_refused_and_the_last_position_ends_a_text(folder):
    """C32: no silent cut."""
    predictor = load(folder, threads=1)
    with pytest.raises(InputError, match="does not fit"):
        predictor.generate("xyz " * 200)
    result = predictor.generate("the", max_tokens=1000)
    assert result.finish_reason == "length"
    assert len(predictor.tokenizer.encode("the")) + len(result.tokens) == predictor.runtime.max_length + 1


def test_load_and_generate_work_without_torch(folder):
    """C38: no torch where an exported model is run."""
    code = """
import sys
sys.modules["torch"] = None
import lmworks.runtime.predictor as p
model = p.load(sys.argv[1])
assert model.runtime.name == "onnx"
print(model.generate("the cat", max_tokens=12).tokens)
try:
    p.load(sys.argv[1], runtime="torch")
except p.LmworksError as error:
    print(error.fix)
"""
    code = code.replace("p.LmworksError", "Exception")
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokens, fix = done.stdout.splitlines()
    assert json.loads(tokens) == load(folder, threads=1).generate("the cat", max_tokens=12).tokens
    assert "pip install" in fix


def test_the_auto_class_gives_logits_and_round_trips(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 250, (2, 30)))
    with torch.no_grad():
        logits = model(ids)
        theirs = TheirAutoModel.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(TheirAutoModel.from_pretrained(tmp_path)(ids).logits, theirs, atol=0, rtol=0)
    assert export_onnx(model, tmp_path)["fp32"].read_bytes() == (folder / "onnx" / "model.onnx").read_bytes()


@pytest.mark.parametrize("variant", ["gpt2", "llama-gqa-tied"])
def test_the_auto_class_generates_as_transformers_does(variant, tmp_path):
    theirs = make_reference(variant)
    theirs.save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.from_numpy(np.random.default_rng(1).integers(5, 200, (2, 12)))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(ours.generate(ids, mask, max_new_tokens=20), expected)
    end = next(int(token) for token in expected[1, 14:] if token not in expected[0, 12:])
    short = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=[end, 210], pad_token_id=end
    )
    assert not torch.equal(short, expected)
    assert torch.equal(ours.generate(ids, mask, max_new_tokens=20, eos_token_id=[end, 210]), short)
