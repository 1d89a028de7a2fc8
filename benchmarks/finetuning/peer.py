"""The same fine-tuning with transformers' Trainer, and peft for LoRA: what users would otherwise run.

Prints one JSON line: metrics on the test data, seconds of training (validation and loading left out).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> int:
    """Train once and score once."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "train", "test"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--limit", type=int, default=None, help="training rows")
    a = parser.parse_args()

    import torch
    from torch.utils.data import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(a.seed)
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    train, test = read(Path(a.train))[: a.limit], read(Path(a.test))
    labels = sorted({label for _, label in train})

    class Rows(Dataset[Any]):
        def __init__(self, rows: list[tuple[str, str]]) -> None:
            self.inputs = tokenizer([text for text, _ in rows], truncation=True)["input_ids"]
            self.labels = [labels.index(label) for _, label in rows]

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"input_ids": self.inputs[i], "labels": self.labels[i]}

    model = AutoModelForSequenceClassification.from_pretrained(a.model, num_labels=len(labels))
    if a.method == "lora":
        from peft import LoraConfig, TaskType, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=a.rank, lora_alpha=16))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=a.epochs, learning_rate=a.lr, per_device_train_batch_size=a.batch_size,
            per_device_eval_batch_size=64, weight_decay=0.01, warmup_steps=0.1, lr_scheduler_type="cosine",
            bf16=a.bf16, seed=a.seed, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, train_dataset=Rows(train), data_collator=DataCollatorWithPadding(tokenizer)
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        said = trainer.predict(Rows(test))
    accuracy = float((said.predictions.argmax(-1) == said.label_ids).mean())
    print(json.dumps({"accuracy": accuracy, "seconds": round(seconds, 1)}))
    return 0


def read(path: Path) -> list[tuple[str, str]]:
    """Return texts and labels of SST-2: tab-separated, no header."""
    rows = [line.rstrip("\n").split("\t") for line in path.open(encoding="utf-8")]
    return [(text, label) for text, label in rows]


if __name__ == "__main__":
    sys.exit(main())
