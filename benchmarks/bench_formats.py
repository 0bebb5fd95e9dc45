"""Into FP8, out of it, and a merge into FP8, against the tools that do so file to file.

    python benchmarks/bench_formats.py BASE --peers VENV/bin/python [--axolotl LORA_MERGE.PY]

BASE is a plain folder of about 2 GB (fixtures/make_llama_pair.py makes one). The virtual
environment VENV holds llm-compressor (``model_free_ptq``) and compressed-tensors
(``convert_checkpoint``). LORA_MERGE.PY is axolotl's src/axolotl/cli/utils/lora_merge.py, whose
``merge_lora_sharded_efficient`` runs without the rest of axolotl but for its logger. Peers run in
turn; each table ends with what copying the output and reading the input once costs here.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _measure import Cost, clean, compare, loratools, run, table

COMPRESS = """
import sys
from llmcompressor.entrypoints.model_free import model_free_ptq
base, out, scheme = sys.argv[1:]
model_free_ptq(base, out, scheme=scheme, ignore=["lm_head", "re:.*embed_tokens"], device="cpu",
               max_workers=2)
"""
DECOMPRESS = """
import sys
from compressed_tensors.entrypoints.convert import (
    CompressedTensorsDequantizer, FP8BlockDequantizer, convert_checkpoint)
base, out, kind = sys.argv[1:]
converter = FP8BlockDequantizer(targets=[r"re:.*_proj$"]) if kind == "fp8" else (
    CompressedTensorsDequantizer(base))
convert_checkpoint(base, out, converter=converter, max_workers=2, device="cpu")
"""
MERGE = """
import importlib.util, logging, sys, types
file, base, adapter, out, kind = sys.argv[1:]
for name in ("axolotl", "axolotl.utils", "axolotl.utils.logging"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["axolotl.utils.logging"].get_logger = logging.getLogger
spec = importlib.util.spec_from_file_location("lora_merge", file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.merge_lora_sharded_efficient(base, adapter, out, device="cpu", dequant=kind == "plain")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("--peers", required=True)
    parser.add_argument("--axolotl")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.base.parent) as scratch:
        _all(args, Path(scratch))


def _all(args: argparse.Namespace, scratch: Path) -> None:
    out, fp8, adapter = scratch / "out", scratch / "fp8", scratch / "adapter"
    base, peer = str(args.base), [args.peers, "-c"]

    def once(command: list[str]) -> Cost:
        clean(out)
        return run(command, {"HF_HUB_OFFLINE": "1"})

    def against(title: str, mine: list[str], name: str, theirs: list[str]) -> None:
        ours = [loratools(), *mine, "-o", str(out), "-q"]
        a, b = compare(lambda: once(ours), lambda: once(theirs), args.runs, warmup=0)
        print(table(title, "loratools", a, name, b))
        once(ours)
        print(_floor(Path(mine[1]), out, scratch / "copy"))

    def compressed(scheme: str) -> list[str]:
        return [*peer, COMPRESS, base, str(out), scheme]

    name = "llm-compressor model_free_ptq"
    for scheme, its in (("fp8-block", "FP8_BLOCK"), ("fp8-channel", "FP8_DYNAMIC")):
        mine = ["quantize", base, "--scheme", scheme]
        against(f"quantize to {scheme}", mine, name, compressed(its))
    run([loratools(), "quantize", base, "--scheme", "fp8-block", "-o", str(fp8), "-q"])
    theirs = [*peer, DECOMPRESS, str(fp8), str(out), "fp8"]
    title = "compressed-tensors convert_checkpoint"
    against("dequantize from fp8-block", ["dequantize", str(fp8)], title, theirs)
    if args.axolotl:
        _adapter(args.base, adapter)
        for kind, options in (("same", ["--requantize"]), ("plain", [])):
            theirs = [*peer, MERGE, args.axolotl, str(fp8), str(adapter), str(out), kind]
            mine = ["merge", str(fp8), str(adapter), *options]
            against(f"merge into fp8-block, {kind}", mine, "axolotl", theirs)


def _adapter(base: Path, adapter: Path) -> None:
    """An adapter of rank 16 on every linear layer of the base's."""
    import json

    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    factors = {}
    noise = torch.Generator().manual_seed(0)
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if not name.endswith("_proj.weight"):
                    continue
                rows, cols = opened.get_slice(name).get_shape()
                stem = "base_model.model." + name.removesuffix(".weight")
                factors[f"{stem}.lora_A.weight"] = torch.randn(16, cols, generator=noise) * 0.01
                factors[f"{stem}.lora_B.weight"] = torch.randn(rows, 16, generator=noise) * 0.01
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 16,
        "target_modules": sorted({key.split(".")[-3] for key in factors}),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def _floor(given: Path, written: Path, copy: Path) -> str:
    """What reading the input once and copying the output, with a sync, take here."""

    def timed(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    read = timed(lambda: run(["sh", "-c", f"cat '{given}'/*.safetensors > /dev/null"]))
    copied = timed(lambda: run(["cp", "-r", str(written), str(copy)])) + timed(os.sync)
    clean(copy)
    size = sum(file.stat().st_size for file in written.glob("*.safetensors")) / 1e9
    return f"cp and sync of the {size:.2f} GB written {copied:.1f} s, one read {read:.1f} s\n"


if __name__ == "__main__":
    main()
