"""An image of a classifier beside one with FastAPI and transformers' pipeline: its size, and how soon it answers.

`lmworks deploy docker` writes ours. Both are built and run by `debian_image`, which stands in for an engine and needs
root and debootstrap; LMWORKS_IMAGE_WORK names a folder where the base is kept. The model is MiniLM with a head.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

from debian_image import Stage, build, free_port, running, wait_for
from encode import copy_tokenizer
from flavors import TORCH
from serving.contestants import MINILM

from lmworks.export.onnx_folder import export_graphs
from lmworks.verbs.deploying import deploy_docker

ROUNDS = 5
TEXT = "a gorgeous, witty, seductive movie"
DOCKERFILE = """
FROM python:{python}-slim AS build
RUN python -m venv /opt/peer
COPY wheels /wheels
RUN /opt/peer/bin/pip install --no-cache-dir {packages}
FROM python:{python}-slim
COPY --from=build /opt/peer /opt/peer
COPY model /model
COPY server.py /server.py
ENV HF_HOME=/tmp PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
ENTRYPOINT ["/opt/peer/bin/python", "/server.py", "/model", "text-classification", "{port}"]
"""


def make_classifier(folder: Path) -> Path:
    """Save MiniLM with a head of two labels."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    transformers.BertForSequenceClassification.from_pretrained(MINILM, num_labels=2).save_pretrained(folder)
    copy_tokenizer(folder)
    return folder


def describe_peer(model: Path, folder: Path, port: int) -> Path:
    """Write a folder that an engine builds: the model, the server, and the Dockerfile."""
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder / "wheels"), TORCH]
    subprocess.run(fetch, check=True)  # this machine's build, for processors: that for graphics cards adds 4 GB
    torch = next((folder / "wheels").glob("torch-*.whl")).name
    packages = f"transformers=={version('transformers')} /wheels/{torch} fastapi uvicorn"
    shutil.copytree(model, folder / "model")
    (folder / "model/model.safetensors").chmod(0o644)  # which only its owner may read as it was saved
    shutil.copy(Path(__file__).parent / "serving/pipeline_server.py", folder / "server.py")
    written = DOCKERFILE.format(python=".".join(map(str, sys.version_info[:2])), packages=packages, port=port)
    (folder / "Dockerfile").write_text(written)
    return folder


def first_answer(stage: Stage, port: int) -> tuple[float, str]:
    """Start a container; return the seconds until it has answered, and the label that it gave."""
    body = json.dumps({"text": TEXT}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/classify", body, {"Content-Type": "application/json"})
    with running(stage) as (process, _):
        seconds, answer = wait_for(request, process)
    return seconds, str(json.loads(answer)["answers"][0]["label"])


def main() -> None:
    """Build both, then start each in turn."""
    if os.geteuid() or shutil.which("debootstrap") is None:
        raise SystemExit("image: this needs root and debootstrap")
    with tempfile.TemporaryDirectory() as folder:
        place, ports = Path(folder), (free_port(), free_port())
        work = Path(os.environ.get("LMWORKS_IMAGE_WORK", place / "work"))
        work.mkdir(exist_ok=True)
        model = make_classifier(place / "classifier")
        export_graphs(model, place / "graph", dtypes=["fp32"])
        deploy_docker(place / "graph", place / "ours", port=ports[0])
        described = (place / "ours", describe_peer(model, place / "peer", ports[1]))
        stages = []
        for number, one in enumerate(described):
            (work / str(number)).mkdir(exist_ok=True)
            stages.append(build(one, work / str(number), bases=work))
        times = []
        for _ in range(ROUNDS):
            (mine, said), (theirs, known) = (first_answer(*pair) for pair in zip(stages, ports, strict=True))
            assert said == known, (said, known)
            times.append((mine, theirs))
    ours, peer = (stage.added_bytes / 1e6 for stage in stages)
    start, peer_start = (statistics.median(side) for side in zip(*times, strict=True))
    ratio = statistics.median(theirs / mine for mine, theirs in times)
    rows = [
        row("size of the image above its base, MiniLM in fp32 included", ours, peer, "MB", peer / ours),
        row("start of the container to the first answer", start, peer_start, "s", ratio),
    ]
    print(json.dumps(rows))


def row(what: str, ours: float, peer: float, unit: str, ratio: float) -> dict[str, Any]:
    """Return a row of the table."""
    what = f"{what} (peer: FastAPI with transformers' pipeline)"
    return {"what": what, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio, "target": None}


if __name__ == "__main__":
    sys.exit(main())
