"""Healing: brief continued training of a converted model, taught by its base."""

from hyconvert.heal.checks import check
from hyconvert.heal.report import HealReport
from hyconvert.heal.run import heal

__all__ = ["HealReport", "check", "heal"]
