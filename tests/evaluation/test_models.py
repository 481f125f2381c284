"""Two models side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hyconvert.conversion import convert
from hyconvert.errors import CheckpointError
from hyconvert.evaluation.models import Pair, hidden_states, load_pair
from hyconvert.evaluation.run import evaluate
from hyconvert.evaluation.settings import EvalSettings

LINE = "F S0 W F"


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


def test_every_family_is_evaluated(
    family: str, tiny_base: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    convert(
        tiny_base(family), tmp_path / "out", plan=LINE, align_layers=False, block_size=4, topk=2, window=8
    )
    settings = EvalSettings(
        parts=("text", "generation"), data=str(text), tokens=64, sequence_length=64, prompt_tokens=16, new_tokens=3
    )  # fmt: skip
    result = evaluate(str(tmp_path / "out"), settings=settings, device="cpu")
    assert result.text is not None and result.text.buckets[0].kl < 1e-5 < result.text.whole.kl
    assert result.generation is not None and result.generation.prompts == 4
