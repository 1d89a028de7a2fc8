"""PEFT folders against the real peft: read, write, gradients, merge; and what does not fit is said at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from adapters import CONFIGS, KINDS, SIZES, largest, load_peft, make_base, make_peft, move, random_ids, save_peft
from safetensors.torch import load_file, save_file

from lmworks.base.errors import FormatError, InputError
from lmworks.models.checkpoint import load_model, save_model
from lmworks.training.adapter_files import load_adapter, open_adapter, save_adapter
from lmworks.training.lora import add_lora, merge_lora, trainable_parameters

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers
CLOSE = 1e-5
IDS = random_ids(3, 20)
CELLS = [(case, kind) for case in CONFIGS for kind in KINDS]


@pytest.mark.parametrize(("case", "kind"), CELLS)
def test_an_adapter_of_peft_answers_alike_and_merges_alike(case: str, kind: str, tmp_path: Path) -> None:
    """C3: logits of the adapter, of the merged model, and of what peft merges."""
    theirs = make_peft(case, make_base(case, tmp_path / "base"), **KINDS[kind])
    save_peft(theirs, tmp_path / "adapter")
    ours = open_adapter(tmp_path / "adapter", base=tmp_path / "base").model
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
        assert largest(load_model(tmp_path / "base", ours.kind)(IDS), expected) > 0.05  # the adapter does something
        assert largest(ours(IDS), expected) <= CLOSE
        merge_lora(ours)
        save_model(ours, tmp_path / "merged")
        assert largest(load_model(tmp_path / "merged")(IDS), expected) <= CLOSE
        assert largest(theirs.merge_and_unload()(input_ids=IDS).logits, ours(IDS)) <= CLOSE
        again = type(theirs.get_base_model()).from_pretrained(tmp_path / "merged").eval()
        assert largest(again(input_ids=IDS).logits, expected) <= CLOSE


@pytest.mark.parametrize(("case", "kind"), CELLS)
def test_an_adapter_of_ours_answers_alike_in_peft(case: str, kind: str, tmp_path: Path) -> None:
    make_base(case, tmp_path / "base")
    model = load_model(tmp_path / "base")
    targets = {"gpt2": ["c_attn", "up_proj"], "modernbert": ["k_proj", "Wi"]}.get(case, "all-linear")
    options = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}[kind]
    with torch.no_grad():
        plain = model(IDS)
        add_lora(model, rank=3, alpha=7, targets=targets, **options)
        assert largest(model(IDS), plain) <= CLOSE  # a fresh adapter changes nothing
        move(model, 0.1)
        expected = model(IDS)
        assert largest(expected, plain) > 0.05
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    with torch.no_grad():
        theirs = load_peft(make_base(case, tmp_path / "base"), tmp_path / "adapter")
        assert largest(theirs(input_ids=IDS).logits, expected) <= CLOSE
        assert largest(open_adapter(tmp_path / "adapter").model(IDS), expected) <= CLOSE


@pytest.mark.parametrize(("case", "kind"), CELLS)
def test_gradients_are_those_of_peft(case: str, kind: str, tmp_path: Path) -> None:
    theirs = make_peft(case, make_base(case, tmp_path / "base"), **KINDS[kind])
    save_peft(theirs, tmp_path / "adapter")
    ours = load_model(tmp_path / "base")
    load_adapter(ours, tmp_path / "adapter", trainable=True)
    weights = torch.randn(theirs(input_ids=IDS).logits.shape, generator=torch.Generator().manual_seed(3))
    for model, logits in ((theirs, theirs(input_ids=IDS).logits), (ours, ours(IDS))):
        (logits * weights).mean().backward()
        with torch.no_grad():  # the files that this step's gradients would make: names and pieces come right by that
            for parameter in model.parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None
                    parameter.copy_(parameter.grad)
    save_peft(theirs, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours", base=tmp_path / "base")
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert expected.keys() == found.keys()
    assert max(g.abs().max() for g in expected.values()) > 1e-3
    assert max(largest(found[key], expected[key]) for key in expected) <= 1e-6
    trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trainable_parameters(ours).trainable == trainable


def test_other_ranks_and_alphas_of_some_layers(tmp_path: Path) -> None:
    """`rank_pattern` and `alpha_pattern`, which name layers by patterns, and `layers_to_transform`."""
    patterns = {"rank_pattern": {"0.attn.c_proj": 7}, "alpha_pattern": {r"h\.1\..*c_attn": 3, "mlp.c_proj": 40}}
    theirs = make_peft("gpt2", make_base("gpt2", tmp_path / "base"), use_rslora=True, **patterns)
    save_peft(theirs, tmp_path / "adapter")
    ours = open_adapter(tmp_path / "adapter", base=tmp_path / "base").model
    save_adapter(ours, tmp_path / "again", base="somewhere")
    again = load_peft(make_base("gpt2", tmp_path / "base"), tmp_path / "again")
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
        assert largest(ours(IDS), expected) <= CLOSE
        assert largest(again(input_ids=IDS).logits, expected) <= CLOSE
    only = make_peft(
        "llama", make_base("llama", tmp_path / "llama"), target_modules=["q_proj"], layers_to_transform=[1]
    )
    save_peft(only, tmp_path / "only")
    opened = open_adapter(tmp_path / "only", base=tmp_path / "llama")
    assert opened.facts["layers"] == 1
    with torch.no_grad():
        assert largest(opened.model(IDS), only(input_ids=IDS).logits) <= CLOSE


def test_the_config_is_that_of_peft(tmp_path: Path) -> None:
    """What peft would have written for the same settings, in every field that ours has."""
    base = make_base("gpt2", tmp_path / "base")
    theirs = make_peft("gpt2", base, r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["c_attn", "c_fc"])
    save_peft(theirs, tmp_path / "theirs")
    model = add_lora(load_model(tmp_path / "base"), targets=["c_attn", "c_fc"], dropout=0.1)
    save_adapter(model, tmp_path / "ours", base=tmp_path / "base")
    one, two = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    assert one["base_model_name_or_path"] == str(tmp_path / "base")
    two["base_model_name_or_path"] = one["base_model_name_or_path"]  # the oracle's was not read from a file
    one["target_modules"], two["target_modules"] = sorted(one["target_modules"]), sorted(two["target_modules"])
    assert {key: two[key] for key in one} == one
    assert one["fan_in_fan_out"] and isinstance(one["lora_alpha"], int)


def test_a_new_head_and_its_labels_come_with_the_adapter(tmp_path: Path) -> None:
    """A body without a head, labels of three kinds, a pooler that the base lacks; peft reads the same."""
    body = t.BertModel(t.BertConfig(**SIZES), add_pooling_layer=False)
    move(body, 0.1)
    body.save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", "SequenceClassification", labels="xyz", new_head=True, seed=4)
    add_lora(model, dora=True)
    move(model, 0.1)
    facts = save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    assert facts["copied"] == ["bert.pooler.dense", "classifier"]
    assert "modules_to_save and DoRA" in facts["notes"][0]
    opened = open_adapter(tmp_path / "adapter").model
    theirs = t.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    with torch.no_grad():
        expected = model.eval()(IDS)
        assert opened.config.labels == ("x", "y", "z") and torch.equal(opened(IDS), expected)
        assert largest(load_peft(theirs, tmp_path / "adapter")(input_ids=IDS).logits, expected) <= CLOSE
    edit_tensors(tmp_path / "adapter", lambda tensors: tensors.pop("base_model.model.bert.pooler.dense.bias"))
    with pytest.raises(FormatError, match="whole head"):  # a random pooler would answer at random
        open_adapter(tmp_path / "adapter")


SMALL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99, "max_position_embeddings": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 99, "pad_token_id": 0}
HEADS: dict[str, Any] = {
    "a head of two layers under one name": lambda: t.RobertaForSequenceClassification(
        t.RobertaConfig(**SIZES, pad_token_id=1)
    ),
    "a name that ends another": lambda: t.DistilBertForSequenceClassification(t.DistilBertConfig(**SMALL)),
    "a span": lambda: t.BertForQuestionAnswering(t.BertConfig(**SIZES)),
    "a span, its body under another name": lambda: t.LlamaForQuestionAnswering(
        t.LlamaConfig(**SIZES, num_key_value_heads=2)
    ),
    "tokens": lambda: t.GPT2ForTokenClassification(t.GPT2Config(**GPT2)),
    "the last token": lambda: t.GPT2ForSequenceClassification(t.GPT2Config(**GPT2)),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_go_to_peft_and_come_back(kind: str, tmp_path: Path) -> None:
    """The head is trained whole, under the names that peft's tasks expect."""
    torch.manual_seed(0)
    base = HEADS[kind]().eval()
    base.save_pretrained(tmp_path / "base")
    model = add_lora(load_model(tmp_path / "base"))
    move(model, 0.1)
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    with torch.no_grad():
        expected = model(IDS)
        assert torch.equal(open_adapter(tmp_path / "adapter").model(IDS), expected)
        theirs = load_peft(base, tmp_path / "adapter")
        out = theirs(input_ids=IDS)
        found = torch.stack((out.start_logits, out.end_logits), -1) if "start_logits" in out else out.logits
        assert largest(found, expected) <= CLOSE
        save_peft(theirs, tmp_path / "again")
        assert largest(open_adapter(tmp_path / "again", base=tmp_path / "base").model(IDS), expected) <= CLOSE


def test_the_head_of_an_adapter_of_peft_decides_how_many_labels(tmp_path: Path) -> None:
    theirs = make_peft("roberta", make_base("roberta", tmp_path / "base"))
    save_peft(theirs, tmp_path / "adapter")
    body = t.RobertaModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    body.config.id2label = {0: "a", 1: "b"}
    body.save_pretrained(tmp_path / "body")
    model = open_adapter(tmp_path / "adapter", base=tmp_path / "body").model
    assert model.kind == "TokenClassification" and len(model.config.labels) == 3
    with torch.no_grad():
        assert largest(model(IDS), theirs(input_ids=IDS).logits) <= CLOSE


def edit_tensors(folder: Path, edit: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)


def edit_settings(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter for the GPT-2 beside it."""
    make_base("gpt2", tmp_path / "base")
    save_adapter(add_lora(load_model(tmp_path / "base")), tmp_path / "adapter", base=tmp_path / "base")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type"), ({"bias": "lora_only"}, "bias"), ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "changed base"), ({"target_parameters": ["x"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"), ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"r": "four"}, "whole number"), ({"trainable_token_indices": ["a"]}, "token"), ({"peft_type": None}, "fit"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_said(adapter: Path, changes: dict[str, Any], named: str) -> None:
    if changes == {"peft_type": None}:
        changes, named = {"use_dora": True}, "does not fit"
    edit_settings(adapter, **changes)
    with pytest.raises((InputError, FormatError)) as error:
        open_adapter(adapter)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("case", "name"), [("gpt2", "AutoModelForCausalLM"), ("bert", "AutoModelForSequenceClassification")]
)
def test_the_auto_classes_open_the_folder(case: str, name: str, tmp_path: Path) -> None:
    """B18: by its own name, as users of transformers and peft do it; the base is found by what the config says."""
    make_base(case, tmp_path / "base")
    model = add_lora(load_model(tmp_path / "base"))
    move(model, 0.1)
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    for auto in (getattr(t, name), getattr(peft, name.replace("Auto", "AutoPeft"))):
        with torch.no_grad():
            theirs = auto.from_pretrained(tmp_path / "adapter").eval()
            assert largest(theirs(input_ids=IDS).logits, model(IDS)) <= CLOSE


def test_an_adapter_of_another_model_lists_what_does_not_fit(adapter: Path, tmp_path: Path) -> None:
    make_base("llama", tmp_path / "llama")
    with pytest.raises(FormatError) as error:
        open_adapter(adapter, base=tmp_path / "llama")
    assert "no such layer: transformer.h.{0,1}.attn.c_attn" in error.value.found
    make_base("gpt2", tmp_path / "wide", n_inner=64)
    load_adapter(load_model(tmp_path / "wide"), adapter)  # other sizes elsewhere do not matter
    edit_tensors(adapter, lambda tensors: tensors.update({key: tensor[:, :-1] for key, tensor in tensors.items()}))
    model = load_model(tmp_path / "base")
    with pytest.raises(FormatError) as error:
        load_adapter(model, adapter)
    assert "c_attn.lora_A is (8, 31), not (8, 32)" in error.value.found
    assert "{0,1}" in error.value.found and "base" in error.value.fix
    assert not any("adapters" in name for name, _ in model.named_parameters())


def test_broken_folders(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an adapter's folder"):
        open_adapter(tmp_path / "base")
    with pytest.raises(InputError, match="base model was not found"):
        open_adapter(adapter, base=tmp_path / "gone")
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-5], whole[:40], b"", whole[:8] + b"{" * 50):
        weights.write_bytes(broken)
        with pytest.raises(FormatError):
            open_adapter(adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"adapter_model.safetensors is missing"):
        open_adapter(adapter)
    (adapter / "adapter_model.bin").rename(weights)
    weights.write_bytes(whole)
    edit_tensors(adapter, lambda tensors: tensors.popitem())
    with pytest.raises(FormatError, match="does not fit"):
        open_adapter(adapter)
    edit_settings(adapter, base_model_name_or_path="")
    with pytest.raises(InputError, match="does not say which model"):
        open_adapter(adapter)


def test_an_adapter_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    make_base("gpt2", tmp_path / "base")
    model = add_lora(load_model(tmp_path / "base"))
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    assert not (tmp_path / "adapter/adapter_config.json").exists()
