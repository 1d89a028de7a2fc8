"""What makes a folder of graphs provable, and a page: the self-test that torch records, and the page over it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmworks.base.errors import InputError
from lmworks.base.optional import require
from lmworks.export.probe import TEXTS
from lmworks.export.selftest import record_selftest
from lmworks.export.selftest_items import COUNT, read_lines, spread
from lmworks.export.selftest_tasks import record_task
from lmworks.export.web import GRAPHS, write_page
from lmworks.models.families import TASKS, unsayable
from lmworks.models.folder import has_tokenizer
from lmworks.models.heads import Model
from lmworks.models.recurrent import Sequential
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.tasks.image import FILE
from lmworks.tokens.tokenizer import Tokenizer

WRITES = "text-generation"
SINGLE = "page.html"
TOKENS = 32  # that the self-test of a model that writes takes after each prompt


def find_task(model: Model, source: Path) -> str | None:
    """Return the task that a model's graphs can be held to; None where no task has its head and files."""
    task = next((task for task, head in TASKS.items() if head == model.kind), None)
    if task == "image-classification":
        return task if (source / FILE).is_file() and find_spec("PIL") else None
    if task == WRITES and not model.config.causal:
        return None
    return task if has_tokenizer(source) and not model.config.vision else None


def check_page(model: Model, source: Path, dtypes: Sequence[str]) -> None:
    """Raise InputError for a model that the page cannot show."""
    if isinstance(model.transformer, Sequential):
        raise InputError("the web page runs Transformers only", where=str(source), found=model.config.model_type,
                         fix="export with --to onnx")  # fmt: skip
    if model.kind == TASKS[WRITES] and unsayable(model.config, model.kind):
        raise InputError(
            "the web page's library makes a cache for as many heads as published configs can say", where=str(source),
            found=f"{model.config.num_attention_heads} heads of {model.config.head_dim} numbers in "
            f"{model.config.hidden_size}", fix="export with --to onnx, or leave out lmworks prune --heads",
        )  # fmt: skip
    if model.config.vision:
        require("PIL.Image", extra="vision")
    if find_task(model, source) is None:
        needs = FILE if model.config.vision else "a tokenizer"
        raise InputError(
            "the web page cannot show this model", where=str(source), found=model.kind,
            expected=f"{needs}, and a head of one of the tasks {', '.join(TASKS)}", fix="export with --to onnx",
        )  # fmt: skip
    if not set(dtypes) & set(GRAPHS):
        raise InputError(
            "the web page needs a graph that it can run", found=", ".join(dtypes), expected=", ".join(GRAPHS)
        )


def record(model: Model, staged: Path, task: str, *, data: str | Path | None = None) -> dict[str, Any]:
    """Return the self-test of a model whose config and tokenizer are in `staged`, of a user's texts or the built-in."""
    if task != WRITES:
        return record_task(TorchRuntime(model), staged, task, data=data)
    tokenizer, room = Tokenizer.from_pretrained(staged), model.config.max_tokens
    tokens = min(TOKENS, room // 2)
    texts = list(TEXTS) if data is None else [line for line in read_lines(Path(data), task) if line.strip()]
    prompts = [text for text in texts if 1 <= len(tokenizer.encode_prompt(text)) <= room - tokens]
    if not prompts:
        raise InputError(
            "no text for the self-test fits the model", where=str(data or ""), found=f"{len(texts)} texts",
            expected=f"some of 1 to {room - tokens} tokens", fix="give short ones with --data",
        )  # fmt: skip
    return record_selftest(TorchRuntime(model), tokenizer, spread(prompts, COUNT), tokens=tokens)


def add_page(model: Model, staged: Path, selftest: dict[str, Any], *, title: str, single_file: bool = False) -> None:
    """Write the page over graphs, settings and self-test; as one file that opens from disk too where that is asked."""
    write_page(staged, title=title, facts={"parameters": sum(p.numel() for p in model.parameters())}, selftest=selftest)
    if single_file:
        from lmworks.export.single_file import write_single_file

        write_single_file(staged, staged / SINGLE)
