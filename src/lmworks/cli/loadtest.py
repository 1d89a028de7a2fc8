"""`lmworks loadtest`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.inputs import Column
from lmworks.cli.output import Json, show


def loadtest(
    *targets: Annotated[
        str, Parameter(help="A server, such as http://127.0.0.1:8000; or model folders, to be served and compared.")
    ],
    clients: Annotated[
        int | None, Parameter(help="Clients that ask at once, 8 by default; with --rate connections at most.")
    ] = None,
    requests: Annotated[int | None, Parameter(help="Requests in all; 200 where no --duration is given.")] = None,
    rate: Annotated[
        float | None, Parameter(help="Open loop: requests a second that arrive whatever the server does.")
    ] = None,
    duration: Annotated[float | None, Parameter(help="Seconds in which requests are sent.")] = None,
    curve: Annotated[
        bool,
        Parameter(help="Double the clients (from 1) or the rate until it brings nothing; folders always.", negative=""),
    ] = False,
    data: Annotated[
        Path | None, Parameter(help="Texts: a labelled file of the task, or plain lines; none: a built-in language.")
    ] = None,
    column: Column = None,
    model: Annotated[str | None, Parameter(help="Which of the server's models; the first by default.")] = None,
    route: Annotated[str | None, Parameter(help="Such as /classify; what fits the model by default.")] = None,
    max_tokens: Annotated[int, Parameter(help="Tokens that a text may have.")] = 64,
    timeout: Annotated[float, Parameter(help="Seconds that an answer may take.")] = 120.0,
    seed: Annotated[int, Parameter(help="Of the arrivals of the open loop.")] = 0,
    allow_failed: Annotated[
        float, Parameter(help="The share of requests that may fail before the exit code is 1.")
    ] = 0.0,
    api_key_file: Annotated[Path | None, Parameter(help="A file whose first line is the key to ask with.")] = None,
    html: Annotated[Path | None, Parameter(help="Write the report with its charts to this file.")] = None,
    json: Json = False,
) -> int:
    """Load a server with requests of real texts and tell latencies, throughput and errors; 1 where requests failed.

    Folders are served one after the other and compared: response time, throughput, processor, memory, answers.
    """
    from lmworks.base.errors import InputError
    from lmworks.base.files import write_text
    from lmworks.serve.loadtest import CLIENTS, MOST_OPEN, REQUESTS, Load, read_key
    from lmworks.serve.loadtest import loadtest as run
    from lmworks.verbs.load_comparing import compare_load

    ranges = (("clients", clients, 1, 10_000), ("requests", requests, 1, 10**9), ("rate", rate, 1e-3, 1e5),
              ("duration", duration, 0.1, 1e6), ("max-tokens", max_tokens, 1, 100_000), ("timeout", timeout, 0.01, 1e5),
              ("allow-failed", allow_failed, 0, 1))  # fmt: skip
    for name, value, low, high in ranges:
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name} is out of range", found=str(value), expected=f"{low:g} to {high:g}")
    folders = bool(targets) and all(Path(target).is_dir() for target in targets)
    if not folders and len(targets) != 1:
        raise InputError("a load test takes one server, or model folders", found=", ".join(targets) or "nothing",
                         expected="http://127.0.0.1:8000, or folders that are there")  # fmt: skip
    if folders and (rate is not None or curve or model is not None or api_key_file is not None):
        raise InputError("folders are loaded by more and more clients", found="--rate, --curve, --model or a key")
    usual = MOST_OPEN if rate is not None else 1 if curve or folders else CLIENTS
    load = Load(clients=clients or usual, requests=requests or (None if duration else REQUESTS), rate=rate,
                duration=duration, timeout=timeout, seed=seed)  # fmt: skip
    if folders:
        report = compare_load(targets, load=load, route=route, data=data, column=column, max_tokens=max_tokens)
        show(report, json=json)
        if html is not None:
            write_text(html, report.to_html())
        firsts = [one["one"] for one in report.values["models"]]
        return int(any(one["failed"] > allow_failed * one["requests"] for one in firsts))
    report = run(targets[0], load=load, curve=curve, route=route, model=model, data=data, column=column,
                 max_tokens=max_tokens, key=read_key(api_key_file))  # fmt: skip
    show(report, json=json)
    if html is not None:
        write_text(html, report.to_html())
    first = report.values["curve"][0] if curve else report.values  # the later steps of a curve ask too much
    return 1 if first["failed"] > allow_failed * first["requests"] else 0
