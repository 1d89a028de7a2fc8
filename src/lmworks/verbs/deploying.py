"""A folder that a container engine, a cluster or a cloud's functions take: a model, what runs it, how to use it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from lmworks import __version__
from lmworks.base.errors import InputError
from lmworks.base.files import check_output, new_folder, write_text
from lmworks.base.hub import find_folder
from lmworks.base.report import Report
from lmworks.deploy.folder import fill, name_of, open_to_all, put_model
from lmworks.deploy.wheel import pin, write_wheel
from lmworks.export.receipt import write_receipt

MIB = 2**20
SECRET = "api-keys"  # the volume of --secret, and where its file `keys` is mounted
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # of DNS (RFC 1123)
WORD = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
IMAGE = re.compile(
    rf"(?:[A-Za-z0-9.-]+(?::\d+)?/)?{WORD}(?:/{WORD})*(?::\w[\w.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?", re.A
)
ALONE = """    # command: ["--api-key-file", "/run/secrets/keys"]
"""
KEPT = """    volumes: ["./feedback:/feedback"]  # mkdir feedback && sudo chown 10001 feedback
    command:
      - "--feedback"
      - "/feedback/feedback.db"
      # - "--api-key-file"
      # - "/run/secrets/keys"
"""
QUEUE = """    - type: Pods
      pods:
        metric: {name: lmworks_requests_waiting}
        target: {type: AverageValue, averageValue: "4"}
"""
METRICS = """
The number of pods follows the queue too, as the cluster's metrics name it. The Prometheus adapter needs this rule for
that; while the metric is missing, pods are added and never taken away:

```yaml
rules:
  - seriesQuery: 'lmworks_requests_waiting{namespace!="",pod!=""}'
    resources: {overrides: {namespace: {resource: namespace}, pod: {resource: pod}}}
    metricsQuery: 'sum(<<.Series>>{<<.LabelMatchers>>}) by (<<.GroupBy>>)'
```
"""
KEYS = """
The Secret `%s` holds `keys`, one a line, and `metrics`, the one of them that Prometheus asks with:

```sh
kubectl -n %s create secret generic %s --from-file keys --from-literal metrics=KEY
```
"""
EGRESS = """
    - ports:  # PostgreSQL, and the names of machines
        - {port: 5432, protocol: TCP}
        - {port: 53, protocol: UDP}
        - {port: 53, protocol: TCP}"""
RAY = "ray[serve]==2.60.0"  # that the application was tried with
Values = dict[str, str]


def deploy_docker(
    model: str | Path, out: str | Path, *, dtype: str = "auto", name: str | None = None, port: int = 8000,
    feedback: bool = False, overwrite: bool = False,
) -> Report:  # fmt: skip
    """Write the build folder of an image that serves a model, without torch, as a user without rights.

    `out` gets Dockerfile, compose.yaml (feedback, if wanted, is kept in a folder beside it), replicas.yaml and
    haproxy.cfg for two servers, requirements.txt with the versions installed here, lmworks' own wheel, and the model.
    Raises InputError for a model without graphs where torch is not installed, a port or name out of bounds.
    """
    check_port(port)

    def image(folder: Path, values: Values) -> None:
        write_image(folder, values | {"command": KEPT if feedback else ALONE}, port, feedback=feedback)

    return write("docker", model, out, dtype, name, overwrite, image)


def deploy_kubernetes(
    model: str | Path, out: str | Path, *, dtype: str = "auto", name: str | None = None, image: str | None = None,
    namespace: str = "models", replicas: int = 2, most: int = 10, cpus: int = 2, port: int = 8000,
    secret: str | None = None, feedback: str | None = None, queue: bool = False, overwrite: bool = False,
) -> Report:  # fmt: skip
    """Write manifests for Kustomize, and in `image/` what the image is built from.

    `replicas` to `most` pods of `cpus` processors each, by the queue too where the cluster has its metric (`queue`);
    `secret` names a Secret whose `keys` holds API keys and `metrics` that of Prometheus, `feedback` one whose `url`
    (postgresql://USER@HOST/DATABASE) and `password` say where feedback is kept.
    """
    check_port(port)
    check_replicas(replicas, most)
    if not 1 <= cpus <= 256:
        raise InputError("--cpus is out of range", found=str(cpus), expected="1 to 256")
    for option, given in (("--namespace", namespace), ("--secret", secret), ("--feedback", feedback)):
        if given is not None and not LABEL.fullmatch(given):
            raise InputError(f"{option} is no name of a cluster", found=given,
                             expected="up to 63 small letters, digits, and dashes between them")  # fmt: skip
    if image is not None and not IMAGE.fullmatch(image):
        raise InputError("--image is no name of an image", found=image, expected="REGISTRY/NAME:TAG, in small letters")

    def manifests(folder: Path, values: Values) -> None:
        if image is not None:
            values["image"] = image
        words = [] if secret is None else ["--api-key-file", f"/run/secrets/{SECRET}/keys"]
        words += [] if feedback is None else ["--feedback", "$(LMWORKS_FEEDBACK)"]  # which Kubernetes fills in
        variables = "".join(
            f'            - {{name: {name}, valueFrom: {{secretKeyRef: {{name: "{feedback}", key: {key}}}}}}}\n'
            for name, key in (("LMWORKS_FEEDBACK", "url"), ("PGPASSWORD", "password"))
        )
        mount = f"            - {{name: {SECRET}, mountPath: /run/secrets/{SECRET}, readOnly: true}}\n"
        volume = f'        - name: {SECRET}\n          secret: {{secretName: "{secret}", defaultMode: 0444}}\n'
        authorization = f'      authorization:\n        credentials: {{name: "{secret}", key: metrics}}\n'
        told = (METRICS if queue else "") + (KEYS % (secret, namespace, secret) if secret else "")
        values |= {
            "authorization": authorization if secret else "", "metrics": told, "queue": QUEUE if queue else "",
            "by_queue": " and the requests that wait in each (4)" if queue else "", "command": ALONE,
            "namespace": namespace, "replicas": str(replicas), "most": str(most), "cpus": str(cpus),
            "arguments": ", ".join(json.dumps(word) for word in words), "mounts": mount if secret else "",
            "volumes": volume.rstrip("\n") if secret else "", "egress": EGRESS if feedback else " []",
            "environment": f"          env:\n{variables}" if feedback else "",
        }  # fmt: skip
        write_image(folder / "image", values, port, feedback=feedback is not None)
        (folder / "model").rename(folder / "image" / "model")
        fill("kubernetes", folder, values)

    return write("kubernetes", model, out, dtype, name, overwrite, manifests)


def deploy_serverless(
    model: str | Path, out: str | Path, *, dtype: str = "auto", name: str | None = None, overwrite: bool = False
) -> Report:
    """Write a function for AWS Lambda and what takes its images: handler.py, the model, and how the image is built."""

    def function(folder: Path, values: Values) -> None:
        add_package(folder, values, "text", "onnx")
        fill("serverless", folder, values)

    return write("serverless", model, out, dtype, name, overwrite, function)


def deploy_ray(
    model: str | Path, out: str | Path, *, dtype: str = "auto", name: str | None = None, replicas: int = 1,
    most: int = 10, port: int = 8000, overwrite: bool = False,
) -> Report:  # fmt: skip
    """Write a Ray Serve application of `replicas` to `most` replicas, its configuration, the model, and the pins."""
    check_port(port)
    check_replicas(replicas, most)

    def application(folder: Path, values: Values) -> None:
        add_package(folder, values, "text", "onnx")
        with (folder / "requirements.txt").open("a") as file:
            file.write(f"{RAY}\n")
        fill("ray", folder, values | {"replicas": str(replicas), "most": str(most), "port": str(port)})

    return write("ray", model, out, dtype, name, overwrite, application)


def write(
    kind: str, model: str | Path, out: str | Path, dtype: str, name: str | None, overwrite: bool,
    finish: Callable[[Path, Values], None],
) -> Report:  # fmt: skip
    """Write one kind of deployment to the new folder `out`, which is whole or absent; `finish` adds what is its own."""
    folder, out = find_folder(model), Path(out)
    named = name_of(folder, name)
    check_output(out, overwrite=overwrite)
    with new_folder(out) as staged:
        size = put_model(folder, staged / "model", dtype=dtype)
        values = {
            "name": named, "image": f"{named}:latest", "version": __version__, "dtype": dtype,
            "python": f"{sys.version_info.major}.{sys.version_info.minor}", "model_mib": str(-(-size // MIB)),
            "memory_request_mib": str(256 + 3 * size // 2 // MIB), "memory_limit_mib": str(512 + 3 * size // MIB),
        }  # fmt: skip
        finish(staged, values)
        made_by = {"made_by": f"lmworks {__version__}", "source": folder.resolve().name, "deployment": kind}
        receipt = write_receipt(staged, made_by, exclude=())
        open_to_all(staged)
    files = sorted(receipt["files"])
    total = sum(entry["bytes"] for entry in receipt["files"].values())
    facts = {"out": str(out), "kind": kind, "name": named, "bytes": total, "model_bytes": size, "files": files}
    own = ", ".join(name for name in files if "/" not in name)
    notes = (f"{total / 1e6:.1f} MB: {own} and the model.", f"{out / 'README.md'} says how to use it.")
    return Report(f"{out}: {named} for {kind}", facts, notes=notes)


def write_image(folder: Path, values: Values, port: int, *, feedback: bool) -> None:
    """Write what an image is built from, but for the model."""
    folder.mkdir(exist_ok=True)
    values["port"] = str(port)
    add_package(folder, values, "serve", *(["feedback"] if feedback else []))
    fill("docker", folder, values)


def add_package(folder: Path, values: Values, *extras: str) -> None:
    """Write lmworks' wheel, and the versions of what it needs."""
    values["wheel"] = write_wheel(folder).name
    write_text(folder / "requirements.txt", "\n".join([*pin(*extras), ""]))


def check_replicas(replicas: int, most: int) -> None:
    """Raise InputError for numbers of replicas that cannot be."""
    if not 1 <= replicas <= most <= 1000:
        raise InputError("--replicas and --most do not fit together", found=f"{replicas} and {most}",
                         expected="1 <= replicas <= most <= 1000")  # fmt: skip


def check_port(port: int) -> None:
    """Raise InputError for a port that a user without rights may not open."""
    if not 1024 <= port <= 65_535:
        raise InputError("--port is out of range", found=str(port), expected="1024 to 65535")
