"""Measuring what each layer's conversion would cost, one layer at a time and jointly."""

from hyconvert.measure.costs import Cost, Costs, MeasureSettings
from hyconvert.measure.joint import JointEvaluator, Refinement, refine
from hyconvert.measure.run import measure

__all__ = ["Cost", "Costs", "JointEvaluator", "MeasureSettings", "Refinement", "measure", "refine"]
