"""`lmworks serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.output import Model


def serve(
    *models: Model,
    port: Annotated[int, Parameter(help="The port to listen on; 0: any free one.")] = 8000,
    host: Annotated[str, Parameter(help="The address to listen on; loopback by default.")] = "127.0.0.1",
    api_key_file: Annotated[
        Path | None, Parameter(help="A file of keys, one a line; every route but /health then needs one.")
    ] = None,
    rate: Annotated[float | None, Parameter(help="Requests a second of each key, or of each address without.")] = None,
    queue: Annotated[int, Parameter(help="Requests that may wait; more are told to come back (429).")] = 256,
    timeout: Annotated[float, Parameter(help="Seconds that a request may take (504 beyond).")] = 120.0,
    grace: Annotated[float, Parameter(help="Seconds that requests have to end when the server is told to.")] = 30.0,
    slots: Annotated[int, Parameter(help="Texts that a model writes at the same time.")] = 8,
    threads: Annotated[
        int | None, Parameter(help="Processor threads; all that the process may use by default.")
    ] = None,
    dtype: Annotated[str, Parameter(help="Which of the exported graphs: fp32, int8 …; auto: the most exact.")] = "auto",
    when_unsure: Annotated[
        str, Parameter(help="What a monitored model does with strange inputs: flag, abstain, or fallback=NAME.")
    ] = "flag",
    drift_window: Annotated[int, Parameter(help="Requests that are compared with the monitor's reference.")] = 200,
    drift_log: Annotated[Path | None, Parameter(help="A file that gets a line of JSON for each comparison.")] = None,
    alert_url: Annotated[
        str | None, Parameter(help="Told of drift by POST; on this machine or in a private network only.")
    ] = None,
    telemetry: Annotated[
        str | None,
        Parameter(help="An OTLP/HTTP collector of spans; else OTEL_EXPORTER_OTLP_ENDPOINT. No text is sent."),
    ] = None,
    feedback: Annotated[
        str | None,
        Parameter(help="Keep texts, answers and POST /feedback in FILE or postgresql://…; none: no text is kept."),
    ] = None,
    challengers: Annotated[
        Path | None, Parameter(help="A folder of folders, one of which `lmworks challenge` may put in a model's place.")
    ] = None,
    admin_key_file: Annotated[Path | None, Parameter(help="The keys, one a line, of who may do so.")] = None,
    lazy: Annotated[bool, Parameter(help="Load a model when it is first asked for.", negative="")] = False,
) -> int:
    """Serve model folders: every task, OpenAI's interface, metrics, and the page of the first."""
    from lmworks.base.errors import InputError
    from lmworks.serve.app import make_app
    from lmworks.serve.app import serve as run
    from lmworks.serve.guard import read_keys
    from lmworks.serve.monitor import Watching
    from lmworks.serve.monitor_alerts import read_target
    from lmworks.serve.service import describe
    from lmworks.serve.telemetry import open_exporter

    ranges = (("rate", rate, 0.001, 1e6), ("queue", queue, 1, 100_000), ("timeout", timeout, 0.1, 86_400),
              ("grace", grace, 0, 3600), ("slots", slots, 1, 256), ("threads", threads, 1, 1024),
              ("drift-window", drift_window, 20, 10_000))  # fmt: skip
    for name, value, low, high in ranges:
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name} is out of range", found=str(value), expected=f"{low} to {high}")
    if not models:
        raise InputError("there is no model to serve", fix="lmworks serve FOLDER")
    if drift_log is not None and not drift_log.parent.is_dir():
        raise InputError("there is no such folder for the log", found=str(drift_log), fix="make it, or check the path")
    if drift_log is not None and drift_log.is_dir():
        raise InputError("the log is a folder", found=str(drift_log), expected="a file", fix=f"{drift_log}/drift.jsonl")
    specs = [describe(model, slots=slots, threads=threads, dtype=dtype, warm=not lazy) for model in models]
    keys = None if api_key_file is None else read_keys(api_key_file)
    alert = None if alert_url is None else read_target(alert_url)
    watching = Watching(when_unsure, alert, drift_log, drift_window)
    app = make_app(specs, keys=keys, rate=rate, most=queue, seconds=timeout, watching=watching,
                   exporter=open_exporter(telemetry), feedback=feedback, challengers=challengers,
                   admin=None if admin_key_file is None else read_keys(admin_key_file))  # fmt: skip
    run(app, host=host, port=port, grace=grace)
    return 0
