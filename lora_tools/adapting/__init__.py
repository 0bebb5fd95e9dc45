"""What rescale, combine and convert make of adapters: the same effect in another form."""
