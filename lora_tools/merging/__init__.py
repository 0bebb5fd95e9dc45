"""Adapters added to the weights of a checkpoint, and taken out of them again."""
