"""``--max-error``: whether what was measured is more than what is allowed, and how that is said."""

from __future__ import annotations


def exceeded(
    max_error: float | None, worst: str, error: float, total: float, more: str = ""
) -> str:
    """A sentence where the error of the worst or the total is above the limit; else "". An error
    that is not a number is above every limit.

    Args:
        worst: what has the largest error; more: what else to say of it.
    """
    if max_error is None or (error <= max_error and total <= max_error):
        return ""
    return (
        f"relative error above --max-error {max_error:g}: worst is {worst} with {error:.4g}{more}, "
        f"total is {total:.4g}"
    )
