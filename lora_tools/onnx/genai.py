"""``genai_config.json``: what onnxruntime-genai needs to know of a decoder's graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.regular_files import is_there, read_file
from lora_tools.formats.safetensors_file import strict_json

if TYPE_CHECKING:
    import onnx

NAME = "genai_config.json"
_GENERATION = "generation_config.json"


def retold(old: Path, folder: Path) -> bytes | None:
    """The file of a folder with the same graph, where it is right for this one too, else None.

    What decides it beside the architecture are the special tokens.
    """
    if not is_there(old / NAME):
        return None
    told = [
        (
            read_json(path / _GENERATION),
            {k: v for k, v in read_json(path / "config.json").items() if "token" in k},
        )
        for path in (old, folder)
    ]
    return read_file(old / NAME) if told[0] == told[1] else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; of no file, an empty one. Raises CheckpointError."""
    try:
        found = strict_json(read_file(path)) if is_there(path) else {}
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: does not hold a JSON object")
    return found


def genai_config(folder: Path, graph: onnx.GraphProto, trust_remote_code: bool = False) -> bytes:
    """The file for a decoder with a cache, in the folder of a checkpoint."""
    from lora_tools.onnx.model import read_config

    config = read_config(folder, trust_remote_code)
    text = config.get_text_config(decoder=True)
    generation = read_json(folder / _GENERATION)
    optional = {value.name for value in graph.initializer}
    inputs = {value.name: _shape(value) for value in graph.input if value.name not in optional}
    keys = [name for name in inputs if name.endswith(".key")]
    _, heads, _, size = inputs[keys[0]]
    names = {name: name for name in inputs if not name.startswith("past_key_values.")}
    caches = {f"past_{k}_names": f"past_key_values.%d.{k}" for k in ("key", "value")}
    kept = {f"present_{k}_names": f"present.%d.{k}" for k in ("key", "value")}
    length = getattr(text, "max_position_embeddings", None) or 2048

    def token(name: str) -> Any:
        value = generation.get(name, getattr(text, name, None))
        return value if value is not None else 0

    body = {
        "model": {
            "type": config.model_type,
            "vocab_size": _shape(graph.output[0])[-1],
            "context_length": length,
            "bos_token_id": token("bos_token_id"),
            "eos_token_id": token("eos_token_id"),
            "pad_token_id": _first(generation.get("pad_token_id"), token("eos_token_id")),
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": size,
                "hidden_size": text.hidden_size,
                "num_attention_heads": text.num_attention_heads,
                "num_hidden_layers": len(keys),
                "num_key_value_heads": heads,
                "inputs": {**names, **caches},
                "outputs": {"logits": "logits", **kept},
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
    return (json.dumps(body, indent=2) + "\n").encode()


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _first(given: Any, otherwise: Any) -> Any:
    value = otherwise if given is None else given
    return value[0] if isinstance(value, list) else value
