"""`inspect` against the counts and settings of the libraries that wrote the folders."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from lmworks.base.errors import FormatError, InputError, LmworksError
from lmworks.models.checkpoint import load_model
from lmworks.verbs.compress_knobs import Pruning, Quantizing
from lmworks.verbs.compressing import prune, quantize
from lmworks.verbs.inspection import inspect_folder

SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
KV = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
DISTIL = {"vocab_size": 60, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
VIT = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 16}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "num_layers": 2}
MODERN = {**SMALL, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {  # class: its config, the task
    "BertForMaskedLM": ("BertConfig", SMALL, "fill-mask"),
    "BertForPreTraining": ("BertConfig", SMALL, "fill-mask"),
    "BertForSequenceClassification": ("BertConfig", SMALL, "text-classification"),
    "BertForTokenClassification": ("BertConfig", SMALL, "token-classification"),
    "BertForQuestionAnswering": ("BertConfig", SMALL, "question-answering"),
    "BertModel": ("BertConfig", SMALL, "feature-extraction"),
    "RobertaForMaskedLM": ("RobertaConfig", {**SMALL, "max_position_embeddings": 66}, "fill-mask"),
    "RobertaForSequenceClassification": ("RobertaConfig", SMALL, "text-classification"),
    "DistilBertForMaskedLM": ("DistilBertConfig", DISTIL, "fill-mask"),
    "DistilBertForSequenceClassification": ("DistilBertConfig", DISTIL, "text-classification"),
    "AlbertForMaskedLM": ("AlbertConfig", {**SMALL, "embedding_size": 16}, "fill-mask"),
    "DebertaV2ForMaskedLM": ("DebertaV2Config", {**SMALL, "relative_attention": True}, "fill-mask"),
    "ModernBertForMaskedLM": ("ModernBertConfig", MODERN, "fill-mask"),
    "GPT2LMHeadModel": ("GPT2Config", GPT2, "text-generation"),
    "GPT2ForSequenceClassification": ("GPT2Config", GPT2, "text-classification"),
    "LlamaForCausalLM": ("LlamaConfig", KV, "text-generation"),
    "MistralForCausalLM": ("MistralConfig", {**KV, "tie_word_embeddings": True}, "text-generation"),
    "Qwen2ForCausalLM": ("Qwen2Config", KV, "text-generation"),
    "PhiForCausalLM": ("PhiConfig", SMALL, "text-generation"),
    "ViTForImageClassification": ("ViTConfig", VIT, "image-classification"),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SMALL, "text-generation"),
    "T5ForConditionalGeneration": ("T5Config", T5, "text2text-generation"),
}  # fmt: skip
UNSUPPORTED = {"GPTNeoXForCausalLM", "T5ForConditionalGeneration"}


def make(name: str, folder: Path, **options: Any) -> Any:
    """Save a model of transformers with random weights, and return it."""
    kind, settings, _ = MODELS[name]
    config = getattr(transformers, kind)(**{**settings, **options})
    model = getattr(transformers, name)(config)
    model.save_pretrained(folder)
    return model


def values(folder: Path) -> dict[str, Any]:
    """Inspect, and prove that the result is JSON and can be shown."""
    report = inspect_folder(folder)
    shown = io.StringIO()
    report.print(shown)
    assert report.title in shown.getvalue()
    assert "<html" in report.to_html()
    return json.loads(json.dumps(report.to_dict(), allow_nan=False))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_structure_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    model = make(name, tmp_path)
    found = values(tmp_path)
    config = model.config
    assert found["parameters"]["total"] == model.num_parameters()
    assert sum(n for part, n in found["parameters"].items() if part != "total") == found["parameters"]["total"]
    assert (found["architecture"], found["task"]) == (name, MODELS[name][2])
    assert found["supported"] == (name not in UNSUPPORTED)
    assert found["num_hidden_layers"] == config.num_hidden_layers
    assert found["hidden_size"] == config.hidden_size
    assert found["num_attention_heads"] == config.num_attention_heads
    assert list(found["dtypes"]) == ["F32"]
    assert found["bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    context = getattr(config, "max_position_embeddings", None)
    if name == "RobertaForMaskedLM":
        context = 64  # 66 rows, and the first position is 2
    if name != "RobertaForSequenceClassification":
        assert found["context_length"] == context
    told = any("not supported" in warning and "albert, bert" in warning for warning in found["warnings"])
    assert told == (name in UNSUPPORTED)


def test_parts_are_counted_where_they_belong(tmp_path: Path) -> None:
    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    model = make("BertForSequenceClassification", tmp_path)
    assert values(tmp_path)["parameters"] == {
        "embeddings": count(model.bert.embeddings),
        "layers": count(model.bert.encoder),
        "head": count(model.classifier),
        "rest": count(model.bert.pooler),
        "total": count(model),
    }
    model = make("GPT2LMHeadModel", tmp_path)
    assert values(tmp_path)["parameters"] == {
        "embeddings": count(model.transformer.wte) + count(model.transformer.wpe),
        "layers": count(model.transformer.h),
        "head": 0,  # it is the embedding
        "rest": count(model.transformer.ln_f),
        "total": model.num_parameters(),
    }


def test_legacy_masks_and_heads_written_twice_are_not_counted(tmp_path: Path) -> None:
    """GPT-2's published file holds a triangle a layer; older ones hold the tied head as well."""
    model = make("GPT2LMHeadModel", tmp_path)
    state = {k: v.clone() for k, v in model.state_dict().items()}  # lm_head.weight included
    state |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}
    state |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    save_file(state, tmp_path / "model.safetensors")
    assert values(tmp_path)["parameters"]["total"] == model.num_parameters()
    model = make("BertForMaskedLM", tmp_path)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert "cls.predictions.decoder.bias" in state
    save_file({**state, "bert.embeddings.position_ids": torch.arange(512)[None]}, tmp_path / "model.safetensors")
    assert values(tmp_path)["parameters"]["total"] == model.num_parameters()


def test_shards_dtypes_and_their_faults(tmp_path: Path) -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    found = values(tmp_path)
    assert found["parameters"]["total"] == model.num_parameters()
    assert found["dtypes"] == {"BF16": model.num_parameters()}
    shards[0].write_bytes(shards[0].read_bytes()[:-9])
    shards[1].unlink()
    told = "\n".join(values(tmp_path)["warnings"])
    assert f"{shards[0].name} cannot be used: 9 bytes are missing" in told
    assert "fetch it again" in told
    assert f"{shards[1].name} is missing" in told
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    assert "does not name files beside it" in "\n".join(values(tmp_path)["warnings"])


def test_labels(tmp_path: Path) -> None:
    """C33: `LABEL_0` in output."""
    make("BertForSequenceClassification", tmp_path, num_labels=3)
    found = values(tmp_path)
    assert found["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert any("the labels have no names" in warning for warning in found["warnings"])
    make("BertForSequenceClassification", tmp_path)  # transformers 5 leaves two labels out of the file
    assert any("the labels have no names" in warning for warning in values(tmp_path)["warnings"])
    make("BertForSequenceClassification", tmp_path, num_labels=1)
    assert not any("label" in warning for warning in values(tmp_path)["warnings"])
    names = {i: f"topic {i}" for i in range(12)}
    make("BertForSequenceClassification", tmp_path, id2label=names, label2id={v: k for k, v in names.items()})
    found = values(tmp_path)
    assert found["labels"] == list(names.values())
    assert not any("label" in warning for warning in found["warnings"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {"0": "a", "1": "b"}}))
    assert "names 2 labels, and the head gives 12 scores" in "\n".join(values(tmp_path)["warnings"])


def test_tokenizers_are_described_as_transformers_loads_them(tmp_path: Path, data_folder: Path) -> None:
    real = data_folder / "tokenizers"
    legacy = {
        "bert": {"vocab.txt": real / "bert-base-uncased" / "vocab.txt"},
        "gpt2": {"vocab.json": real / "gpt2" / "encoder.json", "merges.txt": real / "gpt2" / "vocab.bpe"},
    }
    for name, kind in (("bert", "WordPiece"), ("gpt2", "byte-level BPE")):
        old, new = tmp_path / name, tmp_path / f"{name}-new"
        old.mkdir()
        (old / "config.json").write_text(json.dumps({"model_type": name}))
        for file, source in legacy[name].items():
            shutil.copy(source, old / file)
        tokenizer = AutoTokenizer.from_pretrained(old)
        found = values(old)["tokenizer"]
        assert (found["file"], found["kind"], found["ids"]) == (next(iter(legacy[name])), kind, len(tokenizer))
        tokenizer.add_tokens(["<extra>"])
        tokenizer.chat_template = "{{ messages }}"
        tokenizer.model_max_length = 512
        tokenizer.save_pretrained(new)
        whole = values(new)
        assert whole["chat_template"]
        assert not values(old)["chat_template"]
        assert whole["tokenizer"] == {
            "file": "tokenizer.json",
            "kind": kind,
            "ids": len(tokenizer),
            "special_tokens": tokenizer.special_tokens_map,
            "max_length": 512,
        }


def test_a_tokenizer_larger_than_the_embedding_is_seen(tmp_path: Path) -> None:
    """C5: tokenizer/embedding mismatch, "index out of range"."""
    make("GPT2LMHeadModel", tmp_path)
    assert "there is no tokenizer" in "\n".join(values(tmp_path)["warnings"])
    for count, wrong in ((60, False), (61, True)):
        tokenizer = Tokenizer(models.BPE({f"w{i}": i for i in range(50)}, [], unk_token="w0"))
        tokenizer.add_special_tokens([f"<s{i}>" for i in range(count - 50)])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        found = values(tmp_path)
        assert found["tokenizer"]["ids"] == count
        assert any("embedding only 60 rows" in warning for warning in found["warnings"]) == wrong
    for broken in ("{", "[]", "{}", '{"model": 3}', '{"model": {"vocab": {"a": "b"}}}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        assert "the tokenizer cannot be read" in "\n".join(values(tmp_path)["warnings"])


def test_sentence_transformers_pooling(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as parts

    make("BertModel", tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    AutoTokenizer.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "bert")
    for mode in ("mean", "cls", "max"):
        body = parts.Transformer(str(tmp_path / "bert"))
        SentenceTransformer(modules=[body, parts.Pooling(32, mode), parts.Normalize()]).save(str(tmp_path / mode))
        found = values(tmp_path / mode)
        assert (found["pooling"], found["task"]) == (mode, "feature-extraction")


def test_pickled_weights_are_named_and_never_opened(tmp_path: Path) -> None:
    make("GPT2LMHeadModel", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    found = values(tmp_path)
    assert found["parameters"] is None
    assert any("pytorch_model.bin" in warning and "a pickle can run code" in warning for warning in found["warnings"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_repository_code_and_adapters_are_said(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = make("GPT2LMHeadModel", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    assert "asks for code of its repository" in "\n".join(values(tmp_path / "base")["warnings"])
    adapted = get_peft_model(model, LoraConfig(r=4, fan_in_fan_out=True, target_modules=["c_attn"]))
    adapted.save_pretrained(tmp_path / "adapter")
    found = values(tmp_path / "adapter")
    assert (found["adapter"]["peft_type"], found["adapter"]["r"]) == ("LORA", 4)
    assert found["parameters"]["total"] == adapted.get_nb_trainable_parameters()[0]


def test_our_own_folders_show_receipt_graphs_and_certificate(tmp_path: Path) -> None:
    make("GPT2LMHeadModel", tmp_path)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model_quantized.onnx").write_bytes(b"123")
    scores = {"perplexity": 4.5, "corpus": "stories"}
    (tmp_path / "lmworks.json").write_text(json.dumps({"data_sha256": "ab" * 32, "scores": scores, "versions": {}}))
    cells = {
        "torch": {"fp32": {"passed": True}},
        "onnx": {"int8": {"problem": "x"}},
        "node": {"fp32": {"skipped": "no"}},
    }
    certificate = {"passed": False, "checked": {"date": "2026-11-21"}, "runtimes": cells}
    (tmp_path / "certificate.json").write_text(json.dumps(certificate))
    found = values(tmp_path)
    assert found["graphs"] == {"onnx/model_quantized.onnx": 3}
    assert found["receipt"]["scores"] == scores
    assert found["certificate"]["runtimes"] == {"torch fp32": "passed", "onnx int8": "failed", "node fp32": "skipped"}
    assert any("lmworks verify" in warning for warning in found["warnings"])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_in_a_form_of_ours_is_its_family_s(tmp_path: Path, bits: Any) -> None:
    """Whole numbers count once, however they are packed, and their scales do not; heads are those that are left."""
    make("BertForSequenceClassification", tmp_path / "model")
    known = values(tmp_path / "model")
    prune(tmp_path / "model", tmp_path / "small", how=Pruning(structured=True, heads=0.5, sparsity=0.5))
    small = sum(p.numel() for p in load_model(tmp_path / "small").parameters())
    quantize(tmp_path / "small", tmp_path / "smaller", how=Quantizing(bits=bits))
    for name in ("small", "smaller"):
        found = values(tmp_path / name)
        assert (found["model_type"], found["family"], found["supported"]) == ("lmworks-compact", "bert", True)
        assert (found["num_attention_heads"], known["num_attention_heads"]) == (2, 4)
        assert found["parameters"]["total"] == small < known["parameters"]["total"]
        assert not any("not supported" in warning for warning in found["warnings"])


def test_what_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        inspect_folder(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"holds no model(.|\n)*notes\.txt"):
        inspect_folder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(FormatError, match="JSON object"):
        inspect_folder(tmp_path)


ODD = (None, True, -1, 0, 1.5, 10**30, "", "x", [], {}, [1], [None], {"a": 1}, {"a": None}, {"0": {}}, [[]], [{}])


def test_odd_values_end_in_a_report_or_in_one_message(tmp_path: Path) -> None:
    """Every value of every small file is replaced by others of every kind."""
    make("RobertaForSequenceClassification", tmp_path)
    model = {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}
    cells = {"torch": {"fp32": {"passed": True}}}
    small = {
        "config.json": json.loads((tmp_path / "config.json").read_text()) | {"id2label": {"0": "a"}, "text_config": {}},
        "tokenizer.json": {"model": model, "added_tokens": [{"id": 1}], "pre_tokenizer": None, "decoder": None},
        "tokenizer_config.json": {"cls_token": "a", "model_max_length": 5, "chat_template": "x"},
        "adapter_config.json": {"r": 4, "base_model_name_or_path": "x"},
        "1_Pooling/config.json": {"pooling_mode": "mean", "pooling_mode_cls_token": True},
        "lmworks.json": {"scores": {"perplexity": 1.0}, "data_sha256": "x", "versions": {}},
        "certificate.json": {"passed": True, "checked": {"date": "x"}, "runtimes": cells},
        "model.safetensors.index.json": {"weight_map": {"a": "b.safetensors"}},
    }
    (tmp_path / "1_Pooling").mkdir()
    for name, content in small.items():
        (tmp_path / name).write_text(json.dumps(content))
    for weights in (True, False):
        for name, content in small.items():
            for key in content:
                for odd in ODD:
                    (tmp_path / name).write_text(json.dumps({**content, key: odd}))
                    report = None
                    with contextlib.suppress(LmworksError):
                        report = inspect_folder(tmp_path)
                    if report:
                        report.to_html()
                        json.dumps(report.to_dict(), allow_nan=False)
            (tmp_path / name).write_text(json.dumps(content))
        if weights:
            (tmp_path / "model.safetensors").unlink()


def test_only_headers_are_read_and_torch_is_not(tmp_path: Path) -> None:
    """A file of 60 GB that holds nothing but its header is described at once."""
    make("GPT2LMHeadModel", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    big = {"a.0.weight": {"dtype": "F32", "shape": [15_000_000, 1000], "data_offsets": [0, 60_000_000_000]}}
    header = json.dumps(big).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 60_000_000_000)
    code = (
        "import sys; from lmworks.verbs.inspection import inspect_folder\n"
        "print(inspect_folder(sys.argv[1]).values['parameters']['total']); assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=20)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "15000000000"
    shutil.rmtree(tmp_path)
