"""Two small exported models with real weights: one that classifies, one that answers questions."""

from __future__ import annotations

from pathlib import Path

import pytest
from minilm_heads import make_head

from lmworks.export.onnx_folder import export_graphs


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    """Sentiment of reviews in fp32 and int8."""
    place = tmp_path_factory.mktemp("deployed")
    export_graphs(make_head("text-classification", data_folder, place / "made"), place / "Sentiment_1")
    return place / "Sentiment_1"


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    """Answers to questions."""
    place = tmp_path_factory.mktemp("deployed")
    export_graphs(make_head("question-answering", data_folder, place / "made"), place / "reader", dtypes=["fp32"])
    return place / "reader"
