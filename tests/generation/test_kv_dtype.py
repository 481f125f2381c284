"""Keys and values in FP8: what the long caches hold and weigh, and that steps read it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hyconvert.bench.roofline import step_work
from hyconvert.errors import HyconvertError
from hyconvert.generation import Decoder, generate
from hyconvert.generation.network import read_network
from hyconvert.kv import base_kv_bytes, kv_bytes
from hyconvert_kernels.fp8 import FP8, quantise_rows
from tests.modeling.tiny import base_model, mixed_model, tokens

PROMPT, LENGTH = 30, 40
LINES: list[tuple[str, dict[str, Any]]] = [
    ("F S0 R0 W F S4 F", {}),
    ("F S0 R0 W F S4 F", {"gate": "sigmoid", "maps": True, "sinks": True}),
]


def decoders(model: Any, batch: int = 2) -> tuple[Decoder, Decoder]:
    own, fp8 = (Decoder(model, batch=batch, max_length=LENGTH, kv_dtype=kind) for kind in (None, "fp8"))
    return own, fp8


@pytest.mark.parametrize(("line", "settings"), LINES, ids=str)
def test_long_caches_are_float8_and_rings_stay(
    line: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixed_model(line=line, **settings)
    own, fp8 = decoders(model)
    ids = tokens(2, PROMPT)
    torch.testing.assert_close(fp8.prefill(ids), own.prefill(ids))  # a prompt attends to itself unrounded
    monkeypatch.setattr("hyconvert.generation.decoder.PASS_TOKENS", 5)
    torch.testing.assert_close(fp8.prefill(ids), own.prefill(ids))  # and is not read in pieces
    for index, block in enumerate(fp8.network.blocks):
        keys, values, scales = fp8.caches.of(index, slice(None))
        if block.ring is not None:
            assert keys.dtype == torch.float32 and scales is None
            continue
        assert keys.dtype == values.dtype == FP8 and scales is not None
        if index == 0:  # before anything could differ
            want, scale = quantise_rows(own.caches.keys[0])
            seen = slice(PROMPT)
            assert torch.equal(keys[:, :, seen].float(), want[:, :, seen].float())
            assert torch.equal(scales[0][:, :, seen], scale[:, :, seen])
            assert not scales[0][:, :, PROMPT:].any()


@pytest.mark.parametrize(("line", "settings"), LINES, ids=str)
def test_scales_alone_change_nothing(
    line: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With float32 in the place of float8, steps give the logits of caches without scales."""
    monkeypatch.setattr("hyconvert.generation.caches.FP8", torch.float32)
    own, scaled = decoders(mixed_model(line=line, **settings))
    mask = torch.ones(2, PROMPT, dtype=torch.int64)
    mask[1, :7] = 0
    for decoder in (own, scaled):
        decoder.prefill(tokens(2, PROMPT), mask)
    for step in range(5):
        fed = tokens(2, 1, seed=step)[:, 0]
        torch.testing.assert_close(scaled.feed(fed), own.feed(fed), rtol=1e-4, atol=1e-4)
    assert scaled.length == PROMPT + 5 and scaled.caches.scales[0] is not None


def test_tokens_are_nearly_those_of_wide_caches() -> None:
    model = base_model("qwen3")
    ids = tokens(2, PROMPT)
    want = generate(model, ids, max_new_tokens=8, eos_token_id=[])
    got = generate(model, ids, max_new_tokens=8, eos_token_id=[], kv_dtype="fp8")
    assert got.shape == want.shape and torch.equal(got[:, : PROMPT + 1], want[:, : PROMPT + 1])


def test_bytes_are_what_is_counted() -> None:
    model = mixed_model()
    caches = decoders(model)[1].caches
    want = kv_bytes(model.config, LENGTH, dtype_bytes=4, batch=2, static=True, fp8=True)
    assert caches.layer_bytes == want
    base = base_model("llama")
    dense = base_kv_bytes(base.config, LENGTH, dtype_bytes=4, batch=2, static=True, fp8=True)
    assert decoders(base)[1].caches.layer_bytes == dense
    assert dense[0] == 2 * 2 * LENGTH * 2 * (8 + 4)  # rows, K and V, KV heads, numbers and a scale


def test_a_step_s_work_counts_one_byte_per_number_and_the_scales() -> None:
    network = read_network(mixed_model(line="F S0 W F*4"))
    wide, narrow = (step_work(network, 3, 100, kind).bytes for kind in (None, "fp8"))
    assert wide > narrow
    selected = network.topk * network.block_size
    keys = 5 * 101 + selected
    assert wide - narrow == 3 * 2 * 2 * keys * (8 * 4 - (8 + 4))


def test_random_contexts_decode() -> None:
    fp8 = decoders(mixed_model())[1]
    fp8.assume(PROMPT)
    for _ in range(3):
        fp8.step()
    assert fp8.caches.keys[0].float().isfinite().all() and fp8.caches.keys[0].float().std() > 10
    assert fp8.logits is not None and fp8.logits.isfinite().all()


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed_model()
    with pytest.raises(HyconvertError, match="kv_dtype 'int4' is not known; use fp8"):
        Decoder(model, batch=1, max_length=8, kv_dtype="int4")
    monkeypatch.setattr(
        "hyconvert.generation.caches.fp8_problem", lambda device: "A100 has compute capability 8.0"
    )
    with pytest.raises(HyconvertError, match=r"compute capability 8.0; leave kv_dtype out"):
        Decoder(model, batch=1, max_length=8, kv_dtype="fp8")


def test_caches_take_over_what_others_hold() -> None:
    one, other = (decoders(mixed_model())[1] for _ in range(2))
    one.prefill(tokens(2, PROMPT))
    other.caches.copy_(one.caches)
    for index in range(len(one.network.blocks)):
        for mine, theirs in zip(
            *(x.caches.of(index, slice(None)).plain(torch.float32)[:2] for x in (one, other)), strict=True
        ):
            assert mine.any() and torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("kernel", "scores", "other", "wrong"),
    [
        ([0, 1], [0.5, 0.4, 0.3, 0.2], False, False),
        ([1, 0], [0.5, 0.4, 0.3, 0.2], False, False),  # in another order
        ([0, 2], [0.5, 0.4, 0.399, 0.2], True, False),
        ([0, 2], [0.5, 0.4, 0.3, 0.2], True, True),
        ([0, 3], [0.5, 0.4, 0.399, 0.2], True, True),  # close, but the block beyond was taken
        ([2, 3], [0.5, 0.4, 0.399, 0.398], True, True),
        ([0, -1], [0.5, 0.4, 0.399, 0.2], True, False),
    ],
)
def test_the_check_of_selections_forgives_close_calls_alone(
    kernel: list[int], scores: list[float], other: bool, wrong: bool
) -> None:
    from benchmarks.check_decode_loop import Selections

    found, shape = Selections(), (1, 1, -1)
    found.indices["triton"] = [torch.tensor(kernel).view(shape)] * 2
    found.indices["reference"] = [torch.tensor([0, 1]).view(shape)] * 2
    found.scores = [torch.tensor(scores).view(shape), torch.tensor([0.5, 0.1, 0.0, 0.0]).view(shape)]
    assert [bool(x) for x in found.differ(2)] == [other, wrong]  # of the second layer nothing is asked
    found.scores.reverse()
    assert [bool(x) for x in found.differ(1)] == [other, wrong]


def test_the_benchmark_compares_both_caches() -> None:
    from benchmarks.kv_dtype import compare

    rows = tokens(3, LENGTH)
    found = compare(mixed_model(), rows, batch=2)
    json.dumps(found)
    assert found["perplexity"] > 1 and abs(found["ratio"] - 1) < 0.05
    assert found["ratio"] == pytest.approx(found["perplexity_fp8"] / found["perplexity"])
    assert 0 < found["kl"] < 0.05 and 0.5 < found["agreement"] <= 1
    assert found["kv_bytes_fp8"] < found["kv_bytes"]
    with torch.no_grad():
        logits = mixed_model()(rows).logits.log_softmax(-1)
    half = LENGTH // 2
    want = -logits[:, half:-1].gather(2, rows[:, half + 1 :, None]).mean()
    assert found["perplexity"] == pytest.approx(float(want.exp()), rel=1e-3)
