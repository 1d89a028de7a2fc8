"""`--trace`: the file is a Chrome trace of stages, layers and kernels, the table adds up, and off means off."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LLAMA
from torch.nn.modules import module as hooks
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lmworks
from lmworks.base.errors import InputError
from lmworks.cli import main
from lmworks.export.onnx import export_onnx
from lmworks.runtime import trace
from lmworks.runtime.trace import Trace, stage, tracing
from lmworks.tokens.train import train_tokenizer

TEXT = "the cat sat on the mat. naive cafe. the dog ran; "


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier and a decoder, each with weights, graphs and a tokenizer."""
    found = {}
    tokenizer = train_tokenizer([TEXT * 3], vocab_size=280)
    bert = BertConfig(vocab_size=280, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    models = {
        "reads": BertForSequenceClassification(bert),
        "writes": LlamaForCausalLM(LlamaConfig(**{**LLAMA, "vocab_size": 280})),
    }
    for name, model in models.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        tokenizer.save(found[name])
        export_onnx(found[name], found[name], dtypes=("fp32",))
    return found


def read(path: Path) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Return the events that take time and the names of the processes; every event must be one that viewers take."""
    found = json.loads(path.read_text())
    names = {event["pid"]: event["args"]["name"] for event in found["traceEvents"] if event["ph"] == "M"}
    events = [event for event in found["traceEvents"] if event["ph"] != "M"]
    for event in events:
        assert event["ph"] == "X" and event["pid"] in names and isinstance(event["name"], str)
        assert event["ts"] >= 0 and event["dur"] >= 0
    return events, names


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
@pytest.mark.parametrize("verb", ["reads", "writes"])
def test_a_trace_holds_stages_layers_and_kernels(
    folders: dict[str, Path], verb: str, runtime: str, tmp_path: Path
) -> None:
    shown = io.StringIO()
    with tracing(tmp_path / "trace.json", show=shown) as running:
        predictor = lmworks.load(folders[verb], runtime=runtime, threads=1)
        if verb == "reads":
            predictor([TEXT, "the cat"])
        else:
            predictor.generate("the cat", max_tokens=5)
    assert trace.running is None and running is not None
    events, names = read(tmp_path / "trace.json")
    kinds = {names[event["pid"]] for event in events}
    stages = {event["name"]: event for event in events if names[event["pid"]] == "stages"}
    expected = {"load", "tokenise", "batch", "forward", "post-process"}
    forward = "forward"
    if verb == "writes":
        expected, forward = {"load", "tokenise", "prefill", "step", "decode"}, "step"
    assert set(stages) == expected == set(running.stages)
    kernels = "torch cpu_op" if runtime == "torch" else "onnxruntime"
    assert kinds >= ({"stages", "layers", kernels} if runtime == "torch" else {"stages", kernels})
    assert {"Attention", "Transformer"} <= set(running.layers) if runtime == "torch" else "MatMul" in running.layers
    inside = [e for e in events if names[e["pid"]] == kernels and e["name"] in ("aten::linear", "model_run")]
    slack = 20_000  # microseconds: clocks of different engines
    whole = stages[forward]
    spans = [e for e in events if names[e["pid"]] == "stages" and e["name"] in trace.FORWARD]
    begin, end = min(e["ts"] for e in spans), max(e["ts"] + e["dur"] for e in spans)
    assert whole["dur"] > 0 and inside
    assert all(begin - slack <= e["ts"] and e["ts"] + e["dur"] <= end + slack for e in inside)
    busy = sum(sum(running.stages.get(name, ())) for name in trace.FORWARD)
    assert 0 < sum(map(sum, running.layers.values())) <= 1.05 * busy  # own times are counted once
    assert "Stages" in shown.getvalue() and ("TokenEmbeddings" in shown.getvalue()) is (runtime == "torch")
    if verb == "writes":
        assert len(running.stages["step"]) == 4 and len(running.stages["decode"]) == 5


def test_off_costs_nothing_and_leaves_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    assert stage("a") is stage("b") is trace.NOTHING
    with tracing(None) as nothing:
        assert nothing is None and trace.running is None
    with tracing(tmp_path / "t.json", show=io.StringIO()):
        lmworks.load(folders["reads"], runtime="torch")
    assert not hooks._global_forward_pre_hooks and not hooks._global_forward_hooks
    session = lmworks.load(folders["reads"], runtime="onnx", threads=1).runtime.session  # type: ignore[attr-defined]
    assert session.get_session_options().enable_profiling is False


def test_layers_count_their_own_time_alone(tmp_path: Path) -> None:
    class Inner(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.05)
            return x

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return self.inner(self.inner(x))  # type: ignore[no-any-return]

    with tracing(tmp_path / "t.json", show=io.StringIO()) as running:
        assert running is not None
        running.watch_torch()
        Outer()(torch.zeros(1))
    assert len(running.layers["Inner"]) == 2 and sum(running.layers["Inner"]) >= 0.1
    assert 0.02 <= sum(running.layers["Outer"]) < 0.1


def test_an_error_inside_still_writes_the_file_and_ends_the_trace(tmp_path: Path) -> None:
    def fail() -> None:
        with stage("forward"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), tracing(tmp_path / "t.json", show=io.StringIO()):
        fail()
    assert trace.running is None and [event["name"] for event in read(tmp_path / "t.json")[0]] == ["forward"]


def test_bad_places_are_refused_before_anything_runs(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "t.json"):
        with pytest.raises(InputError, match="cannot be written there"), tracing(path):
            pytest.fail("it ran")
    with (
        tracing(tmp_path / "t.json", show=io.StringIO()),
        pytest.raises(InputError, match="already"),
        tracing(tmp_path / "u.json"),
    ):
        pytest.fail("it ran")
    assert not (tmp_path / "u.json").exists()


def test_measuring_is_no_part_of_a_trace(folders: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LMWORKS_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(folders["reads"], tmp_path / "model"))
    with tracing(tmp_path / "t.json", show=io.StringIO()) as running:
        lmworks.load(folder)
    assert running is not None and set(running.stages) == {"load"} and not running.layers


def test_the_command_line_writes_one(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.json"
    assert (
        main(["classify", str(folders["reads"]), "the cat", "--trace", str(path), "--runtime", "onnx", "--json"]) == 0
    )
    out, err = capsys.readouterr()
    assert json.loads(out) and "Where the time went" in err and read(path)[0]
    assert main(["generate", str(folders["writes"]), "the", "--max-tokens", "3", "--trace", str(path)]) == 0
    assert "prefill" in capsys.readouterr().err and {"step", "decode"} <= {event["name"] for event in read(path)[0]}


def test_times_of_torch_and_onnxruntime_are_put_on_one_clock() -> None:
    found = Trace()
    found.finish()
    found.take_torch(
        {"baseTimeNanoseconds": 5_000_000, "traceEvents": [{"ph": "X", "ts": 7.0, "dur": 1.0, "cat": "cpu_op"}]}
    )
    assert found.events[0]["ts"] == 5007.0 and found.events[0]["pid"] == "torch cpu_op"
