"""Every knob of `lmworks quantize` and `lmworks prune`: the command line's flags. Torch-free until they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmworks.base.errors import InputError

PathLike = str | Path


@dataclass(frozen=True, kw_only=True)
class Quantizing:
    """How to round a model.

    Parameters
    ----------
    bits
        8 or 4.
    group
        How many numbers of a row share a scale: 32, 64, 128; 0: one scale an output. By default 64 for 4 bits, else 0.
    per_tensor
        One scale for a whole matrix instead.
    asymmetric
        Give each scale a zero of its own: for weights alone.
    activations
        What the layers read: dynamic rounds it to 8 bits as it comes (the fastest), static by calibration on --data,
        none leaves floats. By default dynamic for 8 bits in rows, else none.
    percentile
        Of the inputs of calibration that a static scale covers.
    embeddings
        Round the table of tokens too.
    skip
        Layers that stay as they are, by our names: transformer.layers.0.mlp.down_proj.
    tolerance
        Leave the layers that mind most as they are until the KL divergence on --data is at most this.
    """

    bits: Literal[8, 4] = 8
    group: int | None = None
    per_tensor: bool = False
    asymmetric: bool = False
    activations: Literal["auto", "none", "dynamic", "static"] = "auto"
    percentile: float = 100.0
    embeddings: bool = True
    skip: tuple[str, ...] = ()
    tolerance: float | None = None

    def grid(self) -> Any:
        """Return the whole numbers; raise InputError for what does not go together."""
        from lmworks.models.compact import Grid

        group = (64 if self.bits == 4 and not self.per_tensor else 0) if self.group is None else self.group
        if self.per_tensor and group:
            raise InputError("a matrix has one scale or groups", fix="leave out --group or --per-tensor")
        if not 50 < self.percentile <= 100:
            raise InputError("--percentile is out of range", found=f"{self.percentile}", expected="above 50, up to 100")
        if self.percentile < 100 and self.activations != "static":
            raise InputError("--percentile is of static activations", fix="add --activations static, or leave it out")
        if self.tolerance is not None and not self.tolerance > 0:
            raise InputError(
                "--tolerance is out of range", found=f"{self.tolerance}", expected="above 0, such as 0.001"
            )
        plain = not group and not self.asymmetric
        activations = ("dynamic" if plain else "none") if self.activations == "auto" else self.activations
        per: str | int = "tensor" if self.per_tensor else group or "channel"
        return Grid(bits=self.bits, per=per, symmetric=not self.asymmetric, activations=activations)


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """How to prune a model.

    Parameters
    ----------
    sparsity
        Share of the weights that become zero; with --structured of the neurons that are removed.
    scope
        The smallest weights of all layers together, or of each layer.
    structured
        Remove whole neurons, so that matrices shrink.
    heads
        Share of the attention heads to remove as well.
    importance
        What a neuron is worth: its weights, or taylor: what the loss on --data would change by without it.
    energy
        Factorize instead: the share of the squared singular values that a matrix keeps; where it gets smaller.
    epochs
        Fine-tune on --data so often; the zeros come gradually in its first half, or a smaller network recovers.
    lr
        Highest learning rate of that.
    batch_size
        Rows in one optimizer step of that.
    seed
        Decides what is held out, the batches and dropout.
    """

    sparsity: float = 0.5
    scope: Literal["global", "layer"] = "global"
    structured: bool = False
    heads: float = 0.0
    importance: Literal["magnitude", "taylor"] = "magnitude"
    energy: float | None = None
    epochs: int = 0
    lr: float = 5e-5
    batch_size: int = 32
    seed: int = 0

    def check(self, data: PathLike | None) -> Pruning:
        """Return it; raise InputError for what cannot be, or needs data."""
        from lmworks.compress.prune import check_share

        check_share(self.sparsity)
        check_share(self.heads)
        if self.epochs < 0:
            raise InputError("--epochs is out of range", found=str(self.epochs), expected="0 or more")
        if self.heads and not self.structured:
            raise InputError("heads are removed whole", fix="add --structured")
        if self.energy is not None and self.structured:
            raise InputError("a layer is factorized or shrunk", fix="leave out --energy or --structured")
        idle = {
            "sparsity": self.energy is not None, "scope": self.energy is not None or self.structured,
            "importance": not self.structured, "lr": not self.epochs,
            "batch_size": not self.epochs and self.importance != "taylor",
        }  # fmt: skip
        found = [name for name, unused in idle.items() if unused and name in self.given()]
        if found:
            raise InputError("this changes nothing here", found=say_options(found),
                             fix="leave it out; --importance is for --structured, --lr and --batch-size for --epochs, "
                             "and --energy takes the place of --sparsity")  # fmt: skip
        if data is None and (self.epochs or (self.structured and self.importance == "taylor")):
            raise InputError("this learns from examples", found="no --data", fix="give --data FILE")
        return self

    def given(self) -> list[str]:
        """Return the knobs that are not as they are by default."""
        return [name for name, value in vars(self).items() if value != getattr(Pruning, name)]


def say_options(names: Sequence[str]) -> str:
    """Return knobs as the command line calls them."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
