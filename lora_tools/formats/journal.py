"""What is put into several places at the end of a run: noted before, and taken back where the main
one did not come to its place."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from lora_tools.errors import LoraToolsError
from lora_tools.formats.regular_files import read_file
from lora_tools.formats.renames import exchange, put_new
from lora_tools.formats.synced import write_synced

_JOURNAL = "journal"
_WITH = ("beside", "parts")  # folders of files that are put next to the output
_PLACED = re.compile(rf"out(\.[^/\0]+)?|({'|'.join(_WITH)})/[^/\0]+")
# By place: where it was made, and by which it is known again.
Moves = dict[Path, tuple[Path, tuple[int, int]]]


def others(staging: Path) -> list[Path]:
    """What was made besides ``out``."""
    made = sorted(staging.glob("out.*"))
    return made + [path for name in _WITH for path in sorted((staging / name).glob("*"))]


def is_at(place: Path) -> bool:
    """Whether something is there, be it a link to nothing."""
    return os.path.lexists(place)


def known(made: Path) -> tuple[int, int]:
    """By which something is known again once it was renamed: its number, and of a file, to which
    that number may come anew, when it was written."""
    found = os.lstat(made)
    return found.st_ino, 0 if stat.S_ISDIR(found.st_mode) else found.st_mtime_ns


def stands(place: Path, moves: Moves) -> bool:
    """Whether what was to be put into a place is there."""
    return place in moves and is_at(place) and known(place) == moves[place][1]


def put(made: Path, place: Path, force: bool) -> None:
    """Rename to where nothing is, or with ``force`` in exchange for what is there."""
    while True:
        try:
            return put_new(made, place)
        except FileExistsError:
            if not force:
                raise
        try:
            if exchange(made, place):
                return None
            break
        except FileNotFoundError:  # gone meanwhile
            continue
    if made.name == "out" and not made.is_dir() and not place.is_dir():
        made.replace(place)
    else:
        # A folder cannot be renamed over one that is not empty, and a sidecar may have to come
        # back: the old one steps aside into the staging folder. If the new one does not take its
        # place, or the main one does not, _discard brings it back.
        place.rename(_aside(made))
        put_new(made, place)
    return None


def _aside(made: Path) -> Path:
    """Where the old one of something steps aside to."""
    if made.parent.name not in _WITH:
        return made.with_name("old" + made.name.removeprefix("out"))
    folder = made.parent.with_name("aside")
    folder.mkdir(exist_ok=True)
    return folder / made.name


def take_back(destination: Path, moves: Moves) -> None:
    """Have others as they were where the main one does not stand."""
    if stands(destination, moves):
        return
    for place in moves:
        if stands(place, moves):
            made, found = moves[place]
            if is_at(made) and known(made) != found:
                made.replace(place)  # it was exchanged for this
            else:
                place.unlink()


def write_journal(staging: Path, mine: Mapping[Path, Path]) -> None:
    """Note what was made, and where it will be put, for whoever finds it after a kill."""
    moves = [
        (place.name, str(made.relative_to(staging)), *known(made)) for made, place in mine.items()
    ]
    write_synced(staging / _JOURNAL, json.dumps(moves).encode())


def forget_journal(staging: Path) -> None:
    """What was put is put back: nothing is meant any more."""
    (staging / _JOURNAL).unlink(missing_ok=True)


def read_journal(staging: Path, destination: Path) -> Moves:
    """What a command that was killed meant to put, and where. Nothing where it came not so far."""
    try:
        moves = json.loads(read_file(staging / _JOURNAL))
        return {
            destination.with_name(Path(name).name): (staging / made, (int(number), int(when)))
            for name, made, number, when in moves
            if _PLACED.fullmatch(made)
        }
    except (OSError, LoraToolsError, ValueError, TypeError):
        return {}
