"""Values in the host's memory behind a cache on the GPU: the same numbers as on the GPU, and what a config may ask."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_checkpoint import hashes, save_and_train_on, train
from test_sharding import STEP_OVER_RANKS
from test_training import STEPS
from torch import Tensor

from memory_parity import OPTIMIZER, Case, Tolerance, check_parity, gathered, plain, sharded
from msn_dist.config import MemoryConfig, TrainingConfig
from msn_dist.errors import InputError
from msn_dist.memory.values import VALUE_DTYPES
from msn_dist.sharding import lookup as lookups
from msn_dist.sharding.cache_size import cache_sets
from msn_dist.sharding.hits import Hits, offsets_of
from msn_dist.sharding.lookup import Lookup, choose_lookup, make_lookup
from msn_dist.sharding.strategies import STRATEGIES
from msn_dist.strict_yaml import parse
from msn_dist.training import checkpoint, run
from msn_dist.training.checkpoint import load_checkpoint, read, write
from msn_dist.training.host_memory import free_host_bytes, lies_in_memory, require_host_memory
from msn_dist.training.ranks import Ranks, joined_ranks
from msn_dist.training.run_directory import RunDirectory
from msn_dist.training.trainer import Trainer
from ranks import run_ranks
from tiny_data import MEMORY, SCHEMA, config_of, write_data

pytestmark = [
    pytest.mark.filterwarnings("ignore:TBE B200 optimization:UserWarning"),
    pytest.mark.filterwarnings("ignore:`_get_pg_default_device` will be deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Multiple backends are registered:UserWarning"),
]
ROWS, DIM, BAGS, HITS = 2_000, 16, 96, 8
PINNED = 2**20  # rows, in fp32; FBGEMM is told to pin tables from 64 MiB on
CACHED = 64  # rows: two sets, less than a step hits
GIB = 2**30
GPU, CPU = torch.device("cuda"), torch.device("cpu")


def hits_of(step: int, rows_dtype: torch.dtype = torch.int32, uniform: bool = True, rows: int = ROWS) -> Hits:
    """Some rows in every step, most in one; more distinct ones than the cache has room for."""
    generator = torch.Generator().manual_seed(step)
    rows_H = (rows * torch.rand(BAGS * HITS, generator=generator) ** 3).to(rows_dtype)
    assert len(rows_H.unique()) > 2 * CACHED
    weights_H = torch.rand(BAGS * HITS, generator=generator)
    if uniform:
        return Hits.uniform(rows_H.to(GPU), weights_H.to(GPU), HITS)
    lengths_G = torch.tensor([0, 2 * HITS, HITS, HITS] * (BAGS // 4))
    return Hits(rows_H.to(GPU), weights_H.to(GPU), offsets_of(lengths_G).to(GPU))


def table(tier: str, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> Lookup:
    cache = CACHED / rows if tier == "host" else None
    made = make_lookup("fbgemm", rows, DIM, OPTIMIZER, GPU, dtype, cache=cache)
    assert (made.name, made.tier) == ("fbgemm", tier)
    made.weight_RD.copy_(torch.randn(rows, DIM, generator=torch.Generator().manual_seed(9)))
    return made


def gradient(step: int) -> Tensor:
    return torch.randn(BAGS, DIM, generator=torch.Generator().manual_seed(step + 100)).to(GPU)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("value_dtype", "rows_dtype", "uniform", "rows"),
    [
        ("fp32", torch.int32, True, ROWS),
        ("fp32", torch.int64, False, ROWS),
        ("fp16", torch.int32, False, ROWS),
        ("fp32", torch.int32, False, PINNED),
        ("fp16", torch.int32, True, 2 * PINNED),
    ],
)
def test_three_steps_through_a_small_cache_are_those_on_the_device(
    value_dtype: str, rows_dtype: torch.dtype, uniform: bool, rows: int
) -> None:
    """Values of 16 bits are rounded by other random numbers: they are compared with those of 32, to three roundings."""
    device, host = table("device", rows=rows), table("host", VALUE_DTYPES[value_dtype], rows)
    assert len(host._tbe.lxu_cache_weights) == CACHED and host._tbe.uvm_host_mapped == (rows >= PINNED)
    exact = value_dtype == "fp32"
    device.weight_RD.copy_(host.weight_RD)  # as they were rounded at the start
    close = {"rtol": 1e-4, "atol": 1e-5} if exact else {"rtol": 0, "atol": 3 * torch.finfo(torch.float16).eps * 8}
    for step in range(3):
        found = []
        for one in (device, host):
            hits = hits_of(step, rows_dtype, uniform, rows)
            pooled_GD = one.read(hits, update_follows=True)
            found.append([pooled_GD, one.update(hits, gradient(step)), one.state.moment_R.clone()])
        for number, (expected, got) in enumerate(zip(*found, strict=True)):
            # sums of HITS values of up to 4, and of DIM of them times a gradient
            wider = close if exact or number == 2 else {"rtol": 0, "atol": 0.25}
            torch.testing.assert_close(got, expected, **wider)
    host.settle()
    torch.testing.assert_close(host.weight_RD.float(), device.weight_RD, **close)
    assert not torch.equal(host.weight_RD.float(), table("device", rows=rows).weight_RD)


@pytest.mark.gpu
def test_the_rows_are_not_in_the_memory_of_the_gpu() -> None:
    before = torch.cuda.memory_allocated()
    host = table("host", rows=PINNED)
    assert host.weight_RD.is_cuda and host.state.moment_R.is_cuda  # the first is the host's memory, as the GPU sees it
    assert torch.cuda.memory_allocated() - before < host.weight_RD.nbytes / 2


@pytest.mark.gpu
def test_a_read_between_a_look_up_and_its_update_changes_nothing() -> None:
    """It takes over the places in the cache that the look-up had."""
    found = []
    for one in (table("device"), table("host")):
        first, second = (hits_of(step) for step in range(2))
        read = [one.read(first, update_follows=True), one.read(second)]
        of_weights = one.update(first, gradient(0))
        again = one.read(second)
        one.settle()
        found.append([*read, of_weights, again, one.weight_RD, one.state.moment_R])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_what_is_written_to_a_settled_table_is_what_is_read() -> None:
    host, hits = table("host"), Hits.uniform(torch.arange(40, dtype=torch.int32, device=GPU), None, 1)
    host.read(hits)
    host.settle()
    host.weight_RD.fill_(3.0)
    assert torch.equal(host.read(hits), torch.full((40, DIM), 3.0, device=GPU))


def two_ranks(rank: int, world: int, folder: Path) -> None:
    """Every row strategy against the plain memory; then a checkpoint of each tier, read by the other."""
    of_the_host = {"tier": "host", "cache": 0.01}  # one set: 32 rows
    ranks = Ranks(rank, world, 1, GPU, dist.group.WORLD, dist.group.WORLD)
    cases = [
        Case("more rows hit than cached", "uneven"),
        Case("an empty local batch", "one empty"),
        Case("owners without a hit", "uneven", sub_keys=20, heads=1, repeated=True),
        Case("rows go and come back", "even", sub_keys=64, heads=1, value_dim=8),
    ]
    for case in cases:
        expected = plain(case, sum(case.rows_per_rank(world)), steps=3)
        for strategy in (name for name in STRATEGIES if name not in STEP_OVER_RANKS):
            model = sharded(case, GPU, 1, strategy=strategy, **of_the_host)
            assert model.module.values.lookup.tier == "host"
            check_parity(case, expected, model, GPU, Tolerance())
    trained = {"host": model}
    trained["device"] = sharded(cases[-1], GPU, 1)
    check_parity(cases[-1], expected, trained["device"], GPU, Tolerance())
    for here, there in (("host", "device"), ("device", "host")):
        state = state_of(trained[here])
        write(folder / here, state, ranks)
        kept = [gathered(trained[here].module.values, what) for what in ("weight", "moment")]
        other = sharded(cases[-1], GPU, 1, **(of_the_host if there == "host" else {}))
        check_parity(cases[-1], expected, other, GPU, Tolerance())  # its cache is full of rows
        state = state_of(other)
        for tensor in state["fused"]["state"].values():
            tensor["moment"].to_local().fill_(-1)
        read(folder / here, state, ranks)
        other.load_state_dict(state["model"])
        other.fused_optimizer.load_state_dict(state["fused"])
        for what, before in zip(("weight", "moment"), kept, strict=True):
            assert torch.equal(gathered(other.module.values, what), before), f"{what} of {here} read by {there}"
    del model, other, trained, state
    gc.collect()


def state_of(model) -> dict:
    return {"model": model.state_dict(), "fused": model.fused_optimizer.state_dict()}


@pytest.mark.gpu
def test_row_strategies_on_two_ranks_equal_the_plain_memory_and_share_checkpoints(tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, tmp_path)


def trainer_of(folder: Path, ranks: Ranks, **memory: object) -> Trainer:
    config = config_of(folder / "data", "msn_ffn", memory=MEMORY | memory, seed=5)
    return Trainer(config, SCHEMA, RunDirectory(folder), ranks)


@pytest.mark.gpu
def test_a_run_saves_in_the_background_and_goes_on_in_the_other_tier(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    with joined_ranks(TrainingConfig(device="cuda")) as ranks, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint._Replacing, "write_data", checkpoint._Replacing.write_data)  # to be undone
        host = trainer_of(tmp_path, ranks, tier="host", cache=0.01)
        assert host.back_ends["tier"] == "host"
        saved = save_and_train_on(host, tmp_path)
        assert saved["hashes"] != saved["hashes at the end"]
        device = trainer_of(tmp_path, ranks)
        for other in (device, host):
            load_checkpoint(tmp_path / "checkpoint", other.model, other.optimizers, ranks)
            assert hashes(other) == saved["hashes"]
            losses = train(other, tmp_path, range(len(STEPS) - len(saved["losses"]), len(STEPS)))
            assert losses == pytest.approx(saved["losses"], rel=1e-4)
        del host, device, other


def test_on_a_cpu_a_run_says_once_that_the_tier_changes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    write_data(tmp_path / "data")
    training = {"device": "cpu", "max_steps": 3}
    for tier in ("device", "host"):
        config = config_of(tmp_path / "data", "msn_ffn", memory=MEMORY | {"tier": tier}, training=training)
        run.train(config, tmp_path / tier)
        notes = [line for line in capfd.readouterr().out.splitlines() if "memory.tier" in line]
        said = ["note: memory.tier=host: on a CPU all memory is the host's, so this changes nothing"]
        assert notes == (said if tier == "host" else [])
    losses = [RunDirectory.open(tmp_path / tier).records("train")[-1]["loss"] for tier in ("device", "host")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lookup": "triton"}, "only fbgemm has a cache on the GPU, and this is lookup: triton; leave lookup out"),
        ({"lookup": "reference"}, "only fbgemm has a cache on the GPU, and this is lookup: reference; leave lookup"),
        ({"value_dtype": "bf16"}, "FBGEMM stores no values of bf16; set value_dtype to fp32 or fp16, or leave tier"),
        ({"strategy": "column"}, "strategy: column steps rows past the cache; take a row strategy, or leave tier out"),
        ({"strategy": "replicated"}, "strategy: replicated steps rows past the cache; take a row strategy"),
        ({"chunks": 2}, "chunks=2 would read rows past the cache, for the gradients of weights; set chunks to 1"),
    ],
)
def test_a_tier_that_cannot_be_is_refused_with_the_reason_and_the_fix(settings: dict, reason: str) -> None:
    with pytest.raises(InputError, match=f"^here: tier: host: {reason}"):
        parse(MemoryConfig, {"tier": "host"} | settings, "here")
    parse(MemoryConfig, settings, "here")


@pytest.mark.parametrize("cache", [0.0, 1.5, -1.0])
def test_a_cache_is_a_share_of_the_rows(cache: float) -> None:
    with pytest.raises(InputError, match="^here: cache: input should be"):
        parse(MemoryConfig, {"tier": "host", "cache": cache}, "here")


def test_the_host_tier_is_fbgemms_on_a_gpu_and_means_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "why_no_triton", lambda _: None)
    assert choose_lookup("auto", GPU, DIM, torch.float16, tier="host") == "fbgemm"
    assert choose_lookup("auto", CPU, DIM, torch.float16, tier="host") == "reference"
    assert make_lookup("auto", ROWS, DIM, OPTIMIZER, CPU, cache=0.1).tier == "device"
    monkeypatch.setattr(lookups, "_why_no_fbgemm", lambda: "FBGEMM is not installed")
    with pytest.raises(InputError, match="^memory.tier=host: FBGEMM is not installed; set memory.tier to device$"):
        choose_lookup("auto", GPU, DIM, tier="host")


def test_a_host_without_room_for_the_values_and_their_copy_is_refused() -> None:
    with pytest.raises(InputError, match="take 3 GiB of its memory, and as much again .* but 5 GiB is free; use more"):
        require_host_memory(3 * GIB, free=5 * GIB)
    for free in (6 * GIB, None):
        require_host_memory(3 * GIB, free)


def test_what_is_free_is_what_the_system_or_the_container_can_still_give(tmp_path: Path) -> None:
    assert free_host_bytes(tmp_path) is None
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 70 kB\nHugePages_Total: 0\n")
    assert free_host_bytes(tmp_path) == 70 * 1024
    for limit, free in (("max", 70 * 1024), ("50000", 20_000)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.stat").write_text("anon 20000\nfile 999999\nshmem 10000\n")
        assert free_host_bytes(tmp_path) == free
    assert free_host_bytes() is None or free_host_bytes() > 0


@pytest.mark.parametrize(
    ("path", "in_memory"),
    [("/dev/shm/run", True), ("/dev/shm", True), ("/dev/shmall", False), ("/data/run", False), ("/data/ram/run", True)],
)
def test_a_file_system_in_memory_is_told_from_one_on_a_disk(path: str, in_memory: bool, tmp_path: Path) -> None:
    assert not lies_in_memory(Path(path), tmp_path)
    (tmp_path / "proc").mkdir()
    mounts = [
        "/dev/vda / ext4 rw 0 0",
        "tmpfs /dev/shm tmpfs rw 0 0",
        "nfs:/x /data nfs4 rw 0 0",
        "r /data/ram ramfs rw 0 0",
    ]
    (tmp_path / "proc/mounts").write_text("\n".join(mounts))
    assert lies_in_memory(Path(path), tmp_path) == in_memory


@pytest.mark.parametrize(
    ("rows", "share", "sets"),
    [(1, 0.1, 1), (320, 0.1, 1), (321, 1.0, 11), (2**31, 0.1, 6710887), (2**40, 0.1, 2**26 - 1)],
)
def test_a_cache_has_whole_sets(rows: int, share: float, sets: int) -> None:
    assert cache_sets(rows, share) == sets
