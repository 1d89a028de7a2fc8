"""Tokenizers: one wrapper over `tokenizer.json`, their training, and batches of ids."""
