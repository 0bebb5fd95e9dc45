"""What ``verify`` compares, and what it finds."""
