"""The image that `lmworks deploy docker` describes, built and run: in a Debian root, as there is no engine here."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import lmworks
from lmworks.verbs.deploying import deploy_docker

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from debian_image import build, free_port, running, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
TEXTS = ["a gorgeous, witty, seductive movie", "it 's slow -- very , very slow"]


def test_the_image_serves_without_rights_and_drains(graphs: Path, tmp_path: Path) -> None:
    """Non-root, read-only root, process 1 in the exec form; SIGTERM answers what was asked; no torch inside."""
    assert os.geteuid() == 0, "a root folder of one's own needs root"
    deploy_docker(graphs, tmp_path / "image", port=free_port())
    work = Path(os.environ.get("LMWORKS_IMAGE_WORK", tmp_path))  # where a bootstrapped root is kept between runs
    stage = build(tmp_path / "image", work)
    assert stage.user == "10001:10001" and stage.entry[0] == "/opt/lmworks/bin/lmworks"
    packages = {path.name.partition("-")[0] for path in stage.root.rglob("*.dist-info")}
    assert "onnxruntime" in packages and not packages & {"torch", "transformers", "pip"}
    print(f"\nadded to the base: {stage.added_bytes / 1e6:.1f} MB")
    base = f"http://127.0.0.1:{stage.entry[stage.entry.index('--port') + 1]}"
    with running(stage) as (process, server):
        print(f"cold start: {wait_for(f'{base}/health/ready', process)[0]:.2f} s")
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{server}/status").read_text().splitlines() if ":\t" in line
        )
        assert status["Uid"].split() == ["10001"] * 4 and int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert status["NSpid"].split()[-1] == "1" and status["NoNewPrivs"] == "1"
        mounts = [line.split() for line in Path(f"/proc/{server}/mounts").read_text().splitlines()]
        [root] = [options for _, place, _, options, *_ in mounts if place == "/"]
        assert "ro" in root.split(",")
        known = lmworks.predict(graphs, TEXTS, runtime="onnx", dtype="fp32")
        given = httpx.post(f"{base}/classify", json={"text": TEXTS}).json()["answers"]
        assert [answer["label"] for answer in given] == [labels[0].label for labels in known]
        answers: list[Any] = []

        def ask() -> None:
            answers.append(httpx.post(f"{base}/classify", json={"text": TEXTS * 32}, timeout=60))

        clients = [threading.Thread(target=ask) for _ in range(8)]
        for client in clients:
            client.start()
        time.sleep(0.2)
        os.kill(server, signal.SIGTERM)
        for client in clients:
            client.join(60)
        assert process.wait(40) == 0
        assert [answer.status_code for answer in answers] == [200] * 8
        assert json.loads(answers[0].text)["model"] == "sentiment-1"
