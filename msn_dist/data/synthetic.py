"""Synthetic impressions of any size, with a planted structure that takes a memory to fit.

Every user u and item i has a latent cluster c(u), d(i) in [0, clusters), a taste t(u) and a quality q(i),
all hashed from (seed, id), so that nothing is stored. A label k is drawn with

    logit P(label_k = 1) = bias_k + t(u) + q(i) + strength * S_k[c(u), d(i)]

where S_k is a random +-1 table of clusters x clusters entries. Averaged over users, or over items, the last
term is nearly 0, and S_k has full rank: neither id alone predicts it and narrow embeddings cannot factor it,
but one slot for each (row = user cluster, column = item cluster) holds it: what product keys address.
Users and items are drawn by Zipf's law. ``planted.json`` of a prepared folder says what can be reached with
the structure ("bayes") and without S ("without_memory").
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from msn_dist.data.folder import ROW_GROUP, SPLITS, SplitWriter, fingerprint, is_current, new_folder, write_schema
from msn_dist.data.schema import Schema
from msn_dist.errors import InputError

_BIAS = {"click": -0.7, "like": -4.5}
_BINS = 20_000


@dataclass(frozen=True)
class Planted:
    """What rows look like; shape suffix R rows."""

    users: int
    items: int
    clusters: int
    strength: float
    zipf: float
    observed: bool
    seed: int

    def rows(self, split: str, block: int, count: int) -> tuple[dict[str, np.ndarray], dict[str, tuple]]:
        """Columns of a block of rows, and for each label (P(label), P(label) averaged over the sign of S), each [R].

        Blocks have their own random streams: a row depends on (seed, split, block) only.
        """
        rng = np.random.default_rng([self.seed, SPLITS.index(split), block])
        users_R = self._zipf(rng.random(count), self.users)
        items_R = self._zipf(rng.random(count), self.items)
        segment_R = self._hash("segment", users_R, self.clusters)
        category_R = self._hash("category", items_R, self.clusters)
        taste_R, quality_R = self._score("taste", users_R), self._score("quality", items_R)
        columns = {"user_id": users_R, "item_id": items_R}
        if self.observed:
            columns |= {"segment": segment_R, "category": category_R}
        chances = {}
        for label, bias in _BIAS.items():
            sign_R = 2 * self._hash(f"table of {label}", segment_R * self.clusters + category_R, 2) - 1
            main_R = bias + taste_R + quality_R
            chance_R = _sigmoid(main_R + self.strength * sign_R)
            blind_R = (_sigmoid(main_R + self.strength) + _sigmoid(main_R - self.strength)) / 2
            chances[label] = (chance_R, blind_R)
            columns[label] = (rng.random(count) < chance_R).astype(np.float32)
        columns |= {"taste": taste_R.astype(np.float32), "quality": quality_R.astype(np.float32)}
        return columns, chances

    def schema(self) -> Schema:
        tables = {"user_id": self.users, "item_id": self.items}
        if self.observed:
            tables |= {"segment": self.clusters, "category": self.clusters}
        return Schema(
            name="synthetic",
            tables=tables,
            ids={name: name for name in tables},
            dense=["taste", "quality"],
            labels=list(_BIAS),
            group="user_id",
        )

    def _zipf(self, uniform_R: np.ndarray, size: int) -> np.ndarray:
        """Ids with P(rank r) about (r + 1) ** -zipf, by inverting the continuous law; ranks are spread over the ids."""
        power = 1 - self.zipf
        rank_R = ((uniform_R * ((size + 1) ** power - 1) + 1) ** (1 / power)).astype(np.int64) - 1
        stride = next(s for s in range(int(size * 0.618) + 1, 2 * size + 2) if math.gcd(s, size) == 1)
        return np.clip(rank_R, 0, size - 1) * stride % size  # the clip is for the last bit of rounding

    def _hash(self, what: str, ids_R: np.ndarray, size: int) -> np.ndarray:
        return (_mix(ids_R, self._salt(what)) % np.uint64(size)).astype(np.int64)

    def _score(self, what: str, ids_R: np.ndarray) -> np.ndarray:
        """Uniform with mean 0 and deviation 0.5."""
        return (_mix(ids_R, self._salt(what)) / 2.0**64 - 0.5) * math.sqrt(3)

    def _salt(self, what: str) -> np.uint64:
        return np.uint64(np.random.SeedSequence([self.seed, *what.encode()]).generate_state(1, np.uint64)[0])


def prepare(
    target: str | Path,
    *,
    rows: int = 500_000,
    users: int = 20_000,
    items: int = 10_000,
    clusters: int = 64,
    strength: float = 2.0,
    zipf: float = 1.05,
    observed: bool = True,
    seed: int = 0,
) -> None:
    """Write `target`: `rows` training rows, a tenth of that each for valid and test; at once if it is up to date.

    Memory does not grow with rows, users or items.

    Args:
        clusters: the planted table has clusters ** 2 entries for each label.
        strength: weight of the planted table in the logit; 0 plants nothing.
        zipf: exponent, above 0 and not 1.
        observed: whether the clusters are columns too (segment, category), or must be found from the ids.
    """
    for name, value in {"rows": rows // 10, "users": users, "items": items, "clusters": clusters}.items():
        if value < 1:
            raise InputError(f"synthetic {name} is too small: it takes 10 rows and one user, item and cluster")
    if zipf <= 0 or zipf == 1:
        raise InputError(f"synthetic zipf={zipf} must be above 0 and not 1; 1.05 is near the usual")
    target = Path(target)
    planted = Planted(users, items, clusters, strength, zipf, observed, seed)
    stamp = fingerprint([sys.modules[__name__]], rows=rows, **asdict(planted))
    if is_current(target, stamp):
        return
    report = {"rows": rows, **asdict(planted)}
    with new_folder(target, stamp) as folder:
        write_schema(folder, planted.schema())
        for split, count in zip(SPLITS, (rows, rows // 10, rows // 10), strict=True):
            possible = {label: _Possible() for label in _BIAS}
            with SplitWriter(folder / split) as writer:
                for block, size in _blocks(count):
                    columns, chances = planted.rows(split, block, size)
                    writer.write(pa.table(columns))
                    for label, (chance_R, blind_R) in chances.items():
                        possible[label].update(chance_R, blind_R)
            report[split] = {label: part.compute() for label, part in possible.items()}
        (folder / "planted.json").write_text(json.dumps(report, indent=2))


class _Possible:
    """Expected AUC and logloss of the best predictions with and without the planted table, in constant memory."""

    def __init__(self) -> None:
        # [who predicts, outcome 0 or 1, bin of the prediction]: expected number of rows.
        self._mass = np.zeros((2, 2, _BINS))
        self._loss, self._rows = np.zeros(2), 0

    def update(self, chance_R: np.ndarray, blind_R: np.ndarray) -> None:
        self._rows += len(chance_R)
        for who, guess_R in enumerate((chance_R, blind_R)):
            self._loss[who] -= (chance_R * np.log(guess_R) + (1 - chance_R) * np.log1p(-guess_R)).sum()
            bins_R = (guess_R * _BINS).astype(np.int64)
            for outcome, weight_R in enumerate((1 - chance_R, chance_R)):
                self._mass[who, outcome] += np.bincount(bins_R, weight_R, _BINS)

    def compute(self) -> dict[str, dict[str, float]]:
        result = {"rate": float(self._mass[0, 1].sum() / self._rows)}
        for who, name in enumerate(("bayes", "without_memory")):
            negative, positive = self._mass[who]
            below = np.cumsum(negative) - negative / 2
            auc = float((positive * below).sum() / (positive.sum() * negative.sum()))
            result[name] = {"auc": auc, "logloss": float(self._loss[who] / self._rows)}
        return result


def _blocks(rows: int) -> Iterator[tuple[int, int]]:
    for block, start in enumerate(range(0, rows, ROW_GROUP)):
        yield block, min(ROW_GROUP, rows - start)


def _mix(values: np.ndarray, salt: np.uint64) -> np.ndarray:
    """The finaliser of splitmix64: uint64 that look independent for consecutive values."""
    x = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + salt
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
