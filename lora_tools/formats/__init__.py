"""Bytes, key names and config dicts ↔ records. No arithmetic."""
