"""What a network looks like: one frozen record that every family fills in. Torch-free.

Names follow config.json on the Hub where one exists. A knob enters with the first family that needs it; it picks a
class or a number when the network is made and never branches inside a block. At most 32 of them say how the network
is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lmworks.base.errors import InputError

MOST, MOST_LAYERS = 2**24, 2000  # beyond any published model; a file that claims more is damaged
HIDDEN_ACTS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu")
MOST_DISTANCES = 2**17  # each is held
HEAD_ACTS = (*HIDDEN_ACTS, "tanh")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretching of the slow rotary frequencies (Grattafiori et al. 2024, section 3.2)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """Phi-3's divisors of the rotary frequencies: one set for texts that fit the original context, one for longer ones.

    Cosines and sines are multiplied by `factor` in both (Ding et al. 2024).
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """How queries and keys are rotated, where positions are "rope"."""

    theta: float = 10000.0
    local_theta: float | None = None  # in local layers; None: as elsewhere
    scaling: RopeScaling | LongRope | None = None
    dim: int | None = None  # how much of a head is rotated; None: all of it


@dataclass(frozen=True, kw_only=True)
class Relative:
    """How DeBERTa's attention knows distances, and what it adds to the first layer (models/disentangled.py)."""

    positions: int  # the farthest distance that is told from its neighbours
    buckets: int = 0  # of distances, on either side; 0: each distance has a vector
    terms: tuple[str, ...] = ("c2p", "p2c")
    shared_keys: bool = True  # distances use the matrices of tokens
    norm: bool = False  # of the vectors of distances
    conv_kernel: int = 0  # of a convolution in the first layer; 0: none
    conv_groups: int = 1
    conv_act: str = "tanh"

    @property
    def span(self) -> int:
        """How many vectors there are on either side."""
        return self.buckets or self.positions

    def __post_init__(self) -> None:
        """Raise InputError for numbers that no network can have."""
        near = 1 <= self.positions <= MOST_DISTANCES
        require(near, "max_relative_positions", self.positions, f"1 to {MOST_DISTANCES:,}")
        fits = not self.buckets or (self.buckets >= 4 and self.buckets % 2 == 0 and self.buckets < 2 * self.positions)
        require(fits, "position_buckets", self.buckets, f"even, 4 to {2 * self.positions - 2}")
        require(set(self.terms) <= {"c2p", "p2c"}, "pos_att_type", ", ".join(self.terms), "c2p, p2c")
        require(not self.conv_kernel or self.conv_kernel % 2 == 1, "conv_kernel_size", self.conv_kernel, "odd")
        require(self.conv_groups >= 1, "conv_groups", self.conv_groups, "1 or more")
        require(self.conv_act in HEAD_ACTS, "conv_act", self.conv_act, ", ".join(HEAD_ACTS))


@dataclass(frozen=True, kw_only=True)
class Vision:
    """How an image becomes a sequence: square patches, each projected to one vector, after a class token."""

    image_size: int
    patch_size: int
    num_channels: int = 3

    def __post_init__(self) -> None:
        """Raise InputError for an image that the patches do not cover."""
        for name in ("image_size", "patch_size", "num_channels"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.image_size >= self.patch_size, "patch_size", self.patch_size, f"at most {self.image_size}")


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """A task's head: pool, then dense, act and norm, then project; what is absent is switched off.

    `keys` maps published modules to ours ("dense", "norm", "project"); a published name may also stand for one
    parameter ("project.bias").
    """

    outputs: Literal["none", "labels", "vocab", "span", "two", "one"] = "labels"
    pool: Literal["none", "first", "last", "mean"] = "none"
    dense: bool = False
    dense_bias: bool = True
    act: str = "gelu"
    norm: Literal["none", "layer", "layer_nobias"] = "none"
    bias: bool = True
    keys: Mapping[str, str] = field(default_factory=dict)
    prefix: str | None = None  # of the body's tensors beside this head, where it is not the family's own
    optional: bool = False  # a file without it is whole
    otherwise: Mapping[str, Any] = field(default_factory=dict)  # config.json's keys where a file has other names

    def size(self, c: Config) -> int:
        """How many numbers the head gives for each thing it looks at; 0 without a projection."""
        sizes = {"none": 0, "labels": len(c.labels), "vocab": c.vocab_size, "span": 2, "two": 2, "one": 1}
        return sizes[self.outputs]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The structure of one network, and the tokens that generation needs to know."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_act: str = "gelu_new"
    norm_eps: float = 1e-5
    dropout: float = 0.0  # while training: on embeddings, attention weights, and what a block adds to its stream
    block: Literal["pre", "post", "parallel", "rnn", "lstm", "gru", "feedforward"] = "pre"
    embedding_size: int | None = None  # what a token's vector has before it enters the layers; None: as hidden_size
    layer_groups: int | None = None  # so many layers there are, each of which runs several times; None: each once
    causal: bool = True
    norm: Literal["layer", "layer_nobias", "rms"] = "layer"
    gated: bool = False  # the MLP computes act(gate(x)) * up(x)
    attention_bias: bool = True
    output_bias: bool | None = None  # of attention's last projection; None: as attention_bias
    mlp_bias: bool = True
    qk_norm: bool = False  # each head's queries and keys are divided by their root mean square
    positions: Literal["learned", "rope", "none"] = "learned"
    position_offset: int = 0  # the first token's position: RoBERTa counts from pad_token_id + 1
    rotary: Rotary = Rotary()
    relative: Relative | None = None  # attention that knows how far tokens are apart
    window: int | None = None  # local layers see: causal, the last `window` tokens; else `window` on either side
    local_layers: tuple[int, ...] = ()  # the layers that `window` limits
    type_vocab_size: int = 0  # segments: which text of a pair a token belongs to
    embedding_norm: bool = False
    first_norm: bool = True  # False: no attention norm in layer 0
    final_norm: bool = True
    vision: Vision | None = None  # images instead of tokens
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # by id, for heads that classify
    problem_type: str | None = None  # "single_label_classification", "multi_label_classification", "regression"
    source: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # config.json as it was read

    def __post_init__(self) -> None:
        """Raise InputError for numbers that no network can have."""
        sizes = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
            "intermediate_size max_position_embeddings"
        )
        for name in sizes.split():
            if not (self.vision and name == "vocab_size"):
                most = MOST_LAYERS if name == "num_hidden_layers" else MOST
                require(1 <= getattr(self, name) <= most, name, getattr(self, name), f"1 to {most:,}")
        require(0 <= self.type_vocab_size <= MOST, "type_vocab_size", self.type_vocab_size, f"0 to {MOST:,}")
        grouped = self.num_attention_heads % self.num_key_value_heads == 0
        require(grouped, "num_key_value_heads", self.num_key_value_heads, f"a divisor of {self.num_attention_heads}")
        rotated = self.rotary.dim or self.head_dim
        require(self.positions != "rope" or rotated % 2 == 0, "head_dim", rotated, "even, to be rotated")
        require(0 < rotated <= self.head_dim, "rotary_dim", rotated, f"1 to {self.head_dim}")
        width = self.embedding_size
        require(width is None or 1 <= width <= MOST, "embedding_size", width, f"1 to {MOST:,}")
        groups = self.layer_groups
        require(groups is None or 1 <= groups <= self.num_hidden_layers, "number of groups of layers", groups,
                f"1 to {self.num_hidden_layers}")  # fmt: skip
        require(self.window is None or self.window >= 1, "window", self.window, "1 or more")
        require(len(self.labels) >= 1, "number of labels", len(self.labels), "1 or more")
        require(self.hidden_act in HIDDEN_ACTS, "hidden_act", self.hidden_act, ", ".join(HIDDEN_ACTS))
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "0 or more, below 1")

    @property
    def max_tokens(self) -> int:
        """How many tokens fit: RoBERTa's first positions are never used."""
        return self.max_position_embeddings - self.position_offset

    @property
    def turn(self) -> int | None:
        """The length beyond which texts are rotated by other frequencies; None where there is none."""
        scaling = self.rotary.scaling
        return scaling.original_max_position_embeddings if isinstance(scaling, LongRope) else None


def require(good: bool, name: str, found: object, expected: str) -> None:
    """Raise InputError unless `good`."""
    if not good:
        raise InputError(f"no network can have this {name}", found=str(found), expected=expected)
