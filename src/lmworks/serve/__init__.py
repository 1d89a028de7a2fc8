"""Serving a model folder over HTTP: its page, completions in OpenAI's shape, and health. No torch."""
