"""A decoder's graph in few operators: attention with its cache, rotary embeddings and norms."""
