"""What torch.autocast asks of a memory: whatever enters or leaves a matrix product is of its dtype."""

from __future__ import annotations

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Of products on devices of this type; None where autocast is off."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def pooled_dtype(device_type: str) -> torch.dtype:
    """In which a memory's sums reach its gate."""
    return autocast_dtype(device_type) or torch.float32
