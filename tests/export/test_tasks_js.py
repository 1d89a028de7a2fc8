"""The page's engine in Node: Python's answers for every task, its refusals; the self-test and how it is counted."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from js_engine import CLOSE, ODD, ask, differ, make_model, plain, queries, questions, sentences, tweets, wordpiece
from minilm_heads import make_head
from tiny import save_reference

import lmworks
from lmworks.base.errors import InputError, LmworksError
from lmworks.export.onnx_folder import export_graphs
from lmworks.export.selftest import from_base64, measure_gaps
from lmworks.export.verify_js import find_modules, find_node
from lmworks.verbs.compress_knobs import Pruning
from lmworks.verbs.compressing import prune

pytestmark = pytest.mark.node
Call = tuple[Any, dict[str, Any]]  # an example of Python's predictor, and options


def recipe(folder: Path) -> None:
    """Add the files of sentence-transformers: the first token, length 1, small letters, at most 40 tokens, a prompt."""
    kinds = ("Transformer", "Pooling", "Normalize")
    rows = [{"type": f"sentence_transformers.models.{k}", "path": f"{i}_{k}" if i else ""} for i, k in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 40, "do_lower_case": True}))
    prompts = {"prompts": {"query": "Query: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))


def calls_of(task: str, data: Path, mask: str) -> list[Call]:
    """Return real examples with options: short and long ones, and every way of each option."""
    texts = [*sentences(data, count=5), *tweets(data, count=5), *ODD[2:9]]
    long = " ".join(sentences(data, count=12))
    pairs = questions(data, "en")
    if task == "text-classification":
        ways: list[Call] = [((text, "and 東京 then"), {"long": "window"}) for text in texts[:4]]
        ways += [(long, {"long": "window"}), (long, {"long": "window", "overlap": 5}), (long, {"long": "truncate"})]
        ways += [((long[:90], long), {"long": way}) for way in ("window", "truncate")]
        ways += [((long, long[:90]), {"long": "truncate"}), (texts[0], {"top_k": 2})]
        ways += [(texts[1], {"scores": scores}) for scores in ("softmax", "none", "sigmoid")]
        return [*((text, {"long": "window"}) for text in texts), *ways]
    if task == "token-classification":
        kinds = ("none", "simple", "first", "average", "max", "tokens")
        ways = [(text, {"aggregation": kind, "long": "window"}) for text in [*texts, long] for kind in kinds]
        for words in ("tokenizer", "spaces"):
            ways += [(text, {"aggregation": "first", "words": words, "long": "truncate"}) for text in texts]
        return [*ways, (long, {"long": "window", "overlap": 30, "ignore_labels": ["PER"], "aggregation": "simple"})]
    if task == "question-answering":
        more = [*questions(data, "zh", count=2), *questions(data, "ru", count=2), (pairs[0][0] * 4, pairs[0][1])]
        ways = [(pairs[1], {"top_k": 4}), (pairs[2], {"top_k": 3, "align_to_words": False, "max_answer_length": 4})]
        ways += [(pairs[0], {"no_answer": True, "top_k": 2}), (pairs[0], {"max_length": 50, "overlap": 10})]
        return [*((pair, {}) for pair in [*pairs, *more]), *ways]
    if task == "fill-mask":
        blanks = [text.replace(" the ", f" {mask} ", 1) for text in sentences(data) if " the " in text]
        ways = [(f"{mask} and {mask}, naïve", {"top_k": 3}), (f"{mask} {long}", {"long": "truncate", "top_k": 2})]
        ways += [(f"{long} {mask} {long} {mask}", {"long": "window"}), (f"I {mask} you", {"targets": ["he", "she"]})]
        return [*((text, {"long": "window"}) for text in blanks), *ways]
    ways = [([long, texts[0]], {"long": way}) for way in ("truncate",)]
    for pooling in ("mean", "max"):
        ways += [([*texts, long], {"pooling": pooling, "long": "window", "normalize": pooling == "max"})]
    ways += [([*texts, long], {"pooling": pooling, "long": "truncate"}) for pooling in ("cls", "last")]
    return [*ways, (queries(data), {"pooling": "mean"}), (texts[:2], {"pooling": "none", "long": "truncate"})]


def to_input(task: str, example: Any) -> dict[str, Any]:
    """Return what JavaScript is given for an example of Python's."""
    if task == "question-answering":
        return dict(zip(("question", "context"), example, strict=True))
    if task == "feature-extraction":
        return {"texts": example}
    return dict(zip(("text", "pair"), example, strict=True)) if isinstance(example, tuple) else {"text": example}


def ask_python(folder: Path, task: str, calls: list[Call]) -> list[Any]:
    """Return the answers of lmworks' predictor over the same graph, as JSON."""
    predictor = lmworks.load(folder, task, runtime="onnx", threads=1)
    answers = []
    for example, options in calls:
        given = plain(
            [*predictor(example, **options)] if task == "feature-extraction" else predictor(example, **options)
        )
        answers.append({"embeddings": given} if task == "feature-extraction" else given)
    return answers


CELLS: dict[str, tuple[str, str, str, dict[str, Any]]] = {  # family, head, task, what is special
    "bert labels": ("bert", "SequenceClassification", "text-classification", {}),
    "bert names": ("bert", "TokenClassification", "token-classification", {}),
    "bert answers": ("bert", "QuestionAnswering", "question-answering", {}),
    "bert blanks": ("bert", "MaskedLM", "fill-mask", {}),
    "bert vectors": ("bert", "Model", "feature-extraction", {}),
    "roberta several labels": (
        "roberta",
        "SequenceClassification",
        "text-classification",
        {"problem_type": "multi_label_classification"},
    ),
    "roberta names": ("roberta", "TokenClassification", "token-classification", {}),
    "roberta answers": ("roberta", "QuestionAnswering", "question-answering", {}),
    "distilbert number": (
        "distilbert",
        "SequenceClassification",
        "text-classification",
        {"num_labels": 1, "problem_type": "regression"},
    ),
    "distilbert blanks": ("distilbert", "MaskedLM", "fill-mask", {}),
    "modernbert names": ("modernbert", "TokenClassification", "token-classification", {}),
    "modernbert vectors": ("modernbert", "Model", "feature-extraction", {}),
    "gpt2 labels": ("gpt2", "SequenceClassification", "text-classification", {}),
}


@pytest.fixture(scope="module")
def answered(data_folder, tmp_path_factory) -> dict[str, tuple[list[Call], list[Any], list[Any]]]:
    """For each cell the calls, Python's answers, JavaScript's."""
    jobs, asked, known = [], [], []
    for name, (case, head, task, extra) in CELLS.items():
        place = tmp_path_factory.mktemp("cell")
        weights = make_model(case, head, place / "weights", data_folder, **extra)
        if name == "bert vectors":
            recipe(weights)
        export_graphs(weights, place / "graphs", dtypes=["fp32"])
        calls = calls_of(task, data_folder, "<mask>" if case == "roberta" else "[MASK]")
        inputs = [{"input": to_input(task, example), "options": options} for example, options in calls]
        jobs.append({"folder": str(place / "graphs"), "task": task, "dtype": "fp32", "calls": inputs})
        asked.append(calls)
        known.append(ask_python(place / "graphs", task, calls))
    return dict(zip(CELLS, zip(asked, known, ask({"jobs": jobs}), strict=True), strict=True))


@pytest.mark.parametrize("name", list(CELLS))
def test_every_task_answers_as_python(answered, name):
    """Same keys in the same order, same words, same characters, scores within 1e-4."""
    for (example, options), known, given in zip(*answered[name], strict=True):
        assert differ(given, known) < CLOSE, (example, options, given, known)


@pytest.mark.slow
@pytest.mark.parametrize("task", [
    "text-classification", "token-classification", "question-answering", "fill-mask", "feature-extraction",
])  # fmt: skip
def test_minilm_answers_as_python(task, data_folder, tmp_path):
    """Real weights, fitted for a moment, on real texts: fp32 as Python, int8 with the same decisions mostly."""
    graphs = tmp_path / "graphs"
    export_graphs(make_head(task, data_folder, tmp_path / "weights"), graphs, dtypes=["fp32", "int8"])
    calls = [call for call in calls_of(task, data_folder, "[MASK]") if call[1].get("ignore_labels") is None]
    inputs = [{"input": to_input(task, example), "options": options} for example, options in calls]
    jobs = [{"folder": str(graphs), "task": task, "dtype": dtype, "calls": inputs} for dtype in ("fp32", "int8")]
    known = ask_python(graphs, task, calls)
    given, rough = ask({"jobs": jobs})
    for (example, options), a, b in zip(calls, known, given, strict=True):
        assert differ(b, a) < CLOSE, (example, options, b, a)
    assert not any("error" in answer for answer in rough if isinstance(answer, dict))
    assert differ(rough, given) > CLOSE  # another graph was read


BAD: list[tuple[str, Any, dict[str, Any], str]] = [  # cell, input, options, what the message says
    ("bert labels", {"text": "long " * 99}, {}, "longer than the model"),
    ("bert labels", {}, {}, "no text"),
    ("bert labels", {"text": "a"}, {"top_k": 0}, "top_k"),
    ("bert labels", {"text": "a"}, {"long": "cut"}, "long must be"),
    ("bert labels", {"text": "a"}, {"agregation": "first"}, "agregation"),
    ("bert answers", {"question": " ", "context": "a"}, {}, "question is empty"),
    ("bert answers", {"question": "a " * 70, "context": "a"}, {}, "no room"),
    ("bert blanks", {"text": "a ___ b"}, {}, "not ___"),
    ("bert blanks", {"text": "[MASK]"}, {"targets": ["supercalifragilistic"]}, "supercali"),
    ("bert blanks", {"text": "a " * 99 + "[MASK]"}, {"long": "truncate"}, "cut off"),
    ("bert vectors", {"texts": ["a"]}, {"pooling": "cls", "long": "window"}, "windows"),
]


def test_bad_input_is_one_sentence_and_breaks_nothing(data_folder, tmp_path):
    jobs = []
    for name in dict.fromkeys(cell for cell, *_ in BAD):
        case, head, task, extra = CELLS[name]
        export_graphs(
            make_model(case, head, tmp_path / name / "w", data_folder, **extra), tmp_path / name / "g", dtypes=["fp32"]
        )
        calls = [{"input": given, "options": options} for cell, given, options, _ in BAD if cell == name]
        fine = to_input(
            task, ("a", "b") if task == "question-answering" else ["a"] if "extraction" in task else "a [MASK]"
        )
        jobs.append(
            {
                "folder": str(tmp_path / name / "g"),
                "task": task,
                "dtype": "fp32",
                "calls": [*calls, {"input": fine, "options": {}}],
            }
        )
    found = ask({"jobs": jobs})
    for answers in found:
        assert "error" not in answers[-1]
    given = [answer for answers in found for answer in answers[:-1]]
    for (name, _, _, text), answer in zip(BAD, given, strict=True):
        assert answer["name"] == "InputError", (name, answer)
        assert text in answer["error"], (name, answer)


def test_the_self_test_is_answered_and_compared(data_folder, tmp_path):
    """verify_node.mjs: first windows, logits, answers, ids of texts; compareTask finds what was changed."""
    export_graphs(
        make_model("roberta", "QuestionAnswering", tmp_path / "w", data_folder), tmp_path / "g", dtypes=["fp32", "q4"]
    )
    pairs, options = questions(data_folder, "en"), {"top_k": 1}
    predictor = lmworks.load(tmp_path / "g", runtime="onnx", dtype="fp32", threads=1)
    items = []
    for pair in pairs:
        feature = predictor.make().encode([pair])[0]
        logits = predictor.runtime.run({"input_ids": np.array([feature.inputs["input_ids"]])})["logits"][0]
        held = base64.b64encode(logits.astype("<f4").tobytes()).decode()
        known = {"ids": feature.inputs["input_ids"], "logits": held, "output": plain(predictor(pair))}
        items.append({"input": to_input("question-answering", pair), **known})
    node = find_node()
    texts = [{"text": text, "ids": predictor.tokenizer.encode_inputs([text])[0].ids} for text in ODD]
    work = {
        "modules": str(find_modules(node)),
        "folder": str(tmp_path / "g"),
        "task": "question-answering",
        "threads": 1,
    }
    script = Path(lmworks.__file__).parent / "export" / "verify_node.mjs"
    answers = {}
    for dtype in ("fp32", "q4"):
        stdin = json.dumps({**work, "dtype": dtype, "items": items, "texts": texts, "options": options})
        done = subprocess.run([str(node), str(script)], input=stdin, capture_output=True, text=True, check=False)
        answers[dtype] = json.loads(done.stdout)
        assert answers[dtype].get("texts") == [one["ids"] for one in texts], answers[dtype]
    wrong = json.loads(json.dumps(answers["fp32"]["answers"]))
    wrong[1]["output"]["start"] += 1
    wrong[2]["ids"][1] += 1
    rows = [
        ["question-answering", given, items, options]
        for given in (answers["fp32"]["answers"], wrong, answers["q4"]["answers"])
    ]
    fine, changed, rough = ask({"comparisons": rows})
    assert (fine["equal"], fine["checked"], fine["ids"]) == (3, 3, None)
    assert fine["difference"] < CLOSE
    for row, given in zip((fine, rough), ("fp32", "q4"), strict=True):  # the same measures as in Python
        both = zip(answers[given]["answers"], items, strict=True)
        pairs = [(from_base64(a["logits"]), from_base64(b["logits"])) for a, b in both]
        assert {"max_abs_diff": row["difference"], "rms_diff": row["rms"]} == pytest.approx(measure_gaps(pairs))
    assert (changed["equal"], changed["checked"], changed["ids"]) == (2, 3, 2)
    assert CLOSE < rough["difference"] < 20


def test_decisions_are_counted_by_task():
    empty = base64.b64encode(b"").decode()

    def compare(task: str, given: Any, known: Any, **options: Any) -> list[Any]:
        return [task, *([{"ids": [], "logits": empty, "output": one}] for one in (given, known)), options]

    labels = [[{"label": "a", "score": 0.9}, {"label": "b", "score": s}] for s in (0.6, 0.4)]
    names = [[{"label": label, "score": 0.5, "word": "x", "start": s, "end": s + 1} for label, s in rows]
             for rows in ([("a", 0), ("b", 3)], [("a", 0), ("a", 3), ("b", 7)])]  # fmt: skip
    fills = [[[{"token": token}] for token in row] for row in ([5, 6], [5, 7])]
    vectors = [{"embeddings": [[1, 0], [x, 1 - x], [0, 1]]} for x in (0.9, 0.1)]
    answers = [({"text": "a", "score": 1, "start": s, "end": 9}) for s in (1, 2)]
    found = ask({"comparisons": [
        compare("text-classification", *labels, scores="softmax"),
        compare("text-classification", *labels, scores="sigmoid"),
        compare("image-classification", labels[0], labels[0]), compare("token-classification", *names),
        compare("token-classification", [], []), compare("fill-mask", *fills), compare("feature-extraction", *vectors),
        compare("question-answering", *answers),
    ]})  # fmt: skip
    assert [(one["equal"], one["checked"]) for one in found] == [
        (1, 1),
        (0, 1),
        (1, 1),
        (1, 4),
        (1, 1),
        (1, 2),
        (2, 3),
        (0, 1),
    ]


def test_refusals_of_python_are_refusals_here(data_folder, tmp_path):
    """The calls that Python refuses are those that JavaScript refuses."""
    export_graphs(
        make_model("bert", "TokenClassification", tmp_path / "w", data_folder), tmp_path / "g", dtypes=["fp32"]
    )
    predictor = lmworks.load(tmp_path / "g", runtime="onnx", threads=1)
    calls: list[Call] = [
        ("a " * 90, {}),
        ("a", {"ignore_labels": ["X"]}),
        ("a", {"aggregation": "last"}),
        ("a", {"overlap": -1}),
    ]
    calls += [("a " * 90, {"long": "window", "overlap": 62})]
    inputs = [{"input": {"text": text}, "options": options} for text, options in calls]
    job = {"folder": str(tmp_path / "g"), "task": "token-classification", "dtype": "fp32", "calls": inputs}
    for (text, options), given in zip(calls, ask({"jobs": [job]})[0], strict=True):
        with pytest.raises(LmworksError):
            predictor(text, **options)
        assert given["name"] == "InputError", given


def test_fewer_heads_than_published_configs_can_say(data_folder, tmp_path):
    """Positions of RoBERTa still begin after the padding's; a cache of other heads is refused."""
    how = Pruning(structured=True, sparsity=0.1, heads=0.5)
    prune(make_model("roberta", "SequenceClassification", tmp_path / "model", data_folder), tmp_path / "small", how=how)
    small = tmp_path / "web"
    export_graphs(tmp_path / "small", small, to="web", dtypes=["fp32"])
    text = " ".join(sentences(data_folder))
    job = {"folder": str(small), "task": "text-classification", "dtype": "fp32"}
    (found,) = ask({"jobs": [{**job, "calls": [{"input": {"text": text}, "options": {"long": "window"}}]}]})
    known = lmworks.load(small, runtime="onnx", dtype="fp32")(text, long="window")
    assert differ(found[0], plain(known)) < CLOSE
    writer = tmp_path / "writer"
    save_reference("gpt2", writer)
    wordpiece().save(str(writer / "tokenizer.json"))
    prune(writer, tmp_path / "writes", how=how)
    with pytest.raises(InputError, match="cache"):
        export_graphs(tmp_path / "writes", tmp_path / "none", to="web", dtypes=["fp32"])
