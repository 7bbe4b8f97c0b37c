"""The time of weighting rows at home (msn_dist/sharding/home_bags.py), by the kernels or by torch's embedding_bag.

Rates are the look-up's own, for rows of float32 instead of the table's.
"""

from __future__ import annotations

from dataclasses import dataclass

from msn_dist.planner.machine import Machine

# time of embedding_bag over that of our kernel, which profiles of GPUs are of: the least of benchmarks.kernels on an
# H200, which has 4.6 to 8.8
_EMBEDDING_BAG = 4.6


@dataclass(frozen=True)
class HomeWork:
    """Hits of a rank, on rows that came; `once`: on a row each."""

    hits: float
    rows: float
    row_bytes: float
    by_kernels: bool
    once: bool

    def forward(self, machine: Machine) -> float:
        """Seconds of the sums: hits and rows are read as in a look-up."""
        slower = _EMBEDDING_BAG if machine.kind == "cuda" and not self.by_kernels else 1.0
        return slower * machine.read_seconds(self.hits, self.rows, self.row_bytes)

    def backward(self, machine: Machine) -> float:
        """Seconds of the gradients of rows and weights."""
        if self.by_kernels and self.once:
            # a row is read and its gradient written; indices, keys, order, weights and products
            return machine.pass_seconds(self.hits * (2 * self.row_bytes + 36))
        if self.by_kernels:  # the sort, sums and products of an update, and a row written as there
            return machine.update_seconds(self.hits, self.rows, self.row_bytes)
        # a sort; gradients that begin as zeros, in new memory, which costs what it does as the result of an addition,
        # whose operands count; the sums and products of an update, which steps no row
        summed = machine.update_seconds(self.hits, 0, self.row_bytes)
        return self.hits / machine.sort.at(self.hits) + machine.pass_seconds(3 * self.rows * self.row_bytes) + summed
