"""Ids of the Hugging Face Hub → local folders, through huggingface_hub, its cache and offline mode.

A repository is listed first, and of it is fetched what the reader opens: the small files, and of
each folder the one set of weights that its index names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError, LoraToolsError, UnsafeInput, first_line
from lora_tools.formats import variants
from lora_tools.formats.hub_progress import bar_of, without_bars
from lora_tools.formats.stand_ins import OF_RUNS, stand_ins
from lora_tools.remote import urls
from lora_tools.remote.stores import store_of

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_PART = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(
    rf"(?P<repository>{_PART}(/{_PART})?)(?P<subfolder>(/{_PART})*)(@(?P<revision>[\w./-]+))?"
)
_PAGE = re.compile(
    rf"https?://(www\.)?(huggingface\.co|hf\.co)/(?P<repository>{_PART}/{_PART}|{_PART})"
    rf"(/(tree|blob|resolve)/(?P<revision>[^/?#]+)(?P<subfolder>(/{_PART})*))?/?([?#].*)?"
)
# As huggingface_hub's own file system has it: the revision stands before the path.
_HF = re.compile(
    rf"hf://(?P<repository>{_PART}/{_PART})(@(?P<revision>refs/\w+/[\w.-]+|[\w.-]+))?"
    rf"(?P<subfolder>(/{_PART})*)/?"
)
_CACHED = re.compile(r"models--(.+)")
# Of one name, these are files that were meant to be here.
_FILES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".json", ".npz", ".sidecar",
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PARTS = (".metadata", ".distcp")  # of a distributed checkpoint
_SMALL = (
    ".json", ".jsonl", ".txt", ".model", ".spm", ".bpe", ".vocab", ".codes", ".tiktoken", ".jinja",
    ".md", ".py",
)  # fmt: skip
_INDEX = ".index.json"
# Folders of a repository that are no part of the model, and copies of the weights in other names or
# numbers: Mistral's, and those that diffusers calls variants.
_NO_PART = re.compile(rf"(\..*|{OF_RUNS})")
_TWIN = re.compile(r"consolidated[.-].*|.*\.(fp16|bf16|fp32|non_ema|ema)[.-].*")
_LEFT = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state)[\w.-]*")


@dataclasses.dataclass(frozen=True)
class HubId:
    """What a hub id names.

    Attributes:
        repository: ``org/name``, or ``name`` of the first models.
        revision: a branch, tag or commit; None for ``main``.
        subfolder: a folder or file in it; "" for all of it.
    """

    repository: str
    revision: str | None = None
    subfolder: str = ""

    def __str__(self) -> str:
        inside = f"/{self.subfolder}" if self.subfolder else ""
        return f"{self.repository}{inside}" + (f"@{self.revision}" if self.revision else "")


def parse(source: str) -> HubId | None:
    """``org/name[/subfolder][@revision]``, ``name``, ``hf://org/name[@revision][/subfolder]``, or
    the address of its page on the hub; None for what is none of these, such as a path to a file."""
    match = _PAGE.fullmatch(source) or _HF.fullmatch(source) or _ID.fullmatch(source)
    if match is None or (":" not in source and _means_a_file(source)):
        return None
    found = HubId(match["repository"], match["revision"], (match["subfolder"] or "").strip("/"))
    return None if any(p.strip(".") == "" for p in str(found).split("/")) else found


def _means_a_file(source: str) -> bool:
    """Whether it is a file's name, or its first part a folder here: then the path has a mistake."""
    first, _, rest = source.partition("/")
    return (not rest and first.endswith(_FILES)) or (bool(rest) and os.path.isdir(first))  # noqa: PTH112


def looks_like_hub_id(source: str) -> bool:
    """Whether ``parse`` knows it as one."""
    return parse(source) is not None


def in_cache(path: Path) -> tuple[str, str | None] | None:
    """The repository that a snapshot of the hub's cache is of, and its commit where that is not
    ``main``; None for any other path, also for what lies in a snapshot."""
    place = Path(os.path.abspath(path))  # noqa: PTH100 - the snapshot's files are links
    match = _CACHED.fullmatch(place.parent.parent.name)
    if match is None or place.parent.name != "snapshots":
        return None
    main = place.parent.parent / "refs" / "main"
    is_main = main.is_file() and main.read_text(errors="replace").strip() == place.name
    return match[1].replace("--", "/"), None if is_main else place.name


def here(source: str | Path, allow_pickle: bool = False, *, by_headers: bool = False) -> Path:
    """The path itself where something is there, or where it can be no hub id; else ``fetch``.

    Raises:
        CheckpointError: it is an address that is none of the hub's.
    """
    if os.path.exists(source):  # noqa: PTH110 - overlong names
        return Path(source)
    address, made = urls.url(source), stand_ins()
    if looks_like_hub_id(address or str(source)):
        return fetch(address or str(source), allow_pickle, by_headers=by_headers)
    if address and made is not None and store_of(address) is not None:
        return made.at(address)
    if address:
        how = f"download it first ({urls.fetcher(address)}) or mount it, and give the local path"
        if address.startswith("hf:"):
            how = "hf://org/name[@revision][/folder] names a model of the hub"
        raise CheckpointError(
            f"{urls.shown(address)}: inputs are files and folders here, and models of the hub; "
            f"{how}"
        )
    return Path(source)


def fetch(source: str, allow_pickle: bool = False, *, by_headers: bool = False) -> Path:
    """The local folder (or file) that a hub id stands for, fetched as far as it is not there yet.

    Args:
        by_headers: of safetensors files that are not there, headers will do for a plan. Of an
            ``hf://`` they always do, in a call: their tensors are read where they are
            (``remote``).

    ``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT`` and ``HF_TOKEN`` are honoured by
    huggingface_hub.

    Raises:
        CheckpointError: not reachable, not there, not allowed, or offline and not in the cache; or
            several of its folders hold weights.
    """
    from huggingface_hub import snapshot_download

    wanted = parse(source)
    if wanted is None:
        raise CheckpointError(f"{source}: not a hub id")
    with _plainly(source, wanted), without_bars():
        names, trouble = _listed(wanted)
        # Of what is in the cache the reader sees itself whether it is complete.
        chosen = _chosen(wanted, names, allow_pickle) if trouble is None else []
        made = stand_ins()
        stays = made is not None and (source.startswith("hf:") or (by_headers and made.is_plan))
        remote = _not_here(wanted, chosen) if stays else []
        small = [name for name in chosen if name not in remote]
        try:
            folder = Path(
                snapshot_download(
                    wanted.repository,
                    revision=wanted.revision,
                    allow_patterns=[glob.escape(name) for name in small],
                    local_files_only=trouble is not None,
                    tqdm_class=bar_of(wanted.repository),
                )
            )
        except FileNotFoundError:
            if trouble is not None:
                raise trouble from None
            raise
        if remote and made is not None:
            folder = made.snapshot(folder, wanted.repository, small, remote)
    path = folder / wanted.subfolder
    if not path.exists():
        raise CheckpointError(
            f"{source}: the local cache of the hub has no {wanted.subfolder} of it"
        )
    return path


def _not_here(wanted: HubId, names: list[str]) -> list[str]:
    """The safetensors files of these that are not in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    def is_here(name: str) -> bool:
        return isinstance(
            try_to_load_from_cache(wanted.repository, name, revision=wanted.revision), str
        )

    return [name for name in names if name.endswith(".safetensors") and not is_here(name)]


def _listed(wanted: HubId) -> tuple[list[str], Exception | None]:
    """All files of a repository, or why they cannot be listed."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        info = HfApi().model_info(wanted.repository, revision=wanted.revision)
    except HfHubHTTPError as error:
        return [], error
    except Exception as error:  # no connection: of requests or httpx, by huggingface_hub's version
        return [], LocalEntryNotFoundError(first_line(error))
    return [each.rfilename for each in info.siblings or ()], None


def _chosen(wanted: HubId, names: list[str], allow_pickle: bool) -> list[str]:
    """The files of a repository to be fetched."""
    if wanted.subfolder in names:
        return [wanted.subfolder]
    root = f"{wanted.subfolder}/" if wanted.subfolder else ""
    mine = [name for name in names if name.startswith(root)]
    if not mine:
        raise CheckpointError(
            f"{wanted}: no folder or file {wanted.subfolder!r} in {wanted.repository}; it holds "
            f"{_some(sorted({name.partition('/')[0] for name in names}))}"
        )
    folders: dict[str, list[str]] = {}
    for name in mine:
        folder, _, last = name.removeprefix(root).rpartition("/")
        if not any(map(_NO_PART.fullmatch, folder.split("/"))):
            folders.setdefault(folder, []).append(last)
    weights = {f: _weights(wanted, root + f, each, allow_pickle) for f, each in folders.items()}
    weights = {folder: each for folder, each in weights.items() if each}
    if not weights:
        _refuse_others(wanted, [os.path.join(f, name) for f in folders for name in folders[f]])  # noqa: PTH118
    parts = {"model_index.json", "modules.json"} & set(folders.get("", ()))
    if "model_index.json" in parts and len(weights) > 1:
        weights.pop("", None)  # all of its models in one file, once more
    if "" in weights and not parts:
        weights = {"": weights[""]}
    elif len(weights) > 1 and not parts:
        raise CheckpointError(
            f"{wanted}: has no weights itself, but {len(weights)} folders in it do: "
            f"{_some(sorted(weights))}; give {wanted.repository}/{root}{min(weights)}"
        )
    found = [root + os.path.join(f, name) for f, each in weights.items() for name in each]  # noqa: PTH118
    for folder, each in folders.items():
        small = [n for n in each if n.endswith(_SMALL) and not n.endswith(_INDEX)]
        small += [n for n in each if n.startswith(("LICENSE", "NOTICE")) and n not in small]
        found += [root + os.path.join(folder, name) for name in small]  # noqa: PTH118
    return sorted(set(found))


def _refuse_others(wanted: HubId, names: list[str]) -> None:
    """Raises UnsafeInput, CheckpointError where there are weights of which none is fetched."""
    root = f"{wanted.subfolder}/" if wanted.subfolder else ""
    pickles = [
        name
        for name in names
        if name.endswith((*_PICKLES, *_PARTS)) and not _LEFT.fullmatch(name.rpartition("/")[2])
    ]
    if pickles:
        raise UnsafeInput(
            f"{wanted}: its weights are pickles, which can hold code ({_some(pickles)}); pass "
            "--allow-pickle to download them and to read them with weights_only=True"
        )
    models = [name for name in names if name.endswith(".gguf")]
    if models:
        at = f"@{wanted.revision}" if wanted.revision else ""
        raise CheckpointError(
            f"{wanted}: holds GGUF files ({_some(models)}); give one of them, such as "
            f"{wanted.repository}/{root}{models[0]}{at}"
        )


def _weights(wanted: HubId, folder: str, names: list[str], allow_pickle: bool) -> list[str]:
    """Names of one folder's weights: those of its index, the one file of the usual name, or all
    that are no twins of others. Pickles are taken only where there is nothing else."""
    for suffix in (".safetensors", *(_PICKLES if allow_pickle else ())):
        there = [n for n in names if n.endswith(suffix) and not _LEFT.fullmatch(n)]
        if mine := [n for n in there if variants.variant_of(n) == variants.wanted()]:
            named = [n for n in names if variants.plain(n).endswith(suffix + _INDEX)]
            return mine + [n for n in named if variants.variant_of(n) == variants.wanted()]
        indexes = [n for n in names if n.endswith(suffix + _INDEX)]
        plain = [n for n in indexes if not _TWIN.fullmatch(n)] or indexes
        if plain:
            usual = [n for n in plain if n.startswith(("model.", "pytorch_model."))] or plain
            index = sorted(usual)[0]
            return [index, *_named_by(wanted, f"{folder}/{index}".lstrip("/"), there)]
        for usual_name in (f"model{suffix}", f"pytorch_model{suffix}", f"adapter_model{suffix}"):
            if usual_name in there:
                return [usual_name]
        found = [n for n in there if not _TWIN.fullmatch(n)] or there
        if found:
            return found
    return [n for n in names if allow_pickle and n.endswith(_PARTS)]


def _named_by(wanted: HubId, index: str, there: list[str]) -> list[str]:
    """The files that an index of the repository names, as far as they are there: what else is
    wrong with it, its reader says."""
    from huggingface_hub import hf_hub_download

    from lora_tools.formats.regular_files import read_file
    from lora_tools.formats.safetensors_file import strict_json

    path = Path(hf_hub_download(wanted.repository, index, revision=wanted.revision))
    said = strict_json(read_file(path))
    names = said.get("weight_map") if isinstance(said, dict) else None
    files = names.values() if isinstance(names, dict) else ()
    return sorted({name for name in files if isinstance(name, str)} & set(there))


@contextlib.contextmanager
def _plainly(source: str, wanted: HubId) -> Iterator[None]:
    """What huggingface_hub raises, as one line with the next step."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page, name = f"https://huggingface.co/{wanted.repository}", wanted.repository
    try:
        yield
    except LoraToolsError:
        raise
    except LocalEntryNotFoundError:
        said = (
            "no such file or folder, and not in the hub's local cache (the hub could not be "
            f"reached, or HF_HUB_OFFLINE is set); download it first with `hf download {name}`"
        )
    except GatedRepoError:
        said = (
            f"the model is gated; ask for access at {page}, then run `hf auth login` (or set "
            "HF_TOKEN)"
        )
    except RevisionNotFoundError:
        said = (
            f"the hub has {name}, but no revision {wanted.revision!r} of it; see {page}/tree/main"
        )
    except RepositoryNotFoundError:
        said = (
            f"no such file or folder, and the hub shows no model {name}; is the name right? For a "
            "private model, log in with `hf auth login` (or set HF_TOKEN)"
        )
    except EntryNotFoundError as error:
        said = first_line(error)
    except HfHubHTTPError as error:
        said = _of_status(error, page)
    except (OSError, ValueError, RuntimeError) as error:
        said = first_line(error)
    else:
        return
    raise CheckpointError(f"{source}: {said}") from None


def _of_status(error: HfHubHTTPError, page: str) -> str:
    status = error.response.status_code if error.response is not None else 0
    if status in (401, 403):
        return (
            f"the hub refused access ({status}); log in with `hf auth login` (or set HF_TOKEN), "
            f"and see whether you have access at {page}"
        )
    if status == 429:
        return "the hub allows no more requests for now (429); wait, or log in with `hf auth login`"
    return first_line(error)


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", …" if names[8:] else "")
