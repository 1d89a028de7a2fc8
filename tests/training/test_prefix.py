"""Prefix tuning against the real peft, in both directions: logits, gradients, files, generation, padding, windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as t
from adapters import (
    CONFIGS,
    ENDS,
    LABELS,
    SIZES,
    TASKS,
    VOCAB,
    largest,
    load_peft,
    make_base,
    move,
    random_ids,
    save_peft,
)
from safetensors.torch import load_file, save_file

from lmworks.base.errors import FormatError, InputError
from lmworks.export.merge import merge
from lmworks.models.cache import KVCache
from lmworks.models.checkpoint import load_model
from lmworks.models.heads import Model
from lmworks.models.prefix import PrefixSlot
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.training.adapter_files import load_adapter, open_adapter, save_adapter
from lmworks.training.bottleneck import add_bottleneck
from lmworks.training.lora import activate, adapter_names, add_lora, remove_adapter, unload
from lmworks.training.packing import packed_states
from lmworks.training.prefix import add_prefix
from lmworks.verbs.inspection import inspect_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers
CLOSE = 1e-5
IDS = random_ids(3, 20)
WINDOW = 6
MORE: dict[str, Any] = {  # families that peft gives no prefix, or another one
    "distilbert": lambda: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64,
                           **LABELS)
    ),
    "mistral": lambda: t.MistralForCausalLM(
        t.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=WINDOW, head_dim=8, **ENDS)
    ),
    "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**SIZES, partial_rotary_factor=0.5, **ENDS)),
    "modernbert": lambda: t.ModernBertForSequenceClassification(
        t.ModernBertConfig(**SIZES, pad_token_id=0, bos_token_id=2, cls_token_id=2, eos_token_id=3, sep_token_id=3,
                           local_attention=8, **LABELS)
    ),
}  # fmt: skip
PEFT_CASES = ["bert", "roberta", "gpt2", "llama"]


def make_peft(case: str, base: Any, **settings: Any) -> Any:
    """Put a random prefix on a transformers model, as peft does it."""
    model = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type=TASKS[case], num_virtual_tokens=5, **settings))
    move(model, 0.3)
    return model.eval()


def make(case: str, folder: Path, **settings: Any) -> Model:
    """Return one of our models with a prefix that was moved away from its start."""
    if case in MORE:
        torch.manual_seed(0)
        base = MORE[case]()
        move(base, 0.1)
        base.save_pretrained(folder)
    else:
        make_base(case, folder)
    model = add_prefix(load_model(folder), length=5, **settings)
    with torch.no_grad():
        move(model, 0.3)
    return model.eval()


# ------------------------------------------------------------------------------------------------ peft, both directions


@pytest.mark.parametrize("case", PEFT_CASES)
def test_a_prefix_of_peft_answers_alike(case: str, tmp_path: Path) -> None:
    """Every family that peft knows, grouped heads and rotated keys among them; a row that is padded too."""
    theirs = make_peft(case, make_base(case, tmp_path / "base"))
    save_peft(theirs, tmp_path / "prefix")
    ours = open_adapter(tmp_path / "prefix", base=tmp_path / "base").model
    mask = torch.ones_like(IDS)
    mask[1, 13:] = 0
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
        assert largest(load_model(tmp_path / "base", ours.kind)(IDS), expected) > 0.05  # the prefix does something
        assert largest(ours(IDS), expected) <= CLOSE
        expected, found = theirs(input_ids=IDS, attention_mask=mask).logits, ours(IDS, mask)
        real = mask.bool() if found.ndim == 3 else slice(None)
        assert largest(found[real], expected[real]) <= CLOSE


@pytest.mark.parametrize("case", PEFT_CASES)
def test_a_prefix_of_ours_answers_alike_in_peft(case: str, tmp_path: Path) -> None:
    model = make(case, tmp_path / "base")
    facts = save_adapter(model, tmp_path / "prefix", base=tmp_path / "base")
    assert facts["layers"] == 1 and facts["notes"] == []
    with torch.no_grad():
        expected = model(IDS)
        theirs = load_peft(make_base(case, tmp_path / "base"), tmp_path / "prefix")
        assert largest(theirs(input_ids=IDS).logits, expected) <= CLOSE
        assert largest(open_adapter(tmp_path / "prefix").model(IDS), expected) <= CLOSE


@pytest.mark.parametrize("case", ["bert", "llama"])
def test_gradients_and_the_config_are_those_of_peft(case: str, tmp_path: Path) -> None:
    theirs = make_peft(case, make_base(case, tmp_path / "base"))
    save_peft(theirs, tmp_path / "prefix")
    ours = load_model(tmp_path / "base")
    load_adapter(ours, tmp_path / "prefix", trainable=True)
    weights = torch.randn(theirs(input_ids=IDS).logits.shape, generator=torch.Generator().manual_seed(3))
    for model, logits in ((theirs, theirs(input_ids=IDS).logits), (ours, ours(IDS))):
        (logits * weights).mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None
                    parameter.copy_(parameter.grad)
    save_peft(theirs, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours", base=tmp_path / "base")
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert expected.keys() == found.keys() and max(g.abs().max() for g in expected.values()) > 1e-3
    assert max(largest(found[key], expected[key]) for key in expected) <= 1e-6
    one, two = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    for config in (one, two):
        config["base_model_name_or_path"] = ""
        config["modules_to_save"] = sorted({*(config["modules_to_save"] or ())} & {"classifier"})
    assert {key: two[key] for key in one} == one


def test_a_new_head_comes_with_the_prefix(tmp_path: Path) -> None:
    """A body without a pooler or a head: both are saved, and peft puts them back."""
    body = t.BertModel(t.BertConfig(**SIZES), add_pooling_layer=False)
    move(body, 0.1)
    body.save_pretrained(tmp_path / "base")
    model = add_prefix(load_model(tmp_path / "base", "SequenceClassification", labels="xyz", new_head=True, seed=4))
    move(model, 0.1)
    assert save_adapter(model, tmp_path / "prefix", base=tmp_path / "base")["copied"]
    theirs = t.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    with torch.no_grad():
        expected = model.eval()(IDS)
        assert largest(load_peft(theirs, tmp_path / "prefix")(input_ids=IDS).logits, expected) <= CLOSE
        assert largest(open_adapter(tmp_path / "prefix").model(IDS), expected) <= CLOSE


def test_peft_refuses_a_prefix_before_a_head_that_it_cannot_serve(tmp_path: Path) -> None:
    """Without a task peft would leave the prefix out and say nothing."""
    base = t.BertForMaskedLM(t.BertConfig(**SIZES))
    base.save_pretrained(tmp_path / "base")
    model = add_prefix(load_model(tmp_path / "base"))
    assert "lmworks alone" in save_adapter(model, tmp_path / "prefix", base=tmp_path / "base")["notes"][0]
    with pytest.raises(ValueError, match="Invalid task type"):
        peft.PeftModel.from_pretrained(base, tmp_path / "prefix")
    with torch.no_grad():
        assert largest(open_adapter(tmp_path / "prefix").model(IDS), model.eval()(IDS)) <= CLOSE


# ------------------------------------------------------------------------------------------------ what it means


def reference(model: Model, ids: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Work out attention by hand, key by key, in each layer of a decoder: (1, T) -> (1, T, V)."""
    N, T = model.transformer.prefix.length, ids.shape[1]

    def attend(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, look: Any) -> torch.Tensor:
        group = self.heads // self.kv_heads
        rows = []
        for i in range(q.shape[2]):
            seen = [j for j in range(N + T) if j < N or (j - N <= i and (window is None or i - (j - N) < window))]
            heads = []
            for h in range(self.heads):
                scores = k[0, h // group, seen] @ q[0, h, i] / self.head_dim**0.5
                heads.append(scores.softmax(0) @ v[0, h // group, seen])
            rows.append(torch.cat(heads))
        return torch.stack(rows)[None]

    modules = [layer.attention for layer in model.transformer.layers]
    for module in modules:
        module.attend = attend.__get__(module)  # type: ignore[union-attr,assignment]
    try:
        return model(ids)  # type: ignore[no-any-return]
    finally:
        for module in modules:
            del module.attend  # type: ignore[union-attr]


@pytest.mark.parametrize(("case", "window"), [("mistral", WINDOW), ("llama", None), ("phi", None)])
def test_every_token_sees_the_prefix_also_beyond_its_window(case: str, window: int | None, tmp_path: Path) -> None:
    model = make(case, tmp_path)
    with torch.no_grad():
        for length in (4, 20):
            found = model(IDS[:1, :length])
            assert largest(found, reference(model, IDS[:1, :length], window)) <= CLOSE
        if window:
            assert largest(found, reference(model, IDS[:1, :length])) > 1e-3  # the window itself matters


@pytest.mark.parametrize("case", ["gpt2", "llama", "mistral", "phi"])
def test_a_cache_reads_the_prefix_once_and_goes_on(case: str, tmp_path: Path) -> None:
    """Rows of different lengths, started at different times, step by step: as the whole text at once."""
    model = make(case, tmp_path)
    runtime = TorchRuntime(model, slots=3)
    assert runtime.max_length == model.config.max_tokens - 5
    with torch.no_grad():
        whole = model(IDS)
    rows = IDS.tolist()
    first = runtime.prefill([0, 2], [rows[0][:3], rows[2][:9]])
    assert runtime.cache.lengths == [8, 0, 14] and runtime.cache.kept == [5, 0, 5]
    assert np.abs(first - np.stack([whole[0, 2], whole[2, 8]])).max() <= CLOSE
    runtime.step([0, 2], [rows[0][3], rows[2][9]])
    runtime.prefill([1], [rows[1][:6]])
    at = [4, 6, 10]
    for step in range(8):
        found = runtime.step([0, 1, 2], [rows[i][at[i] + step] for i in range(3)])
        expected = torch.stack([whole[i, at[i] + step] for i in range(3)]).numpy()
        assert np.abs(found - expected).max() <= CLOSE
    activate(model, None)
    with torch.no_grad():
        plain, cache = model(IDS[:1]), KVCache(model.config, capacity=40)
        assert largest(model(IDS[:1], cache=cache), plain) <= CLOSE and cache.lengths == [20]


def test_generation_is_that_of_peft(tmp_path: Path) -> None:
    theirs = make_peft("gpt2", make_base("gpt2", tmp_path / "base"))
    save_peft(theirs, tmp_path / "prefix")
    runtime = TorchRuntime(open_adapter(tmp_path / "prefix", base=tmp_path / "base").model)
    prompt = IDS[:1, :6]
    with torch.no_grad():
        expected = theirs.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12,
                                   do_sample=False, pad_token_id=0)[0, 6:].tolist()  # fmt: skip
    said = [int(runtime.prefill([0], [prompt[0].tolist()])[0].argmax())]
    while len(said) < 12:
        said.append(int(runtime.step([0], [said[-1]])[0].argmax()))
    assert said == expected


@pytest.mark.parametrize("case", ["bert", "roberta", "distilbert", "modernbert", "gpt2", "llama", "mistral"])
def test_padding_on_either_side_and_rows_end_to_end_change_nothing(case: str, tmp_path: Path) -> None:
    model = make(case, tmp_path)
    short = IDS[:1, :11]
    pad = torch.zeros(1, 5, dtype=torch.long)
    ones = torch.ones_like(short)
    per_token = model.head.pool == "none"
    with torch.no_grad():
        expected = model(short)
        left = model(torch.cat((pad, short), 1), torch.cat((pad, ones), 1))
        right = model(torch.cat((short, pad), 1), torch.cat((ones, pad), 1))
        assert largest(left[:, 5:] if per_token else left, expected) <= CLOSE
        assert largest(right[:, :11] if per_token else right, expected) <= CLOSE
        whole = model(IDS)
    ids = np.zeros((4, 20), np.int64)
    ids[:3], ids[3, :11] = IDS.numpy(), short[0].numpy()
    mask = np.ones_like(ids)
    mask[3, 11:] = 0
    with torch.inference_mode():
        found = torch.from_numpy(TorchRuntime(model).run_without_padding(ids, mask.astype(bool), None))
    assert largest(found[:3], whole) <= CLOSE
    assert largest(found[3:, :11] if per_token else found[3:], expected) <= CLOSE


def test_documents_packed_into_a_row_each_see_the_prefix(tmp_path: Path) -> None:
    model = make("llama", tmp_path)
    documents = torch.tensor([[1] * 7 + [2] * 9 + [3] * 4])
    with torch.no_grad():
        states, places = packed_states(model, IDS[:1], documents)
        for start, stop in ((0, 7), (7, 16), (16, 20)):
            rows = [i for i, place in enumerate(places.tolist()) if start <= place < stop]
            assert largest(states[rows], model.hidden_states(IDS[:1, start:stop])[0]) <= CLOSE


# ------------------------------------------------------------------------------------------------ start, kinds, errors


def test_it_starts_as_what_the_model_makes_of_some_tokens(tmp_path: Path) -> None:
    """A fresh prefix of tokens is as good as those tokens before a text: their keys and values, positions and all."""
    make_base("llama", tmp_path)
    model = load_model(tmp_path)
    with torch.no_grad():
        expected = model(torch.cat((IDS[1:2, :6], IDS[:1]), 1))[:, 6:]
        add_prefix(model, tokens=IDS[1, :6].tolist())
        assert largest(model(IDS[:1]), expected) <= CLOSE
    again = [add_prefix(load_model(tmp_path), seed=seed).transformer.prefix.rows() for seed in (1, 1, 2)]
    assert torch.equal(again[0][0], again[1][0]) and not torch.equal(again[0][0], again[2][0])  # type: ignore[index]


def test_kinds_stand_side_by_side_and_go_bit_for_bit(tmp_path: Path) -> None:
    """LoRA, bottlenecks and two prefixes by name on one base; each acts alone, and none of them leaves a trace."""
    make_base("bert", tmp_path)
    model = load_model(tmp_path)
    with torch.no_grad():
        plain = model(IDS)
        said: dict[str, torch.Tensor] = {}
        for name, add in (("low", add_lora), ("narrow", add_bottleneck), ("before", add_prefix), ("other", add_prefix)):
            add(model, name=name, seed=len(said))  # type: ignore[operator]
            move(model, 0.1)
            said[name] = model(IDS)
        add_lora(model, name="all", targets="all-linear")  # the layers that carry bottlenecks too
        move(model, 0.1)
        said["all"] = model(IDS)
        assert sorted(adapter_names(model)) == sorted(said)
        for name, expected in said.items():
            activate(model, name)
            assert torch.equal(model(IDS), expected)
            save_adapter(model, tmp_path / name, base=tmp_path)
            assert largest(open_adapter(tmp_path / name).model(IDS), expected) <= CLOSE
            assert largest(expected, plain) > 1e-3
        activate(model, None)
        assert torch.equal(model(IDS), plain)
        remove_adapter(model, "before")
        activate(model, "other")
        assert torch.equal(model(IDS), said["other"])
        unload(model)
        assert torch.equal(model(IDS), plain) and type(model.transformer.prefix) is PrefixSlot


def test_a_prefix_runs_in_bfloat16(tmp_path: Path) -> None:
    model = make("gpt2", tmp_path)
    exact = TorchRuntime(model).run({"input_ids": IDS.numpy()})["logits"]
    rough = TorchRuntime(model, dtype="bf16").run({"input_ids": IDS.numpy()})["logits"]
    assert 0 < np.abs(exact - rough).max() < 0.1 * np.abs(exact).max()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = make("gpt2", tmp_path / "base")
    save_adapter(model, tmp_path / "prefix", base=tmp_path / "base")
    with pytest.raises(InputError, match=r"cannot be merged(.|\n)*lmworks evaluate, classify"):
        merge(tmp_path / "prefix", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    for length in (0, 33):
        with pytest.raises(InputError, match="no prefix can have this length"):
            add_prefix(load_model(tmp_path / "base"), length=length)
    with torch.no_grad(), pytest.raises(InputError, match="5 of them the prefix"):
        model(random_ids(1, 60))
    t.ViTForImageClassification(
        t.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16,
                    patch_size=8)
    ).save_pretrained(tmp_path / "vit")  # fmt: skip
    with pytest.raises(InputError, match="images takes no prefix"):
        add_prefix(load_model(tmp_path / "vit"))
    make_base("llama", tmp_path / "llama")
    with pytest.raises(FormatError, match="prompt_embeddings is"):
        open_adapter(tmp_path / "prefix", base=tmp_path / "llama")
    file = tmp_path / "prefix/adapter_model.safetensors"
    save_file({"base_model.nothing.weight": torch.ones(2)}, file)
    with pytest.raises(FormatError, match=r"missing: prompt_embeddings(.|\n)*no such layer: nothing"):
        open_adapter(tmp_path / "prefix")
    assert "PREFIX_TUNING" in json.dumps(inspect_folder(tmp_path / "prefix").values["adapter"])
    assert set(CONFIGS) >= set(PEFT_CASES)
