"""Phi-3's two sets of rotary frequencies: read from every form, chosen row by row, never mixed within a text."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.append(str(Path(__file__).parents[1] / "parity"))
import zoo

from lmworks.base.errors import FormatError, InputError
from lmworks.export.emit import make_graph
from lmworks.models.cache import KVCache
from lmworks.models.checkpoint import load_model
from lmworks.models.config import LongRope
from lmworks.models.families import find_family
from lmworks.models.inference import run_ragged
from lmworks.runtime.torch_runtime import TorchRuntime

TURN = zoo.TURN


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    zoo.make_reference("phi3 long", "CausalLM").save_pretrained(tmp_path / "phi3")
    return tmp_path / "phi3"


def ids(length: int) -> torch.Tensor:
    return torch.randint(4, zoo.VOCAB, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", ["su", "longrope"])
def test_the_form_of_older_files(name: str, folder: Path) -> None:
    """rope_scaling {type, short_factor, long_factor}, as Phi-3's folders were published."""
    path = folder / "config.json"
    hf = json.loads(path.read_text())
    rope = hf.pop("rope_parameters")
    old = {"type": name, "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    path.write_text(json.dumps({**hf, "rope_scaling": old, "rope_theta": rope["rope_theta"],
                                "partial_rotary_factor": rope["partial_rotary_factor"]}))  # fmt: skip
    model, reference = load_model(folder), zoo.make_reference("phi3 long", "CausalLM")
    expected = math.sqrt(1 + math.log(zoo.POSITIONS / TURN) / math.log(TURN))
    scaling = model.config.rotary.scaling
    assert isinstance(scaling, LongRope) and scaling.factor == pytest.approx(expected)
    with torch.no_grad():
        for length in (40, TURN, TURN + 1, 150):
            assert (model(ids(length)) - reference(ids(length)).logits).abs().max() < 1e-5


def test_the_set_makes_a_difference(folder: Path) -> None:
    """Or the comparisons would prove nothing."""
    model = load_model(folder)
    row = ids(TURN + 1)
    with torch.no_grad():
        assert (model(row)[:, :-1] - model(row[:, :-1])).abs().max() > 1e-3


def test_rows_of_one_batch_choose_for_themselves(folder: Path) -> None:
    """Padded or end to end, a short row beside a long one is what it is alone."""
    model, rows = load_model(folder), [ids(20), ids(120)]
    batch, mask = torch.zeros(2, 120, dtype=torch.long), torch.zeros(2, 120, dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, : row.shape[1]], mask[i, : row.shape[1]] = row[0], 1
    with torch.no_grad():
        alone = [model(row)[0] for row in rows]
        found = model(batch, mask)
        for i, row in enumerate(alone):
            assert (found[i, : len(row)] - row).abs().max() < 1e-5
        ragged = run_ragged(model, torch.cat(rows, 1)[0], [20, 120])
        assert (ragged - torch.cat(alone)).abs().max() < 1e-5


def test_a_text_does_not_cross_with_a_cache(folder: Path) -> None:
    """Keys of a short text would stand beside those of a long one: it ends there, or begins long."""
    model = load_model(folder)
    with torch.no_grad():
        cache = KVCache(model.config, capacity=150)
        model(ids(TURN), cache=cache)
        with pytest.raises(InputError, match="cannot go on beyond"):
            model(ids(1), cache=cache)
        long, cache = ids(140), KVCache(model.config, capacity=150)
        found = torch.cat([model(long[:, : TURN + 10], cache=cache), model(long[:, TURN + 10 :], cache=cache)], 1)
        assert (found - model(long)).abs().max() < 1e-5


def test_writing_stops_in_time(folder: Path) -> None:
    from lmworks.runtime.decoding import begin

    class Silent:
        eos_id = None

        def decode(self, ids: list[int]) -> str:
            return ""

    runtime = TorchRuntime(folder)
    assert runtime.turn == TURN
    lengths = [begin(Silent(), [1] * n, max_length=runtime.max_length, max_tokens=500, turn=runtime.turn).limits.tokens
               for n in (10, TURN, TURN + 1)]  # type: ignore[arg-type]  # fmt: skip
    assert lengths == [TURN - 9, 1, zoo.POSITIONS - TURN]


def test_a_graph_knows_the_short_set(folder: Path) -> None:
    """Its tables end where the frequencies change: a longer text is the runtime's error, never another answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.DECODER, "hidden_size", 128)
        config = zoo.CONFIGS["phi3 long"]()
    transformers.Phi3ForCausalLM(config).save_pretrained(folder)
    graph = make_graph(load_model(folder))
    assert graph.weights["rope.cos"].shape[0] == TURN


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"short_factor": [1.0]}, FormatError, "short_factor is not a list of 2 numbers"),
        ({"long_factor": [1.0, "x"]}, FormatError, "long_factor is not a list of 2 numbers"),
        ({"rope_type": "yarn"}, InputError, "'yarn' is not supported"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], kind: type[Exception], match: str, folder: Path) -> None:
    hf = json.loads((folder / "config.json").read_text())
    with pytest.raises(kind, match=match):
        find_family("phi3").config({**hf, "rope_parameters": {**hf["rope_parameters"], **change}})
