"""Several processes give the result of one: gradients, losses, order of the data, resume, errors."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import LABELS, VOCAB, Watched, run, sum_by_buckets
from safetensors.torch import load_file
from small import make_data, make_model
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification
from tuning_models import make_body, write_rows

from lmworks.base.launch import Launch, read_launch
from lmworks.base.threads import cpu_count
from lmworks.training.objectives import CausalLoss
from lmworks.training.parts import cut, even_shares, stretches
from lmworks.training.train_config import TrainConfig

SCRIPT = Path(__file__).with_name("distributed_run.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "LMWORKS_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
KINDS = ("causal", "classes", "tags")


def start(jobs: list[dict[str, Any]], *, ranks: int, **options: Any) -> subprocess.Popen[str]:
    """Start the script with one process, or torchrun with more."""
    command = [*(TORCHRUN if ranks > 1 else [sys.executable]), str(SCRIPT), json.dumps(jobs)]
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, **options)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end, which must be a good one; return what was said."""
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    return said


def rows(folder: Path, name: str) -> dict[int, Any]:
    """Return a number of metrics.jsonl by step."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in found if name in row}


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a classifier and a tagger, moved away from their start."""
    root = tmp_path_factory.mktemp("bodies")
    torch.manual_seed(3)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=VOCAB, max_position_embeddings=16, num_labels=LABELS, **sizes, **drop)
    for name, make in (("classes", BertForSequenceClassification), ("tags", BertForTokenClassification)):
        model = make(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(root / name)
    return {"causal": "", "classes": str(root / "classes"), "tags": str(root / "tags")}


@pytest.fixture(scope="module")
def pairs(bodies: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs of two ranks, all in one start of torchrun: even, with more parts, and with shares of 3 to 1."""
    root = tmp_path_factory.mktemp("pairs")
    jobs: list[dict[str, Any]] = [{"buckets": str(root / "buckets.safetensors")}]
    for kind in KINDS:
        jobs += [{"folder": str(root / kind), "kind": kind, "model": bodies[kind], "steps": 3, "eval_every": 3}]
        jobs += [{"folder": str(root / f"{kind}8"), "kind": kind, "model": bodies[kind], "accumulation": 8}]
    uneven = {"balance": "always", "slow": [0.004, 0.012], "steps": 12, "eval_every": 6}
    jobs += [{"folder": str(root / "uneven"), **uneven}, {"folder": str(root / "even"), **uneven, "balance": "never"}]
    finish(start(jobs, ranks=2))
    yield root


def distance(one: Path, other: Path) -> tuple[float, float]:
    """Return how far two runs' first losses, and, relatively, their first gradients are apart."""
    a, b = load_file(one / "first.safetensors"), load_file(other / "first.safetensors")
    assert set(a) == set(b)
    loss = abs(float(a.pop("loss")) - float(b.pop("loss")))
    left, right = (torch.cat([x[name].flatten() for name in sorted(x)]) for x in (a, b))
    return loss, float((left - right).norm() / right.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_ranks_change_nothing(kind: str, pairs: Path, bodies: dict[str, str], tmp_path: Path) -> None:
    """1 × 32 = 8 × 4 = 32 × 1 = two ranks, also where some rows have many more scored tokens."""
    settings = {"kind": kind, "model": bodies[kind]}
    run(str(tmp_path / "whole"), steps=3, eval_every=3, **settings)
    for parts in (8, 32):
        run(str(tmp_path / str(parts)), accumulation=parts, **settings)
    for other in (tmp_path / "8", tmp_path / "32", pairs / kind, pairs / f"{kind}8"):
        loss, gradient = distance(other, tmp_path / "whole")
        assert loss < 1e-6
        assert gradient < 1e-5
    assert rows(pairs / kind, "loss") == pytest.approx(rows(tmp_path / "whole", "loss"), abs=1e-5)
    assert rows(pairs / kind, "val_loss") == pytest.approx(rows(tmp_path / "whole", "val_loss"), abs=1e-5)


def test_parameters_without_a_gradient_on_some_rank(pairs: Path, tmp_path: Path) -> None:
    """One that no rank uses has no gradient, as in one process; a tied one counts once."""
    sum_by_buckets(str(tmp_path / "alone.safetensors"))
    alone, both = load_file(tmp_path / "alone.safetensors"), load_file(pairs / "buckets.safetensors")
    assert set(alone) == set(both) == {"0.weight", "1.weight", "1.bias"}
    for name in alone:
        torch.testing.assert_close(both[name], alone[name])


def test_rows_are_cut_by_shares_and_parts_are_dealt_in_order() -> None:
    assert even_shares(1, 1) == [1.0] and even_shares(3, 2) == [0.25] * 4 and len(even_shares(8, 2)) == 8
    assert [len(range(10)[part]) for part in cut(10, even_shares(4, 1))] == [3, 3, 2, 2]
    assert [len(range(16)[part]) for part in cut(16, [0.75, 0.25])] == [12, 4]
    assert [len(range(2)[part]) for part in cut(2, even_shares(4, 2))] == [1, 1, 0, 0]
    assert stretches(4, 2) == [[0, 1], [2, 3]] and stretches(1, 2) == [[0], []]


def test_a_launcher_is_told_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes on one machine share its processors; an incomplete environment is no launcher's."""
    assert read_launch() == Launch()
    monkeypatch.delenv("LMWORKS_THREADS", raising=False)
    before = cpu_count()
    for name, value in {"RANK": 5, "WORLD_SIZE": 6, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert read_launch() == Launch() and cpu_count() == before
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert read_launch() == Launch(5, 6, 1, 2) and cpu_count() == max(1, before // 2)


def test_one_process_imports_no_more_than_before() -> None:
    """A process alone has no group, and the loop loads no more of torch.distributed than torch itself does."""
    code = (
        "import sys, torch; before = set(sys.modules); import lmworks.training.distributed as d; d.find_ranks();"
        "print([m for m in set(sys.modules) - before if m.startswith('torch.distributed')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert said.stdout.strip() == "[]", said.stderr


def test_a_slower_rank_gets_fewer_rows_and_the_step_is_faster(pairs: Path) -> None:
    """R187: the same losses within float error, in less time."""
    shares = json.loads((pairs / "uneven" / "last.12" / "state.json").read_text())["shares"]
    assert 1.8 < shares[0] / shares[1] < 3.5
    assert json.loads((pairs / "even" / "last.12" / "state.json").read_text())["shares"] == [0.5, 0.5]
    assert rows(pairs / "uneven", "loss") == pytest.approx(rows(pairs / "even", "loss"), abs=1e-5)
    seconds = {name: rows(pairs / name, "seconds") for name in ("uneven", "even")}
    steps = {name: min(value[i] - value[i - 1] for i in range(8, 13)) for name, value in seconds.items()}
    assert steps["uneven"] < 0.8 * steps["even"]  # 8 rows of 12 ms against 16, beside whatever else the machine does


@pytest.mark.parametrize("shares", [[3.0, 1.0], [1.0, 3.0], [0.7, 0.2, 0.1], [1.0, 0.0]])
def test_uneven_shares_give_the_gradient_of_even_ones(shares: list[float], tmp_path: Path) -> None:
    """Weighted by the count of the whole batch, rows may lie anywhere."""
    found = []
    for name, wanted in (("even", [1.0]), ("uneven", shares)):
        config = TrainConfig(steps=1, lr=1e-3, dtype="fp32", compile="never", max_grad_norm=1e9)
        trainer = Watched(make_model(), objective=CausalLoss(), data=make_data(), config=config, folder=tmp_path / name)
        trainer.stream, trainer.state.shares = None, wanted
        trainer.fit()
        found.append(tmp_path / name)
    loss, gradient = distance(*found)
    assert loss < 1e-6 and gradient < 1e-5


@pytest.mark.timeout(280)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_killed_on_two_ranks_resumed_on_one_and_on_two(seed: int, tmp_path: Path) -> None:
    """2 → kill → 1 → kill → 2 ranks, with dropout: the same batches in the same order, the same losses."""
    chance = random.Random(seed)
    job = {"dropout": 0.1, "steps": 60, "eval_every": 15, "save_every": 4, "pause": 0.02, "warmup": 5}
    run(str(tmp_path / "whole"), **{**job, "pause": 0.0}, accumulation=2)
    folder = tmp_path / "killed"
    for ranks, all_of_them in ((2, False), (1, True), (2, True)):
        process = start([{"folder": str(folder), **job}], ranks=ranks)
        until = first_step(folder) + chance.randint(5, 15)
        wait_for(folder, until, process)
        pids = [int(Path(f"{folder}.{rank}.pid").read_text()) for rank in range(ranks)]
        if all_of_them:
            for pid in {process.pid, *pids}:
                os.kill(pid, signal.SIGKILL)
        else:
            os.kill(pids[chance.randrange(2)], signal.SIGKILL)
        said = process.communicate(timeout=60)[1]
        assert process.returncode != 0, said
    finish(start([{"folder": str(folder), **job}], ranks=2))
    assert rows(folder, "loss") == pytest.approx(rows(tmp_path / "whole", "loss"), abs=1e-5)
    assert rows(folder, "val_loss") == pytest.approx(rows(tmp_path / "whole", "val_loss"), abs=1e-5)
    expected = order(tmp_path / "whole", 0)
    assert len(expected) == 60
    assert order(folder, 0) == order(folder, 1) | order(folder, 0) == expected


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    """Everything is saved, told once, and the run goes on from there."""
    folder = tmp_path / "run"
    job = {"folder": str(folder), "steps": 400, "eval_every": 400, "pause": 0.01}
    process = start([job], ranks=2)
    wait_for(folder, 10, process)
    os.kill(int(Path(f"{folder}.1.pid").read_text()), signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert said.count("everything is saved") == 1, said
    last = max(rows(folder, "loss"))
    assert first_step(folder) == last < 400


def first_step(folder: Path) -> int:
    """Return the step of the newest checkpoint, 0 without one."""
    return max((int(path.suffix[1:]) for path in folder.glob("last.*")), default=0)


def wait_for(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has come so far."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if (folder / "metrics.jsonl").is_file() and max(rows(folder, "loss"), default=0) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} never came: {process.communicate(timeout=9)[1]}")


def order(folder: Path, rank: int) -> dict[int, str]:
    """Return the hash of each step's batch; a step that was made twice must have the same one."""
    found: dict[int, str] = {}
    for line in Path(f"{folder}.{rank}.order").read_text().splitlines():
        step, digest = line.split()
        assert found.setdefault(int(step), digest) == digest
    return found


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all_and_is_told_once(tmp_path: Path) -> None:
    """Exit code 2 of each process, one message, nothing left behind."""
    process = start([{"folder": str(tmp_path / "run"), "fail": 1}], ranks=2)
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert said.count("lmworks: this rank has no data") == 1
    assert said.count("Traceback") == 1  # torchrun's own
    assert said.count("exitcode  : 2") >= 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def reviews(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Film reviews, and a small BERT that knows their words."""
    root = tmp_path_factory.mktemp("reviews")
    lines = (data_folder / "sst2" / "train.tsv").read_text().splitlines()[:240]
    rows = [(text, ("bad", "good")[int(label)]) for text, label in (line.split("\t") for line in lines)]
    write_rows(root / "train.jsonl", rows)
    make_body(root / "body", (text for text, _ in rows))
    return root


def lmworks(launcher: list[str], root: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Fine-tune on the reviews by the command line."""
    words = ["finetune", str(root / "body"), str(root / "train.jsonl"), "--task", "text-classification", "-o", str(out)]
    words = [*words, "--epochs", "2", "--lr", "1e-3", "--dtype", "fp32", *more]
    return subprocess.run([*launcher, "-m", "lmworks", *words], env=ENVIRONMENT, text=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_command_line_leaves_the_same_folder(reviews: Path, tmp_path: Path) -> None:
    """The same weights, labels and files from one process with --accumulation 2, and from two; told once."""
    alone = lmworks([sys.executable], reviews, tmp_path / "alone", "--accumulation", "2")
    assert alone.returncode == 0, alone.stderr
    both = lmworks(TORCHRUN, reviews, tmp_path / "both", "--json")
    assert both.returncode == 0, both.stderr
    assert json.loads(both.stdout)["task"] == "text-classification"  # one report, though two processes
    assert names(tmp_path / "alone") == names(tmp_path / "both")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "both"))
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)
    again = lmworks(TORCHRUN, reviews, tmp_path / "both")
    assert again.stderr.count("already holds a model") == 1


def run_verb(launcher: list[str], *words: object) -> subprocess.CompletedProcess[str]:
    """Run a verb by the command line."""
    command = [*launcher, "-m", "lmworks", *map(str, words)]
    return subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=240)


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("verb", ["distill", "several tasks"])
def test_a_student_and_several_tasks_are_the_same_from_two_processes(
    verb: str, reviews: Path, data_folder: Path, tmp_path: Path
) -> None:
    """The weights and curves of one process with two parts, and of two; the teacher never leaves a trace."""
    train = reviews / "train.jsonl"
    if verb == "distill":
        made = lmworks([sys.executable], reviews, tmp_path / "teacher")
        assert made.returncode == 0, made.stderr
        words: list[object] = ["distill", tmp_path / "teacher", train, "--layers", 1, "--alpha", 0.7]
    else:
        blocks = (data_folder / "wnut17/train.conll").read_text().split("\n\n")
        (tmp_path / "names.conll").write_text("\n\n".join([one for one in blocks if "B-" in one][:40]) + "\n")
        words = ["finetune", reviews / "body", train, "--task", "text-classification"]
        words += ["--also-task", f"{tmp_path}/names.conll=token-classification=0.4", "--long", "truncate"]
    words += ["--epochs", 2, "--lr", "1e-3", "--dtype", "fp32"]
    for name, launcher, more in (("alone", [sys.executable], ["--accumulation", 2]), ("both", TORCHRUN, [])):
        done = run_verb(launcher, *words, "-o", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("training in fp32") == 1
    weights = sorted(path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("model.safetensors"))
    assert len(weights) == (1 if verb == "distill" else 2)
    assert names(tmp_path / "alone") == names(tmp_path / "both")
    for path in weights:
        a, b = (load_file(tmp_path / name / path) for name in ("alone", "both"))
        assert set(a) == set(b)
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)
    for name in ("loss", "val_loss"):
        a, b = (rows(tmp_path / out / "training", name) for out in ("alone", "both"))
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.slow
def test_a_search_under_torchrun_is_refused_once(reviews: Path, tmp_path: Path) -> None:
    """Nothing is written; the message says how searches run in several processes."""
    words = ("tune", reviews / "body", reviews / "train.jsonl", "--task", "text-classification")
    done = run_verb(TORCHRUN, *words, "--storage", tmp_path / "search.jsonl", "-o", tmp_path / "out")
    assert done.returncode != 0 and done.stderr.count("exitcode  : 2") >= 1
    assert done.stderr.count("lmworks: a search does not run under torchrun") == 1 and "--storage" in done.stderr
    assert not list(tmp_path.iterdir())


def names(folder: Path) -> list[str]:
    """Return the files below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
