"""Per-tensor work can be sent: inputs, writers and tasks are pickled as paths, names and numbers,
and what is unpickled reads the same and writes the same bytes, here and in another process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lora_tools
from lora_tools.engine import threads
from lora_tools.engine.buffers import Buffers
from lora_tools.engine.tasks import Call
from lora_tools.errors import CheckpointError, OutputError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import CheckpointWriter, lay_out
from lora_tools.formats.safetensors_writer import SafetensorsWriter
from lora_tools.formats.spool import SafetensorsSpool
from lora_tools.records import TensorSpec
from lora_tools.sources.as_loaded import LoadedView, loaded_view
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.dequantized import Dequantized
from lora_tools.sources.weighted import open_weighted

from . import iotools, models
from .elsewhere import work

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 6},
    "other": {"target_modules": ["q_proj", "up_proj"], "r": 3, "lora_bias": True},
    "dora": {
        "target_modules": ["q_proj", "v_proj"],
        "r": 4,
        "use_dora": True,
        "modules_to_save": ["norm"],
        "trainable_token_indices": [3, 9],
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a tuned one, adapters, a four-bit base, and activations of it."""
    folder = tmp_path_factory.mktemp("tasks")
    model = models.make("llama")
    base = models.save(model, folder / "base", max_shard_size="40KB")
    models.perturb(model, 0.02, 3, "_proj")
    models.perturb(model, 0.02, 4, "norm")
    models.save(model, folder / "tuned")
    for name, config in ADAPTERS.items():
        models.train(base, folder / name, config, save_embedding_layers=False)
    lora_tools.quantize(base, folder / "nf4")
    lora_tools.quantize(base, folder / "nvfp4", scheme="nvfp4")
    lora_tools.merge(base, [folder / "dora"], folder / "merged", reversible=True)
    lora_tools.merge(base, [folder / "plain"], folder / "plainly")
    moments = {
        name.removesuffix(".weight"): torch.rand(tensor.shape[1]) + 0.5
        for name, tensor in models.tensors(base).items()
        if "_proj.weight" in name
    }
    said = {"loratools_activations": "1", "tokens": "8"}
    save_file(moments, folder / "activations", said)
    whole = {name: each.diag() + 0.3 for name, each in moments.items()}
    save_file(whole, folder / "full", said)
    return folder


# ------------------------------------------------------------------------------------- reopening


def mixtral(folder: Path) -> Path:
    """Experts stored one by one, which transformers fuses."""
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    return models.save(transformers.MixtralForCausalLM(config).eval(), folder)


def pickled_weights(root: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(root / "base" / "config.json", folder)
    torch.save(models.tensors(root / "base"), folder / "pytorch_model.bin")
    return folder


def seen(checkpoint: Checkpoint) -> Any:
    """All there is to a checkpoint but who opened it."""
    data = {name: bytes(checkpoint.raw(name)) for name in checkpoint.specs}
    kind = type(checkpoint), checkpoint.path, checkpoint.is_folder, checkpoint.index_name
    metadata = [(file.path, file.header, file.metadata) for file in checkpoint.files]
    return *kind, checkpoint.specs, checkpoint.config, metadata, checkpoint.companions(), data


CHECKPOINTS: dict[str, Callable[[Path, Path], Checkpoint]] = {
    "shards": lambda root, new: open_checkpoint(root / "base"),
    "folder": lambda root, new: open_checkpoint(root / "tuned"),
    "bare file": lambda root, new: open_checkpoint(root / "tuned" / "model.safetensors"),
    "pickle": lambda root, new: open_checkpoint(pickled_weights(root, new), allow_pickle=True),
    "dequantized": lambda root, new: open_checkpoint(root / "nf4"),  # type: ignore[dict-item, return-value]
    "as loaded": lambda root, new: loaded_view(open_checkpoint(mixtral(new))),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_reopens_by_its_path(kind: str, root: Path, tmp_path: Path) -> None:
    given = CHECKPOINTS[kind](root, tmp_path / "new")
    wanted = {"dequantized": Dequantized, "as loaded": LoadedView}
    assert type(given) is wanted.get(kind, Checkpoint)
    sent = pickle.dumps(given)
    again = pickle.loads(sent)
    assert seen(again) == seen(given)
    assert all(torch.equal(again.tensor(name), given.tensor(name)) for name in given.specs)
    largest = max(given.specs.values(), key=lambda spec: spec.nbytes)
    assert bytes(given.raw(largest.name)) not in sent


def test_a_relative_path_is_found_from_elsewhere(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    sent = pickle.dumps((open_checkpoint("base"), open_weighted(["plain=0.5"], False)))
    monkeypatch.chdir(tmp_path)
    checkpoint, [weighted] = pickle.loads(sent)
    assert checkpoint.hash("lm_head.weight")
    assert weighted.weight == 0.5
    assert all(weighted.adapter.tensor(key).numel() for key in weighted.adapter.file.specs)


@pytest.mark.parametrize("what", ["its time", "its header", "its size", "it is gone"])
def test_a_file_that_changed_is_refused(what: str, tmp_path: Path) -> None:
    """Even where size and time are the same, and the header is not."""
    path = iotools.checkpoint(tmp_path / "base", {"a": torch.zeros(4, 2)}) / "model.safetensors"
    sent, before = pickle.dumps(open_checkpoint(tmp_path / "base")), path.stat()
    if what == "its time":
        os.utime(path, ns=(0, before.st_mtime_ns + 1))
    elif what == "it is gone":
        path.unlink()
    else:
        shape = (2, 4) if what == "its header" else (5, 2)
        save_file({"a": torch.zeros(shape)}, path, {"format": "pt"})
        os.utime(path, ns=(0, before.st_mtime_ns))
        assert (path.stat().st_size == before.st_size) == (what == "its header")
    says = "No such file" if what == "it is gone" else "changed since it was opened"
    with pytest.raises(CheckpointError, match=says):
        pickle.loads(sent)


@pytest.mark.parametrize("change", ["edited", "removed"])
@pytest.mark.parametrize("kind", ["folder", "dequantized", "as loaded"])
def test_a_config_that_changed_is_refused(
    kind: str, change: str, root: Path, tmp_path: Path
) -> None:
    """What was read of it goes with the checkpoint, and transformers reads the file."""
    if kind == "as loaded":
        folder = mixtral(tmp_path / "base")
    else:
        source = root / {"folder": "tuned", "dequantized": "nf4"}[kind]
        folder = shutil.copytree(source, tmp_path / "base")
    given = open_checkpoint(folder)
    sent = pickle.dumps(loaded_view(given) if kind == "as loaded" else given)
    config = folder / "config.json"
    if change == "edited":
        config.write_text(config.read_text().replace("true", "false"))
    else:
        config.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: changed since it was opened"):
        pickle.loads(sent)


def test_an_adapters_config_that_changed_is_refused(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root / "plain", tmp_path / "a")
    sent = pickle.dumps(open_weighted([folder], False))
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: changed since"):
        pickle.loads(sent)


def test_what_others_write_is_credited_to_the_owner(tmp_path: Path) -> None:
    """Two writers that were reopened, and their owner, who alone knows when all is there."""
    specs = [TensorSpec(name, "U8", (4,)) for name in "abc"] + [TensorSpec("z", "U8", (9,))]
    owner = SafetensorsWriter(tmp_path / "x", specs)
    one, two = (pickle.loads(pickle.dumps(owner)) for _ in range(2))
    owner.write("a", memoryview(b"aaaa"))
    one.write("b", memoryview(b"bb"))
    two.write("b", memoryview(b"BB"), 2)
    one.write_last("z", b"zzz")
    owner.credit(one.hand_over())
    one.write("c", memoryview(b"cccc"))
    for other in (one, two):
        owner.credit(other.hand_over())
        assert not other.hand_over().nbytes, "said already"
        other.abandon()
    owner.close()
    found = {name: bytes(tensor.tolist()) for name, tensor in load_file(tmp_path / "x").items()}
    assert found == {"a": b"aaaa", "b": b"bbBB", "c": b"cccc", "z": b"zzz"}


def test_only_the_owner_completes_a_file(tmp_path: Path) -> None:
    owner = SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "U8", (2,))])
    other = pickle.loads(pickle.dumps(owner))
    other.write("a", memoryview(b"aa"))
    with pytest.raises(AssertionError):
        other.close()
    with pytest.raises(OutputError, match="'a' was not written whole"):
        owner.close()  # it was not told
    sent = pickle.dumps(owner)
    SafetensorsWriter(tmp_path / "y", [TensorSpec("b", "U8", (2,))]).abandon()
    (tmp_path / "y").replace(tmp_path / "x")
    with pytest.raises(OutputError, match="changed while it was written"):
        pickle.loads(sent)


def test_a_checkpoint_writer_reopens(root: Path, tmp_path: Path) -> None:
    source = open_checkpoint(root / "base")
    assert len(source.files) > 1
    with CheckpointWriter(tmp_path / "out", lay_out(source, source.specs, None), True) as owner:
        for name in source.specs:
            other = pickle.loads(pickle.dumps(owner))
            other.write(name, source.raw(name))
            owner.credit(other.hand_over())
        owner.finish(source, source.index_name, {})
    assert iotools.tree(tmp_path / "out") == iotools.tree(root / "base")


def test_reopened_files_are_closed_again(root: Path, tmp_path: Path) -> None:
    spool = SafetensorsSpool(tmp_path, shared=True)
    spool.add(TensorSpec("a", "U8", (2,)), memoryview(b"ab"))
    with SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "U8", (0,))]) as writer:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(3):
            source, _, there = pickle.loads(
                pickle.dumps((open_checkpoint(root / "base"), writer, spool))
            )
            assert there.read("a")[1] == b"ab"
        del source, _, there
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert len(list(tmp_path.iterdir())) == 2, "the copies left the spool's name to its maker"
    spool.close()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_scratch_file_without_a_name_is_not_sent(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="without a name"):
        pickle.dumps(SafetensorsSpool(tmp_path))


# ----------------------------------------------------------------------------------------- tasks


Engine = Callable[..., Iterator[Any]]
tasks_done: list[Any] = []


def engine(do: Callable[[bytes], bytes]) -> Engine:
    """In place of ``threads.run``: every task is sent, and nothing else comes back than its result
    and what it wrote."""

    def run(
        tasks: Sequence[Any], sources: Any, sink: Any, *, jobs: Any = None, progress: Any = None
    ) -> Iterator[Any]:
        for task in tasks:
            result, written = pickle.loads(do(pickle.dumps((task, sources, sink))))
            if written is not None:
                sink.credit(written)
            tasks_done.append(task)
            yield result

    return run


def same_wherever_it_is_done(
    job: Callable[[Path], lora_tools.Report],
    out: Path,
    do: Callable[[bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The files and the report are those of the threads."""
    here = job(out).to_dict() | {"seconds": 0}
    files = iotools.tree(out.parent)
    for path in out.parent.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    tasks_done.clear()
    with monkeypatch.context() as patch:
        patch.setattr(threads, "run", engine(do))
        there = job(out).to_dict() | {"seconds": 0}
    assert tasks_done, "it did not go through the engine"
    assert repr(there) == repr(here)  # NaN is not itself
    assert iotools.tree(out.parent) == files


Job = Callable[[Path, Path], lora_tools.Report]
JOBS: dict[str, Job] = {
    "merge": lambda w, out: lora_tools.merge(
        w / "base", [(w / "plain", 0.5), w / "dora"], out, dtype="bfloat16"
    ),
    "merge to be undone": lambda w, out: lora_tools.merge(
        w / "base", [w / "dora"], out, reversible=True
    ),
    "merge into four bits": lambda w, out: lora_tools.merge(w / "nf4", [w / "plain"], out),
    "requantize": lambda w, out: lora_tools.merge(w / "nf4", [w / "plain"], out, requantize=True),
    "unmerge": lambda w, out: lora_tools.unmerge(w / "merged", [w / "dora"], out),
    "unmerge without a sidecar": lambda w, out: lora_tools.unmerge(
        w / "plainly", [w / "plain"], out
    ),
    "requantize into groups": lambda w, out: lora_tools.merge(
        w / "nvfp4", [w / "plain"], out, requantize=True
    ),
    "quantize": lambda w, out: lora_tools.quantize(w / "base", out),
    "quantize by activations": lambda w, out: lora_tools.quantize(
        w / "base", out, activations=w / "full"
    ),
    "quantize into groups": lambda w, out: lora_tools.quantize(w / "base", out, scheme="nvfp4"),
    "quantize base and adapter": lambda w, out: lora_tools.quantize(
        w / "base", out, adapters=[w / "plain"], double_quant=False, scale_search=True
    ),
    "compensate": lambda w, out: lora_tools.quantize(
        w / "base", out, adapters=[w / "plain"], compensate=4, compensate_iterations=2
    ),
    "dequantize": lambda w, out: lora_tools.dequantize(w / "nf4", out),
    "extract": lambda w, out: lora_tools.extract(w / "base", w / "tuned", out, rank=4),
    "extract by activations": lambda w, out: lora_tools.extract(
        w / "base", w / "tuned", out, energy=0.8, activations=w / "activations"
    ),
    "extract by a budget": lambda w, out: lora_tools.extract(
        w / "base", w / "tuned", out, budget="12K"
    ),
    "rescale": lambda w, out: lora_tools.rescale(w / "other", out, rank=2),
    "rescale by a budget": lambda w, out: lora_tools.rescale(w / "other", out, budget="1K"),
    "combine": lambda w, out: lora_tools.combine([w / "plain", (w / "other", 0.5)], out),
    "combine by elements": lambda w, out: lora_tools.combine(
        [w / "plain", w / "other"], out, method="ties", density=0.5, rank=3
    ),
    "convert": lambda w, out: lora_tools.convert(
        w / "plain", out, to="kohya", base=w / "base", rank=2
    ),
    "verify": lambda w, out: lora_tools.verify(
        w / "merged", base=w / "base", adapters=[w / "dora"]
    ),
    "verify an adapter": lambda w, out: lora_tools.verify(
        w / "plain", base=w / "base", tuned=w / "plainly"
    ),
    "verify four bits": lambda w, out: lora_tools.verify(w / "nf4", against=w / "base"),
    "diff": lambda w, out: lora_tools.diff(w / "base", w / "tuned"),
    "inspect": lambda w, out: lora_tools.inspect(w / "other"),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_task_can_be_sent(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_wherever_it_is_done(lambda out: JOBS[name](root, out), tmp_path / "out", work, monkeypatch)


def test_a_spectrum_cache_is_read_by_those_it_is_sent_to(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First it is made, then read: by a task of its own rank, and for a budget."""

    def job(out: Path) -> lora_tools.Report:
        cache = out.with_name("cache")
        for options in ({"rank": 2}, {"rank": 3}, {"budget": "12K"}):
            report = lora_tools.extract(
                root / "base",
                root / "tuned",
                out,
                spectrum_cache=cache,
                force=True,
                **options,  # type: ignore[arg-type]
            )
        return report

    same_wherever_it_is_done(job, tmp_path / "out", work, monkeypatch)


@pytest.fixture(scope="module")
def process() -> Iterator[Callable[[bytes], bytes]]:
    """Another process, which shares nothing with this one but the files."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        yield lambda sent: pool.submit(work, sent).result()


@pytest.mark.parametrize(
    "name", ["merge", "quantize base and adapter", "requantize", "extract by a budget"]
)
def test_in_another_process(
    name: str,
    process: Callable[[bytes], bytes],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    same_wherever_it_is_done(
        lambda out: JOBS[name](root, out), tmp_path / "out", process, monkeypatch
    )


def test_a_call_is_sent_by_its_functions_name() -> None:
    call = Call(divmod, (7,), "seven", 3)
    again = pickle.loads(pickle.dumps(call))
    assert again == call
    assert again.run((2,), None, Buffers()) == (3, 1)
