"""Open a model folder and use it: `load(folder).generate("Once upon")`, with or without torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import read_json
from lmworks.base.optional import require
from lmworks.base.types import Generation
from lmworks.runtime.base import Runtime
from lmworks.runtime.decoding import TextStream, generate
from lmworks.runtime.onnx_runtime import FILES, OnnxRuntime
from lmworks.runtime.sampling import Sampling
from lmworks.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lmworks.runtime.pretrained import PretrainedCausalLM

RUNTIMES = ("auto", "torch", "onnx")


class Settings(TypedDict, total=False):
    """What `generate` may be told; the defaults are greedy."""

    max_tokens: int  # 128
    stop: str | Sequence[str]  # texts to end before
    temperature: float  # 0: greedy
    top_k: int  # 0: off
    top_p: float  # 1: off
    repeat_penalty: float  # 1: off
    repeat_last_n: int  # 64 positions
    seed: int | None  # None: different each time


class Predictor:
    """A runtime, the tokenizer that belongs to it, and the tokens that end a text."""

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer, *, eos_ids: Sequence[int] = ()) -> None:
        self.runtime, self.tokenizer, self.eos_ids = runtime, tokenizer, list(eos_ids)

    @overload
    def generate(self, prompt: str, *, stream: Literal[False] = False, **settings: Unpack[Settings]) -> Generation: ...
    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **settings: Unpack[Settings]) -> TextStream: ...
    def generate(self, prompt: str, *, stream: bool = False, **settings: Unpack[Settings]) -> Generation | TextStream:
        """Continue a text: a Generation, or with `stream` the pieces as they come, and then `.result`."""
        limits: dict[str, Any] = dict(settings)
        own = {name: limits.pop(name) for name in ("max_tokens", "stop") if name in limits}
        text = generate(self.runtime, self.tokenizer, prompt, sampling=Sampling(**limits), eos_ids=self.eos_ids, **own)
        if stream:
            return text
        for _ in text:
            pass
        return text.result


def load(
    folder: str | Path, *, runtime: str = "auto", dtype: str = "auto", slots: int = 1, threads: int | None = None
) -> Predictor:
    """Open a model folder.

    runtime "auto" takes the ONNX graph where there is one and onnxruntime is installed, else torch. dtype "auto" is
    fp32, or int8 where that is the only graph. Raises InputError or FormatError that names the path.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("there is no such model folder", where=str(folder), fix="check the path")
    chosen = open_runtime(folder, runtime, dtype, slots, threads)
    tokenizer = Tokenizer.from_pretrained(folder)
    if tokenizer.vocab_size > chosen.vocab_size:
        raise FormatError(
            "the tokenizer does not belong to this model",
            where=str(folder),
            found=f"{tokenizer.vocab_size} tokens in tokenizer.json",
            expected=f"at most the model's {chosen.vocab_size}",
        )
    return Predictor(chosen, tokenizer, eos_ids=read_eos_ids(folder, tokenizer))


def open_runtime(folder: Path, runtime: str, dtype: str, slots: int, threads: int | None) -> Runtime:
    """Open the runtime of this name over a folder."""
    if runtime not in RUNTIMES:
        raise InputError("there is no such runtime", found=runtime, expected=", ".join(RUNTIMES))
    graphs = [name for name, file in FILES.items() if (folder / "onnx" / file).is_file()]
    if runtime == "onnx" or (runtime == "auto" and graphs and find_spec("onnxruntime")):
        if dtype == "auto":
            dtype = graphs[0] if graphs else "fp32"
        return OnnxRuntime(folder, dtype=dtype, slots=slots, threads=threads)
    require("torch", extra="torch")
    from lmworks.runtime.torch_runtime import TorchRuntime

    return TorchRuntime(folder, dtype="fp32" if dtype == "auto" else dtype, slots=slots)


def read_eos_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end a text: those of generation_config.json, else config.json, else the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get("eos_token_id")
            if isinstance(value, int):
                return [value]
            if isinstance(value, list):
                return [int(item) for item in value]
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]


class AutoModelForCausalLM:
    """The name people know: `AutoModelForCausalLM.from_pretrained(folder)(input_ids)` gives logits. Needs torch."""

    @staticmethod
    def from_pretrained(folder: str | Path) -> PretrainedCausalLM:
        """Return our torch module, with `.generate` and `.save_pretrained`, in evaluation mode."""
        require("torch", extra="torch")
        from lmworks.runtime.pretrained import PretrainedCausalLM

        return PretrainedCausalLM.from_pretrained(folder)
