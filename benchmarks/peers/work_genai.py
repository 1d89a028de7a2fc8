"""onnxruntime-genai: `how` is `precision` of its model builder, and `extra`, the builder's options."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
from race import serve


class Peer:
    """Its Generator, on a folder that its own builder wrote."""

    def __init__(self, setting: dict[str, Any]) -> None:
        made = build(Path(setting["model"]), setting["precision"], setting.get("extra", []))
        path = made / "genai_config.json"
        config = json.loads(path.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = setting["threads"]
        path.write_text(json.dumps(config))
        self.model = onnxruntime_genai.Model(str(made))
        self.most = len(setting["prompt"]) + setting["tokens"]

    def start(self, ids: Sequence[int]) -> Any:
        """Return a generator that has read the prompt."""
        options = onnxruntime_genai.GeneratorParams(self.model)
        options.set_search_options(max_length=self.most, min_length=self.most, do_sample=False)
        generator = onnxruntime_genai.Generator(self.model, options)
        generator.append_tokens(list(ids))
        return generator

    def generate(self, ids: Sequence[int], tokens: int) -> list[int]:
        """Write greedily, past the end of a document."""
        generator = self.start(ids)
        for _ in range(tokens):
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(ids) :]]

    def logits(self, ids: Sequence[int]) -> Any:
        """Return the prompt's last logits."""
        return np.array(self.start(ids).get_logits()).reshape(-1, self.vocabulary)[-1]

    @property
    def vocabulary(self) -> int:
        """Return the number of logits."""
        return int(self.start([3]).get_logits().shape[-1])


def build(folder: Path, precision: str, extra: Sequence[str]) -> Path:
    """Return the builder's folder of this precision; build it where it is missing."""
    made = folder / "genai" / precision
    if not (made / "genai_config.json").is_file():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(made)]
        command += ["-p", precision, "-e", "cpu", "-c", str(folder / "genai" / "cache")]
        command += ["--extra_options", *extra] if extra else []
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, file=sys.stderr)
        if done.returncode:
            raise SystemExit(f"its model builder: {done.stdout.strip().splitlines()[-1]}")
    return made


if __name__ == "__main__":
    serve(Peer)
