"""Render one chat template again and again, with nothing at hand: the child process behind `lmworks.tokens.chat`.

It is run as a file by a bare interpreter. The first line of its input is the template; every further line holds the
values of one rendering and is answered by one line: {"text"} or {"error", "message"}. All lines are JSON.

A template comes from a stranger's folder. jinja2's sandbox keeps it from everything but its values, yet not from
spending: so this process may use SECONDS of processor time for a rendering and MEMORY bytes beyond its start, and may
open no file and start no process at all.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

SECONDS, MEMORY = 1.0, 48 << 20
REHEARSAL = "{{ ('a' ~ 1)|wordwrap(1)|pprint|tojson }}{{ lipsum(1) }}{{ strftime_now('%c %Z') }}{{ none.x.y }}"


def limit() -> None:
    """Give up files, processes and memory for good; Windows has no such limits, only the parent's clock."""
    try:
        import resource
    except ImportError:
        return
    limits = {"RLIMIT_NOFILE": 0, "RLIMIT_NPROC": 0, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
        limits["RLIMIT_AS"] = pages * resource.getpagesize() + MEMORY
    for name, value in limits.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (value, value))


def set_clock(seconds: float) -> None:
    """End this process after so much processor time; 0 stops the clock."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # nobody listens to SIGPROF, so it kills


def make_compiler() -> tuple[Callable[[str], Any], type[Exception], type[Exception]]:
    """Return what compiles a template, the error of a template that objects, and that of one that breaks out."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.exceptions import SecurityError, UndefinedError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Objection(TemplateError):
        """The template says that it does not take these messages."""

    class Generation(ext.Extension):
        """`{% generation %}` marks what the model wrote; for a prompt it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Callable[[], str]) -> str:
            return caller()

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace may not hold the name {name!r}")

    class PlainNamespace(Namespace):
        """A namespace without names that reach into Python."""

        def __init__(self, /, *args: Any, **values: Any) -> None:
            for name in (made := dict(*args, **values)):
                check(name)
            super().__init__(made)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    class PlainDict:
        """`dict(…)` without the class behind it."""

        def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
            return dict(*args, **values)

    def raise_exception(message: Any) -> NoReturn:
        raise Objection(str(message))

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, namespace=PlainNamespace, dict=PlainDict()
    )
    with contextlib.suppress(
        UndefinedError
    ):  # it fails, too: Python loads much when first used, and soon no longer can
        environment.from_string(REHEARSAL).render()
    return environment.from_string, Objection, SecurityError


def main() -> None:
    """Answer one line after another until the input ends."""
    make, objection, escape = make_compiler()
    limit()
    print('"ready"', flush=True)  # noqa: T201 (the protocol)
    source, template = json.loads(sys.stdin.readline()), None
    for line in sys.stdin:
        set_clock(SECONDS)
        try:
            template = template or make(source)
            answer = {"text": template.render(**json.loads(line))}
            reply = json.dumps(answer)
        except MemoryError:
            answer = {"error": "memory", "message": ""}
        except Exception as error:
            kind = "objection" if isinstance(error, objection) else "escape" if isinstance(error, escape) else "failure"
            where = f" (line {error.lineno})" if hasattr(error, "lineno") else ""
            answer = {"error": kind, "message": f"{type(error).__name__}: {error}"[:500] + where}
        reply = reply if "text" in answer else json.dumps(answer)
        set_clock(0)
        print(reply, flush=True)  # noqa: T201
        if answer.get("error") == "memory":
            return  # what is left of its memory is anyone's guess


if __name__ == "__main__":
    sys.path += sys.argv[1:]
    main()
