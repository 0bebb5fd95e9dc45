"""A run of rows that was freed is there for the next one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

_RUN = 4 << 20
_SCRIPT = f"""
import resource, sys, threading
from lora_tools import cli
if sys.argv[1] == "kept":
    cli._keep_freed_memory()
def work():
    for _ in range(50):
        first, second = bytearray(b"1" * {_RUN}), bytearray(b"2" * {_RUN})
        del first, second
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str, **env: str) -> int:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", _SCRIPT, how]
    return int(subprocess.run(command, env=kept | env, capture_output=True, check=True).stdout)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="of glibc"
)
def test_freed_runs_are_used_again() -> None:
    pages = _RUN // 4096
    assert _faults("kept") < 10 * pages
    assert _faults("given back") > 50 * pages
    assert _faults("kept", MALLOC_TRIM_THRESHOLD_="0") > 50 * pages, "the user's choice"
