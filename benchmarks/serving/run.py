"""Our server beside peers on the same model, loaded by `lmworks loadtest` in turn; writes results.json and RESULTS.md.

    python benchmarks/serving/run.py --prepare transformers infinity llama_cpp     environments of their own
    LMWORKS_DATA=… python benchmarks/serving/run.py [--only TEXT] [--rounds 5] [--requests 200] [--tiny]

The servers of a race are started together and asked one at a time; peers that wait are stopped, as some go on spinning.
A server counts once its answers are near ours. Figures are medians over the rounds, a ratio is the median of the ratios
within a round. The client and the server share the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import contestants
import httpx
import numpy as np
from contestants import PEERS, Contestant, last_error

from lmworks.base.errors import LmworksError
from lmworks.serve.loadtest import Load, loadtest

HERE = Path(__file__).parent
PROBES = ("a fine film, a joy to watch", "it was dull and never ended", "the bank raised its rates by a quarter")
PROMPT = "vide tu bigigu fa lu"
START = 240.0  # seconds that a server may take to begin


@dataclass(frozen=True)
class Race:
    """One thing that servers do."""

    name: str
    route: str
    make: Callable[[bool], list[Contestant]]
    clients: tuple[int, ...]
    unit: str  # of the figures: a key of the load test's report
    share: float = 1.0  # of the requests: texts take longer than labels


RACES = (
    Race("MiniLM, embeddings of a review", "/v1/embeddings", contestants.embedders, (1, 8, 32), "requests_per_second"),
    Race("MiniLM, the label of a review", "/classify", contestants.classifiers, (1, 8, 32), "requests_per_second"),
    Race("Llama of 12 × 768, texts of 64 tokens", "/v1/completions", contestants.writers, (1, 8), "tokens_per_second",
         0.2),
)  # fmt: skip


def main() -> int:
    """Run the races that are named; results are written after each, beside those of earlier runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", nargs="+", metavar="NAME", help="only install these peers")
    parser.add_argument("--only", action="append", default=[], help="races whose name has this text")
    parser.add_argument("--without", action="append", default=[], help="leave out servers whose name has this text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=200, help="of each measurement")
    parser.add_argument("--tiny", action="store_true", help="a tiny writer: does it run at all?")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and RESULTS.md")
    a = parser.parse_args()
    if a.prepare:
        return sum(not contestants.prepare(name) for name in a.prepare)
    if not os.environ.get("LMWORKS_DATA"):
        raise SystemExit("LMWORKS_DATA must name the folder of real data")
    data = Path(os.environ["LMWORKS_DATA"]) / "sst2" / "dev.tsv"
    reviews = write_reviews(data)
    contestants.make_models(data, tiny=a.tiny)
    path = a.out / "results.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for race in RACES:
        if all(text in race.name for text in a.only):
            everybody = [one for one in race.make(a.tiny) if not any(text in one.name for text in a.without)]
            known |= measure(race, everybody, a, reviews)
            path.write_text(json.dumps(known, indent=1) + "\n")
            write_table(known, a.out / "RESULTS.md")
    return 0


def write_reviews(data: Path) -> Path:
    """Write the reviews without their labels, one a line."""
    PEERS.mkdir(parents=True, exist_ok=True)
    lines = data.read_text("utf-8").splitlines()
    path = PEERS / "reviews.txt"
    path.write_text("\n".join(line.rsplit("\t", 1)[0] for line in lines) + "\n")
    return path


def measure(race: Race, everybody: Sequence[Contestant], a: argparse.Namespace, reviews: Path) -> dict[str, Any]:
    """Start all, see that they answer alike, and let them take turns; return a table for each number of clients."""
    problems: dict[str, str] = {one.name: one.missing for one in everybody if one.missing}
    loads = [os.getloadavg()[0]]
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        nearness: dict[str, str] = {}
        reference: Any = None
        for one in everybody:
            if one.name in problems:
                continue
            try:
                server = stack.enter_context(serving(one, a.threads, PEERS / "logs" / f"{race.name} {one.name}.log"))
                with server.asked():
                    answers = ask(server.base, race.route, one)
            except (RuntimeError, httpx.HTTPError) as error:
                problems[one.name] = first_line(error)
                continue
            reference = answers if reference is None else reference
            nearness[one.name] = compare(race.route, answers, reference)
            servers[one.name] = server
        tables = {}
        data = None if race.route == "/v1/completions" else reviews
        for clients in race.clients:
            figures: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
            count = max(clients, round(a.requests * race.share))
            for turn in range(a.rounds + 1):  # the first warms everybody up
                for one in everybody:
                    if one.name in servers and one.name not in problems:
                        load = Load(clients=clients, requests=count)
                        server = servers[one.name]
                        try:
                            with server.asked():
                                found = loadtest(server.base, load=load, route=race.route, model=one.asked, data=data)
                        except LmworksError as error:
                            problems[one.name] = first_line(error)
                            continue
                        if not found.values["succeeded"]:
                            problems[one.name] = f"no request succeeded: {found.values['errors']}"
                            figures[one.name] = []
                        elif turn:
                            figures[one.name].append(found.values)
            rows = [row(one.name, figures.get(one.name, []), figures, everybody, race.unit) for one in everybody]
            for line in rows:
                line |= {"problem": problems.get(line["who"]), "near": nearness.get(line["who"])}
            name = f"{race.name}, {clients} client{'s' * (clients > 1)}"
            tables[name] = {"date": date.today().isoformat(), "loads": [*loads, os.getloadavg()[0]], "unit": race.unit,
                            "rounds": a.rounds, "requests": count, "threads": a.threads, "rows": rows}  # fmt: skip
            print(name, *(show(line) for line in rows), sep="\n  ", flush=True)
    return tables


def first_line(error: Exception) -> str:
    """Return what an error says, in one line of a table."""
    return " ".join(f"{error}".split()).replace("|", "/")[:300] or type(error).__name__


@dataclass(frozen=True)
class Server:
    """A running server. A peer is stopped unless it is asked; ours takes a stopped engine for a dead one, and waits."""

    base: str
    process: subprocess.Popen[bytes]
    is_peer: bool

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Let it run; stop it afterwards."""
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to a peer."""
        if self.is_peer:
            self.process.send_signal(number)


@contextmanager
def serving(one: Contestant, threads: int, log: Path) -> Iterator[Server]:
    """Yield a running server; raise RuntimeError where it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [part.format(model=one.model, port=port, threads=threads) for part in one.command]
    log.parent.mkdir(parents=True, exist_ok=True)
    cache = PEERS / "hub"  # some look into it, though nothing is in it
    cache.mkdir(exist_ok=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": str(threads)}
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, **offline, **one.settings})
    try:
        until = time.monotonic() + START
        while True:
            with socket.socket() as door:
                if door.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > until:
                ended = "took too long" if process.poll() is None else f"exit code {process.returncode}"
                raise RuntimeError(f"did not start ({ended}): {last_error(log)}")
            time.sleep(0.2)
        yield Server(f"http://127.0.0.1:{port}", process, one.environment is not None)
    finally:
        process.terminate()
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(base: str, route: str, one: Contestant) -> Any:
    """Return a server's answers to the probes, once it gives any."""
    named = {} if one.asked is None else {"model": one.asked}
    if route == "/v1/completions":
        bodies = [{"prompt": PROMPT, "max_tokens": 48, "temperature": 0.0, **named}]
    else:
        bodies = [{"input" if route == "/v1/embeddings" else "text": text, **named} for text in PROBES]
    until = time.monotonic() + START
    while True:
        found = [httpx.post(base + route, json=body, timeout=START) for body in bodies]
        bad = next((answer for answer in found if answer.status_code != 200), None)
        if bad is None:
            return [read(route, answer.json()) for answer in found]
        if bad.status_code != 503 or time.monotonic() > until:
            raise RuntimeError(f"{bad.status_code}: {bad.text[:100]}")
        time.sleep(0.5)


def read(route: str, answer: Any) -> Any:
    """Return what counts in an answer."""
    if route == "/v1/embeddings":
        return answer["data"][0]["embedding"]
    if route == "/classify":
        return [answer["answers"][0]["label"], answer["answers"][0]["score"]]
    return answer["choices"][0]["text"]


def compare(route: str, answers: Any, reference: Any) -> str:
    """Return how near the answers are to ours; raise RuntimeError where they are others."""
    if route == "/v1/embeddings":
        least = float(min(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
                          for a, b in zip(answers, reference, strict=True)))  # fmt: skip
        return f"cosine {least:.6f}"
    if route == "/classify":
        most = max(abs(a[1] - b[1]) if a[0] == b[0] else 1.0 for a, b in zip(answers, reference, strict=True))
        return f"scores within {most:.0e}"
    same = next((i for i, (a, b) in enumerate(zip(answers[0], reference[0], strict=False)) if a != b), None)
    return "the same text" if same is None else f"the same first {same} characters of {len(reference[0])}"


def row(
    name: str, found: list[dict[str, Any]], figures: dict[str, list[dict[str, Any]]], everybody: Sequence[Contestant],
    unit: str,
) -> dict[str, Any]:  # fmt: skip
    """Return the medians of a server, and the ratio of ours of like precision to it."""
    line: dict[str, Any] = {"who": name}
    if not found:
        return line
    line |= {"figures": [one[unit] for one in found], "failed": sum(one["failed"] for one in found)}
    for key in ("latency", "first_token"):
        if found[0][key] is not None:
            line[key] = {p: statistics.median(one[key][p] for one in found) for p in ("p50", "p99")}
    rival = figures.get(ours_for(name, everybody)) or []
    if not name.startswith("lmworks") and len(rival) == len(found):
        ratios = sorted(mine[unit] / one[unit] for mine, one in zip(rival, found, strict=True))
        line |= {"ratio": statistics.median(ratios), "ratios": [ratios[0], ratios[-1]]}
    return line


def ours_for(name: str, everybody: Sequence[Contestant]) -> str:
    """Return which of ours a peer is held against: the one of its precision."""
    precision = {"Q8_0": "int8", "Q4_0": "q4"}.get(name.rpartition(" ")[2], "fp32")
    ours = [one.name for one in everybody if one.name.startswith("lmworks")]
    return next((one for one in ours if one.endswith(precision)), ours[0] if ours else "")


def show(line: dict[str, Any]) -> str:
    """Return a row in one line."""
    if "figures" not in line:
        return f"{line['who']}: {line['problem']}"
    ratio = f", ours is {line['ratio']:.2f}x" if "ratio" in line else ""
    latency = f"p50 {1000 * line['latency']['p50']:.1f} ms, p99 {1000 * line['latency']['p99']:.1f} ms"
    return f"{line['who']}: {statistics.median(line['figures']):.4g} ({latency}){ratio}; {line['near']}"


def write_table(known: dict[str, Any], path: Path) -> None:
    """Write every table, the median with the slowest and fastest round."""
    lines = [
        "# Our server beside peers", "",
        "Written by `benchmarks/serving/run.py`; every server is loaded by `lmworks loadtest`, a closed loop, in turn. "
        "*ours ÷ it* is the median of the ratios within a round: above 1, ours is faster. Latencies are medians over "
        f"the rounds. Machine: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, which the client "
        "shares.",
    ]  # fmt: skip
    for name, table in known.items():
        lines += ["", f"## {name}", "",
                  f"{table['date']}, {table['rounds']} rounds of {table['requests']} requests, "
                  f"{table['threads']} threads, load {table['loads'][0]:.1f} to {table['loads'][-1]:.1f}", "",
                  f"| | {table['unit'].replace('_per_second', ' a second')} | p50 ms | p99 ms | first token p50 ms | "
                  "ours ÷ it | answers |", "|--|--|--|--|--|--|--|"]  # fmt: skip
        lines += [line(one) for one in table["rows"]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def line(one: dict[str, Any]) -> str:
    """Return a row of a table."""
    who = f"**{one['who']}**" if one["who"].startswith("lmworks") else one["who"]
    if "figures" not in one:
        return f"| {who} | {one['problem']} | | | | | |"
    spread = f"{statistics.median(one['figures']):.4g} ({min(one['figures']):.4g} to {max(one['figures']):.4g})"
    times = " | ".join(f"{1000 * one['latency'][p]:.1f}" for p in ("p50", "p99"))
    first = f"{1000 * one['first_token']['p50']:.1f}" if "first_token" in one else ""
    ratio = f"{one['ratio']:.2f}× ({one['ratios'][0]:.2f} to {one['ratios'][1]:.2f})" if "ratio" in one else ""
    return f"| {who} | {spread} | {times} | {first} | {ratio} | {one['near']} |"


if __name__ == "__main__":
    sys.exit(main())
