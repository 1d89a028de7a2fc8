"""The Ray Serve application that `lmworks deploy ray` writes: read as text by default, and run by a real Ray."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import lmworks
from lmworks.base.errors import InputError
from lmworks.cli import main
from lmworks.export.receipt import check_receipt
from lmworks.verbs.deploying import RAY, deploy_ray

TEXTS = ["a gorgeous, witty, seductive movie", "it 's slow -- very , very slow"]


@pytest.fixture(scope="module")
def application(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deployed") / "application"
    words = ["--name", "intents", "--dtype", "int8", "--replicas", "2", "--most", "5", "--port", "8765"]
    assert main(["deploy", "ray", str(graphs), "-o", str(out), *words]) == 0
    return out


def test_the_configuration_names_what_the_application_holds(application: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((application / "serve.yaml").read_text())
    [served] = config["applications"]
    module, _, variable = served["import_path"].partition(":")
    tree = ast.parse((application / f"{module}.py").read_text())
    [name] = [one.targets[0].id for one in tree.body if isinstance(one, ast.Assign)]  # type: ignore[attr-defined]
    [made] = [one for one in tree.body if isinstance(one, ast.ClassDef)]
    assert variable == name and made.name == served["deployments"][0]["name"]
    assert 'dtype="int8", name="intents"' in (application / f"{module}.py").read_text()
    scaling = served["deployments"][0]["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (2, 5) and config["http_options"]["port"] == 8765
    pins = (application / "requirements.txt").read_text().split()
    assert RAY in pins and not any(pin.startswith("torch=") for pin in pins)
    assert check_receipt(application)["passed"] and (application / "model/onnx/model_quantized.onnx").is_file()
    assert all("$" not in (application / one).read_text() for one in ("serve.yaml", "README.md", f"{module}.py"))
    with pytest.raises(InputError, match="--replicas"):
        deploy_ray(application / "model", tmp_path / "out", replicas=3, most=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ray_serves_the_application(graphs: Path, application: Path, tmp_path: Path) -> None:
    """In an environment of its own, as the README says; answers are those of the model."""
    made = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", made], check=True)
    [wheel] = application.glob("*.whl")
    install = [made / "bin/pip", "install", "--quiet", "-r", application / "requirements.txt", wheel]
    subprocess.run(install, check=True)
    config = yaml.safe_load((application / "serve.yaml").read_text())
    clean = {"PATH": f"{made}/bin:/usr/bin:/bin", "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0",
             "LMWORKS_CACHE": str(tmp_path / "cache"), "RAY_TMPDIR": f"/tmp/ray-{os.getpid()}",
             "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}  # a busy machine takes longer than its 5 s  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([made / "bin/serve", "run", "serve.yaml"], cwd=application, env=clean, stdout=log,
                                   stderr=log)  # fmt: skip
    url = f"http://127.0.0.1:{config['http_options']['port']}/"

    def ask(**more: Any) -> httpx.Response:
        return httpx.post(url, timeout=60, **more)

    try:
        started = time.monotonic()
        while True:
            try:
                if httpx.get(url, timeout=30).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None and time.monotonic() - started < 400, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.5)
        # one by one: the rounding of an int8 graph depends on the whole call
        known = [lmworks.predict(graphs, [text], runtime="onnx", dtype="int8")[0] for text in TEXTS]
        for text, [best, *_] in zip(TEXTS, known, strict=True):
            said = ask(json={"input_text": text}).json()
            assert (said["prediction"], said["model"]) == (best.label, "intents")
            assert said["score"] == pytest.approx(best.score, abs=1e-5)
        assert ask(content=b"{").json()["error"]["code"] == "invalid_json"
        refused = ask(json={"text": "x"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input_text")
        assert "Adding 2 replicas to Deployment(name='Model', app='intents')" in (tmp_path / "log").read_text()
    finally:
        process.terminate()
        process.wait(90)
        for place in (made, Path(clean["RAY_TMPDIR"])):  # half a gigabyte
            shutil.rmtree(place, ignore_errors=True)
    with pytest.raises(httpx.TransportError):
        httpx.get(url)
