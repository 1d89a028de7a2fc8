"""Models of published sizes with random weights, prompts, and the answers of transformers in float32.

Random weights serve for speed only, and every contestant gets the same file. They are drawn so that rounding is not
magnified from layer to layer and the next token hangs on the layers: each adds a part of what it reads, all together
about as much as the embeddings are, and the last norm turns half of the signs around, else the input's own token would
always be the next one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from race import to_text

VERSION = 2  # of what this file writes
PROMPT, TOKENS = 16, 48
SHORTEST, LONGEST = 8, 256  # rows of the ragged batch
SPREAD = 0.02  # of the weights
EMBEDDINGS = {"llama": 0.8, "gpt2": 0.25}  # of the embeddings; BERT's are normed at once
LAST = 0.1  # the last norm's weights without their signs: logits of a usual size

LLAMA = {"vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "num_key_value_heads": 12, "intermediate_size": 2048, "max_position_embeddings": 512,
         "tie_word_embeddings": True}  # fmt: skip
SMALL = {"vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6,
         "max_position_embeddings": 512}  # fmt: skip
TINY = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 512}  # fmt: skip
SIZES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> family, what differs from its configuration's defaults
    "llama-110m": ("llama", LLAMA),
    "gpt2-124m": ("gpt2", {"n_positions": 1024}),
    "bert-base": ("bert", {}),
    "llama-17m": ("llama", {**SMALL, "num_key_value_heads": 6, "intermediate_size": 1024, "tie_word_embeddings": True}),
    "gpt2-17m": ("gpt2", SMALL),
    "llama-tiny": ("llama", {**TINY, "num_key_value_heads": 4, "intermediate_size": 128, "tie_word_embeddings": True}),
    "gpt2-tiny": ("gpt2", TINY),
    "bert-tiny": ("bert", {**TINY, "intermediate_size": 128}),
}


def make_model(name: str, folder: Path) -> dict[str, Any]:
    """Write the model into `folder`, unless it is there; return the tasks' settings and the reference answers."""
    known = folder / "reference.json"
    if known.is_file():
        found: dict[str, Any] = json.loads(known.read_text())
        if found["version"] == VERSION:
            return found
    import torch
    import transformers

    torch.manual_seed(0)
    family, changes = SIZES[name]
    config = {
        "llama": transformers.LlamaConfig, "gpt2": transformers.GPT2Config, "bert": transformers.BertConfig,
    }[family](initializer_range=SPREAD, bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes)  # fmt: skip
    classes = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "bert": "BertForSequenceClassification"}
    model = getattr(transformers, classes[family])(config).eval()
    if family != "bert":
        last = model.model.norm.weight if family == "llama" else model.transformer.ln_f.weight
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(EMBEDDINGS[family] / SPREAD)
            last.copy_(LAST * (2 * torch.randint(0, 2, last.shape) - 1))
    shutil.rmtree(folder, ignore_errors=True)  # with what was converted from an older one
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    tasks = encoding(model) if family == "bert" else decoding(model)
    found = {"version": VERSION, "name": name, "parameters": model.num_parameters(), "tasks": tasks}
    known.write_text(json.dumps(found))
    return found


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer whose words are t0, t1 …: some converters will not read a model without one."""
    import tokenizers
    import transformers

    words = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="t0", bos_token="t1", eos_token="t2", unk_token="t0"
    ).save_pretrained(folder)


def decoding(model: Any) -> dict[str, Any]:
    """Return the greedy continuation of one prompt and the logits after it."""
    import torch

    prompt = np.random.default_rng(0).integers(3, model.config.vocab_size, PROMPT).tolist()
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        logits = model(ids).logits[0, -1]
        written = model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    answer = {"logits": to_text(logits.numpy()), "tokens": written[0, PROMPT:].tolist()}
    return {"decode": {"setting": {"prompt": prompt, "tokens": TOKENS}, "reference": answer}}


def encoding(model: Any) -> dict[str, Any]:
    """Return the logits of one row of 128 tokens, and of 32 rows of 8 to 256, each computed without padding."""
    import torch

    draw = np.random.default_rng(0)
    ragged = draw.integers(SHORTEST, LONGEST + 1, 32)
    ragged[:2] = SHORTEST, LONGEST
    tasks = {}
    for task, lengths in {"one row": [128], "ragged": ragged.tolist()}.items():
        rows = [draw.integers(3, model.config.vocab_size, length).tolist() for length in lengths]
        with torch.inference_mode():
            logits = [model(torch.tensor([row])).logits[0].numpy() for row in rows]
        tasks[task] = {"setting": {"rows": rows}, "reference": {"logits": to_text(np.array(logits))}}
    return tasks
