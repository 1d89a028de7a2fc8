"""`lmworks train --objective masked-lm`: a BERT from scratch, in the same run folder as any other model.

Its held-out scores are those of `lmworks evaluate`, beside what the frequency of tokens alone would give.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmworks.base.chart import Chart
from lmworks.base.files import write_json, write_text
from lmworks.base.report import Cell, Report, Table, counted
from lmworks.base.types import Ints
from lmworks.verbs.corpus import Corpus
from lmworks.verbs.evaluating import PSEUDO
from lmworks.verbs.publish import REPORTS
from lmworks.verbs.run import make_model, make_network, make_tokenizer, train_config
from lmworks.verbs.settings import Settings
from lmworks.verbs.summary import describe, versions

if TYPE_CHECKING:
    from lmworks.runtime.predictor import Predictor

SAMPLES, WORDS = 3, 12


def train_masked(folder: Path, settings: Settings, corpus: Corpus, out: Path) -> Report:
    """Train (or resume) in the run folder and leave there a complete model folder with its report and receipt."""
    from lmworks.models.checkpoint import save_model
    from lmworks.runtime.predictor import load
    from lmworks.tokens.batch import make_word_stream
    from lmworks.training.distributed import find_ranks
    from lmworks.training.machine import find_device
    from lmworks.training.masked import MaskedWindows
    from lmworks.training.objectives import CausalLoss
    from lmworks.training.trainer import Trainer

    ranks = find_ranks()
    tokenizer = ranks.once(lambda: make_tokenizer(folder, settings, corpus))
    train, held_out = (
        make_word_stream(tokenizer, [document.text for document in part]) for part in (corpus.train, corpus.validation)
    )
    begin, end = (tokenizer.find(*names) or 0 for names in (("cls_token", "[CLS]"), ("sep_token", "[SEP]")))
    shape = make_network(
        settings, vocab_size=tokenizer.vocab_size, bos_token_id=begin, eos_token_id=end, pad_token_id=tokenizer.pad_id
    )
    model = make_model(shape, seed=settings.seed).to(find_device())
    data = MaskedWindows(
        train, held_out, frame=(begin, end), mask_id=tokenizer.mask_id or 0, vocab_size=tokenizer.vocab_size,
        context=settings.context or 0, batch_size=settings.batch_size or 0, whole_words=settings.whole_words,
        seed=settings.seed,
    )  # fmt: skip
    trainer = Trainer(model, objective=CausalLoss(), data=data, config=train_config(settings),
                      folder=folder / "training", stream=sys.stderr)  # fmt: skip
    result = trainer.fit()

    def finish() -> Report:
        from lmworks.evaluation.masked import pseudo_perplexity, score_hidden, summarise
        from lmworks.export.receipt import write_receipt

        save_model(model, folder)
        predictor = load(folder, "fill-mask", runtime="torch")
        texts = [document.text for document in corpus.validation]
        scores = summarise([score_hidden(predictor, texts)]) | pseudo_perplexity(predictor, texts, most=PSEUDO)
        values: dict[str, Any] = {
            "out": str(out), "corpus": corpus.name, "task": "fill-mask", "vocab_size": tokenizer.vocab_size,
            "parameters": sum(p.numel() for p in model.parameters()), "train_bytes": corpus.train_bytes,
            "validation_bytes": corpus.validation_bytes, "validation_loss": result.best_loss, **scores,
            **by_frequency(train[0], held_out[0], tokenizer.vocab_size),
            "steps": result.steps, "best_step": result.best_step, "train_seconds": round(result.seconds, 1),
            "tokens_per_second": round(result.tokens_per_second), "dtype": result.dtype,
            "samples": fill_samples(predictor, texts), "settings": settings.to_dict(),
        }  # fmt: skip
        report = make_report(values, settings, result.history)
        kept = ("corpus", "parameters", "accuracy", "perplexity", "pseudo_perplexity", "steps", "best_step", "dtype")
        facts = {"data_sha256": corpus.sha256, "seed": settings.seed, "task": "fill-mask",
                 "settings": settings.to_dict(), "scores": {key: values[key] for key in kept},
                 "versions": versions()}  # fmt: skip
        write_json(folder / REPORTS[0], report.to_dict())
        write_text(folder / REPORTS[1], report.to_html())
        write_receipt(folder, facts)
        return report

    return ranks.once(finish)


def by_frequency(train: Ints, held_out: Ints, vocab_size: int) -> dict[str, float]:
    """Return what guessing by frequency would give on held-out tokens: the commonest one, and each as often as seen."""
    counts = np.bincount(train, minlength=vocab_size).astype(np.float64)
    logs = np.log((counts + 1) / (counts.sum() + vocab_size))
    return {"commonest_token_accuracy": float((held_out == counts.argmax()).mean()),
            "frequency_perplexity": float(np.exp(-logs[held_out].mean()))}  # fmt: skip


def fill_samples(predictor: Predictor, texts: Sequence[str]) -> list[dict[str, str]]:
    """Return the beginnings of some held-out lines with one word hidden, and what the model would put there."""
    lines = [line.split() for text in texts for line in text.splitlines() if len(line.split()) >= WORDS // 2]
    found = []
    for i in range(min(SAMPLES, len(lines))):
        words = lines[i * len(lines) // SAMPLES][:WORDS]
        place = len(words) // 2
        hidden, words[place] = words[place], str(getattr(predictor.prepared, "mask", "[MASK]"))
        fills = predictor(" ".join(words), long="window")
        said = ", ".join(f"{fill.token_str.strip()} {fill.score:.0%}" for fill in fills[:5])
        found.append({"text": " ".join(words), "hidden": hidden, "filled": said})
    return found


def make_report(values: dict[str, Any], settings: Settings, history: Any) -> Report:
    """Return the report of a run."""
    spans = values["intervals"]
    scores: tuple[tuple[Cell, ...], ...] = (
        ("hidden tokens guessed", values["accuracy"], *spans.get("accuracy", (None, None))),
        ("… by the commonest token", values["commonest_token_accuracy"], None, None),
        ("perplexity at hidden tokens", values["perplexity"], *spans.get("perplexity", (None, None))),
        ("… by frequency alone", values["frequency_perplexity"], None, None),
        ("pseudo-perplexity, tokens hidden one by one", values["pseudo_perplexity"], None, None),
    )
    facts: tuple[tuple[Cell, ...], ...] = (
        ("architecture", describe(settings)),
        ("hidden", "15 % of the words" if settings.whole_words else "15 % of the tokens"),
        ("tokenizer", f"{settings.tokenizer}, {values['vocab_size']:,} tokens"),
        ("training", f"{counted(values['steps'], 'step')} in {values['train_seconds']:.0f} s"),
        ("precision while training", values["dtype"]),
    )
    curves = tuple((name, tuple((float(step), loss) for step, loss in points))
                   for name, points in (("training", history.train), ("validation", history.validation)))  # fmt: skip
    return Report(
        f"{values['corpus']}: {values['parameters']:,} parameters from {values['train_bytes'] / 1e6:.2f} MB of text",
        values,
        tables=(Table("On held-out text, 95 % from windows", ("what", "value", "from", "to"), scores),
                Table("The network", ("what", "value"), facts)),
        charts=(Chart("Loss while training", "step", "nats a hidden token", curves),),
        texts=tuple((one["text"], f"{one['filled']}  (was: {one['hidden']})") for one in values["samples"]),
        notes=("lmworks finetune gives it labels to learn; lmworks fill-mask asks it.",),
    )  # fmt: skip
