"""Added tokens from the command to the folder: trained with LoRA or in full, read by transformers and peft, merged."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t

sys.path.insert(0, str(Path(__file__).with_name("training")))
from adapters import load_peft, move

from lmworks import api
from lmworks.base.errors import FormatError, InputError
from lmworks.export.merge import merge
from lmworks.models.checkpoint import load_model
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.tokens.train import train_tokenizer
from lmworks.training.adapter_files import load_adapter, open_adapter
from lmworks.training.int8 import Int8Linear
from lmworks.training.lora import activate
from lmworks.training.state import MODEL
from lmworks.training.stored import saved_tensors
from lmworks.verbs.finetuning import finetune

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = 1e-5
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "gpt2": lambda size: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    ),
    "llama": lambda size: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, vocab_size=size, num_key_value_heads=1)),
}  # tied, and not
QUICK: dict[str, Any] = {"task": "text-generation", "epochs": 1, "batch_size": 8, "dtype": "fp32", "lr": 1e-2}


@pytest.fixture(scope="module")
def place(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random decoders with an English tokenizer, and texts in two languages."""
    root = tmp_path_factory.mktemp("added")
    english = (data_folder / "books/botchan.txt").read_text("utf-8")[:40_000]
    tokenizer = train_tokenizer([english], vocab_size=400)
    for family, make in FAMILIES.items():
        torch.manual_seed(0)
        make(tokenizer.vocab_size).save_pretrained(root / family)
        tokenizer.save(root / family)
    lines = (data_folder / "conlang/tokipona/tatoeba-en-tp.tsv").read_text("utf-8-sig").splitlines()
    sentences = [line.split("\t")[3] for line in lines]
    (root / "tp.txt").write_text("\n".join(sentences[:250]))
    (root / "held.txt").write_text("\n".join(sentences[1000:1040]))
    (root / "general.txt").write_text(english[-2_000:])
    return root


def learn(place: Path, out: Path, family: str = "llama", **changes: Any) -> dict[str, Any]:
    """Adapt a decoder to toki pona with 30 more tokens."""
    settings = {"validation": place / "held.txt", "add_tokens": "auto:30", "method": "lora", **QUICK, **changes}
    return finetune(place / family, place / "tp.txt", out, **settings).values


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_folder_is_read_by_peft_and_merged(family: str, place: Path, tmp_path: Path) -> None:
    """C4, B8: ids and logits are those of transformers and peft; merged, neither is needed."""
    out = tmp_path / "out"
    values = learn(place, out, family, targets="all-linear", also_evaluate=[str(place / "general.txt")])
    facts = values["added_tokens"]
    assert facts["tokens_added"] == 30 and facts["tokens_a_word_after"] < facts["tokens_a_word_before"]
    tokenizer = Tokenizer.from_pretrained(out)
    reference = t.AutoTokenizer.from_pretrained(out)
    text = (place / "held.txt").read_text()[:200]
    ids = tokenizer.encode(text)
    assert ids == reference(text, add_special_tokens=False)["input_ids"] and max(ids) >= 400
    base = t.AutoModelForCausalLM.from_pretrained(place / family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers advises on padding for tensor cores
        base.resize_token_embeddings(len(reference))
        theirs, inputs = load_peft(base, out), torch.tensor([ids[:60]])
    with torch.no_grad():
        expected = theirs(input_ids=inputs).logits
        assert (open_adapter(out).model.eval()(inputs) - expected).abs().max() <= CLOSE
        merge(out, tmp_path / "merged")
        plain = t.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert (plain(input_ids=inputs).logits - expected).abs().max() <= CLOSE
    assert t.AutoTokenizer.from_pretrained(tmp_path / "merged")(text, add_special_tokens=False)["input_ids"] == ids
    scored = api.evaluate(out, place / "general.txt").values
    assert values["after"]["general.txt"]["bits_per_byte"] == pytest.approx(scored["bits_per_byte"], abs=1e-4)
    scored = api.evaluate(place / family, place / "general.txt").values
    assert values["before"]["general.txt"]["perplexity"] == pytest.approx(scored["perplexity"], rel=1e-4)
    before, after = (values[when]["held-out examples"]["bits_per_byte"] for when in ("before", "after"))
    assert after < before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_peft_trained_on_more_tokens_is_read(family: str, place: Path, tmp_path: Path) -> None:
    """peft then writes the resized embedding whole and the rows; those of a tied one under two names."""
    base = t.AutoModelForCausalLM.from_pretrained(place / family)
    settings: dict[str, Any] = {"target_modules": "all-linear", "trainable_token_indices": [400, 401]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.resize_token_embeddings(402)
        theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        move(theirs, 0.1)
        theirs.eval().save_pretrained(tmp_path / "theirs")
    ids = torch.tensor([[5, 400, 17, 401]])
    with torch.no_grad():
        ours = open_adapter(tmp_path / "theirs", base=place / family).model.eval()
        assert (ours(ids) - theirs(input_ids=ids).logits).abs().max() <= CLOSE


def test_full_training_and_a_named_token(place: Path, tmp_path: Path) -> None:
    values = learn(place, tmp_path / "out", "gpt2", method="full", lr=1e-3, add_tokens="<tp>,<en>", init="random")
    model = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    reference = t.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(reference) == model.config.vocab_size == 402 and values["added_tokens"]["tokens_added"] == 2
    assert reference("<tp>", add_special_tokens=False)["input_ids"] == [400]


def test_only_new_rows_and_the_adapter_are_kept_and_a_resume_is_exact(place: Path, tmp_path: Path) -> None:
    """An interrupted run on an int8 base ends with the same bits; beside another base it is refused."""
    settings = {"base_dtype": "int8", "dora": True, "rslora": True, "lora_dropout": 0.1, "alpha": 8.0, "epochs": 2}
    learn(place, tmp_path / "whole", **settings)
    whole = (tmp_path / "whole/adapter_model.safetensors").read_bytes()
    assert json.loads((tmp_path / "whole/lmworks.json").read_text())["settings"]["base_dtype"] == "int8"
    config = json.loads((tmp_path / "whole/adapter_config.json").read_text())
    names = ("lora_alpha", "use_dora", "use_rslora", "lora_dropout")
    assert [config[name] for name in names] == [8, True, True, 0.1]
    stop_after(1, lambda: learn(place, tmp_path / "again", **settings))
    run = tmp_path / "again.partial"
    held = sum(path.stat().st_size for path in run.rglob(f"last.*/{MODEL}"))
    assert 0 < held < 2 * 30_000  # two checkpoints of what is trained; the base alone is 200 kB
    base = place / "llama/model.safetensors"
    original = base.read_bytes()
    model = t.AutoModelForCausalLM.from_pretrained(place / "llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(place / "llama")
    try:
        with pytest.raises(InputError, match="frozen weights"):
            learn(place, tmp_path / "again", resume=True, **settings)
    finally:
        base.write_bytes(original)
    learn(place, tmp_path / "again", resume=True, **settings)
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == whole
    opened = open_adapter(tmp_path / "again", int8=True).model
    assert any(isinstance(module, Int8Linear) for module in opened.modules())
    plain = open_adapter(tmp_path / "again").model
    ids = torch.arange(5)[None] + 398
    with torch.no_grad():
        assert 0 < (opened(ids) - plain(ids)).abs().max() < 0.1
    assert all(".adapters." in name for name in saved_tensors(plain) if plain.get_parameter(name).requires_grad)


def stop_after(epoch: int, call: Any) -> None:
    """Run a fine-tuning that fails after this validation, with its checkpoint written."""
    from lmworks.training.trainer import Trainer

    saved, seen = Trainer.save, []

    def save(self: Trainer) -> None:
        saved(self)
        seen.append(self.state.step)
        if len(seen) == epoch:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "save", save)
        call()


def test_several_folders_on_one_base(place: Path, tmp_path: Path) -> None:
    """docs/adapters.md: each answers as it does alone."""
    names = {"one": {"seed": 1}, "two": {"seed": 2, "rank": 4}}
    for name, changes in names.items():
        learn(place, tmp_path / name, add_tokens="", **changes)
    model, ids = load_model(place / "llama"), torch.arange(10)[None] + 300
    for name in names:
        load_adapter(model, tmp_path / name, name=name)
    with torch.no_grad():
        for name in ("one", "two", "one"):
            activate(model, name)
            assert torch.equal(model(ids), open_adapter(tmp_path / name).model.eval()(ids))
        activate(model, None)
        assert torch.equal(model(ids), load_model(place / "llama")(ids))


def test_a_tokenizer_with_more_tokens_is_named_and_made_to_fit(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(place / "llama", folder)
    reference = t.AutoTokenizer.from_pretrained(folder)
    reference.add_tokens(["<a>", "<b>", "<c>"])
    reference.save_pretrained(folder)
    more = {**QUICK, "validation": place / "held.txt", "method": "lora"}
    with pytest.raises(FormatError, match="more tokens than the embedding") as error:
        finetune(folder, place / "tp.txt", tmp_path / "out", **more)
    assert "403" in error.value.found and "400" in error.value.expected and "--add-tokens fit" in error.value.fix
    assert not (tmp_path / "out").exists()
    finetune(folder, place / "tp.txt", tmp_path / "out", overwrite=True, add_tokens="fit", **more)
    assert open_adapter(tmp_path / "out").model.config.vocab_size == 403


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"method": "full", "base_dtype": "int8"}, "--base-dtype belongs to lora"),
     ({"method": "full", "alpha": 2.0}, "alpha"), ({"method": "head"}, "not trained"),
     ({"targets": "querry"}, "no layer"), ({"base_dtype": "int4"}, "int4"),
     ({"also_evaluate": ["gone.txt"]}, "gone.txt"), ({"rank": 0}, "rank")],
)  # fmt: skip
def test_knobs_that_do_not_fit(changes: dict[str, Any], message: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        learn(place, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
