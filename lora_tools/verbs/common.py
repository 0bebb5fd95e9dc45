"""What the verbs share: options that recur, and the making of reports."""

from __future__ import annotations
