"""Texts: reading, cleaning, splitting, and the built-in constructed language."""
