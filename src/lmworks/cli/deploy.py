"""`lmworks deploy docker|kubernetes|serverless|ray` and `lmworks pack`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.output import Json, Model, Out, Overwrite, show

Dtype = Annotated[str, Parameter(help="Which of the graphs: fp32, int8 …; auto: all of them, the most exact answers.")]
Name = Annotated[str | None, Parameter(help="The service's name; by default made of the folder's.")]
Port = Annotated[int, Parameter(help="The port inside the container.")]


def docker(
    model: Model, /, *, out: Out, dtype: Dtype = "auto", name: Name = None, port: Port = 8000,
    feedback: Annotated[bool, Parameter(help="Keep feedback in a folder beside compose.yaml.", negative="")] = False,
    overwrite: Overwrite = False, json: Json = False,
) -> int:  # fmt: skip
    """Write what an image is built from: torch-free, without rights, on a read-only root."""
    from lmworks.verbs.deploying import deploy_docker

    report = deploy_docker(model, out, dtype=dtype, name=name, port=port, feedback=feedback, overwrite=overwrite)
    return show(report, json=json)


def kubernetes(
    model: Model, /, *, out: Out, dtype: Dtype = "auto", name: Name = None,
    image: Annotated[str | None, Parameter(help="The image's full name, as REGISTRY/NAME:TAG.")] = None,
    namespace: Annotated[str, Parameter(help="The namespace that everything goes to.")] = "models",
    replicas: Annotated[int, Parameter(help="Pods that there are at least.")] = 2,
    most: Annotated[int, Parameter(help="Pods that there may be.")] = 10,
    cpus: Annotated[int, Parameter(help="Processors that a pod may use.")] = 2,
    port: Port = 8000,
    queue: Annotated[
        bool, Parameter(help="Scale by the queue too, for which the cluster needs Prometheus' adapter.", negative="")
    ] = False,
    secret: Annotated[
        str | None, Parameter(help="A Secret: `keys` holds API keys, one a line, `metrics` that of Prometheus.")
    ] = None,
    feedback: Annotated[
        str | None, Parameter(help="A Secret whose `url` and `password` are those of a PostgreSQL for feedback.")
    ] = None,
    overwrite: Overwrite = False, json: Json = False,
) -> int:  # fmt: skip
    """Write manifests for Kustomize: probes, autoscaling, budgets, network policy, monitoring."""
    from lmworks.verbs.deploying import deploy_kubernetes

    report = deploy_kubernetes(
        model, out, dtype=dtype, name=name, image=image, namespace=namespace, replicas=replicas, most=most, cpus=cpus,
        port=port, secret=secret, feedback=feedback, queue=queue, overwrite=overwrite,
    )  # fmt: skip
    return show(report, json=json)


def serverless(
    model: Model, /, *, out: Out, dtype: Dtype = "auto", name: Name = None, overwrite: Overwrite = False,
    json: Json = False,
) -> int:  # fmt: skip
    """Write a function of an event, for AWS Lambda and what takes its images."""
    from lmworks.verbs.deploying import deploy_serverless

    return show(deploy_serverless(model, out, dtype=dtype, name=name, overwrite=overwrite), json=json)


def ray(
    model: Model, /, *, out: Out, dtype: Dtype = "auto", name: Name = None,
    replicas: Annotated[int, Parameter(help="Replicas that there are at least.")] = 1,
    most: Annotated[int, Parameter(help="Replicas that there may be.")] = 10,
    port: Port = 8000, overwrite: Overwrite = False, json: Json = False,
) -> int:  # fmt: skip
    """Write a Ray Serve application: replicas of one processor each, more of them as more is asked."""
    from lmworks.verbs.deploying import deploy_ray

    report = deploy_ray(
        model, out, dtype=dtype, name=name, replicas=replicas, most=most, port=port, overwrite=overwrite
    )  # fmt: skip
    return show(report, json=json)


def pack(
    model: Model, /, *, out: Out, dtype: Dtype = "auto", name: Name = None,
    machine: Annotated[str | None, Parameter(help="x86_64 or aarch64; that of this machine by default.")] = None,
    python: Annotated[str | None, Parameter(help="The other machine's Python, as 3.12; this one by default.")] = None,
    port: Port = 8000, overwrite: Overwrite = False, json: Json = False,
) -> int:  # fmt: skip
    """Write a bundle for a machine without a network: the model, all wheels, their sums, and a script."""
    from lmworks.verbs.packing import pack as run

    report = run(model, out, dtype=dtype, name=name, machine=machine, python=python, port=port, overwrite=overwrite)
    return show(report, json=json)
