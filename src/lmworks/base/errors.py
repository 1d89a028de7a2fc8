"""Errors that a user can act on.

    LmworksError        anything we raise on purpose; the command line prints it on one screen
    ├── InputError      what the user gave cannot be used                        exit code 2
    ├── FormatError     a file does not hold what it should                      exit code 2
    ├── MissingExtra    an optional package is not installed                     exit code 2
    ├── TrainingError   training cannot go on (a NaN, a full disk …)             exit code 2
    ├── CheckFailed     a verification or a gate says no                         exit code 1
    └── Interrupted     Ctrl-C or SIGTERM; the work so far is saved              exit code 130

Every error says what failed, where, what was found against what was expected, and the fix.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches


class LmworksError(Exception):
    """What failed, where, found against expected, and the fix."""

    exit_code = 2
    silent = False  # another process of the same run tells it

    def __init__(self, what: str, *, where: str = "", found: str = "", expected: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.found, self.expected, self.fix = what, where, found, expected, fix

    def __str__(self) -> str:
        rows = [self.what]
        rows += [
            f"  {name}: {value}"
            for name, value in (
                ("where", self.where),
                ("found", self.found),
                ("expected", self.expected),
                ("fix", self.fix),
            )
            if value
        ]
        return "\n".join(rows)


class InputError(LmworksError):
    """What the user gave cannot be used."""


class FormatError(LmworksError):
    """A file does not hold what it should."""


class MissingExtra(LmworksError):
    """An optional package is not installed."""


class TrainingError(LmworksError):
    """Training cannot go on; whatever was saved before is intact."""


class CheckFailed(LmworksError):
    """A verification or a gate says no."""

    exit_code = 1


class Interrupted(LmworksError):
    """Ctrl-C or SIGTERM arrived; the work so far is saved."""

    exit_code = 130


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ' did you mean "x"?' for the nearest choice, or an empty string."""
    near = get_close_matches(word, list(choices), n=1)
    return f' did you mean "{near[0]}"?' if near else ""


def from_os_error(error: OSError, doing: str) -> LmworksError:
    """Turn an operating system's refusal into a message with a fix."""
    fixes = {
        errno.ENOSPC: "free some disk space, or write to another disk with -o",
        errno.EFBIG: "raise the limit of a file's size (ulimit -f), or write to another disk with -o",
        errno.EDQUOT: "free some of your disk quota, or write to another disk with -o",
        errno.EACCES: "choose a path that you may write to with -o, or change its permissions",
        errno.EROFS: "choose a path that is not read-only with -o",
        errno.ENOTDIR: "a parent of the path is a file: choose another path",
        errno.EEXIST: "remove what is there, or choose another path",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
    }
    return InputError(
        f"{doing}: {error.strerror or error}",
        where=str(error.filename or ""),
        fix=fixes.get(error.errno or 0, ""),
    )


def printable(text: str) -> str:
    """Return a text for a terminal: what would command it, such as ESC in a label of a stranger's, becomes U+FFFD."""
    return text.translate(COMMANDS)


COMMANDS = {n: "\ufffd" for n in (*range(32), *range(127, 160)) if chr(n) not in "\n\t"}
