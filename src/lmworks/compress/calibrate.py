"""Look at real data before rounding: how far inputs reach, and which layers mind.

    span          the least and greatest input of each Linear on real texts; a percentile leaves rare outliers out
    sensitivity   the KL divergence between what the model says and what it says with one layer rounded
    skip          the layers that mind most stay as they are until the whole model's divergence is within a limit

Shapes: B rows, T tokens, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmworks.base.types import Batch
from lmworks.compress.plain import plain_examples
from lmworks.compress.quantize import find_linears, put, quantize_linear
from lmworks.models.compact import Grid
from lmworks.models.heads import Model
from lmworks.runtime.predictor import Predictor
from lmworks.runtime.torch_runtime import inference
from lmworks.tasks.base import collate
from lmworks.text.labelled import Labelled

WINDOW, ROWS = 128, 16  # tokens and rows of a batch of running text


def read_batches(predictor: Predictor, data: Labelled, *, most: int = 256) -> list[Batch]:
    """Return batches of the first examples as the model reads them: features of its task, or windows of a text."""
    examples = list(data.examples[:most])
    if predictor.prepared is None:
        texts = [text for text in examples if isinstance(text, str)]
        ids = [token for row in predictor.tokenizer.encode_batch(texts) for token in row]
        length = min(WINDOW, predictor.runtime.max_length)
        count = min(len(ids) // length, most)
        rows = torch.tensor(ids[: count * length]).view(count, length).numpy() if count else None
        short = [{"input_ids": torch.tensor([ids]).numpy()}] if ids and rows is None else []
        return short if rows is None else [{"input_ids": rows[i : i + ROWS]} for i in range(0, count, ROWS)]
    mask = getattr(predictor.prepared, "mask", "")
    features = sorted(predictor.prepared.encode(plain_examples(predictor.task, examples, mask=mask)), key=len)
    pad = 0 if "pixel_values" in features[0].inputs else predictor.tokenizer.pad_id or 0
    return [collate(features[i : i + ROWS], pad_id=pad) for i in range(0, len(features), ROWS)]


def say(model: Model, batches: Sequence[Batch]) -> list[Tensor]:
    """Return the model's numbers for the real tokens, or the rows, of each batch: (n, O)."""
    found = []
    with inference(model):
        for batch in batches:
            if "pixel_values" in batch:
                found.append(model(torch.from_numpy(batch["pixel_values"])).flatten(0, -2))
                continue
            mask = batch.get("attention_mask")
            seen = None if mask is None else torch.from_numpy(mask)
            types = batch.get("token_type_ids")
            segments = None if types is None else torch.from_numpy(types)
            y = model(torch.from_numpy(batch["input_ids"]), seen, token_type_ids=segments)  # (B, T, O) or (B, O)
            found.append(y if y.ndim == 2 else y.flatten(0, 1) if seen is None else y[seen.bool()])
    return found


def distance(model: Model, known: Sequence[Tensor], given: Sequence[Tensor]) -> float:
    """Return how far two sets of numbers are apart: the mean KL divergence; of bare states, one minus the cosine."""
    one, two = torch.cat(list(known)).double(), torch.cat(list(given)).double()
    if model.kind == "Model":
        return float((1 - F.cosine_similarity(one, two, dim=-1)).mean())
    if one.shape[-1] == 1:
        return float((one - two).square().mean())
    return float(F.kl_div(two.log_softmax(-1), one.log_softmax(-1), log_target=True, reduction="batchmean"))


def find_spans(model: Model, batches: Sequence[Batch], *, percentile: float = 100.0) -> dict[str, Tensor]:
    """Return the least and greatest input (2,) of each Linear of the body over real data.

    Below 100, `percentile` leaves out the outermost numbers of each batch, half of them on either side.
    """
    spans: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten().float()
            share = (1 - percentile / 100) / 2
            rank = max(int(share * x.numel()), 0)
            low, high = (x.kthvalue(rank + 1)[0], x.kthvalue(x.numel() - rank)[0]) if rank else x.aminmax()
            span = torch.stack((low, high)).clone()
            spans[name] = (
                span if name not in spans else torch.stack((spans[name].min(span)[0], spans[name].max(span)[1]))
            )

        return look

    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in find_linears(model, head=False).items()]
    try:
        with torch.no_grad():
            say(model, batches)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: span.clone() for name, span in spans.items()}


def sensitivities(
    model: Model, batches: Sequence[Batch], grid: Grid, *, spans: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Return for each Linear of the body the model's divergence with that layer alone rounded, the worst first."""
    known, found = say(model, batches), {}
    for name, linear in find_linears(model, head=False).items():
        put(model, name, quantize_linear(linear, grid, span=None if spans is None else spans[name]))
        try:
            found[name] = distance(model, known, say(model, batches))
        finally:
            put(model, name, linear)
    return dict(sorted(found.items(), key=lambda row: -row[1]))


def choose_skips(
    model: Model, batches: Sequence[Batch], grid: Grid, *, limit: float, spans: Mapping[str, Tensor] | None = None
) -> tuple[list[str], dict[str, float], float]:
    """Return the layers to leave as they are, every layer's sensitivity, and the divergence that is left.

    The most sensitive is taken back, one after the other, until the whole model's divergence is within `limit`.
    """
    ranked = sensitivities(model, batches, grid, spans=spans)
    linears, known = find_linears(model, head=False), say(model, batches)
    skipped: list[str] = []
    try:
        for name in ranked:
            put(model, name, quantize_linear(linears[name], grid, span=None if spans is None else spans[name]))
        left = distance(model, known, say(model, batches))
        for name in ranked:
            if left <= limit:
                break
            put(model, name, linears[name])
            skipped.append(name)
            left = distance(model, known, say(model, batches))
    finally:
        for name, linear in linears.items():
            put(model, name, linear)
    return skipped, ranked, left
