"""Learn from a few examples of each label, several times, and say how much the choice of the examples matters.

An encoder is trained on them (`tune_draws`); a decoder sees them in its prompt (`evaluate_prompts`). Nothing is chosen
by the held-out examples: every draw trains to its last step, and the first draw's model is the one that is kept,
whether or not it was lucky.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from lmworks.base.errors import InputError
from lmworks.base.files import read_json, write_json
from lmworks.base.report import Cell, Report, Table, counted
from lmworks.text.labelled import Labelled
from lmworks.training.data import draw
from lmworks.training.tuning import Tuning

if TYPE_CHECKING:
    from lmworks.evaluation.prompting import Prompting
    from lmworks.training.finetune import Setup, Tuned

DRAWS = "draws.json"
SHOTS, SHOWN = 2**32 + 24, 2**32 + 25  # random streams
Baselines = Callable[["Setup", Labelled], dict[str, dict[str, float]]]


def draw_shots(data: Labelled, shots: int, seed: int) -> Labelled:
    """Return `shots` examples of each label, chosen by the seed, in the order of the data.

    Raises InputError where an example has no single label, or a label has too few examples.
    """
    if not data.references or not isinstance(data.references[0], str):
        raise InputError("--shots is for examples with one label each", where=data.where)
    order = sorted(enumerate(draw(seed, 0, len(data), stream=SHOTS).tolist()), key=lambda row: row[1])
    chosen: dict[str, list[int]] = {label: [] for label in data.labels}
    for place, _ in order:
        if len(chosen[data.references[place]]) < shots:
            chosen[data.references[place]].append(place)
    few = {label: len(places) for label, places in chosen.items() if len(places) < shots}
    if few:
        label, count = min(few.items(), key=lambda pair: pair[1])
        raise InputError(
            f'the label "{label}" has fewer examples than --shots {shots}',
            where=data.where, found=f"{count}", fix=f"--shots {count}, or more data",
        )  # fmt: skip
    kept = sorted(place for places in chosen.values() for place in places)
    return replace(data, examples=[data.examples[i] for i in kept], references=[data.references[i] for i in kept])


def tune_draws(
    folder: Path, data: Labelled, held_out: Labelled, run: Path, *, task: str, tuning: Tuning,
    baselines_of: Baselines, stream: TextIO | None = None,
) -> tuple[Setup, Tuned, Labelled, dict[str, dict[str, float]]]:  # fmt: skip
    """Fine-tune on every draw, or on those that an interrupted run lacks; return what the first one left.

    That is its Setup and Tuned (with the metrics of all draws), its examples, and its baselines.
    """
    from lmworks.evaluation.metrics import score
    from lmworks.training.finetune import set_up, tune
    from lmworks.training.measure import answer

    assert tuning.shots is not None
    done: dict[str, Any] = read_json(run / DRAWS) if (run / DRAWS).is_file() else {}
    first = None
    for number in range(tuning.draws):
        if number and str(number) in done:
            continue
        one = replace(tuning, seed=(tuning.seed + number) % 2**32)
        shots = draw_shots(data, tuning.shots, one.seed)
        setup = set_up(folder, shots, held_out, task=task, tuning=one)
        place = run / f"draw-{number + 1}"
        place.mkdir(exist_ok=True)
        found = done.get(str(number), {}).get("baselines") or baselines_of(setup, shots)
        setup.data.held_out, setup.data.held_plan = (), []
        tuned = tune(setup, held_out, place, task=task, tuning=one, stream=stream)
        said = answer(setup.predictor, held_out, problem=setup.problem)
        metrics = score(task, said, held_out.references, labels=setup.model.config.labels)
        done[str(number)] = {"seed": one.seed, "metrics": metrics, "baselines": found}
        write_json(run / DRAWS, done)
        if number:
            shutil.rmtree(place)
        else:
            first = setup, tuned, shots, found
    assert first is not None
    setup, tuned, shots, found = first
    rows = tuple(dict(done[str(number)]["metrics"]) for number in range(tuning.draws))
    others = {name: tuple(dict(done[str(i)]["baselines"][name]) for i in range(tuning.draws)) for name in found}
    return setup, replace(tuned, draws=rows, baseline_draws=others), shots, found


def spread(draws: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return mean, sd (with n - 1; 0 for one draw), min and max of each metric over the draws."""
    found = {}
    for name in draws[0]:
        values = np.array([draw[name] for draw in draws])
        sd = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        found[name] = {"mean": float(values.mean()), "sd": sd, "min": float(values.min()), "max": float(values.max())}
    return found


def spread_tables(
    draws: Sequence[Mapping[str, float]], others: Mapping[str, Sequence[Mapping[str, float]]] | None = None
) -> tuple[Table, ...]:
    """Return the spread of each metric of the model and of its baselines; nothing where there are no draws."""
    if not draws:
        return ()
    rows: list[tuple[Cell, ...]] = [
        (who, name, *numbers.values())
        for who, some in {"this model": draws, **(others or {})}.items()
        for name, numbers in spread(some).items()
    ]
    title = f"Over {len(draws)} draws of the examples" if len(draws) > 1 else "One draw of the examples"
    return (Table(title, ("model", "metric", "mean", "sd", "min", "max"), tuple(rows)),)


def evaluate_prompts(
    model: str | Path, path: str | Path, prompt: Prompting, *, text_column: str | None = None,
    label_column: str | None = None, header: bool = True, split: str | None = None, runtime: str = "auto",
    dtype: str = "auto", revision: str | None = None,
) -> Report:  # fmt: skip
    """Score a language model as a classifier: it sees some examples of each label and says the label of a text.

    Raises InputError for data, a template or words that cannot be used.
    """
    from lmworks.evaluation import prompting
    from lmworks.evaluation.metrics import score
    from lmworks.runtime.predictor import load
    from lmworks.text.labelled import check_labels, read_labelled

    template = prompting.check_template(prompt.template or "")
    shots, draws, train = prompt.shots, prompt.draws, prompt.train
    if shots < 0 or draws < 1 or (shots and train is None) or (draws > 1 and not shots):
        raise InputError(
            "these examples cannot be shown", found=f"--shots {shots}, --draws {draws}, --train {train}",
            fix="--train FILE --shots 4; without shots there is one draw",
        )  # fmt: skip
    columns: dict[str, Any] = {"text_column": text_column, "label_column": label_column, "header": header}
    data = read_labelled(path, "text-classification", split=split, **columns)
    known = data if train is None else read_labelled(train, "text-classification", **columns)
    data = check_labels(known, data)
    if not isinstance(data.references[0], str):
        raise InputError("a prompt is for texts with one label each", where=data.where)
    says = prompting.read_words(prompt.words, known.labels)
    predictor = load(model, "text-generation", runtime=runtime, dtype=dtype, revision=revision)
    found: list[dict[str, float]] = []
    for number in range(draws):
        shown = show_shots(known, shots, (prompt.seed + number) % 2**32)
        texts = [*data.examples, *(prompting.NO_CONTENT if prompt.calibrate else ())]
        prompts = prompting.make_prompts(template, shown.examples, shown.references, says, texts)
        scores = prompting.score_labels(
            predictor.runtime, predictor.tokenizer, prompts, list(says.values()), per_token=prompt.per_token
        )  # (N, L)
        if prompt.calibrate:
            scores = prompting.calibrate(scores[: len(data)], scores[len(data) :])
        said = [known.labels[i] for i in scores.argmax(1).tolist()]
        found.append(score("text-classification", said, data.references, labels=known.labels))
    metrics = {name: numbers["mean"] for name, numbers in spread(found).items()}
    values = {
        "model": str(model), "task": "text-classification", "examples": len(data), **metrics, "metrics": metrics,
        "draws": found, "spread": spread(found), "shots": shots, "words": says, "template": template,
        "calibrated": prompt.calibrate, "per_token": prompt.per_token, "seed": prompt.seed,
    }  # fmt: skip
    title = f"{model}: {counted(len(data), 'text')}, {counted(shots, 'example')} of each label"
    return Report(title, values, tables=spread_tables(found))


def show_shots(data: Labelled, shots: int, seed: int) -> Labelled:
    """Return the examples of a prompt, in an order chosen by the seed."""
    if not shots:
        return replace(data, examples=[], references=[])
    chosen = draw_shots(data, shots, seed)
    order = np.argsort(draw(seed, 0, len(chosen), stream=SHOWN), kind="stable").tolist()
    return replace(
        chosen, examples=[chosen.examples[i] for i in order], references=[chosen.references[i] for i in order]
    )
