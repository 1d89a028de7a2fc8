"""Extras as flavors: what each weighs, how soon it is imported and answers, beside transformers and torch (or optimum).

Each is installed by pip into an environment of its own from this checkout's wheel, does its task there, opens no
connection, and lacks what it should lack: `tests/test_flavors.py` asks the same of each. A cold answer and an import
are each a fresh process, from its start to its end.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from encode import copy_tokenizer

ROOT = Path(__file__).parents[1]
# tokenizers asks for huggingface_hub: only flavors without texts lack what could reach a network
NETWORK = "huggingface_hub httpx httpcore requests urllib3 aiohttp websockets anyio".split()
SERVER, GRAPHS, TEXTS = ["fastapi", "uvicorn"], ["onnx", "onnxruntime"], ["tokenizers", "regex"]
ORACLES = ["transformers", "peft", "nltk", "accelerate", "torchvision"]
ROUNDS = 5
TORCH = (
    f"torch=={version('torch').partition('+')[0]}"  # a build for processors; that for graphics cards takes gigabytes
)
IMPORT = "import lmworks\nlmworks.load, lmworks.predict"
ASK = "import lmworks\nassert len(lmworks.load(model)('a cat')) == 3\n"


class Peer(NamedTuple):
    """What a user installs for the same, what its program imports, that program, and the model that it reads."""

    wanted: list[str]
    imports: str
    program: str
    model: str


PIPELINE = "from transformers import pipeline"
OPTIMUM = """from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, pipeline
"""
PEERS = {
    "transformers torch": Peer(
        ["transformers", TORCH],
        PIPELINE,
        f"{PIPELINE}\nprint(pipeline('text-classification', model=sys.argv[1])('a cat'))",
        "classifier",
    ),
    "optimum[onnxruntime]": Peer(
        ["optimum-onnx[onnxruntime]", TORCH],
        OPTIMUM,
        f"""{OPTIMUM}
model = ORTModelForSequenceClassification.from_pretrained(sys.argv[1], subfolder="onnx", file_name="model.onnx")
print(pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(sys.argv[1]))("a cat"))
""",
        "graph",
    ),
}


class Flavor(NamedTuple):
    """What is asked of pip, what must not come with it, a program, and the model that it runs as `model`."""

    extras: str
    absent: list[str]
    program: str
    model: str = "classifier"
    peer: str = ""  # the environment that its size and its cold answer are compared with


FLAVORS = {
    "core": Flavor(
        "",
        ["torch", *GRAPHS, *NETWORK, *TEXTS, *SERVER, "jinja2"],
        """
from lmworks.cli import main
assert main(["inspect", model]) == 0
assert main(["convert", model + "-pickled", "-o", work + "/converted"]) == 0
""",
    ),
    "offline": Flavor(
        "torch",
        ["onnxruntime", *NETWORK, *TEXTS, *SERVER],
        """
import torch
from lmworks.models.checkpoint import load_model
with torch.no_grad():
    print(load_model(model)(torch.tensor([[101, 7592, 102]])).tolist())
""",
    ),
    "checkpoints": Flavor("torch,text,hub", [*GRAPHS, *SERVER, *ORACLES], ASK, peer="transformers torch"),
    "vision": Flavor(
        "torch,vision",
        ["onnxruntime", "sentencepiece", *NETWORK, *TEXTS],
        "import lmworks\nassert len(lmworks.load(model)(model + '/picture.png')) == 3\n",
        "vision",
    ),
    "graphs": Flavor("text,onnx", ["torch", "onnx", *SERVER, *ORACLES], ASK, "graph", peer="optimum[onnxruntime]"),
    "serving": Flavor(
        "serve", ["torch", "onnx", *ORACLES], f"import lmworks.serve.app\n{ASK}", "graph", peer="optimum[onnxruntime]"
    ),
    "data": Flavor(
        "text,data",
        ["torch", *GRAPHS, *SERVER, *ORACLES],
        """
from pathlib import Path
from lmworks.cli import main
Path(work, "a.txt").write_text("It was cold.\\n\\nIt snowed.\\n" * 50, "utf-8")
assert main(["clean", work + "/a.txt", "-o", work + "/clean.jsonl.zst", "--unit", "paragraph", "--dedup", "exact"]) == 0
assert main(["tokenizer", "train", work + "/a.txt", "--kind", "bpe", "--vocab-size", "270", "-o", work + "/bpe"]) == 0
assert main(["ngram", "train", work + "/a.txt", "--order", "2", "--kind", "word", "-o", work + "/ngram"]) == 0
""",
    ),
    "train": Flavor(
        "train",
        [*GRAPHS, *SERVER, *ORACLES],
        """
from pathlib import Path
from lmworks.cli import main
Path(work, "a.csv").write_text("text,label\\n" + "it is cold,a\\nwarm today,b\\nno,c\\n" * 20, "utf-8")
words = ["--task", "text-classification", "--epochs", "1"]
assert main(["finetune", model, work + "/a.csv", *words, "-o", work + "/tuned"]) == 0
""",
    ),
    "tune": Flavor(
        "tune",
        [*GRAPHS, *SERVER, *ORACLES],
        """
from pathlib import Path
from lmworks.cli import main
Path(work, "a.csv").write_text("text,label\\n" + "it is cold,a\\nwarm today,b\\nno,c\\n" * 20, "utf-8")
words = ["--task", "text-classification", "--epochs", "1", "--trials", "2", "--space", "lr=1e-5..1e-3:log"]
assert main(["tune", model, work + "/a.csv", *words, "--storage", work + "/s.journal", "-o", work + "/best"]) == 0
""",
    ),
    "export": Flavor(
        "export",
        [*SERVER, *ORACLES],
        f"""
from lmworks.cli import main
assert main(["export", model, "--to", "onnx", "-o", work + "/graph"]) == 0
{ASK}""",
    ),
    "gguf": Flavor(
        "gguf",
        [*GRAPHS, *SERVER, *ORACLES],
        """
from lmworks.cli import main
assert main(["export", model, "--to", "gguf", "--dtype", "f32", "-o", work + "/gguf"]) == 0
""",
        "decoder",
    ),
    "metrics": Flavor(
        "metrics",
        ["torch", *GRAPHS, *SERVER, *NETWORK],
        """
from lmworks.evaluation.generated import score_generated
assert score_generated(["it was cold today"], ["it was cold today"])["bleu"] > 0.99
""",
    ),
    "feedback": Flavor(
        "serve,feedback",
        ["torch", "onnx", *ORACLES],
        """
from lmworks.cli import main
from lmworks.serve.feedback import Store
Store(work + "/feedback.db", create=True).close()
assert main(["feedback", "list", work + "/feedback.db"]) == 0
""",
    ),
    "telemetry": Flavor(
        "serve,telemetry",
        ["torch", "onnx", *ORACLES],
        """
from lmworks.serve.telemetry import Tracing, open_exporter
Tracing(open_exporter("http://127.0.0.1:9")).provider.shutdown()
""",
    ),
    "full": Flavor(
        "all",
        ORACLES,
        f"from lmworks.verbs.doctor import examine\nassert examine().values['passed']\n{ASK}",
        peer="transformers torch",
    ),
}
WATCH = """
import json, sys
seen = []
told = ("socket.connect", "socket.getaddrinfo", "urllib.", "http.")
sys.addaudithook(lambda event, arguments: seen.append(event) if event.startswith(told) else None)
model, work = sys.argv[1:3]
"""


def make_models(place: Path) -> Path:
    """Write the wheel, and a small classifier, its pickle, its graph, a classifier of pictures and a decoder."""
    import torch
    import transformers
    from PIL import Image

    from lmworks.deploy import wheel
    from lmworks.export.onnx_folder import export_graphs

    wheel.write_wheel(place)
    torch.manual_seed(0)
    body = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes: dict[str, Any] = {**body, "num_labels": 3}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval()
    model.save_pretrained(place / "classifier")
    copy_tokenizer(place / "classifier")
    export_graphs(place / "classifier", place / "graph", dtypes=["fp32"])
    (place / "classifier-pickled").mkdir()
    torch.save(model.state_dict(), place / "classifier-pickled" / "pytorch_model.bin")
    picture = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
    transformers.ViTForImageClassification(picture).save_pretrained(place / "vision")
    (place / "vision" / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    Image.new("RGB", (20, 20), (200, 30, 40)).save(place / "vision" / "picture.png")
    from lmworks.tokens.train import train_tokenizer

    tokenizer = train_tokenizer(["It was cold. It snowed. Nobody came."] * 20, kind="bpe", vocab_size=270)
    tokenizer.save(place / "decoder")
    config = transformers.LlamaConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=64, **body)
    transformers.LlamaForCausalLM(config).save_pretrained(place / "decoder")
    return place


def install(place: Path, wanted: list[str], *pip: str) -> Path:
    """Make an environment with these distributions; return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place / "bin" / "python"
    words = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pip, *wanted]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return python


def install_flavor(place: Path, flavor: Flavor, built: Path) -> Path:
    """Make an environment with this checkout's wheel and these extras; return its interpreter."""
    package = next(built.glob("*.whl"))
    wanted = f"lmworks[{flavor.extras}] @ {package.as_uri()}" if flavor.extras else str(package)
    return install(place, [wanted], "-c", str(ROOT / "constraints.txt"))


def run(python: Path, code: str, *words: str) -> str:
    """Run a program in an environment that knows nothing of this one; return what it printed."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [python, "-I", "-c", code, *words], capture_output=True, text=True, env=kept, cwd=python.parent
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def try_out(flavor: Flavor, python: Path, built: Path, work: Path) -> list[str]:
    """Let a flavor do its task; return what it printed. RuntimeError where it connects or holds what it should not."""
    code = f"{WATCH}{flavor.program}\nprint(json.dumps({{'seen': seen, 'loaded': sorted(sys.modules)}}))"
    lines = run(python, code, str(built / flavor.model), str(work)).splitlines()
    said = json.loads(lines[-1])
    loaded = {module.partition(".")[0] for module in said["loaded"]}
    find = (
        "import importlib.util, json, sys; print(json.dumps([n for n in sys.argv[1:] if importlib.util.find_spec(n)]))"
    )
    there = json.loads(run(python, find, *flavor.absent))
    if said["seen"] or there or loaded & set(flavor.absent):
        raise RuntimeError(f"connections {said['seen']}, there {there}, loaded {sorted(loaded & set(flavor.absent))}")
    return lines[:-1]


def weigh(place: Path) -> float:
    """Return the megabytes of an environment without what every new one holds (pip)."""
    files = (path for path in place.rglob("*") if path.is_file() and not path.is_symlink())
    own = (path for path in files if not {"pip", "setuptools"} & {part.partition("-")[0] for part in path.parts})
    return sum(path.stat().st_size for path in own) / 1e6


def seconds(python: Path, code: str, *words: str) -> float:
    """Return the wall time of one fresh process."""
    start = time.perf_counter()
    run(python, code, *words)
    return time.perf_counter() - start


def main() -> None:
    """Install peers, then flavors one after another; print sizes and cold answers."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        built = make_models(place)
        peers = {
            name: install(place / name.split("[")[0].replace(" ", "-"), what.wanted) for name, what in PEERS.items()
        }
        sizes = {name: weigh(python.parents[1]) for name, python in peers.items()}
        for name, flavor in FLAVORS.items():
            python = install_flavor(place / "env", flavor, built)
            (place / "work").mkdir()
            try_out(flavor, python, built, place / "work")
            peer = flavor.peer or "transformers torch"
            size, lacks = weigh(place / "env"), ", ".join(flavor.absent)
            what = f"size of `lmworks{f'[{flavor.extras}]' if flavor.extras else ''}` ({name}) without {lacks}"
            rows.append(
                {"what": f"{what} (peer: `pip install {peer}`)", "ours": size, "peer": sizes[peer], "unit": "MB",
                 "ratio": sizes[peer] / size, "target": None}
            )  # fmt: skip
            rows.append(race(f"import of `{name}`", [(python, IMPORT), (peers[peer], PEERS[peer].imports)], peer))
            if flavor.peer:
                asked = (python, WATCH + ASK, str(built / flavor.model), str(built))
                theirs = (peers[peer], f"import sys\n{PEERS[peer].program}", str(built / PEERS[peer].model))
                rows.append(race(f"cold answer of `{name}`, a tiny classifier", [asked, theirs], peer))
            shutil.rmtree(place / "env")
            shutil.rmtree(place / "work")
    print(json.dumps(rows))


def race(what: str, commands: list[tuple[Any, ...]], peer: str) -> dict[str, Any]:
    """Run ours and the peer's in turn, each in fresh processes."""
    for command in commands:
        run(*command)
    times = [[seconds(*command) for command in commands] for _ in range(ROUNDS)]
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    return {"what": f"{what} (peer: {peer})", "ours": mine, "peer": theirs, "unit": "s",
            "ratio": statistics.median(b / a for a, b in times), "target": None}  # fmt: skip


if __name__ == "__main__":
    main()
