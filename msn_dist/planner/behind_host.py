"""A device that works off what its host dispatches: how long a row of operators takes both together.

The host is busy for h_i with operator i, the device for d_i once the host has dispatched it and all before is done.  On
a device that has nothing left to do, the last result is there after

    span = max over i of (h_1 + ... + h_i + d_i + ... + d_n)

which is neither of the sums: a host that is slow in the forward is not made up for by a device that is slow in the
backward.  Two rows one after the other span max(span_1 + d_2, h_1 + span_2), with d and h their sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Stretch:
    """Seconds of operators in a row."""

    host: float = 0.0  # that the host dispatches
    device: float = 0.0  # that the device works
    span: float = 0.0  # from the first dispatch to the last result

    @classmethod
    def one(cls, host: float, device: float) -> Stretch:
        """The device has nothing to do before the host is through."""
        return cls(host, device, host + device)

    @classmethod
    def of(cls, devices: Iterable[float], dispatch: float) -> Stretch:
        """Operators that each take the host `dispatch`."""
        total = cls()
        for device in devices:
            total = total.then(cls.one(dispatch, device))
        return total

    def awaited(self) -> Stretch:
        """The host waits for the last result: of a row from the beginning on, as what is before it is not looked at."""
        return replace(self, host=self.span)

    def then(self, other: Stretch) -> Stretch:
        span = max(self.span + other.device, self.host + other.span)
        return Stretch(self.host + other.host, self.device + other.device, span)
