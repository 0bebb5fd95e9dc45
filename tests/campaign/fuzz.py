"""One damaged input after another, each into a command of the package, in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import random
import shlex
import shutil
import traceback
import warnings
from pathlib import Path

import click

from lora_tools.cli import main
from lora_tools.errors import LoraToolsError, QualityGateError
from tests.campaign.damage import damaged, irregular
from tests.campaign.doors import DOORS, Use
from tests.campaign.readers import Unsure

REFUSED, DONE, TRACEBACK, LEFT, WRONG = (
    "refused",
    "done",
    "tracebacks",
    "left on disk",
    "wrong content",
)


@dataclasses.dataclass
class Outcome:
    """Of one input. ``kinds`` are columns of the table; ``said`` is the error, or the traceback."""

    kinds: list[str]
    said: str = ""
    checked: bool = False


class Bench:
    """A copy of all sound inputs, of which one file is damaged at a time.

    Args:
        sound: the whole ones.
        here: a folder for the copy and the outputs; what is there is removed.
    """

    def __init__(self, sound: Path, here: Path) -> None:
        shutil.rmtree(here, ignore_errors=True)
        self._sound, self._top, self._made = sound, here / "in", here / "made"
        shutil.copytree(sound, self._top)
        self._made.mkdir()
        self._files = {name: sorted(sound.glob(door.file)) for name, door in DOORS.items()}
        for name, files in self._files.items():
            assert files, name
        self._tree = self._listing()
        os.chdir(self._top)  # the commands name their inputs from there

    def warm(self) -> None:
        """Run every command once on what is whole, so that forks need not import what they need.
        Raises AssertionError where one of them does not pass."""
        for use in dict.fromkeys(use for door in DOORS.values() for use in door.uses):
            self.passes(use)

    def passes(self, use: Use) -> None:
        """A command on what is whole. Raises AssertionError where it is refused, or not checked."""
        outcome = self.run(use, quiet=False)
        looks = "OUT" not in use.line
        assert outcome.kinds == [DONE] or (looks and outcome.said == ""), (use.line, outcome)
        assert outcome.checked is (use.check is not None), (use.line, outcome)
        self.clear()

    def meet(self, door: str, seed: str) -> Outcome:
        """Damage by the seed, run, look, mend."""
        r = random.Random(seed)
        source = r.choice(self._files[door])
        use = r.choice(DOORS[door].uses)
        target = self._top / source.relative_to(self._sound)
        if r.random() < 0.03:
            irregular(target, r)
        else:
            target.write_bytes(damaged(source.read_bytes(), r, source.name))
        outcome = self.run(use, quiet=r.random() < 0.75)
        self._mend(source, target)
        left = {path.name for path in self._made.iterdir()} - (
            {"out"} if DONE in outcome.kinds else set()
        )
        if left or self._listing() != self._tree:
            outcome.kinds.append(LEFT)
            outcome.said += f"\nleft: {sorted(left)} {self._listing() ^ self._tree}"
            self.__init__(self._sound, self._top.parent)  # type: ignore[misc]
        else:
            self.clear()
        return outcome

    def clear(self) -> None:
        """Remove what was made."""
        out = self._made / "out"
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)

    def _mend(self, source: Path, target: Path) -> None:
        if target.is_dir() and not target.is_symlink():
            target.rmdir()
        else:
            target.unlink(missing_ok=True)
        shutil.copyfile(source, target)

    def _listing(self) -> set[str]:
        return {f"{folder}/{name}" for folder, _, names in os.walk(self._top) for name in names}

    def run(self, use: Use, quiet: bool = True) -> Outcome:
        """One command, whatever it meets; and what it made is read by others."""
        out = self._made / "out"
        words = [str(out) if word == "OUT" else word for word in shlex.split(use.line)]
        words += ["-j", "1", *(["-q"] if quiet else [])]
        try:
            with (
                warnings.catch_warnings(),
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                warnings.simplefilter("ignore")
                main.main(words, prog_name="loratools", standalone_mode=False)
        except (QualityGateError, click.exceptions.Exit):
            return Outcome([DONE if out.exists() else REFUSED])
        except (LoraToolsError, click.UsageError) as error:
            return Outcome([REFUSED], str(error))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | GeneratorExit):
                raise
            return Outcome([TRACEBACK], f"{use.line}\n{traceback.format_exc()}")
        outcome = Outcome([DONE])
        if use.check is not None:
            self._check(use, out, outcome)
        return outcome

    def _check(self, use: Use, out: Path, outcome: Outcome) -> None:
        assert use.check is not None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                use.check(self._top, out)
            outcome.checked = True
        except Unsure as error:
            outcome.said = str(error)
        except Exception:
            outcome.kinds.append(WRONG)
            outcome.said = f"{use.line}\n{traceback.format_exc()}"
