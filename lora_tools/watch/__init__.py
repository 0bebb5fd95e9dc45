"""Files that are read while something else may write to them."""
