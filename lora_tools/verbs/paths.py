"""Every path of one call, read or written: nothing is written over, into or around another."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import OutputError, UsageError
from lora_tools.formats.output import Prepared, check_destination, overlap, real, refuse_overlap
from lora_tools.sources.weighted import split_weight
from lora_tools.verbs.row import Verb, called

_PLAN = "--plan"
_BESIDE = (".sidecar", "_data", ".data")  # what belongs to a file and is read with it


@dataclasses.dataclass
class Paths:
    """What is read and what is written.

    Attributes:
        inputs: as found on the disk; what is not there cannot be written over.
        outputs: by the option that names them; the report aside.
        kept: those of them that stay where they are and are replaced, such as a cache.
        into: the input that is the output, too, where files are only put into it.
    """

    inputs: list[Path]
    outputs: dict[str, Path]
    kept: dict[str, Path]
    report: Path | None
    into: Path | None = None

    @classmethod
    def of(
        cls, verb: Verb, given: Mapping[str, Any], asked: Mapping[str, Any], report: Path | None
    ) -> Paths:
        """All that the arguments and options of a call name."""
        read = {a.name: given[a.name] for a in verb.arguments if a.name != "out"}
        several = {a.name for a in verb.arguments if a.several}
        outputs = {"--out": Path(given["out"])} if verb.writes else {}
        kept = {}
        for keyword in verb.keywords:
            value = getattr(asked[called(keyword.record)], keyword.name)
            role = keyword.option.path if keyword.option is not None else ""
            if role in ("input", "tensors") and value is not None:
                read[keyword.name] = value
                several |= {keyword.name} if keyword.several else set()
            elif role == "output" and value is not None:
                kept[keyword.flag] = Path(value)
        paths = cls([], outputs | kept, kept, report)
        for name, value in read.items():
            places = [_without_weight(v) for v in value] if name in several else [value]
            paths.read(Path(place) for place in places if exists(place))
        if verb.adds_to and _same(given[verb.adds_to], given["out"]):
            paths.into = paths.outputs.pop("--out").resolve()
        return paths

    def read(self, inputs: Iterable[Path]) -> None:
        """Note more that is read."""
        self.inputs += [each for path in inputs for each in _reached(path)]

    def write(self, prepared: Prepared, out: Path) -> None:
        """Note all that this will write."""
        if prepared.added:
            self.outputs.pop("--out", None)
            self.into = out.resolve()
        for name in prepared.added:
            self.outputs[f"--out/{name}"] = out / name
        for suffix in {*prepared.beside, *prepared.dropped}:
            self.outputs[f"--out{suffix}"] = out.with_name(out.name + suffix)

    def check(self, dry_run: bool) -> None:
        """Refuse what would be written over an input, or twice.

        Raises:
            OutputError: an output is an input, or one contains the other.
            UsageError: two outputs are, or the report is one of either.
        """
        if self.report is not None:
            self._check_report(self.report)
        outputs = self._written(self.outputs, dry_run)
        for path in outputs.values():
            for source in self.inputs:
                if real(source) != self.into:
                    refuse_overlap(path, source)
        for (name, path), (other, place) in itertools.combinations(outputs.items(), 2):
            if overlap(path, place):
                raise UsageError(
                    f"{name} {path} and {other} {place} are the same, or one is inside the other; "
                    "choose another place for one of them"
                )

    @staticmethod
    def _written(outputs: Mapping[str, Path], dry_run: bool) -> Mapping[str, Path]:
        """Those that are written: by a dry run the plan alone."""
        return {name: outputs[name] for name in {_PLAN} & outputs.keys()} if dry_run else outputs

    def check_kept(self, dry_run: bool = False) -> None:
        """Raises OutputError where what is kept beside the output cannot be written."""
        for name, path in self._written(self.kept, dry_run).items():
            if path.is_dir():
                raise OutputError(f"{name} {path}: is a folder; name a file")
            check_destination(path, force=True)

    def _check_report(self, report: Path) -> None:
        for source in self.inputs:
            if overlap(report, source):
                raise UsageError(
                    f"--report {report}: is the input {source}, or is inside it; choose another "
                    "file"
                )
        for name, path in self.outputs.items():
            if overlap(report, path):
                raise UsageError(
                    f"--report {report}: is the output of {name}, or is inside it; choose another "
                    "file"
                )


def exists(path: str | Path) -> bool:
    """Whether something is there; False for what no path can be, such as an overlong name."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises then


def _same(one: str | Path, other: str | Path) -> bool:
    return exists(one) and exists(other) and Path(one).resolve() == Path(other).resolve()


def _without_weight(given: Any) -> str | Path:
    path: str | Path = given[0] if isinstance(given, tuple) else split_weight(str(given))[0]
    return path


def _reached(path: Path) -> Iterator[Path]:
    """An input, and what is read with it: where the links in a folder lead, what lies beside a
    file and belongs to it."""
    yield path
    if path.is_dir():
        yield from _links(path, 1)  # a pipeline has its models one folder deep
    else:
        yield from (p for s in _BESIDE if exists(p := path.with_name(path.name + s)))


def _links(folder: str | Path, depth: int) -> Iterator[Path]:
    with contextlib.suppress(OSError):  # what cannot be listed is not read either
        for entry in os.scandir(folder):
            if entry.is_symlink():
                yield Path(entry.path)
            elif depth and entry.is_dir():
                yield from _links(entry.path, depth - 1)
