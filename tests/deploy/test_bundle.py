"""Bundles for machines without a network: sums that catch a byte, and an installation in a network without routes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lmworks
from lmworks.base.errors import InputError
from lmworks.cli import main
from lmworks.verbs import packing
from lmworks.verbs.packing import SUMS, fetch, pack


@pytest.fixture(scope="module")
def packed(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without others' wheels, which would be fetched."""
    out = tmp_path_factory.mktemp("packed") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "fetch", lambda *_: None)
        pack(graphs, out, dtype="int8", name="intents")
    return out


@pytest.fixture
def bundle(packed: Path, tmp_path: Path) -> Path:
    """A copy of it to be broken."""
    return Path(shutil.copytree(packed, tmp_path / "bundle"))


def install(bundle: Path, target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([bundle / "install.sh", target], capture_output=True, text=True, check=False)


def test_the_sums_cover_every_file(bundle: Path) -> None:
    lines = dict(reversed(line.split("  ")) for line in (bundle / SUMS).read_text().splitlines())
    held = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(lines) == held - {SUMS, "lmworks.json"}
    for name, known in lines.items():
        assert hashlib.sha256((bundle / name).read_bytes()).hexdigest() == known
    unit = (bundle / "lmworks.service").read_text()
    assert "ExecStart=/opt/intents/environment/bin/lmworks serve /opt/intents/models/intents --port 8000" in unit
    assert "$" not in unit


@pytest.mark.parametrize("name", ["model/onnx/model_quantized.onnx", "install.sh", "model/config.json"])
def test_a_changed_byte_is_caught_before_anything_is_installed(bundle: Path, tmp_path: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[-2] ^= 1 if name != "install.sh" else 0
    (bundle / name).write_bytes(bytes(data) + (b"\n# more\n" if name == "install.sh" else b""))
    done = install(bundle, tmp_path / "opt")
    assert done.returncode == 2 and "the bundle is damaged" in done.stderr
    assert not list(tmp_path.glob("opt*"))


@pytest.mark.parametrize("name", ["wheels/zz_extra-1.0-py3-none-any.whl", "model/extra.py", "wheels/a link.whl"])
def test_what_the_sums_do_not_list_is_not_installed(bundle: Path, tmp_path: Path, name: str) -> None:
    [wheel] = (bundle / "wheels").iterdir()
    if "link" in name:
        (bundle / name).symlink_to(shutil.copy(wheel, tmp_path / "other-1.0-py3-none-any.whl"))
    else:
        shutil.copy(wheel, bundle / name)
    done = install(bundle, tmp_path / "opt")
    assert done.returncode == 2 and "other files than SHA256SUMS lists" in done.stderr
    assert not list(tmp_path.glob("opt*"))


PYTHON = """#!/bin/sh
[ "$2" != venv ] || { mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo ok > "$3/package.py"; }
"""


def test_it_is_installed_for_everybody_and_where_it_was_told(bundle: Path, tmp_path: Path) -> None:
    """Under a mask that hides, from a copy that hides; a relative folder is the caller's. Python is a stand-in."""
    stub = tmp_path / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    stub.parent.mkdir()
    stub.write_text(PYTHON)
    stub.chmod(0o755)
    for path in [bundle, *bundle.rglob("*")]:
        path.chmod(0o700 if path.is_dir() or path.suffix == ".sh" else 0o600)
    (tmp_path / "here").mkdir()
    words, env = ["sh", "-c", 'umask 077; exec "$0" "$1"'], {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    done = subprocess.run([*words, bundle / "install.sh", "opt"], cwd=tmp_path / "here", env=env, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    opt = tmp_path / "here" / "opt"
    assert f"lmworks serve {opt}/models/intents" in done.stdout and (opt / "environment/package.py").is_file()
    hidden = [path for path in [opt, *opt.rglob("*")] if (path.stat().st_mode & 0o044) != 0o044
              or (path.is_dir() and path.stat().st_mode & 0o011 != 0o011)]  # fmt: skip
    assert not hidden


def test_what_cannot_be_installed_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "is there already" in install(bundle, tmp_path / "there").stderr
    [wheel] = (bundle / "wheels").iterdir()
    sums = (bundle / SUMS).read_text()
    known = hashlib.sha256(wheel.read_bytes()).hexdigest()
    wheel.write_bytes(b"no wheel")
    (bundle / SUMS).write_text(sums.replace(known, hashlib.sha256(b"no wheel").hexdigest()))
    done = install(bundle, tmp_path / "opt")
    assert done.returncode != 0 and "damaged" not in done.stderr and "wheel" in done.stderr
    assert not list(tmp_path.glob("opt*"))


def test_what_cannot_be_packed_is_told(graphs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no wheels for this machine"):
        pack(graphs, tmp_path / "out", machine="riscv64")
    with pytest.raises(InputError, match="does not run on this Python"):
        pack(graphs, tmp_path / "out", python="3.9")
    (tmp_path / "wheels").mkdir()
    with pytest.raises(InputError, match="could not be fetched"):
        fetch(["no-such-package-of-lmworks==1"], tmp_path / "wheels", "x86_64", "3.11")
    assert not (tmp_path / "out").exists()


SERVE = """
import fcntl, json, socket, struct, subprocess, sys, time, urllib.request
with socket.socket() as lo:  # a new network namespace has a loopback interface that is down
    fcntl.ioctl(lo, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))
try:
    socket.create_connection(("192.0.2.1", 80), 1)
    raise SystemExit("there is a network")
except OSError as error:
    assert "unreachable" in str(error), error
server = subprocess.Popen([sys.argv[1] + "/environment/bin/lmworks", "serve", sys.argv[1] + "/models/intents"])
try:
    for _ in range(600):
        try:
            urllib.request.urlopen("http://127.0.0.1:8000/health/ready")
            break
        except OSError:
            time.sleep(0.1)
    body = json.dumps({"input_text": "a gorgeous, witty, seductive movie"}).encode()
    asked = urllib.request.Request("http://127.0.0.1:8000/predict", body, {"content-type": "application/json"})
    print(urllib.request.urlopen(asked).read().decode())
finally:
    server.terminate()
    code = server.wait(40)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_bundle_installs_and_serves_without_a_network(graphs: Path, tmp_path: Path) -> None:
    """Everything comes from the bundle: the namespace has no route, and Python outside it is not asked."""
    assert os.geteuid() == 0, "a network namespace needs root"
    assert main(["pack", str(graphs), "-o", str(tmp_path / "bundle"), "--name", "intents"]) == 0
    clean = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path), "LMWORKS_CACHE": str(tmp_path / "cache")}
    started = time.monotonic()
    subprocess.run(["unshare", "--net", tmp_path / "bundle" / "install.sh", tmp_path / "opt"], env=clean, check=True)
    print(f"installed in {time.monotonic() - started:.1f} s")
    done = subprocess.run(["unshare", "--net", sys.executable, "-I", "-c", SERVE, tmp_path / "opt"], env=clean,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    known = json.loads(done.stdout.splitlines()[-1])
    [[best, *_]] = lmworks.predict(graphs, ["a gorgeous, witty, seductive movie"], runtime="onnx", dtype="fp32")
    assert known["prediction"] == best.label and known["model"] == "intents"
    packages = {path.name.partition("-")[0] for path in (tmp_path / "opt").rglob("*.dist-info")}
    assert "onnxruntime" in packages and "torch" not in packages
