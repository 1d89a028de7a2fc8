"""From the name of a model to a folder: local first, then the Hub's cache on this disk, then the Hub itself.

A socket is opened only by `pull`, which `find_folder` calls when nothing on the disk will do and no offline variable is
set. No other file of this package asks the Hub anything.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from lmworks import __version__
from lmworks.base.errors import InputError, LmworksError, MissingExtra
from lmworks.base.files import write_text
from lmworks.base.hub_cache import (
    COMMIT,
    NEEDED,
    PAPERS,
    PICKLES,
    cache_folder,
    choose,
    find_cached,
    find_snapshot,
    list_missing,
    repository_folder,
)
from lmworks.base.optional import require
from lmworks.base.report import Report, Table

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "LMWORKS_OFFLINE")
NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
CONVERTIBLE = "pytorch_model.bin pytorch_model-*-of-*.bin pytorch_model.bin.index.json adapter_model.bin".split()
REVISION = re.compile(r"(?!.*(?:\.\.|//|@\{))[A-Za-z0-9_][A-Za-z0-9_./+@-]{0,254}(?<![/.])")


def find_folder(name: str | Path, *, revision: str | None = None, files: Sequence[str] | None = None) -> Path:
    """Return the folder of a model: a local one, else a whole one in the cache, else fetched from the Hub.

    `revision` is a branch, a tag or a commit of a model on the Hub. `files` are patterns that replace the usual choice
    (config, tokenizer, safetensors). Raises InputError, and MissingExtra where huggingface_hub would be needed.
    """
    folder = find_local(name)
    if folder is not None:
        if revision is not None:
            raise InputError("a local folder has no revisions", where=str(folder), fix="leave out the revision")
        return folder
    name, wanted = check_name(os.fspath(name)), check_revision(revision)
    return find_cached(name, revision=wanted, files=files) or pull(name, revision=wanted, files=files)


def find_convertible(name: str | Path, *, revision: str | None = None) -> Path:
    """Return a folder with weights that are pickles: a local one, one of the cache, or fetched for `convert`."""
    folder = find_local(name)
    if folder is not None:
        if revision is not None:
            raise InputError("a local folder has no revisions", where=str(folder), fix="leave out the revision")
        return folder
    name, wanted = check_name(os.fspath(name)), check_revision(revision)
    files = [pattern for pattern in (*NEEDED, *PAPERS) if "safetensors" not in pattern] + CONVERTIBLE
    snapshot = find_snapshot(name, wanted)
    if snapshot is not None and choose([path.name for path in snapshot.iterdir()], CONVERTIBLE):
        return snapshot
    return pull(name, revision=wanted, files=files)


def find_local(name: str | Path) -> Path | None:
    """Return the local folder of this name, or None; raise InputError for a name that cannot be one and is no model's.

    What starts with `.`, `/` or `~`, or has a backslash or two slashes, is a path and never a name on the Hub.
    """
    text = os.fspath(name)
    if not text.strip() or not text.isprintable():
        raise InputError("this is not the name of a model", found=repr(text), expected="a folder, or org/name")
    path = Path(os.path.expanduser(text))  # noqa: PTH111 (never raises)
    if os.path.isdir(path):  # noqa: PTH112 (never raises)
        return path
    if os.path.exists(path):  # noqa: PTH110 (never raises)
        raise InputError("a file is not a model folder", where=text, fix=f"give its folder: {path.parent}")
    if "://" in text:
        raise InputError("an address is not the name of a model", found=text, fix="give org/name, or fetch the folder")
    if text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1:
        raise InputError("there is no such model folder", where=text, fix="check the path")
    return None


def check_name(name: str) -> str:
    """Return `org/name` or `name` if the Hub could have it; else raise InputError."""
    good = all(NAME.fullmatch(part) for part in name.split("/")) and not re.search(r"\.\.|--|\.git$", name)
    if not good or name.count("/") > 1:
        raise InputError(
            "there is no such model folder, and the Hub has no such names",
            found=repr(name),
            expected="a folder, or org/name with letters, digits, '-', '_' and '.'",
        )
    return name


def check_revision(revision: str | None) -> str:
    """Return the revision, `main` for None; raise InputError for what is no branch, tag or commit."""
    if revision is not None and not REVISION.fullmatch(revision):
        raise InputError("this is not a revision", found=repr(revision), expected="a branch, a tag or a commit")
    return revision or "main"


def pull(name: str, *, revision: str | None = None, files: Sequence[str] | None = None) -> Path:
    """Bring a model of the Hub into the cache as it is there now, and return its folder.

    Only what the cache lacks is fetched; a connection that breaks is taken up again where it broke, and files that
    arrived whole stay. A full commit that is in the cache asks nobody. Raises InputError for every refusal of the
    network, the Hub or the disk.
    """
    name, wanted = check_name(name), check_revision(revision)
    cached = find_cached(name, revision=wanted, files=files) if COMMIT.fullmatch(wanted) else None
    if cached is not None:
        return cached
    if is_offline():
        raise missing_offline(name, wanted, files)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported
    try:
        hub = require("huggingface_hub", extra="hub")
    except MissingExtra as error:
        raise MissingExtra(
            f"there is no folder {name}, and to fetch {name} from the Hub {error.what.removeprefix('this ')}",
            fix=error.fix,
        ) from None
    try:
        return download(hub, name, wanted, files)
    except LmworksError:
        raise
    except Exception as error:  # whatever the library, its HTTP client or the disk may raise
        raise explain(error, name, wanted) from error


def pull_report(name: str, *, revision: str | None = None, files: Sequence[str] | None = None) -> Report:
    """Do what `pull` does, and say which commit came and what its folder holds."""
    folder = pull(name, revision=revision, files=files)
    held = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    facts = {"model": name, "revision": revision or "main", "commit": folder.name, "folder": str(folder)}
    values = {**facts, "bytes": sum(held.values()), "files": held}
    return Report(f"{name} is in {folder}", values, tables=(Table("Files", ("file", "bytes"), tuple(held.items())),))


def download(hub: ModuleType, name: str, revision: str, files: Sequence[str] | None) -> Path:
    """Fetch the chosen files of a revision; the branch points to the new commit only when all of it is there."""
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="lmworks", library_version=__version__)
    info = api.model_info(name, revision=revision, timeout=30)
    if not COMMIT.fullmatch(str(info.sha)):
        raise InputError("this is not an answer of a Hub", found=repr(info.sha)[:80], fix="check HF_ENDPOINT")
    held = [file.rfilename for file in info.siblings or ()]
    names = choose(held, files or [*NEEDED, *PAPERS])
    pickles = choose(held, PICKLES)
    if files is None and pickles and not choose(held, ["*.safetensors"]):
        raise InputError(
            f"{name} has no weights that can be read safely",
            found=", ".join(pickles),
            expected="model.safetensors",
            fix=f"read its tensors without running it: lmworks convert {name} -o OUT",
        )
    if not names:
        wanted = ", ".join(files or NEEDED[:1])
        raise InputError(f"{name} holds none of the files", found=", ".join(held[:20]), expected=wanted)
    with bars_on_terminals(hub):
        folder = Path(api.snapshot_download(name, revision=info.sha, cache_dir=cache_folder(), allow_patterns=names))
    missing = list_missing(folder, files)
    if missing:
        raise InputError(f"{name} did not arrive whole", where=str(folder), found=", ".join(missing), fix=AGAIN)
    reference = folder.parents[1] / "refs" / revision
    if not COMMIT.fullmatch(revision) and not (reference.is_file() and reference.read_text() == folder.name):
        reference.parent.mkdir(parents=True, exist_ok=True)
        write_text(reference, folder.name)
    return folder


@contextmanager
def bars_on_terminals(hub: ModuleType) -> Iterator[None]:
    """Hide huggingface_hub's progress bars where standard error is a file or a pipe."""
    hide = not sys.stderr.isatty() and not hub.utils.are_progress_bars_disabled()
    if hide:
        hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            hub.utils.enable_progress_bars()


AGAIN = "run it again: files that arrived whole are kept"


def explain(error: Exception, name: str, revision: str) -> LmworksError:
    """Turn what huggingface_hub, its HTTP client or the disk raised into one message with a fix."""
    errors = require("huggingface_hub.errors", extra="hub")
    address = redact(os.environ.get("HF_ENDPOINT") or require("huggingface_hub.constants", extra="hub").ENDPOINT)
    for cause in causes(error):
        text = f"{type(cause).__name__}: {redact(str(cause)).strip().partition(chr(10))[0][:200]}"
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, errors.GatedRepoError):
            fix = f"accept them at {address}/{name}, then set HF_TOKEN to a token of that account"
            return InputError(f"{name} is only for those who accepted its terms", found=text, fix=fix)
        if isinstance(cause, errors.RevisionNotFoundError):
            return InputError(f"{name} has no revision {revision}", found=text, fix="check the revision")
        if isinstance(cause, errors.RepositoryNotFoundError) or status in (401, 403):
            return InputError(
                f"there is no folder {name}, and the Hub has no {name} that you may read",
                found=text,
                fix="check the spelling; for a private model, set HF_TOKEN to a token that may read it",
            )
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return missing_offline(name, revision, None)
        if status is not None:
            fix = "wait a minute and run it again" if status == 429 or status >= 500 else "check HF_ENDPOINT"
            return InputError(f"the Hub refused to send {name}", where=address, found=text, fix=fix)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free some disk space, or set HF_HOME to a folder on another disk; " + AGAIN
            return InputError(f"no room for {name}", where=str(cache_folder()), found=text, fix=fix)
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            fix = "set HF_HOME to a folder that you may write to"
            return InputError("the Hub's cache cannot be written", where=str(cache_folder()), found=text, fix=fix)
        if type(cause).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            fix = f"check the connection, HF_ENDPOINT and the proxy variables; {AGAIN}"
            return InputError(f"{name} could not be fetched", where=address, found=text, fix=fix)
    text = f"{type(error).__name__}: {redact(str(error)).strip().partition(chr(10))[0][:200]}"
    return InputError(f"{name} could not be fetched", where=address, found=text, fix=AGAIN)


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what led to it, the nearest first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def redact(text: str) -> str:
    """Take tokens and passwords out of a text."""
    for secret in filter(None, (os.environ.get("HF_TOKEN", "").strip(), os.environ.get("HUGGING_FACE_HUB_TOKEN"))):
        text = text.replace(secret, "…")
    return re.sub(r"hf_[A-Za-z0-9]{6,}|(?<=//)[^/@\s]+(?=@)|(?<=Bearer )\S+", "…", text)


def missing_offline(name: str, revision: str, files: Sequence[str] | None) -> InputError:
    """Return the error for a model that is not on this disk while an offline variable is set."""
    snapshot = find_snapshot(name, revision)
    if snapshot is not None:
        found = f"an incomplete copy without {', '.join(list_missing(snapshot, files)[:5])}"
    else:
        found = "nothing" if not repository_folder(name).is_dir() else f"other revisions, but not {revision}"
    setting = ", ".join(name for name in OFFLINE if is_true(name)) or "HF_HUB_OFFLINE"
    return InputError(
        f"there is no folder {name}, the cache does not have {name}, and {setting} forbids to ask the Hub",
        where=f"{Path(name).absolute()}, {snapshot or repository_folder(name)}",
        found=found,
        fix=f"unset {setting} and run: lmworks pull {name}   (or set HF_HOME to the cache that has it)",
    )


def is_offline(environment: Mapping[str, str] = os.environ) -> bool:
    """Say whether the user forbids requests."""
    return any(is_true(name, environment) for name in OFFLINE)


def is_true(name: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Read a switch as huggingface_hub does."""
    return environment.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
