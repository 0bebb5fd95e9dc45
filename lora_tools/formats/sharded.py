"""Folders of one model in parts, as distributed training leaves them: which they are, what reads
them, and which are not read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora_tools.errors import CheckpointError, UnsafeInput
from lora_tools.formats import distributed_checkpoint, rank_files
from lora_tools.formats.assembled import Assembled
from lora_tools.formats.regular_files import is_there
from lora_tools.formats.tensor_file import TensorFile

# DeepSpeed's, and the safetensors that torch's HuggingFaceStorageWriter writes for each process.
_DEEPSPEED = re.compile(
    r"(bf16_|fp16_)?zero_pp_rank_\d+_.*\.pt|mp_rank_\d+.*_(model|optim)_states\.pt"
    r"|layer_\d+-model.*_states\.pt"
)
_STEP = re.compile(r"global_step\d+")
_UNMERGED = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
_SHARDING = "DCP_SHARDING_INFO"  # metadata of those
_FSDP = re.compile(r"pytorch_model_fsdp_\d+")  # accelerate's folder of a distributed checkpoint


def refuse_part(path: Path) -> None:
    """Raises CheckpointError for a file that is one part of a model, known by its name."""
    if path.name == distributed_checkpoint.METADATA or path.suffix == ".distcp":
        title = distributed_checkpoint.TITLE
    elif rank_files.is_rank_file(path):
        title = rank_files.TITLE
    elif _DEEPSPEED.fullmatch(path.name):
        raise _of_deepspeed(path.parent, path.name)
    elif _UNMERGED.fullmatch(path.name):
        raise _unmerged(path)
    else:
        return
    raise CheckpointError(f"{path}: one part of {title}; give its folder, {path.parent}")


def refuse_folder(folder: Path) -> None:
    """Raises CheckpointError for a folder of parts that are not read: DeepSpeed's, and one process'
    safetensors each."""
    is_whole = any(folder.glob("*.safetensors"))
    for path in sorted(folder.iterdir()):
        if _DEEPSPEED.fullmatch(path.name) and not is_whole:
            raise _of_deepspeed(folder, path.name)
        if _UNMERGED.fullmatch(path.name):
            raise _unmerged(path)


def refuse_steps(folder: Path) -> None:
    """Raises CheckpointError for a folder in which DeepSpeed's checkpoints lie, and no model."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and _STEP.fullmatch(path.name):
            raise _of_deepspeed(folder, path.name)


def refuse_slices(file: TensorFile) -> None:
    """Raises CheckpointError for slices of tensors, whatever their file is called."""
    said = file.metadata.get(_SHARDING, "")
    if re.search(r'"saved_offsets":\s*\[[\d\s,]*?[1-9]', said):
        raise _unmerged(file.path)


def empty_weights(names: Sequence[str]) -> str:
    """What to say of weights of shape [0]."""
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return (
        f"{names[0]}{more}: empty, of shape [0], because DeepSpeed's ZeRO-3 did not gather the "
        "weights when it saved; run zero_to_fp32.py on its checkpoint, or save with "
        "stage3_gather_16bit_weights_on_model_save"
    )


def _of_deepspeed(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: a checkpoint of DeepSpeed's ZeRO ({what}), which only DeepSpeed can put "
        "together; run the zero_to_fp32.py beside it (python zero_to_fp32.py . OUT "
        "--safe_serialization), and give OUT"
    )


def _unmerged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: the slices of tensors of one process, as torch's HuggingFaceStorageWriter saves "
        "them. They do not say how many processes there were; put them together with torch "
        "(torch.distributed.checkpoint._consolidate_hf_safetensors"
        ".consolidate_safetensors_files(FOLDER, OUT, …)), or save with enable_consolidation=True"
    )


def open_parts(folder: Path, allow_pickle: bool) -> Assembled | None:
    """The model that a folder holds in parts; None where it holds none.

    Raises:
        UnsafeInput: it does, which takes ``allow_pickle``.
        CheckpointError: it is not all there, or in a way that is not read.
    """
    metadata = folder / distributed_checkpoint.METADATA
    files = [] if is_there(metadata) else rank_files.rank_files(folder)
    if not (files or is_there(metadata)):
        return None
    title = rank_files.TITLE if files else distributed_checkpoint.TITLE
    if not allow_pickle:
        raise UnsafeInput(
            f"{folder}: {title}, which consists of pickles; pass --allow-pickle to read it (no "
            "code in it is run), or convert it to safetensors first: loratools dequantize "
            f"{folder} -o OUT --allow-pickle"
        )
    if files:
        return rank_files.RankFiles(files[0])
    return distributed_checkpoint.DistributedCheckpoint(metadata)


def title_of(file: Assembled) -> str:
    """What it was read of, for people."""
    is_ranks = isinstance(file, rank_files.RankFiles)
    return rank_files.TITLE if is_ranks else distributed_checkpoint.TITLE


def home_of(folder: Path) -> Path:
    """Where config.json and the tokenizer of a model in parts lie: beside the parts, in verl's
    ``huggingface``, or beside accelerate's ``pytorch_model_fsdp_0``."""
    places = [folder, folder / "huggingface"]
    if _FSDP.fullmatch(folder.name):
        places.append(folder.parent)
    return next((place for place in places if is_there(place / "config.json")), folder)


def inner_parts(folder: Path) -> list[Path]:
    """Folders in one that hold a model in parts: accelerate's, and verl's ``actor``."""
    found = [
        path
        for path in sorted(folder.iterdir())
        if _FSDP.fullmatch(path.name) and (path / distributed_checkpoint.METADATA).is_file()
    ]
    actor = folder / "actor"
    if actor.is_dir() and any(map(rank_files.is_rank_file, actor.iterdir())):
        found.append(actor)
    return found
