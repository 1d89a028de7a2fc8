"""Models of published size, random weights as transformers draws them: our numbers against its own at 128 tokens.

A ratio above 1 means that the largest difference is below the limit of 1e-5.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

TOKENS, LIMIT = 128, 1e-5


def difference(model: Any) -> float:
    """Return the largest difference between a reference's numbers and ours after a round through its folder."""
    import torch

    from lmworks.models.checkpoint import load_model

    ids = torch.randint(5, 20_000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model.eval().save_pretrained(folder)
        found, output = load_model(folder)(ids), model(ids, attention_mask=torch.ones_like(ids))
        expected = output.logits if "logits" in output else output.last_hidden_state
        return float((found - expected).abs().max())


def main() -> None:
    """Compare one family after the other."""
    import torch
    import transformers as t

    modern = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    roberta = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    cases = {
        "bert-base, masked LM": lambda: t.BertForMaskedLM(t.BertConfig()),
        "roberta-base, masked LM": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**roberta)),
        "distilbert-base, masked LM": lambda: t.DistilBertForMaskedLM(t.DistilBertConfig()),
        "ModernBERT-base, masked LM": lambda: t.ModernBertForMaskedLM(t.ModernBertConfig(**modern)),
        "bert-base, hidden states": lambda: t.BertModel(t.BertConfig()),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config()),
    }
    rows = []
    for name, make in cases.items():
        torch.manual_seed(0)
        apart = difference(make())
        rows.append({
            "what": f"{name}, {TOKENS} tokens: largest difference from transformers (peer: the limit)",
            "ours": apart, "peer": LIMIT, "unit": "", "ratio": LIMIT / max(apart, 1e-8), "target": 1.0,
        })  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
