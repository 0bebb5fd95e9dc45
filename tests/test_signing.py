"""OpenSSF model signing of what was written, as docs/verify.md describes it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lora_tools

from . import iotools

_PAGE = Path(__file__).parent.parent / "docs" / "verify.md"


def _line(which: str, folder: Path) -> list[str]:
    """The page's command that begins so, in that folder."""
    found = re.search(rf"^model_signing {which} .*$", _PAGE.read_text(), re.MULTILINE)
    assert found is not None
    given = {"merged": folder / "merged", "merged.sig": folder / "merged.sig"}
    given |= {"key.pem": folder / "key.pem", "key.pub": folder / "key.pub"}
    return [str(given.get(word, word)) for word in found[0].split()[1:]]


def _signing(which: str, folder: Path) -> int:
    line = [sys.executable, "-m", "model_signing", *_line(which, folder)]
    return subprocess.run(line, capture_output=True, text=True, check=False).returncode


def test_the_page_says_how() -> None:
    assert _line("sign", Path("/x"))[:2] == ["sign", "key"]
    assert _line("verify", Path("/x"))[:2] == ["verify", "key"]


def test_a_signed_output_verifies_and_a_changed_one_does_not(tmp_path: Path) -> None:
    if (
        importlib.util.find_spec("model_signing") is None
        or importlib.util.find_spec("OpenSSL") is None
    ):
        pytest.skip("model-signing and pyopenssl are not installed")
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl makes the keys")
    tensors = iotools.weights(layers=1)
    iotools.checkpoint(tmp_path / "base", tensors, 2)
    iotools.adapter(tmp_path / "adapter", iotools.linear_shapes(tensors))
    lora_tools.merge(
        tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", reversible=True
    )
    for line in re.findall(r"^openssl .*$", _PAGE.read_text(), re.MULTILINE):
        subprocess.run([openssl, *line.split()[1:]], cwd=tmp_path, check=True, capture_output=True)
    assert _signing("sign", tmp_path) == 0
    assert _signing("verify", tmp_path) == 0
    report = lora_tools.unmerge(tmp_path / "merged", [tmp_path / "adapter"], tmp_path / "back")
    assert report.totals["exact"]  # a signature lies beside the folder and changes nothing in it
    path = next((tmp_path / "merged").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert _signing("verify", tmp_path) != 0
