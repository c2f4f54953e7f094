"""Modules: parameters around the operations of `lumen.ops`. They know a `ModelSpec`, but no text, data or run."""
