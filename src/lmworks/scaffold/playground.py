"""Write a playground: `lmworks new NAME`, or `lmworks add playground` inside a project, which stays as it is.

    play                one script with the named commands; it needs nothing but Python
    examples/*.py       one file each, to be read and changed
    requirements.txt    lmworks as it is in wheels/, by its file, and the version of torch that made it
    Dockerfile          where the commands are to run in a container

Nothing is written outside the new folder, and nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template

from lmworks import __version__
from lmworks.base.errors import InputError
from lmworks.base.files import new_folder, write_text
from lmworks.base.report import Report, Table
from lmworks.deploy.wheel import write_wheel

TEMPLATE = Path(__file__).parent / "template"
ENGINES = ("native", "docker")
ONLY = {"docker": ("Dockerfile", "dockerignore")}  # files of one engine alone
NAMES = {"dockerignore": ".dockerignore", "gitignore": ".gitignore"}  # no tool may take the template's for its own
COMMANDS = "classify bert roberta-sentiment distilbert-sentiment ner qa check shell".split()
QUESTION = "Run the examples in Docker, or native with a Python environment of their own? [native] "


def make_playground(
    place: str | Path, *, docker: bool | None = None, ask: Callable[[str], str] | None = None
) -> Report:
    """Write a playground into the new folder `place`, whole or absent.

    `docker` None: `ask` is called with the question, where there is somebody to be asked. Raises InputError for a place
    that exists already, and where nobody can be asked.
    """
    place = Path(place)
    if place.exists() or place.is_symlink():
        raise InputError(f"{place} is there already", fix="choose another name, or remove it yourself")
    if not place.name.isprintable() or place.name.startswith(("-", ".")) or not place.name:
        raise InputError("this is no name for a folder", found=repr(place.name), expected="such as demo")
    engine = ENGINES[docker] if docker is not None else choose(ask)
    with new_folder(place) as staged:
        (staged / "wheels").mkdir()
        wheel = write_wheel(staged / "wheels").name
        for source in sorted(TEMPLATE.rglob("*")):
            name = source.relative_to(TEMPLATE).as_posix().removesuffix(".in")
            other = any(name in names for of, names in ONLY.items() if of != engine)
            if source.is_file() and not other:
                write_file(source, staged / NAMES.get(name, name), place.name, engine, wheel)
        files = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
    values = {"place": str(place), "engine": engine, "version": __version__, "wheel": wheel, "files": files,
              "commands": COMMANDS}  # fmt: skip
    first = "./play install" if engine == "native" else "./play build"
    table = Table("Commands", ("command",), tuple((f"./play {name}",) for name in COMMANDS))
    notes = (f"cd {place} && {first} && ./play classify", "Nothing outside this folder was changed.")
    return Report(f"{place}: a playground, {engine}, lmworks {__version__}", values, tables=(table,), notes=notes)


def choose(ask: Callable[[str], str] | None) -> str:
    """Return the engine that somebody at a terminal wants."""
    if ask is None and not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        raise InputError("nobody is here to be asked", fix="add --native or --docker")
    answer = (ask or on_terminal)(QUESTION).strip().lower()
    found = "native" if not answer else next((engine for engine in ENGINES if engine.startswith(answer)), None)
    if found is None:
        raise InputError("this is neither native nor docker", found=repr(answer)[:40], expected="native or docker")
    return found


def on_terminal(question: str) -> str:
    """Ask on standard error: standard output is for the result."""
    sys.stderr.write(question)
    sys.stderr.flush()
    return sys.stdin.readline()


def write_file(source: Path, path: Path, name: str, engine: str, wheel: str) -> None:
    """Write a file of the template, filled in; the script may be run."""
    path.parent.mkdir(exist_ok=True)
    values = {"name": name, "engine": engine, "version": __version__, "wheel": wheel, "pins": find_pins()}
    write_text(path, Template(source.read_text("utf-8")).substitute(values))
    if path.name == "play":
        path.chmod(0o755)


def find_pins() -> str:
    """Return the line of requirements for the torch that is installed, without its build (+cpu), or ""."""
    try:
        return f"torch=={version('torch').partition('+')[0]}\n"
    except PackageNotFoundError:
        return ""
