"""Bytes on disk. A module here knows one file format, and no model."""
