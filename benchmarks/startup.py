"""Start-up: `lmworks --help` against its limit, and `import lmworks` against `from transformers import pipeline`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

ROUNDS = 7
HELP_LIMIT = 0.3  # seconds


def seconds(arguments: list[str]) -> float:
    """Return the wall time of one fresh process."""
    start = time.perf_counter()
    subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Alternate the commands and print the medians."""
    ours = [sys.executable, "-m", "lmworks", "--help"]
    script = "from lmworks import load"
    peer = [sys.executable, "-c", "from transformers import AutoModelForCausalLM, pipeline"]
    seconds(ours), seconds(peer)
    help_times, import_times, peer_times = [], [], []
    for _ in range(ROUNDS):
        help_times.append(seconds(ours))
        import_times.append(seconds([sys.executable, "-c", script]))
        peer_times.append(seconds(peer))
    shown, imported, theirs = (statistics.median(times) for times in (help_times, import_times, peer_times))
    rows = [
        {"what": "`lmworks --help` (peer: the limit)", "ours": shown, "peer": HELP_LIMIT, "unit": "s",
         "ratio": HELP_LIMIT / shown, "target": 1.0},
        {"what": "import of the loader (peer: transformers' pipeline)", "ours": imported, "peer": theirs, "unit": "s",
         "ratio": theirs / imported, "target": 8.0},
    ]  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
