"""What a checkpoint is asked when it is compared: real text where it has a tokenizer, else seeded random ids; images.

Groups of rows, each a dict of arrays without a batch: `texts` of different lengths, `pairs` with segments, one `long`
row near the most that the model takes, `images`.

Shapes: T tokens, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lmworks.base.errors import InputError
from lmworks.models.config import Config
from lmworks.models.folder import VOCABULARIES, has_tokenizer
from lmworks.tasks.base import Facts
from lmworks.tasks.image import FILE, ImageClassification
from lmworks.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lmworks.export.reference import Arrays  # the module imports torch, which these texts are read without

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Yes.",
    "Marie Curie was born in Warsaw in 1867; she moved to Paris, where she worked with Pierre at the Sorbonne.",
    "I waited 45 minutes and the soup was cold — but the waiter's apology (and a free dessert) made up for it!",
    "¿Cuánto cuesta? Zażółć gęślą jaźń, naïve café, 東京は晴れ, 🙂 2+2=4.",
)
LENGTHS = (37, 1, 19, 5)  # of random rows
LONGEST = 512  # tokens at most, whatever the model takes
IMAGES = 2


def make_probes(folder: Path, c: Config, texts: Sequence[str] = ()) -> dict[str, list[Arrays]]:
    """Return the rows of every group. Raises InputError for texts where the model has no tokenizer."""
    random = np.random.default_rng(0)
    if c.vision is not None:
        if texts:
            raise InputError("this model reads images, not texts", where=str(folder), fix="leave out the texts")
        return {"images": make_images(folder, c, random)}
    longest = min(LONGEST, c.max_tokens)
    special = {c.pad_token_id, c.bos_token_id}  # a reference may take padding for the end of a text
    special |= set(c.eos_token_id) if isinstance(c.eos_token_id, tuple) else {c.eos_token_id}
    plain = np.array([i for i in range(c.vocab_size) if i not in special] or [0])
    groups: dict[str, list[Arrays]] = {"texts": []}
    if has_tokenizer(folder):
        tokenizer, lines = Tokenizer.from_pretrained(folder), [*TEXTS, *texts]
        groups["texts"] = [read(e.ids, e.type_ids, c, longest) for e in tokenizer.encode_inputs(lines) if e.ids]
        if c.type_vocab_size > 1:
            found = tokenizer.encode_inputs(list(zip(lines[::2], lines[1::2], strict=False)))
            groups["pairs"] = [read(e.ids, e.type_ids, c, longest) for e in found if e.ids]
    elif texts:
        raise InputError(
            "this model has no tokenizer to read texts with", where=str(folder), expected=" or ".join(VOCABULARIES)
        )
    if not groups["texts"]:  # no tokenizer, or one that knows none of these characters
        rows = [random.choice(plain, min(length, longest)).tolist() for length in LENGTHS]
        groups["texts"] = [read(ids, [0] * len(ids), c, longest) for ids in rows]
        if c.type_vocab_size > 1:
            groups["pairs"] = [read(ids, [2 * i // len(ids) for i in range(len(ids))], c, longest) for ids in rows]
    ids = random.choice(plain, longest).tolist()
    return {**groups, "long": [read(ids, [0] * longest, c, longest)]}


def read(ids: Sequence[int], types: Sequence[int], c: Config, longest: int) -> Arrays:
    """Return one row of at most `longest` tokens: input_ids (T,) and, for a model with segments, token_type_ids."""
    if max(ids) >= c.vocab_size:
        raise InputError(
            "the tokenizer has more tokens than the model", found=f"the id {max(ids)}", expected=f"below {c.vocab_size}"
        )
    row = {"input_ids": np.array(ids[:longest], np.int64)}
    return {**row, "token_type_ids": np.array(types[:longest], np.int64)} if c.type_vocab_size > 1 else row


def make_images(folder: Path, c: Config, random: np.random.Generator) -> list[Arrays]:
    """Return noise: pictures prepared as preprocessor_config.json says (where Pillow is there), else plain numbers."""
    assert c.vision is not None
    size = c.vision.image_size
    if (folder / FILE).is_file() and c.vision.num_channels == 3 and find_spec("PIL"):
        pictures = [random.integers(0, 256, (size + 9, size + 20, 3), np.uint8) for _ in range(IMAGES)]
        features = ImageClassification(folder, Facts(model_type=c.model_type, max_length=1)).encode(pictures)
        return [{"pixel_values": feature.inputs["pixel_values"]} for feature in features]
    shape = (c.vision.num_channels, size, size)
    return [{"pixel_values": random.standard_normal(shape).astype(np.float32)} for _ in range(IMAGES)]
