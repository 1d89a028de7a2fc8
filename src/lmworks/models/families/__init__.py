"""The families: each turns a published config into ours and back, and names its tensors in tables. Torch-free.

A row of KEYS maps a published module to ours; `{}` is the layer's number. A tuple splits one fused tensor into several
along its outputs: the sizes are those of our modules, so grouped heads and unequal parts need no numbers here. `heads`
gives the head of every task that the family has been published for, with the names of its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from lmworks.base.errors import FormatError, InputError, LmworksError, did_you_mean
from lmworks.base.files import read_json
from lmworks.base.hub import find_folder
from lmworks.base.safetensors_header import check_header
from lmworks.models.config import Config, HeadSpec
from lmworks.models.families import (
    albert,
    bert,
    deberta,
    distilbert,
    gpt2,
    llama,
    mistral,
    modernbert,
    phi,
    phi3,
    qwen2,
    qwen3,
    roberta,
    vit,
    xlm_roberta,
)
from lmworks.models.families.sequential import SEQUENTIAL


class Family(Protocol):
    """What a module of this folder holds."""

    NAME: str  # of the published classes: "Bert" in BertForMaskedLM
    PREFIX: str  # of the body's tensors in files that have a head
    KEYS: dict[str, str | tuple[str, ...]]
    TRANSPOSED: frozenset[str]  # modules whose matrix is stored (in, out)
    IGNORED: frozenset[str]  # tensors that hold no weights: masks and constants

    def heads(self, c: Config, /) -> Mapping[str, HeadSpec]:
        """Return every head by the name of its published class, the family's name apart."""
        ...

    def config(self, hf: Mapping[str, Any], /) -> Config:
        """Read a published config."""
        ...

    def to_hf(self, c: Config, /) -> dict[str, Any]:
        """Write one: what is particular to the family."""
        ...


FAMILIES: dict[str, Family] = {
    "albert": albert,
    "bert": bert,
    "deberta-v2": deberta,
    "distilbert": distilbert,
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "modernbert": modernbert,
    "phi": phi,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "roberta": roberta,
    "vit": vit,
    "xlm-roberta": xlm_roberta,
    **SEQUENTIAL,
}
IRREGULAR = {("gpt2", "CausalLM"): "GPT2LMHeadModel", ("bert", "CausalLM"): "BertLMHeadModel"}  # else NameForTask
ALSO = {  # two heads; ours is the first
    "AlbertForPreTraining": "MaskedLM", "BertForPreTraining": "MaskedLM", "GPT2DoubleHeadsModel": "CausalLM",
}  # fmt: skip
TASKS = {  # pipeline name -> the head that answers
    "text-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "question-answering": "QuestionAnswering",
    "feature-extraction": "Model",
    "fill-mask": "MaskedLM",
    "text-generation": "CausalLM",
    "image-classification": "ImageClassification",
}
ADAPTED = "adapted_config.json"  # beside an adapter, where transformers would take a config.json for a whole model's
ADAPTER_CONFIG = "adapter_config.json"  # peft's: of the model it says nothing but the base's name and the task
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TASK_TYPES = {  # of peft
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
    "CausalLM": "CAUSAL_LM",
    "Model": "FEATURE_EXTRACTION",
}
HEADS = ("classifier", "score", "qa_outputs")  # peft saves these for their tasks, with everything that they hold
CUSTOM, PARTS = "lmworks-custom", "lmworks_custom"  # the type, and the key, of a model with layers of a user's own
NGRAM = "lmworks-ngram"  # no network
SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim")  # that some published configs derive
COMPACT_TYPE, COMPACT_KEY = "lmworks-compact", "lmworks_quantization"  # the same for layers held in another form
OWN_KEYS = {CUSTOM: PARTS, COMPACT_TYPE: COMPACT_KEY}
CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
LABELLED = ("SequenceClassification", "TokenClassification", "ImageClassification")


def find_family(model_type: str) -> Family:
    """Return the family of a config's `model_type`, or raise InputError that lists the supported ones."""
    if model_type not in FAMILIES:
        raise InputError(
            f"the model type {model_type!r} is not supported",
            expected=", ".join(sorted(FAMILIES)),
            fix="lmworks ngram, or lmworks compare"
            if model_type == NGRAM
            else did_you_mean(model_type, FAMILIES).strip(),
        )
    return FAMILIES[model_type]


def find_head(c: Config, kind: str) -> HeadSpec:
    """Return a head of the config's family, or raise InputError that lists those that it has."""
    found = find_family(c.model_type).heads(c)
    if kind not in found:
        raise InputError(f"{c.model_type} has no head for {kind}", expected=", ".join(found))
    return found[kind]


def architecture(model_type: str, kind: str) -> str:
    """Return the name of a published class: ("bert", "MaskedLM") -> "BertForMaskedLM"."""
    name = find_family(model_type).NAME
    return IRREGULAR.get((model_type, kind), f"{name}Model" if kind == "Model" else f"{name}For{kind}")


def published_names() -> dict[str, tuple[str, str]]:
    """Return every published class that we can read, as its family and head: {"BertModel": ("bert", "Model"), …}."""
    sizes: dict[str, Any] = dict.fromkeys(
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
        "max_position_embeddings".split(), 2)  # fmt: skip
    return {
        architecture(model_type, kind): (model_type, kind)
        for model_type, family in FAMILIES.items()
        for kind in family.heads(Config(model_type=model_type, **sizes))
    }


def read_kind(c: Config) -> str:
    """Return the head that config.json names under `architectures`; where it names none, the usual one."""
    named = c.source.get("architectures")
    usual = "CausalLM" if c.causal else "Model"
    if not (isinstance(named, list) and named and isinstance(named[0], str)):
        return usual
    kinds = {architecture(c.model_type, kind): kind for kind in find_family(c.model_type).heads(c)} | ALSO
    return kinds.get(named[0], usual)


def read_config(folder: str | Path) -> Config:
    """Read `folder/config.json`, or an adapter's own; an error names the file. All keys survive in `Config.source`.

    An adapter of peft's has none: then it is that of its base, with the head and the labels of the adapter.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("there is no such model folder", where=str(folder), fix="check the path")
    path = folder / (ADAPTED if (folder / ADAPTED).is_file() else "config.json")
    lone = path.exists() or path.is_symlink()
    if not lone and (folder / ADAPTER_CONFIG).is_file():
        base = find_base(folder, str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or ""))
        if (base / ADAPTER_CONFIG).is_file() and not (base / "config.json").is_file():
            raise InputError("the adapter's base is an adapter itself", where=str(folder / ADAPTER_CONFIG),
                             found=str(base), expected="a whole model",
                             fix="lmworks merge makes a LoRA a whole model")  # fmt: skip
        return put_head(read_config(base), folder)
    inside = [] if lone else sorted(str(found.parent) for found in folder.glob("*/config.json"))
    if inside:  # of several tasks, say
        raise FormatError("this is no model folder, but it holds some", where=str(folder), found=", ".join(inside[:8]),
                          fix=f"name one of them: {inside[0]}")  # fmt: skip
    hf = read_json(path)
    own = hf.get(OWN_KEYS.get(str(hf.get("model_type")), ""))
    own = own if isinstance(own, dict) else {}
    try:
        config = find_family(str((own or hf).get("model_type"))).config(hf)
        sizes = own.get("sizes", {})
        return replace(config, **sizes) if sizes else config
    except (LmworksError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        if not isinstance(error, LmworksError):
            found = f"{type(error).__name__}: {error}"[:200]
            raise FormatError("config.json has values that no model can have", where=str(path), found=found) from None
        kind = FormatError if isinstance(error, FormatError) else InputError
        own = "config.json asks for its maker's own code (auto_map), which is never run" if "auto_map" in hf else ""
        found = error.found or own
        raise kind(error.what, where=str(path), found=found, expected=error.expected, fix=error.fix) from None


def find_base(folder: Path, name: str) -> Path:
    """Return the folder of an adapter's base model; the error says who wants it."""
    fix = "name the base model (lmworks merge … --base)"
    if not name:
        raise InputError("the adapter does not say which model it was made for", where=str(folder), fix=fix)
    try:
        return find_folder(name)
    except InputError as error:
        what = f"the adapter's base model was not found: {error.what}"
        raise InputError(what, where=error.where or str(folder), found=error.found or name, fix=fix) from None


def put_head(c: Config, folder: Path) -> Config:
    """Return a base's config with the head of an adapter of peft's and, where it was saved with others, its labels."""
    task, tensors = read_json(folder / ADAPTER_CONFIG).get("task_type"), folder / ADAPTER_WEIGHTS
    kind = next((kind for kind, name in TASK_TYPES.items() if name == task), read_kind(c))
    infos = check_header(tensors) if tensors.is_file() else {}
    rows = [  # of the head's last matrix, or its bias
        info.shape[0]
        for key, info in infos.items()
        if key.rpartition(".")[0].rpartition(".")[2] in (*HEADS, "out_proj") and info.shape
    ]
    if kind.endswith("Classification") and rows and 0 < rows[0] != len(c.labels):
        c = replace(c, labels=tuple(f"LABEL_{i}" for i in range(rows[0])))
    return replace(c, source={**c.source, "architectures": [architecture(c.model_type, kind)]})


def write_config(c: Config, kind: str = "CausalLM") -> dict[str, Any]:
    """Return the published form of a Config with the head `kind`.

    Where it was read from a file, the file's own values stay as they are, also those that we do not know, but for what
    has been changed since; what the other generation of readers expects is added.
    """
    ours = describe(c, kind)
    if not c.source:
        return ours
    before = describe(find_family(c.model_type).config(c.source), kind)
    changed = {key: value for key, value in ours.items() if before[key] != value}
    kept = {key: value for key, value in c.source.items() if not asks_for_code(key)}
    return {**ours, **kept, **changed, "architectures": ours["architectures"]}


def asks_for_code(key: str) -> bool:
    """Say whether a key of a config.json lets other libraries fetch or run code: it is never passed on."""
    return key in CODE_KEYS or "implementation" in key


def mark_custom(config: dict[str, Any], c: Config, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a config.json that no reader takes for the published model's: without its parts it answers otherwise."""
    return {**config, "model_type": CUSTOM, PARTS: {"model_type": c.model_type, "parts": parts}}


def mark_compact(config: dict[str, Any], c: Config, layers: Mapping[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """Return a config.json that no reader takes for the published model's: its layers are held in another form."""
    own = {"model_type": c.model_type, "layers": layers, **({"sizes": sizes} if sizes else {})}
    return {**config, "model_type": COMPACT_TYPE, COMPACT_KEY: own}


def publish(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json as the published model's, for a folder whose graphs hold what is lmworks' own.

    Sizes that the published config has no words for keep it as it is.
    """
    key = OWN_KEYS.get(str(config.get("model_type")))
    if key is None or config[key].get("sizes"):
        return config
    return {name: value for name, value in config.items() if name != key} | {"model_type": config[key]["model_type"]}


def read_compact(c: Config) -> dict[str, Any]:
    """Return what a config.json of that kind says; {} for every other."""
    own: dict[str, Any] = c.source.get(COMPACT_KEY, {}) if c.source.get("model_type") == COMPACT_TYPE else {}
    return own


def plain_source(c: Config) -> Config:
    """Return the config as if it had been read from the published model's file."""
    if c.source.get("model_type") != COMPACT_TYPE:
        return c
    source = {key: value for key, value in c.source.items() if key != COMPACT_KEY}
    return replace(c, source={**source, "model_type": c.model_type})


def unsayable(c: Config, kind: str) -> dict[str, int]:
    """Return the sizes that the family's published config has no words for; {} for every published model."""
    if c.hidden_size == c.num_attention_heads * c.head_dim:
        return {}
    try:
        read = find_family(c.model_type).config(describe(c, kind))
    except LmworksError:
        return {name: getattr(c, name) for name in SIZES}
    same = all(getattr(read, name) == getattr(c, name) for name in SIZES)
    return {} if same else {name: getattr(c, name) for name in SIZES}


def describe(c: Config, kind: str) -> dict[str, Any]:
    """Return everything that a Config says, in published names."""
    family = find_family(c.model_type)
    labels = {} if kind not in LABELLED else {
        "id2label": {str(i): label for i, label in enumerate(c.labels)},
        "label2id": {label: i for i, label in enumerate(c.labels)},
        "problem_type": c.problem_type,
    }  # fmt: skip
    text = {} if c.vision else {"vocab_size": c.vocab_size, "use_cache": True, **token_ids(c)}
    return {
        "architectures": [architecture(c.model_type, kind)],
        "model_type": c.model_type,
        **family.to_hf(c),
        "tie_word_embeddings": c.tie_word_embeddings,
        "initializer_range": c.initializer_range,
        **labels,
        **text,
    }


def token_ids(c: Config) -> dict[str, int | list[int] | None]:
    """Return the special tokens in published names."""
    eos = list(c.eos_token_id) if isinstance(c.eos_token_id, tuple) else c.eos_token_id
    return {"bos_token_id": c.bos_token_id, "eos_token_id": eos, "pad_token_id": c.pad_token_id}
