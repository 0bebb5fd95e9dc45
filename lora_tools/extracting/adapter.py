"""The adapter that an extraction writes, out of what each pair of tensors came to."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import MismatchError
from lora_tools.extracting.decompose import Decomposition, Sides
from lora_tools.extracting.pair_tasks import Outcome, digests_of
from lora_tools.extracting.pairs import Plan
from lora_tools.extracting.saved_whole import complete_saved, save_alone
from lora_tools.extracting.totals import extract_totals, noise_note, uncovered
from lora_tools.formats.adapters.consumers import Consumer
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import EMBEDDING
from lora_tools.formats.output import staged
from lora_tools.provenance import tool_version
from lora_tools.records import Action, Fate, Input, Report
from lora_tools.sources.as_loaded import named_by
from lora_tools.sources.auto_class import class_fields, identified
from lora_tools.totals import ExtractTotals

if TYPE_CHECKING:
    from lora_tools.formats.adapters.peft_writer import PeftWriter
    from lora_tools.formats.spectra import Spectra


@contextlib.contextmanager
def kept_spectra(keep: Path | None, scratch: Path, needed: bool) -> Iterator[Spectra | None]:
    """Where decompositions are kept: nowhere, on disk meanwhile, or in a file for later."""
    from lora_tools.formats.spectra import Spectra

    if keep is None and not needed:
        yield None
        return
    spectra = Spectra(scratch, keep if keep is not None and os.path.lexists(keep) else None)
    try:
        yield spectra
        if keep is not None and spectra.changed:
            with staged(keep, force=True) as staging:
                spectra.finish(staging / "out", tool_version())
    finally:
        spectra.close()


def extract_adapter(
    found: Iterator[Outcome],
    sides: Sides,
    plan: Plan,
    options: Decomposition,
    folder: Path,
    inputs: Sequence[Input],
    command: str,
    conform: Callable[[Path, Consumer, Checkpoint], None],
) -> Report[ExtractTotals]:
    """Write the adapter to ``folder``; ``conform`` rewrites it for one that reads one rank."""
    from lora_tools.formats.adapters.peft_writer import PeftWriter

    folder.mkdir()
    writer = PeftWriter(folder)
    outcomes: list[Outcome] = []
    try:
        for outcome in found:
            _add(outcome, sides[1], options, writer)
            outcome.lora = None
            outcomes.append(outcome)
        if not writer.ranks:
            same = all(outcome.action == Action.UNCHANGED for outcome in outcomes)
            raise MismatchError(
                "nothing changed from BASE to TUNED, and PEFT does not load an adapter without "
                "factors; is TUNED the right model?"
                if same
                else "no module has a low-rank change, and PEFT does not load an adapter without "
                "factors; do the options leave out everything that changed, or does the rank "
                "policy choose rank 0?"
            )
        notes = list(plan.notes)
        if options.consumer.loads:
            notes += complete_saved(outcomes, plan, sides[1], writer)
        else:
            save_alone(outcomes, sides[1], writer)
        notes += [*_unweighted(outcomes, options), *uncovered(outcomes)]
        digests = digests_of(outcomes, sides)
        _finish(writer, plan, options, outcomes, digests, command, sides)
    finally:
        writer.close()
    if not options.consumer.patterns:
        conform(folder, options.consumer, sides[0])
    place = {pair: i for i, pair in enumerate(plan.pairs)}
    outcomes.sort(key=lambda outcome: place[outcome.pair])
    modules = tuple(o.result for o in outcomes if o.result is not None)
    totals = extract_totals(outcomes, folder)
    notes += noise_note(totals, sides)
    return Report(
        "extract",
        tool_version(),
        (
            *(dataclasses.replace(i, digest=d) for i, d in zip(inputs, digests, strict=False)),
            *inputs[2:],
        ),
        "",
        False,
        (
            *(Fate(o.pair.name, o.action, o.reason or o.pair.reason) for o in outcomes),
            *plan.settled,
        ),
        modules,
        totals,
        tuple(notes),
        command=command,
    )


_LEAVE_OUT = {"embedding": "--embeddings skip"}


def _unweighted(outcomes: Sequence[Outcome], options: Decomposition) -> list[str]:
    """What activations were given and do not weigh."""
    results = [o.result for o in outcomes if o.result is not None]
    left = [r for r in results if math.isnan(r.weighted_error)]
    if options.activations is None or not left:
        return []
    kinds = ", ".join(sorted({r.layout for r in left}))
    return [
        f"--activations was not used for {len(left)} of {len(results)} modules ({kinds}; "
        f"{left[0].module}{', …' if left[1:] else ''}): the file does not have them, or layers "
        "of their kind have no single input"
    ]


def _add(outcome: Outcome, tuned: Checkpoint, options: Decomposition, writer: PeftWriter) -> None:
    pair = outcome.pair
    if outcome.lora is not None:
        lora_A, lora_B, alpha = outcome.lora
        assert pair.layout is not None
        form = pair.layout.written
        reformed = form == "experts" and options.consumer.stacked  # ``conform`` sees to it
        if form not in options.consumer.forms and not reformed:
            raise options.consumer.refuse(
                f"factors of a layer of kind {pair.layout.name} ({pair.name} changed)",
                f"leave it out with {_LEAVE_OUT.get(form, '--exclude')}, or extract for peft",
            )
        writer.add_lora(
            pair.module, lora_A, lora_B, alpha, form=form, parameter=pair.parameter, r=outcome.r
        )
        if pair.followed_by and not options.consumer.head:
            raise options.consumer.refuse(
                f"factors of an embedding that is also the output head ({pair.name} changed)",
                "leave it out with --embeddings skip, or extract for peft",
            )
        for module in pair.followed_by:
            if EMBEDDING.fullmatch(module.rpartition(".")[2]):
                writer.add_lora(module, lora_A, lora_B, alpha, form="embedding")
            else:  # The same delta as a Linear's: its weight is stored as the embedding's is.
                writer.add_lora(module, lora_B.T.contiguous(), lora_A.T.contiguous(), alpha)
    elif outcome.action == Action.SAVED_WHOLE and not options.consumer.saved:
        raise options.consumer.refuse(
            f"tensors saved whole ({pair.name} changed)",
            "leave such changes out with --rest skip (and --embeddings lora or skip), or extract "
            "for peft",
        )


def _is_tied_by_peft(outcome: Outcome) -> bool:
    """Whether PEFT is to tie what follows. Of what is saved whole it ties heads alone (0.21 takes
    every follower for a linear layer); embeddings have their own copies then."""
    followers = (module.rpartition(".")[2] for module in outcome.pair.followed_by)
    if outcome.action == Action.SAVED_WHOLE:
        return bool(outcome.pair.followed_by) and not any(map(EMBEDDING.fullmatch, followers))
    return bool(outcome.pair.followed_by) and outcome.action == Action.DECOMPOSED


def _finish(
    writer: PeftWriter,
    plan: Plan,
    options: Decomposition,
    outcomes: Sequence[Outcome],
    digests: tuple[str, str],
    command: str,
    sides: tuple[Checkpoint, Checkpoint],
) -> None:
    transposed = any(
        o.pair.layout.transposed and o.pair.layout.written == "matrix"
        for o in outcomes
        if o.result is not None and o.pair.layout is not None
    )
    config: dict[str, Any] = {"use_rslora": options.rslora, "fan_in_fan_out": transposed}
    if any(map(_is_tied_by_peft, outcomes)):
        config["ensure_weight_tying"] = True
    config = identified(config, sides[0], options.base_name, writer.ranks, writer.saved)
    if any(o.pair.base is None and o.action == Action.SAVED_WHOLE for o in outcomes):
        # A head that the base lacks is of the class that the tuned one is.
        config |= {"task_type": None, "auto_mapping": None}
        config |= class_fields(sides[1].config, writer.ranks, writer.saved)
    metadata = {
        "loratools": tool_version(),
        "command": command,
        "base_digest": digests[0],
        "tuned_digest": digests[1],
    }
    names = named_by(sides[0])
    if names:
        metadata["names"] = names
    if options.activations is not None:
        metadata["activations_digest"] = options.activations.digest
    writer.finish(config, plan.modules, metadata)
