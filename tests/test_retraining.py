"""The whole way back: drift, feedback, training, a challenger that wins and takes over."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest

from lmworks.base.errors import FormatError, InputError, Interrupted
from lmworks.base.files import read_json
from lmworks.cli import main
from lmworks.evaluation.monitor import read_monitor
from lmworks.export.onnx_folder import export_graphs
from lmworks.export.receipt import check_receipt
from lmworks.serve.feedback import ANSWERS, FEEDBACK, Store, make_answer, set_state
from lmworks.serve.guard import digest
from lmworks.serve.monitor import Watching
from lmworks.verbs.finetuning import evaluate_task, finetune
from lmworks.verbs.monitoring import fit_monitor
from lmworks.verbs.retraining import retrain
from lmworks.verbs.retraining_trigger import (
    Rule,
    State,
    read_state,
    write_state,
)

sys.path.insert(0, str(Path(__file__).with_name("serve")))
from monitored import TOPICS, make_news_classifier, news, write_table
from serving import Running, server

ADMIN = "the-key-of-the-admin"
NEW = "Sci/Tech"  # the topic that comes up


@pytest.fixture(scope="module")
def place(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that never says one topic, its graph with a monitor, and news of before and after."""
    found = tmp_path_factory.mktemp("retrained")
    make_news_classifier(data_folder, found / "weights")
    weights = load_file(found / "weights/model.safetensors")
    weights["classifier.bias"][3] -= 20
    save_file(weights, found / "weights/model.safetensors", {"format": "pt"})
    export_graphs(found / "weights", found / "news", dtypes=("fp32",))
    rows = [row for row in news(data_folder) if len(row[0]) < 200]  # no text is longer than the model
    old, new = ([row for row in rows if (row[1] == NEW) is is_new] for is_new in (False, True))
    parts = {"train": old[:600], "held_old": old[600:1000], "old": old[1000:1400]}
    parts |= {"new": new[:400], "held": [*new[400:600], *old[1400:1600], *new[:5]]}
    for name, part in parts.items():
        write_table(found / f"{name}.csv", part)
    fit_monitor(found / "news", found / "train.csv", validation=found / "held_old.csv")
    (found / "admin.txt").write_text(ADMIN)
    return found


def read(path: Path) -> list[tuple[str, str]]:
    """Return texts and labels."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def served(place: Path) -> Iterator[Running]:
    """The classifier, at work."""
    (place / "pool").mkdir()
    with server(place / "news", challengers=place / "pool", admin=[digest(ADMIN)], feedback=place / "feedback.db",
                watching=Watching(window=100)) as one:  # fmt: skip
        yield one


def ask(one: Running, rows: list[tuple[str, str]], *, tell: bool = False) -> float:
    """Ask, say what would have been right, and return the accuracy."""
    right = 0
    for i in range(0, len(rows), 25):
        part = rows[i : i + 25]
        answer = one.post("/classify", {"text": [text for text, _ in part]})
        assert answer.status_code == 200
        for found, (_, label) in zip(answer.json()["answers"], part, strict=True):
            right += found["label"] == label
            if tell:
                assert one.post("/feedback", {"id": found["id"], "label": label}).status_code == 201
    return right / len(rows)


def drift(one: Running, requests: int) -> dict[str, Any]:
    """Return what /drift says once so many requests were compared."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = httpx.get(f"{one.base}/drift").json()["models"]["news"]
        if found["comparisons"] and found["comparisons"][-1]["requests"] >= requests:
            return dict(found)
        time.sleep(0.02)
    raise AssertionError("never compared")


def test_from_a_new_topic_to_a_new_model(
    place: Path, served: Running, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    old, new, db = read(place / "old.csv"), read(place / "new.csv"), str(place / "feedback.db")
    words = ["retrain", served.base, str(place / "weights"), str(place / "train.csv"), "--feedback", db, "--json",
             "--held-out", str(place / "held.csv"), "--checks", "2", "--least", "80", "--epochs", "3",
             "--lr", "3e-3"]  # fmt: skip

    def check(name: str = "better") -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main([*words, "-o", str(place / "pool" / name)])
        shown = capsys.readouterr()
        assert code != 2, shown.err
        return code, json.loads(shown.out)

    before = ask(served, old[:200])
    assert not drift(served, 200)["drift"]
    code, said = check()
    assert (code, said["verdict"], said["trigger"]["bad"]) == (3, "normal", 0)

    during = ask(served, new[:150], tell=True)
    assert during < before - 0.2
    assert drift(served, 350)["drift"], "the window is full of the new topic"
    assert main(["feedback", "review", db, "--accept", "all"]) == 0
    assert [check()[1]["verdict"] for _ in range(3)] == ["watching"] * 3, "the same window is no new evidence"
    ask(served, new[150:250])
    drift(served, 450)
    assert not (place / "pool/better").exists()
    code, said = check()
    assert (code, said["verdict"], said["won"]) == (0, "fire", True), said
    assert said["challenger"] > said["champion"] + 0.1 and said["difference"]["p"] < 1e-4
    assert (said["held_out"], said["left_out"]) == (400, 5), "what was learnt judges nobody"
    assert binomtest(said["difference"]["only_this_right"], said["difference"]["only_this_right"]
                     + said["difference"]["only_the_first_right"]).pvalue == pytest.approx(
                         said["difference"]["p_mcnemar"])  # fmt: skip
    assert check("more")[1]["verdict"] == "holding" and not (place / "pool/more").exists()
    assert not list((place / "pool").glob(".*")), "what the run needed is gone"
    better = place / "pool/better"
    assert check_receipt(better)["passed"] and read_monitor(better) is not None
    assert read_json(better / "retraining.json")["won"] is True
    kept = evaluate_task(better, place / "held.csv").values["accuracy"]
    assert kept == pytest.approx(said["challenger"], abs=0.02)

    admin = ["challenge", served.base, "--admin-key-file", str(place / "admin.txt")]
    assert main([*admin, "gone"]) == 2 and main([*admin, "--switch"]) == 2 and main([*admin, "--switch", "--stop"]) == 2
    assert main([*admin, "better", "--switch"]) == 2
    assert main([*admin, "better", "--share", "1"]) == 0
    for text in new[200:220]:
        ask(served, [text])
    assert main(admin) == 0
    shown = capsys.readouterr().out
    assert "shadow" in shown and "they agree on" in shown
    assert main([*admin, "--switch"]) == 0
    ask(served, [row for pair in zip(new[220:], old[200:], strict=False) for row in pair][:200])
    assert not drift(served, 200)["drift"], "the new reference knows the topic"
    after, still = ask(served, new[220:400]), ask(served, old[200:])
    assert after > during + 0.1 and still > before - 0.1, (before, during, after, still)
    assert main([*admin, "--back"]) == 0 and ask(served, new[220:400]) < after


def keep(db: Path, rows: list[tuple[str, str]]) -> None:
    """Keep and accept feedback."""
    store = Store(db, create=True)
    with store.begin() as connection:
        for text, label in rows:
            answer = make_answer("news", text, "World", 0.5)
            store.put(connection, ANSWERS, [answer])
            set_state(connection, [store.give(connection, answer, label).id], "accepted")
    store.close()


def log(path: Path, drift: bool, times: list[float]) -> Path:
    """Write a drift log."""
    rows = [{"model": "news", "time": time, "requests": 200 + i, "window": 200, "tests": {"score": {"p": 1e-9,
             "statistic": 0.4}}, "level": 1e-5, "drift": ["score"] * drift, "out_of_domain": 0.1}
            for i, time in enumerate(times)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_that_is_stopped_goes_on_and_one_that_loses_says_so(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    from lmworks.verbs import retraining

    texts = [text for text, _ in read(place / "new.csv")[:80]]
    keep(tmp_path / "feedback.db", [(text, TOPICS[i % 2]) for i, text in enumerate(texts[:20])])
    quiet = log(tmp_path / "drift.jsonl", False, [1.0])
    words = {"feedback": str(tmp_path / "feedback.db"), "held_out": place / "held.csv"}
    given = (str(quiet), place / "weights", None, tmp_path / "pool/worse")
    assert retrain(*given, **words).values["verdict"] == "normal"

    def stop(*_: Any, **__: Any) -> None:
        raise Interrupted("stopped")

    with pytest.raises(InputError, match="other labels than the champion") as caught:
        retrain(*given, **words, force=True)
    assert "found: Sports, World" in str(caught.value)
    keep(tmp_path / "feedback.db", [(text, TOPICS[i % 4]) for i, text in enumerate(texts[20:])])  # most of it is wrong
    knobs = {"tuning": retraining.Tuning(epochs=2, lr=1e-3, batch_size=8)}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(retraining, "write_state", stop)
        retrain(*given, **words, **knobs, force=True)  # type: ignore[arg-type]
    assert not read_state(tmp_path / "pool", "news").holding
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(retraining, "fit_monitor", stop)
        retrain(*given, **words, **knobs, resume=True)  # type: ignore[arg-type]  # it had been told to train
    assert read_state(tmp_path / "pool", "news").holding
    assert not (tmp_path / "pool/worse").exists()
    with pytest.raises(InputError, match="interrupted retraining"):
        retrain(*given, **words, **knobs, force=True)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(retraining, "finetune", stop)  # what is done is not done again
        values = retrain(*given, **words, **knobs, resume=True).values  # type: ignore[arg-type]
    assert (values["fired"], values["verdict"], values["won"]) == (True, "forced", False)
    assert values["challenger"] < values["champion"]
    assert read_state(tmp_path / "pool", "news").holding and read_state(tmp_path / "pool", "news").used == 80
    assert not list((tmp_path / "pool").glob(".*"))
    again = finetune(tmp_path / "pool/worse", place / "train.csv", tmp_path / "on", epochs=1, lr=1e-3)
    assert again.values["metrics"]["accuracy"] > 0.5, "a challenger can be trained on"


def test_what_retrain_refuses(place: Path, tmp_path: Path) -> None:
    keep(tmp_path / "feedback.db", read(place / "new.csv")[:3])
    source = str(log(tmp_path / "drift.jsonl", True, [1.0]))
    words: dict[str, Any] = {"feedback": str(tmp_path / "feedback.db"), "held_out": place / "held.csv"}
    given = (place / "weights", None, tmp_path / "pool/out")
    from lmworks.training.tuning import Tuning

    for more, why in (
        ({"tuning": Tuning(method="lora")}, "a whole model"), ({"held_out": tmp_path / "gone.csv"}, "gone.csv"),
        ({"feedback": str(tmp_path / "gone.db")}, "no such file of feedback"), ({"model": "gone"}, "not watched"),
        ({"rule": Rule(checks=0)}, "out of range"), ({"sample": place / "held.csv"}, "answered by a server"),
    ):  # fmt: skip
        with pytest.raises((InputError, FormatError)) as caught:
            retrain(source, *given, **{**words, **more})
        assert why in str(caught.value), why
    with pytest.raises(InputError, match="cannot be asked"):
        retrain("http://127.0.0.1:9", *given, **words)
    assert not (tmp_path / "pool").exists(), "nothing was written"
    row = json.loads(Path(source).read_text())
    for gone in ("window", "level", "out_of_domain", "requests", "tests"):
        (tmp_path / "old.jsonl").write_text(json.dumps({key: value for key, value in row.items() if key != gone}))
        with pytest.raises(InputError, match="this line is no comparison"):
            retrain(str(tmp_path / "old.jsonl"), *given, **words)
    two = Path(source).read_text() + Path(source).read_text().replace('"news"', '"mood"')
    (tmp_path / "two.jsonl").write_text(two)
    with pytest.raises(InputError, match="several models"):
        retrain(str(tmp_path / "two.jsonl"), *given, **words)
    words |= {"held_out": place / "old.csv"}
    with pytest.raises(InputError, match="held-out texts lack labels"):
        retrain(source, place / "weights", place / "train.csv", tmp_path / "pool/few", **words, force=True)
    few = write_table(tmp_path / "few.csv", [*read(place / "held.csv")[:10], *read(place / "old.csv")[:20]])
    with pytest.raises(InputError, match="too few held-out texts"):
        words |= {"held_out": few}
        retrain(source, place / "weights", place / "train.csv", tmp_path / "pool/few", **words, force=True)
    assert not (tmp_path / "pool").exists(), "nothing was written, the trigger's memory neither"


def test_runs_that_meet_and_runs_that_come_after(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hour again: the last challenger may lie there, and another run may be at work."""
    from lmworks.verbs import retraining

    pool = tmp_path / "pool"
    keep(tmp_path / "feedback.db", read(place / "new.csv")[:60])
    words: dict[str, Any] = {"feedback": str(tmp_path / "feedback.db"), "held_out": place / "held.csv"}
    given = (str(log(tmp_path / "drift.jsonl", True, [1.0])), place / "weights", place / "train.csv", pool / "better")
    (pool / "better").mkdir(parents=True)
    (pool / "better/lmworks.json").write_text("{}")
    assert retrain(*given, **words).values["verdict"] == "watching"
    before = read_state(pool, "news")
    with pytest.raises(InputError, match="the challenger of before") as caught:
        retrain(*given, **words, force=True)
    assert "better" in str(caught.value) and read_state(pool, "news") == before
    assert sorted(path.name for path in pool.iterdir()) == ["better", "retraining.json"]

    given = (*given[:3], pool / "more")
    met: list[Any] = []

    def train(*_: Any, **__: Any) -> None:
        met.extend(retrain(*given, **words, **more).values for more in ({}, {"force": True}, {"resume": True}))
        raise Interrupted("stopped")

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(retraining, "finetune", train)
        retrain(*given, **words, force=True)
    assert [(one["fired"], one["verdict"]) for one in met] == [(False, "running")] * 3
    assert (pool / ".more.retraining/known.jsonl").is_file(), "nobody took it away"
    with pytest.raises(InputError, match="interrupted retraining"):
        retrain(*given, **words)


def test_feedback_that_is_gone_taught_nothing_new(place: Path, tmp_path: Path) -> None:
    """Of what it was trained on, all was deleted; what came since is new, and so is what was accepted since."""
    from lmworks.verbs.retraining import look

    db, rows, pool = tmp_path / "feedback.db", read(place / "new.csv"), tmp_path / "pool"
    source = str(log(tmp_path / "drift.jsonl", True, [1.0]))
    write_state(pool, "news", State(bad=5, fired=time.time() - 1000, used=50))
    keep(db, rows[:30])

    def check() -> str:
        return str(look(source, pool, None, None, str(db), None, Rule(least=30), False, {})[1]["verdict"])

    assert check() == "fire", "30 came since"
    store = Store(db)
    with store.begin() as connection:
        connection.execute(FEEDBACK.update().values(received=1.0))
    store.close()
    assert check() == "feedback", "they were there when it fired"
    keep(db, rows[30:80])
    store = Store(db)
    with store.begin() as connection:
        connection.execute(FEEDBACK.update().values(received=1.0))
    store.close()
    assert check() == "fire", "80 that had come, 50 were accepted then"


@pytest.mark.slow
def test_the_story_with_real_news(data_folder: Path, tmp_path: Path) -> None:
    """MiniLM on AG News, with fewer texts than docs/retraining-results.md tells of: all by the command line."""
    script = Path(__file__).parents[1] / "benchmarks/retraining/run.py"
    places = {"--work": tmp_path / "work", "--data": data_folder, "--page": tmp_path / "page.md"}
    words = [str(word) for pair in places.items() for word in pair]
    done = subprocess.run([sys.executable, str(script), "--small", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = read_json(tmp_path / "work/results.json")
    assert found["alarms_before"] == 0 and 0 < found["alarm"]["requests"] <= 250
    exits = [one["exit"] for one in found["checks"]]
    assert exits[-1] == 0 and set(exits[:-1]) == {3}
    assert found["checks"][-1]["difference"]["p"] < 1e-3
    assert found["after"]["new"] > found["during"]["new"] + 0.2
    assert found["after"]["old"] > found["before"]["old"] - 0.1
    assert found["shadow"]["texts"] > 0 and found["shadow"]["failed"] == 0
    load = found["load"]
    assert load["requests"] > 100 and load["champion"] and load["challenger"]
    assert (found["lost"], load["lost"], load["neither"], load["late"]) == (0, 0, 0, 0)
    assert "**" in (tmp_path / "page.md").read_text("utf-8")
