"""Run an exported graph with ONNX Runtime: no torch.

Shapes: B batch, T tokens, S keys (past and new), K key/value heads, E head size, C capacity of a cache, V vocabulary,
O outputs of a head, D hidden size.

The graph is the one that the web page runs (transformers.js's names). A graph without a cache reads whole sequences or
images. One with a growing past and present writes text; two facts, both of them tested, make it a server's graph:

* A cache bound as past *and* present is written in place: nothing is copied, and C may exceed the length.
* The graph takes a row's length from its attention mask (the last 1), so rows of different lengths share a step.

So each layer has one buffer for the keys and one for the values of all slots, (slots, K, C, E), and a call binds the
rows that it needs by address.

int8 scales each activation over a whole call, so there a row depends slightly on the rows beside it; fp32 does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import read_json
from lmworks.base.onnx_file import check_onnx
from lmworks.base.optional import require
from lmworks.base.threads import thread_count
from lmworks.base.types import Batch
from lmworks.models.families import read_config
from lmworks.runtime import trace
from lmworks.runtime.base import Logits, check_ids, check_length, check_slots
from lmworks.runtime.states import States, align, put_back

FILES = {  # transformers.js finds a dtype by its file's suffix; the best first. Our int8 is its q8, the default in WASM
    "fp32": "model.onnx",
    "int8": "model_quantized.onnx",
    "uint8": "model_uint8.onnx",
    "q4": "model_q4.onnx",
    "bnb4": "model_bnb4.onnx",
    "fp16": "model_fp16.onnx",
    "q4f16": "model_q4f16.onnx",
}
STATES = ("last_hidden_state", "token_embeddings")  # what bodies call their answer, here and elsewhere
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
CHUNK = 512  # tokens of a prompt in one call: bounds the (T, S) mask
FIRST_CAPACITY = 256  # positions; doubled when a slot needs more

Floats = NDArray[np.float32]


class OnnxRuntime:
    """The Runtime over `folder/onnx/model*.onnx` on the CPU."""

    name = "onnx"
    batch_tokens = 512  # of texts that are read whole: measured, larger batches are slower, int8 by a third

    def __init__(
        self, folder: str | Path, *, dtype: str = "fp32", slots: int = 1, threads: int | None = None, once: bool = False
    ) -> None:
        """`once`: for a few short texts. It opens sooner, and every run is slower: matrices stay as they lie."""
        folder, self.dtype = Path(folder), dtype
        self.session = open_session(find_graph(folder, dtype), threads or thread_count(), once=once)
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        shapes = {item.name: item.shape for item in (*self.inputs.values(), *self.session.get_outputs())}
        self.outputs = choose_outputs([item.name for item in self.session.get_outputs()], folder)
        self.cache_names = [name.removeprefix("past_key_values.") for name in shapes if name.startswith("past_")]
        self.lengths = np.zeros(slots, np.int64)
        self.states = States(self.session.get_inputs(), slots)  # in place of a cache, where there is no attention
        self.rewinds = not self.states.arrays
        self.caches: list[NDArray[Any]] = []
        self.bindings: dict[tuple[int, int], Any] = {}  # rows -> their caches, bound
        self.capacity = 0
        self.turn: int | None = None  # a graph takes no text that is longer
        if not self.cache_names:
            config = read_config(folder)
            self.vocab_size, self.max_length = config.vocab_size, config.turn or config.max_tokens
            return
        positions, config = read_max_length(folder), read_config(folder)
        self.max_length = config.turn or positions - config.position_offset
        self.vocab_size = int(shapes["logits"][-1])
        self.row_shape = [shapes[f"past_key_values.{name}"] for name in self.cache_names]  # (B, K, S, E) each
        self.cache_type = TYPES[self.inputs[f"past_key_values.{self.cache_names[0]}"].type]
        self._reserve(min(FIRST_CAPACITY, self.max_length))

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Run whole sequences, padded on either side.

        input_ids (B, T), or pixel_values -> logits (B, T, O) or (B, O), hidden_states (B, T, D) of a bare body;
        of a classifier's graph also its features (B, D).
        """
        if "pixel_values" in self.inputs:
            feed = {"pixel_values": np.ascontiguousarray(batch["pixel_values"], dtype=np.float32)}
            self._check_images(feed["pixel_values"])
        else:
            feed = self._read_texts(batch)
        if self.states.arrays:
            return {"logits": self._run_states(feed, batch)}
        found = self.session.run(list(self.outputs), feed)
        if "start_logits" in self.outputs:  # where an answer starts, and where it ends
            return {"logits": np.stack(found, -1)}
        return {name: np.asarray(array, np.float32) for name, array in zip(self.outputs.values(), found, strict=True)}

    def _run_states(self, feed: dict[str, NDArray[Any]], batch: Batch) -> NDArray[np.float32]:
        """Run whole sequences (B, T), padded on either side, from their first token -> (B, T, V)."""
        input_ids, mask = feed["input_ids"], batch.get("attention_mask")
        order = None if mask is None or mask[:, 0].all() else align(np.asarray(mask))
        if order is not None:
            feed["input_ids"] = np.take_along_axis(input_ids, order, 1)
        (logits,) = self.session.run(["logits"], {**feed, **self.states.fresh(len(input_ids))})
        return np.asarray(logits if order is None else put_back(logits, order), np.float32)

    def _read_texts(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Return what the graph is fed for a batch of texts; what it does not ask for is left out."""
        input_ids = np.ascontiguousarray(batch["input_ids"], dtype=np.int64)  # (B, T)
        mask = batch.get("attention_mask")
        mask = np.ones_like(input_ids) if mask is None else np.ascontiguousarray(mask, dtype=np.int64)
        check_ids(input_ids, self.vocab_size)
        check_length(input_ids.shape[1], self.max_length)
        feed = {"input_ids": input_ids, "attention_mask": mask, "num_logits_to_keep": np.array(0, np.int64)}
        if "position_ids" in self.inputs:
            feed["position_ids"] = batch.get("position_ids", np.maximum(mask.cumsum(1) - 1, 0))
        if "token_type_ids" in self.inputs:
            types = batch.get("token_type_ids")
            feed["token_type_ids"] = np.zeros_like(input_ids) if types is None else np.asarray(types, np.int64)
        if self.cache_names:
            for name, (_, heads, _, size) in zip(self.cache_names, self.row_shape, strict=True):
                feed[f"past_key_values.{name}"] = np.empty((len(input_ids), heads, 0, size), self.cache_type)
        return {name: value for name, value in feed.items() if name in self.inputs}

    def _check_images(self, pixels: NDArray[np.float32]) -> None:
        """Raise InputError for images of another shape than the graph's."""
        expected = self.inputs["pixel_values"].shape[1:]
        fits = pixels.ndim == 4 and all(
            not isinstance(size, int) or size == found for size, found in zip(expected, pixels.shape[1:], strict=True)
        )
        if not fits:
            raise InputError(
                "the images have the wrong shape",
                where="preprocessor_config.json, config.json",
                found=f"{tuple(pixels.shape[1:])}",
                expected=f"{tuple(expected)}",
            )

    def prefill(self, slots: Sequence[int], input_ids: Sequence[Sequence[int]]) -> Logits:
        """Start these slots over with a prompt each, of any length; return the last token's logits (n, V)."""
        self._check_writes()
        check_slots(slots, len(input_ids), len(self.lengths))
        rows = [np.asarray(row, dtype=np.int64)[None] for row in input_ids]  # n of (1, T)
        for row in rows:
            check_ids(row, self.vocab_size)
            check_length(row.shape[1], self.max_length)
        logits = np.empty((len(rows), self.vocab_size), np.float32)
        for i, (slot, row) in enumerate(zip(slots, rows, strict=True)):  # the kernel takes a past for one row only
            self.lengths[slot] = 0
            for start in range(0, row.shape[1], CHUNK):
                self._forward(slice(slot, slot + 1), row[:, start : start + CHUNK], logits[i : i + 1])
        return logits

    def extend(self, slot: int, input_ids: Sequence[int], *, at: int) -> Logits:
        """Keep the first `at` positions of a slot and add these tokens, at most CHUNK; return the last's logits (V,).

        A long prompt so comes in parts, between the steps of other slots, and what two prompts begin with is read once.
        """
        self._check_writes()
        check_slots([slot], 1, len(self.lengths))
        row = np.asarray(input_ids, dtype=np.int64)[None]  # (1, T)
        check_ids(row, self.vocab_size)
        check_length(at + row.shape[1], self.max_length)
        if not 0 <= at <= self.lengths[slot] or not 1 <= row.shape[1] <= CHUNK:
            raise InputError("a slot cannot be extended so", found=f"{row.shape[1]} tokens at {at}",
                             expected=f"1 to {CHUNK} tokens at 0 to {self.lengths[slot]}")  # fmt: skip
        if self.states.arrays and at not in (0, self.lengths[slot]):
            raise InputError("a state cannot go back to an earlier token", found=f"token {at}",
                             fix="run the text again from its beginning")  # fmt: skip
        self.lengths[slot] = at
        logits = np.empty((1, self.vocab_size), np.float32)
        self._forward(slice(slot, slot + 1), row, logits)
        last: Logits = logits[0]
        return last

    def step(self, slots: Sequence[int], input_ids: Sequence[int]) -> Logits:
        """Add one token to each of these slots, whatever their lengths; return its logits (n, V)."""
        self._check_writes()
        check_slots(slots, len(input_ids), len(self.lengths))
        tokens = np.asarray(input_ids, dtype=np.int64)[:, None]  # (n, 1)
        check_ids(tokens, self.vocab_size)
        check_length(int(self.lengths[list(slots)].max(initial=0)) + 1, self.max_length)
        logits = np.empty((len(slots), self.vocab_size), np.float32)
        for rows, order in neighbours(slots):
            out = np.empty((len(order), self.vocab_size), np.float32)
            self._forward(rows, tokens[order], out)
            logits[order] = out
        return logits

    def _check_writes(self) -> None:
        """Raise InputError for a graph without a cache."""
        if not (self.cache_names or self.states.arrays):
            raise InputError("this graph reads whole texts: it cannot write one", fix="export a causal language model")

    def _forward(self, rows: slice, input_ids: NDArray[np.int64], logits: Floats) -> None:
        """Feed (B, T) new tokens to the slots `rows`, in place; write the last token's logits into (B, V)."""
        input_ids = np.ascontiguousarray(input_ids)
        past = self.lengths[rows]  # (B,)
        if self.states.arrays:
            feed = {"input_ids": input_ids, "num_logits_to_keep": np.array(1, np.int64)}
            found = self.session.run(["logits", *self.states.outputs], {**feed, **self.states.read(rows, past)})
            logits[:] = found[0][:, -1]
            self.states.write(rows, found[1:])
            self.lengths[rows] = past + input_ids.shape[1]
            return
        lengths = past + input_ids.shape[1]
        total = int(lengths.max())
        self._reserve(total)
        mask = (np.arange(total) < lengths[:, None]).astype(np.int64)  # (B, S)
        binding = self._bind(rows)
        binding.bind_cpu_input("input_ids", input_ids)
        binding.bind_cpu_input("attention_mask", mask)
        if "position_ids" in self.inputs:
            binding.bind_cpu_input("position_ids", past[:, None] + np.arange(input_ids.shape[1]))  # (B, T)
        binding.bind_output("logits", "cpu", 0, np.float32, (len(logits), 1, self.vocab_size), logits.ctypes.data)
        self.session.run_with_iobinding(binding)
        self.lengths[rows] = lengths

    def _bind(self, rows: slice) -> Any:
        """Return the binding of these rows' caches, past and present in one place; made once, as it takes 0.2 ms."""
        key = (rows.start, rows.stop)
        if key not in self.bindings:
            binding = self.bindings[key] = self.session.io_binding()
            binding.bind_cpu_input("num_logits_to_keep", np.array(1, np.int64))
            for name, cache in zip(self.cache_names, self.caches, strict=True):
                held = cache[rows]  # (B, K, C, E), a view
                place = ("cpu", 0, self.cache_type, held.shape, held.ctypes.data)
                binding.bind_input(f"past_key_values.{name}", *place)
                binding.bind_output(f"present.{name}", *place)
        return self.bindings[key]

    def _reserve(self, length: int) -> None:
        """Make room for `length` positions in every slot; double, so that copying stays rare."""
        if length <= self.capacity:
            return
        capacity = max(length, min(2 * self.capacity, self.max_length))
        grown = []
        for i, (_, heads, _, size) in enumerate(self.row_shape):
            cache = np.empty((len(self.lengths), heads, capacity, size), self.cache_type)
            if self.caches:
                cache[:, :, : self.capacity] = self.caches[i]
            grown.append(cache)
        self.caches, self.capacity, self.bindings = grown, capacity, {}


def neighbours(slots: Sequence[int]) -> Iterator[tuple[slice, list[int]]]:
    """Split slots into runs of neighbours, each with its places in `slots`: [4, 1, 0] -> (0:2, [2, 1]), (4:5, [0])."""
    order = sorted(range(len(slots)), key=lambda i: slots[i])
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or slots[order[end]] != slots[order[end - 1]] + 1:
            yield slice(slots[order[start]], slots[order[end - 1]] + 1), order[start:end]
            start = end


def find_graph(folder: Path, dtype: str) -> Path:
    """Return the path of the graph of this dtype; raise an error that names the path and the fix."""
    if dtype not in FILES:
        raise InputError("this dtype is not known to the onnx runtime", found=dtype, expected=", ".join(FILES))
    path = folder / "onnx" / FILES[dtype]
    if not path.is_file():
        torch = 'use runtime="torch", or ' if dtype == "fp32" else ""
        raise InputError(
            f"the {dtype} graph is missing",
            where=str(path),
            found=", ".join(name for name, file in FILES.items() if path.with_name(file).is_file()) or "no graph",
            expected=f"a folder that holds {FILES[dtype]}" if folder.is_dir() else "a folder that exists",
            fix=f"{torch}write it: lmworks export MODEL --to onnx --dtype {dtype} -o OUT",
        )
    return path


def choose_outputs(names: Sequence[str], folder: Path) -> dict[str, str]:
    """Return the graph's outputs to ask for, and what a runtime calls them; raise FormatError where none is known."""
    if "start_logits" in names and "end_logits" in names:
        return {"start_logits": "logits", "end_logits": "logits"}
    if "logits" in names:
        return {name: name for name in ("logits", "features") if name in names}
    for name in STATES:
        if name in names:
            return {name: "hidden_states"}
    raise FormatError(
        "the graph gives nothing that a task reads", where=str(folder), found=", ".join(names),
        expected=f"logits, start_logits and end_logits, or {STATES[0]}", fix="export the model again",
    )  # fmt: skip


def open_session(path: Path, threads: int, *, once: bool = False) -> Any:
    """Open an ONNX Runtime session on the CPU; an unreadable graph is a FormatError that names it."""
    onnxruntime = require("onnxruntime", extra="onnx")
    check_onnx(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if once:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if trace.running is not None:
        trace.running.ask_profile(options)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise FormatError(
            f"{path.name} cannot be loaded", where=str(path), found=str(error).strip(), fix="export the model again"
        ) from None
    if trace.running is not None:
        trace.running.sessions.append(session)
    return session


def read_max_length(folder: Path) -> int:
    """Return the number of positions that config.json states."""
    config = read_json(folder / "config.json")
    value = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(value, int) or value < 1:
        raise FormatError(
            "config.json does not state the number of positions",
            where=str(folder / "config.json"),
            found=f"max_position_embeddings: {value}",
            expected="a whole number above 0",
        )
    return value
