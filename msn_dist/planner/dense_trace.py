"""One training step of a rank on tensors without data: its operations, and the bytes that live while it runs.

The model is built and run under torch's fake tensors, which have shapes and lifetimes but no storage, so a model of
any size is traced in about a second.  Fake CPU tensors serve for a GPU as well, with what `torch.autocast` and dropout
do there (`GpuRules`): fake CUDA tensors have no backward where torch is built without CUDA.

Two parts have stand-ins, so that one trace serves every layout: the sharded value tables (`_Values`) and the id tables
(`_IdTables`, `_SequenceTables`), whose exchange is counted apart and added afterwards (`storage`).

Shape suffixes: B rows, F features, M bags, L hits a bag, D value width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import Function, once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from msn_dist.config import MemoryConfig, OptimizerConfig, RunConfig
from msn_dist.kernels.sizes import why_no_retrieval
from msn_dist.memory.autocast import pooled_dtype
from msn_dist.planner.gpu_rules import GpuRules, fused_gate, fused_retrieve, fused_search
from msn_dist.planner.step_recorder import LookUp, Op, Span, StepRecorder

if TYPE_CHECKING:
    from msn_dist.data.schema import Schema
    from msn_dist.memory.product_keys import ProductKeys
    from msn_dist.models.ranker import Ranker

aten = torch.ops.aten


@dataclass(frozen=True)
class StepTrace:
    """One step of one rank."""

    rows: int
    batch_bytes: int  # of a batch, once
    device_type: str
    ops: tuple[Op, ...]
    spans: tuple[Span, ...]
    look_ups: tuple[LookUp, ...]  # in the order of the forward
    memories_at: tuple[int, ...]  # ops before the look-ups of memories, in the forward and in the backward
    parameters: tuple[int, ...]  # bytes of each dense parameter


def trace_step(
    config: RunConfig,
    schema: Schema,
    rows: int,
    device_type: str = "cpu",
    list_lengths: Mapping[str, float] = MappingProxyType({}),
) -> StepTrace:
    """A step of `config` on a rank with a batch of `rows`, on a device of type "cpu" or "cuda".

    Histories have all `max_length` events; of other columns with several ids in a row, `list_lengths` has the mean.
    """
    from msn_dist.models.loss import task_losses
    from msn_dist.models.ranker import Ranker

    on_gpu = device_type == "cuda"
    lengths = schema.max_lengths | list_lengths
    ids_of = {key: round(rows * lengths.get(key, 1)) for key in schema.sparse_keys}
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        with _Unfilled():
            model = Ranker(schema, config.model, config.memory, seed=0, device="meta")
        recorder = StepRecorder(
            _events(schema, rows, config.model.attention, ids_of), config.memory.top_k if config.memory else 0, on_gpu
        )
        _put_stand_ins(model, rows, ids_of, recorder, on_gpu)
        batch = _batch(schema, rows)
        dense = list(model.parameters())
        for parameter in dense:  # gradients lie in DistributedDataParallel's buckets, where they are copied at once
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with recorder, GpuRules() if on_gpu else nullcontext():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.training.precision == "bf16"):
                output = model(batch)
            sums_K = task_losses(output.logits_BK, batch.labels_BK)
            loss = (sums_K.sum() + output.auxiliary * rows) * (1 / rows)
            recorder.enter("backward")
            loss.backward()
        del output, sums_K, loss
        _step_dense(dense, config.optimizer, recorder, on_gpu)
    return StepTrace(
        rows=rows,
        batch_bytes=_batch_bytes(schema, rows, sum(ids_of.values())),
        device_type=device_type,
        ops=tuple(recorder.ops),
        spans=tuple(recorder.spans),
        look_ups=tuple(recorder.look_ups),
        memories_at=tuple(recorder.memories_at),
        parameters=tuple(parameter.numel() * parameter.element_size() for parameter in dense),
    )


def _step_dense(dense: list[nn.Parameter], config: OptimizerConfig, recorder: StepRecorder, on_gpu: bool) -> None:
    """Clip the gradients and step, as training.optimizers does, once AdamW has its state."""
    for parameter in dense:
        parameter.grad = torch.empty_like(parameter)
    groups = [[p for p in dense if p.ndim > 1], [p for p in dense if p.ndim <= 1]]
    groups = [{"params": group} for group in groups if group]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.dense.weight_decay, fused=on_gpu)
    optimizer.step()
    recorder.enter("optimizer")
    with recorder:
        if config.dense.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(dense, config.dense.clip_norm, foreach=on_gpu)
        optimizer.step()
    recorder.enter("end")


def _batch_bytes(schema: Schema, rows: int, ids: int) -> int:
    """Of data.batch.Batch: int64 ids, their lengths and groups, float32 numbers and labels."""
    return 8 * ids + rows * (8 * (len(schema.sparse_keys) + 1) + 4 * (len(schema.dense) + len(schema.labels)))


def _events(schema: Schema, rows: int, attention: bool, ids_of: Mapping[str, int]) -> list[int]:
    """Events that each look at the lists of histories finds, in the order in which Features takes them."""
    if not attention:
        return []
    histories = {name: rows * history.max_length for name, history in schema.histories.items()}
    attended = {schema.table_of(column) for history in schema.histories.values() for column in history.columns}
    ids = sum(ids_of[name] for name in schema.ids if schema.table_of(name) in attended)
    columns = sum(histories[name] * len(history.columns) for name, history in schema.histories.items())
    return [ids + columns, *(events for name in histories for events in (histories[name],) * 2)]


def _batch(schema: Schema, rows: int) -> Any:
    """As data.batch.Batch, as far as the model looks at it."""
    lengths = torch.empty(len(schema.sparse_keys) * rows, dtype=torch.int64)
    return SimpleNamespace(
        sparse=SimpleNamespace(lengths=lambda: lengths, keys=lambda: schema.sparse_keys, values=lambda: lengths),
        dense_BF=torch.empty(rows, len(schema.dense)),
        labels_BK=torch.empty(rows, len(schema.labels)),
    )


def _put_stand_ins(model: Ranker, rows: int, ids_of: Mapping[str, int], recorder: StepRecorder, on_gpu: bool) -> None:
    """In place of what is sharded, and of what runs in kernels of this project; `ids_of` columns in all rows."""
    features, width = model.features, model.model.embedding_dim
    if features.id_tables is not None:
        ids = sum(ids_of[key] for key in features.pooled_keys) / rows
        features.id_tables = _IdTables(recorder, rows, features.pooled_keys, ids, width)
    if features.sequence_tables is not None:
        lists = {key: ids_of[key] for key in features.sequence_keys}
        features.sequence_tables = _SequenceTables(recorder, lists, width)
    for memory in model.memories().values():
        memory.values = _Values(recorder, memory.values.dim)
        if on_gpu:
            memory.gate.product = lambda x_BTD: partial(fused_gate, recorder.kernel)
        if on_gpu and _has_kernel(model.memory):
            _put_search(memory.keys, recorder)
        memory.register_forward_pre_hook(recorder.memory_begins)
        memory.register_forward_hook(recorder.memory_ends)


def _put_search(keys: ProductKeys, recorder: StepRecorder) -> None:
    keys.back_end = lambda device: "triton"
    keys.has_search = lambda back_end: keys.normalises()
    keys.retriever = lambda back_end: partial(fused_retrieve, recorder.kernel)
    keys.search = lambda: partial(fused_search, recorder.kernel, keys.mix, keys.top_k)


def _has_kernel(memory: MemoryConfig) -> bool:
    """Whether retrieval goes through kernels on a GPU that has them; see memory.product_keys.choose_retrieval."""
    fits = why_no_retrieval(memory.top_k, memory.sub_keys, memory.key_dim) is None
    return memory.retrieval != "reference" and fits


class _Values(nn.Module):
    """Takes and gives what a sharded value table does."""

    def __init__(self, recorder: StepRecorder, dim: int) -> None:
        super().__init__()
        self.recorder, self.dim = recorder, dim

    def forward(self, slots_ML: Tensor, weights_ML: Tensor) -> Tensor:
        dtype = pooled_dtype("cpu")
        look_up = LookUp("memory", *slots_ML.shape, self.dim, dtype.itemsize)
        return _LookUp.apply(weights_ML, self.recorder, look_up, dtype)

    def pooled_in_chunks(self, chunks: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
        slots, weights = zip(*chunks, strict=True)
        return [self(torch.cat(slots), torch.cat(weights))]


class _IdTables(nn.Module):
    """Takes and gives what a sharded EmbeddingBagCollection does."""

    def __init__(self, recorder: StepRecorder, rows: int, keys: list[str], ids: float, width: int) -> None:
        """`ids` of all keys of a row."""
        super().__init__()
        self.recorder, self.keys = recorder, keys
        self.look_up = LookUp("ids", rows, ids, len(keys) * width)

    def forward(self, sparse: Any) -> Any:
        sums = _LookUp.apply(torch.empty(0, requires_grad=True), self.recorder, self.look_up)
        return SimpleNamespace(keys=lambda: self.keys, values=lambda: sums)


class _SequenceTables(nn.Module):
    """Takes and gives what a sharded EmbeddingCollection does."""

    def __init__(self, recorder: StepRecorder, lists: dict[str, int], width: int) -> None:
        super().__init__()
        self.recorder, self.lists, self.width = recorder, lists, width

    def forward(self, sparse: Any) -> Any:
        each = list(self.lists.values())
        look_up = LookUp("sequences", sum(each), 1, self.width)
        parts = _LookUp.apply(torch.empty(0, requires_grad=True), self.recorder, look_up).split(each)
        return {
            key: SimpleNamespace(values=lambda part=part: part) for key, part in zip(self.lists, parts, strict=True)
        }


class _LookUp(Function):
    @staticmethod
    def forward(ctx, weights, recorder, look_up, dtype=torch.float32):
        ctx.recorder, ctx.weights = recorder, (weights.shape, weights.dtype)
        ctx.number = recorder.look_up(look_up)
        output_MD = torch.empty(look_up.bags, look_up.dim, dtype=dtype)
        recorder.is_output(ctx.number, output_MD)
        return output_MD

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_MD):
        ctx.recorder.look_up_ends(ctx.number)
        shape, dtype = ctx.weights
        return gradient_MD.new_empty(shape, dtype=dtype), None, None, None


class _Unfilled(TorchDispatchMode):
    """For building a model whose weights are never looked at: what asks for a value is told 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return 0 if func is aten._local_scalar_dense.default else func(*args, **(kwargs or {}))
