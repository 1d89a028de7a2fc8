"""CTranslate2: `how` is `compute`, its compute type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from race import serve


class Peer:
    """Its Generator, on a folder that its own converter wrote."""

    def __init__(self, setting: dict[str, Any]) -> None:
        folder = Path(setting["model"])
        made = folder / "ctranslate2"
        if not (made / "model.bin").is_file():
            ctranslate2.converters.TransformersConverter(str(folder)).convert(str(made), force=True)
        self.generator = ctranslate2.Generator(
            str(made), device="cpu", compute_type=setting["compute"], intra_threads=setting["threads"], inter_threads=1
        )

    def generate(self, ids: Sequence[int], tokens: int) -> Sequence[int]:
        """Write greedily, past the end of a document."""
        prompt = [[f"t{i}" for i in ids]]
        options = {"max_length": tokens, "min_length": tokens, "sampling_topk": 1, "include_prompt_in_result": False}
        return self.generator.generate_batch(prompt, **options)[0].sequences_ids[0]

    def logits(self, ids: Sequence[int]) -> Any:
        """Return the prompt's last logits."""
        found = self.generator.forward_batch([list(ids)]).to(ctranslate2.DataType.float32)
        return np.array(found)[0, -1]


if __name__ == "__main__":
    serve(Peer)
