"""Families × heads against transformers: the largest difference of every cell, printed as one table.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo

from lmworks.models import families
from lmworks.models.cache import KVCache
from lmworks.models.checkpoint import load_model, save_model
from lmworks.models.families import FAMILIES
from lmworks.models.families.sequential import SEQUENTIAL

CLOSE = 1e-5
FOUND: dict[tuple[str, str], float] = {}


class Cell:
    """A reference model and the folder that it was saved to."""

    def __init__(self, case: str, head: str, folder: Path) -> None:
        self.case, self.head, self.folder = case, head, folder
        self.reference = zoo.make_reference(case, head)
        self.reference.save_pretrained(folder)
        self.is_image, self.is_choice = case == "vit", head == "MultipleChoice"
        self.is_causal = head == "CausalLM" or case.split()[0] in zoo.DECODERS
        self.pad = zoo.pad_id(case)

    def load(self, folder: Path | None = None) -> Any:
        return load_model(folder or self.folder, self.head)

    def row(self, length: int, seed: int) -> torch.Tensor:
        return torch.randint(4, zoo.VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))

    @torch.inference_mode()
    def expected(self, x: torch.Tensor, mask: torch.Tensor | None = None, model: Any = None) -> torch.Tensor:
        """Return the reference's numbers, or another model's of its class."""
        inputs = {"pixel_values" if self.is_image else "input_ids": x}
        if mask is None and self.case == "modernbert mean":  # the reference divides by the mask's sum
            mask = torch.ones_like(x)
        inputs |= {} if mask is None else {"attention_mask": mask}
        if self.is_choice:
            inputs = {name: value[:, None] for name, value in inputs.items()}  # one choice a row
        return zoo.numbers((model or self.reference)(**inputs))


@pytest.fixture(scope="module", params=zoo.CELLS, ids=lambda cell: f"{cell[0]}-{cell[1]}")
def cell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cell:
    return Cell(*request.param, tmp_path_factory.mktemp("cell"))


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print the matrix when the cells are done."""
    yield
    heads = list(dict.fromkeys(head for _, head in zoo.CELLS))
    short = {head: "".join(letter for letter in head if letter.isupper()) or head for head in heads}
    lines = ["", "largest difference from transformers, fp32 (" + ", ".join(f"{v} {k}" for k, v in short.items()) + ")"]
    lines.append(f"{'':17s}" + "".join(f"{short[head]:>9s}" for head in heads))
    for case in zoo.CONFIGS:
        cells = (FOUND.get((case, head)) for head in heads)
        lines.append(f"{case:17s}" + "".join(f"{'' if x is None else f'{x:.1e}':>9s}" for x in cells))
    table = Path(families.__file__)
    family = (table.parent / "xlm_roberta.py").read_text().splitlines()
    named = [line for line in table.read_text().splitlines() if "xlm_roberta" in line]
    lines.append(f"a family more: xlm_roberta.py has {len(family)} lines, and families/__init__.py {len(named)} for it")
    lines.append(f"{len(FOUND)} cells, worst {max(FOUND.values(), default=0):.1e}")
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled():
        terminal.write("\n".join(lines) + "\n")


def note(cell: Cell, a: torch.Tensor, b: torch.Tensor) -> None:
    """Compare, and keep the largest difference for the table."""
    assert a.shape == b.shape and torch.isfinite(a).all()
    key, difference = (cell.case, cell.head), (a - b).abs().max().item()
    FOUND[key] = max(FOUND.get(key, 0.0), difference)
    assert difference <= CLOSE


@torch.inference_mode()
def test_cell(cell: Cell) -> None:
    """R94: whole rows, longer than any window, and rows padded on both sides, equal the reference's."""
    model = cell.load()
    if cell.is_image:
        pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        note(cell, model(pixels), cell.expected(pixels))
        return
    lengths, T = (100, 61, 5), 100
    rows = [cell.row(length, length) for length in lengths]
    for row in rows:
        note(cell, model(row), cell.expected(row))
    right, mask = torch.full((3, T), cell.pad), torch.zeros(3, T, dtype=torch.long)
    left, left_mask = right.clone(), mask.clone()
    for i, row in enumerate(rows):
        right[i, : row.shape[1]], mask[i, : row.shape[1]] = row[0], 1
        left[i, T - row.shape[1] :], left_mask[i, T - row.shape[1] :] = row[0], 1
    found, expected = model(right, mask), cell.expected(right, mask)
    per_token = found.ndim == 3
    if cell.case != "phi3 long":  # there a long row changes what the reference says of the others
        note(cell, found[mask.bool()] if per_token else found, expected[mask.bool()] if per_token else expected)
    for said, real in ((found, mask.bool()), (model(left, left_mask), left_mask.bool())):
        for i, row in enumerate(rows):
            note(cell, said[i][real[i]][None] if per_token else said[i : i + 1], cell.expected(row))


def test_enough_cells() -> None:
    cells = {(case.split()[0], head) for case, head in zoo.CELLS}
    assert len({family for family, _ in cells}) >= 15 and len(cells) >= 65
    assert {family for family, _ in cells} | set(SEQUENTIAL) == set(FAMILIES)


@torch.inference_mode()
def test_segments(cell: Cell) -> None:
    """The two texts of a pair have vectors of their own."""
    if cell.case != "bert":
        return
    ids = cell.row(20, 1)
    types = (torch.arange(20) > 9).long()[None]
    found = cell.load()(ids, token_type_ids=types)
    note(cell, found, zoo.numbers(cell.reference(**inputs_of(cell, ids, types))))
    assert (found - cell.load()(ids)).abs().max() > 1e-3


def inputs_of(cell: Cell, ids: torch.Tensor, types: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "input_ids": ids[:, None] if cell.is_choice else ids,
        "token_type_ids": types[:, None] if cell.is_choice else types,
    }


@torch.inference_mode()
def test_cache_equals_whole_sequence(cell: Cell) -> None:
    """Prompt and single tokens through the cache, beyond the window, score as one pass."""
    if not cell.is_causal or cell.head not in {"Model", "CausalLM"}:
        return
    model, ids = cell.load(), cell.row(60, 3)
    cache = KVCache(model.config, capacity=64)
    found = [model(ids[:, :30], cache=cache)]
    found += [model(ids[:, i : i + 1], cache=cache) for i in range(30, 55)]
    found += [model(ids[:, 55:], cache=cache)]
    note(cell, torch.cat(found, 1), cell.expected(ids))


def greedy(cell: Cell, ids: torch.Tensor) -> list[int]:
    """Return 64 tokens of transformers' generate; it counts RoBERTa's positions from 0, so there whole passes."""
    if "roberta" in cell.case:
        for _ in range(64):
            ids = torch.cat((ids, cell.expected(ids)[:, -1:].argmax(-1)), 1)
        return ids[0, 17:].tolist()
    return cell.reference.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, pad_token_id=cell.pad
    )[0, 17:].tolist()  # fmt: skip


def test_greedy_equals_generate(cell: Cell) -> None:
    """C12: 64 greedy tokens of every decoder."""
    if cell.head != "CausalLM":
        return
    from lmworks.runtime.torch_runtime import TorchRuntime

    ids = cell.row(17, 2)
    expected = greedy(cell, ids)
    runtime = TorchRuntime(cell.folder)
    tokens = [int(runtime.prefill([0], ids.tolist()).argmax())]
    while len(tokens) < 64:
        tokens.append(int(runtime.step([0], tokens[-1:]).argmax()))
    assert tokens == expected
    assert len(set(tokens)) > 3


def test_round_trip(cell: Cell, tmp_path: Path) -> None:
    """C21, C22: what we write loads there without a missing or unexpected key, every bit the same, labels too."""
    save_model(cell.load(), tmp_path)
    again, info = type(cell.reference).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    expected, found = cell.reference.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(cell.reference).__name__]
    x = torch.randn(1, 3, 32, 32) if cell.is_image else cell.row(40, 9)
    assert torch.equal(cell.expected(x, model=again.eval()), cell.expected(x))
    again.save_pretrained(tmp_path / "theirs")
    save_model(cell.load(tmp_path / "theirs"), tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert again.config.id2label == cell.reference.config.id2label


@pytest.mark.parametrize(("name", "head"), [("GPT2DoubleHeadsModel", "CausalLM"), ("BertForPreTraining", "MaskedLM")])
@torch.inference_mode()
def test_a_second_head_is_left_out(name: str, head: str, tmp_path: Path) -> None:
    """Published models with two heads open as the first of them."""
    config = zoo.CONFIGS["gpt2" if head == "CausalLM" else "bert"]()
    reference = getattr(transformers, name)(config).eval()
    reference.save_pretrained(tmp_path)
    model, ids = load_model(tmp_path), torch.randint(4, zoo.VOCAB, (1, 30))
    output = reference(ids)
    expected = output.logits if head == "CausalLM" else output.prediction_logits
    assert model.kind == head
    assert (model(ids) - expected).abs().max() <= CLOSE


def test_a_new_config_says_everything(cell: Cell, tmp_path: Path) -> None:
    """A config that was not read from a file, as of a model made here, describes the same network to transformers."""
    from dataclasses import replace

    model = cell.load()
    if cell.case in {"modernbert mean", "deberta-v2 new", "deberta-v2 conv"}:  # their heads' settings are in the file
        return
    model.config = replace(model.config, source={})
    save_model(model, tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    reloaded = type(cell.reference).from_pretrained(tmp_path).eval()
    assert type(again) is type(cell.reference.config)
    x = torch.randn(1, 3, 32, 32) if cell.is_image else cell.row(60, 4)
    note(cell, cell.expected(x, model=reloaded), cell.expected(x))
