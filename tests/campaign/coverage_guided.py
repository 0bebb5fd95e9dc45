"""``python -m tests.campaign.coverage_guided``: a reader of the package is given bytes that lead it
to lines where it has not been yet (atheris, which is libFuzzer). It begins with the corpus in the
project. At the first fault it ends, and leaves the bytes in ``--faults``.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import atheris

with atheris.instrument_imports(include=["lora_tools"]):
    from tests.forkserver import import_everything

    import_everything()

from tests.campaign.damage import damaged
from tests.campaign.targets import CORPUS, TARGETS, Ground

MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
_LONGEST = 4096  # bytes of an input
_KIND = {"index": ".json", "adapter-config": ".json", "nf4-state": ".json", "gguf": ".gguf"}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tests.campaign.coverage_guided", description=__doc__
    )
    made.add_argument("--door", choices=TARGETS, required=True, help="the reader")
    made.add_argument("--seconds", type=int, default=60, help="how long")
    made.add_argument("--seed", type=int, default=1, help="of the mutations")
    made.add_argument("--here", type=Path, default=MEMORY, help="a folder for all that is made")
    made.add_argument("--found", type=Path, help="a folder that keeps what led to new lines")
    made.add_argument(
        "--faults", type=Path, default=Path("faults"), help="a folder for bytes at fault"
    )
    made.add_argument(
        "--corpus", action="store_true", help="make the project's corpus anew, of it and --found"
    )
    return made


def changed(kind: str, data: bytes, most: int, seed: int) -> bytes:
    """By what is known of the format half of the time, and else as libFuzzer does."""
    r = random.Random(seed)
    if r.random() < 0.5:
        return bytes(atheris.Mutate(data, most))
    return damaged(data, r, kind)[:most]


def words(options: argparse.Namespace, folder: Path, whole: bytes) -> list[str]:
    """libFuzzer's own command line."""
    corpus, found = CORPUS / options.door, options.found or folder / "found"
    for each in (corpus, found):
        each.mkdir(parents=True, exist_ok=True)
    (found / "whole").write_bytes(whole)
    # By which it starts itself anew, for --corpus.
    own = f"{sys.executable} -m tests.campaign.coverage_guided --door {options.door}"
    given = [own, f"-max_len={_LONGEST}", "-timeout=20", "-rss_limit_mb=2000", "-verbosity=0"]
    if options.corpus:
        old = folder / "old"
        shutil.move(corpus, old)
        corpus.mkdir()
        return [*given, "-merge=1", *map(str, (corpus, found, old))]
    options.faults.mkdir(parents=True, exist_ok=True)
    given += [f"-max_total_time={options.seconds}", f"-seed={options.seed}"]
    given += [f"-artifact_prefix={options.faults}/", "-print_final_stats=1"]
    return [*given, str(found), str(corpus)]


def main() -> None:
    options, rest = parser().parse_known_args()  # the rest: libFuzzer's, from itself
    with tempfile.TemporaryDirectory(prefix="guided-", dir=options.here) as folder:
        (Path(folder) / "ground").mkdir()
        place = Ground(options.door, Path(folder) / "ground")
        given = [sys.argv[0], *rest] if rest else words(options, Path(folder), place.whole)
        kind = _KIND.get(options.door, ".safetensors")
        pid = os.fork()  # libFuzzer ends its process by itself, and what is here is to be removed
        if pid == 0:
            atheris.Setup(
                given,
                lambda data: place.meet(data) and None,
                custom_mutator=lambda data, most, seed: changed(kind, data, most, seed),
            )
            atheris.Fuzz()
        _, status = os.waitpid(pid, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
