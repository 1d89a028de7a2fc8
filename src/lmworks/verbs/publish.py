"""From a trained model folder to one that runs everywhere: graphs, page, self-test, receipt, certificate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmworks.base.files import read_json, write_json
from lmworks.verbs.run import Trained, make_prompts
from lmworks.verbs.summary import facts, make_values

if TYPE_CHECKING:
    from lmworks.base.report import Report

PROMPTS, TOKENS = 8, 32
REPORTS = ("report.json", "report.html")


def publish(folder: Path, trained: Trained, *, runtimes: Sequence[str]) -> dict[str, Any]:
    """Export the model in `folder`, write its page and prove it; return the certificate."""
    from lmworks.export.onnx import export_onnx
    from lmworks.export.receipt import write_receipt
    from lmworks.export.verify import record_selftest, verify
    from lmworks.export.web import write_page
    from lmworks.runtime.torch_runtime import TorchRuntime

    export_onnx(trained.model, folder)
    context = trained.settings.context or 0
    tokens = min(TOKENS, context // 2)
    prompts = make_prompts(trained.corpus, trained.tokenizer, context - tokens, count=PROMPTS)
    selftest = record_selftest(TorchRuntime(trained.model), trained.tokenizer, prompts, tokens=tokens)
    write_page(folder, title=trained.corpus.name, facts=make_values(trained, folder), selftest=selftest)
    write_receipt(folder, facts(trained))
    return verify(folder, runtimes=runtimes)


def finish(folder: Path, trained: Trained, report: Report) -> None:
    """Write the reports and, last of all, the receipt that covers every file."""
    from lmworks.base.files import write_text
    from lmworks.export.receipt import add_certificate, write_receipt

    write_json(folder / "report.json", report.to_dict())
    write_text(folder / "report.html", report.to_html())
    write_receipt(folder, facts(trained))
    if (folder / "certificate.json").is_file():  # `train` alone makes none
        add_certificate(folder, read_json(folder / "certificate.json"))
