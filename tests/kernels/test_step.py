"""Norms, activation, and the way from the fused projection to cache: kernels equal references; one-launch decoding."""

import os

import pytest
import torch

pytest.importorskip("triton")

import hyconvert_kernels as kernels
from hyconvert_kernels import configs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIGHT = {"rtol": 1e-5, "atol": 1e-5}

pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning",  # NumPy's, in the interpreter, for -inf - -inf under a mask
)


@pytest.fixture(autouse=True)
def _interpret(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert os.environ.get("TRITON_INTERPRET") == "1" or DEVICE == "cuda"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_add_norm(added, after):
    x, residual, weight = normal(2, 3, 40), normal(2, 3, 40, seed=1), normal(40, seed=2)
    want = kernels.add_norm(
        x, residual if added else None, weight, 1e-5, after=after, implementation="reference"
    )
    buffer = residual.clone() if added else None
    got = kernels.add_norm(x, buffer, weight, 1e-5, after=after, implementation="triton")
    torch.testing.assert_close(got, want, **TIGHT)
    if added:
        torch.testing.assert_close(buffer, want[1], **TIGHT)


def test_silu_mul():
    x = normal(2, 3, 2 * 1100)
    got = kernels.silu_mul(x, implementation="triton")
    torch.testing.assert_close(got, kernels.silu_mul(x, implementation="reference"), **TIGHT)
    out = torch.empty_like(got)
    assert kernels.silu_mul(x, out=out, implementation="triton") is out and torch.equal(out, got)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("rows", [3, 20])
def test_a_gated_product_fills_what_it_is_given(rows, implementation):
    x, weight = torch.randn(rows, 24, device=DEVICE), torch.randn(32, 24, device=DEVICE)
    want = kernels.linear(x, weight, gated=True, implementation=implementation)
    room = torch.full((rows + 5, 16), torch.nan, device=DEVICE)
    got = kernels.linear(x, weight, gated=True, out=room[:rows], implementation=implementation)
    assert torch.equal(got, want) and torch.equal(room[:rows], want) and room[rows:].isnan().all()
    for wrong in ({"out": room[:rows]}, {"gated": True, "out": room.T[:rows]}):
        with pytest.raises(ValueError, match="contiguous, and the product gated"):
            kernels.linear(x, weight, implementation=implementation, **wrong)


def test_products_of_about_a_hundred_rows_are_of_128():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [configs.library_rows(rows, gpu) for rows in (96, 97, 127, 128, 129)] == [96, 128, 128, 128, 129]
    assert configs.library_rows(100, cpu) == 100


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(rows, gated, biased):
    x, weight = normal(rows, 1, 150), normal(44, 150, seed=1)
    bias = normal(44, seed=2) if biased else None
    got = kernels.linear(x, weight, bias, gated=gated, most_rows=16, implementation="triton")
    want = kernels.linear(x, weight, bias, gated=gated, implementation="reference")
    assert got.shape == (rows, 1, 22 if gated else 44)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("length", "ring", "options"),
    [
        (1, True, {"query_map": True, "norm": True}),
        (1, False, {"rotate": False, "rotate_source": True}),
        (19, False, {"query_map": True, "rotate_source": False}),
        (19, False, {"norm": True, "values": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dim", [16, 24])
def test_split_heads(length, ring, options, dim):
    batch, heads, groups, slots = 3, 4, 2, 20
    x = normal(batch, length, (heads + 2 * groups) * dim + 5)
    offset = torch.tensor([18, 18, 18] if ring else [0, 0, 0], device=DEVICE)
    start = torch.tensor([0, 3, 18], device=DEVICE)
    settings = {
        "cos": normal(64, dim // 2, seed=3),
        "sin": normal(64, dim // 2, seed=4),
        "heads": heads,
        "ring": ring,
    }
    options = dict(options)
    if options.pop("norm", False):
        settings |= {"q_norm": normal(dim, seed=5), "k_norm": normal(dim, seed=6), "eps": 1e-6}
    if options.pop("query_map", False):
        settings["query_map"] = normal(heads, dim, dim, seed=7)
    values = options.pop("values", True)
    size = 5 if ring else slots
    results = []
    for implementation in ("reference", "triton"):
        k, v = (torch.zeros(batch, groups, size, dim, device=DEVICE) for _ in "kv")
        out = kernels.split_heads(
            x, offset, start, k, v if values else None, **settings, **options, implementation=implementation
        )
        results.append((*(y for y in out if y is not None), k, v))
    assert results[0][-2].count_nonzero() > 0
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_split_heads_refuses_more_tokens_than_a_ring_holds():
    ring = torch.zeros(1, 1, 4, 16)
    table = torch.zeros(8, 8)
    with pytest.raises(ValueError, match="a ring of 4 slots cannot take 6 tokens"):
        kernels.split_heads(
            torch.zeros(1, 6, 48), torch.zeros(1).long(), torch.zeros(1).long(), ring, ring, heads=1, ring=True,
            cos=table, sin=table,
        )  # fmt: skip


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize(
    ("size", "at", "last", "length"),
    [
        (20, 0, 3, 5),
        (20, 0, 4, 5),
        (20, 0, 19, 20),
        (20, 0, 44, 60),
        (20, 6, 3, 4),
        (20, 33, 3, 4),
        (20, 40, 39, 40),
        (1, 5, 2, 3),
    ],
    ids=["filled up", "shorter", "as long", "longer", "first pieces", "short piece", "long piece", "one slot"],
)  # fmt: skip
@pytest.mark.parametrize("dim", [16, 24])
def test_rings_take_a_prompts_last_tokens(dim, size, at, last, length, implementation):
    shift = at - min(at, size)
    k, v = (
        normal(2, at - shift + length, 3, dim).transpose(1, 2),
        normal(2, 3, at - shift + length, dim, seed=1),
    )
    rings = [normal(4, 3, size, dim, seed=seed) for seed in (2, 3)]
    want = [ring.clone() for ring in rings]
    for slot in range(max(0, at + last - size + 1), at + last + 1):
        for ring, x in zip(want, (k, v), strict=True):
            ring[1:3, :, slot % size] = x[:, :, slot - shift]
    kernels.fill_rings(
        k, v, *(ring[1:3] for ring in rings), torch.tensor([last], device=DEVICE), at=at, shift=shift,
        implementation=implementation,
    )  # fmt: skip
    for ring, filled in zip(rings, want, strict=True):
        assert torch.equal(ring, filled)


def test_rings_are_filled_where_they_lie():
    x, ring = normal(1, 1, 4, 16), normal(1, 1, 16, 4).transpose(2, 3)
    with pytest.raises(ValueError, match="rings' last stride must be 1"):
        kernels.fill_rings(
            x, x, ring, ring, torch.tensor([3], device=DEVICE), at=0, shift=0, implementation="triton"
        )


@pytest.mark.parametrize("slot", [0, 3, 16, 40])
@pytest.mark.parametrize("window", [5, 37])
def test_window_decode_on_a_ring_is_the_window_of_the_sequence(slot, window):
    q, k, v = normal(2, 4, 1, 16), normal(2, 2, 41, 16, seed=1), normal(2, 2, 41, 16, seed=2)
    start = torch.tensor([[0], [min(slot, 2)]], device=DEVICE)
    offset = torch.full((2,), slot, device=DEVICE)
    rings = [torch.full((2, 2, window, 16), 1e3, device=DEVICE) for _ in "kv"]
    for ring, x in zip(rings, (k, v), strict=True):
        for s in range(max(0, slot - window + 1), slot + 1):
            ring[:, :, s % window] = x[:, :, s]
    want, _ = kernels.window_attention(q, k, v, offset, start, window=window, scale=0.3)
    for implementation in ("reference", "triton"):
        got = kernels.window_decode(
            q, *rings, offset, start, window=window, scale=0.3, implementation=implementation
        )
        torch.testing.assert_close(got, want, **TIGHT)


def test_window_decode_is_an_op_that_torch_can_trace():
    q, ring = normal(2, 4, 1, 16), normal(2, 2, 8, 16, seed=1)
    where = torch.full((2,), 11, device=DEVICE), torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(torch.ops.hyconvert.window_decode.default, (q, ring, ring, *where, 8, 0.3))


@pytest.mark.parametrize("length", [3, 45, 200])
def test_one_query_without_scores_takes_the_split_kernel(length):
    q, k, v = normal(2, 6, 1, 16), normal(2, 2, length, 16, seed=1), normal(2, 2, length, 16, seed=2)
    offset, start = torch.full((2,), length - 1, device=DEVICE), torch.tensor([[0], [2]], device=DEVICE)
    results = [
        kernels.oracle_attention(
            q, k, v, offset, start, block_size=16, window=9, scale=0.3, with_scores=False, implementation=name
        )[:2]
        for name in ("reference", "triton")
    ]
    torch.testing.assert_close(*results, **TIGHT)


def test_window_attention_merges_the_sparse_branch_in_one_pass():
    q, k, v = normal(1, 4, 23, 16), normal(1, 2, 23, 16, seed=1), normal(1, 2, 23, 16, seed=2)
    offset, start = torch.zeros(1, device=DEVICE).long(), torch.zeros(1, 23, device=DEVICE).long()
    out, lse, gate = (
        normal(1, 4, 23, 16, seed=3),
        normal(1, 4, 23, seed=4),
        normal(1, 23, 4, seed=5).transpose(1, 2),
    )
    lse[:, :, :3] = -torch.inf
    results = [
        kernels.merged_window_attention(
            q, k, v, offset, start, out, lse, gate, window=9, scale=0.3, implementation=name
        )
        for name in ("reference", "triton")
    ]
    torch.testing.assert_close(*results, **TIGHT)
    assert results[1].transpose(1, 2).is_contiguous(), "it is given to a product as it lies"


@pytest.mark.parametrize(
    ("heads", "dim", "rows"), [(4, 16, 2), (6, 16, 2), (2, 64, 32)], ids=["4 heads", "6 heads", "many rows"]
)
def test_value_map_by_tensor_cores_is_the_value_map(heads, dim, rows):
    from hyconvert_kernels.decode import sparse

    q, near, far = (
        normal(rows, heads, 1, dim),
        normal(rows, 2, 9, dim, seed=1),
        normal(rows, 2, 80, dim, seed=2),
    )
    indices = torch.tensor([[0, 2], [1, -1]], dtype=torch.int32, device=DEVICE).expand(rows, 2, 2)[:, :, None]
    offset, start = torch.full((rows,), 70, device=DEVICE), torch.arange(rows, device=DEVICE)[:, None] % 2 * 5
    gate, value_map = normal(rows, heads, 1, seed=3), normal(heads, dim, dim, seed=4)
    outs = []
    for per_program in (1, 16):
        out = torch.full_like(q, torch.nan)
        sparse.sparse_decode(
            q, near, near, q, far, far, indices.contiguous(), offset, start, gate, out, block_size=16, window=9,
            scale=0.3, value_map=value_map, rows_per_program=per_program,
        )  # fmt: skip
        outs.append(out)
    torch.testing.assert_close(*outs, **TIGHT)
