"""What `lmworks deploy` writes: checked by the packaging rules, Kubernetes' own schemas, and by running it."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import lmworks
from lmworks.base.errors import FormatError, InputError
from lmworks.cli import main
from lmworks.deploy.folder import name_of
from lmworks.deploy.wheel import pin, write_wheel
from lmworks.export.receipt import check_receipt
from lmworks.verbs.deploying import deploy_docker, deploy_kubernetes, deploy_serverless

TEXT = "a gorgeous, witty, seductive movie"
CUSTOM = {"monitoring.coreos.com/v1", "kustomize.config.k8s.io/v1beta1"}  # Kubernetes has no schema of them


@pytest.fixture(scope="module")
def image(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deployed") / "image"
    assert main(["deploy", "docker", str(graphs), "-o", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def cluster(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deployed") / "cluster"
    words = ["--replicas", "3", "--most", "7", "--secret", "intents-keys", "--image", "registry/intents:1"]
    assert main(["deploy", "kubernetes", str(graphs), "-o", str(out), *words]) == 0
    return out


def documents(folder: Path) -> list[dict[str, Any]]:
    return [one for path in sorted(folder.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text()) if one]


def kind(folder: Path, name: str) -> dict[str, Any]:
    [found] = [one for one in documents(folder) if one["kind"] == name]
    return found


def test_an_image_holds_one_graph_no_weights_and_no_torch(image: Path, graphs: Path) -> None:
    """C38: the served model needs none of torch's gigabytes."""
    held = {path.relative_to(image).as_posix() for path in image.rglob("*") if path.is_file()}
    assert {"Dockerfile", ".dockerignore", "compose.yaml", "requirements.txt", "model/onnx/model.onnx"} <= held
    assert "model/onnx/model_quantized.onnx" not in held and not any(name.endswith(".safetensors") for name in held)
    assert check_receipt(image)["passed"] and check_receipt(image / "model")["passed"]
    names = {line.partition("==")[0] for line in (image / "requirements.txt").read_text().split()}
    assert {"onnxruntime", "tokenizers", "fastapi", "uvicorn"} <= names
    assert not names & {"torch", "transformers", "onnx", "pytest"}
    dockerfile = (image / "Dockerfile").read_text()
    [entry] = [line for line in dockerfile.splitlines() if line.startswith("ENTRYPOINT ")]
    words = json.loads(entry.removeprefix("ENTRYPOINT "))  # the exec form: signals reach the server itself
    assert words[1:3] == ["serve", "/models/sentiment-1"] and "USER 10001:10001" in dockerfile
    assert "$" not in (image / "compose.yaml").read_text() + (image / "replicas.yaml").read_text()
    service = yaml.safe_load((image / "compose.yaml").read_text())["services"]["sentiment-1"]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["stop_grace_period"] == "40s" and service["mem_limit"].endswith("m")
    given = lmworks.predict(image / "model", [TEXT], runtime="onnx")
    assert given == lmworks.predict(graphs, [TEXT], runtime="onnx", dtype="fp32")


def test_a_dtype_takes_its_graph_along(graphs: Path, tmp_path: Path) -> None:
    deploy_docker(graphs, tmp_path / "image", dtype="int8", name="small", port=9000)
    assert [path.name for path in (tmp_path / "image" / "model" / "onnx").iterdir()] == ["model_quantized.onnx"]
    words = (tmp_path / "image" / "Dockerfile").read_text().splitlines()[-1]
    assert '"/models/small"' in words and '"--port", "9000", "--dtype", "int8"' in words


def test_a_checkpoint_is_exported_first(graphs: Path, tmp_path: Path) -> None:
    weights = graphs.parent / "made"
    deploy_serverless(weights, tmp_path / "function")
    assert (tmp_path / "function" / "model" / "onnx" / "model.onnx").is_file()
    assert not list((tmp_path / "function").rglob("*.safetensors"))


def test_the_wheel_is_whole_and_always_the_same(tmp_path: Path) -> None:
    """By the binary distribution format's own record; installed by pip, it says its version without the checkout."""
    first, again = (
        write_wheel(place) for place in (tmp_path, tmp_path / "again") if place.mkdir(exist_ok=True) is None
    )
    assert first.read_bytes() == again.read_bytes()
    with zipfile.ZipFile(first) as wheel:
        info = f"lmworks-{lmworks.__version__}.dist-info"
        rows = {row[0]: row[1] for row in csv.reader(wheel.read(f"{info}/RECORD").decode().splitlines())}
        assert set(rows) == set(wheel.namelist()) and "lmworks/deploy/templates/docker/Dockerfile" in rows
        for name, known in rows.items():
            if known:
                found = base64.urlsafe_b64encode(hashlib.sha256(wheel.read(name)).digest()).rstrip(b"=").decode()
                assert known == f"sha256={found}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, str(tmp_path / "there"), str(first)], check=True)
    said = subprocess.run(
        [sys.executable, "-c", "import lmworks; print(lmworks.__version__, lmworks.__file__)"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "there")}, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert said[0] == lmworks.__version__ and said[1].startswith(str(tmp_path))


def test_pins_are_what_pip_would_install() -> None:
    """The resolver of pip itself, over what is installed here, names the same packages."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-index", "--report", "-"]
    pins = pin("serve")
    assert all("==" in line for line in pins)
    done = subprocess.run([*command, *pins], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["install"] == []  # every pin, and whatever pins need, is installed as it says
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    names = {line.partition("==")[0] for line in pins}
    for name in names:
        for line in requires(name) or ():
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                assert wanted.name.lower().replace("_", "-") in names, f"{name} needs {line}"


def test_manifests_are_what_kubernetes_takes(cluster: Path) -> None:
    checked = []
    for manifest in documents(cluster):
        if manifest["apiVersion"] in CUSTOM:
            continue
        for version in ("1.30", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(manifest, version, strict=True)
        checked.append(manifest["kind"])
    assert sorted(checked) == ["Deployment", "HorizontalPodAutoscaler", "NetworkPolicy", "PodDisruptionBudget",
                               "Service", "ServiceAccount"]  # fmt: skip
    listed = kind(cluster, "Kustomization")["resources"]
    assert all((cluster / name).is_file() for name in listed)
    metrics = kind(cluster, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert [one["type"] for one in metrics] == ["Resource"], "a metric that nobody hands out forbids to scale down"
    [endpoint] = kind(cluster, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["authorization"] == {"credentials": {"name": "intents-keys", "key": "metrics"}}
    assert "metrics" in (cluster / "README.md").read_text()


YAML_1_1 = yaml.SafeLoader  # as clusters read it: on, true, null and 10:30 are no texts


@pytest.mark.parametrize(("folder", "known"), [
    ("123", "model-123"), ("20newsgroups", "model-20newsgroups"), ("On", "on"), ("--", "model"), ("é", "model"),
    ("9" * 60, "model-" + "9" * 34), ("news", "news"), ("a" * 39 + "-b", "a" * 39),
])  # fmt: skip
def test_names_begin_with_a_letter(tmp_path: Path, folder: str, known: str) -> None:
    """RFC 1035, which a Service's name must follow."""
    assert name_of(tmp_path / folder, None) == known


def test_names_that_yaml_takes_for_something_else(graphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    deploy_kubernetes(graphs, out, name="on", namespace="true", secret="null", feedback="off", image="10:30",
                      queue=True)  # fmt: skip
    for manifest in documents(out):
        if manifest["apiVersion"] not in CUSTOM:
            kubernetes_validate.validate(manifest, "1.30", strict=True)
        if manifest["kind"] != "Kustomization":
            assert manifest["metadata"]["name"] == "on"
    assert kind(out, "Kustomization")["namespace"] == "true"
    [container] = kind(out, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "10:30"
    metrics = kind(out, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert [one["type"] for one in metrics] == ["Resource", "Pods"]
    assert metrics[1]["pods"]["metric"]["name"] == "lmworks_requests_waiting"
    assert "seriesQuery" in (out / "README.md").read_text()
    services = [yaml.load((out / "image" / name).read_text(), YAML_1_1)["services"]
                for name in ("compose.yaml", "replicas.yaml")]  # fmt: skip
    assert list(services[0]) == ["on"] and list(services[1]) == ["on-1", "on-2", "proxy"]
    assert {one.get("image") for one in (*services[0].values(), *services[1].values())} == {
        "10:30", "haproxy:2.6-alpine"
    }  # fmt: skip


def test_whoever_runs_it_may_read_it(graphs: Path, tmp_path: Path) -> None:
    """A mask that hides is that of the one who builds; the image's user is another."""
    before = os.umask(0o077)
    try:
        deploy_docker(graphs, tmp_path / "image", name="small")
    finally:
        os.umask(before)
    for path in (tmp_path / "image").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


class Strict(yaml.SafeLoader):
    """Refuses a key that is there twice, as docker compose does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]  # type: ignore[no-untyped-call]
        assert len(set(keys)) == len(keys), keys
        return super().construct_mapping(node, deep)


@pytest.mark.parametrize("feedback", [False, True])
def test_keys_come_where_the_marks_of_comment_go(graphs: Path, tmp_path: Path, feedback: bool) -> None:
    deploy_docker(graphs, tmp_path / "image", feedback=feedback)
    head, services, rest = (tmp_path / "image/compose.yaml").read_text().partition("services:\n")
    rest = "".join(line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line
                   for line in rest.splitlines(keepends=True))  # fmt: skip
    found = yaml.load(head + services + rest, Strict)
    [service] = found["services"].values()
    words = ["--feedback", "/feedback/feedback.db"] if feedback else []
    assert service["command"] == [*words, "--api-key-file", "/run/secrets/keys"]
    assert service["secrets"] == ["keys"] and found["secrets"] == {"keys": {"file": "keys.txt"}}


def test_the_manifests_belong_together(cluster: Path) -> None:
    pod = kind(cluster, "Deployment")["spec"]["template"]
    [container] = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    for one in ("Service", "PodDisruptionBudget", "NetworkPolicy", "ServiceMonitor", "Deployment"):
        spec = kind(cluster, one)["spec"]
        chosen = spec.get("selector", spec.get("podSelector"))
        assert chosen.get("matchLabels", chosen).items() <= labels.items(), one
    assert container["image"] == "registry/intents:1"
    assert container["args"] == ["--api-key-file", "/run/secrets/api-keys/keys"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["spec"]["volumes"]} == {"tmp", "api-keys"}
    limits = {
        name: container["securityContext"][name] for name in ("readOnlyRootFilesystem", "allowPrivilegeEscalation")
    }
    assert limits == {"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False}
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    scaler = kind(cluster, "HorizontalPodAutoscaler")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (3, 7)
    assert scaler["metrics"][0]["resource"]["name"] == "cpu"
    stop = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > int(stop[1]) + 30  # the server's own --grace
    assert (cluster / "image" / "Dockerfile").is_file() and (cluster / "image" / "model" / "config.json").is_file()


def test_feedback_has_a_place_and_the_packages(graphs: Path, tmp_path: Path) -> None:
    """A folder beside compose.yaml; in a cluster PostgreSQL, whose address and password a Secret holds."""
    deploy_docker(graphs, tmp_path / "image", feedback=True)
    [service] = yaml.safe_load((tmp_path / "image/compose.yaml").read_text())["services"].values()
    assert service["command"] == ["--feedback", "/feedback/feedback.db"]
    assert service["volumes"] == ["./feedback:/feedback"]
    cluster = tmp_path / "cluster"
    assert main(["deploy", "kubernetes", str(graphs), "-o", str(cluster), "--feedback", "said", "--secret", "k"]) == 0
    for manifest in documents(cluster):
        if manifest["apiVersion"] not in CUSTOM:
            kubernetes_validate.validate(manifest, "1.30", strict=True)
    [container] = kind(cluster, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["args"][-2:] == ["--feedback", "$(LMWORKS_FEEDBACK)"] and "--api-key-file" in container["args"]
    found = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in container["env"]}
    assert found == {
        "LMWORKS_FEEDBACK": {"name": "said", "key": "url"},
        "PGPASSWORD": {"name": "said", "key": "password"},
    }
    assert kind(cluster, "ServiceMonitor")["spec"]["endpoints"][0]["authorization"]["credentials"]["name"] == "k"
    [rule] = kind(cluster, "NetworkPolicy")["spec"]["egress"]
    assert {one["port"] for one in rule["ports"]} == {5432, 53} and "to" not in rule
    for folder in (tmp_path / "image", cluster / "image"):
        assert {"sqlalchemy", "psycopg"} <= {one.partition("==")[0] for one in
                                             (folder / "requirements.txt").read_text().split()}  # fmt: skip


def test_what_cannot_be_deployed_leaves_nothing(graphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for wrong, what in (
        ({"port": 80}, "--port"), ({"name": "Big_Name"}, "name of a service"), ({"dtype": "q4"}, "q4"),
    ):  # fmt: skip
        with pytest.raises((InputError, FormatError), match=what):
            deploy_docker(graphs, out, **wrong)  # type: ignore[arg-type]
    for wrong, what in (
        ({"replicas": 5, "most": 2}, "--replicas"),
        ({"cpus": 0}, "--cpus"),
        ({"namespace": "a b"}, "--namespace"),
        ({"secret": "a: b"}, "--secret"),
        ({"image": "registry/x: y"}, "--image"),
        ({"image": "x; rm -r ."}, "--image"),
        ({"name": "20newsgroups"}, "name of a service"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=what):
            deploy_kubernetes(graphs, out, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no such"):
        deploy_docker(tmp_path / "nowhere", out)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(InputError, match="did not write"):
        deploy_docker(graphs, tmp_path / "mine")
    secret = tmp_path / "secret"
    secret.write_text("key")
    folder = tmp_path / "stranger"
    (folder / "onnx").mkdir(parents=True)
    for path in graphs.rglob("*"):
        if path.is_file() and path.name != "config.json":
            (folder / path.relative_to(graphs)).symlink_to(path) if path.suffix == ".onnx" else None
    (folder / "config.json").symlink_to(secret)
    with pytest.raises(FormatError, match="leads out of its folder"):
        deploy_docker(folder, out)
    assert not out.exists() and not list(tmp_path.glob("*.staged"))
