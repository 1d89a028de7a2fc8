"""Models to serve: the real MiniLM with a head fitted for a moment, its vectors, and a tiny writer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from minilm_heads import MINILM, make_head
from serving import Running, server
from tiny_page import made_folder

from lmworks.export.onnx_folder import export_graphs


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    """Sentiment of reviews, exported: no weights of torch are left in the folder."""
    place = tmp_path_factory.mktemp("served")
    export_graphs(make_head("text-classification", data_folder, place / "made"), place / "sentiment")
    return place / "sentiment"


@pytest.fixture(scope="session")
def tagger(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    """Names in tweets."""
    place = tmp_path_factory.mktemp("served")
    export_graphs(make_head("token-classification", data_folder, place / "made"), place / "names")
    return place / "names"


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM as it was published."""
    folder = tmp_path_factory.mktemp("served") / "minilm"
    export_graphs(MINILM, folder)
    return folder


@pytest.fixture(scope="session")
def served(classifier: Path, tagger: Path, embedder: Path) -> Iterator[Running]:
    """One server of four models."""
    with server(classifier, tagger, embedder, made_folder()) as one:
        yield one


@pytest.fixture(scope="session")
def reviews(data_folder: Path) -> list[str]:
    """Sentences of films' reviews."""
    lines = (data_folder / "sst2" / "dev.tsv").read_text("utf-8").splitlines()
    return [line.rsplit("\t", 1)[0] for line in lines[:200]]
