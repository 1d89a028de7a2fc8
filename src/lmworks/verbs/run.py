"""One training run: corpus -> tokenizer -> model -> scores, in a folder that can be resumed at any point.

The folder is `OUT.partial` until everything is done; then it is renamed to OUT, so OUT is complete or absent.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import check_output, put_in_place, read_json, write_json
from lmworks.base.types import Ints
from lmworks.evaluation.perplexity import bits_per_byte, mixture, token_logprobs
from lmworks.models.config import Config
from lmworks.runtime.base import Runtime
from lmworks.verbs.corpus import Corpus
from lmworks.verbs.settings import Settings

if TYPE_CHECKING:
    from lmworks.models.heads import CausalLM, Model
    from lmworks.tokens.tokenizer import Tokenizer
    from lmworks.training.train_config import TrainConfig, TrainResult

FIXED_BYTES = 60_000_000  # the page's library and WASM, reports
RUN_FILE = "run.json"  # the settings and the corpus of a run, checked on resume
LONG_PROMPT = 48  # tokens of the self-test's long prompt, where there is room
FRAME = "[CLS],[SEP],[MASK]"  # special tokens of a model that reads both sides
DISK_FACTOR = 44  # bytes on disk for one parameter: weights, two checkpoints with optimizer, graphs


@dataclass(frozen=True)
class Scores:
    """How well the network and the n-gram referee predict the held-out text; losses in nats per token."""

    loss: float
    bits_per_byte: float | None
    next_token_accuracy: float
    ngram_loss: float
    ngram_bits_per_byte: float | None
    mixture_loss: float
    mixture_bits_per_byte: float | None
    mixture_weight: float
    validation_tokens: int

    @property
    def perplexity(self) -> float:
        """Perplexity of the network per token."""
        return math.exp(self.loss)

    @property
    def ngram_perplexity(self) -> float:
        """Perplexity of the referee per token."""
        return math.exp(self.ngram_loss)

    @property
    def mixture_perplexity(self) -> float:
        """Perplexity of the mixture per token."""
        return math.exp(self.mixture_loss)


@dataclass(frozen=True)
class Trained:
    """What a run made."""

    settings: Settings
    corpus: Corpus
    tokenizer: Tokenizer
    model: CausalLM
    result: TrainResult
    scores: Scores
    samples: tuple[tuple[str, str], ...]  # (prompt, continuation)

    @property
    def parameters(self) -> int:
        """Trainable numbers; a tied embedding counts once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def floor(self) -> float | None:
        """Exact entropy of the held-out text in bits per byte, where the language is the built-in one."""
        return None if self.corpus.floor is None else self.corpus.floor / self.corpus.validation_bytes


@contextmanager
def run_folder(out: Path, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Yield `OUT.partial`; rename it to OUT on success. On failure it stays only if work in it can be resumed."""
    check_output(out, overwrite=overwrite)
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    started = is_started(partial)
    if started and not (resume or overwrite):
        raise InputError(
            "an interrupted run is here already",
            where=str(partial),
            fix="add --resume to continue it, or --overwrite to start again",
        )
    if resume and not started:
        sys.stderr.write("there is nothing to resume: starting from the beginning\n")
    if partial.exists() and not (started and resume):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except BaseException:
        if not is_started(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    (partial / RUN_FILE).unlink(missing_ok=True)
    put_in_place(partial, out.absolute())


def is_started(partial: Path) -> bool:
    """Say whether a run folder holds a checkpoint of at least one step; a damaged one counts, to be looked at."""
    from lmworks.training.state import load_checkpoint

    training = partial / "training"
    try:  # each choice of few examples (few_shot.py) is trained in a folder of its own
        found = [load_checkpoint(folder) for folder in (training, *training.glob("draw-*")) if folder.is_dir()]
    except FormatError:
        return True
    return any(one is not None and one[1].step > 0 for one in found)


def check_same_run(folder: Path, settings: dict[str, Any], data_sha256: str) -> None:
    """Record what this run is made from, or, on resume, refuse settings or data that differ."""
    path = folder / RUN_FILE
    if not path.exists():
        write_json(path, {"settings": settings, "data_sha256": data_sha256})
        return
    before = read_json(path)
    if before.get("data_sha256") != data_sha256:
        raise InputError("the data has changed since this run began", where=str(folder), fix="start with --overwrite")
    changed = [name for name, value in settings.items() if before["settings"].get(name) != value]
    if changed:
        raise InputError(
            "a resumed run must keep its settings",
            found=", ".join(f"{name}={settings[name]}" for name in changed),
            expected=", ".join(f"{name}={before['settings'].get(name)}" for name in changed),
            fix="repeat the first command with --resume, or start again with --overwrite",
        )


def make_network(settings: Settings, *, vocab_size: int, **tokens: int | None) -> Config:
    """Return the network's shape for these settings; `tokens` are the ids of its special tokens."""
    from lmworks.models.families import bert, gpt2, llama, modernbert
    from lmworks.models.families.sequential import SEQUENTIAL, TYPE

    assert settings.hidden_size and settings.layers and settings.context  # resolve() filled them
    if settings.arch != "transformer":
        return SEQUENTIAL[TYPE + settings.arch].new(
            vocab_size=vocab_size,
            hidden_size=settings.hidden_size,
            embedding_size=settings.embedding_size or settings.hidden_size,
            num_hidden_layers=settings.layers,
            window=settings.window,
            max_position_embeddings=settings.context,
            dropout=settings.dropout or 0.0,
            **tokens,
        )
    make = {"gpt2": gpt2.new, "llama": llama.new, "bert": bert.new, "modernbert": modernbert.new}[
        settings.family or "llama"
    ]
    assert settings.heads
    return make(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.context,
        dropout=settings.dropout or 0.0,
        **tokens,
    )


def make_model(shape: Config, *, seed: int | None = 0) -> Model:
    """Return a fresh network with the head it is trained by: next tokens, or hidden ones where it sees both sides."""
    from lmworks.models.families import find_head
    from lmworks.models.heads import CausalLM, Model

    if shape.causal:
        return CausalLM(shape, seed=seed)
    return Model(shape, "MaskedLM", find_head(shape, "MaskedLM"), seed=seed)


def make_tokenizer(folder: Path, settings: Settings, corpus: Corpus) -> Tokenizer:
    """Train the tokenizer on the training part, or read the one that an interrupted run has saved."""
    from lmworks.tokens.tokenizer import Tokenizer
    from lmworks.tokens.train import train_tokenizer

    if (folder / "tokenizer.json").exists() and (folder / "tokenizer_config.json").exists():
        return Tokenizer.from_pretrained(folder)
    texts = [document.text for document in corpus.train]
    special = FRAME if settings.is_masked else ""
    tokenizer = train_tokenizer(texts, kind=settings.tokenizer, vocab_size=settings.vocab_size or 0, special=special)
    tokenizer.save(folder, max_length=settings.context)
    return tokenizer


def train_in(folder: Path, settings: Settings, corpus: Corpus) -> Trained:
    """Train (or resume) in the run folder and leave there a complete model folder; score it on the held-out text."""
    from lmworks.models.checkpoint import save_model
    from lmworks.models.heads import CausalLM
    from lmworks.runtime.torch_runtime import TorchRuntime
    from lmworks.tokens.batch import make_stream
    from lmworks.training.data import TokenWindows
    from lmworks.training.distributed import find_ranks
    from lmworks.training.machine import find_device
    from lmworks.training.objectives import CausalLoss
    from lmworks.training.trainer import Trainer

    ranks = find_ranks()
    tokenizer = ranks.once(lambda: make_tokenizer(folder, settings, corpus))
    train = make_stream(tokenizer, [document.text for document in corpus.train])
    held_out = make_stream(tokenizer, [document.text for document in corpus.validation])
    eos, pad = tokenizer.eos_id, tokenizer.pad_id
    shape = make_network(
        settings, vocab_size=tokenizer.vocab_size, bos_token_id=eos, eos_token_id=eos, pad_token_id=pad
    )
    model = CausalLM(shape, seed=settings.seed).to(find_device())
    data = TokenWindows(
        train, held_out, context=settings.context or 0, batch_size=settings.batch_size or 0, seed=settings.seed
    )
    config = train_config(settings)
    place = folder / "training"
    result = Trainer(model, objective=CausalLoss(), data=data, config=config, folder=place, stream=sys.stderr).fit()
    ranks.once(lambda: save_model(model, folder))
    runtime = TorchRuntime(model)
    known = tokenizer.is_lossless or all(tokenizer.knows(document.text) for document in corpus.validation)
    n_bytes = corpus.validation_bytes if known else None
    scores = ranks.once(lambda: score(runtime, train, held_out, tokenizer, settings, n_bytes))
    samples = ranks.once(lambda: sample(runtime, tokenizer, corpus, settings))
    return Trained(settings, corpus, tokenizer, model, result, scores, samples)


def score(
    runtime: Runtime, train: Ints, held_out: Ints, tokenizer: Tokenizer, settings: Settings, n_bytes: int | None
) -> Scores:
    """Score the network, a modified Kneser-Ney model of order 5 and their mixture on the same held-out tokens.

    `n_bytes` is None when the tokenizer loses something on this text: then bits per byte would flatter it.
    """
    from lmworks.models.ngram import NgramModel

    network = token_logprobs(runtime, held_out, context=settings.context or runtime.max_length)
    referee = NgramModel.train(train, order=5, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    ngram = referee.logprobs(held_out)
    mixed = mixture(network.logprobs, ngram)
    return Scores(
        loss=-float(network.logprobs.mean()),
        bits_per_byte=bits_per_byte(network.logprobs, n_bytes),
        next_token_accuracy=network.accuracy,
        ngram_loss=-float(ngram.mean()),
        ngram_bits_per_byte=bits_per_byte(ngram, n_bytes),
        mixture_loss=-float(mixed.logprobs.mean()),
        mixture_bits_per_byte=bits_per_byte(mixed.logprobs, n_bytes),
        mixture_weight=mixed.weight,
        validation_tokens=len(held_out) - 1,
    )


def sample(runtime: Runtime, tokenizer: Tokenizer, corpus: Corpus, settings: Settings) -> tuple[tuple[str, str], ...]:
    """Continue the first words of three held-out documents."""
    from lmworks.runtime.decoding import generate
    from lmworks.runtime.sampling import Sampling

    samples = []
    room = max(1, (settings.context or 0) // 2)
    for i, prompt in enumerate(make_prompts(corpus, tokenizer, room, count=3)):
        sampling = Sampling(temperature=0.8, top_k=40, seed=settings.seed + i)
        stream = generate(runtime, tokenizer, prompt, sampling=sampling, max_tokens=100)
        samples.append((prompt, "".join(stream)))
    return tuple(samples)


def make_prompts(corpus: Corpus, tokenizer: Tokenizer, longest: int, *, count: int) -> list[str]:
    """Return `count` beginnings of different held-out lines, of at most `longest` tokens; the second is a long one.

    From 32 tokens on a graphics card reads a prompt in another way.
    """
    lines = [line.strip() for document in corpus.validation for line in document.text.splitlines()]
    lines = [line for line in dict.fromkeys(lines) if len(line) >= 12]
    lines = lines or [corpus.validation[0].text.strip() or corpus.train[0].text.strip()]
    step = max(1, len(lines) // count)
    prompts = []
    for i in range(count):
        line = lines[i * step % len(lines)]
        if i == 1:
            line = "\n".join(lines[i * step % len(lines) :][:LONG_PROMPT])  # a line has one token and more
        ids = tokenizer.encode(line)[: max(1, min(LONG_PROMPT if i == 1 else 12 + i % 5, longest))]
        prompts.append(tokenizer.decode(ids).rstrip("\ufffd") or line[:8])
    return prompts


def train_config(settings: Settings) -> TrainConfig:
    """Translate the settings for the training loop."""
    from lmworks.training.train_config import TrainConfig

    s = settings
    assert s.steps and s.lr and s.eval_every  # resolve() filled them
    return TrainConfig(
        accumulation=s.accumulation,
        steps=s.steps,
        lr=s.lr,
        min_lr=s.min_lr or 0.0,
        warmup=s.warmup or 0,
        schedule=s.schedule,
        decay=s.decay,
        optimizer=s.optimizer,
        weight_decay=s.weight_decay,
        momentum=s.momentum,
        beta2=s.beta2,
        max_grad_norm=s.max_grad_norm,
        clip_value=s.clip_value,
        gradient_checkpointing=s.gradient_checkpointing,
        balance=s.balance_ranks,
        compile="auto" if s.arch == "transformer" else "never",
        eval_every=s.eval_every,
        patience=s.patience,
        dtype=s.dtype,
        seed=s.seed,
    )


def disk_needed(settings: Settings) -> int:
    """Return the bytes that a run of these settings may need at most, checkpoints and graphs included."""
    return DISK_FACTOR * count_parameters(settings) + FIXED_BYTES


def count_parameters(settings: Settings) -> int:
    """Return the parameters of the network for these settings, before a tokenizer exists."""
    d, v = settings.hidden_size or 0, settings.vocab_size or 0
    return v * d + (settings.layers or 0) * 13 * d * d
