"""LoRA on a model: which layers, how many numbers, how they start; int8 and bf16 bases, several adapters, tokens."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import (
    CONFIGS,
    TARGETS,
    TASKS,
    VOCAB,
    largest,
    load_peft,
    make_base,
    make_peft,
    move,
    random_ids,
    save_peft,
)

from lmworks.base.errors import InputError
from lmworks.export.onnx import export_onnx
from lmworks.models.checkpoint import load_model, save_model
from lmworks.models.heads import Model
from lmworks.models.resize import resize_tokens
from lmworks.training.adapter_files import load_adapter, open_adapter, save_adapter
from lmworks.training.int8 import Int8Linear, quantize_base
from lmworks.training.lora import (
    activate,
    adapter_names,
    add_lora,
    merge_lora,
    remove_adapter,
    trainable_parameters,
    unload,
)
from lmworks.training.lora_layers import LoraLinear, LowRank
from lmworks.training.optim import make_optimizer
from lmworks.training.stored import model_tensors, saved_tensors, tensor_bytes
from lmworks.training.targets import choose
from lmworks.training.train_config import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers
CLOSE = 1e-5
IDS = random_ids(3, 20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A published model of each case."""
    root = tmp_path_factory.mktemp("bases")
    for case in CONFIGS:
        make_base(case, root / case)
    return {case: root / case for case in CONFIGS}


def chosen(model: Model, targets: Any) -> set[str]:
    return {site.key for site, _ in choose(model, targets, set())}


PEFT_TARGETS = [
    ("bert", ["query", "attention.output.dense"]), ("bert", r".*layer\.1\.(attention|output).*dense"),
    ("bert", ["word_embeddings", "key"]), ("roberta", None), ("bert", None), ("gpt2", None), ("llama", None),
    ("gpt2", ["c_proj"]), ("gpt2", ["attn.c_proj"]), ("modernbert", ["Wo"]), ("llama", ["embed_tokens", "down_proj"]),
    ("gpt2", "all-linear"), ("llama", "all-linear"), ("modernbert", ["layers.0.mlp.Wi"]),
]  # fmt: skip


@pytest.mark.parametrize(("case", "targets"), PEFT_TARGETS)
def test_targets_name_the_layers_that_peft_finds(
    case: str, targets: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    theirs = make_peft(case, make_base(case, tmp_path), target_modules=targets)
    assert chosen(load_model(folders[case]), targets) == set(theirs.base_model.targeted_module_names)


def test_all_linear_leaves_the_head_that_is_trained_whole(folders: dict[str, Path], tmp_path: Path) -> None:
    model = add_lora(load_model(folders["bert"]), targets="all-linear", whole=["classifier"])
    save_adapter(model, tmp_path / "adapter", base=folders["bert"])
    theirs = make_peft("bert", make_base("bert", tmp_path / "base"), target_modules="all-linear")
    ours = load_peft(make_base("bert", tmp_path / "base"), tmp_path / "adapter")
    assert set(ours.base_model.targeted_module_names) == set(theirs.base_model.targeted_module_names)


@pytest.mark.parametrize(
    ("case", "targets", "count"),
    [
        ("bert", "attention", 8), ("bert", "mlp", 4), ("bert", ["layers.1.attention.q_proj"], 1), ("gpt2", "q_proj", 2),
        ("gpt2", ["layers.0.attention.q_proj", "layers.0.attention.k_proj"], 1), ("modernbert", "mlp", 4),
        ("llama", ["transformer.layers.0.mlp.gate_proj"], 1), ("llama", "lm_head", 1), ("gpt2", "wte", 1),
    ],
)  # fmt: skip
def test_targets_by_our_names(case: str, targets: Any, count: int, folders: dict[str, Path]) -> None:
    assert len(chosen(load_model(folders[case]), targets)) == count


def test_a_name_that_no_layer_has_is_explained(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError) as error:
        add_lora(load_model(folders["bert"]), targets=["query", "valeu"])
    assert "valeu" in error.value.what and 'did you mean "value"?' in error.value.fix
    with pytest.raises(InputError, match="no layer of this model"):
        add_lora(load_model(folders["bert"]), whole=["klassifier"])
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": []}, {"name": "a.b"}, {"name": "keys"}):
        with pytest.raises(InputError):
            add_lora(load_model(folders["bert"]), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CONFIGS)
def test_the_count_of_trainable_parameters_is_that_of_peft(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    targets: Any = {"bert": "all-linear", "llama": "all-linear", "roberta": ["key"]}.get(case, TARGETS[case])
    model = add_lora(
        load_model(folders[case]), rank=5, targets=targets, whole=["classifier"] if TASKS[case] != "CAUSAL_LM" else ()
    )
    theirs = make_peft(case, make_base(case, tmp_path), r=5, target_modules=targets)
    trainable, total = theirs.get_nb_trainable_parameters()
    assert trainable_parameters(model).trainable == trainable
    copies = sum(p.numel() for n, p in theirs.named_parameters() if "modules_to_save" in n and p.requires_grad)
    assert trainable_parameters(model).total == total, copies


def test_the_start_is_that_of_peft(folders: dict[str, Path]) -> None:
    """A uniform within 1 / sqrt(I), B zero; drawn from the seed, whatever torch's own state is, which stays."""
    before = torch.get_rng_state()
    one, two, other = (add_lora(load_model(folders["gpt2"]), rank=64, targets="c_proj", seed=s) for s in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    adapters = {n: m for n, m in one.named_modules() if isinstance(m, LowRank)}
    assert len(adapters) == 4
    for name, adapter in adapters.items():
        bound, a = adapter.A.shape[1] ** -0.5, adapter.A.detach()
        assert a.abs().max() <= bound and a.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not adapter.B.any()
        assert torch.equal(adapter.A, two.get_submodule(name).A)
        assert not torch.equal(adapter.A, other.get_submodule(name).A)
    assert len({tuple(adapter.A[0, :4].tolist()) for adapter in adapters.values()}) == 4  # each layer has its own


def test_the_parts_of_a_fused_matrix_share_a(folders: dict[str, Path]) -> None:
    attention = add_lora(load_model(folders["gpt2"])).transformer.layers[0].attention
    q, k, v = (attention.get_submodule(name).current() for name in ("q_proj", "k_proj", "v_proj"))
    assert q.A is k.A is v.A and q.B is not k.B


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_draws_as_peft_does(kind: str, tmp_path: Path) -> None:
    """The same random state drops the same inputs where a matrix is not fused; DoRA drops its plain part too."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = make_base("bert", tmp_path / "base", **still)
    theirs = make_peft("bert", base, lora_dropout=0.4, use_dora=kind == "dora", target_modules=["query", "key"])
    save_peft(theirs, tmp_path / "adapter")
    ours = open_adapter(tmp_path / "adapter", base=tmp_path / "base").model
    quiet = ours(IDS)
    logits = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(7)
        out = model(IDS) if model is ours else model(input_ids=IDS).logits
        logits.append(out.detach())
    assert largest(logits[1], quiet) > 1e-3
    assert largest(*logits) <= CLOSE


def test_a_step_trains_the_adapter_alone(folders: dict[str, Path]) -> None:
    model = add_lora(load_model(folders["gpt2"]), targets=["c_attn", "mlp"], dora=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, TrainConfig(steps=1, lr=0.01, weight_decay=0.1))
    for _ in range(2):  # A has no gradient while B is zero
        optimizer.zero_grad()
        model.train()(IDS).logsumexp(-1).mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (".adapters." in name), name


def test_several_adapters_on_one_base(folders: dict[str, Path], tmp_path: Path) -> None:
    """Switched, removed and unloaded; each answers as peft's does, and the base is what it was."""
    base = make_base("bert", tmp_path / "base")
    one = make_peft("bert", base, target_modules=["query"])
    save_peft(one, tmp_path / "one")
    two = make_peft("bert", make_base("bert", tmp_path / "base"), target_modules=["query", "key"], use_dora=True, r=2)
    save_peft(two, tmp_path / "two")
    model = load_model(tmp_path / "base")
    with torch.no_grad():
        plain = model(IDS)
        expected = {"one": one(input_ids=IDS).logits, "two": two(input_ids=IDS).logits}
        for name in expected:
            load_adapter(model, tmp_path / name, name=name)
        assert adapter_names(model) == ["one", "two"]
        for name in ("two", "one", "two"):
            activate(model, name)
            assert largest(model(IDS), expected[name]) <= CLOSE
        activate(model, None)
        assert torch.equal(model(IDS), plain)
        with pytest.raises(InputError, match="carries no adapter"):
            activate(model, "three")
        remove_adapter(model, "two")
        activate(model, "one")
        assert largest(model(IDS), expected["one"]) <= CLOSE
        assert torch.equal(unload(model)(IDS), plain)
    assert not adapter_names(model) and all(p.requires_grad for p in model.parameters())
    save_model(model, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").stat().st_size > 0


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("case", ["gpt2", "modernbert"])
def test_an_int8_base(case: str, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Numbers and gradients of peft on a base that holds what the eight bits stand for; a quarter of the memory."""
    base = make_base(case, tmp_path / "base")
    quantized = quantize_base(load_model(folders[case]))
    held = [module for module in quantized.modules() if isinstance(module, Int8Linear)]
    stands_for = load_model(folders[case])
    for name, module in quantized.named_modules():
        if isinstance(module, Int8Linear):
            weight = stands_for.get_submodule(name).weight
            assert largest(module.weight, weight) <= 0.51 * weight.abs().max() / 127
            weight.data = module.weight
            assert module.q.nbytes + module.scale.nbytes < 0.4 * weight.nbytes
    assert len(held) == {"gpt2": 12, "modernbert": 14}[case]
    save_model(stands_for, tmp_path / "near")
    base = type(base).from_pretrained(tmp_path / "near").eval()
    theirs = make_peft(case, base, use_dora=kind == "dora")
    save_peft(theirs, tmp_path / "adapter")
    load_adapter(quantized, tmp_path / "adapter", trainable=True)
    logits, expected = quantized(IDS), theirs(input_ids=IDS).logits
    assert largest(logits, expected) <= 1e-4
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (logits * weights).mean().backward()
    (expected * weights).mean().backward()
    ours = {n: p.grad for n, p in quantized.named_parameters() if p.requires_grad and n.endswith("A")}
    first = next(n for n in ours if "layers.0" in n)
    key = next(n for n in dict(theirs.named_parameters()) if ".0." in n and "lora_A" in n)
    assert largest(ours[first], theirs.get_parameter(key).grad) <= 1e-6
    blob = b"".join(bytes(part) for part in tensor_bytes(saved_tensors(quantized)))  # what a checkpoint would hold
    assert 0 < len(blob) < 0.3 * sum(t.nbytes for t in model_tensors(stands_for).values())
    with torch.no_grad():
        before = quantized(IDS)
        adapted = sum(isinstance(module, LoraLinear) for module in quantized.modules())
        merge_lora(quantized)
        assert largest(quantized(IDS), before) <= CLOSE
    left = [module for module in quantized.modules() if isinstance(module, Int8Linear)]
    assert len(left) == len(held) - adapted  # what was merged into is a matrix again, the rest stays as it is


def test_an_int8_matrix_is_not_kept_for_the_backward_pass() -> None:
    layer = Int8Linear(torch.nn.Linear(64, 32))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(torch.randn(4, 64, requires_grad=True))
    assert {t.dtype for t in kept if t.numel() == 64 * 32} == {torch.int8}


def test_a_bf16_base(folders: dict[str, Path], tmp_path: Path) -> None:
    """The adapter stays in float32, as peft keeps it, and the layer gives what the base gives."""
    base = make_base("llama", tmp_path / "base").to(torch.bfloat16)
    theirs = make_peft("llama", base)
    save_peft(theirs, tmp_path / "adapter")
    ours = load_model(tmp_path / "base", dtype=torch.bfloat16)
    load_adapter(ours, tmp_path / "adapter")
    assert {p.dtype for n, p in ours.named_parameters() if ".adapters." in n} == {torch.float32}
    logits = ours(IDS)
    assert logits.dtype == torch.bfloat16
    assert largest(logits.float(), theirs(input_ids=IDS).logits.float()) <= 0.05
    merge_lora(ours)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(("case", "target"), [("gpt2", "wte"), ("llama", "embed_tokens"), ("bert", "word_embeddings")])
def test_embeddings(case: str, target: str, kind: str, tmp_path: Path) -> None:
    """Both ways; merged, an embedding that was the projection too is one no longer."""
    theirs = make_peft(case, make_base(case, tmp_path / "base"), target_modules=[target], use_dora=kind == "dora")
    save_peft(theirs, tmp_path / "adapter")
    ours = open_adapter(tmp_path / "adapter", base=tmp_path / "base").model
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
        assert largest(load_model(tmp_path / "base")(IDS), expected) > 0.05
        assert largest(ours(IDS), expected) <= CLOSE
        save_adapter(ours, tmp_path / "again", base=tmp_path / "base")
        again = load_peft(make_base(case, tmp_path / "base"), tmp_path / "again")
        assert largest(again(input_ids=IDS).logits, expected) <= CLOSE
        assert merge_lora(ours)["untied"] == (case == "gpt2")
        save_model(ours, tmp_path / "merged")
        assert largest(load_model(tmp_path / "merged")(IDS), expected) <= CLOSE
    fresh = add_lora(load_model(tmp_path / "base"), targets=[target], dora=kind == "dora", whole=())
    assert largest(fresh(IDS), load_model(tmp_path / "base")(IDS)) <= CLOSE


@pytest.mark.parametrize("case", ["gpt2", "llama"])  # tied and not
def test_new_tokens_are_trained_saved_and_read_again(case: str, tmp_path: Path) -> None:
    """C4: rows of added tokens beside LoRA; here, and in peft on a base that was resized by hand."""
    make_base(case, tmp_path / "base")
    model = resize_tokens(load_model(tmp_path / "base"), VOCAB + 3)
    new = [VOCAB, VOCAB + 1, VOCAB + 2]
    add_lora(model, tokens=new)
    move(model, 0.1)
    ids = torch.cat((IDS, torch.tensor([new] * 3)), 1)
    with torch.no_grad():
        expected = model(ids)
        assert largest(expected, resize_tokens(load_model(tmp_path / "base"), VOCAB + 3)(ids)) > 0.05
    facts = save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    assert facts["tokens"] == 3 and "vLLM" in facts["notes"][0]
    assert facts["bytes"] < 40_000  # the rows alone, and not the embedding
    opened = open_adapter(tmp_path / "adapter")
    assert any(f"from {VOCAB} to {VOCAB + 3}" in note for note in opened.facts["notes"])
    base = make_base(case, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.resize_token_embeddings(VOCAB + 3)
    with torch.no_grad():
        assert largest(opened.model(ids), expected) <= CLOSE
        theirs = load_peft(base, tmp_path / "adapter")
        assert largest(theirs(input_ids=ids).logits, expected) <= CLOSE
        merge_lora(model)
        save_model(model, tmp_path / "merged")
        merged = load_model(tmp_path / "merged")
        assert merged.config.vocab_size == VOCAB + 3 and merged.is_tied == (case == "gpt2")
        assert largest(merged(ids), expected) <= CLOSE
    with pytest.raises(InputError, match="no such tokens"):
        add_lora(load_model(tmp_path / "base"), tokens=[VOCAB])


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_an_embedding_that_peft_saved_resized_is_read(case: str, tmp_path: Path) -> None:
    """C4: peft writes the whole embedding then; the base grows by itself, with a message."""
    base = make_base(case, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.resize_token_embeddings(VOCAB + 5)
    theirs = make_peft(case, base)
    save_peft(theirs, tmp_path / "adapter", save_embedding_layers=True)
    opened = open_adapter(tmp_path / "adapter", base=tmp_path / "base")
    assert any(f"from {VOCAB} to {VOCAB + 5}" in note for note in opened.facts["notes"])
    ids = IDS + 5
    with torch.no_grad():
        assert largest(opened.model(ids), theirs(input_ids=ids).logits) <= CLOSE
        save_adapter(opened.model, tmp_path / "again", base=tmp_path / "base")
        assert largest(open_adapter(tmp_path / "again").model(ids), opened.model(ids)) == 0
        again = load_peft(base=base_again(case, tmp_path), folder=tmp_path / "again")
        assert largest(again(input_ids=ids).logits, theirs(input_ids=ids).logits) <= CLOSE


def base_again(case: str, tmp_path: Path) -> Any:
    base = make_base(case, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.resize_token_embeddings(VOCAB + 5)
    return base


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_peft_trained(tied: bool, tmp_path: Path) -> None:
    """`trainable_token_indices`, of the embedding alone where the projection is another matrix."""
    case = "gpt2" if tied else "llama"
    theirs = make_peft(case, make_base(case, tmp_path / "base"), trainable_token_indices=[5, 9])
    save_peft(theirs, tmp_path / "adapter")
    ours = open_adapter(tmp_path / "adapter", base=tmp_path / "base").model
    ids = torch.tensor([[5, 9, 4, 9, 30]])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        assert largest(ours(ids), expected) <= CLOSE
        merge_lora(ours)
        assert largest(ours(ids), expected) <= CLOSE


def test_an_unmerged_model_is_not_exported(folders: dict[str, Path], tmp_path: Path) -> None:
    """C2: a graph without the adapter would answer as the base."""
    model = add_lora(load_model(folders["gpt2"]))
    with pytest.raises(InputError, match="does not know the module LoraLinear"):
        export_onnx(model, tmp_path / "out")
    with pytest.raises(InputError, match="adapter"):
        save_model(model, tmp_path / "saved")
