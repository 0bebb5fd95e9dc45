"""Stored number formats, one file each: the tensors that hold a weight."""
