"""Closed-form alignment of converted layers to the base."""

from hyconvert.align.fit import FitSettings
from hyconvert.align.run import LayerFit, align, align_layer
from hyconvert.align.walk import LayerVisit, LayerWalk

__all__ = ["FitSettings", "LayerFit", "LayerVisit", "LayerWalk", "align", "align_layer"]
