"""Files that stay where they are: read by ranges of bytes, and written once they are complete."""
