"""The verbs: one file and one row (``rows``) each.

Out of a row are made the command with its options, the signature and the docstring of the public
function, and the list of paths that nothing may be written over.
"""

from __future__ import annotations

from lora_tools.verbs.rows.of_adapters import OF_ADAPTERS
from lora_tools.verbs.rows.of_changes import OF_CHANGES
from lora_tools.verbs.rows.of_findings import OF_FINDINGS
from lora_tools.verbs.rows.of_storage import OF_STORAGE

VERBS = {verb.name: verb for verb in (*OF_CHANGES, *OF_ADAPTERS, *OF_STORAGE, *OF_FINDINGS)}
