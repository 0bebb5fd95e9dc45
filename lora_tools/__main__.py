"""``python -m lora_tools``: the same as ``loratools``."""

from lora_tools.cli import entry

if __name__ == "__main__":
    entry()
