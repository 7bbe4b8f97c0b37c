"""The time of a training step, phase by phase, from what it does and what the machine can do.

    an operator      max(its latency, size / rate of its kind at that size); a product on a CPU its moving besides
    a message        the slower of what stays in the node and what leaves it, each latency + bytes / bandwidth
    look-ups         hits of the busiest owner and distinct rows among them / their rates for rows of that width
    the host tier    rows that cross the host's link, in either direction / its bandwidth (`host_tier`)
    a phase          the sum of its parts; `hidden` is what other phases cover

What is hidden: with `memory.chunks: c` on a GPU, up to (c - 1) / c of the exchange; the all-reduce of dense gradients
behind the backward of the dense network, but for the last of its buckets.  On a CPU nothing is: a rank's messages need
the core that it computes on.  The messages of a chunk travel while another one has

    hits there               its retrieval and its sort by owner
    sums home                its look-up
    gradients of these       the gradients of its weights, or of the rows that it has asked for
    gradients of weights     the update, which waits for the gradients of all chunks

and those that are waited for at once hide behind nothing: two_level's across groups, all of `replicated`, squares.

Ranks that share the cores of a CPU come to a collective at different times, and all wait for the last one: a share of
what they have computed since the one before, which calibration measures over that time (`Machine.straggling`).

A GPU works behind its host (`behind_host`), which dispatches operators, at each memory its kernels and exchange, and
what a step has besides (TorchRec's modules, DistributedDataParallel, optimizers).  TorchRec's id tables ask the GPU for
lengths, so that both begin a step together; a quarter of what a step has besides comes between this question and the
first operator.  A memory over several ranks, unless `replicated`, asks for its counts when half of what it takes the
host in the forward is done and the hits are sorted by owner; with chunks that question of the last one counts.  What
torch asks for in the update of `column` and `reference` (distinct rows) and of `replicated` with Adam is not priced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from msn_dist.planner.behind_host import Stretch
from msn_dist.planner.dense_trace import Op, StepTrace
from msn_dist.planner.exchange_work import Work, exchange_work
from msn_dist.planner.host_tier import CacheStep
from msn_dist.planner.layout import Layout
from msn_dist.planner.load import Message, expected_bytes
from msn_dist.planner.machine import Collective, Curve, Dispatch, Machine
from msn_dist.planner.situation import Situation
from msn_dist.planner.topology import Topology

WAITING, STRAGGLING = "waiting for the host", "waiting for ranks"
ARRIVING, LEAVING = "rows from the host", "rows to the host"
ALIKE = 1.02  # times that differ no more are as good as equal where a host is waited for: its own time varies more
_BUCKET = 25 * 2**20  # bytes of DistributedDataParallel's buckets
_LEAD = 0.25  # of what the host does in a step beside operators: from TorchRec's question to the first operator
_ID_COLLECTIVES = 2  # of these that ranks come to from computing: embeddings home, and their gradients
_FUNCTIONS = ("gelu", "tanh", "sigmoid", "silu", "softmax", "layer_norm", "exp", "log", "erf")


@dataclass(frozen=True)
class Phase:
    """Seconds of a step; `hidden` of them run beside other phases."""

    name: str
    seconds: float
    hidden: float = 0.0
    sent: float = 0.0  # bytes that a rank sends to others

    @property
    def exposed(self) -> float:
        return self.seconds - self.hidden


@dataclass(frozen=True)
class StepTime:
    """One training step of the busiest rank."""

    phases: list[Phase]
    behind_host: float = 0.0  # seconds of a device with its host; sums of phases would tell layouts apart by rounding

    @property
    def seconds(self) -> float:
        return max(self.device, self.behind_host)

    @property
    def device(self) -> float:
        """Seconds that the device works."""
        return sum(phase.exposed for phase in self.phases if phase.name != WAITING)

    @property
    def exchange(self) -> float:
        """Seconds that depend on the layout of the memories."""
        return sum(phase.exposed for phase in self.phases if phase.name in _OF_THE_EXCHANGE)


_FORWARD = ("hits by owner", "hits there", "look-up", "sums home", ARRIVING)
_BACKWARD = ("gradients", "update", LEAVING)
_OF_THE_EXCHANGE = (*_FORWARD, *_BACKWARD, STRAGGLING)
_BEFORE_THE_LOOK_UP = ("counts", "lengths", "hits", "rows")


@dataclass(frozen=True)
class ModelTime:
    """Seconds of what does not depend on the layout, in one step."""

    dense: float
    memory: float  # queries, keys, retrieval and gate
    optimizer: float
    parameter_bytes: int
    retrieval: float = 0.0  # of `memory`: in the forward, up to the look-up
    batch_bytes: int = 0
    stretches: tuple[Stretch, ...] = ()  # of the whole step, parted by the look-ups of memories, forward and backward

    @classmethod
    def of(cls, trace: StepTrace, machine: Machine) -> ModelTime:
        """On one rank, whose trace this is."""
        seconds = [operator_seconds(op, machine) for op in trace.ops]
        regions = dict.fromkeys(("dense", "retrieval", "gate", "optimizer"), 0.0)
        searching = 0.0
        for op, of_op in zip(trace.ops, seconds, strict=True):
            regions[op.region] += of_op
            searching += of_op if op.region == "retrieval" and not op.backward else 0.0
        stretches = ()
        if machine.kind == "cuda":
            parts = pairwise((0, *trace.memories_at, len(seconds)))
            stretches = tuple(Stretch.of(seconds[a:b], machine.dispatch.operator) for a, b in parts)
        return cls(
            dense=regions["dense"],
            memory=regions["retrieval"] + regions["gate"],
            optimizer=regions["optimizer"],
            parameter_bytes=sum(trace.parameters),
            batch_bytes=trace.batch_bytes,
            retrieval=searching,
            stretches=stretches,
        )


def step_time(situation: Situation, layout: Layout, model: ModelTime, id_seconds: float) -> StepTime:
    """The phases of a step, in which the id tables take `id_seconds`."""
    machine, topology, memories = situation.machine, situation.topology, situation.memories
    phases, messages = [Phase("dense network", model.dense)], []
    if memories:
        load, chunks = situation.load, situation.memory.chunks
        work, link = exchange_work(layout, load, situation.dim), (0.0, 0.0)
        if layout.tier == "host":
            cached = CacheStep.of(load, layout.world, work.read, situation.memory.cache, weighted=not work.single)
            work.cached = cached.hits
            work.forward += cached.passes()
            link = tuple(memories * rows * work.row_bytes for rows in (cached.arriving, cached.leaving))
        messages = memories * expected_bytes(
            layout.strategy,
            layout.world,
            layout.ranks_per_node,
            load,
            situation.dim,
            layout.wire,
            layout.optimizer,
            layout.group_ranks,
        )
        phases.append(Phase("retrieval and gate", model.memory))
        slower = machine.tbe if layout.lookup == "fbgemm" else (1.0, 1.0)
        phases += _exchange(work, messages, memories, chunks, slower, model.retrieval, machine, topology)
        names = (ARRIVING, LEAVING)
        phases += [
            Phase(name, size / machine.host_link.at(size) if size else 0.0)
            for name, size in zip(names, link, strict=True)
        ]
    phases += [
        Phase("id tables", id_seconds),
        _dense_gradients(model, machine, topology),
        Phase("optimizer", model.optimizer),
        _batch(model.batch_bytes, machine),
    ]
    chunks = situation.memory.chunks if memories else 0
    if machine.straggling is not None and topology.world > 1:
        travels = sum(1 if m.once else chunks for m in messages if m.name != "lengths")
        together = _ID_COLLECTIVES + _buckets(model) + travels
        phases.append(_straggling(phases, together, machine.straggling))
    if not model.stretches:
        return StepTime(phases)
    asks = topology.world > 1 and layout.strategy != "replicated"
    time = StepTime(phases, _behind_host(phases, model.stretches, memories, chunks, asks, machine.dispatch))
    if (waiting := time.seconds - time.device) > 0:
        phases.append(Phase(WAITING, waiting))
    return time


def _behind_host(
    phases: Sequence[Phase],
    stretches: Sequence[Stretch],
    memories: int,
    chunks: int,
    asks: bool,
    dispatch: Dispatch,
) -> float:
    """Seconds of a device and its host: what is sharded comes between the operators of the rest, chunk by chunk.

    `asks`: whether the host waits for counts before hits depart.
    """
    exposed = {phase.name: phase.exposed for phase in phases}
    ids = exposed["id tables"] / 2
    step = Stretch.one(_LEAD * dispatch.step, ids).then(stretches[0])

    def dispatched(share: float, names: Iterable[str]) -> Stretch:
        device = sum(exposed.get(name, 0.0) for name in names) / memories
        one, row = Stretch.one(share * dispatch.memory, device / chunks), Stretch()
        for _ in range(chunks):
            row = row.then(one)
        return row

    for look_up, operators in enumerate(stretches[1:]):
        if look_up < memories:
            step = step.then(dispatched(1 / 4, _FORWARD[:1]))
            step = (step.awaited() if asks else step).then(dispatched(1 / 4, _FORWARD[1:]))
        else:
            step = step.then(dispatched(1 / 2, _BACKWARD))
        step = step.then(operators)
    return step.then(Stretch.one((1 - _LEAD) * dispatch.step, ids + exposed["dense gradients"])).span


def operator_seconds(op: Op, machine: Machine) -> float:
    """One operator of the dense network on the device."""
    if op.name in ("retrieve", "retrieve_backward") and machine.retrieve is not None:
        return _retrieval_seconds(op, machine)
    curve = machine.layer_norm_backward if op.backward else machine.layer_norm
    if "native_layer_norm" in op.name and curve is not None:
        seconds = math.prod(op.shapes[0]) / curve.at(op.shapes[0][-1])
    elif op.flops:
        products = math.prod(op.shapes[0][:-2]) if op.shapes and len(op.shapes[0]) > 2 else 1
        rate = machine.matrix_bf16 if op.dtype in ("bfloat16", "float16") else machine.matrix_fp32
        seconds = op.flops / rate.at(op.flops / products)
        moving = op.bytes / machine.copy_rate.at(op.bytes)
        # a GPU does both at once; what a CPU writes to fresh memory it waits for
        seconds = seconds + moving if machine.kind == "cpu" else max(seconds, moving)
    elif machine.index_select is not None and "index_select" in op.name:
        narrower = getattr(torch, op.dtype).itemsize / 4  # bytes move, where `index_add` adds numbers
        width = op.shapes[0][-1] if len(op.shapes[0]) > 1 else 1
        seconds = op.out_elements * narrower / machine.index_select.at(width * narrower)
    elif machine.index_add is not None and "index_add" in op.name:
        seconds = math.prod(op.shapes[-1]) / machine.index_add.at(op.shapes[-1][-1])
    elif "topk" in op.name:
        length = op.shapes[0][-1]
        seconds = math.prod(op.shapes[0]) / machine.top_k.at(length)
    elif any(op.name.startswith(f"aten.{name}") for name in ("sort", "argsort", "unique", "_unique")):
        numbers = math.prod(op.shapes[0])
        seconds = numbers / machine.sort.at(numbers)
    else:
        seconds = op.bytes / machine.copy_rate.at(op.bytes) if op.bytes else 0.0
        if any(name in op.name for name in _FUNCTIONS):
            seconds = max(seconds, op.out_elements / machine.function_rate.at(op.out_elements))
    return max(machine.operator.seconds, seconds)


def message_seconds(message: Message, machine: Machine, topology: Topology, parts: int = 1) -> float:
    """An all-to-all in so many parts: what goes to other nodes leaves the busiest rank beside what stays in its own."""
    if message.name == "lengths":  # is under way together with the hits
        parts = 0
    elif message.once:
        parts = 1
    seconds = _seconds_inside(machine.all_to_all, topology, message.busiest * message.bytes_inside, parts)
    if message.bytes_between:
        link = topology.between_nodes
        seconds = max(seconds, parts * link.latency + message.busiest * message.bytes_between / link.bytes_per_second)
    return seconds


def passes_seconds(passes: Iterable[float], machine: Machine) -> float:
    """Element-wise passes over so many bytes each."""
    return sum(machine.pass_seconds(size) for size in passes if size)


def _retrieval_seconds(op: Op, machine: Machine) -> float:
    """Rates are of k = 32 and keys of 64: the scores' share grows with the width of keys, the rest with k."""
    _, queries, heads, width = op.shapes[0]
    sub_keys, forward = op.shapes[1][2], op.name == "retrieve"
    rates = machine.retrieve if forward else machine.retrieve_backward
    if forward and op.dtype == "float32" and machine.retrieve_fp32 is not None:
        rates = machine.retrieve_fp32
    hits = op.out_elements / (2 * queries * heads) if forward else op.shapes[2][2]
    rate = rates.of_work(sub_keys) if forward else rates.at(sub_keys)  # the backward's work is that of the hits
    seconds = queries * heads / rate
    return seconds * max(1.0, hits / 32) * max(1.0, (width / 64) ** 0.5)


def _exchange(
    work: Work,
    messages: Sequence[Message],
    memories: int,
    chunks: int,
    slower: tuple[float, float],
    retrieval: float,
    machine: Machine,
    topology: Topology,
) -> list[Phase]:
    """The phases of all memories; messages are those of all of them.

    `slower`: times of the look-up and of its update over those of the machine's profile.  `retrieval`: its seconds, in
    the forward.
    """

    def times(number: float, rate: float) -> float:
        return memories * number / rate

    def travelling(name: str, chosen: Sequence[Message], behind: Mapping[tuple[str, ...], float]) -> Phase:
        """`behind`: by names of messages, the seconds that all chunks compute while those of others travel."""
        seconds = [message_seconds(message, machine, topology, chunks) for message in chosen]
        hidden = 0.0
        if machine.kind == "cuda":
            for names, computing in behind.items():
                of_names = sum(s for s, message in zip(seconds, chosen, strict=True) if message.name in names)
                hidden += min(of_names, computing) * (chunks - 1) / chunks
        return Phase(name, sum(seconds), hidden, sum(m.bytes_inside + m.bytes_between for m in chosen))

    sorting = times(work.bucketed, machine.bucketing.at(max(2, topology.world)))
    if work.asked:
        sorting += times(work.asked, (machine.asked or machine.sort).at(work.asked))
    touched = times(work.distinct, machine.sort.at(work.distinct)) if work.distinct else 0.0
    reading = updating = weighing = 0.0
    if work.read:
        rows = work.row_bytes, work.single
        reading = memories * slower[0] * machine.read_seconds(work.read, work.rows_by_chunk, *rows)
        updating = memories * slower[1] * machine.update_seconds(work.read, work.rows, *rows)
        if work.read_again:
            updating += memories * slower[0] * machine.read_seconds(work.read, work.rows, *rows)
    if work.weighed:
        weighing = memories * chunks * machine.pass_seconds(work.weighed / chunks)
    if work.cached:
        reading += times(work.cached, machine.sort.at(work.cached))
    forward, backward = (memories * passes_seconds(passes, machine) for passes in (work.forward, work.backward))
    if work.home:
        forward += memories * work.home.forward(machine)
        weighing += memories * work.home.backward(machine)
    there, home, again = [], [], []
    for message in messages:
        late = again if message.direction == "backward" else home
        (there if message.name in _BEFORE_THE_LOOK_UP else late).append(message)
    sums = "pooled_in_group" if any(message.name == "pooled_in_group" for message in home) else "pooled"
    in_backward = {(f"{sums}_gradient", "values_gradient"): weighing, ("hits_gradient",): updating}
    return [
        Phase("hits by owner", sorting),
        travelling("hits there", there, {_BEFORE_THE_LOOK_UP: retrieval + sorting}),
        Phase("look-up", reading + forward),
        travelling("sums home", home, {(sums, "values"): reading}),
        travelling("gradients", again, in_backward),
        Phase("update", touched + weighing + updating + backward),
    ]


def _dense_gradients(model: ModelTime, machine: Machine, topology: Topology) -> Phase:
    """DistributedDataParallel's ring all-reduce, bucket by bucket behind the backward: two thirds of the network."""
    world = topology.world
    if world == 1:
        return Phase("dense gradients", 0.0)
    size = model.parameter_bytes
    sent = 2 * size * (world - 1) / world
    buckets = _buckets(model)
    seconds = _seconds_inside(machine.all_reduce, topology, sent, buckets)
    if topology.nodes > 1:
        link = topology.between_nodes
        seconds = max(seconds, buckets * link.latency + sent / (topology.ranks_per_node * link.bytes_per_second))
    hidden = 0.0 if machine.kind == "cpu" else min(seconds * (buckets - 1) / buckets, model.dense * 2 / 3)
    return Phase("dense gradients", seconds, hidden, sent)


def _buckets(model: ModelTime) -> int:
    return max(1, math.ceil(model.parameter_bytes / _BUCKET))


def _straggling(phases: Sequence[Phase], together: int, share: Curve) -> Phase:
    """What ranks wait for the slowest of them at so many collectives, which part what they compute evenly."""
    computing = sum(phase.seconds for phase in phases if not phase.sent)
    return Phase(STRAGGLING, computing * share.of_work(computing / together))


def _batch(size: int, machine: Machine) -> Phase:
    """Copied to a GPU beside the step before (data.on_device)."""
    seconds = size / machine.host_link.at(size) if machine.kind == "cuda" else 0.0
    return Phase("batch to the device", seconds, hidden=seconds)


def _seconds_inside(collective: Collective, topology: Topology, size: float, parts: int) -> float:
    """So many collectives inside a node that send `size` bytes in all; none: what these add to another one.

    By the topology's word, else as the machine was measured.
    """
    if topology.inside_node is not None:
        return parts * topology.inside_node.latency + size / topology.inside_node.bytes_per_second
    return parts * collective.seconds(size / parts) if parts else size / collective.bandwidth
