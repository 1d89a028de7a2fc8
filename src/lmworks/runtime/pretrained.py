"""Our causal language model with the methods that people know from transformers. Imported only when one is asked for.

Shapes: B batch, T tokens, N new tokens at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmworks.models.checkpoint import load_model, save_model
from lmworks.models.heads import CausalLM
from lmworks.runtime.decoding import generate
from lmworks.runtime.sampling import Sampling
from lmworks.runtime.torch_runtime import TorchRuntime

if TYPE_CHECKING:
    from torch import Tensor


class PretrainedCausalLM(CausalLM):
    """A CausalLM that was read from a folder: `model(input_ids)` gives logits (B, T, V)."""

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PretrainedCausalLM:
        """Read a model folder, ready for inference."""
        model = load_model(folder)
        model.__class__ = cls  # the same module with two methods more
        assert isinstance(model, cls)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, generation_config.json and model.safetensors."""
        save_model(self, folder)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Return the prompts (B, T) with what follows: (B, T + N), a row that ends early filled with its pad token.

        Greedy by default. Padding on the left needs its `attention_mask` (B, T).
        """
        import torch

        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repeat_penalty=repeat_penalty,
            repeat_last_n=repeat_last_n,
            seed=seed,
        )
        config, runtime = self.config, TorchRuntime(self)
        eos = config.eos_token_id if eos_token_id is None else eos_token_id
        ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = []
        for row, real in zip(input_ids, mask, strict=True):
            prompt = row[real.bool()].tolist()
            stream = generate(runtime, Silent(), prompt, sampling=sampling, max_tokens=max_new_tokens, eos_ids=ends)
            for _ in stream:
                pass
            rows.append(stream.result.tokens)
        pad = config.pad_token_id if config.pad_token_id is not None else next(iter(ends), 0)
        new = torch.full((len(rows), max(map(len, rows))), pad, dtype=input_ids.dtype)  # (B, N)
        for i, tokens in enumerate(rows):
            new[i, : len(tokens)] = torch.tensor(tokens)
        return torch.cat((input_ids, new.to(input_ids.device)), 1)


class Silent:
    """Stands where a tokenizer would: token ids go in and out, and no text is wanted."""

    eos_id = None

    def encode(self, text: str) -> list[int]:
        """Return no token."""
        return []

    def decode(self, ids: Sequence[int]) -> str:
        """Return no text."""
        return ""
