"""What ``inspect`` and ``diff`` find out about files."""
