"""One safetensors file whose tensors come one after the other, and not all that may come do."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType

from lora_tools.formats.safetensors_writer import encode_header, reserve, write_all
from lora_tools.records import TensorSpec


class GrowingFile:
    """Room is kept for the header of all tensors that may come, and for the tensors; the header is
    written at the end. A file that was not closed well is none.

    Args:
        path: where nothing is.
        most: the tensors that may come.
        metadata: of the file.

    Attributes:
        specs: what has come.

    Raises:
        OSError: the disk is full, or the file cannot be made.
    """

    def __init__(
        self, path: Path, most: Collection[TensorSpec], metadata: Mapping[str, str]
    ) -> None:
        self._metadata, self.specs = metadata, list[TensorSpec]()
        header, _, size = encode_header(most, metadata)
        # Tensors may come in another order, so that their offsets are longer numbers.
        self._room = len(header) + 2 * len(str(size)) * len(most) // 8 * 8
        self._end = self._room
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            reserve(self._file, size - len(header) + self._room, path)
        except BaseException:
            os.close(self._file)
            raise

    def write(self, spec: TensorSpec, data: memoryview) -> None:
        """The next tensor."""
        assert data.nbytes == spec.nbytes
        write_all(self._file, data, self._end)
        self.specs.append(spec)
        self._end += spec.nbytes

    def _finish(self) -> None:
        header, _, _ = encode_header(self.specs, self._metadata)
        body = header[8:] + b" " * (self._room - len(header))
        write_all(self._file, len(body).to_bytes(8, "little") + body, 0)
        os.ftruncate(self._file, self._end)
        os.fsync(self._file)

    def __enter__(self) -> GrowingFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            os.close(self._file)
