"""Pictures in JavaScript: prepared as Pillow and Python prepare them, and classified."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
import transformers
from js_engine import CLOSE, SIZES, ask, differ, plain, to_url
from PIL import Image

import lmworks
from lmworks.export.onnx_folder import export_graphs
from lmworks.tasks.base import Facts
from lmworks.tasks.image import ImageClassification, target

pytestmark = pytest.mark.node


def pictures() -> dict[str, Image.Image]:
    """Return pictures of every kind that a PNG can hold, small and of odd sizes."""
    draw = np.random.default_rng(0)
    smooth = Image.fromarray(draw.integers(0, 256, (9, 11, 3), np.uint8)).resize((53, 37), Image.Resampling.BICUBIC)
    rgba = Image.fromarray(draw.integers(0, 256, (37, 53, 4), np.uint8))
    deep = Image.fromarray((draw.integers(0, 700, (20, 30))).astype(np.uint16))
    kinds = {"rgb": smooth, "rgba": rgba, "gray": smooth.convert("L"), "gray and alpha": rgba.convert("LA")}
    kinds |= {"palette": smooth.convert("P"), "16 colours": smooth.quantize(16), "4 colours": smooth.quantize(4)}
    kinds |= {"black and white": smooth.convert("1"), "16 bits": deep}
    return kinds | {"tall": smooth.transpose(Image.Transpose.ROTATE_90)}


STEPS = [
    {"size": {"height": 32, "width": 32}, "resample": resample} for resample in range(6)
] + [
    {
        "size": {"height": 64, "width": 48}, "resample": 3,
        "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
    },
    {
        "size": {"shortest_edge": 30}, "resample": 2, "do_center_crop": True, "crop_size": 24,
        "image_processor_type": "ConvNextImageProcessor",
    },
    {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 64, "width": 41}, "do_normalize": False},
    {"size": 16, "do_rescale": False},
]  # fmt: skip


def test_pictures_are_prepared_to_the_bit():
    """Every filter of Pillow, up and down; crops; every kind of PNG; the way up that EXIF tells."""
    images = pictures()
    exif = Image.Exif()
    work, known = [], []
    for steps in STEPS:
        for name, image in images.items():
            work.append({"image": to_url(image), "steps": steps})
            known.append(
                (name, steps, image, Image.open(io.BytesIO(base64.b64decode(work[-1]["image"].split(",")[1]))))
            )
    for way in range(1, 9):
        exif[0x0112] = way
        work.append({"image": to_url(images["rgb"], exif=exif), "steps": STEPS[2]})
        held = base64.b64decode(work[-1]["image"].split(",")[1])
        known.append((f"EXIF {way}", STEPS[2], images["rgb"], Image.open(io.BytesIO(held))))
    pixels = {"width": 53, "height": 37, "data": np.asarray(images["rgba"]).ravel().tolist()}
    work.append({"image": pixels, "steps": STEPS[2]})
    known.append(("pixels", STEPS[2], images["rgba"], images["rgba"]))
    facts = Facts(model_type="vit", max_length=1, labels=("a",))
    for (name, steps, _, image), given in zip(known, ask({"pictures": work}), strict=True):
        assert not isinstance(given, dict), (name, given)
        task, where = ImageClassification(steps, facts), f"{name} {steps}"
        whole = task._read(image, name)
        whole_values = task._prepare(whole, name).ravel()  # for some sizes Pillow 13 goes down first
        unit = 1.01 * (1 / 255 if task.steps["do_rescale"] else 1) / min(task.steps["image_std"])
        np.testing.assert_allclose(np.array(given, np.float32), whole_values, atol=unit, err_msg=where)
        if task.steps["do_resize"]:
            width, height = target(whole.size, task.steps["size"])
            across = whole.resize((width, whole.height), resample=task.steps["resample"])
            task.steps["size"] = {"width": width, "height": height}
            whole_values = task._prepare(across, name).ravel()
        np.testing.assert_allclose(np.array(given, np.float32), whole_values, atol=1e-6, err_msg=where)


def test_images_are_classified_as_in_python(data_folder, tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=4)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "weights")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "weights")
    export_graphs(tmp_path / "weights", tmp_path / "graphs", dtypes=["fp32"])
    images = [image for name, image in pictures().items() if name != "16 bits"]
    calls = [{"input": {"image": to_url(image)}, "options": {"top_k": 3}} for image in images]
    jobs = [{"folder": str(tmp_path / "graphs"), "task": "image-classification", "dtype": "fp32", "calls": calls}]
    predictor = lmworks.load(tmp_path / "graphs", threads=1)
    opened = [Image.open(io.BytesIO(base64.b64decode(call["input"]["image"].split(",")[1]))) for call in calls]
    for image, given in zip(opened, ask({"jobs": jobs})[0], strict=True):
        assert differ(given, plain(predictor(image, top_k=3))) < CLOSE
    jpeg = {"input": {"image": to_url(images[0], "JPEG", quality=95)}, "options": {"top_k": 1}}
    if "error" not in (found := ask({"jobs": [{**jobs[0], "calls": [jpeg]}]})[0][0]):  # another decoder's last bits
        python = plain(
            predictor(Image.open(io.BytesIO(base64.b64decode(jpeg["input"]["image"].split(",")[1]))), top_k=1)
        )
        assert found[0]["label"] == python[0]["label"]
        assert abs(found[0]["score"] - python[0]["score"]) < 1e-2
