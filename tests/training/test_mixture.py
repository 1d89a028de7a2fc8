"""Each batch has its share of every domain, an epoch is one pass over the main one, and files name their weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lmworks.base.errors import InputError
from lmworks.tasks.base import Feature
from lmworks.text.labelled import read_labelled
from lmworks.tokens.train import train_tokenizer
from lmworks.training import before
from lmworks.training.before import DIFFICULTY, DOMAINS
from lmworks.training.examples import Examples, Row
from lmworks.training.mixture import Domain, DomainRows, check_weights, mix, name_domains, read_weight
from lmworks.training.supervision import check_order
from lmworks.training.tuning import Tuning
from lmworks.verbs.finetune_data import read_domains, read_other
from lmworks.verbs.finetuning import finetune

COLUMNS: dict[str, Any] = {"text_column": None, "label_column": None, "header": True}


def rows_of(lengths: list[int], domain: int) -> list[Row]:
    return [Row(Feature({"input_ids": [domain] * n}, i), {"labels": domain}) for i, n in enumerate(lengths)]


def make_mixture(**changes: int) -> Examples:
    """Main rows that are short, others that are long, others that are few."""
    rng = np.random.default_rng(0)
    short, long, few = (rng.integers(a, b, n).tolist() for a, b, n in ((2, 12, 600), (20, 60, 500), (5, 30, 20)))
    domains = [
        DomainRows("long", 0.25, rows_of(long, 1), rows_of(long[:9], 1)),
        DomainRows("few", 0.15, rows_of(few, 2), ()),
    ]
    return Examples(rows_of(short, 0), epochs=3, batch_size=20, domains=domains, **changes)


def test_every_batch_has_its_share_of_every_domain() -> None:
    data = make_mixture()
    assert data.steps == 3 * 50  # 600 rows are 60 % of 1000
    for step in range(data.steps):
        counts = np.bincount(data.batch(step)["labels"], minlength=3)
        assert np.abs(counts - [12, 5, 3]).max() <= 1
    lengths = [data.batch(step)["input_ids"].shape[1] for step in range(32)]
    assert np.std(lengths) > 5  # rows of like length share a batch, within their domains


def test_an_epoch_reads_the_main_rows_once_and_the_others_in_turn() -> None:
    data = make_mixture()
    whole = np.concatenate(data.plan)
    for epoch in range(3):
        rows = whole[epoch * 1000 : (epoch + 1) * 1000]
        assert sorted(rows[rows < 600].tolist()) == list(range(600))
    long = np.bincount(whole[(whole >= 600) & (whole < 1100)] - 600, minlength=500)
    assert set(long.tolist()) == {1, 2} and long.sum() == 750  # one pass and a half
    few = np.bincount(whole[whole >= 1100] - 1100, minlength=20)
    assert set(few.tolist()) == {22, 23} and few.sum() == 450


def test_mixing_restated() -> None:
    """In any beginning of an epoch each domain has its share to within one row and a half."""
    order, domains = mix(np.arange(600), [500, 20], [0.25, 0.15], seed=1, epoch=2)
    share = np.cumsum(domains[:, None] == np.arange(3), axis=0)
    assert np.abs(share - np.arange(1, 1001)[:, None] * [0.6, 0.25, 0.15]).max() <= 1.5
    assert order[domains == 0].tolist() == list(range(600))  # the main order is kept
    again, _ = mix(np.arange(600), [500, 20], [0.25, 0.15], seed=1, epoch=2)
    other, _ = mix(np.arange(600), [500, 20], [0.25, 0.15], seed=2, epoch=2)
    assert np.array_equal(order, again) and not np.array_equal(order, other)


def test_the_batches_of_one_domain_are_those_of_a_run_without_others() -> None:
    rows = rows_of(np.random.default_rng(3).integers(2, 40, 200).tolist(), 0)
    for step in range(10):
        one, other = (Examples(rows, epochs=1, batch_size=8, domains=d).batch(step) for d in ((), []))
        assert np.array_equal(one["input_ids"], other["input_ids"])


def test_held_out_rows_of_a_domain() -> None:
    data = make_mixture()
    found = sum(int((batch["input_ids"] == 1).sum()) for batch in data.held_out_of(data.domains[0]))
    assert found == sum(len(row.feature) for row in data.domains[0].held_out)
    changed = make_mixture(seed=1)
    assert changed.fingerprint() != data.fingerprint() == make_mixture().fingerprint()


def test_epochs_are_planned_until_there_are_enough_batches() -> None:
    """As many as asked for: the beginning of a run of more epochs, whether longer or shorter than one."""
    for steps in (20, 50, 161):
        data = make_mixture()
        longer = Examples(data.main, epochs=4, batch_size=20, domains=data.domains)
        data.plan_for(steps)
        assert data.steps == steps
        for step in (0, steps // 2, steps - 1):
            assert np.array_equal(data.batch(step)["input_ids"], longer.batch(step)["input_ids"])


def test_files_and_weights() -> None:
    assert read_weight("data/law=2.jsonl=0.3") == (Path("data/law=2.jsonl"), 0.3)
    for text in ("law.jsonl", "law.jsonl=", "law.jsonl=2", "=0.5", "law.jsonl=nan", "law.jsonl=0"):
        with pytest.raises(InputError, match="FILE=WEIGHT"):
            read_weight(text)
    with pytest.raises(InputError, match="leave nothing"):
        check_weights([0.7, 0.3])
    with pytest.raises(InputError, match="one file"):
        Tuning(shots=4, also=("law.jsonl=0.3",)).check()
    names = name_domains([Path("a/x.txt"), Path("b/x.txt"), Path("y.txt"), Path("a/x.csv")])
    assert names == ["a/x.1", "b/x", "y", "a/x.4"]


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def languages(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small GPT-2, and sentences of Toki Pona and their English translations."""
    root = tmp_path_factory.mktemp("languages")
    lines = (data_folder / "conlang/tokipona/tatoeba-en-tp.tsv").read_text(encoding="utf-8-sig").splitlines()[:400]
    columns = [line.split("\t") for line in lines]
    for name, part, place in (("english", columns, 1), ("toki", columns[:340], 3), ("held", columns[340:], 3)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": row[place]}) + "\n" for row in part))
    tokenizer = train_tokenizer([row[i] for row in columns for i in (1, 3)], kind="bpe", vocab_size=400)
    tokenizer.save(root / "body", max_length=64)
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.vocab_size, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends)).save_pretrained(root / "body")
    return root


def learn(root: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Learn Toki Pona, a fifth of it English; return the report's values."""
    settings = {"task": "text-generation", "epochs": 2, "lr": 1e-2, "batch_size": 2, "dtype": "fp32", **changes}
    settings = {"pack": True, "curriculum": "loss", "also": (f"{root / 'english.jsonl'}=0.2",), **settings}
    settings["validation"] = root / "held.jsonl"
    return finetune(root / "body", root / "toki.jsonl", out, **settings).values


def their_losses(folder: Path, texts: list[str]) -> list[tuple[float, int]]:
    """Return the mean loss that transformers gives each text alone, with its end, and of how many tokens."""
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer, found = transformers.AutoTokenizer.from_pretrained(folder), []
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            found.append((float(model(ids, labels=ids).loss), ids.shape[1] - 1))
    return found


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_the_loss_of_every_domain_is_reported_before_and_after(
    languages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed, mixed, easy ones first: losses are transformers', and a run that broke off ends with the same bits."""
    values = learn(languages, tmp_path / "whole")
    assert list(values["domains"]) == ["training data", "english"]
    for loss in values["domains"].values():
        assert loss["before"] == pytest.approx(math.log(400), rel=0.1) and loss["after"] < loss["before"] - 0.5
    assert [row["val_loss_english"] for row in values["history"]][-1] == values["domains"]["english"]["after"]
    assert "Held-out loss by domain" in (tmp_path / "whole/report.html").read_text()
    _, english = read_other(languages / "english.jsonl", "text-generation", 0, COLUMNS)
    for when, folder in (("before", languages / "body"), ("after", tmp_path / "whole")):
        for name, texts in (("training data", read_texts(languages / "held.jsonl")), ("english", english.examples)):
            theirs = their_losses(folder, list(texts))
            mean = sum(loss * count for loss, count in theirs) / sum(count for _, count in theirs)
            assert values["domains"][name][when] == pytest.approx(mean, abs=1e-5)
    hardest = json.loads((tmp_path / "whole/training" / DIFFICULTY).read_text())["loss"]
    theirs = their_losses(languages / "body", read_texts(languages / "toki.jsonl"))
    assert hardest == pytest.approx([loss for loss, _ in theirs], abs=1e-5)

    def fail(self: Examples, step: int) -> Any:
        if step == 60:
            raise OSError("the power is gone")
        return whole(self, step)

    whole = Examples.batch
    monkeypatch.setattr(Examples, "batch", fail)
    with pytest.raises(Exception, match="power"):
        learn(languages, tmp_path / "parts")
    monkeypatch.setattr(Examples, "batch", whole)
    monkeypatch.setattr(before, "row_losses", None)  # what was measured is read
    again = learn(languages, tmp_path / "parts", resume=True)
    assert again["domains"] == values["domains"]
    for name in ("model.safetensors", f"training/{DIFFICULTY}", f"training/{DOMAINS}"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_file_names_its_own_split(languages: Path, tmp_path: Path) -> None:
    """--split is that of the main file; a file that has splits is refused until one is named."""
    parts = {name: [[f"{name} {i}", "x"] for i in range(100, 300)] for name in ("train", "later")}
    (tmp_path / "nested.json").write_text(json.dumps(parts))
    data = read_labelled(languages / "toki.jsonl", "text-generation")

    def read(text: str) -> list[Domain]:
        return read_domains(data, "text-generation", Tuning(also=(text,)), COLUMNS)

    (domain,) = read(f"{tmp_path}/nested.json:later=0.2")
    assert all(text.startswith("later") for text in domain.train.examples) and domain.weight == 0.2
    assert (len(domain.train), len(domain.held_out)) == (180, 20)
    with pytest.raises(InputError, match="which split") as error:
        read(f"{tmp_path}/nested.json=0.2")
    assert error.value.fix.startswith(f"write {tmp_path}/nested.json:NAME, or {tmp_path}/nested.json:NAME+NAME")


def test_what_does_not_go_together_is_refused(languages: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"batch_tokens": 100}, "--batch-tokens has no use"),
        ({"also": ("nothing.jsonl",)}, "FILE=WEIGHT"),
        ({"also": ("nothing.jsonl=0.5",)}, "nothing.jsonl|no such"),
        ({"curriculum": "hard"}, "curriculum"),
        ({"balanced": True}, "--balanced"),
    ):
        with pytest.raises(InputError, match=message):
            learn(languages, tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="whose words are learned"):
        check_order("text-classification", Tuning(pack=True))
    with pytest.raises(InputError, match="one length"):
        check_order("image-classification", Tuning(curriculum="length"))
