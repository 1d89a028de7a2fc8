"""What a load test asks: the route that fits the model, and bodies made of real texts.

    route                                        asks, of each text
    /classify /ner /fill-mask /predict           {"text"} ({"input_text"} for /predict); a pair of texts has its second
    /qa                                          {"question", "context"}
    /embed /tokenize /similarity /rerank         as text-embeddings-inference
    /generate /v1/completions /v1/chat/completions   a stream, so that the first token is timed
    /v1/embeddings                               {"input"}

Without a file the texts are those of the built-in language.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmworks.base.errors import FormatError, InputError, did_you_mean
from lmworks.serve.load_client import Connection, Target, message_of
from lmworks.text.labelled import read_labelled
from lmworks.text.read import read_documents
from lmworks.text.sample import Language, make_documents

CLASSIFY, TAG, QA = "text-classification", "token-classification", "question-answering"
FILL, EMBED, WRITE = "fill-mask", "feature-extraction", "text-generation"
OWN = {CLASSIFY: "/classify", TAG: "/ner", QA: "/qa", FILL: "/fill-mask", EMBED: "/embed", WRITE: "/generate"}
MADE = 200  # documents of the built-in language
NEAR = 4  # texts that one is compared with
BEGIN = 6  # words of a sentence that a text is to go on from


@dataclass(frozen=True)
class Plan:
    """Where requests go, and the body of each; they come round again where there are fewer than requests."""

    route: str
    model: str | None
    task: str | None
    bodies: list[dict[str, Any]]
    own: bool  # the server is ours: it has /info and /metrics

    @property
    def streams(self) -> bool:
        """Whether answers are streams of text."""
        return bool(self.bodies[0].get("stream"))


def embed(texts: Sequence[Any], i: int) -> dict[str, Any]:
    """Return the body of /embed."""
    return {"inputs": texts[i]}


def compare(texts: Sequence[Any], i: int) -> dict[str, Any]:
    """Return the body of /similarity."""
    return {"inputs": {"source_sentence": texts[i], "sentences": others(texts, i)}}


def rank(texts: Sequence[Any], i: int) -> dict[str, Any]:
    """Return the body of /rerank."""
    return {"query": texts[i], "texts": others(texts, i)}


def others(texts: Sequence[Any], i: int) -> list[Any]:
    """Return a few other texts."""
    return [texts[(i + k) % len(texts)] for k in range(1, NEAR + 1)]


def judge(texts: Sequence[Any], i: int) -> dict[str, Any]:
    """Return the body of /classify, of a text or of a pair."""
    first, *second = [texts[i]] if isinstance(texts[i], str) else texts[i]
    return {"text": first, "pair": second[0]} if second else {"text": first}


ROUTES: dict[str, tuple[tuple[str, ...], Callable[[Sequence[Any], int], dict[str, Any]]]] = {
    "/classify": ((CLASSIFY,), judge),
    "/ner": ((TAG,), lambda texts, i: {"text": texts[i]}),
    "/qa": ((QA,), lambda texts, i: {"question": texts[i][0], "context": texts[i][1]}),
    "/fill-mask": ((FILL,), lambda texts, i: {"text": texts[i]}),
    "/predict": ((CLASSIFY, TAG, EMBED, FILL, WRITE), lambda texts, i: {"input_text": texts[i]}),
    "/embed": ((EMBED,), embed),
    "/similarity": ((EMBED,), compare),
    "/rerank": ((EMBED, CLASSIFY), rank),
    "/tokenize": ((CLASSIFY, TAG, QA, FILL, EMBED, WRITE), embed),
    "/generate": ((WRITE,), lambda texts, i: {"prompt": texts[i], "stream": True}),
    "/v1/completions": ((WRITE,), lambda texts, i: {"prompt": texts[i], "stream": True}),
    "/v1/chat/completions": ((WRITE,), lambda texts, i: {"messages": turns(texts[i]), "stream": True}),
    "/v1/embeddings": ((EMBED,), lambda texts, i: {"input": texts[i]}),
}
COUNTED = ("/v1/completions", "/v1/chat/completions")  # whose streams tell how many tokens they have, if asked to


def turns(text: Any) -> list[dict[str, str]]:
    """Return a conversation."""
    return text if isinstance(text, list) else [{"role": "user", "content": text}]


async def make_plan(
    target: Target, *, route: str | None, model: str | None, data: Path | None, column: str | None, max_tokens: int,
) -> Plan:  # fmt: skip
    """Ask the server what it serves, and plan requests that it can answer; the first is tried.

    Raises InputError where there is no server, no such model or route, a wrong key, or a request that it refuses.
    """
    connection = Connection(target)
    try:
        info = await get(connection, "/info")
        own = isinstance(info, dict) and isinstance(info.get("models"), list)
        listed = info["models"] if own else await find_models(connection)
        route, model, task = choose(listed, route, model)
        texts = read_texts(data, task, column, chat=route == "/v1/chat/completions")
        if task == FILL:
            mask = next((one.get("mask") for one in listed if one["name"] == model), None) or "[MASK]"
            texts = [text if mask in text else hide(text, mask) for text in texts]
        bodies = [ROUTES[route][1](texts, i) for i in range(len(texts))]
        for body in bodies:
            if model is not None:
                body["model"] = model
            if (task == WRITE and "prompt" in body) or "messages" in body:
                body |= {"max_tokens": max_tokens, "temperature": 0.0}
            if route in COUNTED:
                body["stream_options"] = {"include_usage": True}
        await check(connection, route, bodies[0])
        return Plan(route, model, task, bodies, own)
    finally:
        connection.close()


async def get(connection: Connection, path: str) -> Any:
    """Return what a server says of itself; None where it has no such page. Raises InputError."""
    answer = await connection.ask("GET", path)
    if not answer.status:
        raise InputError("there is no server at this address", where=connection.target.url, found=answer.error or "",
                         fix="start one, such as: lmworks serve MODEL --port 8000")  # fmt: skip
    refuse_key(answer.status, connection.target)
    return answer.json() if answer.status == 200 else None


def refuse_key(status: int, target: Target) -> None:
    """Raise InputError for a server that wants another key."""
    if status in (401, 403):
        found = "no key" if target.key is None else "a key that it does not know"
        raise InputError("the server refuses the key", where=target.url, found=found, fix="give --api-key-file FILE")


async def find_models(connection: Connection) -> list[dict[str, Any]]:
    """Return the models of a server that speaks OpenAI's interface; none where it does not."""
    found = await get(connection, "/v1/models")
    listed = found.get("data") if isinstance(found, dict) else None
    return [{"name": one["id"], "task": None} for one in listed or () if isinstance(one, dict) and "id" in one]


def choose(listed: list[dict[str, Any]], route: str | None, model: str | None) -> tuple[str, str | None, str | None]:
    """Return a route and a model that go together, and what the model does. Raises InputError."""
    if route is not None and route not in ROUTES:
        raise InputError("a load test knows no such route", found=f"{route}{did_you_mean(route, ROUTES)}",
                         expected=", ".join(ROUTES))  # fmt: skip
    if model is not None and model not in (names := [one["name"] for one in listed]):
        if any(one["task"] for one in listed):
            raise InputError("the server has no such model", found=model, expected=", ".join(names))
        listed = [{"name": model, "task": None}]  # not ours: its list may leave models out
    candidates = [one for one in listed if model in (None, one["name"])]
    if route is not None:
        tasks = ROUTES[route][0]
        fitting = [one for task in (None, *tasks) for one in candidates if one["task"] == task]
        if candidates and not fitting:
            tell = ", ".join(f"{one['name']}: {one['task']}" for one in candidates)
            raise InputError(f"no model here answers {route}", found=tell, expected=" or ".join(tasks))
        chosen = fitting[0] if fitting else {"name": model, "task": None}
        return route, chosen["name"], chosen["task"] or tasks[0]
    fitting = [one for one in candidates if one["task"] in OWN]
    if not fitting:
        raise InputError("what this server does is not known", fix=f"say --route, one of {', '.join(ROUTES)}")
    return OWN[fitting[0]["task"]], fitting[0]["name"], fitting[0]["task"]


async def check(connection: Connection, route: str, body: dict[str, Any]) -> None:
    """Ask once, which also loads a model that is not loaded yet. Raises InputError where this is refused."""
    answer = await connection.ask("POST", route, body)
    refuse_key(answer.status, connection.target)
    if answer.error is not None:
        what = "the server is busy" if answer.status in (429, 503) else "the server refuses the first request"
        fix = "try again later" if answer.status in (429, 503) else ""
        raise InputError(what, where=f"POST {connection.target.url}{route}", found=message_of(answer), fix=fix)


def read_texts(path: Path | None, task: str | None, column: str | None, *, chat: bool = False) -> list[Any]:
    """Return the texts of a file for a task, or those of the built-in language. Raises InputError."""
    if path is None:
        return made(task)
    try:
        kind = CLASSIFY if task in (EMBED, FILL, None) else task
        read = read_labelled(path, kind, text_column=column, header=not (column or "").isdigit())
        examples = [plain(example, task, chat) for example in read.examples]
    except (InputError, FormatError):
        if task == QA:
            raise
        documents = read_documents(path, column=column)
        is_table = path.suffix.lower() in (".csv", ".tsv", ".jsonl")
        examples = [line for one in documents for line in ([one.text] if is_table else one.text.splitlines())]
    found = [one for one in examples if not isinstance(one, str) or one.strip()]
    if not found:
        raise InputError("there is no text here", where=str(path))
    return found


def plain(example: Any, task: str | None, chat: bool) -> Any:
    """Return what a request holds of an example: a text, a pair, a conversation up to its last answer."""
    if task == TAG:
        return " ".join(example)
    if isinstance(example, dict) and "messages" in example:
        asked = [turn for turn in example["messages"] if turn["role"] != "assistant"]
        last = example["messages"].index(asked[-1]) + 1 if asked else 1
        return example["messages"][:last] if chat else (asked or example["messages"])[-1]["content"]
    if isinstance(example, dict):
        return example["prompt"]
    return example[0] if task in (EMBED, FILL) and not isinstance(example, str) else example


def made(task: str | None) -> list[Any]:
    """Return texts of the built-in language."""
    language = Language()
    documents = [one.text for one in make_documents(MADE, seed=1, language=language)]
    if task == QA:
        return [(document.splitlines()[0].rstrip(".") + "?", " ".join(document.splitlines())) for document in documents]
    lines = [line for document in documents for line in document.splitlines()]
    return [" ".join(line.split()[:BEGIN]) for line in lines] if task == WRITE else lines


def hide(text: str, mask: str) -> str:
    """Return the text with a word in the middle hidden."""
    words = text.split()
    words[len(words) // 2] = mask
    return " ".join(words)
