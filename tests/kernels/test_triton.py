"""The Triton kernels equal the references (in float32 through the interpreter where there is no GPU), or refuse."""

import math
import os

import pytest
import torch

pytest.importorskip("triton")

import hyconvert_kernels as kernels
from hyconvert_kernels import configs
from hyconvert_kernels.configs import Tile
from hyconvert_kernels.decode import full
from hyconvert_kernels.sparse.union import build_union, transpose_union

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK, WINDOW, DIM = 16, 9, 16
BLOCKED = {"block_size": BLOCK, "window": WINDOW, "scale": 0.3}
KINDS = ("packed", "left padded", "static cache")

pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning",  # NumPy's, in the interpreter, for -inf - -inf under a mask
    "ignore:All-NaN slice:RuntimeWarning",
)


@pytest.fixture(autouse=True)
def _interpret(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def inputs(kind, heads=6, groups=2, length=45):
    gen = torch.Generator().manual_seed(0)
    offset, slots = torch.zeros(1, dtype=torch.int64), length
    start = torch.zeros(1, length, dtype=torch.int64)
    if kind == "packed":
        start[:, 21:] = 21
    elif kind == "left padded":
        start = torch.arange(length).clamp(max=5)[None].contiguous()
    else:
        offset, slots = offset + 30, length + 50
        start += 3
    q = torch.randn(1, heads, length, DIM, generator=gen)
    k, v = (torch.randn(1, groups, slots, DIM, generator=gen) for _ in "kv")
    k[:, :, int(offset) + length :] = v[:, :, int(offset) + length :] = math.nan
    return tuple(x.to(DEVICE) for x in (q, k, v, offset, start))


def both(op, *args, **settings):
    """The Triton result, after comparing it with the reference's."""
    got = op(*args, **settings, implementation="triton")
    want = op(*args, **settings, implementation="reference")
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    return got


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_equals_the_reference(kind):
    q, k, v, offset, start = inputs(kind)
    _, _, scores = both(kernels.oracle_attention, q, k, v, offset, start, **BLOCKED)
    both(kernels.block_topk, scores, 2)
    _, _, indices = both(kernels.oracle_attention_topk, q, k, v, offset, start, topk=2, **BLOCKED)
    far = both(kernels.block_sparse_attention, q, k, v, indices, offset, start, **BLOCKED)
    near = both(kernels.window_attention, q, k, v, offset, start, window=WINDOW, scale=0.3)
    both(kernels.merge_branches, *near, *far, torch.linspace(-1, 1, 6, device=DEVICE)[:, None])


def test_decode_equals_the_reference():
    q, k, v, offset, start = inputs("static cache", length=1)
    _, _, indices = both(kernels.oracle_decode, q, k, v, offset, start, topk=2, **BLOCKED)
    both(kernels.oracle_attention_topk, q, k, v, offset, start, topk=2, **BLOCKED)
    gate, value_map = torch.zeros(6, 1, device=DEVICE), torch.randn(6, DIM, DIM, device=DEVICE)
    both(
        kernels.sparse_decode, q, k, v, q, k, v, indices, offset, start, gate, value_map=value_map,
        window_offset=offset, window_start=start, **BLOCKED,
    )  # fmt: skip


def test_decode_equals_the_reference_in_tiles_of_several_blocks_and_in_splits(monkeypatch):
    q, k, v, offset, start = inputs("static cache", length=1)
    k, v = (x.nan_to_num().repeat(1, 1, 4, 1) for x in (k, v))
    offset += 150
    monkeypatch.setattr(full, "decode_tile", lambda *_: Tile(1, 64, 4, 1))
    for splits in (1, 3):
        monkeypatch.setattr(full, "decode_splits", lambda *_, splits=splits: splits)
        both(kernels.oracle_decode, q, k, v, offset, start, topk=3, **BLOCKED)


def test_windows_and_blocks_are_one_program_each_where_those_fill_the_gpu(monkeypatch):
    monkeypatch.setattr(configs, "processors", lambda _: 132)
    device = torch.device("cpu")
    assert configs.sparse_decode_splits(2, 16, 8, device) == (2, 16)  # one row of 8 KV heads
    assert configs.sparse_decode_splits(2, 16, 512, device) == (1, 2)
    assert configs.sparse_decode_splits(2, 16, 936, device) == (1, 1)


def test_long_caches_are_split_though_their_rows_fill_the_gpu(monkeypatch):
    monkeypatch.setattr(configs, "processors", lambda _: 132)
    device = torch.device("cpu")
    assert configs.decode_splits(8, 2048, device) == 66  # one row of 128k tokens
    assert configs.decode_splits(904, 256, device) == 16  # 113 rows of 32k
    assert configs.decode_splits(904, 8, device) == 1  # of 1k
    assert configs.decode_splits(8, 4, device) == 4  # never more splits than steps


def test_selections_may_be_in_any_order_and_name_a_block_twice_or_beyond_the_keys():
    q, k, v, offset, start = inputs("packed")
    indices = torch.tensor([1, -1, 0, 1, 99], dtype=torch.int32, device=DEVICE).expand(1, 2, q.shape[2], 5)
    both(kernels.block_sparse_attention, q, k, v, indices, offset, start, **BLOCKED)


def test_an_empty_selection_gives_zero_and_minus_infinity():
    q, k, v, offset, start = inputs("packed", length=20)
    for width in (0, 2):
        none = torch.full((1, 2, 20, width), -1, dtype=torch.int32, device=DEVICE)
        out, lse = kernels.block_sparse_attention(
            q, k, v, none, offset, start, **BLOCKED, implementation="triton"
        )
        assert torch.all(out == 0)
        assert torch.all(lse == -math.inf)


def test_the_union_lists_every_eligible_block_once():
    _, _, _, offset, start = inputs("packed")
    gen = torch.Generator().manual_seed(0)
    indices = torch.randint(-1, 4, (1, 2, 45, 3), generator=gen).int()
    settings = {"slots": 45, "block_size": BLOCK, "window": WINDOW, "ratio": 3}
    got = kernels.tile_union(indices.to(DEVICE), offset, start, **settings)
    want = build_union(indices, offset.cpu(), start.cpu(), **settings)
    assert torch.equal(got.counts.cpu(), want.counts)
    there = torch.arange(want.slots.shape[-1]) < want.counts[..., None]
    assert torch.equal(got.slots.cpu()[there], want.slots[there])
    assert torch.equal(got.bits.cpu()[there], want.bits[there])
    turned = kernels.tile_union(indices.to(DEVICE), offset, start, **settings, transposed=True)
    ends, entries = transpose_union(want, slots=45, block_size=BLOCK)
    listed = torch.arange(entries.shape[-1]) < ends[..., -1:]
    assert torch.equal(turned.ends.cpu(), ends)
    assert torch.equal(turned.entries.cpu()[listed], entries[listed])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"dim": 8}, "head dim 8"),
        ({"dim": 320}, "head dim 320"),
        ({"heads": 34}, "17 query heads per KV head"),
        ({"block_size": 48}, "block size 48"),
        ({"topk": 129}, "top-k 129"),
        ({"window": 0}, "window 0"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(change, message):
    dim, heads, dtype = change.pop("dim", 16), change.pop("heads", 2), change.pop("dtype", torch.float32)
    q, k = (torch.randn(1, n, 4, dim, dtype=dtype, device=DEVICE) for n in (heads, 2))
    offset = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    start = torch.zeros(1, 4, dtype=torch.int64, device=DEVICE)
    settings = {**BLOCKED, "topk": 2, **change}
    with pytest.raises(ValueError, match=rf"oracle_attention_topk: no Triton kernel: .*{message}"):
        kernels.oracle_attention_topk(q, k, k, offset, start, **settings, implementation="triton")


@pytest.mark.skipif(DEVICE != "cpu", reason="about tensors without a GPU")
def test_cpu_tensors_and_16_bit_interpretation_are_refused(monkeypatch):
    q, k, v, offset, start = inputs("packed")
    half = [x.bfloat16() for x in (q, k, v)]
    with pytest.raises(ValueError, match="interpreter is not exact on 16-bit floats"):
        kernels.window_attention(*half, offset, start, window=4, scale=1.0, implementation="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="Triton needs CUDA tensors, and these are on cpu"):
        kernels.window_attention(q, k, v, offset, start, window=4, scale=1.0, implementation="triton")
    assert "TRITON_INTERPRET" not in os.environ
