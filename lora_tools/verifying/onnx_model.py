"""Is an ONNX model a checkpoint, or base + adapter? First by its weights, one by one; then by what
it computes, in ONNX Runtime against torch."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import MismatchError, UsageError, need
from lora_tools.figures import Total
from lora_tools.formats import digest as hashing
from lora_tools.formats.alignment import align
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.merging.in_memory import merged_in
from lora_tools.merging.plan import MergePlan, adapter_digest, plan_merge
from lora_tools.merging.prepare import merge_for_now
from lora_tools.merging.targets import Target
from lora_tools.options import Running
from lora_tools.records import Action, Fate, Input, ProgressCallback, TensorSpec, counted
from lora_tools.sentences import offence as outputs_differ
from lora_tools.sources.weighted import Weighted
from lora_tools.totals import VerifyTotals
from lora_tools.verifying.findings import FINE, Findings
from lora_tools.verifying.merged import Checked, check_tensor, diagnosis, merge_totals
from lora_tools.verifying.onnx_quantized import Packed, check_packed

if TYPE_CHECKING:
    import torch

    from lora_tools.onnx.initializers import GraphWeights
    from lora_tools.onnx.outputs import Check

_NO_FAULT = (*FINE, Action.CONSTANT, Action.LEFT_OUT, Action.UNNAMED)


@dataclasses.dataclass(frozen=True)
class GraphRun:
    """How a model is run: see ``export``."""

    task: str
    atol: float
    rtol: float | None
    trust_remote_code: bool


def verify_onnx(
    paths: Sequence[Path],
    source: Checkpoint,
    weighted: Sequence[Weighted],
    run: GraphRun | None,
    allow_pickle: bool,
    jobs: int | None,
    progress: ProgressCallback | None,
) -> Findings:
    """Compare every initializer with the tensor that it is named after, and then the outputs.

    Args:
        run: None: the weights only.

    Raises:
        MismatchError: with the weights only, some of them have no names to be compared by.
    """
    to_run = ("onnxruntime", "transformers") if run else ()
    need("verify of an ONNX model", "onnx", "onnx", *to_run)
    from lora_tools.onnx.initializers import GraphWeights

    plan = plan_merge(source, weighted)
    found = _compare_weights(GraphWeights(paths), plan, source, jobs, progress)
    name = "base + adapter" if weighted else "the checkpoint"
    inputs = _inputs(found.checked, found.weights, source, weighted)
    wrong = [fate for fate in found.fates if fate.action not in _NO_FAULT]
    if wrong:
        offence = diagnosis(found.checked, wrong, f"its weights are not those of {name}")
        return Findings(inputs, found.fates, f"not {name}", offence, found.totals(), found.notes)
    if found.strangers and run is None:
        raise MismatchError(
            f"{paths[0]}: {counted(len(found.strangers), 'weight')}, such as {found.strangers[0]} "
            f"{found.weights.specs[found.strangers[0]].dtype}, match no tensor of the checkpoint "
            "by name or numbers (they may be quantized or made from several tensors), so the "
            "model must be run to compare them; leave --weights-only out"
        )
    verdict = _verdict(found.checked, found.packed, found.weights, source, name)
    if found.strangers:
        verdict += f", for those that have names ({len(found.strangers)} do not)"
    if run is None:
        notes = (*found.notes, "the model was not run")
        return Findings(inputs, found.fates, verdict, "", found.totals(), notes)
    dtype = _cast(found.checked, found.weights, source)
    check = _compare(paths, source, weighted, run, dtype, bool(found.packed), allow_pickle)
    offence = f"not {name}: {outputs_differ(check.totals())}" if check.failed else ""
    if check.failed:
        verdict = f"not {name}"
    else:
        verdict += f"; its outputs are torch's, to {check.absolute:.2g}"
    totals: VerifyTotals = {**found.totals(), **check.totals()}
    notes = (*found.notes, check.note) if check.note else found.notes
    return Findings(inputs, found.fates, verdict, offence, totals, notes)


@dataclasses.dataclass(frozen=True)
class _Compared:
    """What the weights of a model came to.

    Attributes:
        checked, packed: those named after a tensor, plain and quantized.
        by_content: how many have a tensor's numbers under another name.
        strangers: those that are no tensor's.
    """

    weights: GraphWeights
    checked: Sequence[Checked]
    packed: Sequence[Packed]
    by_content: int
    strangers: Sequence[str]
    fates: tuple[Fate, ...]
    notes: tuple[str, ...]

    def totals(self) -> VerifyTotals:
        """Figures over all of them."""
        specs = self.weights.specs
        return {
            **merge_totals(self.checked),
            "weights_compared": len(self.checked) + self.by_content + len(self.packed),
            "weights_unnamed": len(self.strangers),
            **_packed_totals(self.packed),
            "dtypes": dict(Counter(specs[c.target.spec.name].dtype for c in self.checked)),
        }


def _compare_weights(
    weights: GraphWeights,
    plan: MergePlan,
    source: Checkpoint,
    jobs: int | None,
    progress: ProgressCallback | None,
) -> _Compared:
    """Find the tensor of each initializer, by its name or its numbers, and compare the two."""
    from lora_tools.engine import threads
    from lora_tools.engine.tasks import Call
    from lora_tools.onnx.initializers import large

    every = (*plan.targets, *plan.untied)
    packed: list[Packed] = []
    parts: set[str] = set()
    if not weights.problems:
        packed, parts = check_packed(weights, {t.spec.name: t for t in every}, source)
    targets, there, sentence = _named(weights, parts, plan, source)
    there |= {p.target.spec.name for p in packed}
    tasks = [Call(check_tensor, (t,), t.spec.name, 4 * t.spec.numel) for t in targets]
    checked = list(threads.run(tasks, (weights, source), None, jobs=jobs, progress=progress))
    fates = [p.fate for p in sorted(packed, key=lambda p: -p.relative_error)]
    fates += [c.fate for c in checked]
    fates += [Fate(name, Action.BROKEN, said) for name, said in weights.problems.items()]
    named = {target.spec.name for target in targets}
    rest = {n: s for n, s in weights.specs.items() if n not in named | parts}
    unnamed = {name: spec for name, spec in rest.items() if large(spec)}
    fates += [Fate(name, Action.CONSTANT) for name in rest.keys() - unnamed.keys()]
    by_content = _by_content(weights, unnamed, every, source)
    fates += [
        Fate(name, Action.SAME, f"{target.spec.name}{how}")
        for name, (target, how) in by_content.items()
    ]
    strangers = [name for name in unnamed if name not in by_content]
    fates += [
        Fate(name, Action.UNNAMED, "no tensor of the checkpoint has its name or its numbers")
        for name in strangers
    ]
    there |= {target.spec.name for target, _ in by_content.values()}
    fates += _absent([t for t in every if t.spec.name not in there], there, bool(strangers), source)
    notes = [*plan.notes, *([f"its names: {sentence}"] if sentence else []), *_left_out(fates)]
    return _Compared(
        weights, checked, packed, len(by_content), strangers, tuple(fates), tuple(notes)
    )


def _named(
    weights: GraphWeights, parts: set[str], plan: MergePlan, source: Checkpoint
) -> tuple[list[Target], set[str], str]:
    """For each initializer named after a tensor that tensor under the initializer's name, the names
    of these tensors, and a sentence on prefixes."""
    known = {target.spec.name: target for target in (*plan.targets, *plan.untied)}
    head, embedding = source.weights.tied_pair
    if head:
        known.setdefault(head, known[embedding])
    inside = {n: weights.renamed.get(n, n) for n in weights.specs if n not in parts}
    mapping, sentence = align(list(dict.fromkeys(inside.values())), list(known))
    targets, found = [], set()
    for name, inner in inside.items():
        target = known.get(mapping[inner])
        if target is not None:
            found.add(target.spec.name)
            spec = dataclasses.replace(target.spec, name=name)
            targets.append(dataclasses.replace(target, spec=spec))
    return targets, found, sentence


def _by_content(
    weights: GraphWeights,
    unnamed: Mapping[str, TensorSpec],
    targets: Sequence[Target],
    source: Checkpoint,
) -> dict[str, tuple[Target, str]]:
    """Initializers that have a tensor's numbers under another name, as other exporters write the
    weights of linear layers, transposed."""
    shapes = {(spec.dtype, spec.shape) for spec in unnamed.values()}
    known: dict[tuple[str, tuple[int, ...], str], tuple[Target, str]] = {}
    for target in targets:
        ways = (("", target.spec.shape), (", transposed", target.spec.shape[::-1]))
        for dtype in sorted({dtype for dtype, wanted in shapes if wanted in dict(ways).values()}):
            merged, _ = merged_in(target, source, dtype)
            for how, shape in ways:
                if (dtype, shape) in shapes:
                    value = _hash_of(merged, bool(how))
                    known.setdefault((dtype, shape, value), (target, how))
    if not known:
        return {}
    keys = {
        name: (spec.dtype, spec.shape, hashing.tensor_hash(weights.raw(name)))
        for name, spec in unnamed.items()
    }
    return {name: known[key] for name, key in keys.items() if key in known}


def _hash_of(tensor: torch.Tensor, transposed: bool) -> str:
    from lora_tools.formats.tensors import as_bytes

    return hashing.tensor_hash(as_bytes(tensor.T if transposed else tensor))


def _packed_totals(packed: Sequence[Packed]) -> VerifyTotals:
    total = Total.of((p.energy, p.error) for p in packed)
    return {"quantization_error": total.relative_error} if total.energy else {}


def _absent(
    targets: Sequence[Target], present: Collection[str], strangers: bool, source: Checkpoint
) -> Iterator[Fate]:
    """The checkpoint's tensors that no initializer is named after. A graph leaves out what it does
    not compute with, such as a pooler; but not in one layer what it has in others."""
    kinds = {_kind(name) for name in present}
    depth = source.config.get("num_hidden_layers")
    for target in targets:
        name = target.spec.name
        layer = re.search(r"\blayers?\.(\d+)\.", name)
        beyond = layer is not None and isinstance(depth, int) and int(layer[1]) >= depth
        if strangers:
            yield Fate(name, Action.LEFT_OUT, "no initializer has its name")
        elif _kind(name) in kinds and not beyond:
            yield Fate(name, Action.MISSING, "the graph has others of this kind")
        else:
            yield Fate(name, Action.LEFT_OUT, "the graph has none of this kind")


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _left_out(fates: Sequence[Fate]) -> list[str]:
    names = [fate.tensor for fate in fates if fate.action == Action.LEFT_OUT]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"not in the graph: {', '.join(names[:3])}{more}"] if names else []


def _verdict(
    checked: Sequence[Checked],
    packed: Sequence[Packed],
    weights: GraphWeights,
    source: Checkpoint,
    name: str,
) -> str:
    exact = all(c.fate.action in (Action.SAME, Action.COPIED) for c in checked)
    pairs = {
        (source.specs[c.target.base_name].dtype, weights.specs[c.target.spec.name].dtype)
        for c in checked
    }
    casts = [f"{before} stored as {after}" for before, after in sorted(pairs) if before != after]
    said = [f"its weights are those of {name}", *casts]
    if packed:
        same = sum(p.fate.action == Action.SAME for p in packed)
        said.append(f"{same} of {len(packed)} quantized ones byte for byte as export writes them")
    others = " the others" if packed else ""
    return ", ".join([*said, ("bit for bit" if exact else "to rounding") + others])


def _inputs(
    checked: Sequence[Checked],
    weights: GraphWeights,
    source: Checkpoint,
    weighted: Sequence[Weighted],
) -> tuple[Input, ...]:
    stored = {c.target.spec.name: c.hashes[1] for c in checked}
    hashes = {c.target.base_name: c.hashes[0] for c in checked}
    return (
        Input("onnx", "", weights.digest(stored)),
        Input("against", "", source.digest(hashes)),
        *(Input("adapter", "", adapter_digest(w.adapter)) for w in weighted),
    )


def _cast(checked: Sequence[Checked], weights: GraphWeights, source: Checkpoint) -> str | None:
    """The dtype that the graph's weights were rounded to, for torch to start from the same."""
    targets = [c.target for c in checked if c.target.spec.is_float]
    targets = [target for target in targets if target.base_name not in source.outside]
    there = {weights.specs[target.spec.name].dtype for target in targets}
    before = {source.specs[target.base_name].dtype for target in targets}
    return there.pop() if len(there) == 1 and before != there else None


def _compare(
    paths: Sequence[Path],
    source: Checkpoint,
    weighted: Sequence[Weighted],
    run: GraphRun,
    dtype: str | None,
    quantized: bool,
    allow_pickle: bool,
) -> Check:
    """Run it against torch; base + adapter lies in a temporary folder meanwhile."""
    from lora_tools.engine.threads import one_torch_thread
    from lora_tools.onnx.check import compare
    from lora_tools.onnx.initializers import load
    from lora_tools.onnx.sentence import plain, sentence_task

    if not (source.is_folder and source.config):
        raise UsageError(
            f"{source.path}: a folder with a config.json is needed to run it; or use --weights-only"
        )
    task, _ = sentence_task(source.pipeline, source.config, run.task)
    outputs = {value.name for value in load(paths[0]).graph.output}
    if task.steps and not outputs.issuperset(task.outputs):  # made of the transformer alone
        task = plain(task)
    if len(paths) != len(task.files()):
        raise UsageError(f"{paths[0].parent}: --task {task.name} needs {', '.join(task.files())}")
    if dtype is None and source.scheme is not None:
        dtype = next(s.dtype for name, s in source.specs.items() if source.decoded_bytes(name))
    with tempfile.TemporaryDirectory(prefix="loratools-") as scratch, one_torch_thread():
        folder = source.path
        if weighted or dtype:
            folder = Path(scratch) / "merged"
            merge_for_now(
                source.path,
                [(w.path, w.weight) for w in weighted],
                folder,
                str(torch_dtype(dtype)).removeprefix("torch.") if dtype else None,
                Running(allow_pickle=allow_pickle),
            )
        if quantized:
            from lora_tools.onnx.quality import examine

            return examine(
                paths[0].parent,
                task,
                _has_cache(paths),
                plain=folder,
                quantized=True,
                original=False,
                rows=None,
                atol=run.atol,
                rtol=run.rtol,
                trust_remote_code=run.trust_remote_code,
            )[0]
        return compare(
            folder,
            task,
            cache=_has_cache(paths),
            atol=run.atol,
            rtol=run.rtol,
            graphs=paths,
            trust_remote_code=run.trust_remote_code,
        )


def _has_cache(paths: Sequence[Path]) -> bool:
    from lora_tools.onnx.initializers import load

    return len(paths) > 1 or any(
        value.name.startswith("past_key_values.") for value in load(paths[0]).graph.input
    )
