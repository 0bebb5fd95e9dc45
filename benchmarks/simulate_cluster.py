"""How long a cluster takes, simulated from plans of jobs and measured rates, and what holds it up.

    python benchmarks/simulate_cluster.py [FOLDER]             # the table
    python benchmarks/simulate_cluster.py --check FOLDER2      # against runs on this machine

Models of 8, 70 and 671 billion parameters are headers alone, in FOLDER; ``--plan`` of each command
says what its jobs read, work on and write. These are sent to workers of one thread each as
``engine.dask`` sends them. A worker reads a batch, computes (``engine.rates``: passes) and
writes; the store's rates are shared by all who read or write at that time, and a worker's own link
bounds it. The caller starts, plans, sends, takes in what comes back (its own core and link), and in
the end looks at what was written. ``--check`` runs the commands on the model of 2 GB that
``bench_estimate.py`` makes in FOLDER2, with one worker of Dask and with two.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import bench_estimate
from benchmarks._measure import clean, run
from benchmarks.bench_plan import hole
from lora_tools.engine import rates
from lora_tools.engine.dask import _AHEAD, _batches

COMMANDS = {
    "merge base adapter": rates.MERGE,
    "quantize base --scheme fp8-block": rates.QUANTIZE["fp8-block"],
    "extract base tuned --rank 16": rates.DECOMPOSE + 16 * rates.DECOMPOSE_RANK,
}
WORKERS = (1, 4, 16, 64)
# Hidden and inner width, layers, experts, heads of keys, vocabulary.
MODELS = {
    "8B": (4096, 14336, 32, 0, 8, 128_256),
    "70B": (8192, 28672, 80, 0, 8, 128_256),
    "671B": (7168, 2048, 58, 256, 64, 129_280),
}
PASSES = 0.6e9  # a second and core; two of this machine's come to 1.2e9
START, CLOSE = 2.5, 0.5  # seconds, of the caller and the workers side by side
PLAN, CALLER, WORKER = 30e-6, 0.25e-3, 0.35e-3  # seconds a task: to plan, to send, to begin
COPY = 1.5e9  # bytes a second of what comes back, pickled, and is written by the caller


@dataclasses.dataclass(frozen=True)
class Place:
    """Bytes a second: of the store, all together, and of each worker's link."""

    read: float
    write: float
    link: float
    passes: float = PASSES


PLACES = {
    "a file server, 10 Gbit/s": Place(1.2e9, 1.0e9, 1.2e9),
    "a parallel file system, 200 Gbit/s, links of 25": Place(24e9, 12e9, 3e9),
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A job, as far as it costs: ``back`` are bytes that the caller writes."""

    nbytes: int
    read: int
    written: int
    back: int
    passes: float


def pieces(plan: Path, each: float) -> list[Piece]:
    """The jobs of a plan; ``each``: passes for a number that is changed."""
    found = []
    for job in json.loads(plan.read_text())["jobs"]:
        is_copy = job["action"] in ("copy", "save_whole_if_changed", "skip")
        is_adapter = job["output"].startswith("adapter_model")
        written = job["bytes_written"]
        found.append(
            Piece(
                job["peak_memory"],
                job["bytes_read"],
                0 if is_adapter else written,
                written if is_adapter else 0,
                (rates.COPY if is_copy else each) * job["numbers"],
            )
        )
    return found


@dataclasses.dataclass
class _Worker:
    """What is left of its batch, in bytes and passes; the phases follow upon each other."""

    left: list[float]
    own: float
    phase: int = 0


def simulated(work: Sequence[Piece], workers: int, place: Place) -> tuple[float, dict[str, float]]:
    """Seconds until all is done, and the least that each part alone would take."""
    queue: Iterator[Sequence[Piece]] = _batches(work, workers)  # type: ignore[type-var]
    now = begun = START + PLAN * len(work)
    caller = now  # until then it is at work
    ready: list[tuple[float, int]] = []  # batches that were sent, and when
    done_at: list[float] = []
    sent: dict[int, Sequence[Piece]] = {}
    busy: dict[int, _Worker] = {}
    count = itertools.count()

    def send() -> None:
        nonlocal caller
        while len(sent) < (1 + _AHEAD) * workers and (more := next(queue, None)) is not None:
            caller = max(caller, now) + CALLER * len(more)
            number = next(count)
            sent[number] = more
            heapq.heappush(ready, (caller, number))

    def speeds() -> dict[int, float]:
        at = [0, 0, 0]
        for each in busy.values():
            at[each.phase] += 1
        bound = (
            min(place.link, place.read / max(at[0], 1)),
            place.passes,
            min(place.link, place.write / max(at[2], 1)),
        )
        return {number: bound[each.phase] for number, each in busy.items()}

    send()
    while sent:
        while len(busy) < workers and ready and ready[0][0] <= now:
            _, number = heapq.heappop(ready)
            batch = sent[number]
            own = WORKER * len(batch) * place.passes
            sums = [float(sum(getattr(p, f) for p in batch)) for f in ("read", "passes", "written")]
            busy[number] = _Worker([sums[0], sums[1] + own, sums[2]], own)
        speed = speeds()
        steps = [each.left[each.phase] / speed[number] for number, each in busy.items()]
        if len(busy) < workers and ready:
            steps.append(max(ready[0][0] - now, 0.0))
        step = min(steps)
        now += step
        for number, each in list(busy.items()):
            each.left[each.phase] -= step * speed[number]
            while each.phase < 3 and each.left[each.phase] <= 1e-3:
                each.phase += 1
            if each.phase == 3:
                del busy[number]
                batch = sent.pop(number)
                caller = max(caller, now) + sum(piece.back for piece in batch) / COPY
                done_at.append(caller)
        send()
    read, written = sum(p.read for p in work), sum(p.written for p in work)
    least = {
        "the store's reading": read / place.read,
        "the store's writing": written / place.write,
        "the links": (read + written) / place.link / workers,
        "computing": sum(p.passes for p in work) / place.passes / workers,
        "the caller": begun + len(work) * CALLER + sum(p.back for p in work) / COPY,
    }
    return max(done_at) + CLOSE, least


# ------------------------------------------------------------------------------ what is simulated


def shapes(name: str) -> dict[str, list[int]]:
    """Of the tensors of a model."""
    hidden, inner, layers, experts, keys, vocabulary = MODELS[name]
    found = {"model.embed_tokens.weight": [vocabulary, hidden]}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for part, rows in (("q", hidden), ("k", keys * 128), ("v", keys * 128), ("o", hidden)):
            found[f"{at}.self_attn.{part}_proj.weight"] = [rows, hidden]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{norm}.weight"] = [hidden]
        for place in [f"experts.{i}." for i in range(experts)] or [""]:
            found[f"{at}.mlp.{place}gate_proj.weight"] = [inner, hidden]
            found[f"{at}.mlp.{place}up_proj.weight"] = [inner, hidden]
            found[f"{at}.mlp.{place}down_proj.weight"] = [hidden, inner]
    return {**found, "model.norm.weight": [hidden], "lm_head.weight": [vocabulary, hidden]}


def make(folder: Path, name: str) -> None:
    """``base``, ``tuned`` and an adapter of rank 16 of all that has ``_proj``: headers alone."""
    found = list(shapes(name).items())
    config: dict[str, Any] = {"architectures": ["Simulated"], "torch_dtype": "bfloat16"}
    for side in ("base", "tuned"):
        (folder / side).mkdir(parents=True)
        (folder / side / "config.json").write_text(json.dumps(config))
        each, weight_map = -(-len(found) // 100), {}
        for number in range(-(-len(found) // each)):
            inside = dict(found[number * each : (number + 1) * each])
            hole(folder / side / f"{number}.safetensors", "BF16", inside)
            weight_map |= dict.fromkeys(inside, f"{number}.safetensors")
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / side / "model.safetensors.index.json").write_text(index)
    factors, targets = {}, set()
    for key, shape in found:
        if "_proj" in key:
            module = key.removesuffix(".weight")
            targets.add(module.rpartition(".")[2])
            factors[f"base_model.model.{module}.lora_A.weight"] = [16, shape[1]]
            factors[f"base_model.model.{module}.lora_B.weight"] = [shape[0], 16]
    (folder / "adapter").mkdir()
    hole(folder / "adapter" / "adapter_model.safetensors", "BF16", factors)
    said = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": sorted(targets)}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(said))


def planned(folder: Path, words: str) -> list[Piece]:
    """What the command's jobs cost, as its own plan says."""
    plan = folder / f"{words.split()[0]}.json"
    if not plan.exists():
        more = ("-o", str(folder / "out"), "--dry-run", "-q", "--plan", str(plan))
        run(bench_estimate.command(folder, words, *more))
    return pieces(plan, COMMANDS[words])


def table(folder: Path) -> None:
    """Wall time, and what holds up sixty-four workers."""
    head = " | ".join(str(each) for each in WORKERS)
    print(f"| store | model | command | {head} | bound by |\n|{'---|' * (len(WORKERS) + 4)}")
    for where, place in PLACES.items():
        for name in MODELS:
            if not (folder / name).exists():
                make(folder / name, name)
            for words in COMMANDS:
                work = planned(folder / name, words)
                found = [simulated(work, workers, place) for workers in WORKERS]
                cells = [said(seconds) for seconds, _ in found]
                most = max(found[-1][1], key=found[-1][1].__getitem__)
                share = found[-1][1][most] / found[-1][0]
                last = f"{most} ({share:.0%})"
                verb = words.split()[0]
                print(f"| {where} | {name} | {verb} | {' | '.join(cells)} | {last} |", flush=True)


def said(seconds: float) -> str:
    """As people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def check(folder: Path) -> None:
    """Runs here, and what is simulated of them by rates measured just before."""
    bench_estimate.prepared(folder, 18)
    files = sorted((folder / "base").glob("*.safetensors"))
    print("| command | workers | simulated, s | taken, s | times |\n|---|---|---|---|---|")
    for words, workers in itertools.product(COMMANDS, (1, 2)):
        found = rates.measure(files, folder, workers)
        assert found is not None
        place = Place(found.read, found.write, found.read, found.passes / workers)
        seconds, _ = simulated(planned(folder, words), workers, place)
        more = ("-q", "--engine", "dask", "--workers", str(workers))
        clean(folder / "out")
        begun = time.perf_counter()
        run(bench_estimate.command(folder, words, "-o", str(folder / "out"), *more))
        taken = time.perf_counter() - begun
        clean(folder / "out")
        times = f"{taken / seconds:.2f}"
        print(f"| `{words}` | {workers} | {seconds:.1f} | {taken:.1f} | {times} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.folder or Path(scratch)).resolve()
        (check if args.check else table)(folder)


if __name__ == "__main__":
    main()
