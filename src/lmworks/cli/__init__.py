"""The command line: verb first, results on standard output, everything else on standard error.

Each verb lives in a file of its own and is imported when it is called, so that `lmworks --help` is immediate.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from io import TextIOWrapper

from lmworks import __version__
from lmworks.base.errors import Interrupted, LmworksError, from_os_error, printable
from lmworks.base.leaving import leaving_at_once
from lmworks.base.threads import rest_while_waiting
from lmworks.cli.verbs import EXAMPLES, GROUPS, HELP, VERBS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0 done, 1 a check failed, 2 the input cannot be used, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with leaving_at_once() if words[:1] == ["serve"] else nullcontext():
        return run(words)


def run(words: list[str]) -> int:
    """Run one verb, in words; return the exit code."""
    from cyclopts import App, CycloptsError

    rest_while_waiting()
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words = [word for word in words[:end] if word != "--debug"] + words[end:]
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter shows another
    app = App("lmworks", help=HELP, version=__version__, help_epilogue=show_examples(EXAMPLES), help_format="markdown",
              suppress_keyboard_interrupt=False)  # fmt: skip
    for name, purpose in GROUPS.items():
        shown = [lines[0] for verb, (_, _, lines) in VERBS.items() if verb.startswith(f"{name} ")]
        app.command(App(name, help=purpose, help_epilogue=show_examples(shown), help_format="markdown"))
    for name, (place, purpose, examples) in VERBS.items():
        *group, verb = name.split()
        under = app[group[0]] if group else app
        under.command(place, name=verb, help=purpose, help_epilogue=show_examples(examples))
    try:
        result = app(words or ["--help"], exit_on_error=False, print_error=True, result_action="return_value")
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except CycloptsError:
        return 2
    except LmworksError as error:
        if debug:
            raise
        return refuse(error)
    except KeyboardInterrupt:
        resumable = words[:1] in (["build"], ["train"], ["finetune"], ["distill"], ["retrain"])
        return refuse(Interrupted("stopped", fix="run the same command with --resume" if resumable else ""))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug:
            raise
        return refuse(from_os_error(error, f"lmworks {words[0]} failed" if words else "lmworks failed"))
    except RecursionError:
        return refuse(LmworksError("a file is nested too deeply"))
    except UnicodeError as error:
        if debug:
            raise
        return refuse(LmworksError("some text cannot be read or written", found=str(error), fix="use UTF-8"))
    except MemoryError:
        return refuse(LmworksError("out of memory", fix="choose a smaller --size, or halve --batch-size or --context"))


def show_examples(lines: Sequence[str]) -> str:
    """Return the examples as Markdown for a help page."""
    return "Examples:\n\n" + "\n\n".join(f"    {line}" for line in lines)


def refuse(error: LmworksError) -> int:
    """Print one message on standard error and return its exit code."""
    if not error.silent:
        print(printable(f"lmworks: {error}"), file=sys.stderr)  # noqa: T201
    return error.exit_code
