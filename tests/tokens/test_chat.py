"""Chat prompts against transformers on the published forms of templates, and templates that mean harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lmworks.base.errors import FormatError, InputError
from lmworks.tokens import chat
from lmworks.tokens.chat import render_chat
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.tokens.train import train_tokenizer

LLAMA3 = (
    "{{- bos_token }}{%- set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
EVERYTHING = """{%- set ns = namespace(n=0, found=false) %}
{%- macro show(value) %}<{{ value }}>{% endmacro %}
{%- for message in messages if message.content is string %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {% generation %}{{ show(message.content | upper) }}{% endgeneration %}

    {%- set ns.n = ns.n + message.content | length %}
    {%- if loop.index > 4 %}{% break %}{% endif %}
{%- endfor %}
{%- if tools is not none %}{% for t in tools %}{{ t | tojson }} {{ t | tojson(indent=2) }}{% endfor %}{% endif %}
{%- if documents is not none %}{{ documents[0].title }}{% endif %}
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{{ ns.n }} {{ dict(a=1, b='é<&>') | tojson }} {{ '%s|%05.1f' | format('x', 2) }} {{ strftime_now('%Y') }} {{ missing }}
{{ messages | map(attribute='role') | unique | list }} {{ messages[-1].content.split(' ')[:2] | join('_') }}"""
TEMPLATES = {"llama 3": LLAMA3, "chatml": CHATML, "mistral": MISTRAL, "zephyr": ZEPHYR, "everything": EVERYTHING}
USER, ANSWER = (
    {"role": "user", "content": " What’s new in 東京? 😀 "},
    {"role": "assistant", "content": "Nothing.\n\nReally\t!"},
)
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief <|im_end|> & \"kind\"."}, USER],
    [USER, ANSWER, {"role": "user", "content": "Привет\u200d, e\u0301 \x07 {{ bos_token }} {% raw %}"}],
    [{"role": "system", "content": "S"}, USER, ANSWER, USER, ANSWER, USER],
]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "höhe", "parameters": {"type": "object", "properties": {"x": 1.5}}}}


@pytest.fixture(scope="module", autouse=True)
def no_child_stays() -> Iterator[None]:
    yield
    chat.close_all()


def with_template(folder: Path, template: Any) -> tuple[Tokenizer, Any]:
    """Return our tokenizer and transformers' of one folder with this template."""
    made = train_tokenizer(["a few words"], vocab_size=270)
    made.backend.add_special_tokens(["<s>", "</s>"])
    made.config |= {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "chat_template": template,
    }
    made.save(folder)
    return Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(name: str, add_generation_prompt: bool, tmp_path: Path) -> None:
    ours, theirs = with_template(tmp_path, TEMPLATES[name])
    for messages in CHATS:
        for more in ({}, {"tools": [TOOL]}, {"enable_thinking": False, "documents": [{"title": "T", "text": "x"}]}):
            known = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **more
            )
            assert render_chat(ours, messages, add_generation_prompt=add_generation_prompt, **more) == known


def test_a_template_alone_is_enough() -> None:
    text = render_chat(LLAMA3, [USER], bos_token="<|begin_of_text|>")
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat’s new in 東京? 😀<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_tools_choose_their_own_template(tmp_path: Path) -> None:
    rows = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].function.name }}"}]
    ours, theirs = with_template(tmp_path, rows)
    for tools in (None, [TOOL]):
        assert render_chat(ours, [USER], tools=tools) == theirs.apply_chat_template([USER], tools=tools, tokenize=False)
    with pytest.raises(FormatError, match="no chat template"):
        render_chat(Tokenizer(ours.backend), [USER])


def test_a_template_may_object() -> None:
    with pytest.raises(InputError, match=r"does not take these messages(.|\n)*Roles must alternate"):
        render_chat(MISTRAL, [USER, USER])
    with pytest.raises(InputError) as caught:
        render_chat("{{ raise_exception('no\x1b[31m red') }}", [USER])
    assert "\x1b" not in str(caught.value)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "{% set ns = namespace({'_x': 1}) %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{% include 'x' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends 'x' %}",
]


UNDEFINED = [  # the sandbox prints nothing where a template only looks
    "{{ raise_exception.__globals__ }}",
    "{{ namespace.__init__ }}",
    "{{ dict.__class__ }}",
    "{{ (''|attr('__class__'))|attr('__mro__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ strftime_now.__code__ }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_what_breaks_out_is_refused(template: str) -> None:
    with pytest.raises(FormatError, match=r"what a template may not|no loader"):
        render_chat(template, [USER])


@pytest.mark.parametrize("template", UNDEFINED)
def test_what_only_looks_sees_nothing(template: str) -> None:
    assert render_chat(template, [USER]) == ""
    with pytest.raises(FormatError):
        render_chat(template.replace(" }}", ".x }}"), [USER])


COSTLY = [
    "{{ 'a' * 10**9 }}",
    "{{ ('a' * 10**7) ~ ('b' * 10**8) }}",
    "{% set x = messages[0].content * 10**8 %}{{ x|length }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}abcdefgh{% endfor %}{% endfor %}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% set ns = namespace(a='x') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a|length }}",
    "{{ 9 ** (9 ** (9 ** 9)) }}",
    "{% set n = messages|length + 8 %}{{ n ** (n ** (n ** n)) }}",
    "{{ '%999999999d'|format(3) }}",
    "{{ 'a'.ljust(999999999) }}",
    "{{ range(99999)|map('string')|map('center', 99999)|list|length }}",
    "{{ lipsum(99999)|length }}",
    "{{ [messages] * 10**9 }}",
    "{{ messages|batch(10**9, 1)|list }}",
    "{{ 'ab'|replace('', 'x' * 10**7)|replace('', 'y' * 10**7) }}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    "{% if 1 %}" * 3000,
    "{{ 1" + "+1" * 20000 + " }}",
]


@pytest.mark.parametrize("template", COSTLY, ids=range(len(COSTLY)))
def test_what_costs_too_much_is_stopped(template: str) -> None:
    """The sandbox limits no cost: a 560 MB text in 0.7 s, endless loops. Ends in 2 s, and work goes on."""
    start = time.perf_counter()
    with pytest.raises(FormatError, match="chat template"):
        render_chat(template, [USER])
    assert time.perf_counter() - start < 3  # 1 s of processor time, at most 1.9 s on the clock; and a child's start
    assert render_chat("{{ messages|length }}", [USER, ANSWER]) == "2"


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_both_clocks_stop_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's own clock counts processor time, so a busy machine stops nobody; the parent's is for the rest."""
    for wall, least, most in ((30.0, 0.9, 10), (0.3, 0.25, 0.9)):
        monkeypatch.setattr(chat, "RENDERS_WITHIN", wall)
        render_chat(f"{{% if messages|length > 1 %}}{ENDLESS}{{% endif %}}{wall}", [USER])  # its child has started
        start = time.perf_counter()
        with pytest.raises(FormatError, match="takes too long"):
            render_chat(f"{{% if messages|length > 1 %}}{ENDLESS}{{% endif %}}{wall}", [USER, ANSWER])
        assert least < time.perf_counter() - start < most


def test_memory_stays_small() -> None:
    """Measured from outside, in a process whose only child is the renderer."""
    code = (
        "import resource; from lmworks.tokens.chat import render_chat, close_all\n"
        f"for template in {COSTLY[:6] + COSTLY[7:8]!r}:\n"
        "    try: render_chat(template, [{'role': 'user', 'content': 'x'}])\n"
        "    except Exception: pass\n"
        "close_all(); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80_000, "kB"


def test_the_child_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the sandbox leak, there are no secrets, files or processes to be had; and no heavy import slows it."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    chat.close_all()
    render_chat("{{ messages|length }}", [USER])
    (child,) = chat.CHILDREN.values()
    process = Path("/proc") / str(child.process.pid)
    assert b"secret" not in (process / "environ").read_bytes()
    limits = (process / "limits").read_text()
    for name in ("Max open files", "Max processes", "Max file size", "Max core file size"):
        row = next(line for line in limits.splitlines() if line.startswith(name))
        assert row[len(name) :].split()[:2] == ["0", "0"], row
    maps = (process / "maps").read_text()
    assert "numpy" not in maps
    assert "torch" not in maps


def test_a_child_is_kept_and_replaced() -> None:
    chat.close_all()
    render_chat("{{ messages|length }} a", [USER])
    (first,) = chat.CHILDREN.values()
    start = time.perf_counter()
    for _ in range(50):
        assert render_chat("{{ messages|length }} a", [USER]) == "1 a"
    assert time.perf_counter() - start < 2
    assert list(chat.CHILDREN.values()) == [first]
    first.process.kill()
    first.process.wait()
    assert render_chat("{{ messages|length }} a", [USER]) == "1 a"  # it died between two calls
    for i in range(7):
        assert render_chat(f"{{{{ messages|length }}}} {i}", [USER]) == f"1 {i}"
    assert len(chat.CHILDREN) == chat.KEPT
    with pytest.raises(FormatError):
        render_chat("{% set x = namespace(y=1) %}{{ x.y.z.w }}", [USER])
    assert len(chat.CHILDREN) == chat.KEPT  # an error ends no child


def test_no_child_outlives_its_parent(tmp_path: Path) -> None:
    code = (
        "import os; from lmworks.tokens import chat\n"
        "chat.render_chat('a', [{'role': 'user', 'content': 'x'}])\n"
        "print(next(iter(chat.CHILDREN.values())).process.pid, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pid = int(done.stdout)
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    pytest.fail("the renderer outlived its parent")


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hello", "a list of messages"),
        ({"role": "user", "content": "x"}, "a list of messages"),
        (["hello"], "no role(.|\n)*message 0"),
        ([USER, {"content": "x"}], "no role(.|\n)*message 1"),
        ([{"role": 3, "content": "x"}], "no role"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": 5}], "no content"),
        ([{"role": "user", "content": [{"text": "x"}]}], "no content"),
        ([{"role": "user", "content": "x", "image": object()}], "plain JSON"),
        ([{"role": "user", "content": "x", "n": float("nan")}], "plain JSON"),
    ],
)
def test_messages_are_checked(messages: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        render_chat(CHATML, messages)


def test_values_are_allowed_by_name() -> None:
    with pytest.raises(InputError, match=r"takes no value 'enable_thinkin'(.|\n)*enable_thinking"):
        render_chat(CHATML, [USER], enable_thinkin=True)
    for template, found in (("{% if %}", "line 1"), ("\n\n{{ x.y.z }}", "undefined"), ("{% endfor %}", "line 1")):
        with pytest.raises(FormatError, match=f"failed on these messages(.|\n)*{found}"):
            render_chat(template, [USER])
    with pytest.raises(FormatError, match="too long"):
        render_chat("x" * (chat.LONGEST + 1), [USER])
    assert json.loads(render_chat("{{ messages|tojson }}", [{"role": "tool", "content": "\ud83d"}]))  # half a character


def test_parts_and_calls_of_tools_are_contents() -> None:
    template = (
        "{% for m in messages %}{{ m.content[0].text if m.content else m.tool_calls[0].function.name }}{% endfor %}"
    )
    parts = {"role": "user", "content": [{"type": "text", "text": "hi "}]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert render_chat(template, [parts, call]) == "hi f"
