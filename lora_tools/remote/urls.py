"""Addresses where a path is meant: which are known, and what can be done with them."""

from __future__ import annotations

import re
from pathlib import Path

# What fetches a folder or a file from there, and what puts a folder there.
_TOOLS = {
    "s3": ("aws s3 cp or sync", "aws s3 sync"),
    "gs": ("gcloud storage cp -r", "gcloud storage cp -r"),
    "az": ("azcopy copy", "azcopy sync"),
    "abfs": ("azcopy copy", "azcopy sync"),
    "http": ("curl -LO", "curl -T, one file at a time"),
    "https": ("curl -LO", "curl -T, one file at a time"),
    "hf": ("hf download", "hf upload"),
}
# A ``Path`` of an address has one slash.
_URL = re.compile(rf"({'|'.join(_TOOLS)}):/+(?P<rest>.*)", re.DOTALL)


def url(source: str | Path) -> str:
    """An address as it is written, of it or of its path; "" for what is none."""
    match = _URL.fullmatch(str(source))
    return f"{match[1]}://{match['rest']}" if match is not None else ""


def shown(address: str) -> str:
    """An address without what may be secret: a name and a password, and what signs it."""
    scheme, _, rest = re.split(r"[?#]", address, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def fetcher(address: str) -> str:
    """What fetches from there."""
    return _TOOLS[address.partition(":")[0]][0]


def uploader(address: str) -> str:
    """What puts a folder there."""
    return _TOOLS[address.partition(":")[0]][1]
