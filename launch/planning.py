"""`msn calibrate` and `msn plan`."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shlex
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from msn_dist.errors import InputError

if TYPE_CHECKING:
    from msn_dist.data.schema import Schema


def calibrate(output: Path, device: str) -> None:
    """Measure this rank among its peers; rank 0 writes the profile."""
    from msn_dist.training.quiet import quiet_libraries

    quiet_libraries()
    import torch.distributed as dist

    from msn_dist.config import TrainingConfig
    from msn_dist.planner.calibration import calibrate as measure
    from msn_dist.planner.calibration import link_between_nodes
    from msn_dist.training.ranks import joined_ranks
    from msn_dist.training.run_directory import versions
    from msn_dist.training.tiny_step import tiny_step

    with joined_ranks(TrainingConfig(device=device)) as ranks:
        console = Console(quiet=ranks.rank != 0, highlight=False, markup=False, soft_wrap=True)
        ranks.together(lambda: _require_writable(output, "profile", of_all="copy_rate") if ranks.rank == 0 else None)
        with console.status("") as status:

            def say(line: str) -> None:
                if line.startswith("note"):
                    console.print(line)
                else:
                    status.update(f"measuring: {line}")

            several = ranks.world > ranks.local_world
            node = dist.new_subgroups(ranks.local_world)[0] if several else ranks.group
            groups = ranks.device, ranks.group, node, ranks.control
            begun = time.perf_counter()
            machine = measure(*groups, versions(), partial(tiny_step, ranks), say)
            link = link_between_nodes(*groups) if several else None
            seconds = time.perf_counter() - begun
        if ranks.rank == 0:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(machine.model_dump_json(indent=1) + "\n", encoding="utf-8")
            from msn_dist.planner.explain import explain_machine

            console.print(explain_machine(machine))
            console.print(f"measured in {seconds:.0f} s")
            console.print(f"written to {output}; name it as `machine` in a topology (configs/topology)")
            if link is not None:
                console.print(
                    f"between nodes, for the topology: between_nodes: {{bandwidth_gb_s: {link.bandwidth / 1e9:.3g}, "
                    f"latency_us: {1e6 * link.latency:.3g}}}"
                )


def _require_writable(output: Path, what: str, of_all: str) -> None:
    """InputError if it cannot be written, or is there and is no such thing, which all have one key.

    Nothing has been measured or planned then, and nothing is left behind.
    """
    if output.is_dir():
        raise InputError(f"--output {output}: is a folder; name a file in it")
    there = next(path for path in (output.resolve(), *output.resolve().parents) if path.exists())
    if not os.access(there, os.W_OK) or (there.is_file() and there != output.resolve()):
        raise InputError(f"--output {output}: cannot be written; name another file")
    if output.is_file() and (text := output.read_bytes()):
        try:
            replaceable = of_all in json.loads(text)
        except (ValueError, TypeError, RecursionError):
            replaceable = False
        if not replaceable:
            raise InputError(f"--output {output}: is there and is no {what}; name another file, or remove it")


def plan(
    config_path: Path,
    overrides: list[str],
    topology_path: Path,
    *,
    zipf: float | None,
    usage: Path | None,
    rounding: bool,
    tune: bool,
    most_gib: float | None,
    most_ms: float | None,
    output: Path | None,
) -> int:
    """Print the plan, and write it to `output`; returns the exit code, 3 if nothing fits."""
    from msn_dist.training.quiet import quiet_libraries

    quiet_libraries()
    gc.disable()  # else Python looks for garbage among all that is imported, again and again
    from msn_dist.config import load_config
    from msn_dist.data.schema import load_schema
    from msn_dist.planner import explain, planning
    from msn_dist.planner.machine import load_machine
    from msn_dist.planner.plan_file import write_plan
    from msn_dist.planner.situation import Popularity, Situation
    from msn_dist.planner.topology import load_topology
    from msn_dist.planner.usage import read_usage

    gc.freeze()
    gc.enable()
    atexit.register(gc.freeze)  # at the exit it looks once more, for a second

    for name, value, most in (("--zipf", zipf, 4), ("--max-gib", most_gib, 1e5), ("--max-ms", most_ms, 1e9)):
        if value is not None and not 0 < value <= most:  # also NaN
            raise InputError(f"{name} {value}: must be above 0 and at most {most:g}")
    if tune and output is not None:
        raise InputError("--output: --tune makes no plan; leave it out, and plan one of its lines")
    if output is not None:
        _require_writable(output, "plan", of_all="seconds_over_ranks")
    if zipf is not None and usage is not None:
        raise InputError("--zipf and --usage both say which slots are hit; leave one out")
    config = load_config(config_path, overrides)
    if config.memory is None and (zipf is not None or usage is not None):
        raise InputError("--zipf and --usage tell which slots of a memory are hit; this config has none, leave it out")
    topology = load_topology(topology_path)
    if most_gib is not None:
        topology = topology.model_copy(update={"device_gib": min(most_gib, topology.device_gib)})
    schema = load_schema(config.data.path)
    situation = Situation(
        config,
        schema,
        topology,
        load_machine(topology.machine, near=topology_path.parent),
        Popularity(zipf, None if usage is None else read_usage(usage)),
        _mean_lengths(Path(config.data.path) / "train", schema),
    )
    console = Console(width=explain.WIDTH, highlight=False, markup=False)
    if tune:
        from msn_dist.planner.tuning import tune as sweep
        from msn_dist.planner.tuning import tuned_table

        with console.status("") as status:
            found = sweep(situation, None if most_ms is None else most_ms / 1e3, rounding, status.update)
        if not found:
            print("no candidate of --tune is within the limits; take more nodes, or raise the limits", file=sys.stderr)
            return 3
        console.print(tuned_table(found))
        first = found[0]
        command = ["msn", "plan", str(config_path), *overrides, *first.overrides, "--topology", str(topology_path)]
        nodes = first.situation.topology.nodes
        more = f", with nodes: {nodes} in the topology" if nodes != topology.nodes else ""
        console.print(f"the first as a plan{more}: {shlex.join(command)}", soft_wrap=True)
        return 0
    with console.status("planning") as status:
        found = planning.plan(situation, rounding, date.today().isoformat(), status.update)
    if isinstance(found, planning.Infeasible):
        Console(stderr=True, width=explain.WIDTH, highlight=False).print(str(found), markup=False)
        return 3
    console.print(explain.explain(found))
    if most_ms is not None and 1e3 * found.seconds > most_ms:
        unwritten = "" if output is None else f", so {output} is not written"
        print(
            f"a step takes {1e3 * found.seconds:.1f} ms, more than --max-ms {most_ms:g}{unwritten}; "
            "--tune --max-ms tells which sizes do not",
            file=sys.stderr,
        )
        return 3
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_plan(found, output)
        command = _training(config_path, overrides, output, found.world_size, found.ranks_per_node)
        console.print(f"written to {output}: {command}", soft_wrap=True)
    return 0


def _training(config: Path, overrides: list[str], plan: Path, world: int, ranks_per_node: int) -> str:
    """The command that trains by a plan; on several nodes it is started on each (docs/launch.md)."""
    arguments = ["train", str(config), *overrides, "--plan", str(plan)]
    if world > ranks_per_node:
        return shlex.join(["launch/torchrun.sh", *arguments, "--out", "DIR"])
    return shlex.join(["msn", *arguments, "--nproc", str(world)])


def _mean_lengths(split: Path, schema: Schema) -> dict[str, float]:
    if not split.is_dir():  # a plan needs no data
        return {}
    from msn_dist.data.lengths import mean_lengths

    return mean_lengths(split, schema)
