"""Time and memory of n-gram models beside KenLM and NLTK, in turns; and what counting costs at scale.

    python benchmarks/ngram.py OUT.json [--rounds 3] [--tokens 2000000] [--order 5] [--kenlm FOLDER]

LMWORKS_DATA names the data. FOLDER holds KenLM's `lmplz` and `query` (build them from the source that its PyPI package
carries). Each way trains on WikiText-2's validation text and scores its test text, in a process of its own, whose
processor seconds and largest resident memory count; lmworks reads text and writes all its files, KenLM its ARPA file.
NLTK counts and scores the first LINES lines only, and lmworks the same beside it. The scale part counts a stream of
random tokens of Zipf's law: tokens a second, and bytes of memory a token.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lmworks.base.files import write_json

LINES, TRIALS = 400, 3
NLTK = """
import sys
from nltk.lm import KneserNeyInterpolated
from nltk.lm.preprocessing import padded_everygram_pipeline
rows = [line.split() for line in open(sys.argv[1]) if line.strip()]
held = [line.split() for line in open(sys.argv[2]) if line.strip()]
grams, words = padded_everygram_pipeline(3, rows)
model = KneserNeyInterpolated(3)
model.fit(grams, words)
for row in held[:3]:
    row = ["<s>", "<s>", *row, "</s>"]
    for i in range(2, len(row)):
        model.score(row[i], row[i - 2 : i])
"""
OURS = """
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from lmworks.verbs import ngrams
with TemporaryDirectory() as folder:
    ngrams.train(sys.argv[1], Path(folder) / "m", order=int(sys.argv[3]), smoothing=sys.argv[4])
    print(ngrams.evaluate(Path(folder) / "m", sys.argv[2]).values["perplexity_with_blank_lines"])
"""
SCALE = """
import resource, sys, time
import numpy as np
from lmworks.models.ngram_counts import count_ngrams
from lmworks.models.ngram_smoothing import fit
N, order, V = int(sys.argv[1]), int(sys.argv[2]), 50_000
rng = np.random.default_rng(0)
stream = np.minimum(rng.zipf(1.2, N), V - 1).astype(np.int32)
stream[::25] = 0
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
counts = count_ngrams(stream, order, V, 0)
counted = time.process_time() - start
fit(counts, "modified-kneser-ney", None)
whole, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(counted, whole, (peak - before) * 1024 / N, sum(len(t.keys) for t in counts.tallies))
"""


def measure(command: list[Any], **options: Any) -> dict[str, Any]:
    """Run a process; return its processor and wall seconds, its largest memory in MB, and what it wrote."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    line = ["/usr/bin/env", "python3", "-c", WRAP, *map(str, command)]
    done = subprocess.run(line, check=True, text=True, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = int(done.stderr.rpartition("peak ")[2].split()[0]) / 1024
    return {"seconds": used, "wall": time.perf_counter() - start, "mb": peak, "said": done.stdout}


WRAP = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(done.returncode)
"""


def in_turns(ways: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Measure every way once a round; return the median of its seconds and of its memory."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in ("seconds", "wall", "mb")}
        | {"said": rows[-1].get("perplexity", rows[-1]["said"].strip()[-40:])}
        for name, rows in found.items()
    }


def kenlm(folder: Path, train: Path, test: Path, order: int, work: Path) -> dict[str, Any]:
    """Estimate and query with KenLM; return both together."""
    arpa = work / "theirs.arpa"
    options = ["-o", order, "--skip_symbols", "--discount_fallback", "-S", "1G", "-T", work, "--text", train]
    built = measure([folder / "lmplz", *options, "--arpa", arpa])
    with test.open() as source:
        asked = measure([folder / "query", "-v", "summary", arpa], stdin=source)
    value = asked["said"].split("including OOVs:")[1].split()[0]
    return {"seconds": built["seconds"] + asked["seconds"], "wall": built["wall"] + asked["wall"],
            "mb": max(built["mb"], asked["mb"]), "said": "", "perplexity": value}  # fmt: skip


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    for name, value in (("rounds", TRIALS), ("tokens", 2_000_000), ("order", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--kenlm", type=Path)
    args = parser.parse_args()
    data = Path(os.environ["LMWORKS_DATA"]) / "wikitext-2"
    results: dict[str, Any] = {"order": args.order, "rounds": args.rounds}
    with TemporaryDirectory() as place:
        work = Path(place)
        small = work / "small.txt"
        small.write_text("\n".join((data / "valid.txt").read_text("utf-8").splitlines()[:LINES]) + "\n")
        script = [sys.executable, "-c", OURS]
        ways: dict[str, Any] = {
            "lmworks": lambda: measure(
                [*script, data / "valid.txt", data / "test.txt", args.order, "modified-kneser-ney"]
            )
        }
        if args.kenlm:
            folder = args.kenlm
            ways["kenlm"] = lambda: kenlm(folder, data / "valid.txt", data / "test.txt", args.order, work)
        results["wikitext-2"] = in_turns(ways, args.rounds)
        ways = {
            "lmworks, 400 lines, order 3": lambda: measure([*script, small, small, 3, "kneser-ney"]),
            "nltk, 400 lines, order 3, 3 of them scored": lambda: measure([sys.executable, "-c", NLTK, small, small]),
        }
        results["nltk"] = in_turns(ways, args.rounds)
    counted, whole, memory, grams = measure([sys.executable, "-c", SCALE, args.tokens, args.order])["said"].split()
    results["scale"] = {
        "tokens": args.tokens, "ngrams": int(grams), "tokens_per_second_counting": args.tokens / float(counted),
        "tokens_per_second_with_smoothing": args.tokens / float(whole), "bytes_per_token": float(memory),
    }  # fmt: skip
    write_json(args.out, results)
    sys.stdout.write(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
