"""Reading and writing model folders: what is wrong is said at once and clearly, what is unknown survives."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lmworks.base.errors import FormatError, InputError
from lmworks.models.checkpoint import load_model, read_config, save_model
from lmworks.models.config import Config, RopeScaling, Rotary
from lmworks.models.families import gpt2, llama, write_config
from lmworks.models.heads import CausalLM

SIZES = {"vocab_size": 50, "num_hidden_layers": 2, "max_position_embeddings": 32}
STRETCHED = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
CONFIGS: dict[str, Config] = {
    "gpt2": gpt2.new(hidden_size=24, num_attention_heads=4, **SIZES, bos_token_id=0, eos_token_id=0, pad_token_id=1),
    "llama": llama.new(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, **SIZES, tie_word_embeddings=False,
        eos_token_id=(2, 3), rotary=Rotary(scaling=STRETCHED),
    ),
}  # fmt: skip
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A saved model of each family."""
    save_model(CausalLM(CONFIGS[request.param]), tmp_path)
    return tmp_path


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    save_model(CausalLM(CONFIGS["gpt2"]), tmp_path)
    return tmp_path


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    save_model(CausalLM(CONFIGS["llama"]), tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, edit: Edit) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, path)


def test_round_trip(folder: Path) -> None:
    """C22: config and weights come back as they were, and a second save writes the same bytes."""
    model = load_model(folder)
    original = CausalLM(CONFIGS[model.config.model_type])
    assert model.config == original.config
    ours, theirs = model.state_dict(), original.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not model.training
    save_model(model, folder / "again")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        assert (folder / name).read_bytes() == (folder / "again" / name).read_bytes(), name


def test_the_header_names_the_framework(folder: Path) -> None:
    """transformers 4 refuses a file without it."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_saving_over_the_folder_that_was_loaded(folder: Path) -> None:
    """The weights are mapped from the very file that is replaced."""
    model = load_model(folder)
    before = (folder / "model.safetensors").read_bytes()
    save_model(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    with torch.no_grad():
        model.transformer.embeddings.tokens.weight.add_(1.0)  # training changes memory, never the file
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_save_that_fails_leaves_the_old_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save_model(CausalLM(CONFIGS["gpt2"], seed=9), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_every_complaint_is_in_one_error(llama_folder: Path) -> None:
    """C34: a missing, an unused and two mis-shaped tensors are named together; nothing is initialised in silence."""

    def edit(state: dict[str, Any]) -> None:
        del state["model.layers.1.self_attn.k_proj.weight"]
        state["model.layers.0.self_attn.surprise.weight"] = torch.zeros(2)
        state["model.norm.weight"] = torch.zeros(25)
        state["lm_head.weight"] = torch.zeros(24, 50)
        state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].long()

    edit_weights(llama_folder, edit)
    with pytest.raises(FormatError) as caught:
        load_model(llama_folder)
    lines = {line.strip() for line in str(caught.value).splitlines()}
    assert {
        "missing: model.layers.1.self_attn.k_proj.weight (12, 24)",
        "unused: model.layers.0.self_attn.surprise.weight",
        "wrong shape: model.norm.weight is (25,), not (24,)",
        "wrong shape: lm_head.weight is (24, 50), not (50, 24)",
        "not a float: model.layers.0.mlp.up_proj.weight is torch.int64",
    } <= lines
    assert f"where: {llama_folder}" in lines


def test_a_fused_matrix_of_the_wrong_width(gpt2_folder: Path) -> None:
    edit_weights(gpt2_folder, lambda state: state.update({"transformer.h.1.attn.c_attn.weight": torch.zeros(72, 24)}))
    with pytest.raises(
        FormatError, match=r"wrong shape: transformer.h.1.attn.c_attn.weight is \(72, 24\), not \(24, 72\)"
    ):
        load_model(gpt2_folder)


def test_old_constants_are_ignored_by_name(folder: Path) -> None:
    """Only the masks and frequencies that old files hold; anything else that nobody reads is an error."""
    known = {
        "gpt2": ("transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"),
        "llama": ("model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
    }[read_config(folder).model_type]
    edit_weights(folder, lambda state: state.update({key: torch.ones(4).bool() for key in known}))
    load_model(folder)
    edit_weights(folder, lambda state: state.update({f"{known[0]}.more": torch.ones(4)}))
    with pytest.raises(FormatError, match=f"unused: {known[0]}.more"):
        load_model(folder)


def test_without_prefix(folder: Path) -> None:
    """As openai-community/gpt2 stands on the Hub; a tensor under both names is an error."""
    family = {"gpt2": gpt2, "llama": llama}[read_config(folder).model_type]
    expected = load_model(folder).state_dict()

    def strip(state: dict[str, Any]) -> None:
        for key in list(state):
            state[key.removeprefix(family.PREFIX)] = state.pop(key)

    edit_weights(folder, strip)
    found = load_model(folder).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    key = next(iter(load_file(folder / "model.safetensors")))
    if key != "lm_head.weight":
        edit_weights(folder, lambda state: state.update({family.PREFIX + key: state[key]}))
        with pytest.raises(FormatError, match="twice: "):
            load_model(folder)


def test_tied_head_in_the_file(gpt2_folder: Path) -> None:
    """Accepted where it repeats the embedding, refused where it does not: either choice would drop weights."""
    edit_weights(gpt2_folder, lambda s: s.update({"lm_head.weight": s["transformer.wte.weight"]}))
    model = load_model(gpt2_folder)
    assert model.head.project.weight is model.transformer.embeddings.tokens.weight
    edit_weights(gpt2_folder, lambda s: s.update({"lm_head.weight": s["lm_head.weight"] + 1}))
    with pytest.raises(FormatError, match="differs from its twin although"):
        load_model(gpt2_folder)
    edit_config(gpt2_folder, tie_word_embeddings=False)
    assert load_model(gpt2_folder).head.project.weight is not model.transformer.embeddings.tokens.weight


def test_truncated_at_any_place(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"model.safetensors cannot be used[\s\S]*fix: fetch it"):
            load_model(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", "sub/c", ""])
def test_an_index_stays_in_its_folder(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(FormatError, match=r"points outside its folder"):
        load_model(folder)


def test_shards_that_do_not_fit(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    save_file({key: state[key] for key in names[:4]}, folder / "a.safetensors")
    save_file({key: state[key] for key in names[3:]}, folder / "b.safetensors")
    index.write_text(json.dumps({"weight_map": {names[0]: "a.safetensors", names[1]: "b.safetensors"}}))
    with pytest.raises(FormatError, match=f"the tensor {names[3]} is in two files"):
        load_model(folder)
    index.write_text(json.dumps({"weight_map": {names[0]: "a.safetensors", names[1]: "c.safetensors"}}))
    with pytest.raises(FormatError, match=r"c\.safetensors is missing"):
        load_model(folder)
    index.write_text(json.dumps({"weight_map": {names[0]: "a.safetensors"}}))
    with pytest.raises(FormatError, match="missing: "):
        load_model(folder)
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(FormatError, match="the index holds no file names"):
        load_model(folder)


def test_only_safetensors(folder: Path) -> None:
    """C9: a pickle is never opened; the message says what to do."""
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"no weights that can be read safely[\s\S]*fetch the whole checkpoint"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(FormatError, match=r"found: pytorch_model.bin[\s\S]*lmworks convert "):
        load_model(folder)


def test_no_folder_and_no_config(folder: Path) -> None:
    with pytest.raises(InputError, match="there is no such model folder"):
        load_model(folder / "nothing")
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"config\.json is missing"):
        load_model(folder)


CONFIG_FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown family": ({"model_type": "lama"}, InputError, r"'lama' is not[\s\S]*gpt2, llama[\s\S]*\"llama\""),
    "no family": ({"model_type": None}, InputError, "'None' is not supported"),
    "missing size": ({"hidden_size": None}, FormatError, "does not state hidden_size"),
    "text for a number": ({"num_hidden_layers": "2"}, FormatError, r"num_hidden_layers is not a whole number"),
    "true for a number": ({"vocab_size": True}, FormatError, "vocab_size is not a whole number"),
    "no layers": ({"num_hidden_layers": 0}, InputError, r"num_hidden_layers[\s\S]*1 to 2,000"),
    "heads that do not divide": ({"num_key_value_heads": 3}, InputError, r"num_key_value_heads[\s\S]*a divisor of 4"),
    "odd rotated head": ({"head_dim": 7}, InputError, r"head_dim[\s\S]*even"),
    "activation": ({"hidden_act": "swishy"}, InputError, r"hidden_act[\s\S]*swishy[\s\S]*silu"),
    "rope type": (
        {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, InputError,
        r"'yarn' is not supported[\s\S]*default or llama3",
    ),
    "old rope type": (
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, InputError, "'linear'",
    ),
    "rope without factor": (
        {"rope_scaling": None, "rope_parameters": {"rope_type": "llama3"}}, FormatError,
        "rope_parameters does not state factor",
    ),
    "partial rotation": (
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, InputError,
        "partial_rotary",
    ),
    "eos": ({"eos_token_id": [1, "2"]}, FormatError, "eos_token_id is not a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIG_FAULTS)
def test_config_faults(llama_folder: Path, name: str) -> None:
    """Every message names the file and the key."""
    changes, error, message = CONFIG_FAULTS[name]
    edit_config(llama_folder, **changes)
    with pytest.raises(error, match=message) as caught:
        load_model(llama_folder)
    assert f"where: {llama_folder / 'config.json'}" in str(caught.value)


@pytest.mark.parametrize("key", ["scale_attn_by_inverse_layer_idx", "add_cross_attention"])
def test_gpt2_variants_that_compute_something_else(gpt2_folder: Path, key: str) -> None:
    edit_config(gpt2_folder, **{key: True})
    with pytest.raises(InputError, match=f"{key} is not supported"):
        load_model(gpt2_folder)


def test_unknown_keys_survive(folder: Path) -> None:
    """What we do not know is written back, and what the file says in its own way; but what has changed since."""
    strange = {"task_specific_params": {"a": [1, None]}, "n_ctx": 5, "embd_pdrop": 0.25, "architectures": ["Other"]}
    edit_config(folder, **strange, use_cache=False)
    before = json.loads((folder / "config.json").read_text())
    model = load_model(folder)
    save_model(model, folder / "again")
    after = json.loads((folder / "again" / "config.json").read_text())
    assert after == {**before, "architectures": after["architectures"]}
    assert after["architectures"] in (["GPT2LMHeadModel"], ["LlamaForCausalLM"])
    changed = write_config(dataclasses.replace(model.config, dropout=0.5, eos_token_id=7))
    assert changed["eos_token_id"] == 7
    assert changed.get("resid_pdrop", changed.get("attention_dropout")) == 0.5
    assert changed["task_specific_params"] == strange["task_specific_params"]


def test_a_null_stays_a_null(gpt2_folder: Path) -> None:
    edit_config(gpt2_folder, n_inner=None, bos_token_id=None)
    assert write_config(read_config(gpt2_folder))["n_inner"] is None
    assert read_config(gpt2_folder).bos_token_id is None


def test_both_generations_are_written(llama_folder: Path) -> None:
    """transformers 4 reads rope_theta, rope_scaling and torch_dtype, 5 rope_parameters and dtype; they agree."""
    hf = json.loads((llama_folder / "config.json").read_text())
    assert hf["rope_parameters"] == {**hf["rope_scaling"], "rope_theta": hf["rope_theta"]}
    assert hf["dtype"] == hf["torch_dtype"] == "float32"
    for drop in ("rope_parameters", "rope_scaling"):
        (llama_folder / "config.json").write_text(json.dumps({k: v for k, v in hf.items() if k != drop}))
        assert read_config(llama_folder) == CONFIGS["llama"]


def test_gpt2_positions_have_both_names(gpt2_folder: Path) -> None:
    """transformers.js looks for max_position_embeddings."""
    hf = json.loads((gpt2_folder / "config.json").read_text())
    assert hf["n_positions"] == hf["max_position_embeddings"] == 32


def test_generation_config(folder: Path) -> None:
    """The special tokens, and whatever the folder already asked for."""
    path = folder / "generation_config.json"
    expected = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k.endswith("_token_id")}
    assert {k: v for k, v in json.loads(path.read_text()).items() if k.endswith("_token_id")} == {
        k: v for k, v in expected.items() if v is not None
    }
    path.write_text(json.dumps({"temperature": 0.6, "eos_token_id": 9}))
    save_model(load_model(folder), folder)
    again = json.loads(path.read_text())
    assert again["temperature"] == 0.6 and again["eos_token_id"] != 9


def test_weights_that_are_not_finite_are_not_saved(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model = load_model(folder)
    with torch.no_grad():
        model.transformer.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"NaN or infinity[\s\S]*layers.1.mlp.up_proj.weight"):
        save_model(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_loading_draws_nothing_and_copies_nothing(folder: Path) -> None:
    """The random state is untouched, and a float32 parameter lies where the file is mapped."""
    state = torch.get_rng_state()
    model = load_model(folder)
    assert torch.equal(torch.get_rng_state(), state)
    q = model.transformer.layers[0].attention.q_proj.weight
    if model.config.model_type == "gpt2":  # a part of the fused, transposed matrix
        assert q.stride() == (1, 72)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_same_fault_of_many_layers_is_one_line(llama_folder: Path) -> None:
    """A message fits a screen, however many layers there are."""
    edit_weights(llama_folder, lambda s: [s.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in range(2)])
    with pytest.raises(FormatError) as caught:
        load_model(llama_folder)
    assert caught.value.found.strip() == "missing: model.layers.{0,1}.mlp.up_proj.weight (64, 24)"
