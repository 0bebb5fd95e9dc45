"""Checkpoints put into four bits, and made plain again."""
