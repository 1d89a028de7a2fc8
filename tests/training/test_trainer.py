"""The loop: accumulation, clipping, validation, early stopping, divergence, interruption, resuming."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import BATCH, VOCAB, make_data, make_model, make_stream, make_trainer
from torch import Tensor, nn

from lmworks.base.errors import InputError, Interrupted, TrainingError
from lmworks.base.types import Batch
from lmworks.training import machine
from lmworks.training import trainer as loop
from lmworks.training.data import IGNORED, TokenWindows, split
from lmworks.training.log import TIMES
from lmworks.training.objectives import CausalLoss
from lmworks.training.state import State, load_checkpoint
from lmworks.training.stored import model_tensors
from lmworks.training.trainer import Trainer


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model_tensors(model).items()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Ragged:
    """Thirty-two rows of which each scores another number of tokens."""

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng(step)
        ids, labels = rng.integers(0, VOCAB, (2, 32, 12))
        labels[np.arange(12) >= rng.integers(1, 13, (32, 1))] = IGNORED
        return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("parts", [4, 32, 5])
def test_accumulation_changes_nothing(tmp_path: Path, parts: int) -> None:
    """The mean is over the tokens of the whole batch: 1 x 32, 8 x 4 and 32 x 1 rows give one loss and one gradient."""
    batch = Ragged().batch(0)
    count = CausalLoss().count(batch)
    found = []
    for n in (1, parts):
        model = make_model()
        trainer = make_trainer(tmp_path, model=model)
        loss = sum(trainer.accumulate(part, i, count) for i, part in enumerate(split(batch, n)))
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (loss, gradient), (split_loss, split_gradient) = found
    assert abs(loss - split_loss) <= 1e-6 * loss
    assert (gradient - split_gradient).norm() <= 1e-5 * gradient.norm()
    rows = [len(part["labels"]) for part in split(batch, parts)]
    assert sum(rows) == 32
    assert len(rows) == parts
    assert max(rows) - min(rows) <= 1


def test_a_step_is_clip_then_adamw_on_the_mean_loss(tmp_path: Path) -> None:
    """One run of three steps against a plain torch loop written here."""
    model, plain, data = make_model(), make_model(), make_data()
    make_trainer(tmp_path, model=model, steps=3, max_grad_norm=0.3, weight_decay=0.2, warmup=0, min_lr=1e-3).fit()
    decay = [p for p in plain.parameters() if p.ndim == 2]
    rest = [p for p in plain.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99), foreach=False, fused=False)
    rows = metrics(tmp_path)
    for step in range(3):
        batch = data.batch(step)
        logits = plain(torch.from_numpy(batch["input_ids"]))
        labels = torch.from_numpy(np.ascontiguousarray(batch["labels"]))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).norm()
        assert norm > 0.3  # the clip does something
        for p in plain.parameters():
            assert p.grad is not None
            p.grad.mul_(0.3 / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 + 2e-3 * (1 + math.cos(math.pi * step / 3)) / 2
        optimizer.step()
        assert rows[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert rows[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert rows[step]["tokens"] == (step + 1) * BATCH * 12
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)


def test_training_learns_and_reports(tmp_path: Path) -> None:
    stream = io.StringIO()
    result = make_trainer(tmp_path, steps=80, lr=1e-2, eval_every=20, stream=stream).fit()
    train, validation = result.history.train, result.history.validation
    assert [step for step, _ in validation] == [20, 40, 60, 80]
    assert train[-1][1] < 0.6 * train[0][1]
    assert result.best_loss == min(loss for _, loss in validation)
    assert result.tokens == 80 * BATCH * 12
    assert result.tokens_per_second > 0
    assert "step 80 of 80" in stream.getvalue()
    assert names(tmp_path) == {"metrics.jsonl", "last.80", f"best.{result.best_step}"}


class Drift(CausalLoss):
    """Held-out loss that is lowest in the third validation, whatever the weights are."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        loss = super().__call__(model, batch)
        if not model.training:
            self.calls += 1
            loss = loss.detach() * 0 + self.count({"labels": batch["labels"].numpy()}) * [5, 6, 3, 4, 5][self.calls - 1]
        return loss


def test_early_stopping_restores_the_best_weights(tmp_path: Path) -> None:
    """C28: the best checkpoint is kept, and it is the one that training returns."""
    data = TokenWindows(make_stream(700), make_stream(10), context=12, batch_size=BATCH)  # one batch a validation
    model, stopped = make_model(), make_trainer(tmp_path / "a", steps=9, eval_every=3)
    stopped.fit()  # the weights after nine steps, on the same schedule as below
    trainer = make_trainer(
        tmp_path / "b", model=model, data=data, objective=Drift(), steps=60, eval_every=3, patience=2
    )
    result = trainer.fit()
    assert result.stopped_early
    assert (result.steps, result.best_step, result.best_loss) == (15, 9, 3.0)
    at_nine = make_model()
    nine = make_trainer(tmp_path / "c", model=at_nine, data=data, steps=60, eval_every=60, save_every=9)
    nine_steps(nine)
    assert weights(model) == weights(at_nine)
    assert names(tmp_path / "b") == {"metrics.jsonl", "last.15", "best.9"}
    before = weights(model)
    again = make_model()
    resumed = make_trainer(
        tmp_path / "b", model=again, data=data, objective=Drift(), steps=60, eval_every=3, patience=2
    )
    assert resumed.fit().steps == 15
    assert weights(again) == before


def nine_steps(trainer: loop.Trainer) -> None:
    """Run the loop by hand for nine steps."""
    trainer.folder.mkdir()
    trainer.start_or_resume()
    with trainer.open_log() as trainer.log:
        for _ in range(9):
            trainer.train_step()


class Poison(CausalLoss):
    """A loss, or a gradient, that is not finite at one step."""

    def __init__(self, at: int, kind: str) -> None:
        self.left, self.kind = at, kind

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        loss = super().__call__(model, batch)
        if model.training:
            self.left -= 1
            if self.left == 0 and self.kind == "gradient":
                return loss + (sum(p.sum() for p in model.parameters()) * 0).sqrt()  # 0 with an infinite slope
            if self.left == 0:
                return loss * float(self.kind)
        return loss


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("at", [1, 5, 9])
def test_a_number_that_is_not_finite_stops_before_the_update(tmp_path: Path, kind: str, at: int) -> None:
    """NaN hidden by filters (logging_nan_inf_filter): here it stops that step, and saved weights stay finite."""
    model = make_model()
    trainer = make_trainer(tmp_path, model=model, objective=Poison(at, kind), save_every=2, eval_every=100)
    with pytest.raises(TrainingError, match=f"step {at}:") as error:
        trainer.fit()
    good = (at - 1) // 2 * 2
    said = f"the checkpoint of step {good} is intact" if good else "diverged at step 1: "  # nothing was lost yet
    assert said in str(error.value) and ("intact" in str(error.value)) == (good > 0)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert trainer.state.step == at - 1
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found[1].step == good
    assert "error" in metrics(tmp_path)[-1]
    again = make_model()
    make_trainer(tmp_path, model=again, save_every=2, eval_every=100).fit()
    reference = make_model()
    make_trainer(tmp_path / "whole", model=reference, save_every=2, eval_every=100).fit()
    assert weights(again) == weights(reference)
    assert metrics(tmp_path) == metrics(tmp_path / "whole")


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    class Overflow(CausalLoss):
        def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            loss = super().__call__(model, batch)
            if model.training:
                with torch.no_grad():
                    next(iter(model.parameters())).view(-1)[0] = float("inf")
                return loss * 0 + model.head.project.weight[1].sum()  # type: ignore[union-attr,index]
            return loss

    with pytest.raises(TrainingError):
        make_trainer(tmp_path, objective=Overflow(), steps=3, eval_every=50, save_every=1, max_grad_norm=1e9).fit()
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found[1].step == 0


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("stop_after", [1, 4, 6, 11])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path: Path, dropout: float, stop_after: int) -> None:
    """C26, and Ctrl-C: the step is finished, everything is saved, and the message says how to go on."""
    whole, parts = make_model(dropout=dropout), make_model(dropout=dropout)
    make_trainer(tmp_path / "whole", model=whole, accumulation=2).fit()

    class Signal(CausalLoss):
        left = 2 * stop_after

        def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            Signal.left -= model.training
            if Signal.left == 0 and model.training:
                os.kill(os.getpid(), signal.SIGTERM if dropout else signal.SIGINT)
            return super().__call__(model, batch)

    with pytest.raises(Interrupted, match=f"stopped at step {stop_after} of 12") as error:
        make_trainer(tmp_path / "parts", model=parts, objective=Signal(), accumulation=2).fit()
    assert "--resume" in error.value.fix
    assert error.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    fresh = make_model(seed=5, dropout=dropout)
    torch.manual_seed(123)  # the global generator must not matter
    torch.rand(5)
    result = make_trainer(tmp_path / "parts", model=fresh, accumulation=2).fit()
    assert result.steps == 12
    assert weights(fresh) == weights(whole)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert names(tmp_path / "parts") == names(tmp_path / "whole")
    if dropout:
        plain = make_model()
        make_trainer(tmp_path / "plain", model=plain, accumulation=2).fit()
        assert weights(plain) != weights(whole)


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    class Twice(CausalLoss):
        def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("still here")

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, objective=Twice()).fit()


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    make_trainer(tmp_path, steps=2, dropout=0.1, dtype="auto").fit()
    assert torch.equal(torch.rand(3), expected)


def test_resuming_with_other_settings_or_data_is_refused(tmp_path: Path) -> None:
    """C26: a resumed run that silently differs belongs to neither run."""
    make_trainer(tmp_path).fit()
    with pytest.raises(InputError, match="keep its settings") as error:
        make_trainer(tmp_path, lr=1e-2, steps=20).fit()
    assert "lr = 0.01" in error.value.found
    assert "steps = 20" in error.value.found
    assert "lr = 0.003" in error.value.expected
    with pytest.raises(InputError, match="data have changed"):
        make_trainer(tmp_path, data=make_data(seed=1)).fit()


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    code = (
        "import fcntl, os, sys, time; h = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(h, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match="another process is training in this folder"):
            make_trainer(tmp_path).fit()
        assert names(tmp_path) == set()
        other.kill()
    make_trainer(tmp_path, steps=1).fit()


def test_the_chosen_dtype_is_said_recorded_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "choose_speed", lambda *_, **__: ("bf16", False, "bf16 (measured here)"))
    stream = io.StringIO()
    trainer = make_trainer(tmp_path, dtype="auto", stream=stream, eval_every=2)
    monkeypatch.setattr(trainer, "interrupted", lambda: Interrupted("stop"))
    trainer.objective = StopAt(3)
    with pytest.raises(Interrupted):
        trainer.fit()
    assert "training in bf16 (measured here)" in stream.getvalue()
    monkeypatch.setattr(loop, "choose_speed", lambda *_, **__: pytest.fail("measured again"))
    assert make_trainer(tmp_path, dtype="auto", eval_every=2).fit().dtype == "bf16"


class StopAt(CausalLoss):
    """Sends Ctrl-C in one training step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        self.left -= model.training
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__call__(model, batch)


def test_no_validation_text_keeps_the_last_weights(tmp_path: Path) -> None:
    data = TokenWindows(make_stream(700), context=12, batch_size=BATCH)
    result = make_trainer(tmp_path, data=data).fit()
    assert result.best_loss is None
    assert result.best_step == 12
    assert names(tmp_path) == {"metrics.jsonl", "last.12"}


def test_a_short_run_is_not_compiled_and_a_broken_compiler_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "compile_blocks", lambda _: pytest.fail("compiled"))
    make_trainer(tmp_path / "short", compile="auto").fit()

    def broken(_: nn.Module) -> None:
        raise RuntimeError("no such compiler\ndetails")

    monkeypatch.setattr(machine, "compile_blocks", broken)
    stream = io.StringIO()
    make_trainer(tmp_path / "broken", compile="always", stream=stream).fit()
    assert "not compiled: no such compiler\n" in stream.getvalue()
    found = load_checkpoint(tmp_path / "broken")
    assert found is not None
    assert not found[1].compiled


def kept_bytes(trainer: Trainer) -> int:
    """Return the bytes of everything that a forward pass keeps for the backward pass, parameters not counted."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = machine.to_device(trainer.data.batch(0), trainer.device)
    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trainer.objective(trainer.model, batch)
    return sum(kept.values())


def test_recomputing_blocks_gives_the_same_gradients_and_keeps_less(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dropout=0.2)
    batch = trainer.data.batch(0)
    found = []
    for recompute in (False, True):
        with machine.recompute_blocks(trainer.model.train(), recompute):
            loss = trainer.accumulate(batch, 0, 96)
        found.append((loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters()}))  # type: ignore[union-attr]
        trainer.optimizer.zero_grad()
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], atol=1e-6), name
    whole = kept_bytes(trainer)
    with machine.recompute_blocks(trainer.model):
        less = kept_bytes(trainer)
    assert less < 0.4 * whole
    assert not any("forward" in vars(module) for module in trainer.model.modules())


def test_recomputing_and_compiling_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="compiled blocks cannot be recomputed"):
        make_trainer(tmp_path, gradient_checkpointing=True, compile="always")


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True, "accumulation": 2},
        {"optimizer": "sgd", "momentum": 0.8, "schedule": "linear"},
        {"optimizer": "sgd", "momentum": 0.0, "clip_value": 0.01, "schedule": "wsd"},
        {"optimizer": "adam", "layer_decay": 0.7, "max_grad_norm": 0.0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_way_to_train_resumes_to_the_same_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = make_trainer(tmp_path / "whole", dropout=0.2, **changes)
    whole.fit()
    with pytest.raises(Interrupted):
        make_trainer(
            tmp_path / "parts", dropout=0.2, objective=StopAt(7 * changes.get("accumulation", 1)), **changes
        ).fit()
    parts = make_trainer(tmp_path / "parts", dropout=0.2, **changes)
    parts.fit()
    assert weights(whole.model) == weights(parts.model)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert weights(whole.model) != weights(make_model(dropout=0.2))
    saved = {p: (tmp_path / p / "last.12" / "optimizer.safetensors").read_bytes() for p in ("whole", "parts")}
    assert saved["whole"] == saved["parts"]


def test_the_norm_before_clipping_is_logged_and_decides_the_step(tmp_path: Path) -> None:
    """SGD without momentum makes the clipped gradient visible: w moves by lr times it."""
    for name, changes in {"norm": {"max_grad_norm": 0.1}, "value": {"clip_value": 1e-3}, "off": {}}.items():
        model, settings = make_model(), {"max_grad_norm": 0.0, **changes}
        before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
        make_trainer(
            tmp_path / name, model=model, steps=1, warmup=0, lr=1.0, optimizer="sgd", momentum=0.0, weight_decay=0.0,
            **settings,
        ).fit()  # fmt: skip
        moved = before - torch.cat([p.detach().flatten() for p in model.parameters()])
        norm = metrics(tmp_path / name)[0]["grad_norm"]
        assert norm > 0.1
        if name == "value":
            assert moved.abs().max() <= 1.01e-3
            assert (moved.abs() > 0.99e-3).any()
        else:
            assert float(moved.norm()) == pytest.approx(0.1 if name == "norm" else norm, rel=1e-3)


@pytest.mark.parametrize(("min_delta", "steps"), [(0.0, 12), (10.0, 6)])
def test_patience_counts_improvements_of_min_delta(tmp_path: Path, min_delta: float, steps: int) -> None:
    """Every validation is better, but not by so much; the best weights are kept all the same."""
    result = make_trainer(tmp_path, steps=12, eval_every=3, patience=1, lr=1e-2, min_delta=min_delta).fit()
    losses = [loss for _, loss in result.history.validation]
    assert losses == sorted(losses, reverse=True)
    assert result.steps == steps
    assert result.best_step == steps
    assert result.stopped_early == (steps < 12)


def test_small_gains_add_up() -> None:
    state = State()
    judged = []
    for score in (-3.0, -2.96, -2.92, -2.88, -2.89):
        best = state.judge(score, -score, min_delta=0.1)
        judged.append((best, state.waited))
    assert judged == [(True, 0), (True, 1), (True, 2), (True, 0), (False, 1)]


def test_fp16_on_a_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp16 needs a CUDA device") as caught:
        make_trainer(tmp_path, dtype="fp16")
    assert "bf16" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_the_loss_scale_is_that_of_torchs_grad_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "GROWTH_STEPS", 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    scaler.scale(torch.zeros(1))  # which makes its state
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.1)
    scale, good = 2.0**16, 0
    for overflow in [False] * 4 + [True, True, False, True] + [False] * 7:
        p.grad = torch.tensor([math.inf if overflow else 1.0])
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scale, good = machine.next_loss_scale(scale, good, overflow=overflow)
        assert (scale, good) == (scaler.get_scale(), scaler.state_dict()["_growth_tracker"])


class Overflow(CausalLoss):
    """Has an infinite gradient, and a finite loss, in the fourth and fifth training step."""

    def __init__(self, *, interrupt_at: int = 0, calls: int = 0) -> None:
        self.calls, self.interrupt_at = calls, interrupt_at

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        loss = super().__call__(model, batch)
        if model.training:
            self.calls += 1
            if self.calls in (4, 5):
                weight = next(model.parameters())
                loss = loss + (weight.flatten()[0] * 0.0).sqrt() * 1e-3  # the slope of a square root at zero
            if self.calls == self.interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
        return loss


def test_an_overflow_skips_the_step_and_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only a CUDA device would do, on a processor, whose fp16 is slow but exact."""
    monkeypatch.setattr(loop, "check_dtype", lambda dtype, device: None)
    stream = io.StringIO()
    whole = make_trainer(tmp_path / "whole", dtype="fp16", objective=Overflow(), dropout=0.1, stream=stream)
    whole.fit()
    rows = [row for row in metrics(tmp_path / "whole") if "loss" in row]
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [4, 5]
    assert [row["overflow"] for row in rows if "overflow" in row] == [2.0**16, 2.0**15]
    assert "fp16 overflow at a loss scale of 65536: step skipped" in stream.getvalue()
    assert (whole.state.skipped, whole.state.loss_scale, whole.state.good_steps) == (2, 2.0**14, 7)
    with pytest.raises(Interrupted):
        make_trainer(tmp_path / "parts", dtype="fp16", objective=Overflow(interrupt_at=8), dropout=0.1).fit()
    parts = make_trainer(tmp_path / "parts", dtype="fp16", objective=Overflow(calls=8), dropout=0.1)
    parts.fit()
    assert weights(whole.model) == weights(parts.model)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    plain = make_trainer(tmp_path / "fp32", dropout=0.1)
    plain.fit()
    first, exact = rows[0], metrics(tmp_path / "fp32")[0]
    assert first["loss"] == pytest.approx(exact["loss"], rel=1e-2)
    assert first["grad_norm"] == pytest.approx(exact["grad_norm"], rel=5e-2)  # the scale is taken off again


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_run_resumes_to_the_same_bits_in_another_process(tmp_path: Path) -> None:
    """Compiled blocks and dropout; each sitting compiles again, the last from an empty cache."""
    script = (
        "import sys; from small import *; "
        "make_trainer(sys.argv[1], dropout=0.1, accumulation=2, compile='always', objective=OBJECTIVE).fit()"
    )
    stop = (
        "import os, signal\nfrom small import CausalLoss\n"
        "class Stop(CausalLoss):\n"
        "    left = 11\n"
        "    def __call__(self, model, batch):\n"
        "        self.left -= model.training\n"
        "        if self.left == 0: os.kill(os.getpid(), signal.SIGINT)\n"
        "        return super().__call__(model, batch)\n"
    )
    results = {}
    for name, sittings in {"whole": ["CausalLoss()"], "parts": ["Stop()", "CausalLoss()"]}.items():
        for i, objective in enumerate(sittings):
            environment = {
                **os.environ, "LMWORKS_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"cache-{name}-{i}"),
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            }  # fmt: skip
            code = stop + script.replace("OBJECTIVE", objective)
            done = subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / name)], env=environment, capture_output=True, text=True
            )
            assert (done.returncode == 0) == (objective == "CausalLoss()"), done.stderr
            assert objective == "CausalLoss()" or "everything is saved" in done.stderr
        found = load_checkpoint(tmp_path / name)
        assert found is not None
        assert found[1].compiled
        results[name] = {p.name: p.read_bytes() for p in found[0].glob("*.safetensors")}, metrics(tmp_path / name)
    assert results["whole"] == results["parts"]
    eager = make_model(dropout=0.0)
    make_trainer(tmp_path / "eager", model=eager, accumulation=2).fit()
    curve = [row["val_loss"] for row in metrics(tmp_path / "eager") if "val_loss" in row]
    compiled = [row["val_loss"] for row in results["whole"][1] if "val_loss" in row]
    assert compiled == pytest.approx(curve, rel=0.05)  # the same training, but for dropout
