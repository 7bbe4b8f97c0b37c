"""The layout of a model's tables over ranks."""

from msn_dist.planner.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
