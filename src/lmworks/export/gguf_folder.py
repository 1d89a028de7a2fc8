"""What stands beside the GGUF files: Ollama's Modelfile, with its own form of the chat template, and a short README."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lmworks.base.errors import LmworksError
from lmworks.tokens.chat import render_chat
from lmworks.tokens.tokenizer import Tokenizer

USUAL_CONTEXT = 4096  # tokens that Ollama takes where nobody says
SYSTEM, ASKED, SAID, AGAIN = "{lmworks:system}", "{lmworks:asked}", "{lmworks:said}", "{lmworks:again}"
README = """# {title} for llama.cpp and Ollama

| file | MB | largest difference of a logit | equal next tokens |
|--|--|--|--|
{rows}

The differences are from the model that was exported, on the same texts. They are those of the numbers in
the file; llama.cpp also rounds what it multiplies them with. The model reads {context} tokens.

    llama-cli -m {first} -p "Once upon a time"
    ollama create {name} -f Modelfile && ollama run {name}
{notes}
Made by lmworks {version} from `{title}`; `lmworks.json` has the SHA-256 of every file.
"""


def write_modelfile(first: str, tokenizer: Tokenizer, ends: Sequence[int], context: int, *, begins: str) -> str:
    """Return a Modelfile for the file `first`. `begins`: the token that llama.cpp puts before a prompt, or ""."""
    lines = [f"FROM ./{first}"]
    if context < USUAL_CONTEXT:
        lines.append(f"PARAMETER num_ctx {context}")
    lines += [f'PARAMETER stop "{name}"' for name in map(tokenizer.token, ends) if name and '"' not in name]
    template = "{{ .Prompt }}" if tokenizer.chat_template is None else make_template(tokenizer, begins)
    if template is None:
        lines.append("# The chat template in the file has no plain form; Ollama uses it where it knows it.")
    else:
        lines.append(f'TEMPLATE """{template}"""')
    return "\n".join(lines) + "\n"


def make_template(tokenizer: Tokenizer, begins: str) -> str | None:
    """Return Ollama's form of a chat template that repeats one pattern a turn; None for every other.

    "<|im_start|>user\\n{{ .Prompt }}<|im_end|>\\n…": `begins` is left out, since llama.cpp puts it there.
    """
    try:
        opened, turn = cut(render(tokenizer, user=ASKED), ASKED)
        head, middle, closed, last = cut(render(tokenizer, user=ASKED, assistant=SAID, again=AGAIN), ASKED, SAID, AGAIN)
    except (LmworksError, ValueError):
        return None
    opened, head = opened.removeprefix(begins), head.removeprefix(begins)
    if not (opened == head and turn == middle == last and closed.endswith(opened)):
        return None
    start, before, after = opened, "", ""
    try:
        before, after, rest = cut(render(tokenizer, system=SYSTEM, user=ASKED), SYSTEM, ASKED)
        before = before.removeprefix(begins)
        if rest != turn:
            return None
        if after.endswith(opened):
            start = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after.removesuffix(opened)}{{{{ end }}}}{opened}"
        else:
            start = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{opened}{{{{ end }}}}"
    except (LmworksError, ValueError):
        pass  # a template without a place for the system's words
    if any('"""' in part or "{{" in part for part in (opened, turn, closed, before, after)):
        return None
    return f"{start}{{{{ .Prompt }}}}{turn}{{{{ .Response }}}}{closed.removesuffix(opened)}"


def render(tokenizer: Tokenizer, **said: str) -> str:
    """Return the prompt of a conversation, a word a role; "again" is the user's second."""
    messages = [{"role": "user" if role == "again" else role, "content": text} for role, text in said.items()]
    return render_chat(tokenizer, messages)


def cut(text: str, *marks: str) -> list[str]:
    """Return what stands around the marks; raise ValueError where one is not there exactly once, in order."""
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError(mark)
        part, text = text.split(mark)
        parts.append(part)
    return [*parts, text]


def write_readme(
    files: Mapping[str, Mapping[str, Any]], notes: Sequence[str], *, title: str, context: int, version: str
) -> str:
    """Return the folder's README."""
    name = re.sub(r"[^a-z0-9._-]+", "-", title.lower()).strip("-.") or "model"
    rows = [
        f"| `{row['file']}` | {row['bytes'] / 1e6:.1f} | {row['max_abs_diff']:.2g} | {row['agreement']:.1%} |"
        for row in files.values()
    ]
    first = next(iter(files.values()))["file"]
    listed = "".join(f"\n- {note}" for note in notes)
    return README.format(
        rows="\n".join(rows), first=first, notes=f"{listed}\n" if listed else "", title=title, name=name,
        context=context, version=version,
    )  # fmt: skip
