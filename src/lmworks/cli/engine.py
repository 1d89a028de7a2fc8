"""What answers: the options that all predicting verbs spell alike."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from lmworks.cli.output import Code, Revision


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Engine:
    """What runs a model, for `api.predict(**engine.settings)` inside `with engine.tracing()`."""

    runtime: Annotated[
        Literal["auto", "torch", "onnx"],
        Parameter(help="What runs the model; auto: what is fastest here, measured once, and keeps the answers."),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "any", "fp32", "bf16", "fp16", "int8", "uint8", "q4", "q4f16", "bnb4"],
        Parameter(help="fp32 or bf16 (faster, less exact) in torch, or that of an exported graph; any: the fastest."),
    ] = "auto"
    trace: Annotated[
        Path | None, Parameter(help="Write where the time goes, for chrome://tracing, and show the time of each stage.")
    ] = None
    revision: Revision = None
    code: Code = ()

    @property
    def settings(self) -> dict[str, Any]:
        """All but the trace, as the functions of `api` take them."""
        return {name: value for name, value in vars(self).items() if name != "trace"}

    def tracing(self) -> AbstractContextManager[object]:
        """Write the trace of what happens inside, if one is asked for."""
        from lmworks.runtime.trace import tracing

        return tracing(self.trace)

    def predict(self, model: str, task: str, examples: Sequence[Any], **options: Any) -> Any:
        """Answer examples with a model: one answer each."""
        from lmworks import api

        with self.tracing():
            return api.predict(model, examples, task=task, **self.settings, **options)
