"""What a server needs of a model folder, and the files around it, filled in from templates.

A template is a file of `templates/KIND` in which `$name` stands for a value; `$$` is a dollar.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from string import Template

from lmworks import __version__
from lmworks.base.errors import InputError
from lmworks.base.files import own_file, write_text
from lmworks.export.receipt import EXCLUDED, list_files, recall, write_receipt
from lmworks.runtime.onnx_runtime import FILES, find_graph

TEMPLATES = Path(__file__).parent / "templates"
WEIGHTS = (".safetensors", ".bin", ".gguf")  # a graph holds its own


def put_model(folder: Path, place: Path, *, dtype: str = "auto") -> int:
    """Copy what is served of the model in `folder` to the new folder `place`; return the bytes of its graphs.

    That is the graph of the dtype, or the most exact, and with a page all that the page may choose from; a checkpoint
    without graphs is exported first, which needs torch. A monitor comes along. Raises InputError for a dtype that is
    not there.
    """
    held = [name for name, file in FILES.items() if (folder / "onnx" / file).is_file()]
    if not held:
        from lmworks.export.onnx_folder import export_graphs

        export_graphs(folder, place, dtypes=["fp32" if dtype == "auto" else dtype])
    else:
        kept = held[0] if dtype == "auto" else dtype
        find_graph(folder, kept)
        others = set() if (folder / "index.html").is_file() else {FILES[name] for name in held if name != kept}
        place.mkdir(parents=True)
        for name in list_files(folder, EXCLUDED):
            inside = name.split("/")
            graph = inside[0] == "onnx" and inside[-1].removesuffix(".onnx").partition(".onnx_data")[0] + ".onnx"
            if name.endswith(WEIGHTS) or graph in others:
                continue
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(own_file(folder / name), place / name)
        write_receipt(place, {"made_by": f"lmworks {__version__}", "source": folder.resolve().name, **recall(folder)})
    return sum(path.stat().st_size for path in (place / "onnx").iterdir())


def open_to_all(folder: Path) -> None:
    """Let everybody read what lies in a folder: it is run by another user than the one who makes it."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() or path.suffix == ".sh" else 0o644)


def fill(kind: str, place: Path, values: Mapping[str, str]) -> None:
    """Write the files of one kind of deployment into the folder `place`."""
    for source in sorted((TEMPLATES / kind).iterdir()):
        write_text(place / source.name, Template(source.read_text("utf-8")).substitute(values))


def name_of(folder: Path, given: str | None) -> str:
    """Return a name that images and clusters take: a label of at most 40 characters after a letter (RFC 1035)."""
    if given is not None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", given):
            raise InputError("this cannot be the name of a service", found=given,
                             expected="a small letter, up to 39 letters, digits and dashes")  # fmt: skip
        return given
    plain = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"model-{plain}")[:40].strip("-")
