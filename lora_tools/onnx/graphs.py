"""The graphs of a checkpoint's folder: traced or used again, tied to weights, written, checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from lora_tools.errors import CheckpointError, MismatchError
from lora_tools.formats.checkpoint import Checkpoint, with_theta
from lora_tools.formats.regular_files import is_there
from lora_tools.formats.synced import write_synced
from lora_tools.formats.tensors import as_bytes
from lora_tools.onnx import genai
from lora_tools.onnx.fuse.found import FUSED_OPSET, OPSET, fused, unfused
from lora_tools.onnx.initializers import load
from lora_tools.onnx.linears import is_quantized
from lora_tools.onnx.precision import (
    COMPUTED,
    FLOAT32,
    computed_in,
    has_half_inputs,
    with_float32_inputs,
)
from lora_tools.onnx.runtime_adapters import Branch, Replacement, add_branches, remove_branches
from lora_tools.onnx.sentence import described, with_modules
from lora_tools.onnx.tasks import DECODER, Task
from lora_tools.onnx.weights import (
    BUNDLE,
    Place,
    attach,
    bundle,
    cast,
    check_shapes,
    computed_types,
    detach,
    places,
    weights_of,
)
from lora_tools.records import TensorSpec
from lora_tools.sources.checkpoints import open_checkpoint

if TYPE_CHECKING:
    from lora_tools.linalg.error_feedback import Errors
    from lora_tools.onnx.nbits import FactorOf
    from lora_tools.onnx.quantized import Packing

_COPY_STEP = 8 << 20
_MODULES = "sentence_modules"
# Fields of config.json that say nothing of the graph.
_ABOUT_FILES = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "id2label",
    "label2id",
    "use_cache",
}


@dataclasses.dataclass(frozen=True)
class Built:
    """What was written: files by name in the order in which they should appear, and figures.

    Attributes:
        unused: modules that may get factors, and tensors, that are in no graph.
        quantized, used: names of weights in the graphs, the quantized ones and all.
        formed: transformers forms some of them of several of the checkpoint's tensors.
        bundle: bytes of the file of weights that no file of the checkpoint holds.
        fed: of quantized weights, those whose errors were fed forward, and what that came to.
        fused: operators that stand for many, by kind; unfused: what was to be, and is
            not.
    """

    files: tuple[str, ...]
    nodes: int
    nbytes: int
    cache: bool
    unused: tuple[str, ...] = ()
    quantized: frozenset[str] = frozenset()
    used: frozenset[str] = frozenset()
    formed: bool = False
    bundle: int = 0
    fed: Mapping[str, Errors] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unfused: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Build:
    """The graphs of a checkpoint, to be written into its folder.

    Attributes:
        weights: "shared" or "bundled"; cast: bundled in the dtype that is computed with.
        graph: a graph, or its folder, to be used again instead of tracing.
        made: how they are made, for the graphs' metadata.
        branches, replacements: modules that may get factors at run time, and tensors that may be
            brought whole.
        factor: what rounding errors of ``scheme`` are fed forward by (``onnx.quantized.NBits``).
        dtype: what the graph computes in; half_io: whether it takes and gives that, too.
        fuse: whether attention, rotary embeddings and norms become one operator each.
        scheme: how linear layers are quantized (``onnx.schemes``); with "nf4" the folder's are.
        plain: the folder of the same checkpoint with no weight quantized, if not ``folder``.
    """

    folder: Path
    task: Task
    cache: bool
    weights: str
    cast: bool
    graph: Path | None
    opset: int | None
    trust_remote_code: bool
    made: Mapping[str, str]
    branches: Sequence[Branch] = ()
    replacements: Sequence[Replacement] = ()
    scheme: str | None = None
    plain: Path | None = None
    factor: FactorOf | None = None
    fuse: bool = True
    dtype: str = FLOAT32
    half_io: bool = False

    def write(self) -> Built:
        """Trace them, or take ``graph``, tie them to the weights and write them.

        Raises:
            CheckpointError: the model cannot be traced.
            MismatchError: ``graph`` is not one of this checkpoint's architecture.
            UnsupportedAdapter: a branch has no layer.
        """
        folder = self.folder
        checkpoint = with_modules(open_checkpoint(self.plain or folder), self.task)
        models, converted, why = self._models(checkpoint)
        for file, model in models.items():
            check_shapes(model, checkpoint.specs, file, converted)
        where, quantized, fed = self._places(checkpoint, models, converted)
        extra = [BUNDLE] if any(place.file == BUNDLE for place in where.values()) else []
        unused = add_branches(models, self.branches, self.replacements, formed=bool(converted))
        for file, model in models.items():
            attach(model, where)
            onnx.helper.set_model_props(model, {**self.made, **self._said()})
            write_synced(folder / file, model.SerializeToString(deterministic=True))
        first = next(iter(models.values()))
        cached = any(value.name.startswith("past_key_values.") for value in first.graph.input)
        if self.task.kind == DECODER and cached:
            self._write_genai(first.graph)
            extra.append(genai.NAME)
        files = (*extra, *reversed(models))
        return Built(
            files,
            sum(len(model.graph.node) for model in models.values()),
            sum((folder / file).stat().st_size for file in files),
            cached or len(models) > 1,
            unused,
            quantized,
            frozenset(where) | quantized,
            bool(converted),
            (folder / BUNDLE).stat().st_size if BUNDLE in extra else 0,
            fed,
            fused(models.values()),
            tuple(unfused(first, why)) if self.fuse else (),
        )

    def _models(self, checkpoint: Checkpoint) -> tuple[dict[str, onnx.ModelProto], set[str], str]:
        """The bare graphs by file name, which of their weights transformers forms, and why
        attention is not fused."""
        if self.graph is not None:
            models = _again(self.graph, checkpoint, self.task)
            self._refuse_other_precision(models)
            if not self.fuse and fused(models.values()):
                raise MismatchError(
                    f"{self.graph}: is fused; leave --no-fuse out, or give a graph that was "
                    "exported with it"
                )
            return models, set(), f"not in {self.graph}"
        from lora_tools.onnx.trace import trace  # torch and transformers, which --graph needs not

        trace_with = functools.partial(
            trace,
            checkpoint.path,
            checkpoint.specs,
            self.task,
            cache=self.cache,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype,
        )
        opset = self.opset or (FUSED_OPSET if self.fuse else OPSET)
        fuse = self.fuse and opset >= FUSED_OPSET
        traced = trace_with(fuse=fuse, opset=opset)
        why = "" if fuse else f"its operator needs opset {FUSED_OPSET}"
        why = next((each.unfused for each in traced if each.unfused), why)
        if fuse and not self.opset and not fused(each.model for each in traced):
            traced = trace_with(fuse=False, opset=OPSET)  # which more runtimes know
        models = {each.file: each.model for each in traced}
        if self.dtype != FLOAT32 and not self.half_io:
            for model in models.values():
                with_float32_inputs(model)
        return models, {name for each in traced for name in each.converted}, why

    def _said(self) -> dict[str, str]:
        """What the graphs' metadata says of the graphs."""
        computed = {} if self.dtype == FLOAT32 else {COMPUTED: self.dtype}
        return {**computed, **_modules_said(self.task)}

    def _refuse_other_precision(self, models: Mapping[str, onnx.ModelProto]) -> None:
        for file, model in models.items():
            found = computed_in(model)
            if found != self.dtype:
                raise MismatchError(
                    f"{file} of {self.graph} computes in {found}, not in {self.dtype}; pass "
                    f"--compute-dtype {found}, or export without --graph"
                )
        if self.dtype != FLOAT32 and any(map(has_half_inputs, models.values())) != self.half_io:
            raise MismatchError(
                f"{self.graph}: its inputs and outputs are in "
                f"{FLOAT32 if self.half_io else self.dtype}; "
                f"{'leave --half-io out' if self.half_io else 'pass --half-io'}"
            )

    def _write_genai(self, graph: onnx.GraphProto) -> None:
        """What ONNX Runtime GenAI must know of a decoder."""
        text = genai.retold(_folder(self.graph), self.folder) if self.graph else None
        text = text or genai.genai_config(self.folder, graph, self.trust_remote_code)
        (self.folder / genai.NAME).unlink(missing_ok=True)
        write_synced(self.folder / genai.NAME, text)

    def _places(
        self, checkpoint: Checkpoint, models: Mapping[str, onnx.ModelProto], converted: set[str]
    ) -> tuple[dict[str, Place], frozenset[str], Mapping[str, Errors]]:
        """Where each weight lies, and which are quantized, for which the graphs are changed, and
        error-fed; writes the file of those that no file of the folder holds."""
        names = {name for model in models.values() for name in weights_of(model)}
        stored = open_checkpoint(self.folder, decoded=False)
        state: dict[str, Any] = {}
        if converted:
            from lora_tools.onnx.model import loaded

            state = loaded(checkpoint.path, self.task, self.trust_remote_code).state_dict()
        packed: dict[str, tuple[TensorSpec, ...]] = {}
        how: Packing | None = None
        if self.scheme:
            from lora_tools.onnx.quantized import packing, quantize_linears

            how = packing(
                self.scheme,
                stored,
                checkpoint.config,
                lambda name: state[name] if name in converted else checkpoint.tensor(name),
                self.factor,
            )
            packed = quantize_linears(models.values(), how, checkpoint.outside)
        own = sorted(names - converted - packed.keys())
        shared = self.weights == "shared"
        # Modules beside the transformer may lie outside the folder.
        apart = checkpoint.outside if shared else checkpoint.specs.keys()
        where = places(stored, [name for name in own if name not in apart]) if shared else {}
        if shared and how is not None:
            where |= how.places(packed)
        types = computed_types(models.values()) if self.cast else {}
        specs = [
            dataclasses.replace(spec, dtype=types.get(spec.name, spec.dtype))
            for spec in (checkpoint.specs[name] for name in own if name in apart)
        ]
        specs += [
            TensorSpec(name, types.get(name, "F32"), tuple(state[name].shape))
            for name in sorted(converted - packed.keys())
        ]
        parts = {
            spec.name: spec for each in packed.values() for spec in each if spec.name not in where
        }

        def read(name: str) -> Iterable[memoryview]:
            if how is not None and name in parts:
                yield how.read(name)
                return
            if name in converted:
                yield cast(as_bytes(state[name]), "F32", types.get(name, "F32"))
                return
            raw, kind = checkpoint.raw(name), checkpoint.specs[name].dtype
            for start in range(0, raw.nbytes, _COPY_STEP):
                yield cast(raw[start : start + _COPY_STEP], kind, types.get(name, kind))
                checkpoint.release(name, start, min(start + _COPY_STEP, raw.nbytes))

        specs += parts.values()
        where |= bundle(self.folder / BUNDLE, specs, read) if specs else {}
        return where, frozenset(packed), how.fed if how is not None else {}


def _modules_said(task: Task) -> dict[str, str]:
    """What a graph's metadata says of the modules in it."""
    said = described(task)
    return {_MODULES: said} if said else {}


def _folder(graph: Path) -> Path:
    return graph if graph.is_dir() else graph.parent


def _again(graph: Path, checkpoint: Checkpoint, task: Task) -> dict[str, onnx.ModelProto]:
    """Graphs of another checkpoint of the same architecture, bare."""
    folder, modules = _folder(graph), _modules_said(task)
    models = {}
    for file in task.files():
        model = load(folder / file)
        if model.producer_name != "loratools":
            raise MismatchError(f"{folder / file}: made by {model.producer_name or 'another tool'}")
        if is_quantized(model):
            raise MismatchError(
                f"{folder / file}: its linear layers are quantized; export a graph without --nf4, "
                "--int8 and --int4, and give it with --graph together with these options"
            )
        said = {p.key: p.value for p in model.metadata_props if p.key == _MODULES}
        if said != modules:
            raise MismatchError(
                f"{folder / file}: made with other modules of sentence-transformers "
                f"({said.get(_MODULES, 'none')}) than the checkpoint has "
                f"({modules.get(_MODULES, 'none')}); export without --graph"
            )
        models[file] = model
    _same_config(folder / "config.json", checkpoint)
    for file, model in models.items():
        detach(model)
        remove_branches(model)
        check_shapes(model, checkpoint.specs, str(folder / file))
    return models


def _same_config(path: Path, checkpoint: Checkpoint) -> None:
    if not is_there(path):
        raise CheckpointError(f"{path}: is needed to check whether the graph fits")
    config = genai.read_json(path)
    old, new = with_theta(config), with_theta(checkpoint.config)
    for key in sorted({*old, *new} - _ABOUT_FILES):
        if old.get(key) != new.get(key):
            raise MismatchError(
                f"{path.parent}: its graph is for {key} {old.get(key)!r}, but the checkpoint has "
                f"{new.get(key)!r}; export without --graph"
            )


def check_model(path: Path, linked: bool) -> None:
    """Run onnx's own checker over a graph. Raises CheckpointError.

    Args:
        linked: its weights are hard links, which the checker refuses: they are taken for inputs.
    """
    model: onnx.ModelProto | str = str(path)
    if linked:
        model = onnx.load(path, load_external_data=False)
        for at in reversed(range(len(model.graph.initializer))):
            weight = model.graph.initializer[at]
            if weight.external_data:
                model.graph.input.append(
                    onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
                )
                del model.graph.initializer[at]
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"{path.name}: the onnx checker says: {text:.300}") from None
