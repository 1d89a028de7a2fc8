"""The page as files: what is written, what is served, what is vendored."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny_page import copy_folder, facts, made_folder

from lmworks.base.errors import FormatError, InputError
from lmworks.export import vendor as vendor_module
from lmworks.export import web
from lmworks.export.receipt import write_receipt

ROOT = Path(__file__).parents[2]


def test_every_file_that_the_page_loads_is_there_with_its_hash() -> None:
    """C15: nothing comes from elsewhere, so all must be here; C10: under the names that transformers.js reads."""
    folder = made_folder()
    page = json.loads((folder / "web" / "page.json").read_text())
    for name, known in page["files"].items():
        data = (folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (known["bytes"], known["sha256"]), name
    assert {
        "onnx/model.onnx",
        "onnx/model_quantized.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
    } <= set(page["files"])
    for variant in ("", ".jspi"):
        for suffix in ("mjs", "wasm"):
            assert f"web/vendor/ort-wasm-simd-threaded{variant}.{suffix}" in page["files"]
    assert page["dtypes"]["int8"]["bytes"] == (folder / "onnx/model_quantized.onnx").stat().st_size
    html = (folder / "index.html").read_text()
    for name in re.findall(r'(?:src|href)="([^"#]+)"', html):
        assert (folder / name.split("?")[0]).is_file(), name
    worker = (folder / "sw.js").read_text()
    assert "{{" not in worker
    assert all(f'"{name}"' in worker for name in web.SCRIPTS), "all of the page works without a connection"
    for name in web.SCRIPTS:  # every module that one imports is there, by an address with the page's version
        for imported in re.findall(r"import\([\"'`](\.[^\"'`]+)", (folder / "web" / name).read_text()):
            assert imported.endswith(".js${version}"), f"{name}: {imported}"
            assert (folder / "web" / imported.removesuffix("${version}")).is_file(), f"{name}: {imported}"


def test_no_asset_names_another_host() -> None:
    """C15: still needs the internet."""
    for path in [
        *web.ASSETS.glob("*.js"),
        *web.ASSETS.glob("*.css"),
        *web.ASSETS.glob("*.html"),
        web.ASSETS / "icon.svg",
    ]:
        found = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", path.read_text()))
        assert found <= {"http://www.w3.org"}, f"{path.name}: {found}"


def test_the_page_shows_the_run_and_nothing_of_the_machine() -> None:
    page = json.loads((made_folder() / "web" / "page.json").read_text())
    rows = dict(page["rows"])
    assert rows["Parameters"] == "81,920"
    assert rows["Perplexity per token"] == "3.25"
    assert rows["Context"] == "96 tokens"
    assert page["bars"]["rows"] == [["this network", 0.5], ["5-gram, Kneser-Ney", 0.75]], "None is left out"
    assert "secret" not in json.dumps(page), "the output folder is nobody's business"
    html = (made_folder() / "index.html").read_text()
    assert "<title>Birds &amp; foxes</title>" in html
    assert "{{" not in html
    assert json.loads((made_folder() / "web" / "app.webmanifest").read_text())["name"] == "Birds & foxes"


def test_the_page_of_a_task_knows_its_labels_options_and_examples(tmp_path: Path) -> None:
    folder = copy_folder(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": {"1": "good", "0": "bad"}}))
    items = [{"input": {"text": text}} for text in ("A film.", " ", "A film.", "Another film. " * 200, "🙂 Yes.")]
    task = {"task": "text-classification", "options": {"long": "window"}, "items": items}
    page = web.page_data(folder, web.find_graphs(folder), {"parameters": 81_920}, task)
    assert (page["task"], page["options"]) == ("text-classification", {"long": "window"})
    assert page["labels"] == ["bad", "good"]
    assert page["examples"] == [{"text": "A film."}, {"text": "🙂 Yes."}]
    assert page["summary"].startswith("A classifier of texts, 81,920 parameters.")
    assert "mask" not in page
    made = json.loads((made_folder() / "web" / "page.json").read_text())
    assert (made["task"], made["options"], "labels" in made) == ("text-generation", {}, False)


def test_weights_beside_a_graph_belong_to_their_precision(tmp_path: Path) -> None:
    folder = copy_folder(tmp_path / "model")
    names = ["onnx/model.onnx_data", "onnx/model.onnx_data_1", "onnx/model.onnx_data_10", "onnx/model.onnx_data_2"]
    for name in names:
        (folder / name).write_bytes(b"12345")
    selftest = json.loads((folder / "selftest.json").read_text())
    web.write_page(folder, title="x", facts={}, selftest=selftest)
    page = json.loads((folder / "web" / "page.json").read_text())
    files = ["onnx/model.onnx", names[0], names[1], names[3], names[2]]
    assert page["dtypes"]["fp32"]["files"] == files
    assert page["dtypes"]["fp32"]["bytes"] == (folder / files[0]).stat().st_size + 20
    assert set(files) <= set(page["files"])
    assert page["dtypes"]["int8"]["files"] == ["onnx/model_quantized.onnx"]


def test_a_model_that_no_browser_can_hold_is_refused_with_sizes_and_the_fix(tmp_path: Path, monkeypatch) -> None:
    web.check_sizes({"fp32": web.LARGEST, "int8": 1})
    with pytest.raises(InputError, match="too large for a browser") as caught:
        web.check_sizes({"fp32": 4_400_000_000, "fp16": 2_200_000_000, "int8": 1_100_000_000})
    assert caught.value.found == "fp32 of 4.40 GB, fp16 of 2.20 GB"
    assert caught.value.fix == "export with --dtype int8"
    folder = copy_folder(tmp_path / "model")
    before = (folder / "web" / "page.json").read_bytes()
    monkeypatch.setattr(web, "LARGEST", 1000)
    with pytest.raises(InputError, match="too large for a browser"):
        web.write_page(folder, title="x", facts={}, selftest={})
    assert (folder / "web" / "page.json").read_bytes() == before, "the page that was there stays"


def test_the_page_works_without_any_fact(tmp_path: Path) -> None:
    folder = copy_folder(tmp_path / "model")
    selftest = json.loads((folder / "selftest.json").read_text())
    web.write_page(folder, title="<x>", facts={}, selftest=selftest)
    page = json.loads((folder / "web" / "page.json").read_text())
    assert page["bars"]["rows"] == []
    assert dict(page["rows"])["Architecture"] == "llama, 2 layers, 64 wide"
    assert "&lt;x&gt;" in (folder / "index.html").read_text()


@pytest.mark.parametrize("name", ["selftest", "facts", "app.js", "worker.js"])
def test_the_version_in_every_address_follows_the_content(name: str, tmp_path: Path, monkeypatch) -> None:
    """A cache that holds yesterday's page must not meet today's model."""
    folder = copy_folder(tmp_path / "model")
    selftest = json.loads((folder / "selftest.json").read_text())
    values = facts()
    before = re.findall(r"v=(\w{16})", (folder / "index.html").read_text())
    web.write_page(folder, title="Birds & foxes", facts=values, selftest=selftest)
    assert re.findall(r"v=(\w{16})", (folder / "index.html").read_text()) == before, (
        "the same content, the same version"
    )
    if name == "selftest":
        selftest["prompts"][0]["tokens"][0] += 1
    elif name == "facts":
        values["perplexity"] = 3.5
    else:
        assets = tmp_path / "assets"
        shutil.copytree(web.ASSETS, assets, ignore=shutil.ignore_patterns("node_modules"))
        (assets / name).write_text((assets / name).read_text() + "\n// changed\n")
        monkeypatch.setattr(web, "ASSETS", assets)
    web.write_page(folder, title="Birds & foxes", facts=values, selftest=selftest)
    after = re.findall(r"v=(\w{16})", (folder / "index.html").read_text())
    assert len(set(after)) == 1
    assert set(after) != set(before)


def test_without_the_library_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(web, "ASSETS", tmp_path)
    with pytest.raises(InputError, match=r"JavaScript library is not installed") as caught:
        web.write_page(made_folder(), title="x", facts={}, selftest={})
    assert "lmworks.export.vendor" in caught.value.fix


def test_without_a_graph_there_is_no_page(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="no ONNX graph"):
        web.write_page(tmp_path, title="x", facts={}, selftest={})
    assert not (tmp_path / "web").exists()


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "web/../../secret.txt",
        "/../secret.txt",
        "web/..\\..\\secret.txt",
        "training/metrics.jsonl",
        "//training/metrics.jsonl",
        "./training/metrics.jsonl",
        "web",
        "web/",
        "onnx",
        ".hidden",
        "web/.hidden",
        "link.txt",
        "linked/secret.txt",
        "index.html/",
        "web/page.json\0.txt",
        "nothing",
    ],
)
def test_nothing_but_the_files_of_the_page_is_served(path: str, tmp_path: Path) -> None:
    folder = copy_folder(tmp_path / "model")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / ".hidden").write_text("secret")
    (folder / "web" / ".hidden").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "linked").symlink_to(tmp_path)
    assert web.find_served(folder, path) is None


def test_the_files_of_the_page_are_served() -> None:
    """C17: threads need COOP and COEP; a browser compiles only what comes as application/wasm while it arrives."""
    folder = made_folder()
    for path in ("", "/", "index.html", "/web/app.js", "onnx/model.onnx", "certificate.json"[:0] + "selftest.json"):
        found = web.find_served(folder, path)
        assert found is not None and found.is_file(), path
    headers = web.headers_for(folder / "web/vendor/ort-wasm-simd-threaded.wasm", versioned=True)
    assert headers["Content-Type"] == "application/wasm"
    assert "immutable" in headers["Cache-Control"]
    headers = web.headers_for(folder / "web/vendor/ort-wasm-simd-threaded.mjs", versioned=False)
    assert headers["Content-Type"].startswith("text/javascript")
    assert headers["Cache-Control"] == "no-cache"
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"


STREAM = """
import { Engine } from %s;
const text = %s;
const bytes = new TextEncoder().encode(text);
const model = {
  config: { max_position_embeddings: 1000 },
  generate: async ({ streamer }) => {
    streamer.put([[7n]]);
    for (const byte of bytes) streamer.put([[BigInt(byte)]]);
    streamer.end();
  },
};
class Tensor {}
const pieces = [];
const engine = new Engine({ Tensor }, null, model);
engine.decode = %s;
const done = await engine.generate([7], { tokens: bytes.length, onText: (piece) => pieces.push(piece) });
process.stdout.write(JSON.stringify({ pieces, tokens: done.tokens.length, reason: done.reason }));
"""


READ = "(ids) => new TextDecoder().decode(Uint8Array.from(ids))"
FALL_BACK = """(ids) => {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(Uint8Array.from(ids)).replace(/^ /, "");
  } catch {
    return ids.map(() => "\\ufffd").join(""); // a run of byte tokens is all or nothing
  }
}"""


@pytest.mark.node
@pytest.mark.parametrize("decode", [READ, FALL_BACK], ids=["byte level", "byte fallback"])
@pytest.mark.parametrize("text", ["plain", "naïve café", " ☕ and 🦊🦊, 日本", "é", "🦊"])
def test_a_stream_of_single_bytes_gives_whole_characters(text: str, decode: str) -> None:
    """A token may hold a part of a character; the page shows it once it is whole, and a space after the prompt too."""
    script = STREAM % (json.dumps((web.ASSETS / "engine.js").as_uri()), json.dumps(text), decode)
    command = ["node", "--input-type=module", "--eval", script]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert "".join(answer["pieces"]) == text
    assert not [piece for piece in answer["pieces"] if "\ufffd" in piece]
    assert [piece for piece in answer["pieces"] if piece] == list(text)
    assert answer["tokens"] == len(text.encode())
    assert answer["reason"] == "length"


# -- vendoring -------------------------------------------------------------------------------------------------------


def test_the_lock_pins_every_package_and_names_no_registry() -> None:
    text = (web.ASSETS / "package-lock.json").read_text()
    packages = json.loads(text)["packages"]
    wanted = json.loads((web.ASSETS / "package.json").read_text())["dependencies"]
    for name, version in wanted.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), f"{name} is not pinned"
        assert packages[f"node_modules/{name}"]["version"] == version
    assert all(entry["integrity"].startswith("sha512-") for name, entry in packages.items() if name)
    assert '"resolved"' not in text


def test_what_is_vendored_is_what_the_lock_pins() -> None:
    folder = web.find_vendor()
    record = json.loads((folder / "vendor.json").read_text())
    for package in (vendor_module.LIBRARY, vendor_module.RUNTIME):
        assert record["versions"][package] == vendor_module.pinned_version(web.ASSETS, package)
    version = record["versions"][vendor_module.LIBRARY]
    assert f'"{version}"' in (folder / "transformers.min.js").read_text()
    assert "Apache License" in (folder / "LICENSE.transformers.js.txt").read_text()
    assert "Microsoft Corporation" in (folder / "LICENSE.onnxruntime-web.txt").read_text()
    assert "MIT" in (folder / "NOTICE.txt").read_text()


def fake_web(tmp_path: Path) -> Path:
    """Return a web folder with a tiny node_modules."""
    folder = tmp_path / "web"
    (folder / "licenses").mkdir(parents=True)
    (folder / "licenses" / "NOTICE.txt").write_text("notice")
    packages = {f"node_modules/{name}": {"version": "1.0.0"} for name in (vendor_module.LIBRARY, vendor_module.RUNTIME)}
    (folder / "package-lock.json").write_text(json.dumps({"packages": packages}))
    for name in (vendor_module.LIBRARY, vendor_module.RUNTIME):
        place = folder / "node_modules" / name
        (place / "dist").mkdir(parents=True)
        (place / "package.json").write_text('{"version": "1.0.0"}')
        (place / "LICENSE").write_text("licence")
        for file in (
            "transformers.min.js",
            *(f"ort-wasm-simd-threaded{v}.{s}" for v in ("", ".jspi") for s in ("mjs", "wasm")),
        ):
            (place / "dist" / file).write_text(file)
    return folder


def test_vendoring_copies_once_and_repairs_damage(tmp_path: Path) -> None:
    folder = fake_web(tmp_path)
    target = vendor_module.vendor(folder)
    wasm = target / "ort-wasm-simd-threaded.jspi.wasm"
    assert wasm.read_text() == wasm.name
    shutil.rmtree(folder / "node_modules")
    vendor_module.vendor(folder)  # up to date: needs neither node_modules nor npm
    wasm.write_text("damaged")
    shutil.copytree(fake_web(tmp_path / "again") / "node_modules", folder / "node_modules")
    vendor_module.vendor(folder)
    assert wasm.read_text() == wasm.name


def test_without_npm_vendoring_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = fake_web(tmp_path)
    shutil.rmtree(folder / "node_modules")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["vendor"])
    assert vendor_module.main(folder) == 2
    assert "npm was not found" in capsys.readouterr().err
    assert not (folder / "vendor").exists()


def test_the_wheel_carries_the_page(tmp_path: Path) -> None:
    """A package that was installed from a wheel writes pages without npm."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    place = "lmworks/export/web/"
    for name in [
        *web.SCRIPTS,
        "sw.js",
        "single.js",
        "index.html",
        "app.webmanifest",
        "package.json",
        "package-lock.json",
    ]:
        assert place + name in names, name
    for path in web.find_vendor().iterdir():
        assert f"{place}vendor/{path.name}" in names, path.name
    assert "lmworks/export/verify_node.mjs" in names
    assert "lmworks/export/check.html" in names
    assert not [name for name in names if "node_modules" in name]


def test_the_receipt_covers_the_page(tmp_path: Path) -> None:
    folder = copy_folder(tmp_path / "model")
    listed = write_receipt(folder, {})["files"]
    assert {"index.html", "sw.js", "web/app.js", "web/page.json", "web/vendor/transformers.min.js"} <= listed.keys()
    assert not [name for name in listed if name.startswith("training")]
