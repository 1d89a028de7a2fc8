"""Run `lmworks` and `python` in forks of a process that has imported the heavy libraries already.

A page has dozens of commands, and a fresh interpreter takes seconds to import torch: this one takes none. It starts no
thread before it forks. Client: one JSON object {"program", "arguments", "place", "environment"} with the file
descriptors 0, 1, 2; then it waits for one byte, the exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
from typing import Any

CLIENT = """#!{python} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
asked = {{"program": {program!r}, "arguments": sys.argv[1:], "place": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(connection, [b"f"], [0, 1, 2])
connection.sendall(json.dumps(asked).encode())
connection.shutdown(socket.SHUT_WR)
sys.exit((connection.recv(1) or b"\\x01")[0])
"""


def serve(address: str) -> None:
    """Answer until the process is ended."""
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401
    import torch  # noqa: F401

    import lmworks.cli.finetune
    import lmworks.cli.tasks
    import lmworks.export.graph
    import lmworks.verbs.finetuning  # noqa: F401

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the forks that wait are nobody's zombies
    while True:
        connection, _ = listening.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            answer(connection)
            os._exit(0)
        connection.close()


def answer(connection: socket.socket) -> None:
    """Run one command in a fork, and tell its exit code."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
    text = b""
    while part := connection.recv(1 << 16):
        text += part
    child = os.fork()
    if child == 0:
        connection.close()
        for to, descriptor in enumerate(descriptors):
            os.dup2(descriptor, to)
            os.close(descriptor)
        code = 1
        try:
            code = run(**json.loads(text))
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(bytes([code if 0 <= code < 256 else 1]))


def run(program: str, arguments: list[str], place: str, environment: dict[str, str]) -> int:
    """Be that program; return its exit code."""
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    for name in ("stdin", "stdout", "stderr"):  # those that Python opened belong to the server
        number = ("stdin", "stdout", "stderr").index(name)
        setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    try:
        if program == "lmworks":
            from lmworks.cli import main

            sys.argv = [program, *arguments]
            return main(arguments)
        python(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def python(arguments: list[str]) -> None:
    """Run what `python ARGUMENTS` would."""
    first, rest = (arguments or ["-"])[0], arguments[1:]
    sys.path.insert(0, "")
    space: dict[str, Any] = {"__name__": "__main__"}
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first in ("-c", "-"):
        sys.argv = [first, *rest]
        exec(compile(rest[0] if first == "-c" else sys.stdin.read(), "<page>", "exec"), space)
    else:
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
