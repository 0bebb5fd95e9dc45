"""What guards data is refused, by name and with nothing written: one row a refusal.

A row makes its input, and says of the error its kind and its words.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import lora_tools
from lora_tools.errors import (
    AdapterError,
    CheckpointError,
    MismatchError,
    NonFiniteError,
    UnsafeInput,
    UnsupportedAdapter,
    UsageError,
)

from .refusals import (
    BIG,
    EMBED,
    INF,
    NAN,
    NORM,
    UP,
    Q,
    Row,
    X,
    bare,
    base,
    check,
    cut,
    diff,
    dora,
    edited,
    embedding,
    extract,
    factors,
    filled,
    indexed,
    made_for,
    merge,
    merged,
    peft,
    sidecar_of_next_year,
    stats,
    two_alike,
    whole,
)

PAIRS: dict[str, Row] = {
    "extract, two prefixes fit alike": (
        MismatchError,
        r"the names.*or the prefix",
        lambda t: extract(
            t, bare(t, "b", a__x__weight=X, b__x__weight=X), bare(t, "t", x__weight=X)
        ),
    ),
    "diff, two prefixes fit alike": (
        MismatchError,
        r"the names.*in more than one way .*; rename one side",
        lambda t: diff(t, two_alike(t), bare(t, "t", x__weight=X)),
    ),
    "merge, two prefixes fit alike": (
        MismatchError,
        r"the names.*in more than one way",
        lambda t: lora_tools.merge(
            two_alike(t), [peft(t, "a", factors("x", 4, 4))], t / "out.safetensors"
        ),
    ),
    "no name in common": (
        MismatchError,
        r"have no tensor name in common \(x\.weight, … against y\.weight, …\)",
        lambda t: extract(t, bare(t, "b", x__weight=X), bare(t, "t", y__weight=X)),
    ),
    "another shape": (
        MismatchError,
        r"model\.q_proj\.weight: base is \(8, 8\), tuned is \(9, 8\); are they the same archit",
        lambda t: extract(t, base(t), base(t, "t", q_weight=torch.ones(9, 8))),
    ),
    "a grown vocabulary": (
        MismatchError,
        r"base is \(6, 8\), tuned is \(7, 8\); was the vocabulary resized\? --embeddings save",
        lambda t: extract(t, base(t), base(t, "t", embed_weight=torch.ones(7, 8))),
    ),
    "--rest error and a norm changed": (
        MismatchError,
        r"model\.norm\.weight: changed, and it has no low-rank form; --rest save keeps it",
        lambda t: extract(t, base(t), base(t, "t", 1.0), rest="error"),
    ),
    "--rest error and a new tensor": (
        MismatchError,
        r"y\.weight: is only on the tuned side; --rest save",
        lambda t: extract(
            t, bare(t, "b", x__weight=X), bare(t, "t", x__weight=2 * X, y__weight=X), rest="error"
        ),
    ),
    "nothing changed": (
        MismatchError,
        "PEFT does not load an adapter without factors",
        lambda t: extract(t, base(t), base(t, "t")),
    ),
    "a NaN on the base's side": (
        NonFiniteError,
        r"model\.q_proj\.weight: the base side holds an inf or a NaN",
        lambda t: extract(t, base(t, q_weight=NAN), base(t, "t")),
    ),
    "an inf on the tuned side": (
        NonFiniteError,
        r"model\.q_proj\.weight: the tuned side holds an inf or a NaN",
        lambda t: extract(t, base(t), base(t, "t", q_weight=INF)),
    ),
    "a NaN that would be saved whole": (
        NonFiniteError,
        r"model\.norm\.weight: cannot be saved whole, because one side holds an inf or a NaN",
        lambda t: extract(t, base(t), base(t, "t", norm_weight=NAN[0])),
    ),
    "diff of a NaN in a norm": (
        NonFiniteError,
        r"model\.norm\.weight: the tuned side holds an inf or a NaN",
        lambda t: diff(t, base(t), base(t, "t", norm_weight=NAN[0])),
    ),
    "factors that overflow their dtype": (
        NonFiniteError,
        r"model\.q_proj\.weight: its factors overflow torch\.float16; choose a wider one",
        lambda t: extract(
            t, base(t), base(t, "t", q_weight=1e12 * torch.eye(8)), dtype="float16", exclude=["up"]
        ),
    ),
    "a spectrum cache of other weights": (
        CheckpointError,
        "was decomposed from other weights than these; give --spectrum-cache another file",
        lambda t: [
            lora_tools.extract(
                base(t, f"b{i}"),
                base(t, f"t{i}", q_weight=torch.eye(8) * (i + 1)),
                t / ("first" if i == 0 else "out"),
                spectrum_cache=t / "cache",
            )
            for i in range(2)
        ],
    ),
    "statistics of other widths": (
        MismatchError,
        r"model\.q_proj has 5 inputs, and the checkpoint's model\.q_proj has 8; was it collected",
        lambda t: extract(t, base(t), base(t, "t", 1.0), activations=stats(t, {Q: torch.eye(5)})),
    ),
    "statistics that hold a NaN": (
        CheckpointError,
        r"model\.q_proj holds an inf or a NaN",
        lambda t: extract(t, base(t), base(t, "t", 1.0), activations=stats(t, {Q: NAN})),
    ),
    "statistics of another model": (
        MismatchError,
        r"none of the modules .*; was it collected on this model",
        lambda t: extract(t, base(t), base(t, "t", 1.0), activations=stats(t, {"z": NAN})),
    ),
}


ADAPTERS: dict[str, Row] = {
    "a key without a tensor": (
        AdapterError,
        r"model\.x\.weight matches no tensor of .*; is this the right base\? --allow-unmatched",
        lambda t: merge(t, peft(t, tensors=factors() | factors("model.x"))),
    ),
    "no key with a tensor": (
        AdapterError,
        r"no key of .* matches",
        lambda t: merge(t, peft(t, tensors=factors("z")), allow_unmatched=True),
    ),
    "two replace one tensor": (
        AdapterError,
        r"model\.norm\.weight: .* and .* each replace it whole; merge one of them only",
        lambda t: merge(
            t,
            peft(t, "a", factors() | whole(), modules_to_save=["norm"]),
            peft(t, "b", factors() | whole(), modules_to_save=["norm"]),
        ),
    ),
    "factors of another width": (
        MismatchError,
        r"model\.q_proj: base is \(8, 8\), the factors are for \(out, in\) = \(8, 7\)",
        lambda t: merge(t, peft(t, tensors=factors(cols=7))),
    ),
    "a saved tensor of another shape": (
        MismatchError,
        r"model\.norm\.weight: base is \(8,\), .* has \(9,\)",
        lambda t: merge(t, peft(t, tensors=factors() | whole(NORM, 1.0, 9))),
    ),
    "a sum that overflows": (
        NonFiniteError,
        r"model\.q_proj\.weight: the merged tensor holds an inf or a NaN in torch\.float16",
        lambda t: lora_tools.merge(
            base(t, q_weight=BIG), [peft(t, tensors=factors(by=1e4))], t / "out", dtype="float16"
        ),
    ),
    "an adapter with a NaN": (
        NonFiniteError,
        r"model\.q_proj\.weight: the merged tensor holds an inf or a NaN in torch\.float32",
        lambda t: merge(t, peft(t, tensors=factors(by=math.nan))),
    ),
    "an adapter of another base": (
        MismatchError,
        "was made for another base, with the digest .*, or pass --allow-other-base",
        lambda t: lora_tools.merge(base(t, "c", 0.5), [made_for(t)], t / "out"),
    ),
    "--reversible with --dtype": (
        UsageError,
        "--reversible keeps the base's dtypes: leave --dtype out",
        lambda t: merge(t, peft(t), reversible=True, dtype="float16"),
    ),
    "--reversible with another vocabulary": (
        UsageError,
        r"--reversible: model\.embed_tokens\.weight is new or has another shape",
        lambda t: merge(
            t,
            peft(t, tensors=factors() | whole(EMBED, 1.0, 7, 8), modules_to_save=["embed_tokens"]),
            reversible=True,
        ),
    ),
    "a weight that is no number": (
        UsageError,
        "its weight is nan; a finite number is needed",
        lambda t: merge(t, f"{peft(t)}=nan"),  # type: ignore[arg-type]
    ),
    "unmerging a saved tensor without a sidecar": (
        UnsupportedAdapter,
        r"norm\.weight: cannot be undone without a sidecar \(the adapter replaced it whole\)",
        lambda t: lora_tools.unmerge(
            merged(t, peft(t, tensors=factors() | whole())), [t / "a"], t / "out"
        ),
    ),
    "unmerging by another adapter": (
        MismatchError,
        "made with 1",
        lambda t: lora_tools.unmerge(
            merged(t, peft(t), reversible=True), [peft(t, "b", factors(by=3.0))], t / "out"
        ),
    ),
    "unmerging by another weight": (
        MismatchError,
        r"the adapters were merged with.*give ADAPTER=WEIGHT",
        lambda t: lora_tools.unmerge(
            merged(t, peft(t), reversible=True), [(t / "a", 0.5)], t / "out"
        ),
    ),
    "unmerging what was changed since": (
        MismatchError,
        "the result is not the base .*: the merged checkpoint, or an adapter's config, was changed",
        lambda t: lora_tools.unmerge(
            edited(
                merged(t, peft(t), reversible=True),
                "model.safetensors",
                lambda tensors: tensors[f"{UP}.weight"].add_(1),
            ),
            [t / "a"],
            t / "out",
        ),
    ),
    "a sidecar with other bytes": (
        CheckpointError,
        r"the sidecar is damaged;.*it again",
        lambda t: lora_tools.unmerge(
            edited(
                merged(t, peft(t), reversible=True),
                "loratools-unmerge.sidecar",
                lambda tensors: next(iter(tensors.values())).view(torch.uint8).add_(1),
            ),
            [t / "a"],
            t / "out",
        ),
    ),
    "what is no sidecar": (
        CheckpointError,
        r"not a sidecar.*version can read",
        lambda t: (
            lora_tools.unmerge(merged(t, peft(t)), [t / "a"], t / "out", sidecar=bare(t, "s", x=X))
            if False
            else lora_tools.inspect(sidecar_of_next_year(t))
        ),
    ),
    "combining unlike shapes": (
        MismatchError,
        r"lora_A \[2, 8\] and lora_B \[8, 2\], .* has \[2, 7\] and \[8, 2\]; were they",
        lambda t: lora_tools.combine([peft(t), peft(t, "b", factors(cols=7))], t / "out"),
    ),
    "combining what is saved whole twice": (
        UnsupportedAdapter,
        r"replaces it whole, and so does .*;.*be weighted",
        lambda t: lora_tools.combine(
            [peft(t, n, factors() | whole(), modules_to_save=["norm"]) for n in "ab"], t / "out"
        ),
    ),
    "combining nothing but whole tensors": (
        UnsupportedAdapter,
        "the adapters have no low-rank factors to combine",
        lambda t: lora_tools.combine([peft(t, tensors=whole())], t / "out"),
    ),
    "combining DoRA": (
        UnsupportedAdapter,
        "a DoRA adapter cannot be combined",
        lambda t: lora_tools.combine([dora(t)], t / "out"),
    ),
    "a sum of factors that overflows": (
        NonFiniteError,
        r"the combined factors overflow torch\.float16; choose a wider --dtype",
        lambda t: lora_tools.combine([(peft(t), 1e9)], t / "out", dtype="float16"),
    ),
    "a pruned sum that overflows": (
        NonFiniteError,
        r"the combined change overflows torch\.float32",
        lambda t: lora_tools.combine(
            [(peft(t, tensors=factors(by=1e30)), 1e9)], t / "out", method="ties", density=1.0
        ),
    ),
    "converting a NaN that is saved whole": (
        NonFiniteError,
        r"model\.norm\.weight, saved whole, holds an inf or a NaN",
        lambda t: lora_tools.convert(
            peft(t, tensors=factors() | whole(NORM, math.nan)), t / "out", to="onnxruntime"
        ),
    ),
    "converting factors with a NaN": (
        NonFiniteError,
        r"model\.q_proj: the factors hold an inf or a NaN;",
        lambda t: lora_tools.convert(
            peft(t, tensors=factors(by=math.inf)), t / "out", to="diffusers"
        ),
    ),
    "cutting factors with a NaN": (
        NonFiniteError,
        r"model\.q_proj: the factors hold an inf or a NaN",
        lambda t: lora_tools.rescale(peft(t, tensors=factors(by=math.nan)), t / "out", rank=1),
    ),
    "a budget for factors with a NaN": (
        NonFiniteError,
        r"model\.q_proj: the factors hold an inf or a NaN",
        lambda t: lora_tools.rescale(
            peft(t, tensors=factors(by=math.nan)), t / "out", budget="1000"
        ),
    ),
    "factors that overflow in another dtype": (
        NonFiniteError,
        "choose a wider --dtype",
        lambda t: lora_tools.rescale(peft(t, tensors=factors(by=1e30)), t / "out", dtype="float16"),
    ),
    "dropping all there is": (
        UnsupportedAdapter,
        "nothing would be left of",
        lambda t: lora_tools.convert(embedding(t), t / "out", to="diffusers", drop=["embedding"]),
    ),
    "verifying an adapter that saved another vocabulary": (
        MismatchError,
        r"base is \[6, 8\], tuned.*8\], and with the adapter it is \[9, 8\]",
        lambda t: lora_tools.verify(
            peft(t, tensors=factors() | whole(EMBED, 1.0, 9, 8), modules_to_save=["embed_tokens"]),
            base=base(t),
            tuned=base(t, "t", embed_weight=torch.ones(7, 8)),
        ),
    ),
    "verifying an adapter that saved another head": (
        MismatchError,
        r"head\.weight:.*\[2, 8\]",
        lambda t: lora_tools.verify(
            peft(t, tensors=factors() | whole("head", 1.0, 3, 8), modules_to_save=["head"]),
            base=base(t),
            tuned=edited(
                base(t, "t"),
                "model.safetensors",
                lambda tensors: tensors.update({"head.weight": torch.ones(2, 8)}),
            ),
        ),
    ),
    "verifying against a NaN": (
        NonFiniteError,
        r"model\.up_proj\.weight: base, tuned or adapter holds an inf or a NaN",
        lambda t: lora_tools.verify(
            peft(t), base=base(t), tuned=base(t, "t", up_weight=torch.full((12, 8), math.nan))
        ),
    ),
    "verifying against another model": (
        MismatchError,
        "have no tensor in common",
        lambda t: lora_tools.verify(peft(t), base=base(t), tuned=bare(t, "t", z__weight=X)),
    ),
}


CONTAINERS: dict[str, Row] = {
    "an index out of its folder": (
        UnsafeInput,
        r"a file outside its folder: '\.\./x\.safetensors'",
        lambda t: diff(t, indexed(t, {"x": "../x.safetensors"})),
    ),
    "an index of a file that is not there": (
        CheckpointError,
        r"shard gone\.safetensors is missing; is the download complete\?",
        lambda t: diff(t, indexed(t, {"x": "gone.safetensors"})),
    ),
    "an index of a tensor that is not there": (
        CheckpointError,
        "says that tensor",
        lambda t: diff(
            t, indexed(t, {"x": "one.safetensors", "y": "one.safetensors"}, one={"x": X})
        ),
    ),
    "an index of a tensor that is elsewhere": (
        CheckpointError,
        r"says.*it is in one\.safetensors",
        lambda t: diff(
            t,
            indexed(
                t, {"x": "two.safetensors", "y": "one.safetensors"}, one={"x": X}, two={"y": X}
            ),
        ),
    ),
    "a tensor that is not in the index": (
        CheckpointError,
        r"tensor 'y' is in one\.safetensors and not in the index",
        lambda t: diff(t, indexed(t, {"x": "one.safetensors"}, one={"x": X, "y": X})),
    ),
    "a tensor in two shards": (
        CheckpointError,
        r"tensor 'x' is in one\.safetensors and.*in two\.safetensors",
        lambda t: diff(
            t,
            indexed(
                t,
                {"x": "one.safetensors", "y": "two.safetensors"},
                one={"x": X},
                two={"x": X, "y": X},
            ),
        ),
    ),
    "an index that is none": (
        CheckpointError,
        r"not a shard index \(no weight_map of names to files\)",
        lambda t: diff(t, indexed(t, {})),
    ),
    "two indexes": (
        CheckpointError,
        r"several indexes: .*;.*one file",
        lambda t: diff(
            t,
            filled(
                indexed(t, {"x": "one.safetensors"}, one={"x": X}) / "other.safetensors.index.json",
                "{}",
            ).parent,
        ),
    ),
    "several files and no index": (
        CheckpointError,
        r"several weight files and no index: one\.safetensors, two\.safetensors",
        lambda t: diff(t, (bare(t, "one", x=X), bare(t, "two", x=X)) and t),
    ),
    "a folder without weights": (
        CheckpointError,
        r"no \.safetensors file.*is the download complete\?",
        lambda t: diff(t, t),
    ),
    "an adapter for a checkpoint": (
        CheckpointError,
        r"this is an adapter \(PEFT\), not a checkpoint; merge it into its base first",
        lambda t: diff(t, peft(t)),
    ),
    "a config.json that is no JSON": (
        CheckpointError,
        r"config\.json: not JSON",
        lambda t: diff(t, filled(base(t) / "config.json", "{").parent),
    ),
    "a pickle for a checkpoint": (
        UnsafeInput,
        "a pickle, which can hold code; convert it to safetensors, or pass --allow-pickle",
        lambda t: diff(t, cut(t / "x.bin", b"")),
    ),
    "a header that promises more than there is": (
        CheckpointError,
        "the file has 10",
        lambda t: diff(t, cut(t / "x.safetensors", (1 << 40).to_bytes(8, "little") + b"{}")),
    ),
    "quantizing a NaN": (
        NonFiniteError,
        r"model\.q_proj\.weight: holds an inf or a NaN,",
        lambda t: lora_tools.quantize(base(t, q_weight=NAN), t / "out"),
    ),
    "quantizing float64": (
        UsageError,
        r"float64 cannot be quantized; pass --dtype float32",
        lambda t: lora_tools.quantize(base(t, q_weight=torch.ones(8, 8).double()), t / "out"),
    ),
    "quantizing what is quantized": (
        CheckpointError,
        "is already quantized, in",
        lambda t: lora_tools.quantize(
            (lora_tools.quantize(base(t), t / "four"), t / "four")[1], t / "out"
        ),
    ),
    "four bits without their state": (
        CheckpointError,
        "quantized weight; is its state missing",
        lambda t: lora_tools.dequantize(
            edited(
                (lora_tools.quantize(base(t), t / "four"), t / "four")[1],
                "model.safetensors",
                lambda tensors: [tensors.pop(k) for k in list(tensors) if "quant_state" in k],
            ),
            t / "out",
        ),
    ),
}

TABLE = {
    **{f"pairs: {name}": row for name, row in PAIRS.items()},
    **{f"adapters: {name}": row for name, row in ADAPTERS.items()},
    **{f"containers: {name}": row for name, row in CONTAINERS.items()},
}


@pytest.mark.parametrize("name", TABLE)
def test_it_is_refused_by_name(name: str, tmp_path: Path) -> None:
    check(TABLE[name], tmp_path)
