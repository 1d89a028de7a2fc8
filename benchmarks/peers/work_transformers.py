"""transformers: `how` is dtype, and for decoding `compiled`, for encoding `batch` (rows sorted by length) or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from batches import in_batches
from race import serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Peer:
    """`generate`, as it comes or with a static cache and a compiled forward; a forward of padded rows."""

    def __init__(self, setting: dict[str, Any]) -> None:
        torch.set_num_threads(setting["threads"])
        self.setting = setting
        name = "AutoModelForCausalLM" if setting["task"] == "decode" else "AutoModelForSequenceClassification"
        dtype = DTYPES[setting["dtype"]]
        self.model = getattr(transformers, name).from_pretrained(setting["model"], dtype=dtype).eval()
        self.plain: Any = self.model
        self.cache: Any = None
        torch.set_float32_matmul_precision("medium" if setting.get("medium") else "highest")
        if setting.get("compiled"):
            if setting["task"] == "decode":
                most = len(setting["prompt"]) + setting["tokens"]
                self.cache = transformers.StaticCache(config=self.model.config, max_cache_len=most)
            self.plain = self.model.forward
            self.model.forward = torch.compile(self.model.forward)

    @torch.inference_mode()
    def generate(self, ids: Sequence[int], tokens: int) -> Sequence[int]:
        """Write greedily, past the end of a document."""
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        if self.cache is not None:
            self.cache.reset()
            options["past_key_values"] = self.cache
        written = self.model.generate(torch.tensor([ids]), **options)
        return written[0, len(ids) :].tolist()

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Any:
        """Return the prompt's last logits."""
        return self.plain(torch.tensor([ids])).logits[0, -1].float().numpy()

    def encode(self, rows: Sequence[Sequence[int]]) -> Any:
        """Run padded batches."""
        return in_batches(rows, self.run, most=self.setting.get("batch"))

    @torch.inference_mode()
    def run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Run one padded batch: (B, T) twice -> (B, O)."""
        found = self.model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits
        return found.float().numpy()


if __name__ == "__main__":
    serve(Peer)
