"""The versions of a served model: who answers, who may, and what is written down of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lmworks.evaluation.monitor import Monitor
from lmworks.serve.challenger_counts import Tally
from lmworks.serve.supervisor import Model, Supervisor

OWN = ""  # the folder that the server was started with


@dataclass
class Version:
    """A folder that can answer for a model; `low`: in the shadow only."""

    name: str
    model: Model
    monitor: Monitor | None
    low: bool = False
    seal: str = ""  # of its files; of the folder of the command line none

    @property
    def engine(self) -> Supervisor:
        """Whose engine holds it."""
        assert self.model.home is not None
        return self.model.home


@dataclass
class Contest:
    """The versions of one model. `other` is the challenger, or once `switched` the one to go back to."""

    own: Version
    current: Version
    other: str | None = None
    loaded: Version | None = None  # `other`, where it is
    seal: str = ""  # of what was loaded as `other`: nothing else may take over under its name
    switched: bool = False
    share: float = 0.0
    problem: str = ""
    tally: Tally = field(default_factory=Tally)

    def kept(self, **now: Any) -> dict[str, Any]:
        """Return what is written down."""
        kept = {"current": self.current.name, "other": self.other, "switched": self.switched, "share": self.share}
        return kept | now
