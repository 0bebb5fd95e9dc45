"""What lies at a path, opened: checkpoints, adapters of any format, names."""
