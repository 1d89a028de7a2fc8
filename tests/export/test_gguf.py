"""GGUF folders in llama.cpp itself: the same tokens, the same text; and what no llama.cpp can run is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import tokenizers as hf
import torch
import transformers as t
from gguf_models import (
    GPT2,
    HARD,
    LEARNT,
    MODELS,
    PROSE,
    SIZES,
    STRETCHED,
    VOCAB,
    ask,
    make_cut,
    make_model,
    make_pieces,
    make_tokenizer,
    save_plain,
)

from lmworks.base.errors import CheckFailed, InputError
from lmworks.cli import main
from lmworks.export import gguf_model
from lmworks.export.gguf import export_gguf
from lmworks.export.gguf_folder import make_template
from lmworks.export.gguf_tokenizer import LLAMA3_WORDS, join_pieces
from lmworks.export.receipt import check_receipt
from lmworks.tokens.legacy import QWEN2_WORDS
from lmworks.tokens.tokenizer import Tokenizer

DTYPES = ("f32", "f16", "q8_0", "q4_0")
COUNT = 30
GELU = ("phi", "gpt2")  # ggml looks their activation up in a table of 16 bits
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], tuple[dict[str, Any], t.PreTrainedModel]]:
    """What llama.cpp says of every model in every dtype, and transformers' model."""
    root, tokenizer, work, models = tmp_path_factory.mktemp("gguf"), make_tokenizer(), [], {}
    ids = tokenizer.encode(PROSE)
    for name in MODELS:
        models[name] = make_model(name, root / name, tokenizer)
        words = [
            "export",
            str(root / name),
            "--to",
            "gguf",
            "--dtype",
            ",".join(DTYPES),
            "-o",
            str(root / f"{name}.out"),
        ]
        assert main([*words, "--json"]) == 0
        assert check_receipt(root / f"{name}.out")["passed"]
        work += [
            {"path": str(root / f"{name}.out" / f"model-{dtype}.gguf"), "texts": HARD, "count": COUNT,
             "prompts": [ids[:6], ids[LEARNT : LEARNT + 4]], "rows": [ids[:LEARNT], list(range(2, VOCAB, 9))]}
            for dtype in DTYPES
        ]  # fmt: skip
    cells = [(name, dtype) for name in MODELS for dtype in DTYPES]
    found = ask(work, root)
    return {cell: (said, models[cell[0]], root) for cell, said in zip(cells, found, strict=True)}


@pytest.mark.node
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_answers_as_transformers_does(answers: Any, name: str, dtype: str) -> None:
    """B18: F32, F16 and Q8_0 give the same text token by token; every file comes as near as the report says."""
    said, model, root = answers[name, dtype]
    ids, near = Tokenizer.from_pretrained(root / name).encode(PROSE), 0.0
    for prompt, given in zip((ids[:6], ids[LEARNT : LEARNT + 4]), said["greedy"], strict=True):
        inputs = torch.tensor([prompt])
        text = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=COUNT)
        if dtype != "q4_0":
            assert given == text[0, len(prompt) :].tolist()
            near += given[:20] == ids[ids.index(prompt[0]) :][len(prompt) :][:20]
    assert dtype == "q4_0" or near, "the model has learnt nothing by heart, and rounding would change its text"
    rows = (ids[:LEARNT], list(range(2, VOCAB, 9)))
    with torch.no_grad():
        known = [model(torch.tensor([row])).logits[0].numpy() for row in rows]
    worst = max(float(np.abs(a - b).max()) for a, b in zip(said["logits"], known, strict=True))
    stated = json.loads((root / f"{name}.out" / "lmworks.json").read_text())["export"]["dtypes"][dtype]
    if dtype == "f32":
        assert worst <= (1e-2 if name in GELU else 1e-4)
    else:
        assert worst <= 2.5 * stated["max_abs_diff"] + (1e-2 if name in GELU else 1e-3)
    assert said["context"] == (128 if name == "mistral" else 160)
    assert said["ids"] == Tokenizer.from_pretrained(root / name).encode_batch(HARD)
    assert said["special"] == {"bos": 0, "eos": 0, "eot": 0, "begins": False}


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_transformers_reads_the_file_as_well(answers: Any, name: str) -> None:
    """A second reader, which undoes the permutation itself."""
    _, model, root = answers[name, "f32"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = t.AutoModelForCausalLM.from_pretrained(root / f"{name}.out", gguf_file="model-f32.gguf").eval()
    row = torch.arange(2, VOCAB, 9)[None]
    with torch.no_grad():
        assert (again(row).logits - model(row).logits).abs().max() <= 1e-4


def cuts() -> dict[str, Tokenizer]:
    """A tokenizer for each name of a cut."""
    pre = hf.pre_tokenizers
    byte = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    split = {"qwen2": QWEN2_WORDS, "llama-bpe": LLAMA3_WORDS, "dbrx": LLAMA3_WORDS}
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    found = {
        name: make_cut(pre.Split(hf.Regex(words), "isolated"), byte, ignore_merges=name == "llama-bpe",
                       begins=name != "qwen2")
        for name, words in split.items()
    }  # fmt: skip
    found["smollm"] = make_cut(pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False))
    return {name: Tokenizer(backend, config=names) for name, backend in found.items()}


@pytest.mark.node
def test_llama_cpp_cuts_texts_as_we_do(tmp_path: Path, data_folder: Path) -> None:
    """Each kind of tokenizer on hard texts, special tokens spelled out in them; GPT-2's own vocabulary, too."""
    made = cuts()
    gpt2 = tmp_path / "published"
    gpt2.mkdir()
    for theirs, ours in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (gpt2 / ours).write_bytes((data_folder / "tokenizers" / "gpt2" / theirs).read_bytes())
    made["gpt-2"] = Tokenizer.from_pretrained(gpt2)
    made["default"] = make_pieces(tmp_path / "pieces", legacy=True)
    made["default, first"] = make_pieces(tmp_path / "first", legacy=False)
    texts, work = {}, []
    for name, tokenizer in made.items():
        report = export_gguf(save_plain(tmp_path / name, tokenizer), tmp_path / f"{name}.out", dtypes=["q8_0"])
        assert report.values["tokenizer"][1] == name.partition(",")[0]
        end = tokenizer.token(tokenizer.eos_id or 0)
        texts[name] = [
            *HARD,
            f"one{end}two",
            *(["x<|im_end|>    y     z"] if "<|im_end|>" in made[name].backend.get_vocab() else []),
        ]
        if name == "default, first":
            assert "the very beginning only" in report.notes[0]
            texts[name] = [text for text in texts[name] if end not in text and text[0] != " "]
        work.append({"path": str(tmp_path / f"{name}.out" / "model-q8_0.gguf"), "texts": texts[name]})
    for (name, tokenizer), said in zip(made.items(), ask(work, tmp_path), strict=True):
        for text, ids in zip(texts[name], said["ids"], strict=True):
            assert ids == tokenizer.encode(text), (name, text)
        first = tokenizer.encode_prompt("")
        assert said["special"]["begins"] == bool(first) and (not first or first == [said["special"]["bos"]])
        assert said["special"]["eos"] == tokenizer.eos_id


def plain(tmp_path: Path, backend: hf.Tokenizer | None = None, **names: str) -> Path:
    """A tiny Llama with another tokenizer, or with ours."""
    tokenizer = make_tokenizer() if backend is None else Tokenizer(backend, config=names)
    return save_plain(tmp_path / "plain", tokenizer)


def test_an_adapter_is_merged_first(tmp_path: Path) -> None:
    """peft's own answers, from the weights in the file."""
    base = t.LlamaForCausalLM.from_pretrained(plain(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.requires_grad)
    model.eval().save_pretrained(tmp_path / "adapter")
    report = export_gguf(tmp_path / "adapter", tmp_path / "out", dtypes=["f32"])
    assert report.values["merged"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model-f32.gguf").eval()
    row = torch.arange(2, 300, 9)[None]
    with torch.no_grad():
        assert (again(row).logits - model(row).logits).abs().max() <= 1e-4


def test_what_the_file_says(tmp_path: Path) -> None:
    """The keys of ggml's specification with their types, rows without a token, several ends, odd rows of blocks."""
    folder = plain(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0, 3]}))
    report = export_gguf(folder, tmp_path / "out", dtypes=["q4_0", "f16"])
    reader = gguf.GGUFReader(tmp_path / "out" / "model-q4_0.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.architecture"] == "llama" and said["general.file_type"] == 2
    assert said["llama.block_count"] == 1 and said["llama.vocab_size"] == config["vocab_size"]
    assert said["tokenizer.ggml.eos_token_id"] == 1 and said["tokenizer.ggml.eot_token_id"] == 0
    assert said["tokenizer.ggml.tokens"][-1] == f"[PAD{config['vocab_size'] - 1}]"
    assert said["tokenizer.ggml.token_type"][-3:] == [5, 5, 5] and said["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (kinds["token_embd.weight"], kinds["output.weight"], kinds["blk.0.attn_q.weight"]) == (
        "Q8_0",
        "Q8_0",
        "Q4_0",
    )
    assert {kinds["output_norm.weight"], kinds["blk.0.attn_norm.weight"]} == {"F32"}
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.LLAMA]}
    assert {name.rpartition(".")[0].replace("blk.0", "blk.{bid}") for name in kinds} <= known
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./model-q4_0.gguf\nPARAMETER num_ctx 160\n")
    assert 'PARAMETER stop "<|endoftext|>"' in modelfile and '"""{{ .Prompt }}"""' in modelfile
    assert "model-f16.gguf" in (tmp_path / "out" / "README.md").read_text()
    assert report.values["dtypes"]["f16"]["agreement"] > 0.9


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}<|im_start|>user\n{{ .Prompt }}"
                 "<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"),
        ("{{ bos_token }}" + CHATML, None),
        ("{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML, None),
        ("{{ messages[0].content[:3] }}", None),
        (None, "{{ .Prompt }}"),
    ],
)  # fmt: skip
def test_a_chat_template_becomes_ollamas(tmp_path: Path, template: str | None, expected: str | None) -> None:
    """One pattern a turn is said in Ollama's words; every other template stays in the file alone."""
    tokenizer = make_tokenizer(**({} if template is None else {"chat_template": template}))
    report = export_gguf(save_plain(tmp_path / "chat", tokenizer), tmp_path / "out", dtypes=["q8_0"])
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert report.values["notes"] == [] and ("no plain form" in modelfile) == (expected is None)
    if template and "bos_token" in template:  # where llama.cpp puts that token there, the rest is a pattern
        assert make_template(tokenizer, "<|endoftext|>") == make_template(make_tokenizer(chat_template=CHATML), "")
    if expected is not None:
        assert f'TEMPLATE """{expected}"""' in modelfile
    said = {
        key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "out" / "model-q8_0.gguf").fields.items()
    }
    assert said.get("tokenizer.chat_template") == template


PRE = hf.pre_tokenizers
TOKENIZERS = {
    "a WordLevel model": hf.Tokenizer(hf.models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>")),
    "a WordPiece model": hf.Tokenizer(hf.models.WordPiece({"<s>": 0, "a": 1}, unk_token="<s>")),
    "a Unigram model": hf.Tokenizer(hf.models.Unigram([("<s>", 0.0), ("a", -1.0)], unk_id=0)),
    "a cut into words by": make_cut(PRE.Split(hf.Regex(r"\w+|\W"), "isolated"), PRE.ByteLevel(use_regex=False)),
    "add_prefix_space": make_cut(PRE.ByteLevel(add_prefix_space=True)),
    "a normalizer Lowercase": make_cut(PRE.ByteLevel(add_prefix_space=False)),
    "256 bytes": hf.Tokenizer(hf.models.BPE({"<s>": 0, "a": 1}, [])),
}
TOKENIZERS["a normalizer Lowercase"].normalizer = hf.normalizers.Lowercase()
TOKENIZERS["256 bytes"].pre_tokenizer = PRE.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize("found", TOKENIZERS)
def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path: Path, found: str) -> None:
    """One error that says what there is; nothing is written."""
    folder = plain(tmp_path, TOKENIZERS[found], eos_token="<|end|>" if "add" in found or "a n" in found else "<s>")
    with pytest.raises(InputError, match="no such tokenizer") as error:
        export_gguf(folder, tmp_path / "out")
    assert found in error.value.found and "GPT-2" in error.value.expected
    assert not (tmp_path / "out").exists()


def test_merges_that_no_scores_can_say_are_refused(tmp_path: Path) -> None:
    """SentencePiece's rule joins by the piece alone; merges in another order are found out by trying."""
    tokenizer = make_pieces(tmp_path / "pieces", legacy=True)
    state = json.loads(tokenizer.backend.to_str())
    state["model"]["merges"] = [merge for merge in state["model"]["merges"] if "".join(merge) not in ("▁t", "he", "▁a")]
    folder = plain(tmp_path, hf.Tokenizer.from_str(json.dumps(state)), eos_token="</s>")
    with pytest.raises(InputError, match="no such tokenizer") as error:
        export_gguf(folder, tmp_path / "out")
    assert "merges that no scores can say" in error.value.found
    assert join_pieces("abab", {"ab": -1.0, "ba": -2.0, "abab": -9.0, "a": 0.0, "b": 0.0}) == ["abab"]
    assert join_pieces("aé", {"a": 0.0}) == ["a", "<0xC3>", "<0xA9>"]


BERT = {"vocab_size": 492, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = {**SIZES, "vocab_size": 492, "num_key_value_heads": 2}
REFUSED: dict[str, tuple[Any, str, str]] = {
    "BertForMaskedLM": (t.BertForMaskedLM, "BertConfig", "llama, mistral, qwen2, qwen3, phi3, phi, gpt2"),
    "LlamaForSequenceClassification": (t.LlamaForSequenceClassification, "LlamaConfig", "llama, mistral"),
    "the activation gelu": (t.GPT2LMHeadModel, "GPT2Config", "gelu_new"),
    "stretched rotary frequencies": (t.Qwen2ForCausalLM, "Qwen2Config", "silu"),
}


@pytest.mark.parametrize("found", REFUSED)
def test_models_that_llama_cpp_lacks_are_refused(tmp_path: Path, found: str) -> None:
    kind, config, expected = REFUSED[found]
    own = BERT if config == "BertConfig" else GPT2 if config == "GPT2Config" else SMALL
    own = {**own, "activation_function": "gelu"} if config == "GPT2Config" else own
    own = {**own, "rope_parameters": STRETCHED} if config == "Qwen2Config" else own
    kind(getattr(t, config)(**own)).save_pretrained(tmp_path / "model")
    make_tokenizer().save(tmp_path / "model")
    with pytest.raises(InputError) as error:
        export_gguf(tmp_path / "model", tmp_path / "out")
    assert found in error.value.found and expected in error.value.expected
    assert not (tmp_path / "out").exists()


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends in one error, and leaves nothing."""
    folder, out = plain(tmp_path), tmp_path / "out"
    words = ["export", str(folder), "--to", "gguf", "-o", str(out)]
    assert main([*words, "--dtype", "q4"]) == 2 and "q4_0" in capsys.readouterr().err
    assert main([*words, "--external"]) == 2 and "--external" in capsys.readouterr().err
    assert main([*words[:-1], str(folder)]) == 2
    with monkeypatch.context() as patch, pytest.raises(CheckFailed, match="f32 file does not hold the model"):
        patch.setattr(gguf_model, "interleave", lambda tensor, heads: tensor)
        export_gguf(folder, out, dtypes=["f32"])
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="needs a tokenizer"):
        export_gguf(folder, out)
    model = t.LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(folder)
    make_tokenizer().save(folder)
    with pytest.raises(InputError, match="do not fit 16 bits"):
        export_gguf(folder, out, dtypes=["f16"])
    assert not out.exists() and not list(tmp_path.glob("*.partial"))
