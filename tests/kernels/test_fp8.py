"""Keys and values with a scale per row: what is stored, and kernels that read it, equal the references.

Kernels run with float32 in the place of float8 too, which leaves the scales alone to be seen. Triton's interpreter
reads float8, but does not round to it.
"""

import pytest
import torch

pytest.importorskip("triton")

import hyconvert_kernels as kernels
from hyconvert_kernels.fp8 import FP8, LARGEST, dequantise_rows, quantise_rows, store_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIGHT = {"rtol": 1e-5, "atol": 1e-5}

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # NumPy's, for -inf - -inf
    pytest.mark.skipif(
        DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="no float8 on this GPU"
    ),
]


@pytest.fixture(autouse=True)
def _interpret(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def cached(*shape, seed=0, stored=FP8):
    """Rows of very different sizes, as numbers and scales."""
    x = normal(*shape, seed=seed) * torch.exp(2 * normal(*shape[:-1], 1, seed=seed + 50))
    return quantise_rows(x, stored)


def test_every_row_is_kept_to_a_sixteenth_however_large_it_is():
    x = normal(2, 3, 7, 16) * 10.0 ** torch.arange(-12, 9, 3, device=DEVICE)[:, None]
    stored, scale = quantise_rows(x)
    assert stored.dtype == FP8 and stored.shape == x.shape and scale.dtype == torch.float32
    assert (stored.float().abs().amax(-1) == LARGEST).all()
    back = dequantise_rows(stored, scale, torch.float32)
    assert ((back - x).abs() <= x.abs() / 16 + x.abs().amax(-1, keepdim=True) * 2.0**-18).all()
    assert (back - x).norm() < 0.03 * x.norm()


def test_rows_of_zeros_stay_zeros_and_bfloat16_is_taken():
    stored, scale = quantise_rows(torch.zeros(2, 16, dtype=torch.bfloat16))
    assert not stored.float().any() and (scale > 0).all()
    assert torch.equal(
        dequantise_rows(stored, scale, torch.bfloat16), torch.zeros(2, 16, dtype=torch.bfloat16)
    )


def test_prompts_are_stored_a_few_tokens_at_a_time():
    x = normal(2, 3, 10, 16)
    out, scale = torch.zeros(2, 3, 12, 16, device=DEVICE).to(FP8), torch.zeros(2, 3, 12, device=DEVICE)
    store_rows(x, out, scale, tokens=4)
    want, scales = quantise_rows(x)
    assert torch.equal(out[:, :, :10].float(), want.float()) and torch.equal(scale[:, :, :10], scales)
    assert not scale[:, :, 10:].any()


STORED = [
    torch.float32,
    pytest.param(
        FP8,
        marks=pytest.mark.skipif(
            DEVICE == "cpu", reason="the interpreter loses the carry in rounding to float8"
        ),
    ),
]


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize(("dim", "rotate", "norm"), [(16, True, True), (24, False, False)])
def test_split_heads_stores_rows_and_scales(stored, dim, rotate, norm):
    batch, heads, groups, slots = 3, 4, 2, 20
    x = normal(batch, 1, (heads + 2 * groups) * dim + 5)
    offset = torch.tensor([18, 4, 0], device=DEVICE)
    start = torch.tensor([0, 3, 0], device=DEVICE)
    settings = {"cos": normal(64, dim // 2, seed=3), "sin": normal(64, dim // 2, seed=4), "heads": heads}
    if norm:
        settings |= {"q_norm": normal(dim, seed=5), "k_norm": normal(dim, seed=6), "eps": 1e-6}
    results = []
    plain = [torch.zeros(batch, groups, slots, dim, device=DEVICE) for _ in "kv"]
    kernels.split_heads(
        x, offset, start, *plain, **settings, rotate=rotate, rotate_source=rotate, implementation="reference"
    )
    for implementation in ("reference", "triton"):
        caches = [torch.zeros(batch, groups, slots, dim, device=DEVICE).to(stored) for _ in "kv"]
        scales = [torch.zeros(batch, groups, slots, device=DEVICE) for _ in "kv"]
        kernels.split_heads(
            x, offset, start, *caches, **settings, rotate=rotate, rotate_source=rotate, scales=tuple(scales),
            implementation=implementation,
        )  # fmt: skip
        results.append([dequantise_rows(*pair, torch.float32) for pair in zip(caches, scales, strict=True)])
        assert [int(scale.count_nonzero()) for scale in scales] == [batch * groups] * 2
    near = {"rtol": 0.07, "atol": 0.01} if stored == FP8 else TIGHT
    torch.testing.assert_close(results[0], plain, **near)
    torch.testing.assert_close(results[0], results[1], **near)  # a last bit may round the other way


@pytest.mark.parametrize("stored", [torch.float32, FP8], ids=str)
@pytest.mark.parametrize("length", [3, 45, 200])
def test_a_full_layer_decodes_from_scaled_rows(stored, length):
    q = normal(2, 6, 1, 16)
    (k, k_scale), (v, v_scale) = (cached(2, 2, 210, 16, seed=seed, stored=stored) for seed in (1, 2))
    for x in (k_scale, v_scale):
        x[:, :, length:] = torch.nan  # never written
    offset, start = torch.full((2,), length - 1, device=DEVICE), torch.tensor([[0], [2]], device=DEVICE)
    tensors = q, k, v, offset, start
    options = {"block_size": 16, "window": 9, "scale": 0.1, "scales": (k_scale, v_scale)}
    results = [
        (
            *kernels.oracle_attention(*tensors, with_scores=False, implementation=name, **options)[:2],
            *kernels.oracle_decode(*tensors, topk=3, implementation=name, **options),
        )
        for name in ("reference", "triton")
    ]
    torch.testing.assert_close(*results, **TIGHT)
    plain = dequantise_rows(k, k_scale, torch.float32), dequantise_rows(v, v_scale, torch.float32)
    want = kernels.oracle_decode(
        q, *plain, offset, start, topk=3, implementation="reference", **(options | {"scales": None})
    )
    torch.testing.assert_close(results[0][2:], want, **TIGHT)


@pytest.mark.parametrize("stored", [torch.float32, FP8], ids=str)
@pytest.mark.parametrize("ring", [True, False])
def test_a_sparse_layer_decodes_from_scaled_rows(stored, ring):
    q, query = normal(2, 6, 1, 16), normal(2, 6, 1, 16, seed=7)
    (k, k_scale), (v, v_scale) = (cached(2, 2, 80, 16, seed=seed, stored=stored) for seed in (1, 2))
    indices = torch.tensor([[0, 2], [1, -1]], dtype=torch.int32, device=DEVICE).expand(2, 2, 2)[:, :, None]
    offset, start = torch.full((2,), 70, device=DEVICE), torch.tensor([[0], [5]], device=DEVICE)
    near = (normal(2, 2, 9, 16, seed=3), normal(2, 2, 9, 16, seed=4)) if ring else (k, v)
    where = (
        {} if ring else {"window_offset": offset, "window_start": start, "window_scales": (k_scale, v_scale)}
    )
    results = [
        kernels.sparse_decode(
            q, *near, query, k, v, indices, offset, start, normal(2, 6, 1, seed=5), value_map=normal(6, 16, 16, seed=6),
            block_size=16, window=9, scale=0.1, scales=(k_scale, v_scale), implementation=name, **where,
        )
        for name in ("reference", "triton")
    ]  # fmt: skip
    torch.testing.assert_close(*results, **TIGHT)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter is not exact on 16-bit floats")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_queries_read_float8(dtype):
    q, (k, k_scale), (v, v_scale) = (
        normal(2, 8, 1, 128).to(dtype),
        *(cached(2, 2, 5000, 128, seed=s) for s in (1, 2)),
    )
    offset, start = torch.full((2,), 4900, device=DEVICE), torch.tensor([[0], [5]], device=DEVICE)
    options = {"block_size": 64, "window": 100, "scale": 0.01, "scales": (k_scale, v_scale)}
    got, _, indices = kernels.oracle_decode(q, k, v, offset, start, topk=8, **options)
    want, _, chosen = kernels.oracle_decode(
        q.float(), k, v, offset, start, topk=8, implementation="reference", **options
    )
    assert (got.float() - want).norm() < 1e-2 * want.norm()
    assert (indices == chosen).float().mean() > 0.9
    near = normal(2, 2, 100, 128, seed=3).to(dtype)
    gate = normal(2, 8, 1, seed=4).to(dtype)
    options |= {"gate_logit": gate}
    got = kernels.sparse_decode(q, near, near, q, k, v, chosen, offset, start, **options)
    wide = near.float()
    want = kernels.sparse_decode(
        q.float(), wide, wide, q.float(), k, v, chosen, offset, start, implementation="reference", **options
    )
    assert (got.float() - want).norm() < 1e-2 * want.norm()


def test_scales_of_another_shape_are_refused():
    q, (k, scale) = normal(2, 4, 1, 16), cached(2, 2, 20, 16)
    where = torch.full((2,), 3, device=DEVICE), torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    for wrong in (scale[:, :, :5], scale.double()):
        with pytest.raises(ValueError, match=r"scales must be float32 \[2, 2, 20\]"):
            kernels.oracle_decode(
                q, k, k, *where, block_size=16, window=4, topk=1, scale=1.0, scales=(scale, wrong)
            )


def test_the_reference_stores_float8_at_its_slot():
    dim, slots = 16, 8
    x, table = normal(1, 1, 3 * dim), normal(8, dim // 2)
    where = torch.tensor([5], device=DEVICE), torch.tensor([0], device=DEVICE)
    caches = [torch.zeros(1, 1, slots, dim, device=DEVICE).to(FP8) for _ in "kv"]
    scales = tuple(torch.zeros(1, 1, slots, device=DEVICE) for _ in "kv")
    kernels.split_heads(
        x, *where, *caches, heads=1, cos=table, sin=table, rotate=False, rotate_source=False, scales=scales,
        implementation="reference",
    )  # fmt: skip
    for cache, scale, row in zip(caches, scales, x[0, 0].split(dim)[1:], strict=True):
        want, found = quantise_rows(row)
        assert torch.equal(cache[0, 0, 5].float(), want.float()) and scale[0, 0, 5] == found
        assert not cache[0, 0, :5].float().any() and not scale[0, 0, 6:].any()
