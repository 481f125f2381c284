"""Training: every parameter that takes part gets its gradient, and recomputation changes none."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from hyconvert.modeling.state import prepare_state
from hyconvert_kernels import window_attention
from tests.modeling.tiny import FAMILY_NAMES, mixed_model, tokens

ADDED = ("gate.weight", "gate.bias", "query_map", "value_map", "window_sink", "sparse_sink")


def gradients(model: Any, length: int = 33, **inputs: Any) -> dict[str, Tensor | None]:
    model.zero_grad()
    ids = tokens(2, length)
    loss = model(ids, labels=ids, **inputs).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_all_finite(grads: dict[str, Tensor | None], but: tuple[str, ...] = ()) -> None:
    for name, grad in grads.items():
        if not any(part in name for part in but):
            assert grad is not None, name
            assert grad.isfinite().all(), name


def checkpointed(model: Any, **options: Any) -> Any:
    with (
        warnings.catch_warnings()
    ):  # one of the names is deprecated by newer versions, the other unknown to older
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(**options)
    return model


@pytest.mark.parametrize("settings", [{}, {"gate": "sigmoid", "maps": True}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_parameter_gets_a_gradient(family: str, settings: dict[str, Any]) -> None:
    model = mixed_model(family, **settings).train()
    grads = gradients(model)
    assert_all_finite(grads, but=("mlp.experts", "mlp.gate.weight"))  # an expert may see no token
    for name, grad in grads.items():
        if name.endswith(ADDED):
            assert grad is not None
            assert grad.abs().max() > 0, name


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"preserve_rng_state": False}], ids=str)
def test_checkpointing_changes_no_gradient(family: str, options: dict[str, Any] | None) -> None:
    model = mixed_model(family).train()
    want = gradients(model)
    got = gradients(checkpointed(model, gradient_checkpointing_kwargs=options))
    for name, grad in want.items():
        torch.testing.assert_close(
            got[name], grad, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_checkpointing_runs_the_layers_twice() -> None:
    model = checkpointed(mixed_model().train())
    runs = []
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: runs.append(1))
    gradients(model)
    assert len(runs) == 2


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="reentrant gradient checkpointing would lose the gradient"):
        checkpointed(mixed_model(), gradient_checkpointing_kwargs={"use_reentrant": True})


def test_checkpointing_can_be_switched_off_again() -> None:
    model = checkpointed(mixed_model().train())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_disable()
    runs = []
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: runs.append(1))
    gradients(model)
    assert len(runs) == 1


def test_gradients_of_a_sparse_layer_reach_its_source() -> None:
    model = mixed_model(line="F S0 F*5").train()
    layers = model.model.layers
    with torch.no_grad():
        layers[
            0
        ].self_attn.o_proj.weight.zero_()  # the source's values now reach the loss through layer 1 alone
    grads = gradients(model)
    assert grads["model.layers.0.self_attn.v_proj.weight"].abs().max() > 0
    assert grads["model.layers.0.self_attn.k_proj.weight"].abs().max() > 0
    assert (
        grads["model.layers.0.self_attn.q_proj.weight"].abs().max() == 0
    )  # choosing blocks sends no gradient


@pytest.mark.parametrize("settings", [{}, {"gate": "sigmoid", "maps": True}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("length", [2, 5, 6])
def test_an_empty_sparse_branch_gives_finite_gradients(length: int, settings: dict[str, Any]) -> None:
    grads = gradients(mixed_model(**settings).train(), length=length)
    assert_all_finite(grads)


@pytest.mark.parametrize("settings", [{}, {"sinks": True}], ids=str)
def test_padding_gives_finite_gradients(settings: dict[str, Any]) -> None:
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[0, 20:] = 0
    mask[1, :20] = 0
    assert_all_finite(gradients(mixed_model(**settings).train(), attention_mask=mask))


def test_padded_tokens_send_no_gradient() -> None:
    model, ids = mixed_model().train(), tokens(1, 30)
    labels = ids.clone()
    labels[:, 20:] = -100
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids[:, :20], labels=ids[:, :20]).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-5, atol=1e-6)


def test_a_cache_in_training_changes_no_gradient() -> None:
    model = mixed_model().train()
    assert model.config.use_cache
    want = gradients(model, use_cache=False)
    got = gradients(model)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"gate": "sigmoid", "maps": True}], ids=str)
def test_gradients_agree_with_finite_differences(settings: dict[str, Any]) -> None:
    model = mixed_model(line="F S0 F*5", sinks=True, window=3, block_size=2, **settings).double()
    source, sparse = (layer.self_attn for layer in model.model.layers[:2])
    x = torch.randn(2, 1, 11, 32, dtype=torch.float64, requires_grad=True)
    tables = tuple(table.double() for table in model.model.rotary_emb(x[0], torch.arange(11)[None]))

    def output(x: Tensor, *_: Tensor) -> Tensor:
        state = prepare_state(1, 11, x.device)
        source(x[0], tables, hyconvert_state=state)
        return sparse(x[1], tables, hyconvert_state=state)[0]

    inputs = [x, *sparse.parameters(), source.k_proj.weight, source.v_proj.weight]
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_training_in_mixed_precision(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def watched(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.add((q.dtype, k.dtype, v.dtype))
        return window_attention(q, k, v, *args, **kwargs)

    model, ids = mixed_model(family, sinks=True).train(), tokens(2, 33)
    want = model(ids, labels=ids).loss
    monkeypatch.setattr("hyconvert.modeling.attention.window_attention", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert seen == {(torch.bfloat16,) * 3}
    torch.testing.assert_close(loss, want, rtol=0.05, atol=0)
    assert_all_finite({name: parameter.grad for name, parameter in model.named_parameters()}, but=("mlp.",))


def test_one_step_of_training_lowers_the_loss() -> None:
    model = mixed_model("qwen3_moe", gate="sigmoid").train()
    ids = tokens(2, 33)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
