"""Our torch modules with the methods that people know from transformers. Imported only when one is asked for.

Shapes: B batch, C choices, T tokens, N new tokens at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmworks.base.errors import InputError
from lmworks.base.types import Answer
from lmworks.models.checkpoint import load_model, save_model
from lmworks.models.folder import write_folder
from lmworks.models.heads import Model
from lmworks.runtime.decoding import generate
from lmworks.runtime.predictor import Predictor, make_predictor
from lmworks.runtime.sampling import Sampling
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.tasks.registry import find_task
from lmworks.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


DTYPES = {
    "auto": "", "fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16",
    "float16": "float16",
}  # fmt: skip


class Pretrained(Model):
    """A Model that was read from a folder: `model(input_ids, attention_mask, token_type_ids=…)` gives its numbers."""

    folder: Path

    @classmethod
    def read(cls, folder: Path, kind: str, *, dtype: Any = "fp32", **settings: Any) -> Pretrained:
        """Read a folder with the head `kind`, ready for inference; `dtype` "auto" keeps the file's."""
        import torch

        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise InputError(f"there is no dtype {dtype!r}", expected=", ".join(DTYPES))
            dtype = getattr(torch, DTYPES[dtype]) if DTYPES[dtype] else None
        model = load_model(folder, kind, dtype=dtype, **settings)
        model.__class__ = cls  # the same module with a few methods more
        assert isinstance(model, cls)
        model.folder = folder
        return model

    def forward(  # type: ignore[override]
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *,
        pixel_values: Tensor | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        """Return the head's numbers; choices (B, C, T) come as rows and go as (B, C)."""
        inputs = input_ids if pixel_values is None else pixel_values
        if inputs is None:
            raise InputError("there is nothing to run", expected="input_ids or pixel_values")
        if self.config.type_vocab_size == 0:
            more.pop("token_type_ids", None)  # tokenizers give them to every model
        if self.kind == "MultipleChoice" and inputs.ndim == 3:
            mask = None if attention_mask is None else attention_mask.flatten(0, 1)
            flat = {name: value.flatten(0, 1) for name, value in more.items() if value is not None}
            return super().forward(inputs.flatten(0, 1), mask, **flat).view(inputs.shape[:2])
        return super().forward(inputs, attention_mask, **more)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a whole folder: weights, configs, tokenizer, and how it pools or reads images."""
        if Path(folder).resolve() == self.folder.resolve():
            save_model(self, folder)
        else:
            write_folder(self, self.folder, Path(folder))

    def predictor(self, **options: Any) -> Predictor:
        """Return what answers in words rather than numbers, with this module as it is now."""
        tokenizer = None if self.config.vision else Tokenizer.from_pretrained(self.folder)
        task = find_task(self.kind)
        return make_predictor(TorchRuntime(self), self.folder, self.config, task, tokenizer, options)

    def predict(self, examples: Any, **options: Any) -> Any:
        """Answer each of a list of examples, or a single one: labels, entities, tokens for a mask, vectors."""
        return self.predictor(**options)(examples)

    def answer(self, question: str, context: str, **options: Any) -> Answer:
        """Return the span of the context that answers the question."""
        found: Answer = self.predict((question, context), **options)
        return found

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
        do_sample: bool | None = None,
    ) -> Tensor:
        """Return the prompts (B, T) with what follows: (B, T + N), a row that ends early filled with its pad token.

        Greedy by default. Padding on the left needs its `attention_mask` (B, T).
        """
        import torch

        if do_sample is not None:  # transformers' switch; the temperature alone decides here
            temperature = (temperature or 1.0) if do_sample else 0.0
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

    def encode_prompt(self, text: str) -> list[int]:
        """Return no token."""
        return []

    def decode(self, ids: Sequence[int]) -> str:
        """Return no text."""
        return ""
