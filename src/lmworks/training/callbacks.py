"""What may listen to a training run, and end it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from lmworks.training.train_config import TrainResult

if TYPE_CHECKING:
    from lmworks.training.trainer import Trainer


class Callback(Protocol):
    """Hooks of a run; a subclass overrides those it needs, and the others do nothing.

    `row` is what metrics.jsonl says of this step (loss, lr, grad_norm …) or validation (val_loss, best …).
    `trainer.stop("reason")` in any hook ends the run after this step: it is validated and saved, the reason is in its
    result, and resuming it adds no step. A callback that changes the model makes the run its own: what it does must
    follow from the step alone if a resumed run is to end with the same bits.
    """

    def on_start(self, trainer: Trainer) -> None:
        """The run begins, or goes on after step `trainer.state.step`."""
        return

    def on_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """An optimizer step is done and in the log."""
        return

    def on_validation(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """A validation is done and in the log."""
        return

    def on_end(self, trainer: Trainer, result: TrainResult | None) -> None:
        """The sitting is over; the result is None where an error or an interruption ended it."""
        return
