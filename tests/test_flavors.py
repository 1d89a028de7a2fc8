"""Extras as flavors: each installed by pip into an environment of its own from this checkout's wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from minilm_heads import MINILM
from PIL import Image

from lmworks.deploy import wheel
from lmworks.export.onnx_folder import export_graphs

ROOT = Path(__file__).parents[1]
NETWORK = "huggingface_hub httpx httpcore requests urllib3 aiohttp websockets anyio".split()
ENGINES = ["torch", "onnxruntime"]


class Flavor(NamedTuple):
    """What is asked of pip, what must not come with it, and a program that it must run on `model`."""

    extras: str
    absent: list[str]
    program: str
    model: str = "classifier"


FLAVORS = {
    "core": Flavor(
        "",
        [*ENGINES, *NETWORK, "tokenizers", "regex", "jinja2", "fastapi"],
        """
from lmworks.cli import main
assert main(["inspect", model]) == 0
assert main(["convert", model + "-pickled", "-o", model + "-converted", "--overwrite"]) == 0
""",
    ),
    "offline": Flavor(
        "torch",
        [*NETWORK, "onnxruntime", "tokenizers", "regex", "fastapi"],
        """
import torch
from lmworks.models.checkpoint import load_model
with torch.no_grad():
    print(load_model(model)(torch.tensor([[101, 7592, 102]])).tolist())
""",
    ),
    "vision": Flavor(
        "torch,vision",
        [*NETWORK, "onnxruntime", "tokenizers", "regex", "sentencepiece"],
        """
import lmworks
labels = lmworks.load(model)(model + "/picture.png")
assert len(labels) == 3
""",
        "vision",
    ),
    "serving": Flavor(
        "serve",
        ["torch", "onnx", "transformers"],
        """
import lmworks
import lmworks.serve.app
assert len(lmworks.load(model)("a cat")) == 3
""",
    ),
    "full": Flavor(
        "all",
        ["transformers", "peft", "nltk", "accelerate"],
        """
import lmworks
from lmworks.verbs.doctor import examine
assert examine().values["passed"]
assert len(lmworks.load(model)("a cat")) == 3
""",
    ),
}
WATCH = """
import json, sys
seen = []
told = ("socket.connect", "socket.getaddrinfo", "urllib.", "http.")
sys.addaudithook(lambda event, arguments: seen.append(event) if event.startswith(told) else None)
model = sys.argv[1]
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, and models to try it on."""
    place = tmp_path_factory.mktemp("flavors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wheel, "check_current", lambda known, root: None)
        wheel.write_wheel(place)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_labels": 3,
    }
    source = place / "source"
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval()
    model.save_pretrained(source)
    transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(source)
    export_graphs(source, place / "serving", dtypes=["fp32"])
    (place / "classifier-pickled").mkdir()
    torch.save(model.state_dict(), place / "classifier-pickled" / "pytorch_model.bin")
    source.rename(place / "classifier")
    picture = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
    transformers.ViTForImageClassification(picture).save_pretrained(place / "vision")
    (place / "vision" / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    Image.new("RGB", (20, 20), (200, 30, 40)).save(place / "vision" / "picture.png")
    return place


def run(python: Path, code: str, *words: str) -> str:
    """Run a program in an environment that knows nothing of this one."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [python, "-I", "-c", code, *words], capture_output=True, text=True, env=kept, cwd=python.parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", list(FLAVORS))
def test_a_flavor_holds_what_it_says_and_no_more(built: Path, tmp_path: Path, name: str) -> None:
    """C38, R198–R200, R211: a clean environment does its task, opens no connection, and lacks what it should lack."""
    flavor = FLAVORS[name]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    package = next(built.glob("*.whl"))
    wanted = f"lmworks[{flavor.extras}] @ {package.as_uri()}" if flavor.extras else str(package)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    done = subprocess.run([*pip, wanted], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    model = built / ("serving" if name == "serving" else flavor.model)
    code = f"{WATCH}{flavor.program}\nprint(json.dumps({{'seen': seen, 'loaded': sorted(sys.modules)}}))"
    said: dict[str, Any] = json.loads(run(python, code, str(model)).splitlines()[-1])
    assert said["seen"] == []
    assert not set(flavor.absent) & {module.partition(".")[0] for module in said["loaded"]}
    ask = (
        "import importlib.util, json, sys; print(json.dumps([n for n in sys.argv[1:] if importlib.util.find_spec(n)]))"
    )
    assert json.loads(run(python, ask, *flavor.absent)) == []
    if name == "offline":  # the same numbers as here
        found = json.loads(run(python, code, str(model)).splitlines()[0])
        with torch.no_grad():
            wanted_numbers = (
                transformers.BertForSequenceClassification.from_pretrained(model)
                .eval()(torch.tensor([[101, 7592, 102]]))
                .logits
            )
        assert (torch.tensor(found) - wanted_numbers).abs().max() <= 1e-5
    size = sum(
        path.stat().st_size for path in (tmp_path / "env").rglob("*") if path.is_file() and not path.is_symlink()
    )
    print(f"{name}: {size / 1e6:.0f} MB")
