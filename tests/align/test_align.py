"""Alignment lowers the error of every layer, and finds an exact answer where there is one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hyconvert.align import FitSettings, LayerWalk, align, align_layer
from hyconvert.align.compensate import Compensation, _Correction
from hyconvert.align.fit import MOST_MAP_ROWS, MOST_ROWS, fit_gate, read_rows, read_sparse
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


def _gate_samples(attention: Any, visit: Any, oracles: Any) -> tuple[list[Any], list[Any]]:
    rows = [read_rows(visit, i, torch.arange(20, 128), 16) for i in range(len(visit.inputs))]
    return rows, [read_sparse(attention, r, o, None, visit.rope) for r, o in zip(rows, oracles, strict=True)]


def test_gate_steps_bring_the_mixed_output_closer_to_the_base(tiny_base: Callable[..., Path]) -> None:
    model = _converted(tiny_base("llama"), "F S0 F F")
    walk = LayerWalk(model, _tokens(6), frozenset({0}))
    for visit in walk:
        if visit.index == 1:
            break
    rows, sparse = _gate_samples(visit.attention, visit, walk.oracle_states[0])

    def error(steps: int, **changes: Any) -> float:
        u, b = fit_gate(rows, sparse, None, replace(SETTINGS, gate_steps=steps, **changes))
        total = 0.0
        for r, s in zip(rows, sparse, strict=True):
            share = torch.sigmoid(s.lse - r.lse_w + b[:, None] + u @ r.x.mT)[..., None].nan_to_num()
            mixed = share * s.out + (1 - share) * r.out_w
            wanted = r.mass[..., None] * r.out_o + (1 - r.mass[..., None]) * r.out_w
            total += float((mixed - wanted).square().sum())
        return total

    errors = [error(steps) for steps in (0, 1, 2, 4)]
    assert errors[0] > errors[1] > errors[2] >= errors[3]
    assert error(2, gate_weight=False) < error(0, gate_weight=False)


def test_a_window_without_keys_outside_it_leaves_gates_finite(tiny_base: Callable[..., Path]) -> None:
    model = _converted(tiny_base("llama"), "F S0 W F")
    align(model, _tokens(3, 16), FitSettings())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_output_projections_make_up_for_earlier_layers(tiny_base: Callable[..., Path], family: str) -> None:
    """Behind the last converted layer the residual stream is closer to the base's, on unseen text."""
    base, line = tiny_base(family), "F S0 W S0"
    models = {share: _converted(base, line) for share in (0.0, 1.0)}
    tokens = _tokens(96 if family == "llama" else 8)
    fits = {
        share: align(model, tokens, replace(SETTINGS, compensation=share)) for share, model in models.items()
    }
    heldout = torch.randint(3, 120, (4, 128), generator=torch.Generator().manual_seed(1))
    reference = _converted(base, "F*4").model(heldout).last_hidden_state
    errors = {
        share: float((model.model(heldout).last_hidden_state - reference).square().mean())
        for share, model in models.items()
    }
    assert all(fit.compensated is None for fit in fits[0.0])
    if family == "olmo2":  # it normalises what attention puts out
        assert all(fit.compensated is None for fit in fits[1.0])
        assert errors[1.0] == errors[0.0]
    else:
        assert all(fit.compensated is not None for fit in fits[1.0])
        assert any(fit.compensated for fit in fits[1.0])
        assert errors[1.0] < errors[0.0]


def test_full_layers_and_the_base_stay_as_they_are(tiny_base: Callable[..., Path]) -> None:
    model, untouched = (_converted(tiny_base("llama"), "F S0 W F") for _ in "ab")
    align(model, _tokens(8), SETTINGS)
    changed = {
        name for (name, mine), theirs in zip(model.named_parameters(), untouched.parameters(), strict=True)
        if not torch.equal(mine, theirs)
    }  # fmt: skip
    assert not {name for name in changed if ".layers.0." in name or ".layers.3." in name}
    assert {name for name in changed if "layers.2." in name} == {"model.layers.2.self_attn.o_proj.weight"}


def test_one_sequence_or_no_gain_leaves_output_projections(tiny_base: Callable[..., Path]) -> None:
    one, other = (_converted(tiny_base("llama"), "F S0 W F") for _ in "ab")
    fits = align(one, _tokens(1), SETTINGS)
    align(other, _tokens(1), replace(SETTINGS, compensation=0.0))
    assert all(fit.compensated is None for fit in fits)
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_the_stream_is_the_converted_model_s(tiny_base: Callable[..., Path], family: str) -> None:
    model, tokens = _converted(tiny_base(family), "F S0 R0 W"), _tokens(5)
    walk = LayerWalk(model, tokens, model.config.get_plan().sources)
    compensation = Compensation(model.model, model.config.get_plan(), tokens, FitSettings(compensation=1.0))
    for visit in walk:
        compensation.follow(visit, refit=False)
    assert not any(state.oracle for state in compensation.states)
    hidden = model.model.norm(torch.cat(compensation.hidden))
    torch.testing.assert_close(hidden, model.model(tokens).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_many_sequences_give_fewer_rows_each() -> None:
    assert FitSettings().suited(4) == FitSettings()
    many = FitSettings().suited(1024)
    assert (many.map_rows, many.rows) == (MOST_MAP_ROWS // 1024, MOST_ROWS // 1024)
    assert FitSettings().suited(10**9).rows == 1


def test_a_token_that_is_asked_for_counts_as_often_as_it_is_weighted() -> None:
    generator = torch.Generator().manual_seed(0)
    heads, error = (torch.randn(2, 6, size, generator=generator) for size in (4, 3))
    once, often = (_Correction(SimpleNamespace(o_proj=torch.nn.Linear(4, 3))) for _ in "ab")
    once.add(slice(0, 2), heads, error, torch.tensor([1.0, 8, 1, 1, 1, 1]).expand(2, 6))
    again = torch.tensor([0, *[1] * 8, 2, 3, 4, 5])
    often.add(slice(0, 2), heads[:, again], error[:, again], torch.ones(2, 13))
    for mine, theirs in ((once.gram, often.gram), (once.cross, often.cross), (once.energy, often.energy)):
        torch.testing.assert_close(mine, theirs)


def test_emphasis_changes_only_what_is_asked_for(tiny_base: Callable[..., Path]) -> None:
    tokens, asked = _tokens(96), torch.zeros(96, 64, dtype=torch.bool)
    models = [_converted(tiny_base("llama"), "F S0 W F") for _ in "abc"]
    for model, answers in zip(models, (None, asked, ~asked), strict=True):
        align(model, tokens[:, :64], SETTINGS, answers)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    for one, other in zip(models[0].parameters(), models[2].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # the same weight everywhere
    asked[:, 40:] = True
    emphasised = _converted(tiny_base("llama"), "F S0 W F")
    align(emphasised, tokens[:, :64], SETTINGS, asked)
    changed = [
        name
        for (name, one), other in zip(models[0].named_parameters(), emphasised.parameters(), strict=True)
        if not torch.equal(one, other)
    ]
    assert changed and all(name.endswith("o_proj.weight") for name in changed)


def test_folds_are_alternate_sequences() -> None:
    for batch in (1, 3, 8):
        fit = _Correction(SimpleNamespace(o_proj=torch.nn.Linear(2, 3)))
        odd = (torch.arange(20) % 2).float()
        for at in range(0, 20, batch):
            rows = slice(at, min(at + batch, 20))
            heads = torch.stack((1 - odd[rows], odd[rows]), -1)[:, None]
            fit.add(rows, heads, torch.zeros(len(heads), 1, 3), torch.ones(len(heads), 1))
        kinds = fit.gram.diagonal(dim1=1, dim2=2)
        assert {tuple(fold) for fold in kinds.tolist()} == {(10.0, 0.0), (0.0, 10.0)}
