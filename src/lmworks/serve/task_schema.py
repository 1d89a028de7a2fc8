"""What the routes of the tasks read: our own, those of text-embeddings-inference, and those of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lmworks.serve.schema import MOST_CHARACTERS, MOST_STOPS, MOST_TOKENS, Asked, Name, Text, Texts, Writing

Long = Literal["error", "truncate", "window"]
TopK = Annotated[int, Field(ge=1, le=1000)]


class TextsRequest(Asked):
    """One text or several."""

    text: Text | Texts
    model: Name | None = None
    long: Long = "error"

    @property
    def texts(self) -> list[str]:
        """Return a list in any case."""
        return [self.text] if isinstance(self.text, str) else self.text


class ClassifyRequest(TextsRequest):
    """The body of POST /classify; `pair` holds a second text for each."""

    pair: Text | Texts | None = None
    top_k: TopK | None = None
    scores: Literal["auto", "softmax", "sigmoid", "none"] = "auto"


class NerRequest(TextsRequest):
    """The body of POST /ner."""

    aggregation: Literal["none", "simple", "first", "average", "max"] = "first"


class FillRequest(TextsRequest):
    """The body of POST /fill-mask."""

    top_k: TopK = 5
    targets: Texts | None = None


class QaRequest(Asked):
    """The body of POST /qa."""

    question: Text
    context: Text
    model: Name | None = None
    top_k: Annotated[int, Field(ge=1, le=20)] = 1
    no_answer: bool = False
    max_answer_length: Annotated[int, Field(ge=1, le=1000)] | None = None


class PredictRequest(Asked):
    """The body of POST /predict."""

    input_text: Text
    model: Name | None = None


class GenerateRequest(Writing):
    """The body of POST /generate."""

    prompt: Text
    max_tokens: int = Field(128, ge=1, le=MOST_TOKENS)
    temperature: float = Field(0.0, ge=0, le=2)
    stream: bool = True


class EmbedRequest(Asked):
    """The body of POST /embed, as text-embeddings-inference reads it."""

    inputs: Text | Texts
    model: Name | None = None
    truncate: bool = False
    normalize: bool = True


class Sentences(Asked):
    """A sentence and those that it is compared with."""

    source_sentence: Text
    sentences: Texts


class SimilarityRequest(Asked):
    """The body of POST /similarity."""

    inputs: Sentences
    model: Name | None = None


class RerankRequest(Asked):
    """The body of POST /rerank."""

    query: Text
    texts: Texts
    model: Name | None = None
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool = False


class TokenizeRequest(Asked):
    """The body of POST /tokenize."""

    inputs: Text | Texts
    model: Name | None = None


class HubParameters(Asked):
    """The parameters of a Hugging Face request, for any task; those of another task are refused there."""

    neutral: ClassVar[Mapping[str, Any]] = {
        "best_of": 1, "decoder_input_details": False, "frequency_penalty": 0, "watermark": False, "adapter_id": None,
        "grammar": None, "top_n_tokens": None, "truncate": None, "typical_p": None,
    }  # fmt: skip

    top_k: TopK | None = None
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] | None = None
    max_new_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    do_sample: bool | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] | None = Field(None, max_length=MOST_STOPS)
    return_full_text: bool | None = None
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    details: bool | None = None
    truncation: bool | None = None
    targets: Texts | None = None
    normalize: bool | None = None


class Question(Asked):
    """The inputs of question answering."""

    question: Text
    context: Annotated[str, Field(max_length=MOST_CHARACTERS)]


class HubRequest(Asked):
    """The body of POST /models/NAME, as Hugging Face's inference interface reads it."""

    inputs: Text | Texts | Question | Sentences
    parameters: HubParameters | None = None
    stream: bool = False
    options: dict[Annotated[str, Field(max_length=40)], bool] | None = Field(None, max_length=10)
    normalize: bool | None = None  # where huggingface_hub puts the parameters of vectors
    truncate: bool | None = None

    def given(self) -> dict[str, Any]:
        """Return the parameters that were named, and not as null."""
        beside = (("normalize", self.normalize), ("truncation", self.truncate))
        return {name: value for name, value in (*beside, *(self.parameters or ())) if value is not None}
