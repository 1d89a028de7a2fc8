"""Small published models, and adapters that the real peft made for them: random, and moved away from nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as t

VOCAB = 99
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
MODERN = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
LABELS = {"id2label": dict(enumerate("ABC")), "label2id": {n: i for i, n in enumerate("ABC")}}
ENDS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
CONFIGS: dict[str, Any] = {
    "bert": lambda **k: t.BertForSequenceClassification(t.BertConfig(**SIZES, **LABELS, **k)),
    "roberta": lambda **k: t.RobertaForTokenClassification(
        t.RobertaConfig(**SIZES, **LABELS, pad_token_id=1, type_vocab_size=1, **k)
    ),
    "gpt2": lambda **k: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ENDS, **k)
    ),
    "llama": lambda **k: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, num_key_value_heads=2, **ENDS, **k)),
    "modernbert": lambda **k: t.ModernBertForSequenceClassification(
        t.ModernBertConfig(**SIZES, **MODERN, **LABELS, local_attention=8, classifier_bias=True, **k)
    ),
}
TASKS = {"bert": "SEQ_CLS", "roberta": "TOKEN_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "modernbert": "SEQ_CLS"}
TARGETS: dict[str, Any] = {
    "bert": ["query", "value"],
    "roberta": r".*layer\.[01]\.(attention\.self\.key|output\.dense)",
    "gpt2": ["c_attn", "c_proj"],
    "llama": "all-linear",
    "modernbert": ["Wqkv", "Wi", "mlp.Wo"],
}
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def make_base(case: str, folder: Path, **more: Any) -> Any:
    """Save a random model, its norms and biases moved away from identity, and return it."""
    torch.manual_seed(0)
    model = CONFIGS[case](**more).eval()
    move(model, 0.1)
    model.save_pretrained(folder)
    return model


def move(model: Any, size: float) -> None:
    """Move what is trained away from where it is."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def make_peft(case: str, base: Any, **settings: Any) -> Any:
    """Put a random adapter on a transformers model, as peft does it."""
    usual = {"r": 4, "lora_alpha": 10, "target_modules": TARGETS[case], "task_type": TASKS[case]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D, which peft mends by itself, and of tied weights
        model = peft.get_peft_model(base, peft.LoraConfig(**{**usual, **settings}))
    move(model, 0.1)
    return model.eval()


def load_peft(base: Any, folder: Path, **settings: Any) -> Any:
    """Let peft read a folder; what it does not find or does not know is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|[Uu]nexpected|not find|mismatch).*")
        return peft.PeftModel.from_pretrained(base, folder, **settings).eval()


def save_peft(model: Any, folder: Path, **settings: Any) -> None:
    """Let peft write a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of embeddings that are saved whole
        model.save_pretrained(folder, **settings)


def random_ids(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and torch.isfinite(a).all()
    return (a - b).abs().max().item()
