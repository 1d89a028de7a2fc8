"""image-classification: which of the model's labels a picture deserves.

    "cat.png"  ->  [Label("cat", 0.91), Label("dog", 0.06) …]

Shapes: H height and W width in pixels, L labels; pixel_values (3, H, W) float32; logits (L,).

What a model sees is prepared as its preprocessor_config.json says, in this order: resize, crop in the middle, rescale,
normalize. Before that, as in transformers' pipeline, a picture is turned the way its EXIF orientation tells and becomes
RGB: gray is repeated, a palette looked up, an alpha channel dropped (the colours below it show).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import read_json
from lmworks.base.optional import require
from lmworks.base.types import Label
from lmworks.tasks.base import Facts, Feature, one_of
from lmworks.tasks.classify import Scores, check_top_k, rank, to_scores

FILE = "preprocessor_config.json"
DEFAULTS: dict[str, Any] = {  # of the ViT family
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 2,  # Pillow's number of a filter: 2 is bilinear
    "do_center_crop": False,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": False,  # every picture becomes RGB; here, a colour that a file declares clear becomes white
    "do_reduce_labels": False,  # is about labels of training
}
MORE = ("crop_pct", "rescale_offset", "include_top")  # steps of other families that no "do_" switches
SQUARE = ("ViT", "DeiT", "Beit", "BeiT")  # families where a size that is one number means a square
LARGEST = 1 << 14  # pixels of an edge: a damaged file must not ask for all memory
T = TypeVar("T")


class ImageClassification:
    """Labels with scores, the highest first."""

    name = "image-classification"
    output = "logits"

    def __init__(
        self,
        processor: str | Path | Mapping[str, Any],
        facts: Facts,
        *,
        top_k: int | None = None,
        scores: Scores = "auto",
    ) -> None:
        """Prepare for one model: `processor` is its folder, or what its preprocessor_config.json holds.

        `top_k`: how many labels to return, all where it is None. `scores` as for text-classification. Raises
        FormatError for a preparation that is not known here.
        """
        self.facts, self.top_k = facts, check_top_k(top_k)
        self.scores = one_of(scores, get_args(Scores), "kind of scores")
        self.pillow = require("PIL.Image", extra="vision")
        self.steps = read_steps(processor, [int(one) for one in self.pillow.Resampling])

    def encode(self, examples: Sequence[Any]) -> list[Feature]:
        """Return the features of pictures: paths, PIL images, or arrays (H, W) or (H, W, 3) of uint8."""
        features = []
        for place, example in enumerate(examples):
            where = str(example) if isinstance(example, (str, Path)) else f"image {place + 1}"
            features.append(Feature({"pixel_values": self._prepare(self._read(example, where), where)}, place))
        shapes = sorted({feature.inputs["pixel_values"].shape for feature in features})
        if len(shapes) > 1:
            raise InputError(
                "the pictures differ in size, and this model's preparation does not make them equal",
                found=" and ".join(f"{width}×{height}" for _, height, width in shapes[:2]),
                fix="resize them, or classify them one by one",
            )
        return features

    def decode(
        self, features: Sequence[Feature], outputs: Sequence[NDArray[Any]], examples: Sequence[Any]
    ) -> list[list[Label]]:
        """Return the labels of each picture by falling score; outputs: logits (L,)."""
        return [rank(to_scores(logits, self.facts, self.scores), self.facts, self.top_k) for logits in outputs]

    def _read(self, example: Any, where: str) -> Any:
        """Return a picture as an upright PIL image in RGB."""
        if isinstance(example, (str, Path)):
            if not Path(example).is_file():
                raise InputError(f"there is no picture {example}", fix="check the path")
            with readable(lambda: self.pillow.open(example), where) as image:
                return self._read(image, where)
        if isinstance(example, np.ndarray):
            fits = example.ndim == 2 or (example.ndim == 3 and example.shape[2] == 3)
            if example.dtype == np.uint8 and fits and example.size:
                return self.pillow.fromarray(example).convert("RGB")
            found = f"an array {example.shape} of {example.dtype}"
        elif isinstance(example, self.pillow.Image):
            self._check_pixels(example.width, example.height, where)
            upright = require("PIL.ImageOps", extra="vision").exif_transpose
            image = readable(lambda: upright(example).convert("RGB"), where)
            if self.steps["do_convert_rgb"] and image.info.get("transparency") is not None:
                white = self.pillow.new("RGBA", image.size, "white")
                image = self.pillow.alpha_composite(white, image.convert("RGBA")).convert("RGB")
            return image
        else:
            found = f"{type(example).__name__}: {example!r}"[:100]
        raise InputError(
            "an example is not a picture",
            where=where,
            found=found,
            expected="a path, a PIL image, or an array (H, W) or (H, W, 3) of uint8",
        )

    def _check_pixels(self, width: int, height: int, where: str) -> None:
        if width * height > (limit := self.pillow.MAX_IMAGE_PIXELS or LARGEST**2):
            raise InputError(
                "a picture is too large", where=where, found=f"{width}×{height}", expected=f"at most {limit} pixels"
            )

    def _prepare(self, image: Any, where: str) -> NDArray[np.float32]:
        """Return the pixel_values (3, H, W) of an RGB image."""
        steps = self.steps
        if steps["do_resize"]:
            width, height = target(image.size, steps["size"])
            self._check_pixels(width, height, where)
            image = image.resize((width, height), resample=steps["resample"])
        pixels = np.asarray(image)  # (H, W, 3)
        if steps["do_center_crop"]:
            pixels = center_crop(pixels, steps["crop_size"]["height"], steps["crop_size"]["width"])
        scale = np.asarray(steps["rescale_factor"] if steps["do_rescale"] else 1, np.float64)
        values = (pixels * scale).astype(np.float32)
        if steps["do_normalize"]:
            values = (values - np.float32(steps["image_mean"])) / np.float32(steps["image_std"])
        return np.ascontiguousarray(values.transpose(2, 0, 1))


def readable(load: Callable[[], T], where: str) -> T:
    """Run a decoder; whatever it says about a damaged file becomes one InputError."""
    try:
        return load()
    except Exception as error:  # Pillow's decoders raise a dozen kinds, SyntaxError and struct.error among them
        raise InputError(
            "a picture cannot be read",
            where=where,
            found=str(error)[:200] or type(error).__name__,
            fix="check the file",
        ) from None


def read_steps(processor: str | Path | Mapping[str, Any], filters: Sequence[int]) -> dict[str, Any]:
    """Return the preparation with defaults filled in and sizes spelled out; FormatError where it makes no sense."""
    where = "" if isinstance(processor, Mapping) else str(Path(processor) / FILE)
    if not isinstance(processor, Mapping):
        if not Path(where).is_file():
            raise FormatError(f"{FILE} is missing", where=str(processor), fix="check that the folder is complete")
        processor = read_json(where)
    steps = DEFAULTS | {key: value for key, value in processor.items() if value is not None}
    kind = str(steps.get("image_processor_type", steps.get("feature_extractor_type", "")))
    strange = [key for key in steps if key in MORE or (key.startswith("do_") and key not in DEFAULTS and steps[key])]
    wrong = ""
    if strange:
        wrong = f"{', '.join(strange)}: a step that lmworks does not know"
    elif steps["resample"] not in filters:
        wrong = f"resample: {steps['resample']!r} is none of Pillow's filters, {min(filters)} to {max(filters)}"
    elif not all(is_colour(steps[key]) for key in ("image_mean", "image_std", "rescale_factor")):
        wrong = "image_mean, image_std and rescale_factor must be numbers, one or one for each of 3 colours"
    elif not np.all(steps["image_std"]):
        wrong = "image_std is 0"
    if wrong:
        raise FormatError("pictures cannot be prepared for this model", where=where, found=wrong)
    square = not kind or kind.startswith(SQUARE)
    steps["size"] = read_size(steps["size"], "size", where, square=square)
    steps["crop_size"] = read_size(steps["crop_size"], "crop_size", where, square=True)
    return steps


def is_colour(value: Any) -> bool:
    """Say whether this is a number of a sensible size, or three of them."""
    values = value if isinstance(value, (list, tuple)) else [value] * 3
    return len(values) == 3 and all(isinstance(one, (int, float)) and abs(one) <= 1e9 for one in values)


def read_size(size: Any, key: str, where: str, *, square: bool) -> dict[str, int]:
    """Return {"height", "width"} or {"shortest_edge"} in pixels."""
    if isinstance(size, int) and square:
        size = {"height": size, "width": size}
    shapes = [{"height", "width"}] + [{"shortest_edge"}] * (key == "size")
    given = {name: edge for name, edge in size.items() if edge is not None} if isinstance(size, dict) else {}
    fine = all(type(edge) is int and 1 <= edge <= LARGEST for edge in given.values())
    if set(given) not in shapes or not fine:
        raise FormatError(
            "pictures cannot be prepared for this model",
            where=where,
            found=f"{key}: {size!r}",
            expected=" or ".join(", ".join(sorted(shape)) for shape in shapes) + f", from 1 to {LARGEST} pixels",
        )
    return given


def target(size: tuple[int, int], wanted: Mapping[str, int]) -> tuple[int, int]:
    """Return (width, height) after resizing; the other edge keeps the ratio, rounded down, as in transformers."""
    if "height" in wanted:
        return wanted["width"], wanted["height"]
    short = wanted["shortest_edge"]
    long = int(short * max(size) / min(size))
    return (short, long) if size[0] <= size[1] else (long, short)


def center_crop(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Cut (height, width, 3) from the middle; what a smaller picture lacks is black."""
    lacks = [max(0, wanted - has) for wanted, has in zip((height, width), pixels.shape, strict=False)]
    pixels = np.pad(pixels, [((lack + 1) // 2, lack // 2) for lack in lacks] + [(0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
