"""What ``extract`` and ``diff`` do with a pair of checkpoints."""
