"""A whole run, from a config to a run directory, on every rank that torchrun started (or on one)."""

from __future__ import annotations

import os
from pathlib import Path

from msn_dist.config import RunConfig
from msn_dist.training.quiet import quiet_libraries
from msn_dist.training.run_directory import RunDirectory

quiet_libraries()  # before torchrec is imported below

from msn_dist.data.schema import load_schema  # noqa: E402
from msn_dist.planner.machine import device_name  # noqa: E402
from msn_dist.planner.plan_file import load_plan, write_plan  # noqa: E402
from msn_dist.training.checkpoint import load_model, require_shapes, tensors_in  # noqa: E402
from msn_dist.training.console import Console  # noqa: E402
from msn_dist.training.evaluated_config import on_these_ranks, require_same_model  # noqa: E402
from msn_dist.training.evaluation import evaluate as evaluate_model  # noqa: E402
from msn_dist.training.evaluation import open_split  # noqa: E402
from msn_dist.training.origin import Origin  # noqa: E402
from msn_dist.training.ranks import joined_ranks  # noqa: E402
from msn_dist.training.report import write_report  # noqa: E402
from msn_dist.training.sharded_model import build_sharded_model  # noqa: E402
from msn_dist.training.summary import memory_usage, summarise  # noqa: E402
from msn_dist.training.trainer import Trainer  # noqa: E402


def train(config: RunConfig, run_path: Path, init: Path | None = None, plan_path: Path | None = None) -> None:
    """Train, test the best state, and leave a run directory with a report.

    `init` is an earlier run whose best state is the start; its memory may have fewer sub-keys.  `plan_path` is a file
    of `msn plan` that decides where tables lie.
    Raises InputError, on every rank, for bad data, settings that do not fit the world size, the plan or the
    earlier run, or a run directory that is in use.
    """
    data = config.data.model_copy(update={"path": str(Path(config.data.path).resolve())})
    config = config.model_copy(update={"data": data})  # so that the run can be evaluated from any folder
    with joined_ranks(config.training) as ranks:
        schema = ranks.together(lambda: load_schema(config.data.path))
        run = RunDirectory(run_path)
        planned, overruled = None, ""
        if plan_path is not None:
            planned = ranks.together(lambda: load_plan(plan_path))
            overruled = planned.overruled(config)
            config = planned.applied_to(config, schema)
            planned.require_ranks(ranks.world, ranks.local_world)
            ranks.together(lambda: planned.require_machine(device_name(ranks.device)))
        origin = Origin(init, config, ranks) if init is not None else None
        trainer = Trainer(config, schema, run, ranks, planned, to_be_loaded=origin is not None)
        if origin is not None:
            origin.require_fit(trainer.model)
        test_data = open_split("test", config.data, schema, ranks)
        # last, so that refused data or settings leave no directory behind
        ranks.together(lambda: RunDirectory.create(config, run_path) if ranks.rank == 0 else None)
        if ranks.rank == 0:
            run.write_plan(trainer.plan.as_json(), str(trainer.plan))
            run.open_events()  # not in the midst of the steps
            if planned is not None:
                write_plan(planned, run.planned_file)
        if origin is not None:
            origin.load(trainer.model, trainer.optimizers, run)
        with Console(ranks.rank, trainer.total_steps, trainer.steps_per_epoch) as console:
            if trainer.back_ends:
                chosen = ", ".join(f"{part} {name}" for part, name in trainer.back_ends.items())
                console.say(f"memory back ends: {chosen}")
            if config.memory is not None and config.memory.tier == "host" and ranks.device.type == "cpu":
                console.say("note: memory.tier=host: on a CPU all memory is the host's, so this changes nothing")
            readers, cores = config.data.workers * ranks.local_world, len(os.sched_getaffinity(0))
            if readers > cores:
                on = f"{cores} core{'s' * (cores > 1)}"
                console.say(f"note: {readers} reader processes (data.workers) on {on}; fewer may be faster")
            if overruled:
                console.say(f"note: the plan has {overruled}")
            if origin is not None:
                console.say(str(origin))
            trainer.fit(console, keep_start=origin is not None)
            test = trainer.evaluate("test", test_data, console)
        summary = summarise(trainer, test)
        if ranks.rank == 0:
            if trainer.health:
                run.write_memory_usage(memory_usage(trainer.health))
            run.write_summary(summary)
            write_report(run.path)
        console.finish(summary, run)
        del trainer


def evaluate(run_path: Path, split: str = "test", overrides: list[str] = ()) -> dict[str, dict[str, float]]:
    """Metrics of a run's best state on a split, printed on rank 0; at any world size.

    `overrides` of the run's config say where and how it is to run.  Raises InputError, on every rank, if they say more,
    or the data are not those of this model.
    """
    run = RunDirectory.open(run_path)
    trained, config = run.config(), run.config(overrides)
    require_same_model(trained, config)
    with joined_ranks(config.training) as ranks:
        console = Console(ranks.rank, 0, 1)
        config = on_these_ranks(trained, config, ranks, console.say)
        schema = ranks.together(lambda: load_schema(config.data.path))
        checkpoint = ranks.together(run.existing_checkpoint)
        data = open_split(split, config.data, schema, ranks)
        model, *_ = build_sharded_model(config, schema, ranks, to_be_loaded=True)
        shapes = {name: tensor.size for name, tensor in tensors_in(checkpoint, ranks).items()}
        rule = f"data.path={config.data.path} must have the schema that it was trained on"
        require_shapes(model, shapes, checkpoint, rule)
        load_model(checkpoint, model, ranks)
        batches = ranks.largest(data.num_batches)
        with Console(ranks.rank, batches, batches) as bar:
            metrics = evaluate_model(model, data, schema, ranks, config.training.precision, bar.step)
        step = (run.summary() or {}).get("best_step", "unknown")  # of a run that has not ended
        console.evaluation({"split": split, "step": step, "metrics": metrics})
        del model
    return metrics
