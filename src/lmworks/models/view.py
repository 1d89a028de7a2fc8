"""Who may look at whom: the mask and the positions of one forward.

Shapes: B batch, T new tokens, S keys (past and new; without a cache S = T).

Two classes answer alike: `Whole` here, for sequences without a past, and the cache's `Call`. A mask is True where a
token may look; None hides nothing, and then the kernel itself may be asked to hide the future, which is fastest.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

Look = tuple[Tensor | None, bool]  # a mask (B or 1, 1, T or 1, S) or None; is the kernel to hide the future?


class View(Protocol):
    """What a forward asks."""

    position_ids: Tensor  # (B or 1, T), counted from 0 at a row's first token

    def look(self, window: int | None) -> Look:
        """Return what a layer that sees this window, or everything, may look at."""
        ...


class Whole:
    """Sequences without a past, padded on either side: padding is not counted and never looked at.

    A token of padding sees itself: a row of scores that hides everything would be NaN, and NaN spreads.
    """

    def __init__(self, x: Tensor, attention_mask: Tensor | None, *, causal: bool) -> None:
        """Look at the shape (B, T) of `x`, its device, and the mask (B, T): 1 on tokens, 0 on padding."""
        self.T, self.device, self.causal = x.shape[1], x.device, causal
        self.real = None if attention_mask is None else attention_mask.bool()
        if self.real is None:
            self.position_ids = torch.arange(self.T, device=self.device)[None]  # (1, T)
        else:
            self.position_ids = (self.real.cumsum(1) - 1).clamp(min=0)  # (B, T)

    def look(self, window: int | None) -> Look:
        """Return a mask (B or 1, 1, T or 1, T) or None, and whether the kernel is to hide the future."""
        near = window is None or window >= self.T  # everything is inside the window
        if self.real is None and near:
            return None, self.causal
        if self.real is not None and near and not self.causal:
            return self.real[:, None, None], False
        place = torch.arange(self.T, device=self.device)
        behind = place[:, None] - place  # (T, T): how far a key lies behind a query
        sees = behind >= 0 if self.causal else torch.ones_like(behind, dtype=torch.bool)  # (T, T)
        if window is not None:
            sees &= behind < window if self.causal else behind.abs() <= window
        if self.real is not None:
            sees = sees & self.real[:, None, :] | (behind == 0)  # (B, T, T)
        return (sees if sees.ndim == 3 else sees[None])[:, None], False
