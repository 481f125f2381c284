"""Conversion of a real model keeps its quality, and alignment is why."""

from pathlib import Path

import pytest

from hyconvert.comparison import compare
from hyconvert.conversion import Calibration, convert
from hyconvert.data import BUILTIN_HELDOUT

FULL_LAYERS = (0, 1, 2, 7, 16, 18, 20)


@pytest.mark.parametrize("aligned", [True, False])
def test_seven_full_layers_of_thirty_keep_perplexity_only_when_aligned(
    smollm2_gguf: Path, tmp_path: Path, aligned: bool
) -> None:
    """Q4 SmolLM2, T = 2048, k = 8, no training: at most 1.35x the base's perplexity; ten times worse unaligned."""
    calibration = Calibration(tokens=4096)
    convert(
        smollm2_gguf,
        tmp_path / "out",
        full_layers=FULL_LAYERS,
        topk=8,
        align_layers=aligned,
        calibration=calibration,
    )
    result = compare(str(tmp_path / "out"), data=BUILTIN_HELDOUT, tokens=2048, sequence_length=2048)
    if aligned:
        assert result.ratio < 1.35
    else:
        assert result.ratio > 13.5
