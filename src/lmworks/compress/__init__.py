"""Smaller models: fewer bits, fewer weights, fewer ranks, and the choice among them by measurement."""
