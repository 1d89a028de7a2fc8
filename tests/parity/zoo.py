"""Every family with every head, small: transformers' own models, random and moved away from identity.

Norms of 1 and biases of 0 would hide a norm or a bias that is left out; windows are shorter than the texts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCAB, POSITIONS = 99, 160
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
TEXT = {**SIZES, "max_position_embeddings": POSITIONS}
DECODER = {**TEXT, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
TURN = 90  # the rows of 100 tokens are long, all others short
DEBERTA = {
    **TEXT, "relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7, "max_relative_positions": -1,
}  # fmt: skip
NEAR = {"rope_type": "default", "rope_theta": 100.0}  # places differ more, so greedy texts vary
MODERN = {
    **TEXT, "local_attention": 16, "global_attn_every_n_layers": 3, "pad_token_id": 0, "bos_token_id": 2,
    "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3,
}  # fmt: skip
LABELS = {"id2label": dict(enumerate("ABCDE")), "label2id": {n: i for i, n in enumerate("ABCDE")}}
t = transformers

CONFIGS: dict[str, Callable[..., Any]] = {
    "bert": lambda **k: t.BertConfig(**TEXT, **k),
    "roberta": lambda **k: t.RobertaConfig(**TEXT, pad_token_id=1, type_vocab_size=1, layer_norm_eps=1e-5, **k),
    "xlm-roberta": lambda **k: t.XLMRobertaConfig(**TEXT, type_vocab_size=1, layer_norm_eps=1e-5, **k),
    "albert": lambda **k: t.AlbertConfig(**TEXT, embedding_size=16, **k),
    "albert groups": lambda **k: t.AlbertConfig(**TEXT, embedding_size=16, num_hidden_groups=2, **k),
    "deberta-v2": lambda **k: t.DebertaV2Config(**DEBERTA, position_biased_input=False, **k),  # as v3 is published
    "deberta-v2 new": lambda **k: t.DebertaV2Config(**DEBERTA, legacy=False, position_biased_input=False, **k),
    "deberta-v2 conv": lambda **k: t.DebertaV2Config(
        **{**DEBERTA, "share_att_key": False, "position_buckets": -1, "max_relative_positions": 24}, conv_kernel_size=3,
        position_biased_input=False, conv_act="gelu", type_vocab_size=2, pooler_hidden_act="tanh", **k
    ),
    "deberta-v2 plain": lambda **k: t.DebertaV2Config(
        **{**DEBERTA, "norm_rel_ebd": "none", "pos_att_type": ["c2p"]}, position_biased_input=True, **k
    ),
    "distilbert": lambda **k: t.DistilBertConfig(
        vocab_size=VOCAB, dim=32, n_layers=4, n_heads=4, hidden_dim=48, max_position_embeddings=POSITIONS, **k
    ),
    "modernbert": lambda **k: t.ModernBertConfig(**MODERN, **k),
    "modernbert mean": lambda **k: t.ModernBertConfig(
        **MODERN, classifier_pooling="mean", classifier_bias=True, norm_bias=True, attention_bias=True, mlp_bias=True,
        classifier_activation="relu", **k
    ),
    "gpt2": lambda **k: t.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=POSITIONS, pad_token_id=0, bos_token_id=None,
        eos_token_id=None, **{**LABELS, **k}
    ),
    "llama": lambda **k: t.LlamaConfig(**DECODER, **k),
    "llama 3": lambda **k: t.LlamaConfig(**DECODER, rope_parameters=LLAMA3, tie_word_embeddings=True, **k),
    "mistral": lambda **k: t.MistralConfig(**DECODER, sliding_window=12, **k),
    "qwen2": lambda **k: t.Qwen2Config(**DECODER, **k),
    "qwen2 window": lambda **k: t.Qwen2Config(
        **DECODER, use_sliding_window=True, sliding_window=12, max_window_layers=2, **k
    ),
    "qwen3": lambda **k: t.Qwen3Config(**DECODER, head_dim=16, rope_parameters=NEAR, **k),
    "qwen3 window": lambda **k: t.Qwen3Config(
        **DECODER, head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=12, max_window_layers=2,
        tie_word_embeddings=True, **k
    ),
    "phi": lambda **k: t.PhiConfig(**DECODER, partial_rotary_factor=0.5, **k),
    "phi3": lambda **k: t.Phi3Config(**DECODER, sliding_window=12, resid_pdrop=0.1, **k),
    "phi3 long": lambda **k: t.Phi3Config(
        **DECODER, original_max_position_embeddings=TURN, rope_parameters=long_rope(), **k
    ),
    "vit": lambda **k: t.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8,
        **k
    ),
}  # fmt: skip
HEADS = {
    "bert": "Model MaskedLM CausalLM SequenceClassification TokenClassification QuestionAnswering MultipleChoice "
    "NextSentencePrediction",
    "roberta": "Model MaskedLM CausalLM SequenceClassification TokenClassification QuestionAnswering MultipleChoice",
    "xlm-roberta": "Model MaskedLM CausalLM SequenceClassification TokenClassification QuestionAnswering "
    "MultipleChoice",
    "albert": "Model MaskedLM SequenceClassification TokenClassification QuestionAnswering MultipleChoice",
    "deberta-v2": "Model MaskedLM SequenceClassification TokenClassification QuestionAnswering MultipleChoice",
    "distilbert": "Model MaskedLM SequenceClassification TokenClassification QuestionAnswering MultipleChoice",
    "modernbert": "Model MaskedLM SequenceClassification TokenClassification QuestionAnswering MultipleChoice",
    "gpt2": "Model CausalLM SequenceClassification TokenClassification QuestionAnswering",
    "llama": "Model CausalLM SequenceClassification TokenClassification QuestionAnswering",
    "mistral": "Model CausalLM SequenceClassification TokenClassification QuestionAnswering",
    "qwen2": "Model CausalLM SequenceClassification TokenClassification QuestionAnswering",
    "qwen3": "Model CausalLM SequenceClassification TokenClassification QuestionAnswering",
    "phi": "Model CausalLM SequenceClassification TokenClassification",
    "phi3": "Model CausalLM SequenceClassification TokenClassification",
    "vit": "Model ImageClassification",
}
CELLS = [(case, head) for case in CONFIGS for head in HEADS[case.partition(" ")[0]].split()]
PUBLISHED = {"gpt2": "GPT2", "distilbert": "DistilBert", "modernbert": "ModernBert", "vit": "ViT",
             "xlm-roberta": "XLMRoberta", "deberta-v2": "DebertaV2"}  # fmt: skip
READS_BOTH_WAYS = ("bert", "roberta", "xlm-roberta")  # unless they are told to be decoders
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "phi", "phi3")


def long_rope() -> dict[str, Any]:
    """Return Phi-3's frequencies for half of a head, of DECODER's size now."""
    pairs = range(DECODER["hidden_size"] // 16)
    factors = {"short_factor": [1 + i / 10 for i in pairs], "long_factor": [1.5 + i for i in pairs]}
    return {"rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.5, **factors}


def pad_id(case: str) -> int:
    """Return the token of padding."""
    return 1 if "roberta" in case else 0


def reference_class(case: str, head: str) -> Any:
    """Return transformers' class: ("bert", "MaskedLM") -> BertForMaskedLM."""
    family = case.partition(" ")[0]
    name = PUBLISHED.get(family, family.capitalize())
    return next(
        getattr(transformers, cls)
        for cls in (f"{name}For{head}", f"{name}LMHead{head}" if head == "Model" else "", f"{name}LMHeadModel")
        if head != "Model" and hasattr(transformers, cls)
    ) if head != "Model" else getattr(transformers, f"{name}Model")  # fmt: skip


def make_reference(case: str, head: str, *, seed: int = 0, **more: Any) -> Any:
    """Return one cell's model in evaluation mode."""
    extra: dict[str, Any] = dict(LABELS) if head in {"SequenceClassification", "TokenClassification"} else {}
    if head == "ImageClassification":
        extra = dict(LABELS)
    if head == "CausalLM" and case in READS_BOTH_WAYS:
        extra["is_decoder"] = True
    config = CONFIGS[case](**{**extra, **more})
    torch.manual_seed(seed)
    model = reference_class(case, head)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            positions = "position" in name or "wpe" in name  # a tied model repeats itself where positions are weak
            parameter.add_(torch.randn_like(parameter) * (1.0 if positions else 0.15))
    return model


def numbers(output: Any) -> torch.Tensor:
    """Return what our model returns: logits, start and end side by side, or hidden states."""
    if "start_logits" in output:
        return torch.stack((output.start_logits, output.end_logits), -1)
    return output.logits if "logits" in output else output.last_hidden_state
