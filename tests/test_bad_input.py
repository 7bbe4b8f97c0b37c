"""Bad input, as a user meets it: exit code 2 on every rank, one message that names the place, and no hang."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_data_criteo import line
from two_ranks import msn_launched, msn_on_two_ranks

from msn_dist.launch.cli import main
from tiny_data import ROW_GROUPS, write_data, write_split

ROOT = Path(__file__).parent.parent
CONFIG = """\
name: tiny
data: {path: PATH, batch_size: 20, shuffle_buffer: 1}
model: {backbone: rankmixer, tokens: 2, width: 16, embedding_dim: 8}
memory: {sub_keys: 9, top_k: 4, key_dim: 8}
training: {device: cpu, log_every: 1, timeout_seconds: 60}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config; its data is beside it, in `data`."""
    write_data(tmp_path / "data")
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("PATH", str(tmp_path / "data")))
    return path


def column_of(split: str, column: str, change: Callable[[list], list] | None, kind: pa.DataType | None = None):
    """An edit of a data folder: other values in a column, or no such column."""

    def edit(data: Path) -> None:
        table = pq.read_table(data / split)
        place = table.column_names.index(column)
        values = change and pa.array(change(table[column].to_pylist()), kind)
        table = table.remove_column(place) if change is None else table.set_column(place, column, [values])
        write_split(data / split, table, ROW_GROUPS[split])

    return edit


def put(row: int, value: object) -> Callable[[list], list]:
    return lambda values: [*values[:row], value, *values[row + 1 :]]


def cut_short(data: Path) -> None:
    file = data / "train" / "part-0.parquet"
    file.write_bytes(file.read_bytes()[:-100])


def without_rows(data: Path) -> None:
    write_split(data / "valid", pq.read_table(data / "valid").slice(0, 0), [0])


# Row 155 lies in row group 1, which only the second rank reads, after row group 2.
BAD_ID = column_of("train", "item", put(155, 30))
BAD_ID_MESSAGE = (
    "{data}/train/part-0.parquet, row group 1, column 'item', row 5: id 30 is not in [0, 30) of table 'item'; "
    "enlarge tables.item in schema.yaml or correct the data"
)
CASES = {
    "missing column": (
        column_of("train", "age", None),
        [],
        "{data}/train/part-0.parquet: column 'age' of schema.yaml is missing; ",
    ),
    "wrong type": (
        column_of("valid", "user", lambda users: [f"u{user}" for user in users]),
        [],
        "{data}/valid/part-0.parquet: column 'user' is string, but must be an integer. ",
    ),
    "id out of range in the middle of training": (BAD_ID, [], BAD_ID_MESSAGE),
    "the same in a reader process": (BAD_ID, ["data.workers=1"], BAD_ID_MESSAGE),
    "bad label in the test split": (
        column_of("test", "view", put(75, 7.0)),
        ["training.max_steps=1"],
        "{data}/test/part-0.parquet, row group 1, column 'view', row 5: label 7 is not in [0, 1]; ",
    ),
    "truncated file": (
        cut_short,
        [],
        "{data}/train/part-0.parquet: cannot be read as Parquet, truncated or corrupt ",
    ),
    "empty split": (without_rows, [], "{data}/valid: the split has no rows (files: 1); "),
    "no data set": (
        lambda data: (data / "schema.yaml").unlink(),
        [],
        "{data}: no schema.yaml here; write the data by `msn prepare`, or correct data.path",
    ),
    "batch too small": (
        lambda data: None,
        ["data.batch_size=1"],
        "data.batch_size=1 is less than one row for each of 2 ranks",
    ),
    "a look-up that cannot run here": (
        lambda data: None,
        ["memory.lookup=triton"],
        "memory.lookup=triton: the kernels need a CUDA GPU, and the device is cpu; set memory.lookup to auto or ",
    ),
    "a look-up without values of bf16": (
        lambda data: None,
        ["memory.lookup=fbgemm", "memory.value_dtype=bf16"],
        "memory.lookup=fbgemm: FBGEMM stores no values of bf16; set memory.lookup to auto or reference",
    ),
    "a look-up that would lose small steps of fp16": (
        lambda data: None,
        ["memory.lookup=fbgemm", "memory.value_dtype=fp16"],
        "memory.lookup=fbgemm: on a CPU FBGEMM rounds fp16 to the nearest, which loses small steps; set memory.lookup ",
    ),
    "a look-up without the optimizer": (
        lambda data: None,
        ["memory.lookup=fbgemm", "optimizer.values.kind=rowwise_adam"],
        "memory.lookup=fbgemm: on a CPU FBGEMM has no rowwise_adam (optimizer.values.kind); set memory.lookup to auto ",
    ),
    "a retrieval that cannot run here": (
        lambda data: None,
        ["memory.retrieval=triton"],
        "memory.retrieval=triton: the kernels need a CUDA GPU, and the device is cpu; set memory.retrieval to auto ",
    ),
    "attention without histories": (
        lambda data: (data / "schema.yaml").write_text(
            "{name: tiny, tables: {user: 40}, ids: {user: user}, labels: [view], group: user}"
        ),
        ["model.attention=true"],
        "model.attention is true, but schema 'tiny' has no histories; set it to false",
    ),
    "attention over a table that is too small to cut": (
        lambda data: (data / "schema.yaml").write_text(
            (data / "schema.yaml").read_text().replace("item: 30", "item: 1")
        ),
        ["model.attention=true"],
        "features.sequence_tables: table 'item' is read as sequences, and its 1 rows leave a rank of 2 without any; ",
    ),
    "values beyond the memory of the host": (
        lambda data: None,
        ["memory.sub_keys=1048576"],
        "memory: the values of this node's ranks take 64 TiB, and ",
    ),
    "groups of all ranks": (
        lambda data: None,
        ["memory.strategy=two_level", "memory.group_ranks=2"],
        "memory.group_ranks=2: 2 ranks are not several groups of 2; leave it out for groups of a node",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_training_on_two_ranks_ends_with_exit_code_2_and_one_message(case: str, config: Path) -> None:
    spoil, overrides, message = CASES[case]
    spoil(config.parent / "data")
    command = ["train", str(config), *overrides, "--out", str(config.parent / "run")]
    exit_codes, output = msn_on_two_ranks(config.parent, command)
    assert exit_codes == [2, 2], output
    *progress, error = output.splitlines()
    assert bool(progress) == (spoil is BAD_ID or "test split" in case)
    assert error.startswith(message.format(data=config.parent / "data"))
    if progress:
        assert progress.pop(0) == "memory back ends: retrieval reference, lookup fbgemm"
    assert all(text.startswith(("step ", "valid ", "note: ")) for text in progress)


def test_the_launched_command_explains_bad_input_in_the_middle_of_training_once(config: Path) -> None:
    BAD_ID(config.parent / "data")
    command = ["train", str(config), "--nproc", "2", "--out", str(config.parent / "run")]
    result = msn_launched(ROOT, command)
    assert result.returncode == 2
    assert result.stderr == BAD_ID_MESSAGE.format(data=config.parent / "data") + "\n"
    assert result.stdout.splitlines()[-1].startswith("step ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainig.epochs=2", "trainig: unknown key; did you mean 'training'?"),
        ("optimizer.dense.lrr=0.1", "optimizer.dense.lrr: unknown key; did you mean 'lr'?"),
        ("model.blocks=ffn", "model.blocks: unknown key; did you mean 'block'?"),
        ("model.backbone=transformer", "model.backbone: must be one of dcnv2, dlrm, rankmixer"),
        ("data.batch_size=many", "data.batch_size: input should be a valid integer, found 'many'"),
        ("memory.top_k=10", "memory: top_k=10 is larger than sub_keys=9"),
        ("memory.strategy=row_polled", "memory.strategy: input should be 'row_pooled', 'row_pooled_sparse', "),
        ("memory.group_ranks=2", "memory: group_ranks=2 is set, and strategy: row_pooled has no groups of ranks; "),
        ("memory={strategy: two_level, group_ranks: 1}", "memory.group_ranks: input should be greater than or eq"),
        ("memory={strategy: column, lookup: fbgemm}", "memory: lookup: fbgemm cannot serve strategy: column"),
        ("memory={strategy: replicated, lookup: fbgemm}", "memory: lookup: fbgemm cannot serve strategy: replicated"),
        ("memory.lookup=tbe", "memory.lookup: input should be 'auto', 'reference', 'fbgemm' or 'triton', found 'tbe'"),
        ("memory.retrieval=fbgemm", "memory.retrieval: input should be 'auto', 'reference' or 'triton', found "),
        ("memory.wire=fp8", "memory.wire: input should be 'fp32', 'bf16', 'fp16' or 'int8', found 'fp8'"),
        ("memory.value_dtype=fp8", "memory.value_dtype: input should be 'fp32', 'bf16' or 'fp16', found 'fp8'"),
        ("optimizer.values.kind=adam", "optimizer.values.kind: input should be 'rowwise_adagrad', 'sgd' or 'rowwise_a"),
        ("optimizer.values={kind: sgd, eps: 1e-3}", "optimizer.values: eps is set, and kind: sgd has none; leave it "),
        ("optimizer.values.beta1=0.5", "optimizer.values: beta1 is set, and kind: rowwise_adagrad has none; leave it"),
        ("memory.value_dim=6", "memory: value_dim=6 is not a multiple of 4"),
        ("model.width=15", "width=15 is not a multiple of tokens=2"),
        ("model={backbone: rankmixer, block: msn_smoe, tokens: 2, width: 20}", "must be multiples of 8"),
        ("model.block=ffn", "memory is set, but block: ffn carries none"),
        ("memory.chunks=21", "memory.chunks=21 is more than the 20 rows of a rank; lower it"),
        ("optimizer.dense.lr=.inf", "optimizer.dense.lr: input should be a finite number, found inf"),
        ("seed=9223372036854775808", "seed: input should be less than 140737488355328, found 9223372036854775808"),
        ("memory={sub_keys: 9, sub_keys: 8}", "is not valid YAML (sub_keys stands twice)"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_their_key(
    override: str, message: str, config: Path, capsys: pytest.CaptureFixture
) -> None:
    assert exit_code("train", str(config), override) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error


def test_what_the_storage_refuses_is_told_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "profile.json").mkdir()
    assert exit_code("calibrate", "--output", str(tmp_path / "profile.json")) == 2
    assert "profile.json: is a folder" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(CONFIG)
    (tmp_path / "run" / "report.html").mkdir()
    assert exit_code("report", str(tmp_path / "run")) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error == f"{tmp_path / 'run' / 'report.html'}: cannot be read or written (Is a directory)"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB."), "CUDA out of memory. Tried to"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"), "can't al"),
    ],
)
def test_running_out_of_memory_is_one_message_with_what_tells_more(
    error: Exception, says: str, config: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: object) -> None:
        raise error

    monkeypatch.setattr("msn_dist.training.run.train", train)
    assert exit_code("train", str(config), "--nproc", "1") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"rank 0 ran out of memory: {says}") and second.startswith("`msn plan CONFIG --topology")


def test_a_malformed_line_of_a_criteo_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "day_0"
    source.write_text("\n".join([line(0), line(1), line(2).replace("\t", " ", 1), line(3)]) + "\n")
    assert exit_code("prepare", "criteo", str(source), "--target", str(tmp_path / "out")) == 2
    assert capsys.readouterr().err == (
        f"{source}, line 3: has 39 columns, not 40 separated by tabs; correct or remove the line\n"
    )
    source.write_text("".join(f"{line(number)}\n" for number in range(10)))
    assert exit_code("prepare", "criteo", str(source), "--target", str(tmp_path / "out")) == 0
    assert pq.read_table(tmp_path / "out" / "train").num_rows == 8


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code
