"""The shape of the package, enforced: layers, the torch-free rule, file sizes, public names, the option list."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lmworks

ROOT = Path(lmworks.__file__).parent
LAYERS = [
    {"base"},
    {"text"},
    {"tokens"},
    {"models"},
    {"tasks"},
    {"runtime"},
    {"evaluation"},
    {"compress"},
    {"training"},
    {"interpret", "audit"},
    {"export"},
    {"serve"},
    {"deploy"},
    {"studies", "scaffold"},
    {"settings", "corpus", "ngram_folder", "cleaning"},
    {"cleaning_split", "cleaning_stats", "cleaning_augment"},
    {"ngrams"},
    {"run"},
    {"estimate", "summary", "finetune_data", "evaluating", "feedback"},
    {"few_shot", "converting"},
    {"publish", "tuning_report"},
    {"masked_run"},
    {"finetune_folder"},
    {"finetune_tasks"},
    {"tokenizing", "tokenizing_compare", "tokenizing_extend"},
    {"inspection", "doctor", "finetuning"},
    {"comparing_runs"},
    {"comparing"},
    {"compress_trial", "compress_knobs"},
    {"monitoring_report"},
    {"monitoring", "monitoring_check"},
    {"challenging", "retraining_trigger"},
    {"retraining"},
    {"compressing"},
    {"compress_budget"},
    {"search_space"},
    {"search_study"},
    {"search_report"},
    {"search_plan"},
    {"searching"},
    {"deploying", "load_comparing"},
    {"packing"},
    {"distilling"},
    {"api"},
    {"cli"},
    {"__main__"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(ROOT.rglob("*.py"))
TORCH_FREE = ("base/", "text/", "tokens/", "tasks/", "runtime/", "evaluation/", "serve/", "cli/")
TORCH_FREE_FILES = (
    "models/config.py", "models/ngram.py", "models/ngram_counts.py", "models/ngram_smoothing.py",
    "models/ngram_arpa.py", "models/ngram_prune.py", "__init__.py",
)  # fmt: skip
WITH_TORCH = ("runtime/torch_runtime.py",)
LAZY_ONLY = ("torch", "onnx", "onnxruntime", "tokenizers", "fastapi", "uvicorn", "transformers")
ORACLES = {"transformers", "peft", "optimum", "nltk", "openai", "playwright", "seqeval", "torchvision", "accelerate"}
LONGEST, LONGEST_FAMILY, BUDGET = 350, 80, 54_500


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Return the dotted modules a file imports, anywhere or only when it is imported itself."""
    tree = ast.parse(path.read_text())
    nodes: list[ast.AST] = []

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if top_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            nodes.append(child)
            walk(child)

    walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("lmworks")}
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer_of(path: Path) -> str:
    return layer([part.removesuffix(".py") for part in path.relative_to(ROOT).parts])


def layer(parts: list[str]) -> str:
    """Return the folder, or the module where it stands in the package itself or among the verbs."""
    return parts[1] if parts[0] == "verbs" and len(parts) > 1 else parts[0]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_module_imports_only_from_lower_layers_and_its_own_folder(path: Path) -> None:
    own = layer_of(path)
    if own == "__init__":  # of the package, and of the verbs
        return
    assert own in RANK, f"{relative(path)}: a new folder needs its place in LAYERS"
    for module in imports(path):
        parts = module.split(".")
        if parts[0] != "lmworks" or parts[1:] in ([], ["__version__"], ["verbs"]):
            continue
        other = layer(parts[1:])
        assert other in RANK, f"{relative(path)} imports {module}"
        assert other == own or RANK[other] < RANK[own], f"{relative(path)} (layer {own}) imports {module}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_torch_and_oracles_stay_out(path: Path) -> None:
    """C38: a server or a script that runs an exported model installs no torch."""
    names = {module.split(".")[0] for module in imports(path)}
    assert not names & ORACLES, f"{relative(path)} imports a test oracle"
    name = relative(path)
    free = (name.startswith(TORCH_FREE) or name in TORCH_FREE_FILES) and name not in WITH_TORCH
    if free:
        top = {module.split(".")[0] for module in imports(path, top_level=True)}
        assert "torch" not in top, f"{name} must import torch only inside a function that a user asks for"
    if name.startswith(("base/", "text/", "tokens/", "evaluation/", "serve/")) or name in TORCH_FREE_FILES:
        assert "torch" not in names, f"{name} must not import torch at all"


@pytest.mark.parametrize(
    "path", [p for p in FILES if layer_of(p) in {"cli", "api", "__init__", "settings"}], ids=relative
)
def test_the_command_line_imports_heavy_packages_only_when_called(path: Path) -> None:
    """C37: slow import."""
    top = {module.split(".")[0] for module in imports(path, top_level=True)}
    assert not top & set(LAZY_ONLY), f"{relative(path)} imports {top & set(LAZY_ONLY)} at module level"


def test_files_stay_short_and_well_named() -> None:
    for path in FILES:
        lines = len(path.read_text().splitlines())
        limit = LONGEST_FAMILY if "families" in path.parts and path.name != "__init__.py" else LONGEST
        assert lines <= limit, f"{relative(path)} has {lines} lines; the limit is {limit}"
        assert path.stem not in {"utils", "util", "common", "helpers", "misc", "manager"}, relative(path)
    total = sum(len(path.read_text().splitlines()) for path in FILES)
    assert total <= BUDGET, f"the package has {total} lines; the budget is {BUDGET}"


def test_public_names_are_pinned() -> None:
    assert sorted(lmworks.__all__) == [
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForImageClassification",
        "AutoModelForMaskedLM",
        "AutoModelForMultipleChoice",
        "AutoModelForNextSentencePrediction",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "InputError",
        "LmworksError",
        "Report",
        "Tokenizer",
        "build",
        "clean",
        "distill",
        "evaluate",
        "finetune",
        "generate",
        "load",
        "predict",
        "search",
        "split",
        "stats",
        "train",
        "tune",
        "verify",
    ]
    for name in lmworks.__all__:
        assert getattr(lmworks, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        lmworks.nothing  # noqa: B018


def test_importing_lmworks_loads_nothing_heavy() -> None:
    """C37: slow import."""
    code = "import lmworks, sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert not set(loaded) & {*LAZY_ONLY, "numpy", "pydantic", "cyclopts", "rich"}


@pytest.mark.parametrize("path", sorted((ROOT.parents[1] / "tests").rglob("test_*.py")), ids=lambda p: p.name)
def test_no_test_hides(path: Path) -> None:
    """Every test file holds a test, and none is skipped by hand or expected to fail."""
    text = path.read_text()
    assert "def test_" in text
    assert "mark." + "skip" not in text
    assert "x" + "fail(" not in text
