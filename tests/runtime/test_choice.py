"""`runtime="auto"`: which ways stand for choice, that the fastest is taken, and that nothing is measured twice."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity import zoo

from lmworks.base.errors import InputError
from lmworks.export.onnx import export_onnx
from lmworks.models.families import read_config
from lmworks.runtime import choice, predictor
from lmworks.runtime.choice import Way, choose, content_hash, find_ways, kept_decisions, list_choices, make_work
from lmworks.runtime.onnx_runtime import OnnxRuntime
from lmworks.runtime.predictor import open_runtime
from lmworks.verbs.inspection import inspect_folder

ONNX, TORCH, BF16, INT8 = Way("onnx", "fp32"), Way("torch", "fp32"), Way("torch", "bf16"), Way("onnx", "int8")


class Clock:
    """A clock that only its owner moves: a busy machine changes nothing."""

    now = 0.0

    @classmethod
    def perf_counter(cls) -> float:
        return cls.now


class Sleeper:
    """A runtime that takes a while to start, and for each call, on that clock."""

    name, dtype, vocab_size, max_length = "fake", "fp32", 100, 64

    def __init__(self, start: float, call: float) -> None:
        self.call, self.calls = call, 0
        Clock.now += start

    def run(self, batch: Any) -> dict[str, Any]:
        self.calls += 1
        Clock.now += self.call
        return {}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with its weights and two graphs."""
    folder = tmp_path_factory.mktemp("both")
    zoo.make_reference("bert", "SequenceClassification").save_pretrained(folder)
    export_onnx(folder, folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMWORKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "time", Clock)
    return Path(shutil.copytree(exported, tmp_path / "model"))


def certify(folder: Path, **cells: Any) -> None:
    (folder / "certificate.json").write_text(json.dumps({"passed": True, "runtimes": cells}))


def test_lossy_ways_need_a_certificate_or_leave(folder: Path) -> None:
    """The certificate must have checked enough decisions, and all of them must have been kept."""
    graphs = ["fp32", "int8"]
    assert find_ways(folder, graphs, "auto") == [ONNX, TORCH]
    assert set(find_ways(folder, graphs, "any")) == {ONNX, TORCH, INT8, BF16}
    assert find_ways(folder, graphs, "int8") == [INT8] and find_ways(folder, graphs, "fp32") == [ONNX, TORCH]
    good = {"decisions_equal": [40, 40], "passed": True}
    for cell, kept in (
        (good, True), ({**good, "decisions_equal": [39, 40]}, False), ({**good, "decisions_equal": [8, 8]}, False),
        ({**good, "passed": False}, False), ({"tokens_equal": [64, 64], "passed": True}, True),
        ({"skipped": "x"}, False),
    ):  # fmt: skip
        certify(folder, onnx={"int8": cell})
        assert (INT8 in find_ways(folder, graphs, "auto")) is kept
        assert kept_decisions(folder) == ({INT8} if kept else set())
    (folder / "certificate.json").write_text("{")
    assert kept_decisions(folder) == set()


def test_the_fastest_is_taken_and_never_measured_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    speeds = {ONNX: 0.004, TORCH: 0.001}
    monkeypatch.setattr(choice, "START", {"onnx": 0.0, "torch": 0.0})
    opened: list[Sleeper] = []

    def open_way(way: Way) -> Sleeper:
        opened.append(Sleeper(0.0, speeds[way]))
        return opened[-1]

    with caplog.at_level(logging.INFO, "lmworks"):
        first = choose(folder, [ONNX, TORCH], open_way, head="SequenceClassification")  # type: ignore[arg-type]
    assert first.way == TORCH and first.measured and "torch fp32" in caplog.text and "remembered in" in caplog.text
    assert len(opened) == 2 and all(one.calls >= 3 for one in opened)
    again = choose(folder, [ONNX, TORCH], open_way, head="SequenceClassification")  # type: ignore[arg-type]
    assert again == (TORCH, first.why, False) and len(opened) == 2
    moved = folder.rename(folder.with_name("elsewhere"))  # the content counts, not the place
    assert choose(moved, [ONNX, TORCH], open_way, head="SequenceClassification").way == TORCH  # type: ignore[arg-type]
    assert len(opened) == 2
    [seen] = list_choices(moved)
    assert (seen["runtime"], seen["dtype"], seen["why"]) == ("torch", "fp32", first.why)
    assert inspect_folder(moved).values["auto"] == [seen]


@pytest.mark.parametrize("change", ["weights", "versions", "machine", "threads", "ways", "damage"])
def test_what_a_choice_depends_on_is_measured_anew(folder: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Way] = []

    def open_way(way: Way) -> Sleeper:
        opened.append(way)
        return Sleeper(0.0, 0.0)

    ways, threads = [ONNX, TORCH], None
    choose(folder, ways, open_way, head="Model")  # type: ignore[arg-type]
    if change == "weights":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    elif change == "versions":
        monkeypatch.setattr(choice, "version", lambda name: "99")
    elif change == "machine":
        monkeypatch.setattr(choice, "read_processor", lambda: "another")
    elif change == "threads":
        threads = 7
    elif change == "ways":
        ways = [TORCH, ONNX, BF16]
    else:
        next(choice.choices_folder().glob("*.json")).write_text('{"format": 1}')
    assert choose(folder, ways, open_way, head="Model", threads=threads).measured  # type: ignore[arg-type]
    assert len(opened) > 2


def test_a_late_start_must_pay_back(folder: Path) -> None:
    """Torch, imported in a second, must win nine milliseconds a round."""
    runtimes = {ONNX: (0.0, 0.003), TORCH: (0.0, 0.002)}
    found = choose(folder, [ONNX, TORCH], lambda way: Sleeper(*runtimes[way]), head="Model")  # type: ignore[arg-type, return-value]
    assert found.way == ONNX and "start" in found.why


def test_a_cache_that_cannot_be_written_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMWORKS_CACHE", str(tmp_path / "file"))
    assert choose(folder, [ONNX, TORCH], lambda way: Sleeper(0, 0), head="Model").measured  # type: ignore[arg-type, return-value]
    assert "cannot be remembered" in caplog.text and "LMWORKS_CACHE" in caplog.text


def test_a_way_that_does_not_open_is_left_out(folder: Path) -> None:
    def open_way(way: Way) -> Sleeper:
        if way == ONNX:
            raise InputError("it is broken")
        return Sleeper(0, 0)

    found = choose(folder, [ONNX, TORCH], open_way, head="Model")  # type: ignore[arg-type]
    assert found.way == TORCH and "it is broken" in found.why
    with pytest.raises(InputError, match="nothing runs"):
        choose(folder, [ONNX, INT8], lambda way: open_way(ONNX), head="Model")  # type: ignore[arg-type, return-value]


def test_load_opens_what_was_chosen_with_equal_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of a real folder are measured; whichever is remembered, the numbers are the same."""
    batch = {"input_ids": np.arange(5, 15)[None]}
    for start in ({"onnx": 0.0, "torch": 9.0}, {"onnx": 9.0, "torch": 0.0}):
        monkeypatch.setattr(choice, "START", start)
        shutil.rmtree(choice.choices_folder(), ignore_errors=True)
        runtime, why = open_runtime(folder, "auto", "auto", 1, 1, head="SequenceClassification")
        assert runtime.name == min(start, key=lambda name: start[name]) and runtime.name in why
        other = "torch" if runtime.name == "onnx" else "onnx"
        numbers, reference = (
            one.run(batch)["logits"]
            for one in (runtime, open_runtime(folder, other, "auto", 1, 1, head="SequenceClassification")[0])
        )
        assert np.abs(numbers - reference).max() <= 1e-5
    monkeypatch.setattr(choice, "measure", None)  # remembered by now
    assert open_runtime(folder, "auto", "auto", 1, 1, head="SequenceClassification")[0].name == "torch"
    assert open_runtime(folder, "onnx", "auto", 1, 1, head="SequenceClassification")[0].dtype == "fp32"


def test_what_is_remembered_is_measured_for_many_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for a few texts has a graph that opens sooner and runs slower: it must not stand for the graph."""
    opened: list[bool] = []

    class Seen(OnnxRuntime):
        def __init__(self, *args: Any, once: bool = False, **options: Any) -> None:
            opened.append(once)
            super().__init__(*args, once=once, **options)

    monkeypatch.setattr(predictor, "OnnxRuntime", Seen)
    monkeypatch.setattr(choice, "START", {"onnx": 0.0, "torch": 9.0})
    open_runtime(folder, "auto", "auto", 1, 1, head="SequenceClassification", once=True)
    assert opened == [False, True]
    open_runtime(folder, "auto", "auto", 1, 1, head="SequenceClassification", once=True)
    assert opened == [False, True, True]


def test_a_graph_that_is_not_there_is_named(folder: Path) -> None:
    """A dtype that only graphs have is refused as one, not as torch's."""
    with pytest.raises(InputError, match="q4") as caught:
        open_runtime(folder, "auto", "q4", 1, 1, head="SequenceClassification")
    assert "torch" not in str(caught.value) and "fp32, int8" in str(caught.value)


def test_any_dtype_lets_lossy_ways_win(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def costs(ways: Any, *_: Any, **__: Any) -> Any:
        return {way: 1.0 if way == INT8 else 2.0 for way in ways}, []

    monkeypatch.setattr(choice, "measure", costs)
    assert open_runtime(folder, "auto", "any", 1, 1, head="SequenceClassification")[0].dtype == "int8"
    assert open_runtime(folder, "auto", "auto", 1, 1, head="SequenceClassification")[0].dtype == "fp32"
    assert open_runtime(folder, "torch", "any", 1, 1, head="SequenceClassification")[0].name == "torch"


def test_the_hash_sees_content_alone(folder: Path, tmp_path: Path) -> None:
    before = content_hash(folder)
    twin = Path(shutil.copytree(folder, tmp_path / "twin"))
    (twin / "README.md").write_text("words")
    assert content_hash(twin) == before
    (twin / "onnx" / "model.onnx").unlink()
    assert content_hash(twin) != before


@pytest.mark.parametrize(
    ("case", "head"), [("llama", "CausalLM"), ("vit", "ImageClassification"), ("bert", "MaskedLM")]
)
def test_every_kind_of_model_has_something_to_measure(case: str, head: str, tmp_path: Path) -> None:
    zoo.make_reference(case, head).save_pretrained(tmp_path)
    runtime, _ = open_runtime(tmp_path, "torch", "fp32", 1, None, head=head)
    make_work(read_config(tmp_path), head, runtime.max_length)(runtime)


def test_a_folder_of_one_way_is_never_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "measure", None)
    zoo.make_reference("vit", "ImageClassification").save_pretrained(tmp_path)
    runtime, why = open_runtime(tmp_path, "auto", "auto", 1, 1, head="ImageClassification")
    assert runtime.name == "torch" and "only way" in why


def test_graphs_of_other_weights_are_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights that were trained on, in the middle of their file too, are measured anew; what disagrees is left out."""
    before = content_hash(folder)
    assert open_runtime(folder, "auto", "auto", 1, None, head="SequenceClassification")[0].name
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    middle = len(data) // 8 * 4  # a weight, far from both ends
    data[middle : middle + 40_000] = np.frombuffer(data[middle : middle + 40_000], "<f4").__mul__(-3).tobytes()
    path.write_bytes(data)
    assert content_hash(folder) != before
    with caplog.at_level(logging.WARNING, "lmworks"):
        runtime, why = open_runtime(folder, "auto", "auto", 1, None, head="SequenceClassification")
    assert runtime.name == "torch" and "made of other weights" in why and "made of other weights" in caplog.text
