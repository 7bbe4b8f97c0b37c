"""Causal features: what a row may know of the events before it, vectorised over all rows.

Events are the training impressions sorted by (user, time). A row's past is the range [begin, end) of
events: those of its user before it for a training row, all of its user's for a later row.
Shape suffixes: E events, R rows, U users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from msn_dist.data.table import ragged_index


@dataclass(frozen=True)
class Events:
    """The training impressions, sorted by user and then by time."""

    users_E: np.ndarray  # int64, ascending
    labels_E: np.ndarray  # int64, 0 or 1

    def ranges_of(self, users_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[begin, end) of all events of each user; empty for a user without any."""
        return np.searchsorted(self.users_E, users_R), np.searchsorted(self.users_E, users_R, side="right")

    def totals(self, begin_R: np.ndarray, end_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(events, positives) in the ranges."""
        sums = np.concatenate([[0], np.cumsum(self.labels_E)])
        return end_R - begin_R, sums[end_R] - sums[begin_R]

    def recent(self, label: int, begin_R: np.ndarray, end_R: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The last `limit` events with this label in each range, newest first: (lengths_R, event indices)."""
        chosen = np.flatnonzero(self.labels_E == label)
        first, last = np.searchsorted(chosen, begin_R), np.searchsorted(chosen, end_R)
        lengths_R = np.minimum(last - first, limit)
        # Counting down from the newest is counting up in the reversed list.
        return lengths_R, chosen[::-1][ragged_index(len(chosen) - last, lengths_R)]


def out_of_fold(
    key_E: np.ndarray, labels_E: np.ndarray, fold_E: np.ndarray, key_R: np.ndarray, fold_R: np.ndarray, folds: int
) -> tuple[np.ndarray, np.ndarray]:
    """(events, positives) with the row's key in all folds but the row's own."""
    keys = int(max(key_E.max(), key_R.max())) + 1
    cell_E = fold_E * keys + key_E
    counts = np.bincount(cell_E, minlength=folds * keys).reshape(folds, keys)
    positives = np.bincount(cell_E, weights=labels_E, minlength=folds * keys).reshape(folds, keys)
    return (counts.sum(0) - counts)[fold_R, key_R], (positives.sum(0) - positives)[fold_R, key_R]
