"""A folder that a container engine, a cluster or a cloud's functions take: a model, what runs it, how to use it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from lmworks import __version__
from lmworks.base.errors import InputError
from lmworks.base.files import check_output, new_folder, write_text
from lmworks.base.hub import find_folder
from lmworks.base.report import Report
from lmworks.deploy.folder import fill, name_of, put_model
from lmworks.deploy.wheel import pin, write_wheel
from lmworks.export.receipt import write_receipt

MIB = 2**20
SECRET = "api-keys"  # the volume of --secret, and where its file `keys` is mounted
Values = dict[str, str]


def deploy_docker(
    model: str | Path, out: str | Path, *, dtype: str = "auto", name: str | None = None, port: int = 8000,
    overwrite: bool = False,
) -> Report:  # fmt: skip
    """Write the build folder of an image that serves a model, without torch, as a user without rights.

    `out` gets Dockerfile, compose.yaml, requirements.txt with the versions installed here, lmworks' own wheel, and the
    model. Raises InputError for a model without graphs where torch is not installed, a port or name out of bounds.
    """
    check_port(port)
    return write("docker", model, out, dtype, name, overwrite, lambda folder, values: write_image(folder, values, port))


def deploy_kubernetes(
    model: str | Path, out: str | Path, *, dtype: str = "auto", name: str | None = None, image: str | None = None,
    namespace: str = "models", replicas: int = 2, most: int = 10, cpus: int = 2, port: int = 8000,
    secret: str | None = None, overwrite: bool = False,
) -> Report:  # fmt: skip
    """Write manifests for Kustomize, and in `image/` what the image is built from.

    `replicas` to `most` pods of `cpus` processors each; `secret` names a Secret whose `keys` holds API keys.
    """
    check_port(port)
    if not 1 <= replicas <= most <= 1000:
        raise InputError("--replicas and --most do not fit together", found=f"{replicas} and {most}",
                         expected="1 <= replicas <= most <= 1000")  # fmt: skip
    if not 1 <= cpus <= 256:
        raise InputError("--cpus is out of range", found=str(cpus), expected="1 to 256")
    for option, given in (("--namespace", namespace), ("--secret", secret)):
        if given is not None and name_of(Path(), given) != given:
            raise InputError(f"{option} is no name")

    def manifests(folder: Path, values: Values) -> None:
        if image is not None:
            values["image"] = image
        keys = () if secret is None else ("--api-key-file", f"/run/secrets/{SECRET}/keys")
        mount = f"            - {{name: {SECRET}, mountPath: /run/secrets/{SECRET}, readOnly: true}}\n"
        volume = f"        - name: {SECRET}\n          secret: {{secretName: {secret}, defaultMode: 0444}}\n"
        values |= {
            "namespace": namespace, "replicas": str(replicas), "most": str(most), "cpus": str(cpus),
            "arguments": ", ".join(json.dumps(word) for word in keys), "mounts": mount if secret else "",
            "volumes": volume.rstrip("\n") if secret else "",
        }  # fmt: skip
        write_image(folder / "image", values, port)
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
    files = sorted(receipt["files"])
    total = sum(entry["bytes"] for entry in receipt["files"].values())
    facts = {"out": str(out), "kind": kind, "name": named, "bytes": total, "model_bytes": size, "files": files}
    own = ", ".join(name for name in files if "/" not in name)
    notes = (f"{total / 1e6:.1f} MB: {own} and the model.", f"{out / 'README.md'} says how to use it.")
    return Report(f"{out}: {named} for {kind}", facts, notes=notes)


def write_image(folder: Path, values: Values, port: int) -> None:
    """Write what an image is built from, but for the model."""
    folder.mkdir(exist_ok=True)
    values["port"] = str(port)
    add_package(folder, values, "serve")
    fill("docker", folder, values)


def add_package(folder: Path, values: Values, *extras: str) -> None:
    """Write lmworks' wheel, and the versions of what it needs."""
    values["wheel"] = write_wheel(folder).name
    write_text(folder / "requirements.txt", "\n".join([*pin(*extras), ""]))


def check_port(port: int) -> None:
    """Raise InputError for a port that a user without rights may not open."""
    if not 1024 <= port <= 65_535:
        raise InputError("--port is out of range", found=str(port), expected="1024 to 65535")
