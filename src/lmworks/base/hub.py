"""From the name of a model to a folder: local first, then the Hub's cache on this disk, then the Hub itself.

The cache is the one that all Hugging Face libraries share:

    models--org--name/refs/main               the commit that a branch or tag stood for when it was fetched
    models--org--name/snapshots/<commit>/…    the files, mostly links into blobs/
    models--org--name/trees/<commit>.json     what the repository holds at that commit, with sizes

It is read here in plain Python. A socket is opened only by `pull`, which `find_folder` calls when nothing on the disk
will do and no offline variable is set. Source: huggingface_hub 2.4, "Manage the cache" and `_tree_cache.py`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

from lmworks import __version__
from lmworks.base.errors import InputError, LmworksError, MissingExtra, from_os_error
from lmworks.base.files import read_json, write_text
from lmworks.base.optional import require

NEEDED = (  # patterns of what a model needs to run; `*` stays within one folder
    "config.json generation_config.json preprocessor_config.json processor_config.json "
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.txt vocab.json merges.txt "
    "tokenizer.model spiece.model sentencepiece*.model chat_template.* additional_chat_templates/*.jinja "
    "model.safetensors model-*-of-*.safetensors model.safetensors.index.json "
    "adapter_config.json adapter_model.safetensors "
    "modules.json sentence_*_config.json config_sentence_transformers.json [0-9]_*/*.json [0-9]_*/model.safetensors"
).split()
PAPERS = "README.md LICENSE* lmworks.json certificate.json".split()  # fetched too, but never missed
PICKLES = "*.bin *.pt *.pth *.ckpt *.h5 *.msgpack".split()
TEXT_OR_IMAGE = (  # a snapshot without any of these came without its tokenizer
    "tokenizer.json vocab.txt vocab.json tokenizer.model spiece.model sentencepiece.bpe.model preprocessor_config.json"
).split()
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "LMWORKS_OFFLINE")
ENDPOINT = "https://huggingface.co"
NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
COMMIT = re.compile(r"[0-9a-f]{40}")
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
    name = check_name(os.fspath(name))
    return find_cached(name, revision=revision, files=files) or pull(name, revision=revision, files=files)


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


def find_cached(name: str, *, revision: str | None = None, files: Sequence[str] | None = None) -> Path | None:
    """Return the cached snapshot of a model if it holds everything that is asked for; opens no socket."""
    snapshot = find_snapshot(name, check_revision(revision))
    return snapshot if snapshot is not None and not list_missing(snapshot, files) else None


def find_snapshot(name: str, revision: str) -> Path | None:
    """Return the cached snapshot of a revision, whole or not, or None."""
    repository = repository_folder(name)
    try:
        commit = revision if COMMIT.fullmatch(revision) else (repository / "refs" / revision).read_text().strip()
        snapshot = repository / "snapshots" / commit
        return snapshot if COMMIT.fullmatch(commit) and snapshot.is_dir() else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, UnicodeDecodeError):
        return None
    except OSError as error:
        raise from_os_error(error, "the Hub's cache cannot be read") from None


def list_missing(snapshot: Path, files: Sequence[str] | None = None) -> list[str]:
    """Return the names of files that a snapshot should hold and does not, or holds cut short.

    The repository's own listing decides where there is one. Where there is none (older libraries wrote the cache), a
    model needs its config, its weights with every shard, the parts of modules.json, and a tokenizer or preprocessor.
    """
    listing = read_listing(snapshot)
    if listing is not None:
        chosen = choose(listing, files or NEEDED)
        return (
            [name for name in chosen if not is_whole(snapshot / name, listing[name])] if chosen else list(files or ())
        )
    held = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    if files is not None:
        return [pattern for pattern in files if not choose(held, [pattern])]
    needed = ["config.json", *list_parts(snapshot, held), "" if set(TEXT_OR_IMAGE) & set(held) else "tokenizer.json"]
    return [name for name in needed if name and name not in held]


def list_parts(snapshot: Path, held: Sequence[str]) -> list[str]:
    """Return the weight files that an index names and the poolings that modules.json names."""
    index, modules = "model.safetensors.index.json", "modules.json"
    try:
        parts = ["model.safetensors"]
        if index in held and parts[0] not in held:
            parts = sorted(set(read_json(snapshot / index)["weight_map"].values()))
        if modules in held:
            listed = json.loads((snapshot / modules).read_bytes())
            parts += [f"{part['path']}/config.json" for part in listed if part["type"].endswith("Pooling")]
        return parts
    except (LmworksError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # damaged: whoever loads it says where


def read_listing(snapshot: Path) -> dict[str, int | None] | None:
    """Return name -> bytes of every file of the repository at this commit, if huggingface_hub has noted it."""
    path = snapshot.parents[1] / "trees" / f"{snapshot.name}.json"
    try:
        return {str(name): entry.get("size") for name, entry in json.loads(path.read_bytes())["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def is_whole(path: Path, size: int | None) -> bool:
    """Say whether a file is there, its link leads somewhere, and it has this many bytes."""
    return path.is_file() and size in (None, path.stat().st_size)


def choose(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match a pattern, part by part: `*.json` takes no file of a subfolder."""
    split = [pattern.split("/") for pattern in patterns]
    return sorted(
        name
        for name in names
        if any(len(parts) == len(name.split("/")) and all(map(fnmatchcase, name.split("/"), parts)) for parts in split)
    )


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


def download(hub: ModuleType, name: str, revision: str, files: Sequence[str] | None) -> Path:
    """Fetch the chosen files of a revision; the branch points to the new commit only when all of it is there."""
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="lmworks", library_version=__version__)
    info = api.model_info(name, revision=revision, timeout=30)
    held = [file.rfilename for file in info.siblings or ()]
    names = choose(held, files or [*NEEDED, *PAPERS])
    pickles = choose(held, PICKLES)
    if files is None and pickles and not choose(held, ["*.safetensors"]):
        raise InputError(
            f"{name} has no weights that can be read safely",
            found=", ".join(pickles),
            expected="model.safetensors",
            fix="look for a revision or a model with safetensors: a pickle can run code",
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
    address = os.environ.get("HF_ENDPOINT") or ENDPOINT
    for cause in causes(error):
        text = f"{type(cause).__name__}: {redact(str(cause)).strip().partition(chr(10))[0][:200]}"
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, errors.GatedRepoError):
            fix = f"accept them at {redact(address)}/{name}, then set HF_TOKEN to a token of that account"
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
            return InputError(f"the Hub refused to send {name}", where=redact(address), found=text, fix=fix)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free some disk space, or set HF_HOME to a folder on another disk; " + AGAIN
            return InputError(f"no room for {name}", where=str(cache_folder()), found=text, fix=fix)
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            fix = "set HF_HOME to a folder that you may write to"
            return InputError("the Hub's cache cannot be written", where=str(cache_folder()), found=text, fix=fix)
        if type(cause).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            fix = f"check the connection, HF_ENDPOINT and the proxy variables; {AGAIN}"
            return InputError(f"{name} could not be fetched", where=redact(address), found=text, fix=fix)
    text = f"{type(error).__name__}: {redact(str(error)).strip().partition(chr(10))[0][:200]}"
    return InputError(f"{name} could not be fetched", where=redact(address), found=text, fix=AGAIN)


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


def cache_folder() -> Path:
    """Return where the Hub's cache is: HF_HUB_CACHE, else `hub` in HF_HOME, else in the user's cache folder."""
    given: Any = os.environ.get
    home = given("HF_HOME") or os.path.join(given("XDG_CACHE_HOME") or "~/.cache", "huggingface")  # noqa: PTH118
    cache = given("HF_HUB_CACHE") or given("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")  # noqa: PTH118
    return Path(os.path.expandvars(os.path.expanduser(cache)))  # noqa: PTH111


def repository_folder(name: str) -> Path:
    """Return the cache's folder of a model."""
    return cache_folder() / f"models--{name.replace('/', '--')}"
