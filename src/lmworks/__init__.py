"""lmworks: turn your text, or a published checkpoint, into a small model that gives the same answers everywhere."""

from __future__ import annotations

__version__ = "0.1.0"
