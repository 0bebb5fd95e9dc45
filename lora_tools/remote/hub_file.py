"""A file of a repository of the hub, at a commit."""

from __future__ import annotations

from lora_tools.errors import first_line
from lora_tools.remote.source import Answer, LastingError, Source, total

_LASTING = (401, 403, 404)


class HubFile(Source):
    """Read by range requests, as ``huggingface_hub.get_safetensors_metadata`` reads headers. What a
    commit holds does not change."""

    def __init__(self, repository: str, name: str, revision: str) -> None:
        super().__init__(f"hf://{repository}@{revision}/{name}", None, revision)
        self._place = repository, name, revision

    def __reduce__(self) -> tuple[type[HubFile], tuple[str, str, str]]:
        return HubFile, self._place

    def ask(self, begin: int, end: int) -> Answer:
        """By one request. Raises what ``Source.ask`` does."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

        repository, name, revision = self._place
        url = hf_hub_url(repository, name, revision=revision)
        asked = {**build_hf_headers(), "range": f"bytes={begin}-{end - 1}"}
        response = get_session().get(url, headers=asked)
        if response.status_code in _LASTING:
            try:
                hf_raise_for_status(response)
            except Exception as error:  # of requests or httpx, by huggingface_hub's version
                how = f"fetch it first with `hf download {repository}`"
                raise LastingError(
                    f"it cannot be read by ranges ({first_line(error)}); {how}"
                ) from None
        hf_raise_for_status(response)
        data: bytes = response.content
        size = total(response.headers.get("content-range", ""))
        if size is None:  # all of it, whatever was asked for
            if len(data) > end:
                raise LastingError("the hub sends all of it instead of a part")
            return Answer(data[begin:end], len(data), revision)
        return Answer(data, size, revision)
