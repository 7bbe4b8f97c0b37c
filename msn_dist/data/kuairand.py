"""KuaiRand (data/kuairand) -> the folder format, with causal features for the label long_view.

A training row sees its user's earlier rows; valid and test rows see their user's whole training history.
Statistics of a video, author, tag, ... come from the users of the other folds, in every split: so a row's
own label, and any of its user, is never in them, and all splits see them alike.
Shape suffixes: E training events, R rows of a split, U users, V videos.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from msn_dist.data import past
from msn_dist.data.folder import SPLITS, SplitWriter, fingerprint, is_current, new_folder, write_schema
from msn_dist.data.past import Events, out_of_fold
from msn_dist.data.row_group import readable
from msn_dist.data.schema import History, Schema
from msn_dist.errors import InputError

LABEL = "long_view"
HISTORY_LENGTH = 20
FOLDS = 10
_PRIOR = 0.35  # a constant: the mean of the labels would hold the row's own
_FILES = ("train", "valid", "test", "users", "videos")
_USER_FIELDS = [
    "user_active_degree", "is_live_streamer", "is_video_author", "follow_user_num_range", "fans_user_num_range",
    "friend_user_num_range", "register_days_range", *(f"onehot_feat{i}" for i in range(18)),
]  # fmt: skip
_VIDEO_FIELDS = ["author_id", "video_type", "upload_type", "upload_dt", "music_type"]
_HISTORY_FIELDS = ["video_id", "author_id", "tag", "duration"]
_COUNT_EDGES = [1, 2, 3, 5, 8, 12, 18, 26, 36]
_QUANTILES = 20
_STATISTICS = [f"fold_{field}_{kind}" for field in _HISTORY_FIELDS for kind in ("n", "rate")]
_BUCKETED = ["h_n", "h_rate", *_STATISTICS]
_DENSE = ["h_rate", *_STATISTICS]


def prepare(source: str | Path, target: str | Path) -> None:
    """Write `target` (schema.yaml, train/, valid/, test/) from the files in `source`; at once if it is up to date."""
    source, target = Path(source), Path(target)
    files = [source / f"{name}.parquet" for name in _FILES]
    for path in files:
        if not path.is_file():
            raise InputError(f"{path}: there is no such file; {source} must hold {', '.join(p.name for p in files)}")
    stamp = fingerprint([sys.modules[__name__], past], files)
    if is_current(target, stamp):
        return
    raw = Raw(*map(_read, files))
    splits = {split: Features(raw, split) for split in SPLITS}
    scale = Scale(splits["train"].statistics)
    with new_folder(target, stamp) as folder:
        write_schema(folder, _schema(raw, scale))
        for split, features in splits.items():
            with SplitWriter(folder / split) as writer:
                rows = features.columns(scale)
                # The source lies user after user; a reader shuffles within its buffer only.
                writer.write(rows.take(np.random.default_rng(0).permutation(len(rows))) if split == "train" else rows)


class Raw:
    """The five files as numpy: impressions of each split, encoded user and video fields, the training events.

    Users and videos are numbered 0, 1, ... in the order of their files: an id is a row.
    """

    def __init__(self, train: pa.Table, valid: pa.Table, test: pa.Table, users: pa.Table, videos: pa.Table) -> None:
        self.impressions = {"train": train.sort_by([("user_id", "ascending"), ("seq_pos", "ascending")])}
        self.impressions.update(valid=valid, test=test)
        self.users = {field: _encode(users[field]) for field in _USER_FIELDS}
        self.videos = {field: _encode(videos[field]) for field in _VIDEO_FIELDS}
        self.videos["video_id"] = videos["video_id"].to_numpy().astype(np.int64)
        self.videos["tag"] = _encode(pc.list_element(pc.split_pattern(videos["tag"], ","), 0))
        duration_V = _floats(videos["video_duration"])
        edges = np.nanquantile(duration_V, np.arange(1, _QUANTILES) / _QUANTILES)
        self.videos["duration"] = np.where(np.isnan(duration_V), 0, 1 + np.searchsorted(edges, duration_V))
        events = self.impressions["train"]
        self.events = Events(_int64(events["user_id"]), _int64(events[LABEL]))
        self.event_videos_E = _int64(events["video_id"])
        self.folds_U = np.random.default_rng(0).integers(0, FOLDS, users.num_rows)


class Features:
    """Every feature of one split before scaling; `statistics` are float columns."""

    def __init__(self, raw: Raw, split: str) -> None:
        self._raw, table = raw, raw.impressions[split]
        self.users_R, self.videos_R = _int64(table["user_id"]), _int64(table["video_id"])
        self.labels_R = _int64(table[LABEL])
        self.begin_R, self.end_R = raw.events.ranges_of(self.users_R)
        if split == "train":
            self.end_R = np.arange(table.num_rows)  # a training row is an event, and sees those before it
        self.statistics = self._counters() | self._out_of_fold()

    def columns(self, scale: Scale) -> pa.Table:
        raw = self._raw
        # No user_id: thirty rows a user are learnt by heart, for .001 less valid AUC; histories tell users apart.
        ids = {field: codes_U[self.users_R] for field, codes_U in raw.users.items()}
        ids |= {field: codes_V[self.videos_R] for field, codes_V in raw.videos.items()}
        ids |= scale.buckets(self.statistics)
        columns = {name: pa.array(values.astype(np.int32)) for name, values in ids.items()}
        columns |= {name: pa.array(values) for name, values in self._histories().items()}
        columns |= {name: pa.array(values) for name, values in scale.standardised(self.statistics).items()}
        columns |= {LABEL: pa.array(self.labels_R.astype(np.float32)), "group_user": pa.array(self.users_R)}
        return pa.table(columns)

    def _counters(self) -> dict[str, np.ndarray]:
        """Number and long_view rate of the user's past events."""
        count_R, positive_R = self._raw.events.totals(self.begin_R, self.end_R)
        return {"h_n": count_R.astype(float), "h_rate": (positive_R + 2 * _PRIOR) / (count_R + 2)}

    def _out_of_fold(self) -> dict[str, np.ndarray]:
        """Log count and long_view rate of the video, and of each of its fields, among users of the other folds."""
        raw, features = self._raw, {}
        for field in _HISTORY_FIELDS:
            of_video_V = raw.videos[field]
            n_R, p_R = out_of_fold(
                of_video_V[raw.event_videos_E],
                raw.events.labels_E,
                raw.folds_U[raw.events.users_E],
                of_video_V[self.videos_R],
                raw.folds_U[self.users_R],
                FOLDS,
            )
            features[f"fold_{field}_n"] = np.log1p(n_R)
            features[f"fold_{field}_rate"] = (p_R + 20 * _PRIOR) / (n_R + 20)
        return features

    def _histories(self) -> dict[str, pa.Array]:
        """List columns of the last positives and negatives, newest first."""
        raw, columns = self._raw, {}
        for name, label in (("positive", 1), ("negative", 0)):
            lengths_R, events = raw.events.recent(label, self.begin_R, self.end_R, HISTORY_LENGTH)
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths_R)]).astype(np.int32))
            for field in _HISTORY_FIELDS:
                values = raw.videos[field][raw.event_videos_E[events]].astype(np.int32)
                columns[f"{name}_{field}"] = pa.ListArray.from_arrays(offsets, pa.array(values))
        return columns


class Scale:
    """Bucket edges, means and deviations of the statistics, all from the training rows."""

    def __init__(self, statistics: dict[str, np.ndarray]) -> None:
        quantiles = np.arange(1, _QUANTILES) / _QUANTILES
        self.edges = {name: np.unique(np.quantile(values, quantiles)) for name, values in statistics.items()}
        self.edges["h_n"] = np.array(_COUNT_EDGES, dtype=float)
        self.moments = {name: (values.mean(), values.std()) for name, values in statistics.items()}

    def buckets(self, statistics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.searchsorted(self.edges[name], statistics[name], side="right") for name in _BUCKETED}

    def standardised(self, statistics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        scaled = {}
        for name in _DENSE:
            mean, deviation = self.moments[name]
            scaled[f"{name}_dense"] = ((statistics[name] - mean) / deviation).astype(np.float32)
        return scaled


def _schema(raw: Raw, scale: Scale) -> Schema:
    tables = {field: int(codes.max()) + 1 for field, codes in (raw.users | raw.videos).items()}
    tables |= {name: len(scale.edges[name]) + 1 for name in _BUCKETED}
    return Schema(
        name="kuairand",
        tables=tables,
        ids={name: name for name in tables},
        histories={
            name: History(max_length=HISTORY_LENGTH, columns={f"{name}_{field}": field for field in _HISTORY_FIELDS})
            for name in ("positive", "negative")
        },
        dense=[f"{name}_dense" for name in _DENSE],
        labels=[LABEL],
        group="group_user",
    )


def _read(path: Path) -> pa.Table:
    with readable(path):
        return pq.read_table(path)


def _encode(column: pa.ChunkedArray) -> np.ndarray:
    """Codes 0, 1, ... in the order of the values as text; null, where there is one, is a value too."""
    text = pc.fill_null(pc.cast(column, pa.string()), "").to_numpy(zero_copy_only=False).astype(str)
    return np.unique(text, return_inverse=True)[1].astype(np.int64)


def _int64(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(np.int64)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """float64 with NaN for null."""
    return pc.cast(column, pa.float64()).to_numpy()
