"""Alignment lowers the error of every layer, and finds an exact answer where there is one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hyconvert.align import FitSettings, LayerWalk, align, align_layer
from hyconvert.align.fit import read_rows, read_sparse
from hyconvert.modeling import HyConvertConfig, HyConvertForCausalLM
from hyconvert.plan import Plan, parse_line

SETTINGS = FitSettings(rows=96, map_rows=96)


def _tokens(count: int = 6, length: int = 128) -> torch.Tensor:
    return torch.randint(3, 120, (count, length), generator=torch.Generator().manual_seed(0))


def _converted(base: Path, line: str, **settings: Any) -> Any:
    from transformers import AutoConfig

    plan = Plan(layers=parse_line(line), block_size=16, topk=4, window=16, **settings)
    config = HyConvertConfig.from_base(AutoConfig.from_pretrained(base), plan)
    return HyConvertForCausalLM.from_pretrained(base, config=config).eval().requires_grad_(False)


def test_the_walk_sees_what_the_base_computes(tiny_base: Callable[..., Path], family: str) -> None:
    from transformers import AutoModelForCausalLM

    base = tiny_base(family)
    tokens = _tokens(2, 40)
    model = _converted(base, "F S0 W F")
    walk = LayerWalk(model, tokens, frozenset({0}))
    visits = list(walk)
    assert [visit.index for visit in visits] == [0, 1, 2, 3]
    assert len(walk.oracle_states[0]) == 2
    hidden = model.model.norm(walk.hidden)
    expected = AutoModelForCausalLM.from_pretrained(base).eval().model(tokens).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


def _attention_output(model: Any, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.model.layers[layer].self_attn.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return seen[0]


def test_alignment_brings_attention_closer_to_the_base_on_unseen_text(
    tiny_base: Callable[..., Path], family: str
) -> None:
    base, line = tiny_base(family), "F S0 W F"
    model, plain, reference = _converted(base, line), _converted(base, line), _converted(base, "F*4")
    align(model, _tokens(16), SETTINGS)
    heldout = torch.randint(3, 120, (2, 128), generator=torch.Generator().manual_seed(1))
    wanted = _attention_output(reference, 1, heldout)
    before = (_attention_output(plain, 1, heldout) - wanted).square().mean()
    after = (_attention_output(model, 1, heldout) - wanted).square().mean()
    assert after < before


@pytest.mark.parametrize("line", ["F S0 F S0", "F R0 W S0"])
def test_every_converted_layer_reports_a_fit_no_worse_than_without_the_refit(
    tiny_base: Callable[..., Path], line: str
) -> None:
    model = _converted(tiny_base("llama"), line)
    fits = align(model, _tokens(), SETTINGS)
    assert [fit.layer for fit in fits] == [
        i for i, x in enumerate(model.config.get_plan().layers) if x.kind != "full"
    ]
    for fit in fits:
        assert fit.error <= fit.error_before_refit + 1e-6
        assert (fit.explained is None) == (fit.kind == "window")


def test_every_setting_aligns(tiny_base: Callable[..., Path]) -> None:
    for settings in (
        {"gate": "sigmoid"},
        {"gate": "sigmoid", "maps": True},
        {"sinks": True},
        {"maps": False},
    ):
        model = _converted(tiny_base("llama"), "F S0 R0 W", **settings)
        fits = align(model, _tokens(3), SETTINGS)
        assert len(fits) == 3
        assert all(parameter.isfinite().all() for parameter in model.parameters()), settings


def test_a_layer_that_reads_its_own_twin_needs_no_map(tiny_base: Callable[..., Path]) -> None:
    """With source and layer alike, the identity explains everything that the selected blocks hold."""
    model = _converted(tiny_base("llama"), "F S0 F F")
    first, second = model.model.layers[0], model.model.layers[1]
    with torch.no_grad():
        second.load_state_dict(first.state_dict(), strict=False)
        first.self_attn.o_proj.weight.zero_()
        first.mlp.down_proj.weight.zero_()
    walk = LayerWalk(model, _tokens(6), frozenset({0}))
    for visit in walk:
        if visit.index != 1:
            continue
        fit = align_layer(visit, walk.oracle_states[0], FitSettings(rows=96, map_rows=96, refit_output=False))
        at = torch.arange(40, 128)
        rows = read_rows(visit, 0, at, 16)
        attention = visit.attention
        exact = read_sparse(attention, rows, walk.oracle_states[0][0], None, visit.rope)
        mapped = read_sparse(attention, rows, walk.oracle_states[0][0], attention.query_map, visit.rope)
        error = (exact.out - mapped.out).square().sum() / exact.out.square().sum()
        assert error < 1e-2
        assert fit.explained is not None and fit.explained > 0.8
