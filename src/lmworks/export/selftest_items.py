"""What a self-test asks: inputs as the page takes them, built in for every task, or taken from a user's own data.

    {"text"}   {"question", "context"}   {"text" with the mask token}   {"texts": [...]}   {"image": "data:image/png;…"}

Shapes: H height and W width of a picture in pixels.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError, LmworksError
from lmworks.base.optional import require
from lmworks.export.probe import TEXTS
from lmworks.text.labelled import read_labelled
from lmworks.text.read import read_documents

Input = dict[str, Any]

COUNT = 8  # items of a self-test, beside the long one
TOGETHER = 4  # texts of an item of feature-extraction: each is asked which of the others is nearest
PLAIN = (".txt", ".md", ".text", "")
MORE = (
    "Das Essen war kalt, aber der Kellner hat sich entschuldigt – schönen Gruß aus Köln!",
    "Анна Петрова живёт в Москве и пишет книги о Волге.",
    "花子さんは京都に住んでいて、毎日大阪で働いています。",
)
QUESTIONS = (
    ("Where was Marie Curie born?", TEXTS[2]),
    ("How long did the guest wait?", TEXTS[3]),
    ("Wo lebt der Kellner?", "Der Kellner kommt aus Köln, lebt seit 2009 in Zürich; seine Schwester wohnt in Linz."),
    ("Кто написал книгу?", "Книгу написала Анна Петрова, а обложку нарисовал её брат Иван 🙂."),
    ("¿Qué comió el gato?", "El gato comió un pez pequeño, y después durmió en el sofá toda la tarde."),
    ("花子さんはどこに住んでいますか?", MORE[2]),
)
# (W, H) of the drawn pictures: wide, as Pillow resizes some tall ones down before across, which no browser does
SIZES = ((96, 64), (56, 40), (300, 200))
LONGEST = 1 << 16  # repetitions
EDGE = 256  # pixels at most of a user's picture in the self-test


def built_in(task: str, mask: str = "") -> list[Input]:
    """Return short inputs in several scripts, or drawn pictures; `mask` is the tokenizer's mask token."""
    if task == "image-classification":
        return [{"image": to_data_url(draw(width, height))} for width, height in SIZES]
    if task == "question-answering":
        return [{"question": question, "context": context} for question, context in QUESTIONS]
    return to_inputs(task, [*TEXTS, *MORE], mask)


def to_inputs(task: str, texts: Sequence[str], mask: str = "") -> list[Input]:
    """Return texts as inputs of a task: with a word masked (of the last of several two), or several together."""
    if task == "fill-mask":
        masked = [hide_word(text, mask) for text in texts]
        last = [hide_word(masked[-1], mask, first=True)] if len(masked) > 1 else masked
        return [{"text": text} for text in [*masked[:-1], *last]]
    if task == "feature-extraction":
        groups = [list(texts[i : i + TOGETHER]) for i in range(0, len(texts), TOGETHER)]
        if len(groups) > 1 and len(groups[-1]) < 3:  # too few to choose a nearest among
            groups[-2:] = [groups[-2] + groups[-1]]
        return [{"texts": group} for group in groups]
    return [{"text": text} for text in texts]


def lengthen(task: str, given: Input, mask: str, fits: Callable[[Input], bool]) -> Input:
    """Add an input's words until it is longer than what `fits`: how long texts are read is part of the answers.

    They come in another order each time: a model that sees a few words only finds the same answer in each repetition.
    """
    if task == "feature-extraction":
        source = " ".join(given["texts"])
        return next(one for times in range(1, LONGEST) if not fits(one := {"texts": [*given["texts"], source * times]}))
    name = "context" if task == "question-answering" else "text"
    text = given[name].replace(mask, "") if mask else given[name]  # one mask is enough
    between = " " if len(text.split(" ")) > 3 else ""  # letters, where words are not set apart
    words = text.split(between) if between else list(text)
    long = given
    for i in range(LONGEST):
        if not fits(long):
            break
        long = {**long, name: f"{long[name]} {between.join(Random(i).sample(words, len(words)))}"}
    return long


def read_items(path: str | Path, task: str, mask: str, fits: Callable[[Input], bool]) -> list[Input]:
    """Return inputs from a user's file, spread over it; those that do not fit the model are passed over.

    Texts: one a line (txt), or the rows of a table. Questions, words with tags and pictures: the layouts of `finetune`.
    Raises InputError where there is none that fits.
    """
    if task == "image-classification":
        examples: list[Any] = read_labelled(path, task).examples
        return [{"image": to_data_url(shrink(example))} for example in spread(examples, len(SIZES))]
    if task == "question-answering":
        found: list[Any] = read_labelled(path, task).examples
    else:
        found = [text for text in dict.fromkeys(read_lines(Path(path), task)) if text.strip()]

    def as_input(example: Any) -> Input:
        if task == "question-answering":
            return {"question": example[0], "context": example[1]}
        return to_inputs(task, [example], mask)[0]

    chosen = [example for example in spread(found, 16 * COUNT) if fits(as_input(example))]  # more than are needed
    if not chosen or (task == "feature-extraction" and len(chosen) < 3):
        raise InputError(
            "no example for the self-test fits the model", where=str(path), found=f"{len(found)} examples",
            expected="some that the model reads at once" + (", 3 at least" if chosen else ""),
            fix="give other texts with --data, or none",
        )  # fmt: skip
    chosen = spread(chosen, COUNT)
    return to_inputs(task, chosen, mask) if task != "question-answering" else [as_input(one) for one in chosen]


def read_lines(path: Path, task: str) -> list[str]:
    """Return the texts of a file: lines, rows of a table, or sentences of words with tags."""
    if path.suffix.lower() in PLAIN or (path.suffix.lower() in (".html", ".htm")):
        return [line.strip() for document in read_documents(path) for line in document.text.splitlines()]
    if task == "token-classification":
        return [" ".join(words) for words in read_labelled(path, task).examples]
    if path.is_dir() or path.suffix.lower() not in (".csv", ".tsv", ".json", ".jsonl", ".ndjson"):
        return [document.text for document in read_documents(path)]
    try:
        examples = read_labelled(path, "text-classification").examples
    except LmworksError as error:  # a table without a header, or texts without labels
        try:
            examples = read_labelled(path, "text-classification", header=False).examples
        except LmworksError:
            try:
                return [document.text for document in read_documents(path)]
            except LmworksError:
                raise error from None
    return [text if isinstance(text, str) else " ".join(text) for text in examples]


def spread(values: Sequence[Any], count: int) -> list[Any]:
    """Return `count` values, evenly from the first to the last: [0, 1, 2, 3, 4], 3 -> [0, 2, 4]."""
    if len(values) <= count:
        return list(values)
    return [values[int(i)] for i in np.linspace(0, len(values) - 1, count)]


def hide_word(text: str, mask: str, *, first: bool = False) -> str:
    """Put the mask in the place of the middle word of a text, or of its first."""
    words = [word for word in re.finditer(r"\w+", text) if mask not in text or word[0] not in mask]
    if not words:
        return f"{text} {mask}"
    word = words[0 if first else len(words) // 2]
    return f"{text[: word.start()]}{mask}{text[word.end() :]}"


def draw(width: int, height: int) -> NDArray[np.uint8]:
    """Return the same test picture each time, (H, W, 3): a slope of colours, a disc, a bar and fine stripes."""
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack((255 * x // width, 255 * y // height, 255 - 255 * x // width), -1)
    picture[(x - width // 3) ** 2 + (y - height // 2) ** 2 < (min(width, height) // 4) ** 2] = (230, 60, 20)
    picture[height // 5 : height // 3, width // 2 : 9 * width // 10] = (15, 110, 60)
    picture[2 * height // 3 :][:, x[0] % 4 < 2] = (250, 250, 250)
    return picture.astype(np.uint8)


def shrink(path: str) -> Any:
    """Return a user's picture, upright, its longer edge EDGE pixels at most."""
    try:
        with require("PIL.Image", extra="vision").open(path) as image:
            upright = require("PIL.ImageOps", extra="vision").exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError("a picture cannot be read", where=path, found=str(error), fix="check the file") from None
    upright.thumbnail((EDGE, EDGE))
    return np.asarray(upright)


def to_data_url(picture: NDArray[np.uint8]) -> str:
    """Return a picture (H, W, 3) as the address of a PNG that holds it exactly."""
    file = io.BytesIO()
    require("PIL.Image", extra="vision").fromarray(picture).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def from_data_url(address: str) -> Any:
    """Return the PIL image of such an address."""
    return require("PIL.Image", extra="vision").open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
