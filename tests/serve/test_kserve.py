"""The Open Inference Protocol, by NVIDIA's client of it: metadata, health, tensors in and out, errors."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from serving import Running, server
from task_pages import made_page
from tritonclient.utils import InferenceServerException

import lmworks
from lmworks.serve.guard import MOST_BYTES, digest


@pytest.fixture(scope="module")
def client(served: Running) -> triton.InferenceServerClient:
    with triton.InferenceServerClient(served.base.removeprefix("http://")) as one:
        yield one


def ask(client: triton.InferenceServerClient, model: str, **inputs: list[str]) -> triton.InferResult:
    tensors = []
    for name, texts in inputs.items():
        tensor = triton.InferInput(name, [len(texts)], "BYTES")
        tensor.set_data_from_numpy(np.array(texts, object), binary_data=False)
        tensors.append(tensor)
    return client.infer(model, tensors)


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("sentiment") and client.is_model_ready("sentiment", "1")
    assert not client.is_model_ready("nobody") and not client.is_model_ready("sentiment", "2")
    assert client.get_server_metadata()["name"] == "lmworks"
    described = client.get_model_metadata("sentiment")
    assert described["platform"] == "lmworks_onnx" and described["versions"] == ["1"]
    assert described["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]


def test_labels_are_those_of_the_model(client, classifier: Path, tagger: Path, reviews: list[str]) -> None:
    texts = reviews[:5]
    found = ask(client, "sentiment", text=texts)
    known = lmworks.predict(classifier, texts, runtime="onnx", dtype="fp32")
    assert list(found.as_numpy("label")) == [labels[0].label for labels in known]
    np.testing.assert_allclose(found.as_numpy("score"), [labels[0].score for labels in known], atol=1e-6)
    assert found.get_output("score")["datatype"] == "FP32"
    [names] = ask(client, "names", text=["Ada lives in London"]).as_numpy("entities")
    found = lmworks.predict(tagger, ["Ada lives in London"], runtime="onnx", dtype="fp32", aggregation="first")
    assert [one["label"] for one in json.loads(names)] == [entity.label for entity in found[0]]


def test_vectors_come_row_by_row(client, embedder: Path) -> None:
    texts = ["it is cold", "how much money do I have"]
    found = ask(client, "minilm", text=texts).as_numpy("embedding")
    known = np.stack(lmworks.load(embedder, runtime="onnx", dtype="fp32")(texts))
    assert found.shape == known.shape == (2, 384)
    np.testing.assert_allclose(found, known, atol=1e-5)


def test_questions_have_two_inputs(data_folder: Path) -> None:
    folder = made_page("question-answering")
    with server(folder) as one, triton.InferenceServerClient(one.base.removeprefix("http://")) as client:
        question, context = "Where does Ada live?", "Ada lives in London."
        found = ask(client, folder.name, question=[question], context=[context])
        [known] = lmworks.predict(folder, [(question, context)], runtime="onnx", dtype="fp32")
        known = known[0] if isinstance(known, list) else known
        assert found.as_numpy("answer")[0] == known.text
        assert (found.as_numpy("start")[0], found.as_numpy("end")[0]) == (known.start, known.end)
        with pytest.raises(InferenceServerException, match="question, context"):
            ask(client, folder.name, question=[question])


def test_texts_are_written_whole_and_in_pieces(served: Running) -> None:
    name = next(model["name"] for model in httpx.get(f"{served.base}/info").json()["models"]
                if model["task"] == "text-generation")  # fmt: skip
    body = {"text_input": "Once", "parameters": {"max_tokens": 12}}
    whole = served.post(f"/v2/models/{name}/generate", body).json()
    assert whole["model_name"] == name and whole["done"] is True and whole["text_output"]
    own = served.post("/generate", {"prompt": "Once", "max_tokens": 12, "stream": False, "model": name}).json()
    assert whole["text_output"] == own["text"]
    lines = served.post(f"/v2/models/{name}/versions/1/generate_stream", body).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert "".join(one["text_output"] for one in events) == own["text"]
    assert [one["done"] for one in events] == [False] * (len(events) - 1) + [True]
    found = served.post(f"/v2/models/{name}/infer", infer(["Once"])).json()
    assert found["outputs"][0]["name"] == "text" and found["outputs"][0]["shape"] == [1]


def infer(texts: list, **more) -> dict:
    return {"inputs": [{"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": texts, **more}]}


@pytest.mark.parametrize(("body", "what"), [
    (infer(["a"], name="texts"), "reads text"),
    (infer(["a"], shape=[2]), "its shape says"),
    (infer([]), "its shape says"),
    (infer([1]), "must hold texts"),
    (infer(["a"], datatype="FP32"), "must hold texts"),
    (infer(["a"] * 65), "shape"),
    ({"inputs": []}, "inputs"),
    ({}, "inputs"),
    ([], "body"),
    ({**infer(["a"]), "outputs": [{"name": "logits"}]}, "there is no output logits"),
    ({"inputs": infer(["a"])["inputs"] * 2}, "the input text is given twice"),
    (infer(["word " * 2000]), "longer than the model"),
])  # fmt: skip
def test_errors_are_the_protocols(served: Running, body, what: str) -> None:
    answer = served.post("/v2/models/sentiment/infer", body)
    assert answer.status_code == 400 and list(answer.json()) == ["error"], answer.text
    assert what in answer.json()["error"]


def test_what_is_not_there(served: Running) -> None:
    for path, status in (("nobody/infer", 404), ("sentiment/versions/2/infer", 404), ("sentiment/generate", 400)):
        body = {"text_input": "a"} if path.endswith("generate") else infer(["a"])
        answer = served.post(f"/v2/models/{path}", body)
        assert answer.status_code == status and isinstance(answer.json()["error"], str)
    answer = httpx.post(
        f"{served.base}/v2/models/sentiment/infer", content=b"{", headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400 and isinstance(answer.json()["error"], str)
    chosen = {**infer([["a"], ["b"]], shape=[2, 1]), "id": "x", "outputs": [{"name": "label"}]}
    found = served.post("/v2/models/sentiment/infer", chosen).json()
    assert found["id"] == "x" and [one["name"] for one in found["outputs"]] == ["label"]
    whole = served.post("/v2/models/sentiment/infer", {**infer(["a"]), "outputs": []}).json()
    assert [one["name"] for one in whole["outputs"]] == ["label", "score"], "nothing is asked for by name: all"


def test_whoever_refuses_speaks_the_protocol(served: Running) -> None:
    """What the server's door, or its routes, turn away is told as the protocol has it, elsewhere as before."""
    for method, path, status in (("GET", "nix", 404), ("GET", "models/sentiment/infer", 405), ("POST", "x", 405)):
        answer = httpx.request(method, f"{served.base}/v2/{path}")
        assert answer.status_code in (status, 404) and isinstance(answer.json()["error"], str), answer.text
    large = httpx.post(f"{served.base}/v2/models/sentiment/infer", content=b"x" * (MOST_BYTES + 1))
    assert large.status_code == 413 and isinstance(large.json()["error"], str)
    assert isinstance(httpx.get(f"{served.base}/v2beta").json()["error"], dict)


def test_a_door_that_turns_everybody_away(embedder: Path) -> None:
    with server(embedder, keys=[digest("a-key")], most=0) as one:
        for path, kind in (("/v2/models/x", str), ("/v2", str), ("/info", dict)):
            answer = httpx.get(f"{one.base}{path}")
            assert answer.status_code == 401 and isinstance(answer.json()["error"], kind)
        key = {"authorization": "Bearer a-key"}
        for path, kind in ((f"/v2/models/{embedder.name}/infer", str), ("/embed", dict)):
            answer = one.post(path, {}, headers=key)
            assert answer.status_code == 429 and isinstance(answer.json()["error"], kind), answer.text
