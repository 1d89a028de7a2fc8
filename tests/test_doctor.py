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

from lmworks import doctor

RUN = "import json, sys; from lmworks.doctor import examine; print(json.dumps(examine().to_dict(), allow_nan=False))"
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


def test_a_torchvision_of_another_torch_is_seen_without_importing_it(tmp_path: Path) -> None:
    """It breaks whatever imports it; installed beside a CPU build of torch, the one for CUDA does as well."""
    raises, base = "raise ImportError", torch.__version__.partition("+")[0]
    other = fake(tmp_path / "a", "torchvision", "0.1+cpu", raises, "Requires-Dist: torch (==1.0)")
    finding = named(run(PYTHONPATH=other), "torchvision")
    assert finding["status"] == "warning"
    assert "built for torch 1.0" in finding["found"]
    assert "pip uninstall torchvision" in finding["fix"]
    build = fake(tmp_path / "b", "torchvision", "0.1+cu999", raises, f"Requires-Dist: torch=={base}")
    assert "different builds" in named(run(PYTHONPATH=build), "torchvision")["found"]
    own = torch.__version__.partition("+")[2]
    good = fake(tmp_path / "c", "torchvision", f"0.1+{own}" if own else "0.1", raises, f"Requires-Dist: torch=={base}")
    assert named(run(PYTHONPATH=good), "torchvision")["status"] == "ok"


def test_extras_are_judged_by_what_the_package_asks_for(tmp_path: Path) -> None:
    asks = [
        "numpy>=1",
        "safetensors>=999; extra == 'old'",
        "no-such-package>=1; extra == 'hub'",
        "onnx; extra == 'fine'",
    ]
    assert all(Requirement(line) for line in asks)
    site = fake(tmp_path, "lmworks", "0.0", requires="\n".join(f"Requires-Dist: {line}" for line in asks))
    (tmp_path / "lmworks" / "__init__.py").unlink()  # the package itself stays ours
    (tmp_path / "lmworks").rmdir()
    found = run(PYTHONPATH=site)
    assert found["passed"]
    assert named(found, "core")["status"] == named(found, "extra fine")["status"] == "ok"
    assert named(found, "extra hub")["status"] == "absent"
    assert named(found, "extra hub")["fix"] == 'pip install "lmworks[hub]"'
    assert named(found, "extra old")["status"] == "warning"
    assert "safetensors" in named(found, "extra old")["found"]
    (tmp_path / "lmworks-0.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: lmworks\nVersion: 0.0\nRequires-Dist: no-such-package\n"
    )
    found = run(PYTHONPATH=site)
    assert named(found, "core")["status"] == "broken"
    assert not found["passed"]


def test_the_cache_is_measured_as_huggingface_hub_measures_it(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "blobs" / "b1").write_bytes(bytes(70_000_000))
    (snapshot / "model.safetensors").symlink_to("../../blobs/b1")
    (repository / "refs" / "main").write_text("a" * 40)
    theirs = scan_cache_dir(tmp_path / "hub")
    assert f"1 models, {theirs.size_on_disk / 1e9:.2f} GB" in named(run(HF_HOME=str(tmp_path)), "cache")["found"]


def test_settings_are_told_and_secrets_are_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = run(
        HF_TOKEN="hf_secretsecret",
        HF_ENDPOINT="http://me:secretsecret@127.0.0.1:9",
        HF_HOME=str(tmp_path / "file" / "home"),
        LMWORKS_THREADS="1",
    )
    assert "secretsecret" not in json.dumps(told)
    assert named(told, "token")["found"] == "from HF_TOKEN"
    assert "127.0.0.1:9" in named(told, "network")["found"]
    assert named(told, "cache")["status"] == "warning"
    assert "HF_HOME" in named(told, "cache")["fix"]
    assert "LMWORKS_THREADS=1" in named(told, "processors")["found"]
    (tmp_path / "token").write_text("hf_secretsecret")
    told = run(HF_HOME=str(tmp_path), TRANSFORMERS_OFFLINE="1", LMWORKS_NODE="/absent/node")
    assert named(told, "token")["found"] == "from a file"
    assert "TRANSFORMERS_OFFLINE forbids" in named(told, "network")["found"]
    assert "secretsecret" not in json.dumps(told)
    assert named(told, "node")["status"] == "absent"
    assert "LMWORKS_NODE" in named(told, "node")["fix"]


def test_exit_code_and_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lmworks.cli.hub import doctor as verb

    monkeypatch.setattr(doctor, "look_at_packages", list)
    assert verb(json=True) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    monkeypatch.setattr(doctor, "look_at_packages", lambda: [doctor.Finding("torch", "broken", "no", "mend it")])
    assert verb() == 1
    assert "torch: mend it" in capsys.readouterr().out
