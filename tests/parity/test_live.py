"""Published checkpoints, fetched and compared with transformers: `python -m pytest tests/parity/test_live.py -m live`.

These need the network and several gigabytes; they are never run by default. A stand-in for each, of the same class
but small and random, goes the same way without a network.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import transformers
import zoo
from tests.hub_server import HubServer

from lmworks.base.hub import OFFLINE, find_folder
from lmworks.export.parity import verify_against


@dataclass(frozen=True)
class Published:
    """A checkpoint on the Hub: its name, the commit that is meant (None: no commit is on record), and its class."""

    name: str
    revision: str | None
    architecture: str
    compared: str | None = None  # this head alone, where the file holds more than is meant

    def __str__(self) -> str:
        return self.name


CHECKPOINTS = (
    Published("bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594", "BertForMaskedLM", "Model"),
    Published("roberta-base", "e2da8e2f811d1448a5b465c236feacd80ffbac7b", "RobertaForMaskedLM", "Model"),
    Published("distilbert-base-uncased", "12040accade4e8a0f71eabdb258fecc2e7e948be", "DistilBertForMaskedLM", "Model"),
    Published(
        "nateraw/bert-base-uncased-emotion", "064d252021b51d95cd0547c89c6489100da0dc4c", "BertForSequenceClassification"
    ),
    Published("dslim/bert-base-NER", "d1a3e8f13f8c3566299d95fcfc9a8d2382a9affc", "BertForTokenClassification"),
    Published("csarron/bert-base-uncased-squad-v1", None, "BertForQuestionAnswering"),
    Published(
        "lxyuan/distilbert-base-multilingual-cased-sentiments-student", "d8ed71627ce46b610c8049429358333b6a392bc0",
        "DistilBertForSequenceClassification",
    ),
    Published("dslim/distilbert-NER", "dfa2838a127384aabb82ed7719e16dab84c42a2a", "DistilBertForTokenClassification"),
    Published(
        "distilbert-base-cased-distilled-squad", "564e9b582944a57a3e586bbb98fd6f0a4118db7f",
        "DistilBertForQuestionAnswering",
    ),
    Published(
        "cardiffnlp/twitter-roberta-base-sentiment-latest", "3216a57f2a0d9c45a2e6c20157c20c49fb4bf9c7",
        "RobertaForSequenceClassification",
    ),
    Published("Jean-Baptiste/roberta-large-ner-english", None, "RobertaForTokenClassification"),
    Published("deepset/roberta-base-squad2", "adc3b06f79f797d1c575d5479d6f5efe54a9e3b4", "RobertaForQuestionAnswering"),
)  # fmt: skip
CLOSE = 1e-5
FAMILIES = {"Bert": "bert", "Roberta": "roberta", "DistilBert": "distilbert"}


def prove(one: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetch a checkpoint, compare it, and hold the certificate to what is known of it."""
    for name in OFFLINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # read when it is imported
    folder = find_folder(one.name, revision=one.revision)
    found = verify_against(folder, head=one.compared, tolerance=CLOSE).values
    assert found["passed"], found["problems"]
    assert 0 < found["max_abs_diff"] <= CLOSE
    head = one.compared or one.architecture.partition("For")[2]
    assert found["compared"] == list(dict.fromkeys((head, "Model")))
    assert found["round_trip"]["passed"] and found["reference"]["version"] == transformers.__version__
    assert one.revision is None or folder.name == one.revision


@pytest.mark.live
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("one", CHECKPOINTS, ids=str)
def test_published(one: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """R94-R99: 1e-5 on the published weights."""
    prove(one, monkeypatch)


@pytest.mark.parametrize("one", CHECKPOINTS, ids=str)
def test_a_stand_in_goes_the_same_way(one: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same class under the same name and commit, from a Hub on this machine."""
    family, _, head = one.architecture.partition("For")
    reference = zoo.make_reference(FAMILIES[family], head)
    assert type(reference).__name__ == one.architecture
    reference.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    with HubServer() as server:
        commit = server.add_folder(one.name, tmp_path / "model")
        server.commits[one.name] = {one.revision or commit: server.commits[one.name][commit]}
        server.branches[one.name, "main"] = one.revision or commit
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        prove(one, monkeypatch)
        huggingface_hub.close_session()
        assert "model.safetensors" in server.fetched()


def test_the_list_is_well_formed() -> None:
    assert len(CHECKPOINTS) == 12 == len({one.name for one in CHECKPOINTS})
    heads = [one.architecture.partition("For")[2] for one in CHECKPOINTS]
    for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        assert heads.count(head) == 3
    assert [one.compared for one in CHECKPOINTS].count("Model") == heads.count("MaskedLM") == 3
    for one in CHECKPOINTS:
        assert re.fullmatch(r"([\w.-]+/)?[\w.-]+", one.name)
        assert one.revision is None or re.fullmatch(r"[0-9a-f]{40}", one.revision)
        assert hasattr(transformers, one.architecture)
        assert one.architecture.partition("For")[0] in FAMILIES


def test_live_tests_are_not_run_by_default() -> None:
    """Neither plain pytest nor `make test` and `make test-long` run them; all twelve are there to be asked for."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", __file__, "--collect-only"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=root).stdout
    assert "(12 deselected)" in listed and "test_published" not in listed and "test_a_stand_in" in listed, listed
    chosen = re.findall(r'pytest -m "([^"]+)"', (root / "Makefile").read_text())
    assert len(chosen) == 2 and all("not live" in marks for marks in chosen)
