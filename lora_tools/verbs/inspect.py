"""``inspect``: what is this file?"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import CheckpointError, UsageError
from lora_tools.formats import digest as hashing
from lora_tools.formats import hub
from lora_tools.formats import sidecar as sidecars
from lora_tools.formats.activations import MARK as ACTIVATIONS
from lora_tools.formats.adapters.peft import CONFIG, Adapter, LoraModule
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.regular_files import is_there
from lora_tools.formats.spectra import MARK as SPECTRA
from lora_tools.formats.stand_ins import StandIn
from lora_tools.inspecting.on_the_hub import on_the_hub
from lora_tools.inspecting.onnx_model import open_model
from lora_tools.inspecting.spectrum import check_plot, drawn, shown, summary
from lora_tools.linalg.layouts import of_form
from lora_tools.linalg.ranks import Spectrum
from lora_tools.linalg.scaling import scaling
from lora_tools.onnx.files import onnx_graphs
from lora_tools.options import View
from lora_tools.records import (
    FLOAT_DTYPES,
    Input,
    ModuleSpectrum,
    ProgressCallback,
    Report,
    TensorFacts,
    TensorSpec,
)
from lora_tools.sources.adapters import is_adapter, open_adapter
from lora_tools.sources.checkpoints import as_plain, open_checkpoint
from lora_tools.sources.dequantized import Dequantized
from lora_tools.totals import InspectTotals
from lora_tools.verbs.frame import Call, Look, verb

if TYPE_CHECKING:
    from lora_tools.formats.tensor_file import TensorFile


@dataclasses.dataclass(frozen=True)
class _Thing:
    """What was found: files of tensors, and for an adapter its modules."""

    kind: str
    files: tuple[TensorFile, ...]
    facts: InspectTotals
    notes: tuple[str, ...] = ()
    adapter: Adapter | None = None
    places: Mapping[str, str] = dataclasses.field(default_factory=dict)  # where not in the file
    folder: Path | None = None


_BY_HEADERS = "only headers were read, because the file is remote: there is no digest"
_STABLE_RANK = "stable rank: ‖s·B·A‖² / σ₁², roughly how many directions a change has"


@verb
def inspect(call: Call, path: str | Path, view: View) -> Look:
    """Say what a file or folder is: in the report's ``stored`` each stored tensor, in ``spectra``
    an adapter's modules, in ``totals`` what kind of thing it is, and oddities in ``notes``.

    Args:
        path: a checkpoint, an adapter, a quantized folder, an ONNX model, a sidecar, a spectrum
            cache, a file of activation statistics, or a hub id.

    Raises:
        UsageError: ``plot`` for something that is no adapter.
        LoraToolsError: it cannot be read, or is nothing that is known here.
    """
    target = check_plot(view.plot)
    given = hub.here(path, call.running.allow_pickle)
    thing = _open(given, call.running.allow_pickle)
    if given.is_dir():
        thing = dataclasses.replace(thing, folder=given)
    if target is not None and (thing.adapter is None or not thing.adapter.modules):
        raise UsageError(
            f"--plot: {path} is not an adapter with factors; for two checkpoints, use diff --plot"
        )

    def run() -> Report[InspectTotals]:
        report = _described(call, path, thing)
        if target is None:
            return report
        title = f"{shown(path)}: the adapter's own change, s·B·A"
        return drawn(report, title, _STABLE_RANK, target)

    folder = thing.files[0].path.parent
    data = (folder / name for name in set(thing.places.values()))
    return Look((*(file.path for file in thing.files), *data), run)


def _described(call: Call, path: str | Path, thing: _Thing) -> Report[InspectTotals]:
    """Every tensor looked at, and the report."""
    tensors = [
        dataclasses.replace(t, file=thing.places.get(t.tensor, t.file))
        for t in _facts(thing, call.running.jobs, call.running.progress)
    ]
    hashes = {t.tensor: t.hash for t in tensors if t.hash}
    specs = [spec for file in thing.files for spec in file.specs.values()]
    is_read = not any(_stays(thing, file) for file in thing.files)
    spectra = _spectra(thing.adapter, call.running.jobs) if thing.adapter is not None else ()
    totals: InspectTotals = {
        "kind": thing.kind,
        "tensors": len(tensors),
        "numbers": sum(s.numel for s in specs),
        "tensor_bytes": sum(t.nbytes for t in tensors),
        "dtypes": dict(Counter(t.dtype for t in tensors).most_common()),
        "metadata": {file.path.name: dict(file.metadata) for file in thing.files},
        **thing.facts,
    }
    if thing.folder is not None:
        totals["hub"] = on_the_hub(thing.folder)
    return call.report(
        (Input("path", str(path), hashing.digest(specs, hashes) if is_read else ""),),
        spectra=spectra,
        stored=tuple(tensors),
        totals=totals,
        notes=(*thing.notes, *([] if is_read else [_BY_HEADERS]), *_oddities(tensors, spectra)),
    )


def _open(given: Path, allow_pickle: bool) -> _Thing:
    graphs = onnx_graphs(given)
    if graphs:
        model = open_model(graphs)
        return _Thing(
            "ONNX model", model.graphs, {"graphs": model.facts}, model.notes, places=model.places
        )
    if (given.is_file() and is_there(given.parent / CONFIG)) or is_adapter(given, allow_pickle):
        return _open_adapter(given, allow_pickle)
    if given.suffix == ".sidecar" and given.is_file():
        sidecar = sidecars.Sidecar(given)
        facts: InspectTotals = {
            "base_digest": sidecar.base_digest,
            "adapters": len(sidecar.adapters),
        }
        return _Thing("sidecar of a reversible merge", (sidecar.file,), facts)
    checkpoint = open_checkpoint(given, allow_pickle, decoded=False, pipelines=True)
    marks = checkpoint.files[0].metadata
    for mark, kind in ((SPECTRA, "spectrum cache"), (ACTIVATIONS, "activation statistics")):
        if mark in marks:
            return _Thing(kind, checkpoint.files, {})
    return _open_weights(checkpoint)


def _open_adapter(path: Path, allow_pickle: bool) -> _Thing:
    adapter = open_adapter(path, allow_pickle, as_stored=True, guess=True)
    modules = adapter.modules.values()
    parts = [
        name
        for name, there in (
            ("DoRA", adapter.use_dora),
            ("rsLoRA", adapter.use_rslora),
            ("biases", any(m.bias for m in modules)),
            ("tensors saved whole", adapter.whole),
            ("differences of norms or biases", adapter.differences),
            ("trained tokens", adapter.tokens),
        )
        if there
    ]
    parts += sorted({change.kind.title for change in adapter.changes.values()})
    facts: InspectTotals = {
        "format": adapter.form,
        "ranks": sorted({m.r for m in modules}),
        "alphas": sorted({m.alpha for m in modules}),
        "modules": len(adapter.modules),
        "saved_whole": len(adapter.whole),
        "with": parts,
        "targets": sorted({_layer(m.name) for m in modules}),
        "target_modules": adapter.config.get("target_modules"),
        "base_model_name_or_path": adapter.config.get("base_model_name_or_path"),
    }
    notes = [*adapter.notes]
    if adapter.unresolved:
        notes.append(f"{adapter.unresolved}: modules have their names in the file")
    files = getattr(adapter.stored, "files", (adapter.stored,))
    return _Thing("adapter", files, facts, tuple(notes), adapter)


def _layer(module: str) -> str:
    """What a module is called in each of a model's layers: what comes after their number, and with
    underscores for dots, too."""
    last = re.split(r"[._]\d+[._](?=\D)", module)[-1]
    return last if "_" in module and "." not in module else module.rpartition(".")[2]


def _open_weights(checkpoint: Checkpoint) -> _Thing:
    config, notes = checkpoint.config, [*checkpoint.notes]
    facts: InspectTotals = {
        "architectures": config.get("architectures"),
        "model_type": config.get("model_type"),
        "files": [file.path.name for file in checkpoint.files],
    }
    kind = "checkpoint"
    try:
        view, sign = as_plain(checkpoint)
    except CheckpointError as error:  # broken, or in a variant that is not read: still looked at
        kind, view, sign = "quantized checkpoint", checkpoint, None
        notes.append(f"quantized, and the other commands cannot read it: {error}")
    if isinstance(view, Dequantized):
        kind = f"checkpoint in {view.scheme.title}"
        facts["quantized"] = view.scheme.facts(view.quantized)
        if config:
            faults = view.scheme.faults(config, checkpoint.specs, view.quantized)
            notes += [f"config.json {said}" for said in faults]
    elif sign is not None:
        kind = f"quantized checkpoint ({sign.title})"
    if sign is not None:
        notes.append(
            f"quantized (by {sign.where}), and the other commands cannot read it; {sign.advice}"
        )
    if checkpoint.pipeline is not None:
        root = checkpoint.pipeline.root
        apart = [path.relative_to(root).as_posix() for path in checkpoint.pipeline.files()]
        if apart:
            notes.append(f"outside the transformer, and not in these figures: {', '.join(apart)}")
    head, embedding = checkpoint.weights.tied_pair
    if head:
        stored = "is stored anyway" if head in checkpoint.specs else "not stored"
        notes.append(f"{head} is tied to {embedding}, and {stored}")
    return _Thing(kind, checkpoint.files, facts, tuple(notes))


def _stays(thing: _Thing, file: TensorFile) -> bool:
    """Whether a file's header will do: its tensors lie elsewhere, and are many."""
    return thing.adapter is None and isinstance(file, StandIn)


def _facts(thing: _Thing, jobs: int | None, progress: ProgressCallback | None) -> list[TensorFacts]:
    from lora_tools.engine import threads
    from lora_tools.engine.tasks import Call

    tasks = [
        Call(_head if _stays(thing, file) else _look, (i, spec), spec.name, spec.nbytes)
        for i, file in enumerate(thing.files)
        for spec in file.specs.values()
    ]
    return list(threads.run(tasks, (thing.files,), None, jobs=jobs, progress=progress))


def _head(place: int, spec: TensorSpec, files: Sequence[TensorFile]) -> TensorFacts:
    """What the header of one of the files says of a tensor."""
    return TensorFacts(spec.name, spec.dtype, spec.shape, spec.nbytes, files[place].path.name, "")


def _look(place: int, spec: TensorSpec, files: Sequence[TensorFile]) -> TensorFacts:
    """One tensor of one of the files."""
    file, odd = files[place], []
    value = hashing.tensor_hash(file.raw(spec.name))
    if not spec.numel:
        odd.append("empty")
    elif spec.is_float:
        tensor = file.tensor(spec.name)
        low, high = (float(x) for x in tensor.aminmax())  # NaN propagates
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~tensor.isfinite()).sum())
            odd.append(f"{bad:,} of {spec.numel:,} are inf or NaN")
        elif low == high == 0:
            odd.append("all zero")
    file.release(spec.name)
    return TensorFacts(
        spec.name, spec.dtype, spec.shape, spec.nbytes, file.path.name, value, tuple(odd)
    )


def _oddities(tensors: Sequence[TensorFacts], spectra: Sequence[ModuleSpectrum]) -> list[str]:
    notes = [f"{t.tensor}: {odd}" for t in tensors for odd in t.oddities]
    first: dict[tuple[str, tuple[int, ...]], str] = {}
    for t in tensors:
        matrix = t.dtype in FLOAT_DTYPES and sum(n > 1 for n in t.shape) > 1
        # Masks, positions, statistics may be alike.
        if matrix and t.hash and "all zero" not in t.oddities:
            known = first.setdefault((t.hash, t.shape), t.tensor)
            if known != t.tensor:
                notes.append(f"{t.tensor}: the same bytes as {known}")
    notes += [f"{s.module}: its factors multiply to zero" for s in spectra if not s.norm]
    return notes


def _spectra(adapter: Adapter, jobs: int | None) -> tuple[ModuleSpectrum, ...]:
    from lora_tools.engine import threads
    from lora_tools.engine.tasks import Call

    tasks = [Call(_spectrum, (m,), m.module) for m in adapter.modules.values()]
    return tuple(threads.run(tasks, (adapter,), None, jobs=jobs))


def _spectrum(module: LoraModule, adapter: Adapter) -> ModuleSpectrum:
    """Of s·B·A, from the factors."""
    from lora_tools.linalg import lora

    A, B = adapter.tensor(module.A), adapter.tensor(module.B)
    scale = scaling(module.alpha, module.r, adapter.use_rslora)
    layout = of_form(module.form, **module.parameters)[0].of_factors(tuple(A.shape), tuple(B.shape))
    shape = (*((module.experts,) if module.experts else ()), B.shape[0], *A.shape[1:])
    named: dict[str, Any] = {
        "module": module.name,
        "layout": layout.name,
        "shape": shape,
        "rank": module.r,
        "alpha": module.alpha,
        "scaling": scale,
    }
    finite = bool(A.isfinite().all() and B.isfinite().all())
    products = (
        [lora.resize(*product)[1] * scale for product in layout.split(A, B)] if finite else []
    )
    total = math.fsum(float((S * S).sum()) for S in products)
    if not total:
        return ModuleSpectrum(
            norm=0.0 if finite else math.nan,
            relative_change=math.nan,
            stable_rank=math.nan,
            energy={},
            noise_floor=math.nan,
            spectrum=(),
            **named,
        )
    parts = [Spectrum(S * S, float((S * S).sum()), True) for S in products]
    return summary(parts, total, math.nan, **named)
