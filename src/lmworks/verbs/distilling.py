"""Distil a fine-tuned model into a smaller one: fewer of its own layers, or another checkpoint.

    lmworks distill TEACHER TRAIN --layers 3 -o OUT     OUT is a model folder, its report has both side by side

The loss is in training/distillation.py; data, folder, resume and report are those of fine-tuning.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.files import check_output, write_json
from lmworks.base.hub import find_folder
from lmworks.base.knobs import check_ranges, check_useful, read_knobs
from lmworks.base.optional import require
from lmworks.base.report import Report, Table
from lmworks.models.families import read_config, read_kind
from lmworks.tasks.base import Long, one_of
from lmworks.tasks.registry import find_task
from lmworks.text.labelled import Labelled
from lmworks.training.schedule import Shape
from lmworks.training.tuning import Dtype, Tuning
from lmworks.verbs.finetune_data import as_json, fingerprint, read_data
from lmworks.verbs.finetune_folder import BASELINES, find_baselines, publish, tuning_folder
from lmworks.verbs.run import check_same_run

if TYPE_CHECKING:
    from lmworks.models.heads import Model
    from lmworks.training.distillation import DistillationLoss, Teacher
    from lmworks.training.finetune import Setup

DISTILLABLE = ("text-classification", "token-classification", "question-answering", "fill-mask", "text-generation")
BEFORE = "student before distillation"
PathLike = str | Path


@dataclass(frozen=True, kw_only=True)
class Distilling:
    """How to distil.

    Parameters
    ----------
    student
        A checkpoint with the teacher's tokenizer to begin with, of any size; none: some of the teacher's own layers.
    layers
        How many of the teacher's layers the student begins with, evenly spaced, the first and the last among them.
    keep_layers
        Which layers instead, counted from 0, such as 0,2,4.
    temperature
        Softens what both say: the higher, the more the unlikely answers count.
    alpha
        Share of the loss that is the distance to what the teacher says; the rest is that to the data's labels.
    hidden_weight
        Weight of the distance between the layers of both; 0 compares only what they say.
    hidden
        The distance of layers: cosine, as DistilBERT, or mse.
    epochs
        Times that every example is seen.
    lr
        Highest learning rate.
    batch_size
        Rows in one optimizer step.
    accumulation
        Parts into which each batch is split to save memory; the result is the same.
    max_length
        Tokens of an input at most; by default what both models take.
    long
        A text that is longer: refuse it, cut it, or read it in windows.
    warmup
        Share of the steps in which the learning rate rises.
    schedule
        How the rate goes on after the warm-up: cosine, linear, constant, or wsd (stable, then linear).
    weight_decay
        Decay of the matrices; vectors are not decayed.
    max_grad_norm
        Clip the global norm of the gradient at this; 0 is off.
    class_weights
        Weigh the labels' part of the loss so that all classes count alike.
    balanced
        Draw the rows so that all classes come equally often.
    every_token
        Score all tokens of a word, not only its first.
    whole_words
        Hide whole words (fill-mask).
    patience
        Stop after this many validations without a better score; 0 never stops early.
    dtype
        auto measures bf16 against fp32 on this processor and takes the faster.
    seed
        Decides what is held out, a new head, the batches and dropout.
    """

    student: str | None = None
    layers: int | None = None
    keep_layers: str = ""
    temperature: float = 2.0
    alpha: float = 0.5
    hidden_weight: float = 1.0
    hidden: Literal["cosine", "mse"] = "cosine"
    epochs: int = 3
    lr: float = 5e-5
    batch_size: int = 16
    accumulation: int = 1
    max_length: int | None = None
    long: Long = "error"
    warmup: float = 0.1
    schedule: Shape = "cosine"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    class_weights: bool = False
    balanced: bool = False
    every_token: bool = False
    whole_words: bool = False
    patience: int = 0
    dtype: Dtype = "auto"
    seed: int = 0

    def check(self) -> Distilling:
        """Return the knobs as they are; raise InputError for a value that cannot be meant."""
        one_of(self.hidden, ("cosine", "mse"), "distance of layers")
        check_ranges(self, RANGES)
        if self.alpha == 0 and self.hidden_weight == 0:
            raise InputError("nothing would be learned from the teacher", found="--alpha 0 --hidden-weight 0",
                             fix="raise one of them, or use lmworks finetune")  # fmt: skip
        plain = Distilling()
        check_useful(
            {
                "--hidden is how layers are compared": (
                    self.hidden != plain.hidden and not self.hidden_weight, "--hidden-weight 0"
                ),
                "--temperature is for what the teacher says": (
                    self.temperature != plain.temperature and not self.alpha, "--alpha 0"
                ),
                "--class-weights is for the labels of the data": (self.class_weights and self.alpha == 1, "--alpha 1"),
            }
        )  # fmt: skip
        begins = [self.student is not None, self.layers is not None, bool(self.keep_layers)]
        if sum(begins) > 1:
            raise InputError("a student begins in one way", fix="give one of --student, --layers and --keep-layers")
        self.kept()
        self.tuning().check()
        return self if any(begins) else replace(self, layers=3)

    def kept(self) -> list[int]:
        """Return the layers of `keep_layers`."""
        try:
            return [int(word) for word in self.keep_layers.split(",")] if self.keep_layers else []
        except ValueError:
            raise InputError("--keep-layers holds no numbers", found=self.keep_layers, expected="0,2,4") from None

    def tuning(self) -> Tuning:
        """Return the knobs that are those of any fine-tuning run."""
        names = [f.name for f in fields(self)]
        return Tuning(**{name: getattr(self, name) for name in names[names.index("epochs") :]})

    @staticmethod
    def from_dict(knobs: Mapping[str, Any]) -> Distilling:
        """Return the knobs of these names; an unknown one is an InputError with a suggestion."""
        return read_knobs(Distilling, knobs)


RANGES: dict[str, tuple[float, float]] = {
    "layers": (1, 2000), "temperature": (0.01, 100.0), "alpha": (0.0, 1.0), "hidden_weight": (0.0, 1000.0),
}  # fmt: skip


def distill(
    teacher: PathLike,
    train: PathLike,
    out: PathLike,
    *,
    validation: PathLike | None = None,
    task: str | None = None,
    knobs: Distilling | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    header: bool = True,
    split: str | None = None,
    revision: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    **settings: Any,
) -> Report:
    """Teach a student what a teacher says, on labelled data; `out` is a folder in the Hugging Face layout.

    `teacher` is a model folder or a PEFT adapter's. `settings` are those of `Distilling`. `values["kept"]` is the
    student's score over the teacher's, `values["time_share"]` its time over the teacher's. Raises InputError for models
    that do not fit each other or the data; Interrupted after Ctrl-C, and `resume` continues to the same bits.
    """
    require("torch", extra="torch")
    from lmworks.training.distillation import drop_match, open_teacher
    from lmworks.training.distributed import find_ranks
    from lmworks.training.finetune import tune
    from lmworks.training.side_by_side import compare

    ranks = find_ranks()
    with ranks.together():
        out, knobs = Path(out), (knobs or Distilling.from_dict(settings)).check()
        check_output(out, overwrite=overwrite, resume=resume)
        folder = find_folder(teacher, revision=revision)
        task = task or find_task(read_kind(read_config(folder)))
        if task not in DISTILLABLE:
            raise InputError(f"no distillation for the task {task!r}", expected=", ".join(DISTILLABLE),
                             fix=f"choose one with --task;{did_you_mean(task, DISTILLABLE)}".rstrip(";"))  # fmt: skip
        columns: dict[str, Any] = {"text_column": text_column, "label_column": label_column, "header": header}
        data, held_out = read_data(Path(train), validation, task, split, knobs.seed, columns)
        opened = open_teacher(folder, task)
        check_answers(opened.model, folder, data)
        setup, tuning, place = set_up_student(opened, folder, data, held_out, task, knobs)
    if dry_run:
        from lmworks.verbs.tuning_report import estimate

        return estimate(setup, tuning, task, notes=(*data.notes, *held_out.notes))
    known = {"teacher": str(teacher), "teacher_sha256": opened.sha256}
    with ranks.on_first(tuning_folder(out, resume=resume, overwrite=overwrite)) as run:
        given = {**known, "task": task, **as_json(asdict(knobs))}
        ranks.once(lambda: check_same_run(run, given, fingerprint(data, held_out)))
        baselines = ranks.once(lambda: first_scores(run / "training" / BASELINES, setup, data, held_out))
        tuned = tune(setup, held_out, run / "training", task=task, tuning=tuning, stream=sys.stderr)
        drop_match(setup.model)

        def publish_student() -> Report:
            done, found = compare(opened.model, opened.files, tuned, setup, held_out, task=task, tuning=tuning)
            facts = {**known, **found, "settings": asdict(knobs)}
            return publish(
                run, place, knobs.student or teacher, done, setup, data, held_out, baselines, tuning, task, out,
                amend=lambda report: with_teacher(report, facts, Path(teacher).name, task), more=facts,
            )  # fmt: skip

        return ranks.once(publish_student)


def check_answers(teacher: Model, folder: Path, data: Labelled) -> None:
    """Raise InputError where the data have labels that the teacher does not know, or of another kind."""
    from lmworks.training.measure import problem_type

    problem, known = problem_type(data), teacher.config.labels
    usual = "regression" if len(known) == 1 else "single_label_classification"  # where config.json says nothing
    if problem is not None and problem != (teacher.config.problem_type or usual):
        raise InputError("the data have another kind of label than the teacher", where=data.where, found=problem,
                         expected=f"{teacher.config.problem_type or usual} ({folder})")  # fmt: skip
    missing = [label for label in data.labels if label not in known]
    if missing:
        near = did_you_mean(missing[0], known)
        raise InputError(
            f'the teacher does not know the label "{missing[0]}"', where=data.where, found=", ".join(data.labels[:10]),
            expected=f"{', '.join(known[:10])} ({folder})",
            fix=f"correct the label, or fine-tune a teacher on these data;{near}".rstrip(";"),
        )  # fmt: skip


def set_up_student(
    teacher: Teacher, folder: Path, data: Labelled, held_out: Labelled, task: str, knobs: Distilling
) -> tuple[Setup, Tuning, Path]:
    """Return the run, its knobs, and the folder whose other files the student's folder takes over."""
    from lmworks.training.distillation import (
        DistillationLoss,
        add_match,
        check_tokenizers,
        choose_layers,
        cut_layers,
        open_student,
        spread_layers,
    )
    from lmworks.training.distributed import find_ranks
    from lmworks.training.finetune import set_up
    from lmworks.training.machine import find_device
    from lmworks.training.measure import problem_type

    new_head, files, place, problem = False, teacher.files, teacher.base, problem_type(data)
    warm = knobs.temperature != Distilling().temperature
    check_useful(
        {"a number cannot be softened": (warm and problem == "regression", f"--temperature {knobs.temperature}")}
    )
    of, width = teacher.model.config.num_hidden_layers, teacher.model.config.hidden_size
    if knobs.student is None:
        if not teacher.copies:
            raise InputError("this teacher's layers cannot be copied: they hold parts that no plain model has",
                             where=str(folder), fix="give a --student, or merge the adapter")  # fmt: skip
        layers = choose_layers(teacher.model, knobs.layers or 0, knobs.kept())
        student = cut_layers(teacher.model, layers)
        student.config = replace(student.config, problem_type=problem)
    else:
        files = place = find_folder(knobs.student)
        check_tokenizers(files, teacher.files, [text for text in data.examples if isinstance(text, str)])
        student, new_head = open_student(files, teacher, task, problem, seed=knobs.seed)
        layers = spread_layers(student.config.num_hidden_layers, of)
    pairs = list(enumerate(layers))
    if student.config.hidden_size != width and knobs.hidden_weight > 0:
        add_match(student, width, len(pairs), seed=knobs.seed)
    room = teacher.model.config.max_tokens
    tuning = knobs.tuning()
    if student.config.max_tokens > room and (tuning.max_length or room + 1) > room:
        tuning = replace(tuning, max_length=room)
    setup = set_up(files, data, held_out, task=task, tuning=tuning.check(), opened=(student, new_head))
    find_ranks().place(teacher.model.to(find_device()))
    objective: Any = setup.objective
    loss: DistillationLoss = DistillationLoss(
        teacher.model, objective, pairs=pairs, temperature=knobs.temperature, alpha=knobs.alpha,
        hidden_weight=knobs.hidden_weight, hidden=knobs.hidden,
    )  # fmt: skip
    return replace(setup, objective=loss), tuning.check(), place


def first_scores(path: Path, setup: Setup, data: Labelled, held_out: Labelled) -> dict[str, dict[str, float]]:
    """Return the metrics of the baselines, among them the student's before its first step."""
    from lmworks.training.measure import measure

    baselines = find_baselines(path, setup, data, held_out)
    if data.references[0] is not None and BEFORE not in baselines:
        baselines[BEFORE] = measure(setup.predictor, held_out, problem=setup.problem)
        write_json(path, baselines)
    return baselines


def with_teacher(report: Report, facts: Mapping[str, Any], teacher: str, task: str) -> Report:
    """Return the report with a table of student and teacher, and a sentence that says what was kept."""
    scores, spent = (facts["student_scores"], facts["teacher_scores"]), facts["milliseconds_an_example"]
    rows: list[tuple[str, Any, Any, Any]] = [
        (name, ours, scores[1].get(name), ours / scores[1][name] if scores[1].get(name) else None)
        for name, ours in scores[0].items()
    ]
    sizes = report.values["parameters"], facts["teacher_parameters"]
    rows.append(("parameters", *sizes, facts["size_share"]))
    rows.append(("MB in fp32", *(4 * size / 1e6 for size in sizes), facts["size_share"]))
    rows.append(("ms an example", spent["student"], spent["teacher"], facts["time_share"]))
    kept = "" if facts["kept"] is None else f"keeps {facts['kept']:.1%} of the teacher's {facts['main_metric']}, "
    note = (
        f"The student {kept}with {facts['size_share']:.0%} of its parameters and {facts['time_share']:.0%} of its time."
    )
    table = Table("Student beside teacher", ("what", "student", "teacher", "share"), tuple(rows))
    return replace(
        report,
        title=f"{teacher} distilled for {task}",
        values={**report.values, **facts},
        tables=(table, *report.tables),
        notes=(note, *report.notes),
    )
