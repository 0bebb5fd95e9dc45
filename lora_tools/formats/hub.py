"""``org/name[@revision]`` → a local folder, through huggingface_hub, its cache and offline mode."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora_tools.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.metadata", "*.distcp")
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.py", "LICENSE*")


def looks_like_hub_id(source: str) -> bool:
    """True for ``org/name`` with an optional ``@revision``."""
    return _HUB_ID.fullmatch(source) is not None


def fetch(source: str, allow_pickle: bool = False) -> Path:
    """The snapshot folder of a hub repository; only weights and small files are fetched.

    ``HF_HOME``, ``HF_HUB_OFFLINE`` and ``HF_TOKEN`` are honoured by huggingface_hub.

    Raises:
        CheckpointError: not reachable, not there, or offline and not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = source.partition("@")
    patterns: Sequence[str] = (*_WEIGHTS, *_SMALL, *(_PICKLES if allow_pickle else ()))
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=list(patterns)
        )
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{source}: not a local path, and not in the hub's local cache; the hub could not be "
            "reached or HF_HUB_OFFLINE is set. Fetch it first with `hf download`"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{source}: {first}") from None
    return Path(folder)
