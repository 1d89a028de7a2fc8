"""`lmworks train --arch`: the networks before the Transformer, through the same loop, folder, generation and graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lmworks.base.errors import InputError
from lmworks.cli import main
from lmworks.models.heads import CausalLM
from lmworks.runtime.decoding import generate
from lmworks.runtime.sampling import Sampling
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.tokens.train import train_tokenizer
from lmworks.training.data import TokenWindows
from lmworks.training.objectives import CausalLoss
from lmworks.training.trainer import Trainer
from lmworks.verbs.run import make_network, train_config
from lmworks.verbs.settings import Settings

KINDS = ("feedforward", "rnn", "lstm", "gru")
TEXT = "the quick brown fox jumps over the lazy dog. the dog sleeps, and the fox runs on.\n" * 30


def settings(arch: str, **more: object) -> Settings:
    knobs = {"hidden_size": 24, "context": 16, "batch_size": 4, "vocab_size": 300, "dropout": 0.2, "lr": 1e-2, **more}
    return Settings(arch=arch, tokenizer="char", **knobs).resolve(len(TEXT))  # type: ignore[arg-type]


def train(arch: str, folder: Path, *, steps: int, stop: int = 0) -> tuple[CausalLM, Tokenizer, list[float]]:
    """Train a small network with dropout; `stop` ends the process's work after so many steps, as a kill would."""
    s = settings(arch, steps=steps, eval_every=4)
    tokenizer = train_tokenizer([TEXT], kind="char", vocab_size=300)
    stream = np.array([tokenizer.eos_id, *tokenizer.encode(TEXT), tokenizer.eos_id])
    model = CausalLM(make_network(s, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id), seed=0)
    data = TokenWindows(stream, stream[:80], context=16, batch_size=4)
    trainer = Trainer(model, objective=CausalLoss(), data=data, config=train_config(s), folder=folder)
    if stop:
        step = trainer.train_step

        def limited() -> None:
            if trainer.state.step == stop:
                raise RuntimeError("killed")
            step()
            trainer.save()

        trainer.train_step = limited  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="killed"):
            trainer.fit()
        return model, tokenizer, []
    result = trainer.fit()
    return model, tokenizer, [loss for _, loss in result.history.train]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_resumes_to_the_bit_and_writes_the_same_with_and_without_its_state(kind: str, tmp_path: Path) -> None:
    model, tokenizer, losses = train(kind, tmp_path / "whole", steps=24)
    assert losses[-1] < losses[0] - 0.3
    train(kind, tmp_path / "killed", steps=24, stop=11)
    again, _, _ = train(kind, tmp_path / "killed", steps=24)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    runtime, greedy = TorchRuntime(model), Sampling(temperature=0)
    stepped, whole = (
        generate(runtime, tokenizer, "the fox", sampling=greedy, max_tokens=20, use_cache=cached)
        for cached in (True, False)
    )
    assert "".join(stepped) == "".join(whole)
    assert stepped.result.tokens == whole.result.tokens


def test_what_does_not_go_together_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    for words, said in (
        (("--arch", "lstmm"), 'did you mean "lstm"'),
        (("--arch", "lstm", "--heads", "4"), "--heads belongs to transformer"),
        (("--arch", "gru", "--family", "gpt2"), "--family belongs to transformer"),
        (("--arch", "gru", "--window", "4"), "--window belongs to feedforward"),
        (("--embedding-size", "30"), "--embedding-size belongs to feedforward, rnn, lstm or gru"),
    ):
        assert main(["train", str(tmp_path / "t.txt"), "-o", str(tmp_path / "x"), *words]) == 2
        shown = capsys.readouterr()
        assert said in " ".join((shown.err + shown.out).lower().replace("│", " ").split()), words
        assert not (tmp_path / "x").exists()
    assert main(["build", str(tmp_path / "t.txt"), "-o", str(tmp_path / "x"), "--arch", "lstm"]) == 2
    assert "the web page runs Transformers only" in capsys.readouterr().err
    with pytest.raises(InputError, match="no such arch") as caught:
        Settings(arch="transformr").check()  # type: ignore[arg-type]
    assert "transformer" in caught.value.fix


def test_the_dial_knows_the_networks() -> None:
    lstm = settings("lstm")
    assert (lstm.layers, lstm.embedding_size, lstm.heads, lstm.dtype) == (2, 24, None, "fp32")
    assert settings("feedforward").window == 8
    assert Settings().resolve(10**6).heads == 3
    widths = {64: 1, 128: 2, 100: 2, 192: 3, 24: 1, 4096: 64}
    assert {w: Settings(hidden_size=w).resolve(10**6).heads for w in widths} == widths
    with pytest.raises(InputError, match="even multiple of --heads"):
        Settings(hidden_size=65).resolve(10**6)
    book = make_network(Settings(arch="lstm", hidden_size=100, embedding_size=50, layers=1, context=16), vocab_size=20)
    numbers = sum(p.numel() for p in CausalLM(book).parameters())
    assert numbers == 20 * 50 + 4 * 100 * (50 + 100 + 2) + 20 * 100
