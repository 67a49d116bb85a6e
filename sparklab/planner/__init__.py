"""What will happen: the recipe, its memory line by line, its time and energy, and the fastest settings that fit. No torch, no weights."""

from sparklab.planner.fixes import Fix
from sparklab.planner.forecast import Line, ModelTable, Plan, PlanTable
from sparklab.planner.recipe import Recipe
from sparklab.planner.solver import plan

__all__ = ["Fix", "Line", "ModelTable", "Plan", "PlanTable", "Recipe", "plan"]
