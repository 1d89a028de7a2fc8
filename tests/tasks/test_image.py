"""image-classification against transformers: same pixels from the same files, same labels, same scores."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from oracle import answers, facts, shake
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lmworks.base.errors import FormatError, InputError
from lmworks.tasks.base import Facts
from lmworks.tasks.image import ImageClassification

NAMES = {place: f"digit {place}" for place in range(10)}
SMALL = Facts(model_type="vit", max_length=1, labels=tuple(NAMES.values()))


def digits(data_folder: Path, count: int) -> np.ndarray:
    raw = gzip.decompress((data_folder / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    return np.frombuffer(raw, np.uint8, count * 784, offset=16).reshape(count, 28, 28)


@pytest.fixture(scope="module")
def pictures(data_folder, tmp_path_factory) -> list[Path]:
    """Files of every kind: real digits, and collages of them in the modes that pictures come in."""
    folder, rows = tmp_path_factory.mktemp("pictures"), digits(data_folder, 40)
    for place, row in enumerate(rows[:20]):
        Image.fromarray(row).save(folder / f"digit{place:02}.png")
    wide = np.concatenate(rows[:7], 1)[:, :, None] // np.array([1, 2, 3], np.uint8) + np.array([0, 90, 30], np.uint8)
    rgb, tall = Image.fromarray(wide), Image.fromarray(wide.transpose(1, 0, 2)[:91])
    alpha = Image.fromarray(np.concatenate(rows[7:14], 1))
    rgb.save(folder / "rgb.png")
    tall.save(folder / "tall.bmp")
    rgb.save(folder / "photo.jpg", quality=90)
    clear = rgb.copy()
    clear.putalpha(alpha)
    clear.save(folder / "rgba.png")
    rgb.quantize(17).save(folder / "palette.png", transparency=3)
    alpha.save(folder / "gray-clear.png", transparency=0)
    alpha.convert("LA").save(folder / "gray-alpha.png")
    alpha.convert("1").save(folder / "bits.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.concatenate(rows[:7], 1).astype(np.uint16) * 257).save(folder / "deep.png")
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        tall.save(folder / f"turned{orientation}.jpg", exif=exif, quality=95)
    return sorted(folder.iterdir())


def pixels(task: ImageClassification, examples) -> np.ndarray:
    return np.stack([feature.inputs["pixel_values"] for feature in task.encode(examples)])


SIZES = {"height": 32, "width": 32}
PREPARATIONS = [
    (ViTImageProcessorPil, {}),
    (ViTImageProcessorPil, {"size": SIZES}),
    (ViTImageProcessorPil, {"size": {"height": 30, "width": 50}, "resample": 3}),
    (ViTImageProcessorPil, {"size": 40, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}),
    (ViTImageProcessorPil, {"size": SIZES, "do_normalize": False, "resample": 0}),
    (ViTImageProcessorPil, {"size": SIZES, "do_rescale": False, "image_mean": 127.5, "image_std": 127.5}),
    (ViTImageProcessorPil, {"size": SIZES, "rescale_factor": 1 / 127.5}),
    (CLIPImageProcessorPil, {"size": {"shortest_edge": 37}, "crop_size": {"height": 31, "width": 32}}),
    (DeiTImageProcessorPil, {"size": {"height": 64, "width": 60}, "crop_size": 33}),
    (DeiTImageProcessorPil, {"size": {"height": 20, "width": 64}, "crop_size": {"height": 33, "width": 30}}),
    (ViTImageProcessorPil, {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}}),
]


@pytest.mark.filterwarnings("ignore:`return_numpy=False`")
@pytest.mark.parametrize(("processor", "options"), PREPARATIONS)
def test_pixels_are_those_of_transformers(processor, options, pictures, tmp_path):
    theirs = processor(**options)
    theirs.save_pretrained(tmp_path)
    if options.get("size") == 40:  # an old file: one number
        path = tmp_path / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"size": 40}))
    found = pixels(ImageClassification(tmp_path, SMALL), pictures)
    expected = theirs([transformers.image_utils.load_image(str(path)) for path in pictures], return_tensors="np")
    assert found.dtype == np.float32 and found.shape == expected["pixel_values"].shape
    np.testing.assert_allclose(found, expected["pixel_values"], atol=1e-5)
    assert len(np.unique(found)) > 30


@pytest.mark.parametrize("edge", [31, 50])
def test_the_longer_edge_follows_the_shorter(edge, pictures):
    theirs = CLIPImageProcessorPil(size={"shortest_edge": edge}, do_center_crop=False)
    task = ImageClassification(theirs.to_dict(), SMALL)
    for path in pictures:
        expected = theirs(transformers.image_utils.load_image(str(path)), return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(pixels(task, [path]), expected, atol=1e-5)


def test_labels_and_scores_are_those_of_the_pipeline(pictures, tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8,
        id2label=NAMES, label2id={name: place for place, name in NAMES.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    model = shake(transformers.ViTForImageClassification(config), 0).float()
    theirs = ViTImageProcessorPil(size=SIZES)
    theirs.save_pretrained(tmp_path)
    paths = [str(path) for path in pictures]
    pipe = transformers.pipeline("image-classification", model=model, image_processor=theirs, device="cpu")
    expected = pipe(paths, top_k=10)
    found = answers(ImageClassification(tmp_path, facts(model)), paths, model)
    best = answers(ImageClassification(tmp_path, facts(model), top_k=3), paths, model)
    for one, other, three in zip(found, expected, best, strict=True):
        assert [label.label for label in one] == [label["label"] for label in other]
        np.testing.assert_allclose([label.score for label in one], [label["score"] for label in other], atol=1e-5)
        assert three == one[:3]


def test_arrays_and_images_in_memory_are_read_like_files(data_folder, pictures):
    task, gray = ImageClassification({"size": 32}, SMALL), digits(data_folder, 3)
    files = pixels(task, [path for path in pictures if path.name in ("digit00.png", "digit01.png", "digit02.png")])
    np.testing.assert_array_equal(pixels(task, list(gray)), files)
    np.testing.assert_array_equal(pixels(task, [np.stack([row] * 3, -1) for row in gray]), files)
    np.testing.assert_array_equal(pixels(task, [Image.fromarray(row) for row in gray]), files)
    turned = [path for path in pictures if path.name.startswith("turned")]
    for path in turned:
        with Image.open(path) as image:
            np.testing.assert_array_equal(pixels(task, [image]), pixels(task, [str(path)]))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_picture_over_the_limit_of_pillow_is_refused(pictures, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 28 * 28)
    task = ImageClassification({"size": 20}, SMALL)
    assert len(task.encode([path for path in pictures if path.name.startswith("digit")])) == 20
    for example in (Image.new("RGB", (28, 29)), next(path for path in pictures if path.name == "rgb.png")):
        with pytest.raises(InputError, match=r"too large|exceeds limit"):
            task.encode([example])


def test_bad_pictures_end_in_one_message_that_names_the_file(data_folder, pictures, tmp_path):
    task, whole = ImageClassification({}, SMALL), pictures[0].read_bytes()
    header = whole[: whole.index(b"IHDR") - 4]
    bomb = [struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0) for edge in (30_000, 10_000)]
    bad = {
        "text.png": b"this is no picture",
        "empty.png": b"",
        "cut.png": whole[: len(whole) * 2 // 3],
        "cut.jpg": next(path for path in pictures if path.name == "photo.jpg").read_bytes()[:700],
        "damaged.png": whole.replace(b"IDAT", b"IDAT" + b"\0" * 9),
        "bomb.png": header + chunk(b"IHDR", bomb[0]) + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
        "small-bomb.png": header + chunk(b"IHDR", bomb[1]) + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            task.encode([pictures[0], tmp_path / name])
    for path in (tmp_path / "absent.png", tmp_path):
        with pytest.raises(InputError, match=path.name):
            task.encode([str(path)])
    with Image.open(tmp_path / "cut.png") as cut, pytest.raises(InputError, match="image 1"):
        task.encode([cut])
    gray = digits(data_folder, 1)[0]
    for array in (gray / 255, gray[0], gray[:0], np.stack([gray] * 4, -1), np.stack([gray] * 3)):
        with pytest.raises(InputError, match=r"image 2[\s\S]*uint8"):
            task.encode([gray, array])
    with pytest.raises(InputError, match=r"image 1[\s\S]*a path"):
        task.encode([7])
    with pytest.raises(InputError, match="differ in size"):
        ImageClassification({"do_resize": False}, SMALL).encode([gray, gray[:20]])
    with pytest.raises(InputError, match="too large"):  # 224 pixels wide, and 2 million high
        ImageClassification({"size": {"shortest_edge": 224}}, SMALL).encode([np.zeros((9000, 1), np.uint8)])


def test_bad_preparations_end_in_one_clear_message(tmp_path):
    for steps, said in [
        ({"size": {"longest_edge": 3}}, "shortest_edge"),
        ({"size": {"height": 0, "width": 3}}, "height"),
        ({"size": {"height": 1 << 30, "width": 3}}, "16384"),
        ({"size": "big"}, "size: 'big'"),
        ({"size": 224, "image_processor_type": "CLIPImageProcessor"}, "size: 224"),
        ({"crop_size": {"shortest_edge": 3}}, "crop_size"),
        ({"resample": 17}, "resample"),
        ({"resample": "cubic"}, "resample"),
        ({"image_std": [1, 0, 1]}, "image_std is 0"),
        ({"image_mean": [1, 2]}, "image_mean"),
        ({"image_mean": "gray"}, "image_mean"),
        ({"rescale_factor": float("nan")}, "rescale_factor"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"crop_pct": 0.9}, "crop_pct"),
    ]:
        with pytest.raises(FormatError, match=said):
            ImageClassification(steps, SMALL)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(steps))
        with pytest.raises(FormatError, match=r"preprocessor_config\.json"):
            ImageClassification(tmp_path, SMALL)
    with pytest.raises(FormatError, match="is missing"):
        ImageClassification(tmp_path / "nowhere", SMALL)
    with pytest.raises(InputError, match='did you mean "softmax"'):
        ImageClassification({}, SMALL, scores="soft-max")
