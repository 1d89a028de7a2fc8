"""What the tests of the page's engine share: Node, real and odd texts, small models with real tokenizers."""

from __future__ import annotations

import base64
import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from minilm_heads import MINILM
from PIL import Image
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from lmworks.export.verify_js import find_modules, find_node
from lmworks.tokens.tokenizer import Tokenizer

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
POSITIONS = 64  # so that usual texts are long ones
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
ODD = [
    "", " ", "Zoë Müller lives  in 東京 😀.", "naïve CAFÉ cafe\u0301 Å", "Straße in İstanbul, ΟΔΥΣΣΕΥΣ!",
    "👩\u200d👩\u200d👧 re\u0302sume\u0301",
    "tab\there\r\nand\n\nnew lines ", "\u200bzero\u200dwidth \ufeff \x00 control \x07 \x85",
    "x" * 110 + " $5.00 a-b_c", "한국어 हिन्दी ไทย \u1112\u1161\u11ab", "e\u0323\u0301 a\u0301\u0323 \u0958",
    "  <mask> and [MASK]  [SEP]</s>", "\U0001d518nicode \U00020000 \u3000 “q”…",
]  # fmt: skip
CLOSE = 1e-4


def ask(work: dict[str, Any]) -> Any:
    """Run tasks.mjs once."""
    node = find_node()
    work = {"modules": str(find_modules(node)), **work}
    command = [str(node), str(Path(__file__).with_name("tasks.mjs"))]
    done = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not (isinstance(found, dict) and "error" in found), found
    return found


def plain(value: Any) -> Any:
    """Return answers as JSON has them."""
    return json.loads(json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else vars(v)))


def differ(a: Any, b: Any) -> float:
    """Return the largest difference of two numbers; infinity where anything else differs, the order of keys too."""
    if isinstance(a, dict) and isinstance(b, dict):
        return max((differ(a[k], b[k]) for k in a), default=0.0) if list(a) == list(b) else np.inf
    if isinstance(a, list) and isinstance(b, list):
        return max(map(differ, a, b), default=0.0) if len(a) == len(b) else np.inf
    if isinstance(a, float) or isinstance(b, float):
        return abs(a - b)
    return 0.0 if a == b else np.inf


def sentences(data: Path, *, count: int = 12) -> list[str]:
    lines = (data / "sst2" / "dev.tsv").read_text("utf-8").splitlines()[1:]
    return [line.rsplit("\t", 1)[0] for line in lines[:count]]


def tweets(data: Path, *, count: int = 12) -> list[str]:
    blocks = (data / "wnut17" / "dev.conll").read_text("utf-8").split("\n\n")[:count]
    return [" ".join(row.split("\t")[0] for row in block.splitlines() if "\t" in row) for block in blocks]


def questions(data: Path, language: str, *, count: int = 3) -> list[tuple[str, str]]:
    articles = json.loads((data / "xquad" / f"xquad.{language}.json").read_text("utf-8"))["data"][:count]
    return [(a["paragraphs"][0]["qas"][0]["question"], a["paragraphs"][0]["context"]) for a in articles]


def queries(data: Path, *, count: int = 8) -> list[str]:
    return [text for text, _ in json.loads((data / "clinc150" / "data_full.json").read_text("utf-8"))["val"][:count]]


def wordpiece(**settings: Any) -> tokenizers.Tokenizer:
    backend = Tokenizer.from_pretrained(MINILM).backend
    if settings:
        backend.normalizer = normalizers.BertNormalizer(**settings)
    return backend


def byte_level(data: Path, *, prefix: bool = False, trim: bool = True, nfc: bool = False) -> tokenizers.Tokenizer:
    """GPT-2's own pairs with RoBERTa's special tokens; with NFC as ModernBERT has it."""
    vocabulary = json.loads((data / "tokenizers/gpt2/encoder.json").read_text("utf-8"))
    lines = (data / "tokenizers/gpt2/vocab.bpe").read_text("utf-8").split("\n")[1:]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [tuple(line.split(" ")) for line in lines if line]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, lstrip=name == "<mask>") for name in SPECIALS])
    ends = [(name, backend.token_to_id(name)) for name in ("</s>", "<s>")]
    if nfc:
        backend.normalizer = normalizers.NFC()
        backend.add_tokens([AddedToken("   ", normalized=True), AddedToken("naïve", single_word=True)])
        backend.post_processor = processors.TemplateProcessing(
            single="<s>:0 $A:0 </s>:0", pair="<s>:0 $A:0 </s>:0 $B:1 </s>:1", special_tokens=ends
        )
    else:
        backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=trim, add_prefix_space=prefix)
    return backend


def make_model(case: str, head: str, folder: Path, data: Path, **extra: Any) -> Path:
    """Save a small model of transformers, random and moved away from identity, with a real tokenizer."""
    roberta = case in ("roberta", "modernbert", "gpt2")
    cased = {"lowercase": False} if head == "Model" else {}  # so that a recipe's small letters show
    backend = byte_level(data, nfc=case == "modernbert") if roberta else wordpiece(**cased)
    named = dict(zip(("unk_token", "mask_token"), ("<unk>", "<mask>") if roberta else ("[UNK]", "[MASK]"), strict=True))
    named |= {"cls_token": "<s>", "pad_token": "<pad>"} if roberta else {"cls_token": "[CLS]", "pad_token": "[PAD]"}
    Tokenizer(backend, config={"tokenizer_class": "PreTrainedTokenizerFast", **named}).save(folder)
    if "Classification" in head and "num_labels" not in extra:
        extra |= {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    rows, pad = backend.get_vocab_size(), backend.token_to_id(named["pad_token"])
    t, text = (
        transformers,
        {"vocab_size": rows, "pad_token_id": pad, "bos_token_id": None, "eos_token_id": None, **extra},
    )
    configs: dict[str, Callable[[], Any]] = {
        "bert": lambda: t.BertConfig(**SIZES, **text, max_position_embeddings=POSITIONS),
        "roberta": lambda: t.RobertaConfig(
            **SIZES, **text, max_position_embeddings=POSITIONS + pad + 1, type_vocab_size=1
        ),
        "distilbert": lambda: t.DistilBertConfig(
            dim=32, n_layers=2, n_heads=4, hidden_dim=48, **text, max_position_embeddings=POSITIONS
        ),
        "modernbert": lambda: t.ModernBertConfig(
            **SIZES, **text, cls_token_id=0, sep_token_id=2, max_position_embeddings=POSITIONS, local_attention=16
        ),
        "gpt2": lambda: t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, **text),
    }
    torch.manual_seed(1)
    family = {"distilbert": "DistilBert", "modernbert": "ModernBert", "gpt2": "GPT2"}.get(case, case.capitalize())
    model = getattr(transformers, f"{family}{'Model' if head == 'Model' else 'For' + head}")(configs[case]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 if "position" in name else 0.15))
            if "qa_outputs" in name or "classifier" in name or "score" in name:
                parameter.mul_(6)
    model.save_pretrained(folder)
    return folder


def to_url(image: Image.Image, kind: str = "PNG", **settings: Any) -> str:
    held = io.BytesIO()
    image.save(held, kind, **settings)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(held.getvalue()).decode()}"
