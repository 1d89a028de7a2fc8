"""The verbs, as Python functions. Their signatures are the command line's.

lmworks.build("texts/", "my_model")            text -> a verified model in a web page
lmworks.train("texts/", "my_model")            text -> a tokenizer and a trained model
lmworks.finetune("encoder", "reviews.csv", "out") a checkpoint and labelled data -> a model, or an adapter
lmworks.tune("encoder", "reviews.csv", "out", storage="s.jsonl") many settings of finetune -> the best model
lmworks.distill("teacher", "reviews.csv", "out") a fine-tuned model -> a smaller one that says the same
lmworks.generate("my_model", "Once upon")      an iterator over pieces of text
lmworks.predict("my_classifier", ["I love it"])  what the checkpoint was made for: labels, entities, answers …
lmworks.search("my_encoder", ["a query"], texts) the nearest texts in meaning
lmworks.evaluate("my_model", "held_out.txt")   perplexity and bits per byte
lmworks.verify("my_model")                     the same answers in every runtime
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmworks.base.errors import InputError, did_you_mean
from lmworks.base.report import Report
from lmworks.verbs.settings import Settings

if TYPE_CHECKING:
    from lmworks.base.types import Match
    from lmworks.evaluation.prompting import Prompting
    from lmworks.runtime.decoding import TextStream
    from lmworks.runtime.predictor import Predictor
    from lmworks.tasks.base import Long

RUNTIMES = ("torch", "onnx", "node", "browser")
PathLike = str | Path
FEW = 200  # characters up to which a graph pays that opens sooner and runs slower


def build(
    texts: PathLike | None,
    out: PathLike,
    *,
    settings: Settings | None = None,
    column: str | None = None,
    runtimes: Sequence[str] = RUNTIMES,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Make a verified model with a web page out of a file or folder of text (None: the built-in language).

    `out` is complete when this returns and absent when it fails. `values["verified"]` says whether every runtime that
    was checked gives torch's answers. Raises InputError for anything that cannot be used.
    """
    check_runtimes(runtimes)
    return run(texts, out, settings, column, resume, overwrite, dry_run, runtimes=runtimes)


def train(
    texts: PathLike | None,
    out: PathLike,
    *,
    settings: Settings | None = None,
    column: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Train a tokenizer and a model on a file or folder of text; `out` is a folder in the Hugging Face layout."""
    return run(texts, out, settings, column, resume, overwrite, dry_run, runtimes=None)


def run(
    texts: PathLike | None,
    out: PathLike,
    settings: Settings | None,
    column: str | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    *,
    runtimes: Sequence[str] | None,
) -> Report:
    """Train, and, when `runtimes` are given, export and verify as well."""
    from lmworks.base.files import check_output
    from lmworks.base.optional import require
    from lmworks.verbs.corpus import read_corpus

    require("torch", extra="torch")
    from lmworks.training.distributed import find_ranks

    ranks = find_ranks()
    with ranks.together():
        settings, out = settings or Settings(), Path(out)
        settings.check(page=runtimes is not None)
        check_output(out, overwrite=overwrite, resume=resume)
        path = None if texts is None else Path(texts)
        corpus = read_corpus(path, column=column, validation=settings.validation, seed=settings.seed)
        settings = settings.resolve(corpus.train_bytes)
    if dry_run:
        from lmworks.verbs.estimate import estimate

        return estimate(corpus, settings)
    from lmworks.verbs.publish import finish, publish
    from lmworks.verbs.run import Trained, check_same_run, disk_needed, run_folder, train_in
    from lmworks.verbs.summary import make_report

    def report_on(trained: Trained) -> Report:
        certificate = None if runtimes is None else publish(folder, trained, runtimes=runtimes)
        report = make_report(trained, out, certificate)
        finish(folder, trained, report)
        return report

    ranks.once(lambda: check_output(out, overwrite=overwrite, need_bytes=disk_needed(settings)))
    with ranks.on_first(run_folder(out, resume=resume, overwrite=overwrite)) as folder:
        ranks.once(lambda: check_same_run(folder, settings.to_dict(), corpus.sha256))
        if settings.is_masked:
            from lmworks.verbs.masked_run import train_masked

            return train_masked(folder, settings, corpus, out)
        trained = train_in(folder, settings, corpus)
        return ranks.once(lambda: report_on(trained))


def generate(
    model: PathLike,
    prompt: str,
    *,
    max_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    repeat_penalty: float = 1.0,
    repeat_last_n: int = 64,
    seed: int | None = None,
    runtime: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    code: Sequence[str] = (),
) -> TextStream:
    """Continue a prompt: an iterator over pieces of text that never end inside a character; then `.result`."""
    return load(model, "text-generation", runtime=runtime, dtype=dtype, revision=revision, code=code).generate(
        prompt,
        stream=True,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repeat_penalty=repeat_penalty,
        repeat_last_n=repeat_last_n,
        seed=seed,
    )


def predict(
    model: PathLike, examples: Sequence[Any], *, task: str | None = None, runtime: str = "auto", dtype: str = "auto",
    revision: str | None = None, **options: Any,
) -> Any:  # fmt: skip
    """Answer a list of examples: one answer each. `task` None: what the checkpoint was made for; its options follow."""
    examples = list(examples)
    few = sum(len(str(example)) for example in examples) <= FEW
    return load(model, task, runtime=runtime, dtype=dtype, revision=revision, once=few, **options)(examples)


def load(
    model: PathLike, task: str | None = None, *, runtime: str = "auto", dtype: str = "auto", slots: int = 1,
    threads: int | None = None, revision: str | None = None, code: Sequence[Any] = (), once: bool = False,
    **options: Any,
) -> Predictor:  # fmt: skip
    """Open a model folder, a model of the Hub by its name, or an adapter together with its base.

    `task` is a pipeline name; None: what the model was made for. runtime "auto" is the fastest here that keeps the
    answers, measured once (dtype "any": of all); an adapter runs in torch only. `code` is that of layers of its maker's
    own: classes, or "FILE.py:Name". `once`: for a few short texts, a graph opens sooner and runs slower. `options` are
    the task's. Raises InputError or FormatError that names the path.
    """
    from lmworks.base.hub import find_folder
    from lmworks.runtime import predictor

    folder = find_folder(model, revision=revision)
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return predictor.load(
            folder, task, runtime=runtime, dtype=dtype, slots=slots, threads=threads, code=code, once=once, **options
        )
    from lmworks.base.optional import require

    require("torch", extra="torch")
    from lmworks.training.finetune import open_adapted

    if runtime not in ("auto", "torch"):
        raise InputError("an adapter runs in torch only", found=runtime, fix="--runtime torch")
    return open_adapted(folder, task, dtype="fp32" if dtype in ("auto", "any") else dtype, **options)


def search(
    model: PathLike,
    queries: Sequence[str],
    texts: Sequence[str],
    *,
    top_k: int = 5,
    dtype: str = "auto",
    **options: Any,
) -> list[list[Match]]:
    """Return for each query the texts that are nearest in meaning: by the cosine of their sentence embeddings."""
    from lmworks.tasks.embed import search as find

    predictor = load(model, "feature-extraction", dtype=dtype, **options)
    return find(predictor(list(queries)), predictor(list(texts)), texts, top_k=top_k)


def finetune(model: PathLike, train: PathLike | None, out: PathLike, **settings: Any) -> Report:
    """Fine-tune a model on labelled data; the settings are those of `lmworks.verbs.finetuning.finetune`."""
    from lmworks.verbs.finetuning import finetune as run

    return run(model, train, out, **settings)


def distill(teacher: PathLike, train: PathLike, out: PathLike, **settings: Any) -> Report:
    """Teach a smaller model what a larger one says; the settings are those of `lmworks.verbs.distilling.distill`."""
    from lmworks.verbs.distilling import distill as run

    return run(teacher, train, out, **settings)


def tune(model: PathLike, train: PathLike, out: PathLike, **settings: Any) -> Report:
    """Search the knobs of `finetune`; the settings are those of `lmworks.verbs.searching.tune`."""
    from lmworks.verbs.searching import tune as run

    return run(model, train, out, **settings)


def quantize(model: PathLike, out: PathLike, **settings: Any) -> Report:
    """Write a model in whole numbers; the settings are those of `lmworks.verbs.compressing.quantize`."""
    from lmworks.verbs.compressing import quantize as run

    return run(model, out, **settings)


def prune(model: PathLike, out: PathLike, **settings: Any) -> Report:
    """Write a model with fewer weights; the settings are those of `lmworks.verbs.compressing.prune`."""
    from lmworks.verbs.compressing import prune as run

    return run(model, out, **settings)


def compress(model: PathLike, out: PathLike, *, budget: str, data: PathLike, **settings: Any) -> Report:
    """Write the smallest and fastest model that keeps a budget; settings as of `verbs.compress_budget.compress`."""
    from lmworks.verbs.compress_budget import compress as run

    return run(model, out, budget=budget, data=data, **settings)


def evaluate(
    model: PathLike,
    texts: PathLike,
    *,
    column: str | None = None,
    label_column: str | None = None,
    header: bool = True,
    split: str | None = None,
    runtime: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    code: Sequence[str] = (),
    long: Long | None = None,
    write: int | None = None,
    prompt: Prompting | None = None,
) -> Report:
    """Score a model: a language model on a text, any other model, or an adapter, on labelled data.

    A language model scores every token once, each with at least half of its context before it. `label_column`,
    `header`, `split` say how labelled data is laid out, `code` has its maker's layers; `long` None: as when fine-tuned.
    With `prompt` a language model says labels; with `write` it answers prompts in at most so many tokens (BLEU, chrF).
    Raises InputError.
    """
    from lmworks.base.hub import find_folder
    from lmworks.models.families import read_config, read_kind
    from lmworks.tasks.registry import MAKERS, find_task
    from lmworks.verbs.finetune_data import check_plain

    folder = find_folder(model, revision=revision)
    task = find_task(read_kind(read_config(folder)))
    layout: dict[str, Any] = {"label_column": label_column, "header": header, "split": split}
    if prompt is not None and prompt.template is not None:
        from lmworks.verbs.few_shot import evaluate_prompts

        return evaluate_prompts(folder, texts, prompt, text_column=column, runtime=runtime, dtype=dtype, **layout)
    if prompt is not None and (prompt.shots or prompt.train or prompt.words):
        raise InputError("examples are shown in a prompt", fix="--template 'Text: {text}\\nLabel: {label}'")
    if task in MAKERS and task != "fill-mask":
        from lmworks.verbs.finetuning import evaluate_task

        how: dict[str, Any] = {"runtime": runtime, "dtype": dtype, "code": code, "long": long}
        return evaluate_task(folder, texts, text_column=column, **layout, **how)
    check_plain(Path(texts), long, column, **layout)
    if task == "text-generation" and Path(texts).suffix.lower() in (".jsonl", ".json") and column is None:
        from lmworks.text.labelled import read_labelled
        from lmworks.verbs.finetuning import evaluate_answers

        data = read_labelled(texts, "text-generation", split=split)
        if not all(isinstance(example, str) for example in data.examples):
            return evaluate_answers(folder, data, code=code, runtime=runtime, dtype=dtype, write=write)
    if write is not None:
        raise InputError("--write answers prompts", where=str(texts), expected='jsonl of "prompt" and "completion"')
    from lmworks.verbs.evaluating import evaluate_masked, evaluate_text

    score = evaluate_masked if task == "fill-mask" else evaluate_text
    predictor = load(
        folder, task if task == "fill-mask" else "text-generation", runtime=runtime, dtype=dtype, code=code
    )
    return score(model, predictor, texts, column)


def verify(
    folder: PathLike | Sequence[PathLike],
    *,
    runtimes: Sequence[str] = RUNTIMES,
    dtypes: Sequence[str] | None = None,
    weights: PathLike | None = None,
) -> Report:
    """Prove that every runtime gives torch's tokens, decisions and logits, and that no file of the folder has changed.

    One folder or several, each with the self-test of its task: one table. Writes certificate.json into each.
    `runtimes` may name "webgpu" too; `dtypes` None: all graphs; `weights` is the checkpoint that torch runs where a
    folder holds graphs alone. `values["passed"]` says whether everything held; a runtime that is missing is skipped.
    """
    from lmworks.export.verify import check_folder
    from lmworks.export.verify import verify as check
    from lmworks.export.verify_report import make_report

    folders = [folder] if isinstance(folder, str | Path) else list(folder)
    if not folders:
        raise InputError("there is no folder to verify")
    if weights is not None and len(folders) > 1:
        raise InputError("one checkpoint cannot be that of several folders", found=f"{len(folders)} folders")
    for place in folders:  # before anything runs
        check_folder(Path(place), runtimes=runtimes, dtypes=dtypes)
    return make_report(
        {str(place): check(place, runtimes=runtimes, dtypes=dtypes, weights=weights) for place in folders}
    )


def check_runtimes(runtimes: Sequence[str]) -> None:
    """Raise InputError for a runtime that does not exist."""
    for name in runtimes:
        if name not in RUNTIMES:
            raise InputError(
                f"there is no runtime {name!r}", expected=", ".join(RUNTIMES), fix=did_you_mean(name, RUNTIMES).strip()
            )
