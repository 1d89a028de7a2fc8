"""The files of PEFT folders: adapters as the peft library writes and reads them.

    adapter_config.json            rank, alpha, which layers, the base model's name
    adapter_model.safetensors      base_model.model.<published layer>.lora_A.weight (R, I), .lora_B.weight (O, R),
                                   .lora_magnitude_vector (O,); .lora_embedding_A (R, V), .lora_embedding_B (D, R);
                                   .token_adapter.trainable_tokens_delta (N, D); copied layers under their own names
                                   prefix tuning: prompt_embeddings (N, L * 2 * K * E), copies as base_model.<layer>
                                   bottlenecks (ours, peft has none): <published layer>.bottleneck_down.weight …
    adapted_config.json            ours: the base's config.json with the labels and tokens that the adapter came with

Source: the files that peft 0.21 writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import read_json, write_bytes, write_json
from lmworks.base.safetensors_header import check_header
from lmworks.models.families import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lmworks.models.hf_config import Fields
from lmworks.models.weights import State

CONFIG, ADAPTER = ADAPTER_CONFIG, ADAPTER_WEIGHTS
ROOT = "base_model.model."
PREFIX_ROOT = "base_model."  # peft keeps a prefix beside the model, so it wraps once less
TYPES = {"lora": "LORA", "adapter": "LMWORKS_BOTTLENECK", "prefix": "PREFIX_TUNING"}  # peft_type of a method
OWN = {  # what the config of the other methods says that is needed to read them
    "adapter": ("bottleneck_size", "bottleneck_act"),
    "prefix": ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"),
}
DELTA = ".token_adapter.trainable_tokens_delta"
STARTS = (True, False, "gaussian", "orthogonal", "eva")  # first values that leave the base as it is
UNSUPPORTED = (  # what changes how an adapter acts
    "lora_bias", "layer_replication", "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "velora_config", "monteclora_config", "kasa_config",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What adapter_config.json says."""

    base: str
    method: str = "lora"
    own: Mapping[str, Any] = field(default_factory=dict)  # the fields that only another method than LoRA has
    task_type: str | None = None
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    transposed: bool = False  # matrices of the base are stored (in, out); the adapter's never are
    targets: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()
    ranks: Mapping[str, Any] = field(default_factory=dict)  # of layers that have another, by pattern
    alphas: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, list[int]] = field(default_factory=dict)  # ids by layer; "" is the embedding

    def alpha_of(self, key: str) -> float:
        """Return the alpha of a published layer: the first pattern that ends its name decides."""
        return float(next((a for p, a in self.alphas.items() if re.match(rf"(.*\.)?({p})$", key)), self.alpha))


def read_settings(folder: str | Path) -> Settings:
    """Read adapter_config.json; what is not supported here is one InputError that names it.

    The tensors say which layers are adapted and how: the patterns of the config only give a layer its alpha.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise InputError("this is not an adapter's folder", where=str(folder), expected=CONFIG)
    hf = read_json(folder / CONFIG)
    f = Fields(hf, CONFIG)
    method = {kind: name for name, kind in TYPES.items()}[f.choice("peft_type", "LORA", tuple(TYPES.values()))]
    if method != "lora":
        return read_other(folder, f, hf, method)
    f.choice("bias", "none", ("none",))
    for key in UNSUPPORTED:
        if hf.get(key):
            raise InputError(f"{CONFIG}: {key} is not supported", where=str(folder), found=str(hf[key])[:100])
    if hf.get("init_lora_weights", True) not in STARTS:
        found, fix = str(hf["init_lora_weights"]), "convert it to a plain LoRA adapter with peft"
        where = str(folder / CONFIG)
        raise InputError("this adapter was trained on changed base weights", where=where, found=found[:100], fix=fix)
    targets = hf.get("target_modules") or ()
    return Settings(
        base=f.text("base_model_name_or_path", ""), task_type=f.text("task_type", "") or None, rank=f.integer("r", 8),
        alpha=f.number("lora_alpha", 8), dropout=f.number("lora_dropout", 0.0), rslora=f.flag("use_rslora", False),
        dora=f.flag("use_dora", False), transposed=f.flag("fan_in_fan_out", False),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        copied=tuple(hf.get("modules_to_save") or ()), ranks=f.table("rank_pattern"), alphas=f.table("alpha_pattern"),
        tokens=read_tokens(hf.get("trainable_token_indices")),
    )  # fmt: skip


def read_other(folder: Path, f: Fields, hf: Mapping[str, Any], method: str) -> Settings:
    """Return the settings of bottlenecks or a prefix."""
    if method == "prefix" and hf.get("num_transformer_submodules") not in (1, None):
        found = str(hf["num_transformer_submodules"])
        raise InputError("a prefix for an encoder and a decoder is not supported", where=str(folder), found=found)
    own = {key: hf[key] for key in OWN[method] if key in hf}
    return Settings(
        base=f.text("base_model_name_or_path", ""), method=method, own=own,
        task_type=f.text("task_type", "") or None, copied=tuple(dict.fromkeys(hf.get("modules_to_save") or ())),
    )  # fmt: skip


def read_tokens(value: Any) -> dict[str, list[int]]:
    """Return the trained tokens by layer; a plain list is the embedding's: [8, 9] -> {"": [8, 9]}."""
    named = value if isinstance(value, dict) else {"": value} if value else {}
    if not all(isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) for ids in named.values()):
        raise FormatError(f"{CONFIG}: trainable_token_indices are not token ids", found=str(value)[:100])
    return {str(layer): ids for layer, ids in named.items()}


def read_adapter(folder: str | Path, method: str = "lora") -> State:
    """Return the tensors of an adapter by published names, without what peft puts before them."""
    root = PREFIX_ROOT if method == "prefix" else ROOT
    folder = Path(folder)
    path = folder / ADAPTER
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise FormatError(
            f"{ADAPTER} is missing", where=str(folder), found="adapter_model.bin" if pickled else "",
            fix=f"lmworks convert {folder} -o OUT (a pickle can run code)" if pickled else "fetch the whole folder",
        )  # fmt: skip
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = {key.removeprefix(root): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{ADAPTER} is not a whole safetensors file", where=str(path), found=str(error)) from None

    broken = [key for key, tensor in found.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise FormatError("the adapter holds NaN or infinity", where=str(path), found=", ".join(broken[:8])[:300])
    return found


def write_folder(folder: str | Path, settings: Settings, tensors: State) -> None:
    """Write both files, each atomically; the config comes last, as a folder without it is no adapter's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError("the adapter holds NaN or infinity", found=", ".join(broken), fix="use an earlier checkpoint")
    (folder / CONFIG).unlink(missing_ok=True)
    root = PREFIX_ROOT if settings.method == "prefix" else ROOT
    file = {
        (key if key == "prompt_embeddings" else root + key): tensor.detach().float().cpu().contiguous()
        for key, tensor in tensors.items()
    }
    write_bytes(folder / ADAPTER, serialize(file, metadata={"format": "pt"}))
    s = settings
    whole = {"lora_alpha": int(s.alpha)} if float(s.alpha).is_integer() else {}  # as in peft, a whole number
    common = {"peft_type": TYPES[s.method], "task_type": s.task_type, "base_model_name_or_path": s.base,
              "revision": None, "inference_mode": True, "modules_to_save": list(s.copied) or None}  # fmt: skip
    if s.method != "lora":
        write_json(folder / CONFIG, {**common, **s.own})
        return
    write_json(folder / CONFIG, {
        **common,
        "r": s.rank, "lora_alpha": s.alpha, "lora_dropout": s.dropout, "target_modules": list(s.targets),
        "bias": "none", "fan_in_fan_out": s.transposed,
        "use_rslora": s.rslora, "use_dora": s.dora, "rank_pattern": dict(s.ranks), "alpha_pattern": dict(s.alphas),
        "trainable_token_indices": dict(s.tokens) or None, "init_lora_weights": True,
        "layers_to_transform": None, "layers_pattern": None, **whole,
    })  # fmt: skip
