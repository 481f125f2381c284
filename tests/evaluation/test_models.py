"""Two models side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hyconvert.errors import CheckpointError
from hyconvert.evaluation.models import Pair, hidden_states, load_pair


def test_the_base_is_transformers_own_class_and_shares_what_conversion_left_alone(pair: Pair) -> None:
    assert type(pair.base).__name__ == "LlamaForCausalLM"
    same = {p.data_ptr() for p in pair.base.parameters()} & {
        p.data_ptr() for p in pair.converted.parameters()
    }
    assert pair.shared == sum(p.nbytes for p in pair.base.parameters())  # nothing was aligned, so all of it
    assert len(same) == len(list(pair.base.parameters()))


def test_the_base_is_what_was_converted(pair: Pair, tiny_base: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    row = torch.arange(3, 60)
    original = AutoModelForCausalLM.from_pretrained(tiny_base("llama", max_position_embeddings=4096))
    torch.testing.assert_close(hidden_states(pair.base, row), hidden_states(original.eval(), row))


def test_another_base_is_refused(checkpoint: Path, tiny_base: Callable[..., Path]) -> None:
    other = tiny_base("llama", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 3, and the converted model's 4"):
        load_pair(str(checkpoint), base=str(other), device="cpu")
