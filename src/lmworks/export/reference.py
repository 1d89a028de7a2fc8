"""transformers, where it is installed: the independent implementation that a checkpoint is compared with.

Eager attention in float32 on the processor: plain matrix products, the same numbers at every call. Each row is run
alone, so that nothing here depends on how the reference treats padding.

Shapes: T tokens, O outputs of the head, G tokens that greedy search adds, V vocab_size.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.base.optional import require
from lmworks.models.config import Config
from lmworks.models.families import architecture

NAME, ATTENTION = "transformers", "eager"
Arrays = dict[str, NDArray[Any]]


def library() -> ModuleType:
    """Return the package, or raise MissingExtra."""
    return require(NAME, extra="dev")


def versions() -> dict[str, str]:
    """Say what the reference is, for a certificate or a fixture."""
    return {"name": NAME, "version": library().__version__, "torch": torch.__version__, "attention": ATTENTION}


class Reference:
    """One head of a checkpoint in its published class."""

    def __init__(self, folder: Path, c: Config, head: str) -> None:
        """Read it. Raises MissingExtra, and InputError where transformers cannot read it or lacks some tensors."""
        transformers, name = library(), architecture(c.model_type, head)
        what = f"transformers {transformers.__version__} cannot load this checkpoint as {name}"
        try:
            with quiet(transformers):
                self.model, info = getattr(transformers, name).from_pretrained(
                    folder, dtype=torch.float32, attn_implementation=ATTENTION, local_files_only=True,
                    use_safetensors=True, output_loading_info=True,
                )  # fmt: skip
        except Exception as error:  # whatever another library raises about a file that it cannot use
            raise InputError(what, where=str(folder), found=f"{type(error).__name__}: {error}"[:500]) from None
        self.config, self.head, self.transformers = c, head, transformers
        self.missing, self.unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
        wrong = {*(key for key in self.missing if "pooler" not in key), *map(str, info["mismatched_keys"])}
        if wrong:
            fix = "rewrite it in today's names with: lmworks export MODEL --to hf"
            raise InputError(what, where=str(folder), found="missing: " + ", ".join(sorted(wrong)), fix=fix)
        self.model.eval()

    def answer(self, row: Arrays) -> Arrays:
        """Run one row: input_ids and token_type_ids (T,), or pixel_values (C, H, W).

        Returns numbers, (T, O) or (O,), and of a bare body with a pooler pooled (D,).
        """
        inputs = {name: torch.from_numpy(value)[None] for name, value in row.items()}
        if "input_ids" in inputs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if self.head == "MultipleChoice":  # one choice a row
            inputs = {name: value[:, None] for name, value in inputs.items()}
        with torch.inference_mode(), quiet(self.transformers):
            output = self.model(**inputs)
        if "start_logits" in output:
            found = {"numbers": torch.stack((output.start_logits, output.end_logits), -1)}
        elif self.head == "Model":
            found = {"numbers": output.last_hidden_state}
            if output.get("pooler_output") is not None and not self.missing:
                found["pooled"] = output.pooler_output
        else:
            found = {"numbers": output.logits}
        return {name: value[0].numpy() for name, value in found.items()}

    def greedy(self, prompt: NDArray[Any], count: int) -> Arrays:
        """Continue a prompt (T,) by the likeliest tokens: tokens (G,) and the logits that chose them (G, V)."""
        ids = torch.from_numpy(prompt)[None]
        if self.config.position_offset:  # RoBERTa's generate counts positions from 0: whole passes instead
            steps = []
            for _ in range(count):
                steps.append(self.answer({"input_ids": ids[0].numpy()})["numbers"][-1])
                ids = torch.cat((ids, torch.tensor([[int(steps[-1].argmax())]])), 1)
            return {"tokens": ids[0, len(prompt) :].numpy(), "numbers": np.stack(steps)}
        pad = self.config.pad_token_id
        settings = self.transformers.GenerationConfig(
            do_sample=False, max_new_tokens=count, pad_token_id=0 if pad is None else pad, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        self.model.generation_config = settings  # the checkpoint's own may sample, punish repetition, or stop early
        with torch.inference_mode(), quiet(self.transformers):
            output = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return {"tokens": output.sequences[0, len(prompt) :].numpy(), "numbers": torch.cat(output.logits).numpy()}


@contextmanager
def quiet(transformers: ModuleType) -> Iterator[None]:
    """Keep the reference's advice and progress bars off the terminal, and leave its settings as they were."""
    log = transformers.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
