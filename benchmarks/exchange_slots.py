"""Hits for benchmarks.exchange: slots that bags read uniformly, by Zipf's law, or as a trained memory reads them.

Shape suffixes: M bags, L hits a bag, N sub-keys of an axis, n slots, C draws of a bag.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from msn_dist.config import load_config
from msn_dist.data import kuairand
from msn_dist.data.schema import load_schema
from msn_dist.models.loss import task_losses
from msn_dist.planner.load import zipf
from msn_dist.training.evaluation import open_split
from msn_dist.training.optimizers import Optimizers
from msn_dist.training.ranks import joined_ranks
from msn_dist.training.sharded_model import build_sharded_model, id_table_shards

ROOT = Path(__file__).parents[1]
SLOTS = {"uniform": 2**16, "zipf 1.05": 2**16, "kuairand": 2**14}  # n


def uniform(bags: int, hits: int) -> Tensor:
    """slots_ML, distinct within a bag, all n equally likely."""
    generator = torch.Generator().manual_seed(1)
    return first_distinct(torch.randint(SLOTS["uniform"], (bags, 2 * hits), generator=generator), hits)


def zipf_on_sub_keys(bags: int, hits: int) -> Tensor:
    """slots_ML = I * N + J, distinct within a bag; I and J each by Zipf's law of exponent 1.05, renamed at random."""
    generator = torch.Generator().manual_seed(2)
    sub_keys = int(SLOTS["zipf 1.05"] ** 0.5)
    draws = bags * 4 * hits
    i_MC, j_MC = (
        torch.randperm(sub_keys, generator=generator)[
            zipf(sub_keys, 1.05).multinomial(draws, replacement=True, generator=generator)
        ].view(bags, -1)
        for _ in range(2)
    )
    return first_distinct(i_MC * sub_keys + j_MC, hits)


def first_distinct(draws_MC: Tensor, hits: int) -> Tensor:
    """The first `hits` distinct draws of each bag, which is sampling without replacement."""
    ordered_MC, order_MC = draws_MC.sort(dim=1, stable=True)
    repeats_MC = torch.nn.functional.pad(ordered_MC.diff(dim=1) == 0, (1, 0))
    new_MC = torch.empty_like(repeats_MC).scatter_(1, order_MC, ~repeats_MC)
    kept_MC = new_MC & (new_MC.cumsum(1) <= hits)
    if not (kept_MC.sum(1) == hits).all():
        raise RuntimeError(f"a bag has fewer than {hits} distinct slots among {draws_MC.shape[1]} draws")
    return draws_MC[kept_MC].view(-1, hits)


def kuairand_hits(bags: int, hits: int, steps: int) -> Tensor:
    """slots_ML that the memory of configs/demo.yaml reads for validation impressions, the best slots of a bag first.

    The model has been trained for `steps` steps of 1,024 impressions, reading 32 slots; a bag is a token.
    """
    config = load_config(
        ROOT / "configs" / "demo.yaml",
        ["memory.top_k=32", "data.batch_size=1024", "data.shuffle_buffer=8192", "optimizer.warmup_steps=20"],
    )
    kuairand.prepare(ROOT / "data" / "kuairand", config.data.path)
    with joined_ranks(config.training) as ranks:
        schema = load_schema(config.data.path)
        train, valid = (open_split(split, config.data, schema, ranks) for split in ("train", "valid"))
        model, *_ = build_sharded_model(config, schema, ranks)
        embeddings = [shard for *_, shard in id_table_shards(model)]
        optimizers = Optimizers(model, embeddings, config.optimizer, steps)
        for step, batch in zip(range(steps), train, strict=False):
            optimizers.set_rates(step)
            loss = task_losses(model(batch).logits_BK, batch.labels_BK).sum() / len(batch)
            optimizers.zero_grad()
            loss.backward()
            optimizers.step()
        (memory,) = model.module.memories().values()
        slots_ML = _read(model, memory, valid, bags, hits)
        del model, optimizers, memory, embeddings
    return slots_ML


@torch.no_grad()
def _read(model: torch.nn.Module, memory: torch.nn.Module, valid, bags: int, hits: int) -> Tensor:
    retrieve, parts = memory.retrieve, []

    def keep(x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        slots_ML, weights_ML = retrieve(x_BTD)
        parts.append(slots_ML)
        return slots_ML, weights_ML

    memory.retrieve, memory.keys.top_k = keep, hits
    model.eval()
    batches = iter(valid)
    while sum(map(len, parts)) < bags:
        model(next(batches))
    return torch.cat(parts)[:bags]
