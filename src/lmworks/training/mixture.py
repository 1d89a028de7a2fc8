"""Rows of several domains in one run: each batch has its share of every domain.

An epoch is one pass over the main domain. Of the other domains it reads as many rows as their weights ask for, where
the last epoch stopped, over and over again in orders of their own.

Shapes: n rows of the main domain, N rows of an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.training.data import draw

if TYPE_CHECKING:
    from lmworks.text.labelled import Labelled
    from lmworks.training.examples import Row

OTHERS = 2**32 + 2**16  # the random stream of the first other domain; the next ones follow


@dataclass(frozen=True)
class Domain:
    """What a run learns besides its main data: a name, its share of each batch, and data to train and validate on."""

    name: str
    weight: float
    train: Labelled
    held_out: Labelled


@dataclass(frozen=True)
class DomainRows:
    """The encoded rows of a domain."""

    name: str
    weight: float
    rows: Sequence[Row]
    held_out: Sequence[Row]


def read_weight(text: str) -> tuple[Path, float]:
    """Read FILE=WEIGHT: "law.jsonl=0.3" -> (law.jsonl, 0.3); raise InputError for anything else."""
    name, _, number = text.rpartition("=")
    weight = read_share(number)
    if not name or not weight:
        raise InputError(
            "--also is not a file and its share",
            found=text,
            expected="FILE=WEIGHT, with a weight between 0 and 1, such as law.jsonl=0.3",
            fix="the weight is the file's share of each batch",
        )
    return Path(name), weight


def read_share(text: str) -> float:
    """Return the number that a text says, 0 where it is none between 0 and 1."""
    try:
        weight = float(text)
    except ValueError:
        return 0.0
    return weight if 0 < weight < 1 else 0.0


def find_split(file: Path) -> tuple[Path, str | None]:
    """Read FILE:SPLIT where FILE is there: clinc.json:train -> (clinc.json, "train"); else there is no split."""
    name, colon, split = str(file).rpartition(":")
    return (Path(name), split) if colon and not file.exists() and Path(name).exists() else (file, None)


def check_weights(weights: Sequence[float], option: str = "--also") -> None:
    """Raise InputError where the others leave nothing for the main data."""
    if sum(weights) > 0.99:
        raise InputError(
            f"the weights of {option} leave nothing for the training data",
            found=" + ".join(f"{weight:g}" for weight in weights) + f" = {sum(weights):g}",
            expected="a sum below 1: the rest is the training data's share",
        )


def name_domains(files: Sequence[Path]) -> list[str]:
    """Name files by their stems, with the folder where two are alike: a/x.txt b/x.txt y.txt -> a/x b/x y."""
    stems = [file.stem for file in files]
    names = [
        stem if stems.count(stem) == 1 else f"{file.absolute().parent.name}/{stem}"
        for file, stem in zip(files, stems, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{name}.{i + 1}" for i, name in enumerate(names)]


def share(count: int, weights: Sequence[float]) -> list[int]:
    """Return how many rows of each other domain go with `count` rows of the main one."""
    main = 1 - sum(weights)
    return [max(1, round(count * weight / main)) for weight in weights]


def mix(
    order: NDArray[np.int64], sizes: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Spread rows of other domains evenly between those of the main one: (n,) -> rows (N,) and their domains (N,).

    The rows of domain i are numbered behind those of the domains before it; the main domain is 0.
    """
    first, parts = len(order), [order]
    for i, (size, count) in enumerate(zip(sizes, share(len(order), weights), strict=True)):
        places = np.arange(epoch * count, (epoch + 1) * count)
        shuffled = {
            turn: np.argsort(draw(seed, turn, size, stream=OTHERS + i), kind="stable")
            for turn in np.unique(places // size).tolist()
        }
        parts.append(
            first + np.array([shuffled[turn][place] for turn, place in zip(*divmod(places, size), strict=True)])
        )
        first += size
    domains = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    even = np.argsort(np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in parts]), kind="stable")
    return np.concatenate(parts)[even], domains[even]


def rank_within(values: NDArray[Any], domains: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return where each value stands in its own domain, from 0 (largest) to 1: sorted by it, domains stay mixed."""
    rank = np.empty(len(values))
    for domain in np.unique(domains):
        places = np.flatnonzero(domains == domain)
        rank[places[np.argsort(-values[places], kind="stable")]] = (np.arange(len(places)) + 0.5) / len(places)
    return rank
