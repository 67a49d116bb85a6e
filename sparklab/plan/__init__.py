"""What will happen: the recipe, its memory line by line, its time and energy, and the fastest settings that fit. No torch, no weights."""

from sparklab.plan.fixes import Fix
from sparklab.plan.forecast import Line, Plan, PlanTable
from sparklab.plan.recipe import Recipe
from sparklab.plan.solver import plan

__all__ = ["Fix", "Line", "Plan", "PlanTable", "Recipe", "plan"]
