"""End-to-end speed: dense and converted models on one decode loop."""

from hyconvert.bench.run import Grid, bench
from hyconvert.bench.targets import find_subjects

__all__ = ["Grid", "bench", "find_subjects"]
