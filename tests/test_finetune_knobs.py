"""A knob that would do nothing, and data that teach nothing, end in one message; folders of several tasks are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).with_name("training")))
from tuning_models import make_languages

from lmworks import api
from lmworks.base.errors import FormatError, InputError
from lmworks.base.report import counted
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.text.labelled import read_labelled
from lmworks.tokens.train import train_tokenizer
from lmworks.training.measure import answer
from lmworks.training.supervision import MANY_ROWS, check_classes, check_order
from lmworks.training.tuning import Tuning
from lmworks.verbs.distilling import Distilling
from lmworks.verbs.finetune_data import also_files, read_data
from lmworks.verbs.finetuning import evaluate_task, finetune
from lmworks.verbs.settings import Settings
from lmworks.verbs.tuning_report import SHOWN_CLASSES, class_table

pytestmark = pytest.mark.usefixtures("one_thread")

COLUMNS: dict[str, Any] = {"text_column": None, "label_column": None, "header": True}


@pytest.fixture(scope="module")
def languages(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sentences of two languages, and a model of one task and one of two."""
    root = tmp_path_factory.mktemp("languages")
    make_languages(root, data_folder, 20)
    settings = {"task": "text-classification", "epochs": 1, "dtype": "fp32", "batch_size": 8}
    finetune(root / "body", root / "train.jsonl", root / "one", **settings)
    both = f"{root / 'validation.jsonl'}=text-classification=0.4"
    finetune(root / "body", root / "train.jsonl", root / "two", also_task=(both,), **settings)
    return root


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"min_delta": 0.1}, "--min-delta is for the patience"),
        ({"clip_value": 0.5, "max_grad_norm": 0.3}, "--clip-value takes the place of --max-grad-norm"),
        ({"shots": 4, "patience": 2}, "--shots trains to the last step"),
        ({"method": "head", "gradient_checkpointing": True}, "--gradient-checkpointing is for layers"),
        ({"init": "random"}, "--init is for new tokens"),
    ],
)
def test_a_knob_that_another_leaves_without_effect(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tuning(**knobs).check()


def test_knobs_that_do_go_together() -> None:
    Tuning(min_delta=0.1, patience=2).check()
    Tuning(clip_value=0.5, max_grad_norm=0.0).check()
    Tuning(method="lora", gradient_checkpointing=True, layer_decay=0.9).check()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"momentum": 0.5}, "--momentum belongs to sgd"),
        ({"decay": 0.5}, "--decay belongs to wsd"),
        ({"optimizer": "sgd", "beta2": 0.9}, "--beta2 is for adamw"),
        ({"schedule": "constant", "min_lr": 1e-5}, "--min-lr is for a rate that falls"),
        ({"clip_value": 0.5, "max_grad_norm": 0.3}, "--clip-value takes the place"),
        ({"warmup": 50, "steps": 40}, "--warmup is longer than the training"),
        ({"lr": 1e-3, "min_lr": 2e-3}, "--min-lr is above --lr"),
    ],
)
def test_a_knob_of_train_without_effect(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**knobs).resolve(10**6)
    Settings(optimizer="sgd", momentum=0.5, schedule="wsd", decay=0.5, min_lr=1e-5).resolve(10**6)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"hidden": "mse", "hidden_weight": 0.0}, "--hidden is how layers are compared"),
        ({"alpha": 0.0, "temperature": 3.0}, "--temperature is for what the teacher says"),
        ({"alpha": 1.0, "class_weights": True}, "--class-weights is for the labels of the data"),
    ],
)
def test_a_knob_of_distill_without_effect(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Distilling(**knobs).check()


INSTRUCTION = [{"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize(
    ("task", "long", "examples", "message"),
    [
        ("fill-mask", "window", ["a"], "texts are read in windows"),
        ("text-generation", "truncate", ["a"], "texts are read in windows"),
        ("text-generation", "window", INSTRUCTION, "instructions are refused or cut"),
        ("question-answering", "truncate", [("a", "b")], "contexts are read in windows"),
        ("image-classification", "window", ["a.png"], "pictures have one length"),
        ("text-generation", "truncate", INSTRUCTION, ""),
        ("text-classification", "window", ["a"], ""),
        ("token-classification", "truncate", [("a",)], ""),
    ],
)
def test_long_is_said_where_it_matters(task: str, long: Any, examples: list[Any], message: str) -> None:
    if not message:
        check_order(task, Tuning(long=long), examples)
        return
    with pytest.raises(InputError, match=message):
        check_order(task, Tuning(long=long), examples)


@pytest.mark.parametrize("knobs", [{"long": "truncate"}, {"batch_tokens": 64}, {"max_length": 64}])
def test_pictures_have_no_tokens(knobs: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="pictures have"):
        check_order("image-classification", Tuning(**knobs), ["a.png"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "head", "layer_decay": 0.9}, "--layer-decay has nothing to act on"),
        ({"method": "prefix", "layer_decay": 0.9}, "--layer-decay has nothing to act on"),
        ({"code": ("nowhere.py:Layer",)}, "there is no such code"),
        ({"code": (f"{Path(__file__).with_name('my_layers.py')}:DenseReLU",)}, "no layers of its maker's own"),
        ({"header": False}, "only a table has a first row"),
        ({"also_task": ("{root}/validation.jsonl=text-classification=0.4",), "every_token": True}, "--every-token"),
        (
            {"also_task": ("{root}/validation.jsonl=text-classification=0.4",), "whole_words": True},
            "--whole-words",
        ),
    ],
)
def test_a_flag_that_these_data_or_this_model_leave_without_effect(
    settings: dict[str, Any], message: str, languages: Path, tmp_path: Path
) -> None:
    """Nothing is left behind."""
    if "also_task" in settings:
        settings = {**settings, "also_task": tuple(one.format(root=languages) for one in settings["also_task"])}
    with pytest.raises(InputError, match=message):
        finetune(
            languages / "body", languages / "train.jsonl", tmp_path / "out", task="text-classification", **settings
        )
    assert list(tmp_path.iterdir()) == []


def test_a_first_row_that_is_data_may_be_in_any_of_the_files(languages: Path, tmp_path: Path) -> None:
    """--no-header is for the tables among the files, and for them alone."""
    (tmp_path / "bare.tsv").write_text("a house\ten\nein Haus\tde\n" * 10)
    train, bare = languages / "train.jsonl", {**COLUMNS, "header": False}
    data, held_out = read_data(train, tmp_path / "bare.tsv", "text-classification", None, 0, bare)
    assert (len(data), len(held_out)) == (40, 20)
    also = also_files(Tuning(also=(f"{tmp_path / 'bare.tsv'}=0.2",)))
    assert also == [tmp_path / "bare.tsv"]
    assert len(read_data(train, None, "text-classification", None, 0, bare, also)[0]) == 36
    with pytest.raises(InputError, match="only a table"):
        read_data(train, None, "text-classification", None, 0, bare)


@pytest.mark.parametrize("option", ["text_column", "label_column", "split"])
def test_plain_texts_have_no_columns(option: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a house")
    with pytest.raises(InputError, match=f"no columns(.|\n)*--{option.replace('_', '-')}"):
        read_labelled(tmp_path / "a.txt", "text-generation", **{option: "x"})


@pytest.fixture(scope="module")
def decoder(languages: Path) -> Path:
    """A folder with a small GPT-2, and an instruction that is longer than it."""
    texts = [json.loads(line)["text"] for line in (languages / "train.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    tokenizer.save(languages / "gpt", max_length=32)
    sizes = {"vocab_size": tokenizer.vocab_size, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends)).save_pretrained(languages / "gpt")
    (languages / "long.jsonl").write_text((json.dumps({"prompt": "a " * 99, "completion": "b"}) + "\n") * 9)
    (languages / "plain.txt").write_text("\n".join(texts))
    return languages / "gpt"


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("plain.txt", {"class_weights": True}, "--class-weights is for labels"),
        ("plain.txt", {"balanced": True}, "--balanced is for rows with one label"),
        ("plain.txt", {"label_smoothing": 0.1}, "--label-smoothing is for labels"),
        ("plain.txt", {"long": "truncate"}, "texts are read in windows"),
        ("long.jsonl", {}, "--long truncate"),
        ("long.jsonl", {"long": "truncate"}, "nothing|anything left to learn"),
    ],
)
def test_a_language_model_has_no_labels_to_weigh(
    file: str, settings: dict[str, Any], message: str, decoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as error:
        finetune(decoder, decoder.parent / file, tmp_path / "out", task="text-generation", **settings)
    assert "--long window" not in str(error.value)  # which instructions refuse
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option",
    [{"label_column": "x"}, {"header": False}, {"split": "x"}, {"long": "window"}],
    ids=lambda o: next(iter(o)),
)
def test_a_language_model_is_scored_on_texts(option: dict[str, Any], decoder: Path) -> None:
    """What says where labels are has no use there."""
    with pytest.raises(InputError, match="which have no labels"):
        api.evaluate(decoder, decoder.parent / "plain.txt", **option)


# ------------------------------------------------------------------------------------------------------ odd labels


def test_labels_of_which_nothing_can_be_learned(tmp_path: Path) -> None:
    """Empty lists, and a text that was taken for a label."""
    empty = tmp_path / "empty.jsonl"
    empty.write_text("".join(json.dumps({"text": f"text {i}", "label": []}) + "\n" for i in range(9)))
    data = read_labelled(empty, "text-classification")
    with pytest.raises(InputError, match="no example has a label"):
        check_classes(data, "multi_label_classification", Tuning())
    table = tmp_path / "texts.csv"
    table.write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(MANY_ROWS + 1)))
    data = read_labelled(table, "text-classification", label_column="text")
    with pytest.raises(InputError, match="a label of its own"):
        check_classes(data, "single_label_classification", Tuning())
    check_classes(read_labelled(table, "text-classification"), "single_label_classification", Tuning())


@pytest.mark.parametrize("label", [0.5, ["en"], []])
def test_a_model_is_not_scored_on_labels_of_another_kind(label: Any, languages: Path, tmp_path: Path) -> None:
    """Numbers, or several labels at once, for a model that chooses one label."""
    rows = "".join(json.dumps({"text": text, "label": label}) + "\n" for text in ("a house", "ein Haus"))
    (tmp_path / "data.jsonl").write_text(rows)
    with pytest.raises(InputError, match="another kind of label"):
        evaluate_task(languages / "one", tmp_path / "data.jsonl")


def test_of_many_labels_only_the_best_is_asked_for(languages: Path) -> None:
    """Scores of thousands of labels for thousands of texts would not fit."""
    data = read_labelled(languages / "validation.jsonl", "text-classification")
    asked: list[dict[str, Any]] = []

    class Label:
        label = "en"

    def predictor(texts: list[str], **options: Any) -> Any:
        asked.append(options)
        return [[Label] for _ in texts]

    assert answer(predictor, data, problem="single_label_classification") == ["en"] * len(data)  # type: ignore[arg-type]
    assert asked == [{"top_k": 1}]
    rows = [{"label": str(i), "f1": i / 1000} for i in range(1000)]
    (table,) = class_table(rows)
    assert len(table.rows) == SHOWN_CLASSES and table.rows[0][0] == "0" and "of 1,000" in table.title
    assert class_table(rows[:3])[0].title == "By class"


# ----------------------------------------------------------------------------------------------------------- evaluate


def test_a_long_text_is_refused_cut_or_read_in_windows(languages: Path, tmp_path: Path) -> None:
    """The message's own advice works on the command line; a model without labels has no use for it."""
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "a house " * 200, "label": "en"}) + "\n")
    with pytest.raises(InputError, match="--long window"):
        api.evaluate(languages / "one", long)
    for how in ("truncate", "window"):
        assert api.evaluate(languages / "one", long, long=how).values["examples"] == 1
    report = api.evaluate(languages / "one", long, long="window")
    assert report.title.endswith("1 example of text-classification")


def test_a_dtype_is_used_or_refused(languages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="int3"):
        api.evaluate(languages / "one", languages / "validation.jsonl", dtype="int3")
    made: list[str] = []
    first = TorchRuntime.__init__

    def note(self: Any, *arguments: Any, **options: Any) -> None:
        made.append(options.get("dtype", "fp32"))
        first(self, *arguments, **options)

    monkeypatch.setattr(TorchRuntime, "__init__", note)
    api.evaluate(languages / "one", languages / "validation.jsonl", dtype="bf16")
    assert made == ["bf16"]


@pytest.mark.parametrize("verb", ["evaluate", "load", "finetune"])
def test_a_folder_of_several_tasks_names_its_models(verb: str, languages: Path, tmp_path: Path) -> None:
    two, data = languages / "two", languages / "validation.jsonl"
    calls: dict[str, Any] = {
        "evaluate": lambda: api.evaluate(two, data),
        "load": lambda: api.load(two),
        "finetune": lambda: finetune(two, data, tmp_path / "out", task="text-classification"),
    }
    with pytest.raises(FormatError) as error:
        calls[verb]()
    inside = sorted(path.parent for path in two.glob("*/config.json"))
    assert len(inside) == 2
    assert all(str(path) in error.value.found for path in inside) and str(inside[0]) in error.value.fix


def test_one_is_not_many() -> None:
    assert [counted(n, "example") for n in (0, 1, 2, 1200)] == [
        "0 examples",
        "1 example",
        "2 examples",
        "1,200 examples",
    ]


def test_ctrl_c_before_the_first_step_is_answered(languages: Path, tmp_path: Path) -> None:
    """One message and 130, also while torch is being loaded; nothing is left."""
    words = ["finetune", languages / "body", languages / "train.jsonl", "--task", "text-classification"]
    command = [sys.executable, "-m", "lmworks", *map(str, words), "-o", str(tmp_path / "out"), "--epochs", "10000"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1", "LMWORKS_THREADS": "1"}
    )
    until = time.monotonic() + 60
    while time.monotonic() < until and "torch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert said.count("lmworks: stopped") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_no_text(tmp_path: Path) -> None:
    """A folder of classes is what an empty folder should have been."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="a folder for each class"):
        read_labelled(tmp_path / "empty", "text-classification")
    for label in ("a", "b"):
        (tmp_path / "full" / label).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "full" / label / "x.png")
    assert len(read_labelled(tmp_path / "full", "image-classification")) == 2
