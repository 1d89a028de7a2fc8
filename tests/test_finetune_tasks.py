"""Several tasks in one run: a folder for each that transformers and every verb read, one report, clear refusals."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).with_name("training")))
from tuning_models import make_body, two_languages, write_rows

from lmworks.base.errors import InputError
from lmworks.export.receipt import check_receipt
from lmworks.runtime.predictor import load
from lmworks.training.tuning import Tuning
from lmworks.verbs.finetune_tasks import name_tasks, read_task
from lmworks.verbs.finetuning import evaluate_task, finetune
from lmworks.verbs.searching import tune

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = ("text-classification", "token-classification")
QUICK = {"epochs": 3, "lr": 4e-3, "batch_size": 8, "dtype": "fp32", "task": TASKS[0]}


@pytest.fixture(scope="module")
def root(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A body without a head, sentences in two languages, and a few tweets with names."""
    root = tmp_path_factory.mktemp("tasks")
    rows = two_languages(data_folder, skip=0, count=80)
    blocks = re.split(r"\n\s*\n", (data_folder / "wnut17/train.conll").read_text())
    named = [block for block in blocks if "B-" in block and len(block) < 400][:20]
    (root / "names.conll").write_text("\n\n".join(named) + "\n")
    write_rows(root / "train.jsonl", rows)
    make_body(root / "body", [*(text for text, _ in rows), *(re.sub(r"\t\S+\n?", " ", block) for block in named)])
    return root


def learn(root: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Learn to tell languages apart and, in four of ten steps, to find names."""
    settings = {"also_task": (f"{root}/names.conll={TASKS[1]}=0.4",), **QUICK, **changes}
    return finetune(root / "body", root / "train.jsonl", out, **settings).values


def test_each_task_leaves_a_folder_that_everyone_reads(root: Path, tmp_path: Path) -> None:
    """Both are learned, share a body to the bit, and answer in transformers and in every verb as in the report."""
    out = tmp_path / "out"
    values = learn(root, out)
    first, second = (values["tasks"][task] for task in TASKS)
    assert first["metrics"]["accuracy"] >= 0.9 > first["baselines"]["majority"]["accuracy"]
    assert (first["weight"], second["weight"]) == (0.6, 0.4)
    assert (first["train_examples"], first["validation_examples"], second["validation_examples"]) == (144, 16, 2)
    assert values["steps"] == 3 * 18 + 36  # three epochs of the first task are six tenths of all
    assert values["mean"] == max(row["mean"] for row in values["history"])
    bodies = [transformers.AutoModel.from_pretrained(out / task, add_pooling_layer=False) for task in TASKS]
    assert all(torch.equal(a, b) for a, b in zip(*(body.state_dict().values() for body in bodies), strict=True))
    texts = ["A man rides a bike.", "Ein Mann fährt Rad."]
    pipe = transformers.pipeline(TASKS[0], model=str(out / TASKS[0]), device="cpu")
    assert (
        [one["label"] for one in pipe(texts)] == [one[0].label for one in load(out / TASKS[0])(texts)] == ["en", "de"]
    )
    pipe = transformers.pipeline(TASKS[1], model=str(out / TASKS[1]), device="cpu", ignore_labels=[])
    assert [one["entity"] for one in pipe(texts[0])] == [
        token.label for token in load(out / TASKS[1])(texts[:1], aggregation="tokens")[0] if token.attends
    ]
    for task, file, name in ((TASKS[0], "train.jsonl", "accuracy"), (TASKS[1], "names.conll", "f1")):
        assert evaluate_task(out / task, root / file).values[name] >= 0
        assert check_receipt(out / task)["passed"]
        assert json.loads((out / task / "report.json").read_text())["metrics"] == values["tasks"][task]["metrics"]
    receipt = json.loads((out / "lmworks.json").read_text())
    assert check_receipt(out)["passed"] and receipt["tasks"] == {task: task for task in TASKS}
    page = (out / "report.html").read_text()
    assert all(f"{task}, on its held-out examples" in page for task in TASKS) and "frozen features" in page


def test_heads_alone_and_words_beside_labels(root: Path, tmp_path: Path) -> None:
    """The body of --method head stays as it was, under three heads; hidden words are scored by their perplexity."""
    lines = (root / "train.jsonl").read_text().splitlines()
    write_rows(tmp_path / "plain.jsonl", [(json.loads(line)["text"], "") for line in lines[:40]])
    more = (f"{root}/names.conll={TASKS[1]}=0.2", f"{tmp_path}/plain.jsonl=fill-mask=0.2")
    values = learn(root, tmp_path / "out", method="head", also_task=more, epochs=1)
    assert list(values["tasks"]) == [*TASKS, "fill-mask"]
    before = transformers.BertModel.from_pretrained(root / "body").encoder.state_dict()
    body = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out/fill-mask").bert.encoder.state_dict()
    assert all(torch.equal(before[name], body[name]) for name in before)
    words = values["tasks"]["fill-mask"]
    scores = [values["tasks"][task]["metrics"][name] for task, name in zip(TASKS, ("accuracy", "f1"), strict=True)]
    assert words["metrics"]["perplexity"] > 1
    assert values["mean"] == pytest.approx((sum(scores) + 1 / words["metrics"]["perplexity"]) / 3, abs=1e-6)


def test_a_dry_run_writes_nothing(root: Path, tmp_path: Path) -> None:
    values = learn(root, tmp_path / "out", dry_run=True)
    assert [values["tasks"][task]["steps"] for task in TASKS] == [54, 36] and values["steps"] == 90
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"method": "lora", "shots": 2}, "--method lora, --shots"),
        ({"also": ("x.jsonl=0.1",)}, "--also"),
        ({"curriculum": "length"}, "--curriculum"),
        ({"also_task": ("names.conll=0.5",)}, "names.conll=0.5"),
        ({"also_task": ("names.conll=token-classification=1.5",)}, "names.conll=token-classification=1.5"),
        ({"also_task": ("{root}/names.conll=tokn-classification=0.5",)}, None),
        ({"also_task": ("{root}/names.conll=token-classification=0.5",) * 2}, "0.5 + 0.5 = 1"),
        ({"also_task": ("{root}/train.jsonl=feature-extraction=0.5",)}, "--task feature-extraction"),
    ],
)
def test_what_does_not_go_together_is_refused(
    changes: dict[str, Any], found: str | None, root: Path, tmp_path: Path
) -> None:
    if "also_task" in changes:
        changes = {**changes, "also_task": tuple(one.format(root=root) for one in changes["also_task"])}
    with pytest.raises(InputError) as error:
        learn(root, tmp_path / "out", **changes)
    assert error.value.found == found if found else "did you mean" in error.value.fix
    assert not list(tmp_path.iterdir())


def test_a_search_is_for_one_task(root: Path, tmp_path: Path) -> None:
    tuning = Tuning(also_task=(f"{root}/names.conll={TASKS[1]}=0.4",))
    with pytest.raises(InputError, match="one task"):
        tune(root / "body", root / "train.jsonl", tmp_path / "out", storage=tmp_path / "s.jsonl", tuning=tuning)
    assert not list(tmp_path.iterdir())


def test_names_of_folders() -> None:
    assert read_task("a=b/x.conll=fill-mask=0.25") == (Path("a=b/x.conll"), "fill-mask", 0.25)
    files = [Path("a/x.csv"), Path("b/y.tar.json"), Path("c/y.jsonl"), Path("z.txt")]
    assert name_tasks(["t", "t", "t", "fill-mask"], files) == ["t-x", "t-y-2", "t-y-3", "fill-mask"]
