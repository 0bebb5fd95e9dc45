"""PEFT's own merge tests of custom models, with this tool in place of ``merge_and_unload``.

The tests come from PEFT's source distribution and are not part of this repository:

    pip download --no-binary :all: --no-deps peft==0.21.2 && tar xzf peft-0.21.2.tar.gz
    python benchmarks/replay_peft_merges.py peft-0.21.2

Each test makes a model and an adapter, has PEFT merge them, and compares outputs. Here the adapter
is saved, merged file to file, and the merged tensors loaded into the plain model. Printed is, by
type of adapter, how many tests pass, how many are refused (with the reason), and how many fail.
"""

from __future__ import annotations

import argparse
import copy
import importlib.machinery
import re
import sys
import tempfile
import types
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_tools

TESTS = "test_merge_layers or test_safe_merge"  # the one of fp16 and the like only run
NOT = "fp16 or idempotent or deterministic"


def merge_with_this(model: Any, adapter_names: list[str] | None) -> torch.nn.Module:
    """The plain model that ``model`` was made of, with its active adapters merged."""
    plain = copy.deepcopy(model._plain)
    names = adapter_names or model.active_adapters
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        state = {k: v.detach().clone().contiguous() for k, v in plain.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        model.save_pretrained(folder / "adapter")
        adapters = [folder / "adapter" / ("" if n == "default" else n) for n in names]
        out = folder / "merged.safetensors"
        lora_tools.merge(folder / "model.safetensors", adapters, out)
        plain.load_state_dict(load_file(out))
    return plain.eval()


class Replay:
    """Counts what becomes of each test."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.reasons: Counter[tuple[str, str]] = Counter()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        outcome = yield
        report = outcome.get_result()
        if report.when == "call" or (report.when == "setup" and not report.passed):
            config = item.callspec.params.get("config_cls") if hasattr(item, "callspec") else None
            kind = config.__name__.removesuffix("Config") if config else "other"
            error = call.excinfo.value if call.excinfo else None
            result = "refused" if isinstance(error, lora_tools.LoraToolsError) else report.outcome
            self.counts.setdefault(kind, Counter())[result] += 1
            if result in ("refused", "failed"):
                said = re.sub(r"/\S+/", "", str(error)).strip().splitlines()[0][:150]
                self.reasons[kind, f"{result}: {said}"] += 1

    def table(self) -> None:
        """Print both tables."""
        columns = ("passed", "refused", "failed", "skipped")
        print(f"{'type':14}" + "".join(f"{c:>9}" for c in columns))
        total: Counter[str] = Counter()
        for kind, counts in sorted(self.counts.items()):
            print(f"{kind:14}" + "".join(f"{counts[c]:9}" for c in columns))
            total += counts
        print(f"{'all':14}" + "".join(f"{total[c]:9}" for c in columns))
        for (kind, said), count in self.reasons.most_common():
            print(f"{count:4} {kind}: {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="PEFT's source distribution, unpacked")
    parser.add_argument("-k", default="", help="only tests that match, such as LOHA")
    given = parser.parse_args()
    if find_spec("datasets") is None:  # the tests import it and these do not use it
        stub = types.ModuleType("datasets")
        stub.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
        stub.load_dataset = None  # type: ignore[attr-defined]
        sys.modules["datasets"] = stub
    sys.path.insert(0, str(given.source.resolve()))
    (given.source / "tests" / "__init__.py").touch()  # they import each other as a package
    import peft

    made = peft.PeftModel.__init__

    def init(self: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        plain = copy.deepcopy(model)
        made(self, model, *args, **kwargs)
        object.__setattr__(self, "_plain", plain)

    def merge(
        self: Any, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> torch.nn.Module:
        return merge_with_this(self, adapter_names)

    peft.PeftModel.__init__ = init
    peft.PeftModel.merge_and_unload = merge
    replay = Replay()
    tests = str(given.source / "tests" / "test_custom_models.py")
    chosen = f"({TESTS}) and not ({NOT})" + (f" and ({given.k})" if given.k else "")
    options = ["-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "--disable-warnings"]
    pytest.main([tests, "-k", chosen, *options, "-o", "addopts=", "-n0"], plugins=[replay])
    replay.table()


if __name__ == "__main__":
    main()
