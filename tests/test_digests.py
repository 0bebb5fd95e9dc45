"""``--digest sha256``: what is recorded says what it is made of, and is compared in that."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from pathlib import Path

import pytest
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.errors import CheckpointError, MismatchError
from lora_tools.formats import digest as hashing
from lora_tools.formats.sidecar import NAME as SIDECAR
from lora_tools.records import TensorSpec
from lora_tools.verbs import VERBS

from . import iotools, models

KINDS: tuple[hashing.Kind, ...] = ("xxh3", "sha256")
OTHER: dict[hashing.Kind, hashing.Kind] = {"xxh3": "sha256", "sha256": "xxh3"}
PREFIX = {"xxh3": "xxh3-128/sha256:", "sha256": "sha256/sha256:"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two unlike bases; of the first, adapters that record its digest in either kind."""
    top = tmp_path_factory.mktemp("digests")
    for name, seed in (("base", 0), ("other", 5)):
        model = models.make("llama", seed).bfloat16()
        models.save(model, top / name, shards="20KB")
    models.perturb(model := models.make("llama", 0).bfloat16(), 0.02, seed=1, only="proj.weight")
    models.save(model, top / "tuned")
    for kind in KINDS:
        lora_tools.extract(top / "base", top / "tuned", top / kind, rank=2, digest=kind)
    lora_tools.extract(top / "base", top / "tuned", top / "wrong", rank=1)
    return top


def said(path: Path) -> dict[str, str]:
    file = path if path.is_file() else next(path.glob("*.safetensors"))
    with safe_open(file, "pt") as f:
        return dict(f.metadata())


def by_hand(path: Path, kind: hashing.Kind) -> str:
    """The digest by its definition in docs/report.md, out of the files' bytes."""
    lines = []
    for file in path.glob("*.safetensors"):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                own, row = (
                    data[start + first : start + last],
                    [name, entry["dtype"], entry["shape"]],
                )
                if kind == "sha256":
                    lines.append(json.dumps([*row, hashlib.sha256(own).hexdigest()]) + "\n")
                else:
                    lines.append(f"{' '.join(map(str, row))} {xxhash.xxh3_128_hexdigest(own)}\n")
    return PREFIX[kind] + hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recorded_is_of_that_kind(work: Path, tmp_path: Path, kind: hashing.Kind) -> None:
    base, adapter = by_hand(work / "base", kind), by_hand(work / kind, kind)
    assert said(work / kind)["base_digest"] == base
    assert said(work / kind)["tuned_digest"] == by_hand(work / "tuned", kind)
    made = lora_tools.merge(work / "base", [work / kind], tmp_path / "m", digest=kind, jobs=3)
    assert [i.digest for i in made.inputs] == [base, adapter]
    assert made.totals["output_digest"] == by_hand(tmp_path / "m", kind)
    assert said(tmp_path / "m")["adapter_digests"] == f"{adapter}=1"
    seen = lora_tools.inspect(tmp_path / "m", digest=kind)
    assert seen.inputs[0].digest == made.totals["output_digest"]
    length = {"xxh3": 32, "sha256": 64}[kind]
    assert {len(facts.hash) for facts in seen.stored} == {length}


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_known_by_either(work: Path, tmp_path: Path, kind: hashing.Kind) -> None:
    """The base is hashed once more in the kind that an adapter records, and refused by that."""
    adapter, mine = [work / kind], OTHER[kind]
    lora_tools.merge(work / "base", [work / "xxh3", work / "sha256"], tmp_path / "m", digest=mine)
    lora_tools.quantize(work / "base", tmp_path / "q", adapters=adapter, digest=mine)
    with pytest.raises(MismatchError) as caught:
        lora_tools.merge(work / "other", adapter, tmp_path / "n", digest=mine)
    for digest in (by_hand(work / "base", kind), by_hand(work / "other", kind)):
        assert digest in str(caught.value)
    assert not (tmp_path / "n").exists()


def test_a_base_in_four_bits_says_one_kind_only(work: Path, tmp_path: Path) -> None:
    """What it was made of is not at hand to be hashed again: refused, and told why."""
    lora_tools.quantize(work / "base", tmp_path / "q", digest="sha256")
    lora_tools.merge(tmp_path / "q", [work / "sha256"], tmp_path / "m")
    with pytest.raises(MismatchError, match=r"made.*another kind"):
        lora_tools.merge(tmp_path / "q", [work / "xxh3"], tmp_path / "n")
    with pytest.raises(MismatchError, match="the digests are of two kinds"):
        lora_tools.combine([work / "sha256", work / "xxh3"], tmp_path / "c")


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_undone_by_the_kind_recorded(
    work: Path, tmp_path: Path, kind: hashing.Kind
) -> None:
    adapter, other = [work / "xxh3"], OTHER[kind]
    lora_tools.merge(work / "base", adapter, tmp_path / "m", reversible=True, digest=kind)
    report = lora_tools.unmerge(tmp_path / "m", adapter, tmp_path / "b", digest=other)
    assert iotools.tree(tmp_path / "b") == iotools.tree(work / "base")
    assert report.totals["base_digest"] == by_hand(work / "base", kind)
    assert any("an XXH3 digest" in note for note in report.notes) == (kind == "xxh3")
    assert report.inputs[1].digest == by_hand(work / "xxh3", other)
    lora_tools.unmerge(tmp_path / "m", adapter, tmp_path / "s", sidecar=False, digest=other)
    for sidecar in (False, None):
        with pytest.raises(MismatchError, match=r"other adapter|differ from those given"):
            lora_tools.unmerge(
                tmp_path / "m", [work / "wrong"], tmp_path / "x", sidecar=sidecar, digest=other
            )


def test_verify_compares_in_the_kind_recorded(work: Path, tmp_path: Path) -> None:
    lora_tools.quantize(work / "base", tmp_path / "q", digest="sha256")
    notes = lora_tools.verify(tmp_path / "q", against=work / "base").notes
    assert not any("metadata" in note for note in notes)
    record(tmp_path / "q" / "model.safetensors", "base_digest", by_hand(work / "other", "sha256"))
    notes = lora_tools.verify(tmp_path / "q", against=work / "base").notes
    assert any("names another checkpoint: sha256/" in note for note in notes)


def record(file: Path, key: str, value: str) -> None:
    """Another value in a file's metadata."""
    changed = {**said(file), key: value}
    save_file(load_file(file), file, changed)


def test_unknown_kinds_are_refused_by_name(work: Path, tmp_path: Path) -> None:
    """A prefix of another version: no wrong base, and no damage."""
    unknown, named = "blake3/blake3:" + "0" * 64, "of an unknown kind"
    adapter = tmp_path / "a"
    shutil.copytree(work / "xxh3", adapter)
    record(adapter / "adapter_model.safetensors", "base_digest", unknown)
    with pytest.raises(MismatchError, match=rf"a: the digest '{unknown}' is {named}.*allow_o"):
        lora_tools.merge(work / "base", [adapter], tmp_path / "n")
    assert not (tmp_path / "n").exists()
    lora_tools.merge(
        work / "base", [adapter], tmp_path / "m", reversible=True, allow_other_base=True
    )
    record(tmp_path / "m" / SIDECAR, "base_digest", unknown)
    with pytest.raises(CheckpointError, match=rf"{SIDECAR}: the digest .* is {named}"):
        lora_tools.unmerge(tmp_path / "m", [adapter], tmp_path / "x")
    lora_tools.quantize(work / "base", tmp_path / "q")
    record(tmp_path / "q" / "model.safetensors", "base_digest", unknown)
    notes = lora_tools.verify(tmp_path / "q", against=work / "base").notes
    assert any("cannot be compared" in note and named in note for note in notes)


def test_a_decomposition_is_found_by_its_kind(work: Path, tmp_path: Path) -> None:
    """One kept under the weaker hash is not taken where the stronger is asked for."""
    for kind in KINDS:
        cache = {"spectrum_cache": tmp_path / kind}
        first, again = (tmp_path / f"{kind}-{i}" for i in range(2))
        lora_tools.extract(work / "base", work / "tuned", first, digest=kind, **cache)
        lora_tools.extract(work / "base", work / "tuned", again, digest=kind, **cache)
        assert iotools.tree(first) == iotools.tree(again)
        with pytest.raises(CheckpointError, match="under another kind of digest"):
            lora_tools.extract(
                work / "base", work / "tuned", tmp_path / "x", digest=OTHER[kind], **cache
            )


def test_every_verb_but_check_forms_digests() -> None:
    without = {
        name
        for name in VERBS
        if "digest" not in inspect.signature(getattr(lora_tools, name)).parameters
    }
    assert without == {"check"}


def test_no_name_stands_for_two_tensors() -> None:
    """In XXH3's lines one can; the stronger digest's lines are JSON."""
    two = [TensorSpec(name, "U8", (1,)) for name in "ab"]
    hashes = {"a": "1", "b": "2"}
    one = [TensorSpec("a U8 [1] 1\nb", "U8", (1,))]
    forged = {one[0].name: "2"}
    assert hashing.digest(two, hashes) == hashing.digest(one, forged)
    with hashing.using("sha256"):
        assert hashing.digest(two, hashes) != hashing.digest(one, forged)
