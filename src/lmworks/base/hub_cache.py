"""The cache on this disk that all Hugging Face libraries share, read in plain Python.

    models--org--name/refs/main               the commit that a branch or tag stood for when it was fetched
    models--org--name/snapshots/<commit>/…    the files, mostly links into blobs/
    models--org--name/trees/<commit>.json     what the repository holds at that commit, with sizes

Source: huggingface_hub 2.4, "Manage the cache" and `_tree_cache.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lmworks.base.errors import FormatError, LmworksError, from_os_error
from lmworks.base.files import read_json, read_value

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
COMMIT = re.compile(r"[0-9a-f]{40}")


def find_cached(name: str, *, revision: str = "main", files: Sequence[str] | None = None) -> Path | None:
    """Return the cached snapshot of a model if it holds everything that is asked for; opens no socket."""
    snapshot = find_snapshot(name, revision)
    return snapshot if snapshot is not None and not list_missing(snapshot, files) else None


def find_snapshot(name: str, revision: str) -> Path | None:
    """Return the cached snapshot of a revision, whole or not, or None."""
    repository = repository_folder(name)
    try:
        reference = repository / "refs" / revision
        if not COMMIT.fullmatch(revision) and reference.exists() and not reference.is_file():  # a pipe would block
            return None
        commit = revision if COMMIT.fullmatch(revision) else reference.read_text().strip()
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
            listed = read_value(snapshot / modules)
            parts += [f"{part['path']}/config.json" for part in listed if part["type"].endswith("Pooling")]
        return parts
    except (LmworksError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # damaged: whoever loads it says where


def read_listing(snapshot: Path) -> dict[str, int | None] | None:
    """Return name -> bytes of every file of the repository at this commit, if huggingface_hub has noted it."""
    path = snapshot.parents[1] / "trees" / f"{snapshot.name}.json"
    try:
        return {str(name): entry.get("size") for name, entry in read_json(path)["files"].items()}
    except (FormatError, ValueError, KeyError, TypeError, AttributeError):
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


def home_folder() -> Path:
    """Return where Hugging Face libraries keep the cache and the token: HF_HOME, or a part of the user's cache."""
    return expand(os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface")


def cache_folder() -> Path:
    """Return where the Hub's cache is: HF_HUB_CACHE, else `hub` in the home folder."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return expand(named) if named else home_folder() / "hub"


def expand(path: str) -> Path:
    """Fill in `~` and `$NAME`."""
    return Path(os.path.expandvars(os.path.expanduser(path)))  # noqa: PTH111 (never raises)


def repository_folder(name: str) -> Path:
    """Return the cache's folder of a model."""
    return cache_folder() / f"models--{name.replace('/', '--')}"
