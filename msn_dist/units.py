"""Numbers as people read them."""

from __future__ import annotations


def binary(count: float) -> str:
    """Bytes: 1536 is 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
