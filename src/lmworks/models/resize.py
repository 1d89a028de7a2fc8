"""Give a model more tokens: rows for the embedding and for the projection to the vocabulary.

A new row is the mean of the rows of the tokens that its text was cut into before, where those are known, else the mean
of all old rows (Hewitt 2021): a network that has never seen a token then treats it as an average one.

Shapes: V vocab_size, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lmworks.base.errors import InputError
from lmworks.models.heads import Model
from lmworks.tokens.tokenizer import Tokenizer


def fit_tokenizer(model: Model, tokenizer: Tokenizer, old: Tokenizer | None = None, *, where: str = "") -> str:
    """Give the model a row for every token, in place; return a sentence about what was done, or "" where it had them.

    `old` is the tokenizer that the model was trained with: new rows start as the mean of what it makes of their text.
    """
    before, size = model.config.vocab_size, tokenizer.vocab_size
    if size <= before:
        return ""
    resize_tokens(model, size, {} if old is None else sub_tokens(tokenizer, old, before))
    place = f" in {where}" if where else ""
    return f"the embeddings were resized from {before} to {size} rows, as the tokenizer{place} has that many tokens"


def resize_tokens(model: Model, size: int, pieces: Mapping[int, Sequence[int]] | None = None) -> Model:
    """Give the model `size` tokens, in place. `pieces` are the old tokens whose mean a new one starts as.

    Raises InputError for fewer tokens than there are, and for a model that carries adapters or reads images.
    """
    old = model.config.vocab_size
    if size < old or model.config.vision is not None:
        raise InputError("the embeddings can only grow", found=f"{size} tokens", expected=f"{old} or more")
    if size == old:
        return model
    rows = [[i for i in (pieces or {}).get(token, ()) if 0 <= i < old] for token in range(old, size)]
    layers: list[nn.Module] = [model.transformer.embeddings.get_submodule("tokens")]
    if model.spec.outputs == "vocab" and model.head.project is not None:
        layers.append(model.head.project)
    for layer in layers:
        if type(layer) not in (nn.Embedding, nn.Linear):
            raise InputError("the embeddings carry an adapter", fix="resize first, and add adapters then")
    for layer in layers:
        for name, parameter in list(layer.named_parameters()):
            grown = nn.Parameter(grow(parameter.detach(), rows), requires_grad=parameter.requires_grad)
            setattr(layer, name, grown)  # a weight (V, D), a bias (V,)
        if isinstance(layer, nn.Embedding):
            layer.num_embeddings = size
        elif isinstance(layer, nn.Linear):
            layer.out_features = size
    model.config = model.transformer.config = replace(model.config, vocab_size=size)
    model.tie()
    return model


def add_rows(
    model: Model, size: int, pieces: Mapping[int, Sequence[int]], *, random: bool = False, seed: int = 0
) -> Model:
    """Give the model rows for new tokens, in place: the mean of their old pieces, or drawn.

    `size` is the tokens that there are then; a model may have had rows to spare, which are written over. Drawn rows are
    normal, as wide as the old ones.
    """
    old = model.config.vocab_size
    resize_tokens(model, max(size, old), pieces)
    generator, new = torch.Generator().manual_seed(seed), sorted(pieces)
    used = [token for token in range(min(old, size)) if token not in pieces]
    with torch.no_grad():
        embedding, project = model.transformer.embeddings.get_submodule("tokens"), model.head.project
        layers = [embedding, *([project] if model.spec.outputs == "vocab" and project is not None else [])]
        tables = {id(layer.weight): layer.weight for layer in layers}  # a tied one once
        for table in tables.values():
            assert isinstance(table, Tensor)
            wide = table[used].float()  # (V, D)
            rows = grow(table.float(), [list(pieces[token]) for token in new])[len(table) :]  # (N, D)
            if random:
                rows = torch.randn(rows.shape, generator=generator) * wide.std()  # (N, D)
            table[new] = rows.to(table)
    return model


def grow(old: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
    """Return old rows (V, …) and a new one for each list of pieces: the mean of those, or of all for an empty list."""
    wide = old.float()
    mean = wide.mean(0)
    new = torch.stack([wide[list(part)].mean(0) if part else mean for part in pieces])
    return torch.cat((old, new.to(old.dtype)))


def sub_tokens(new: Tokenizer, old: Tokenizer, start: int) -> dict[int, list[int]]:
    """Return what the old tokenizer makes of every token from id `start` on: {30522: [8840, 2102]}."""
    texts = {token: new.decode([token], skip_special_tokens=False) for token in range(start, new.vocab_size)}
    return {token: [i for i in old.encode(text) if i != old.unk_id] for token, text in texts.items()}
