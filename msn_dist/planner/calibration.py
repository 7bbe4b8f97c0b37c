"""Measures this machine: the profile that `msn calibrate` writes.

All ranks measure at the same time, so that what they share (cores, memory, links) is shared as in a training step.

Shape suffixes: M bags, L hits a bag, R rows, D value width, N sub-keys of an axis, H heads, E key width.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from msn_dist.config import RunConfig
from msn_dist.data.schema import Schema
from msn_dist.memory.product_keys import choose_retrieval
from msn_dist.planner.dense_trace import trace_step
from msn_dist.planner.machine import SINGLE, Collective, Curve, Dispatch, Latency, Machine, device_name
from msn_dist.planner.stopclock import Stopclock
from msn_dist.sharding.buckets import bucket_rows, bucket_rows_by_kernel, distinct_rows
from msn_dist.sharding.hits import Hits
from msn_dist.sharding.lookup import choose_lookup, make_lookup
from msn_dist.sharding.value_optimizer import ValueOptimizer

_HITS, _FEW_ROWS = 32, 256  # of a bag, and rows that any cache holds
_BURST = 2**26  # bytes of results that live at once, as in a step: on a CPU memory that is taken anew is dear
_TABLE_BYTES = {"cuda": 2**31, "cpu": 2**26}  # more than a cache holds
_BAGS = {"cuda": 32_768, "cpu": 4096}
_STRETCHES, _LEAST_SHARE = 0.5, 1e-3  # seconds that ranks compute in all, and what they may wait at least
_STEADY = 2.5  # what the median round of a measurement may take of its fastest
Say = Callable[[str], None]
TinyStep = tuple[RunConfig, Schema, int, Callable[[], object]]


def calibrate(
    device: torch.device,
    group: dist.ProcessGroup,
    node: dist.ProcessGroup,
    control: dist.ProcessGroup,
    versions: dict[str, str | None],
    tiny_step: Callable[[int, int], TinyStep],
    say: Say = lambda line: None,
) -> Machine:
    """The profile of one rank of `group`, with the links inside its node, whose ranks are `node`.

    A collective call of `group` and `control`, which have the same ranks.  `say` is told what is measured next.
    `tiny_step` makes a training step of so many layers and memories, whose time on a GPU is its host's, with its
    config, schema and rows.
    """
    clock = Stopclock(device, control)
    gpu = device.type == "cuda"

    def curve(name: str, measure: Callable[[Any], float], sizes: Sequence[float]) -> Curve:
        say(name)
        return Curve(points=[[float(size), measure(size)] for size in sizes], source="measured")

    say("operators")
    few = torch.zeros(16, device=device)
    operator = clock.seconds(lambda: few + 1)
    large = 2**30 if gpu else 2**27
    figures = {
        "copy_rate": curve(
            "element-wise operators",
            lambda size: size / _in_burst(clock, _added(device, size), size // 3),
            # on a CPU whether results of 10 to 32 MB come in new memory is up to what has been freed before
            [2**power for power in (14, 17, 20, 23, *((26,) if gpu else ()))] + [large],
        ),
        "function_rate": curve(
            "functions",
            lambda size: size / _in_burst(clock, _function(device, size), 4 * size),
            [2**12, 2**16, 2**20, 2**22, 2**24],
        ),
        "matrix_fp32": curve("matrix products in fp32", _product_rate(clock, torch.float32), _product_sizes(gpu)),
        "matrix_bf16": curve("matrix products in bf16", _product_rate(clock, torch.bfloat16), _product_sizes(gpu)),
        "top_k": curve("top-k", lambda size: _top_k_rate(clock, size), [8, 64, 256, 1024, 4096]),
        "sort": curve(
            "distinct numbers", lambda size: size / clock.seconds(_distinct(device, size)), [2**12, 2**16, 2**20]
        ),
        "asked": curve(
            "rows to ask for", lambda size: size / clock.seconds(_to_ask_for(device, size)), [2**12, 2**16, 2**20]
        ),
        "bucketing": curve("hits by owner", lambda ranks: _bucketing_rate(clock, ranks), [2, 8, 64]),
        "host_link": curve(
            "copies from the host", lambda size: size / clock.seconds(_from_host(device, size)), [2**16, 2**20, 2**25]
        ),
    }
    if gpu and choose_retrieval("auto", "cuda", _HITS, 1024, 64) == "triton":
        sizes = [256, 257, 1024, 4096, 16_384]  # above 256 the backward goes another way, kernels.key_gradient
        figures["retrieve"] = curve("retrieval", lambda size: _retrieval_rate(clock, size, False), sizes)
        figures["retrieve_backward"] = curve(
            "retrieval, backward", lambda size: _retrieval_rate(clock, size, True), sizes
        )
        figures["retrieve_fp32"] = curve(
            "retrieval in fp32", lambda size: _retrieval_rate(clock, size, False, torch.float32), sizes
        )
    if gpu:
        widths = [64, 128, 256, 512, 1024]
        figures["layer_norm"] = curve("LayerNorm", lambda width: _layer_norm_rate(clock, width, False), widths)
        figures["layer_norm_backward"] = curve(
            "LayerNorm, backward", lambda width: _layer_norm_rate(clock, width, True), widths
        )
        figures["index_select"] = curve("rows by index", lambda width: _index_rate(clock, width, False), widths)
        figures["index_add"] = curve("sums by index", lambda width: _index_rate(clock, width, True), widths)
    say("rows")
    widths = [16, 64, 256, 1024]
    for names, single in ((("hit_read", "row_read", "hit_update", "row_update"), False), (SINGLE, True)):
        rates = [_row_rates(clock, width, single) for width in widths]
        for name, of_widths in zip(names, zip(*rates, strict=True), strict=True):
            points = [[4.0 * width, rate] for width, rate in zip(widths, of_widths, strict=True)]
            figures[name] = Curve(points=points, source="measured")
    for name, call in (("all_to_all", _all_to_all), ("all_reduce", _all_reduce)):
        say(name.replace("_", "-"))
        figures[name] = _collective(clock, node, device, call)
    if not gpu and node.size() > 1:  # ranks that share cores
        figures["straggling"] = curve(
            "ranks that wait", lambda seconds: _straggling(clock, node, seconds), [1e-3, 4e-3, 16e-3]
        )
    dispatch = None
    if gpu:
        say("the host")
        dispatch = _dispatch(clock, tiny_step, say)
    unsteady = clock.most(clock.unsteady)
    crowded = not gpu and node.size() > len(os.sched_getaffinity(0))  # rounds differ then with nothing else about
    if unsteady > _STEADY and not crowded:
        say(f"note: rounds of a measurement differed {unsteady:.1f} times: something else runs here; repeat it")
    return Machine(
        name=device_name(device),
        kind=device.type,
        ranks=node.size(),
        date=datetime.date.today().isoformat(),
        versions=versions,
        operator=Latency(seconds=operator, source="measured"),
        dispatch=dispatch,
        id_step=None if gpu else Latency(seconds=_id_step(clock, group), source="measured"),
        **figures,
    )


def link_between_nodes(
    device: torch.device, group: dist.ProcessGroup, node: dist.ProcessGroup, control: dist.ProcessGroup
) -> Collective:
    """What a rank sends to other nodes in an all-to-all among all, with as many ranks on each; a collective call."""
    found = _collective(Stopclock(device, control), group, device, _all_to_all)
    share = (group.size() - node.size()) / (group.size() - 1)  # of what it sends
    points = [[size * share, seconds] for size, seconds in found.points]
    return found.model_copy(update={"bandwidth": found.bandwidth * share, "points": points})


def _dispatch(clock: Stopclock, tiny_step: Callable[[int, int], TinyStep], say: Say) -> Dispatch:
    """What the host spends on an operator, a memory and the rest of a training step: from steps that differ in these.

    The Python of modules, autograd, DistributedDataParallel and TorchRec is in it: several times what an operator
    takes by itself.
    """
    few, memories = 2, 2
    steps = [tiny_step(few, 0), tiny_step(8, 0), tiny_step(few, memories)]
    counts = [len(trace_step(config, schema, rows, "cuda").ops) for config, schema, rows, _ in steps]
    bare, deep, with_memories = clock.host_seconds([step for *_, step in steps], 10)
    operator = max(0.0, deep - bare) / (counts[1] - counts[0])
    memory = max(0.0, with_memories - bare - operator * (counts[2] - counts[0])) / memories
    step = max(0.0, bare - operator * counts[0])
    if not (operator and memory and step):
        say("note: what the host takes is lost in what else runs here, and stands as 0 in part; repeat it")
    return Dispatch(operator=operator, memory=memory, step=step, source="measured")


def _in_burst(clock: Stopclock, call: Callable[[], Tensor], result_bytes: int) -> float:
    """Seconds of one of many calls whose results all live until the last; a GPU's memory is never new."""
    if clock.device.type == "cuda":
        return clock.seconds(call)
    calls = max(1, min(64, _BURST // result_bytes))
    # memory that the process has never had is dearer than what it takes again, as steps do
    return clock.seconds(lambda: [call() for _ in range(calls)], warm=True) / calls


def _added(device: torch.device, size: int) -> Callable[[], Tensor]:
    one, other = (torch.ones(max(1, size // 12), device=device) for _ in range(2))
    return lambda: one + other


def _function(device: torch.device, size: int) -> Callable[[], Tensor]:
    numbers = torch.randn(size, device=device)
    return lambda: torch.nn.functional.gelu(numbers)


def _product_sizes(gpu: bool) -> list[int]:
    """Operations of square products."""
    return [2 * n**3 for n in ((64, 256, 1024, 4096, 8192) if gpu else (16, 64, 256, 1024))]


def _product_rate(clock: Stopclock, dtype: torch.dtype) -> Callable[[int], float]:
    def rate(operations: int) -> float:
        n = round((operations / 2) ** (1 / 3))
        one, other = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
        return operations / clock.seconds(lambda: one @ other)

    return rate


def _top_k_rate(clock: Stopclock, length: int) -> float:
    rows = (2**25 if clock.device.type == "cuda" else 2**20) // length
    scores = torch.randn(rows, length, device=clock.device)
    return scores.numel() / clock.seconds(lambda: scores.topk(min(_HITS, length), dim=1))


def _distinct(device: torch.device, size: int) -> Callable[[], object]:
    """Of numbers that repeat as slots do: a CPU takes half as long again where all differ."""
    numbers = torch.randint(size // 8, (size,), device=device)
    return lambda: torch.unique(numbers, return_inverse=True)


def _to_ask_for(device: torch.device, size: int) -> Callable[[], object]:
    row_ML = torch.randint(size // 8, (size // _HITS, _HITS), device=device)
    return lambda: distinct_rows(row_ML, size // 16, 2)


def _bucketing_rate(clock: Stopclock, ranks: int) -> float:
    bags = _BAGS[clock.device.type]
    row_ML = torch.randint(2**20, (bags, _HITS), device=clock.device)
    by = bucket_rows_by_kernel if _lookup(clock.device) == "triton" else bucket_rows
    return row_ML.numel() / clock.seconds(lambda: by(row_ML, 2**20 // ranks, ranks))


def _from_host(device: torch.device, size: int) -> Callable[[], object]:
    source = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device)
    return lambda: target.copy_(source, non_blocking=True)


def _index_rate(clock: Stopclock, width: int, add: bool) -> float:
    """Numbers a second of torch.index_select, or of torch.index_add to zeros, of as many rows in another order."""
    x_MD = torch.randn(2**24 // width, width, device=clock.device)
    order_M, zeros_MD = torch.randperm(len(x_MD), device=clock.device), torch.zeros_like(x_MD)
    if add:
        return x_MD.numel() / clock.seconds(lambda: zeros_MD.index_add_(0, order_M, x_MD))
    return x_MD.numel() / clock.seconds(lambda: x_MD.index_select(0, order_M))


def _layer_norm_rate(clock: Stopclock, width: int, backward: bool) -> float:
    x_MD = torch.randn(2**25 // width, width, device=clock.device)
    weight_D, bias_D = (torch.ones(width, device=clock.device) for _ in range(2))
    y_MD, mean_M1, rstd_M1 = torch.native_layer_norm(x_MD, [width], weight_D, bias_D, 1e-5)

    def call() -> object:
        if not backward:
            return torch.native_layer_norm(x_MD, [width], weight_D, bias_D, 1e-5)
        kept = x_MD, [width], mean_M1, rstd_M1, weight_D, bias_D
        return torch.ops.aten.native_layer_norm_backward(y_MD, *kept, [True] * 3)

    return x_MD.numel() / clock.seconds(call)


def _retrieval_rate(clock: Stopclock, sub_keys: int, backward: bool, dtype: torch.dtype = torch.bfloat16) -> float:
    from msn_dist.kernels import retrieval

    queries, key_dim = 65_536, 64
    shapes = (2, queries, 1, key_dim), (2, 1, sub_keys, key_dim)
    operands = [torch.randn(shape, device=clock.device, dtype=dtype) for shape in shapes]
    tau = key_dim**-0.5
    if not backward:
        return queries / clock.seconds(lambda: retrieval.retrieve(*operands, _HITS, tau))
    slots, weights = retrieval.retrieve(*operands, _HITS, tau)
    gradient = torch.randn_like(weights)
    return queries / clock.seconds(lambda: retrieval.retrieve_backward(*operands, slots, weights, gradient, tau))


def _row_rates(clock: Stopclock, width: int, single: bool) -> tuple[float, float, float, float]:
    """A second: hits and distinct rows read, hits and distinct rows updated.

    Hits on a few rows tell what a hit costs; hits all over the table, what their rows cost beside.  `single`: a hit is
    a bag of its own, without a weight, as rows are asked for.
    """
    device = clock.device
    rows, bags = _TABLE_BYTES[device.type] // (4 * width), _BAGS[device.type]
    lookup = make_lookup("auto", rows, width, ValueOptimizer(), device)
    lookup.weight_RD.zero_()
    # no more than it takes: ranks that share cores need seconds for wide rows
    count, size = (min(bags * _HITS, rows // 2), 1) if single else (min(bags * _HITS, 2 * rows), _HITS)
    gradient_GD = torch.randn(count // size, width, device=device)
    weights_H = None if single else torch.rand(count, device=device)
    read, update, distinct = {}, {}, {}
    for among in (_FEW_ROWS, rows):
        row_H = torch.randint(among, (count,), device=device).to(torch.int32)
        hits, distinct[among] = Hits.uniform(row_H, weights_H, size=size), len(row_H.unique())
        read[among] = clock.seconds(lambda hits=hits: lookup.read(hits))

        def step(hits: Hits = hits) -> None:
            lookup.read(hits, update_follows=True)
            lookup.update(hits, gradient_GD)

        update[among] = max(clock.seconds(step) - read[among], 0.1 * read[among])

    def of_rows(seconds: dict[int, float]) -> float:
        beside = max(seconds[rows] - seconds[_FEW_ROWS], 0.02 * seconds[rows])
        return (distinct[rows] - distinct[_FEW_ROWS]) / beside

    return count / read[_FEW_ROWS], of_rows(read), count / update[_FEW_ROWS], of_rows(update)


def _lookup(device: torch.device) -> str:
    return choose_lookup("auto", device, 64)


def _id_step(clock: Stopclock, group: dist.ProcessGroup) -> float:
    """Forward and backward of TorchRec's sharded tables for hardly any ids."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingEnv
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    world = group.size()
    table = EmbeddingBagConfig(name="table", embedding_dim=16, num_embeddings=64 * world, feature_names=["id"])
    module = EmbeddingBagCollection([table], device=torch.device("meta"))
    sharder = EmbeddingBagCollectionSharder(fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD})
    plan = construct_module_sharding_plan(
        module, {"table": row_wise(compute_kernel="fused")}, sharder, world, world, clock.device.type
    )
    env = ShardingEnv(world, group.rank(), group, output_dtensor=True)
    sharded = sharder.shard(module, plan, env, clock.device)
    ids = torch.arange(8, device=clock.device)
    batch = KeyedJaggedTensor(keys=["id"], values=ids, lengths=torch.ones_like(ids))

    def step() -> None:
        sharded(batch).values().sum().backward()

    return clock.collective(step, 20)


def _all_to_all(group: dist.ProcessGroup, device: torch.device, size: int) -> Callable[[], object]:
    """Each rank sends `size` bytes to the others, all together, into new memory as in a step."""
    each = max(1, size // 4 // max(1, group.size() - 1))
    sent = torch.zeros(group.size(), each, device=device)
    return lambda: dist.all_to_all_single(torch.empty_like(sent), sent, group=group)


def _all_reduce(group: dist.ProcessGroup, device: torch.device, size: int) -> Callable[[], object]:
    """A ring sends 2 (W - 1) / W times the tensor from each rank."""
    world = group.size()
    tensor = torch.zeros(max(1, int(size / 4 / max(1, 2 * (world - 1) / world))), device=device)
    return lambda: dist.all_reduce(tensor, group=group)


def _collective(
    clock: Stopclock,
    group: dist.ProcessGroup,
    device: torch.device,
    make: Callable[[dist.ProcessGroup, torch.device, int], Callable[[], object]],
) -> Collective:
    if group.size() == 1:
        return Collective(latency=0.0, bandwidth=1e12, source="estimated", note="one rank sends nothing")
    points = []
    powers = (10, 14, 17, 20, 22, 24, 26, *((28,) if device.type == "cuda" else ()))  # a GPU's links are faster
    for power in powers:
        seconds = clock.collective(make(group, device, 2**power), calls=10 if power <= 22 else 3)
        points.append([float(2**power), seconds])
    latency, per_byte = _line(points)
    return Collective(latency=latency, bandwidth=1 / per_byte, source="measured", points=points)


def _straggling(clock: Stopclock, group: dist.ProcessGroup, seconds: float) -> float:
    """The share of what ranks compute between two collectives, so many seconds, that they wait for the slowest."""
    exchange, work = _all_to_all(group, clock.device, 2**10), _function(clock.device, 2**15)
    calls = max(1, round(seconds / clock.seconds(work)))

    def stretch() -> None:
        for _ in range(calls):
            work()

    alone = clock.collective(exchange, calls=50)
    added = clock.added(exchange, stretch, max(1, round(_STRETCHES / (seconds + alone))))
    return max(_LEAST_SHARE, (added - alone) / seconds)


def _line(points: list[list[float]]) -> tuple[float, float]:
    """(latency, seconds a byte) with the least squares of relative errors; neither is below that of a point alone."""
    u = [1 / seconds for _, seconds in points]
    v = [size / seconds for size, seconds in points]
    uu, uv, vv = (sum(x * y for x, y in zip(*pair, strict=True)) for pair in ((u, u), (u, v), (v, v)))
    determinant = uu * vv - uv * uv
    latency, per_byte = (sum(u) * vv - sum(v) * uv) / determinant, (sum(v) * uu - sum(u) * uv) / determinant
    least = min(seconds for _, seconds in points)
    return max(latency, 0.1 * least), max(per_byte, 0.5 * min(seconds / size for size, seconds in points))
