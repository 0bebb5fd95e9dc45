"""Pure tensors in, tensors out: no paths, no module names, no formats."""
