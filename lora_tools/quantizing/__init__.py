"""Checkpoints put into other number formats, and made plain again."""
