"""Turn messages into a prompt with the chat template that a model came with.

A template is a program by a stranger. It runs in jinja2's sandbox, in a child process of its own with little memory,
little time and no files (`sandbox.py`), and sees plain JSON values only. The child stays for the next rendering of the
same template; starting one takes a few hundredths of a second.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from threading import Lock, Timer
from typing import Any

from lmworks.base.errors import FormatError, InputError, did_you_mean
from lmworks.base.optional import require
from lmworks.tokens import legacy
from lmworks.tokens.tokenizer import USUAL, Tokenizer

STARTS_WITHIN, RENDERS_WITHIN = 30.0, 1.9  # seconds on the clock; the child has limits of its own
KEPT = 4  # children that wait for their template's next rendering
LONGEST = 1 << 20  # characters of a template; published ones have some thousands
SAFE_JINJA = (3, 1, 6)  # the sandbox of earlier ones is known to leak
KEPT_NAMES = ("TZ", "SYSTEMROOT", "LD_LIBRARY_PATH")  # of the environment: no secrets for the child
VALUES = {  # what published templates read besides messages, tools and add_generation_prompt
    *USUAL,
    *("documents", "enable_thinking", "thinking", "reasoning_effort", "model_identity", "date_string"),
    *("builtin_tools", "custom_tools", "python_tools", "xml_tools", "tools_in_user_message"),
}
SAYS = {
    "escape": "the chat template does what a template may not",
    "failure": "the chat template failed on these messages",
    "memory": "the chat template was stopped: it takes too much memory",
}


def render_chat(
    source: Tokenizer | str,
    messages: Sequence[dict[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[dict[str, Any]] | None = None,
    **values: Any,
) -> str:
    """Return the prompt of a conversation: [{"role": "user", "content": "Hi"}] -> "<|im_start|>user\\nHi…".

    `source` is a tokenizer with a chat template (`tool_use` where it has one and there are tools), or a template.
    `add_generation_prompt` opens the assistant's turn. `values` are further names that templates read (VALUES).
    The prompt has its special tokens already. Raises InputError for messages that are not roles with contents, or that
    the template objects to; FormatError for a template that is missing, fails, breaks out or takes too much.
    """
    for name in values:
        if name not in VALUES:
            hint = did_you_mean(name, VALUES)
            raise InputError(f"a chat template takes no value {name!r}", expected=", ".join(sorted(VALUES)), fix=hint)
    check_messages(messages)
    template = source if isinstance(source, str) else choose_template(source, bool(tools))
    if len(template) > LONGEST:
        found = f"{len(template)} characters"
        raise FormatError("the chat template is too long", where=PLACES, found=found, expected=str(LONGEST))
    given = {"messages": list(messages), "tools": tools, "documents": None, **special_tokens(source), **values}
    try:
        line = json.dumps(given | {"add_generation_prompt": bool(add_generation_prompt)}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            "messages, tools and values must be plain JSON", found=str(error)[:200], expected="texts, numbers, lists …"
        ) from None
    answer = ask(template, line)
    if "text" in answer:
        return str(answer["text"])
    said = "".join(letter if letter.isprintable() else " " for letter in answer["message"])
    if answer["error"] == "objection":
        raise InputError("the chat template does not take these messages", found=said.partition(": ")[2])
    raise FormatError(SAYS[answer["error"]], where=PLACES, found=said)


def check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """Raise InputError where a message is not a role with a text, a list of parts, or calls of tools."""
    expected = '{"role": "user", "content": "a text"}'
    if isinstance(messages, str | dict) or not isinstance(messages, Sequence):
        raise InputError("a conversation is a list of messages", found=type(messages).__name__, expected=expected)
    for i, message in enumerate(messages):
        whole = isinstance(message, dict) and all(isinstance(key, str) for key in message)
        if not whole or not isinstance(message.get("role"), str) or not message["role"]:
            raise InputError(
                "a message has no role", where=f"message {i}", found=repr(message)[:100], expected=expected
            )
        said = message.get("content")
        parts = isinstance(said, list) and all(isinstance(p, dict) and isinstance(p.get("type"), str) for p in said)
        if not isinstance(said, str) and not parts and not (said is None and message.get("tool_calls")):
            found = "nothing" if said is None else repr(said)[:100]
            raise InputError("a message has no content", where=f"message {i}", found=found, expected=expected)


def choose_template(tokenizer: Tokenizer, with_tools: bool) -> str:
    """Return the tokenizer's template; raise FormatError where it has none."""
    templates = tokenizer.chat_templates
    found = (templates.get("tool_use") if with_tools else None) or templates.get("default")
    if found is None:
        raise FormatError(
            "the model has no chat template",
            found=", ".join(templates),
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            fix="it may not be a chat model: give it a plain prompt",
        )
    return found


def special_tokens(source: Tokenizer | str) -> dict[str, str]:
    """Return the special tokens by the names under which templates print them."""
    if isinstance(source, str):
        return {}
    named = {key: token for key, token in source.config.items() if key.endswith("_token")}
    found = {key: legacy.content(token) for key, token in named.items() if isinstance(token, str | dict) and token}
    usual = {key: source.find(key) for key in USUAL if key not in named}
    return found | {key: source.token(id) or "" for key, id in usual.items() if id is not None}


PLACES = "chat_template.jinja, or chat_template in tokenizer_config.json"


class Child:
    """A process that renders one template."""

    def __init__(self, template: str) -> None:
        """Start the process and hand it the template; nothing is compiled yet."""
        folders = {str(Path(str(require(name, extra="text").__file__)).parents[1]) for name in ("jinja2", "markupsafe")}
        if tuple(int(part) for part in version("jinja2").split(".")[:3]) < SAFE_JINJA:
            raise FormatError(
                "chat templates need a safe jinja2", found=version("jinja2"), fix='pip install "jinja2>=3.1.6"'
            )
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("sandbox.py")), *sorted(folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(sys.executable).anchor,
            env={name: os.environ[name] for name in KEPT_NAMES if name in os.environ},
        )
        if self.exchange("", STARTS_WITHIN) != "ready":
            self.close()
            raise FormatError("the process that renders chat templates does not start")
        self.exchange(json.dumps(template), 0)

    def exchange(self, line: str, seconds: float) -> Any:
        """Send a line; return the answer, or None where the process ended or time ran out; 0 waits for no answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        clock = Timer(seconds or STARTS_WITHIN, self.process.kill)
        clock.start()
        try:
            if line:
                self.process.stdin.write(line.encode() + b"\n")
                self.process.stdin.flush()
            return json.loads(self.process.stdout.readline()) if seconds else None
        except (OSError, ValueError):
            return None
        finally:
            clock.cancel()

    def close(self) -> None:
        """End the process, unless it belongs to the process that this one was forked from."""
        if self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()


CHILDREN: dict[tuple[int, str], Child] = {}  # by process and template, the one used last at the end
LOCK = Lock()


def ask(template: str, line: str) -> dict[str, str]:
    """Return the child's answer; a child that had to be stopped is forgotten, and FormatError says so."""
    key = (os.getpid(), template)
    with LOCK:
        child = CHILDREN.pop(key, None)
        if child is not None and child.process.poll() is not None:
            child.close()
            child = None
        child = child or Child(template)
        answer: dict[str, str] | None = child.exchange(line, RENDERS_WITHIN)
        if answer is None or answer.get("error") == "memory":
            child.close()
        else:
            CHILDREN[key] = child
        while len(CHILDREN) > KEPT:
            CHILDREN.pop(next(iter(CHILDREN))).close()
    if answer is None:
        raise FormatError("the chat template was stopped: it takes too long, or too much memory", where=PLACES)
    return answer


@atexit.register
def close_all() -> None:
    """End the children that wait."""
    while CHILDREN:
        CHILDREN.popitem()[1].close()
