"""`doctor` on this machine, and on installations that are broken in known ways."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import torch
from huggingface_hub import scan_cache_dir
from packaging.requirements import Requirement

from lmworks.base.hub import OFFLINE
from lmworks.verbs import doctor

RUN = (
    "import json, sys; from lmworks.verbs.doctor import examine; "
    "print(json.dumps(examine().to_dict(), allow_nan=False))"
)
GUARD = "; assert not {'torch', 'torchvision', 'onnxruntime'} & set(sys.modules)"


def run(**settings: str) -> dict[str, Any]:
    """Return what doctor finds in a process with these variables, which may not import what might be broken."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    told = subprocess.run([sys.executable, "-c", RUN + GUARD], env={**kept, **settings}, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout)


def named(values: dict[str, Any], name: str) -> dict[str, str]:
    """Return the finding with this name."""
    return next(finding for finding in values["findings"] if finding["name"] == name)


def fake(folder: Path, package: str, version: str, code: str = "", requires: str = "") -> str:
    """Install a package of one line into a folder, and return the folder for PYTHONPATH."""
    facts = folder / f"{package}-{version}.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n{requires}\n")
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(code)
    return str(folder)


def test_this_machine_is_described_as_others_see_it(tmp_path: Path) -> None:
    found = run(HF_HOME=str(tmp_path), OMP_NUM_THREADS="1")
    assert found["passed"]
    assert found["versions"]["numpy"] == numpy.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert named(found, "torch")["status"] == "ok"
    assert ("no CUDA device" in named(found, "torch")["found"]) == (not torch.cuda.is_available())
    usable, total = named(found, "processors")["found"].split()[:3:2]
    assert int(total) == os.cpu_count()
    assert 1 <= int(usable) <= len(psutil.Process().cpu_affinity() or [])
    free = float(named(found, "disk here")["found"].split()[0])
    assert free == pytest.approx(psutil.disk_usage(str(Path.cwd())).free / 1e9, rel=0.05, abs=0.3)
    memory = float(named(found, "memory")["found"].split()[2])
    assert memory <= psutil.virtual_memory().total / 1e9 + 0.1
    assert {finding["status"] for finding in found["findings"]} <= {"ok", "absent", "warning", "broken"}
    assert all(finding["fix"] for finding in found["findings"] if finding["status"] in ("warning", "broken"))


def test_the_instructions_are_those_of_the_processor(tmp_path: Path) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    flags = doctor.read_flags()
    assert ("avx2" in flags) == (capability in ("AVX2", "AVX512"))
    assert doctor.read_flags(tmp_path / "absent") == set()


@pytest.mark.parametrize("code", ["raise OSError('libtorch_cpu.so: cannot open')", "import os; os._exit(3)"])
def test_a_torch_that_breaks_is_a_finding_and_exit_code_1(tmp_path: Path, code: str) -> None:
    found = run(PYTHONPATH=fake(tmp_path / "site", "torch", "9.9", code), HF_HOME=str(tmp_path))
    finding = named(found, "torch")
    assert finding["status"] == "broken"
    assert ("cannot open" in finding["found"]) or ("exit code 3" in finding["found"])
    assert not found["passed"]


def test_a_torchvision_of_another_torch_is_seen_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It breaks whatever imports it; installed beside a CPU build of torch, the one for CUDA does as well."""
    base, _, own = torch.__version__.partition("+")
    cases = {
        ("0.1+" + own if own else "0.1", "torch==" + base): ("ok", "does not use it"),
        ("0.1+cu999", "torch==" + base): ("warning", "different builds"),
        ("0.1+cpu", "torch (==1.0)"): ("warning", "built for torch 1.0"),
    }
    for i, ((version, needs), (status, says)) in enumerate(cases.items()):
        site = fake(tmp_path / str(i), "torchvision", version, "raise ImportError", f"Requires-Dist: {needs}")
        monkeypatch.syspath_prepend(site)
        (finding,) = doctor.look_at_torchvision()
        assert (finding.status, says in finding.found) == (status, True)
        assert ("pip uninstall torchvision" in finding.fix) == (status == "warning")
    assert "torchvision" not in sys.modules


def test_extras_are_judged_by_what_the_package_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = [
        "numpy>=1",
        "safetensors>=999; extra == 'old'",
        "no-such-package>=1; extra == 'hub'",
        "onnx; extra == 'fine'",
    ]
    assert all(Requirement(line) for line in asks)
    monkeypatch.syspath_prepend(
        fake(tmp_path, "lmworks", "0.0", requires="\n".join(f"Requires-Dist: {a}" for a in asks))
    )
    found = {finding.name: finding for finding in doctor.look_at_extras()}
    assert {name: finding.status for name, finding in found.items()} == {
        "core": "ok",
        "extra old": "warning",
        "extra hub": "absent",
        "extra fine": "ok",
    }
    assert found["extra hub"].fix == 'pip install "lmworks[hub]"'
    assert "safetensors" in found["extra old"].found
    facts = "Metadata-Version: 2.1\nName: lmworks\nVersion: 0.0\nRequires-Dist: no-such-package\n"
    (tmp_path / "lmworks-0.0.dist-info" / "METADATA").write_text(facts)
    assert [(finding.name, finding.status) for finding in doctor.look_at_extras()] == [("core", "broken")]


def test_the_cache_is_measured_as_huggingface_hub_measures_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blobs, one of them a link into the store that models share."""
    cache = tmp_path / "hub"
    repository, shared = cache / "models--org--name", cache / "blobs" / "ab" / "abcd"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs", shared.parent):
        folder.mkdir(parents=True)
    (repository / "blobs" / "b1").write_bytes(bytes(70_000_000))
    shared.write_bytes(bytes(30_000_000))
    (repository / "blobs" / "b2").symlink_to("../../blobs/ab/abcd")
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/b1")
    (snapshot / "model-2.safetensors").symlink_to("../../blobs/b2")
    (repository / "refs" / "main").write_text("a" * 40)
    theirs = scan_cache_dir(cache)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    told = next(doctor.look_at_cache()).found
    assert f"1 models, {theirs.size_on_disk / 1e9:.2f} GB" in told
    assert "0.10 GB" in told


def test_settings_are_told_and_secrets_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OFFLINE, "HF_HUB_CACHE", "HF_TOKEN_PATH", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secretsecret@127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setenv("LMWORKS_THREADS", "1")
    network, token = doctor.look_at_settings()
    assert "127.0.0.1:9" in network.found
    assert (token.status, token.found) == ("ok", "from HF_TOKEN")
    cache = next(doctor.look_at_cache())
    assert (cache.status, "HF_HOME" in cache.fix) == ("warning", True)
    assert "1 of " in next(doctor.look_at_processors()).found
    assert "LMWORKS_THREADS=1" in next(doctor.look_at_processors()).found
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    assert [finding.status for finding in doctor.look_at_settings()] == ["ok", "absent"]
    (tmp_path / "token").write_text("hf_secretsecret")
    offline, file = doctor.look_at_settings()
    assert "TRANSFORMERS_OFFLINE forbids" in offline.found
    assert file.found == "from a file"
    assert "secretsecret" not in str([network, token, offline, file])
    monkeypatch.setenv("LMWORKS_NODE", "/absent/node")
    node = next(doctor.look_at_javascript())
    assert (node.status, "LMWORKS_NODE" in node.fix) == ("absent", True)


def test_exit_code_and_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lmworks.cli.hub import doctor as verb

    monkeypatch.setattr(doctor, "look_at_packages", list)
    assert verb(json=True) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    monkeypatch.setattr(doctor, "look_at_packages", lambda: [doctor.Finding("torch", "broken", "no", "mend it")])
    assert verb() == 1
    assert "torch: mend it" in capsys.readouterr().out
