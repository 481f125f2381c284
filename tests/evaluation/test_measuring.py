"""What the parts measure is what they say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hyconvert.evaluate import perplexity
from hyconvert.evaluation.branches import branch_off, gated_layers
from hyconvert.evaluation.generation import greedy, measure_generation, until_end
from hyconvert.evaluation.models import Pair, hidden_states
from hyconvert.evaluation.run import Evaluation, evaluate_pair
from hyconvert.evaluation.settings import EvalSettings
from hyconvert.evaluation.speed import count_kv
from hyconvert.evaluation.text import bucket_ranges, measure_text
from hyconvert.kv import base_kv_bytes, kv_bytes
from hyconvert.modeling import HyConvertConfig, HyConvertForCausalLM
from hyconvert.plan import Plan, parse_line


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randint(10, 90, (2, 96), generator=torch.Generator().manual_seed(0))


def same_weights(model: Any, line: str) -> Any:
    """A model with the same base weights and another plan."""
    plan = Plan(
        layers=parse_line(line),
        **model.config.get_plan().model_dump(include={"block_size", "topk", "window"}),
    )
    config = HyConvertConfig.from_dict(model.config.to_dict() | {"plan": plan.model_dump(exclude_none=True)})
    other = HyConvertForCausalLM._from_config(config).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    return other


def test_perplexity_kl_and_agreement_are_what_they_are_called(pair: Pair, rows: torch.Tensor) -> None:
    whole = measure_text(pair, rows, 8).whole
    assert whole.base == pytest.approx(perplexity(pair.base, rows), rel=1e-5)
    assert whole.converted == pytest.approx(perplexity(pair.converted, rows), rel=1e-5)
    base, ours = (
        torch.stack([model.lm_head(hidden_states(model, row))[:-1] for row in rows]).log_softmax(-1)
        for model in (pair.base, pair.converted)
    )
    kl = (base.exp() * (base - ours)).sum(-1)
    assert whole.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert whole.kl_p95 == pytest.approx(float(kl.flatten().sort().values[int(0.95 * kl.numel())]), rel=1e-4)
    assert whole.agreement == pytest.approx(float((base.argmax(-1) == ours.argmax(-1)).float().mean()))


def test_a_model_that_is_its_base_is_not_told_apart(pair: Pair, rows: torch.Tensor) -> None:
    whole_plan = replace(pair, converted=same_weights(pair.converted, "F*4"))
    found = measure_text(whole_plan, rows, 8)
    assert found.whole.ratio == pytest.approx(1, abs=1e-5) and found.whole.kl < 1e-6
    assert found.whole.agreement == 1
    text = measure_generation(whole_plan, rows[:, :32], 8)
    assert (text.common_prefix, text.equal) == (8, 1) and text.base_nll == pytest.approx(text.converted_nll)


@pytest.mark.parametrize(
    ("length", "window"), [(255, 8), (2047, 128), (100, 128), (1, 2), (9, 8), (1023, 128)]
)
def test_buckets_cover_every_position_once(length: int, window: int) -> None:
    ranges = bucket_ranges(length, window)
    assert [p for start, end in ranges for p in range(start, end)] == list(range(length))
    assert ranges[0] == (0, min(window, length))


def test_buckets_average_to_the_whole(evaluation: Evaluation) -> None:
    text = evaluation.text
    assert text is not None and text.tokens == 512 and text.ratio_error is not None
    loss = sum(math.log(b.converted) * (b.end - b.start) for b in text.buckets) / 255
    assert loss == pytest.approx(math.log(text.whole.converted), rel=1e-6)
    assert text.buckets[0].kl < 1e-6  # whatever lies in the window, all of it is seen


def test_without_its_sparse_branch_a_layer_is_a_window_layer(pair: Pair, rows: torch.Tensor) -> None:
    model, windows = pair.converted, same_weights(pair.converted, "F W W F")
    whole = hidden_states(model, rows[0])
    with branch_off(model, "sparse"):
        off = hidden_states(model, rows[0])
    torch.testing.assert_close(off, hidden_states(windows, rows[0]))
    assert not torch.allclose(off, whole, atol=1e-3)
    assert torch.equal(hidden_states(model, rows[0]), whole)  # and it comes back


def test_without_the_window_the_first_tokens_keep_it(pair: Pair, rows: torch.Tensor) -> None:
    model = pair.converted
    whole = hidden_states(model, rows[0])
    with branch_off(model, "window", gated_layers(model)):
        off = hidden_states(model, rows[0])
    torch.testing.assert_close(off[:8], whole[:8])
    assert (off[40:] - whole[40:]).abs().amax(-1).min() > 1e-4


def test_branches_are_shown_with_what_they_carry(evaluation: Evaluation) -> None:
    found = evaluation.branches
    assert found is not None and list(found.shares) == [1] and 0 < found.shares[1] < 1
    assert [(row.off, row.layer) for row in found.ablations] == [
        (None, None), ("sparse", None), ("window", None), ("sparse", 1),
    ]  # fmt: skip
    assert found.ablations[1].nll == pytest.approx(found.ablations[3].nll)  # there is but one sparse layer
    assert found.ablations[0].nll != found.ablations[1].nll


def test_needles_come_at_every_depth_and_length(evaluation: Evaluation) -> None:
    lookup = evaluation.lookup
    assert lookup is not None
    asked = {(c.kind, c.length, c.depth): c.count for c in lookup.cells}
    assert asked == {("single", 1024, 0.8): 1} | {
        (kind, 1024, depth): 1 for kind in ("multikey", "multivalue", "copy") for depth in (0.2, 0.8)
    }
    assert lookup.needles is not None and lookup.needles.count == 5
    copy = lookup.total("copy")
    assert copy is not None and copy.count == 2
    assert copy.base.nll == pytest.approx(sum(c.base.nll for c in lookup.cells if c.kind == "copy") / 2)


def test_greedy_text_is_what_generate_gives(pair: Pair, rows: torch.Tensor) -> None:
    for model in pair.models.values():
        wanted = model.generate(
            rows[:, :40], max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=2
        )
        assert torch.equal(greedy(model, rows[:, :40], 12, set()), wanted[:, 40:])


def test_a_text_that_has_ended_stays_ended(pair: Pair, rows: torch.Tensor) -> None:
    free = greedy(pair.base, rows[:1, :40], 8, set())[0].tolist()
    ended = greedy(pair.base, rows[:1, :40], 8, {free[2]})[0].tolist()
    first = free.index(free[2])
    assert ended == free[: first + 1] + [free[2]] * (7 - first)
    assert until_end(ended, {free[2]}) == free[: first + 1]


def test_kv_bytes_are_the_plans_and_the_cache_holds_them(evaluation: Evaluation, pair: Pair) -> None:
    config, speed = pair.converted.config, evaluation.speed
    kv = count_kv(config)
    assert kv.converted[3] == sum(kv_bytes(config, 8192)) and kv.base[3] == sum(base_kv_bytes(config, 8192))
    assert kv.base_per_token == 2 * kv.converted_per_token  # two of four layers are full
    assert speed is not None and (speed.tokens, speed.decoded) == (64, 4)
    assert speed.base.cache_bytes == sum(base_kv_bytes(config, 68, dtype_bytes=4))
    assert speed.converted.cache_bytes == sum(kv_bytes(config, 68, dtype_bytes=4))


def test_parts_that_are_not_asked_for_are_not_measured(pair: Pair, settings: EvalSettings) -> None:
    result = evaluate_pair(pair, settings.model_copy(update={"parts": ("generation",)}))
    assert result.generation is not None
    assert not any((result.text, result.lookup, result.branches, result.speed, result.verdict))


def test_short_sequences_leave_retrieval_out_and_say_so(pair: Pair, text: Path) -> None:
    settings = EvalSettings(data=str(text), tokens=128, sequence_length=64, parts=("text", "retrieval"))
    result = evaluate_pair(pair, settings)
    assert result.text is not None and result.lookup is None
    assert any("too short" in note for note in result.notes)
