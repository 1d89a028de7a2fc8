"""The routes of the tasks: what they answer is what `lmworks` answers without a server."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import transformers
from huggingface_hub import InferenceClient
from serving import Running, server
from tiny_page import PROMPTS, made_folder

from lmworks.runtime.predictor import load

TEXT = "Ángel Müller flew from Paris to 東京 🗼 with a fine, if slightly dull, film."


def test_classify(served: Running, classifier: Path) -> None:
    predictor = load(classifier, runtime="onnx")
    body = {"text": [TEXT, "a dull film"], "top_k": 1}
    answers = served.post("/classify", body).json()["answers"]
    for text, answer in zip(body["text"], answers, strict=True):
        expected = predictor(text, top_k=1)[0]
        assert answer["label"] == expected.label
        assert answer["score"] == pytest.approx(expected.score, abs=1e-6)
        assert answer["labels"] == [{"label": answer["label"], "score": answer["score"]}]
    pair = served.post("/classify", {"text": "a film", "pair": "it is dull"}).json()["answers"][0]
    assert pair["score"] == pytest.approx(predictor(("a film", "it is dull"))[0].score, abs=1e-6)
    long = "a fine film " * 400
    assert served.post("/classify", {"text": long}).json()["error"]["code"] == "context_length_exceeded"
    window = served.post("/classify", {"text": long, "long": "window"}).json()["answers"][0]
    assert window["score"] == pytest.approx(predictor(long, long="window")[0].score, abs=1e-6)


def test_predict_by_body_and_by_address(served: Running, classifier: Path) -> None:
    expected = load(classifier, runtime="onnx")(TEXT)[0]
    for answer in (
        served.post("/predict", {"input_text": TEXT}),
        httpx.get(f"{served.base}/predict/{quote(TEXT, safe='')}", timeout=30),
    ):
        said = answer.json()
        assert (said["input_text"], said["prediction"]) == (TEXT, expected.label)
        assert said["score"] == pytest.approx(expected.score, abs=1e-6)
    names = served.post("/predict", {"input_text": TEXT, "model": "names"}).json()
    assert names["task"] == "token-classification"
    assert names["prediction"] == served.post("/ner", {"text": TEXT}).json()["answers"][0]["entities"]


def test_ner_counts_characters(served: Running, tagger: Path) -> None:
    expected = [asdict(entity) for entity in load(tagger, runtime="onnx", aggregation="first")(TEXT)]
    assert expected
    found = served.post("/ner", {"text": TEXT}).json()["answers"][0]["entities"]
    assert [(one["label"], one["start"], one["end"]) for one in found] == [
        (one["label"], one["start"], one["end"]) for one in expected
    ]
    assert all(TEXT[one["start"] : one["end"]] for one in found)


def test_vectors_similarity_rerank_and_tokens(served: Running, embedder: Path) -> None:
    predictor = load(embedder, runtime="onnx")
    texts = ["a cat", "a kitten", "tax law"]
    expected = np.stack(predictor(texts))
    assert np.abs(np.array(served.post("/embed", {"inputs": texts}).json()) - expected).max() < 1e-6
    cosines = expected[1:] @ expected[0]
    body = {"inputs": {"source_sentence": texts[0], "sentences": texts[1:]}}
    assert served.post("/similarity", body).json() == pytest.approx(cosines.tolist(), abs=1e-6)
    body = {"query": texts[0], "texts": texts[:0:-1], "return_text": True, "model": "minilm"}
    ranked = served.post("/rerank", body).json()
    assert [(one["index"], one["text"]) for one in ranked] == [(1, "a kitten"), (0, "tax law")]
    assert served.post("/rerank", {"query": "a", "texts": ["b"]}).status_code == 400, "two labels rank nothing"
    [tokens] = served.post("/tokenize", {"inputs": "Ünïted naïveté", "model": "minilm"}).json()
    encoding = predictor.tokenizer.encode_inputs(["Ünïted naïveté"])[0]
    assert [token["id"] for token in tokens] == encoding.ids
    assert [(token["start"], token["stop"]) for token in tokens] == encoding.offsets
    assert [token["special"] for token in tokens][:2] == [True, False]


def test_generate_streams_events_that_end_in_the_whole(served: Running) -> None:
    predictor = load(made_folder(), runtime="onnx")
    expected = predictor.generate(PROMPTS[0], max_tokens=12)
    body = {"prompt": PROMPTS[0], "max_tokens": 12}
    with httpx.stream("POST", f"{served.base}/generate", json=body, timeout=30) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line]
    assert "".join(event["text"] for event in events[:-1]) == events[-1]["text"] == expected.text
    assert events[-1]["tokens"] == expected.tokens
    whole = served.post("/generate", {**body, "stream": False}).json()
    assert (whole["text"], whole["finish_reason"]) == (expected.text, expected.finish_reason)


def test_hugging_face_shapes_are_those_of_its_pipelines(
    served: Running, classifier: Path, tagger: Path, embedder: Path
) -> None:
    def infer(name: str, inputs: object, **parameters: object) -> Any:
        answer = served.post(f"/models/{name}", {"inputs": inputs, "parameters": parameters})
        assert answer.status_code == 200, answer.text
        return answer.json()

    made = {folder: folder.parent / "made" for folder in (classifier, tagger)}
    classify = transformers.pipeline("text-classification", model=str(made[classifier]), top_k=2)
    for found, expected in zip(infer("sentiment", [TEXT, "dull"], top_k=2), classify([TEXT, "dull"]), strict=True):
        assert [one["label"] for one in found] == [one["label"] for one in expected]
        assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-5)
    tag = transformers.pipeline("token-classification", model=str(made[tagger]))
    for strategy in ("simple", "first"):
        found, expected = infer("names", TEXT, aggregation_strategy=strategy), tag(TEXT, aggregation_strategy=strategy)
        assert [set(one) for one in found] == [set(one) for one in expected]
        assert [(one["entity_group"], one["word"], one["start"], one["end"]) for one in found] == [
            (one["entity_group"], one["word"], one["start"], one["end"]) for one in expected
        ]
    found, expected = infer("names", TEXT, aggregation_strategy="none"), tag(TEXT, aggregation_strategy="none")
    assert [(one["entity"], one["index"], one["word"]) for one in found] == [
        (one["entity"], one["index"], one["word"]) for one in expected
    ]
    cosine = infer("minilm", {"source_sentence": "a cat", "sentences": ["a kitten"]})
    assert (
        cosine == served.post("/similarity", {"inputs": {"source_sentence": "a cat", "sentences": ["a kitten"]}}).json()
    )
    assert len(infer("minilm", "a cat")) == 384
    name = quote(made_folder().name)
    written = infer(name, PROMPTS[0], max_new_tokens=9)
    alone = load(made_folder(), runtime="onnx").generate(PROMPTS[0], max_tokens=9).text
    assert written == [{"generated_text": PROMPTS[0] + alone}]
    assert infer(name, PROMPTS[0], max_new_tokens=9, return_full_text=False) == [{"generated_text": alone}]
    assert infer(name, [PROMPTS[0]] * 2, max_new_tokens=9) == [written, written], "a list for each text"
    beside = {"inputs": ["a cat"], "normalize": False, "truncate": True}  # as huggingface_hub sends them
    assert np.linalg.norm(served.post("/models/minilm", beside).json()) > 2
    assert served.post("/models/sentiment", {"inputs": "a", "normalize": True}).status_code == 400
    for body in (
        {"inputs": "a", "parameters": {"aggregation_strategy": "first"}},
        {"inputs": {"question": "a", "context": "b"}},
    ):
        assert served.post("/models/sentiment", body).status_code == 400


def test_hugging_faces_own_client_writes_and_streams(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the address is of this machine
    client, address = InferenceClient(), f"{served.base}/models/{quote(made_folder().name)}"
    alone = load(made_folder(), runtime="onnx").generate(PROMPTS[0], max_tokens=9)
    pieces = list(client.text_generation(PROMPTS[0], model=address, max_new_tokens=9, stream=True))
    assert "".join(pieces) == alone.text and len(pieces) > 4
    *parts, last = client.text_generation(PROMPTS[0], model=address, max_new_tokens=9, stream=True, details=True)
    assert "".join(part.token.text for part in parts) == last.generated_text == alone.text
    assert (last.details.finish_reason, last.details.generated_tokens, last.index) == ("length", 9, 9)
    assert all(part.token.logprob < 0 for part in parts) and last.token.id == alone.tokens[-1]
    whole = client.text_generation(
        PROMPTS[0], model=address, max_new_tokens=9, details=True, return_full_text=False, repetition_penalty=1.0
    )
    assert whole.generated_text == alone.text
    assert [token.id for token in whole.details.tokens] == alone.tokens
    assert sum(token.logprob for token in whole.details.tokens) == pytest.approx(
        sum(part.token.logprob for part in parts), abs=1e-4
    )
    ends = set()
    for seed in range(20):  # as hot as this the end token comes soon, and the stop string in vain
        hot: Any = {"max_new_tokens": 60, "do_sample": True, "temperature": 2.0, "seed": seed, "details": True}
        for stop, reason in ((["@no@"], "eos_token"), ([" "], "stop_sequence")):
            told = client.text_generation("Who", model=address, stop=stop, **hot).details
            ends |= {(told.finish_reason, reason, told.tokens[-1].special)}
    assert {("eos_token", "eos_token", True), ("stop_sequence", "stop_sequence", False)} <= ends
    assert not any(said == "stop_sequence" and reason == "eos_token" for said, reason, _ in ends)
    changed = client.text_generation(PROMPTS[0], model=address, max_new_tokens=30, repetition_penalty=3.0)
    expected = load(made_folder(), runtime="onnx").generate(PROMPTS[0], max_tokens=30, repeat_penalty=3.0)
    assert changed == PROMPTS[0] + expected.text
    for body in ({"inputs": ["a", "b"], "stream": True}, {"inputs": "a", "parameters": {"best_of": 2}}):
        assert served.post(f"/models/{quote(made_folder().name)}", body).status_code == 400
    assert served.post("/models/sentiment", {"inputs": "a", "stream": True}).status_code == 400


def test_other_tasks_have_routes(tmp_path: Path, data_folder: Path) -> None:
    from minilm_heads import make_head

    from lmworks.export.onnx_folder import export_graphs

    folders = []
    for task, name in (("question-answering", "answers"), ("fill-mask", "masks")):
        export_graphs(make_head(task, data_folder, tmp_path / f"{name}-made", steps=3), tmp_path / name)
        folders.append(tmp_path / name)
    with server(*folders) as one:
        question = {"question": "Who flew?", "context": TEXT}
        found = one.post("/qa", question).json()["answers"][0]
        expected = load(folders[0], runtime="onnx")((question["question"], question["context"]))
        assert (found["text"], found["start"], found["end"]) == (expected.text, expected.start, expected.end)
        fills = one.post("/fill-mask", {"text": "a fine [MASK].", "top_k": 3}).json()["answers"][0]["fills"]
        assert [fill["token"] for fill in fills] == [
            f.token for f in load(folders[1], runtime="onnx")("a fine [MASK].", top_k=3)
        ]
        none = one.post("/fill-mask", {"text": "no mask"})
        assert none.status_code == 400 and "mask" in none.json()["error"]["message"]
        wrong = one.post("/classify", {"text": "a"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "task_not_served")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/classify", {"text": 7}, "text"),
        ("/classify", {"text": []}, "text"),
        ("/classify", {"text": "a", "top_k": 0}, "top_k"),
        ("/classify", {"text": "a", "colour": 1}, "colour"),
        ("/classify", {"text": "a", "pair": ["b", "c"]}, "pair"),
        ("/embed", {"inputs": ["a"] * 65}, "inputs"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, "inputs"),
        ("/rerank", {"query": "a"}, "texts"),
        ("/generate", {"prompt": "a", "n": 2}, "n"),
        ("/predict", {"text": "a"}, "input_text"),
    ],
)
def test_a_bad_value_is_refused_by_name(path: str, body: dict[str, object], param: str, served: Running) -> None:
    answer = served.post(path, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
