"""Extras as flavors: each installed by pip into an environment of its own from this checkout's wheel."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

from lmworks.deploy import wheel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import flavors


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, and models to try it on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wheel, "check_current", lambda known, root: None)
        return flavors.make_models(tmp_path_factory.mktemp("flavors"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", list(flavors.FLAVORS))
def test_a_flavor_holds_what_it_says_and_no_more(built: Path, tmp_path: Path, name: str) -> None:
    """C38, R198–R200, R211: a clean environment does its task, opens no connection, and lacks what it should lack."""
    flavor = flavors.FLAVORS[name]
    python = flavors.install_flavor(tmp_path / "env", flavor, built)
    (tmp_path / "work").mkdir()
    said = flavors.try_out(flavor, python, built, tmp_path / "work")
    if name == "offline":  # the same numbers as here
        known = transformers.BertForSequenceClassification.from_pretrained(built / flavor.model).eval()
        with torch.no_grad():
            wanted = known(torch.tensor([[101, 7592, 102]])).logits
        assert (torch.tensor(json.loads(said[0])) - wanted).abs().max() <= 1e-5
    print(f"{name}: {flavors.weigh(tmp_path / 'env'):.0f} MB")
