"""The references equal attention written as plain loops over queries."""

import math
import subprocess
import sys

import pytest
import torch

from hyconvert_kernels.decode.reference import sparse_decode
from hyconvert_kernels.merge.reference import merge_branches
from hyconvert_kernels.oracle.reference import oracle_attention, oracle_attention_topk
from hyconvert_kernels.sparse.reference import block_sparse_attention
from hyconvert_kernels.topk.reference import block_topk
from hyconvert_kernels.window.reference import window_attention

BLOCK, WINDOW = 16, 20


def layout(kind):
    """q_offset [B], start [B,T], T and S for the situations a model meets."""
    if kind == "plain":
        return torch.tensor([0, 0]), torch.zeros(2, 75, dtype=torch.long), 75, 75
    if kind == "left padded":
        start = torch.arange(70).repeat(2, 1)
        start[0, 13:], start[1, 5:] = 13, 5
        return torch.tensor([0, 0]), start, 70, 70
    if kind == "packed":
        start = torch.zeros(2, 90, dtype=torch.int32)
        start[0, 37:], start[0, 70:], start[1, 50:] = 37, 70, 50
        return torch.tensor([0, 0], dtype=torch.int32), start, 90, 90
    if kind == "static cache":
        return torch.tensor([61, 7]), torch.tensor([[3], [0]]).expand(2, 5).contiguous(), 5, 128
    raise AssertionError(kind)


KINDS = ["plain", "left padded", "packed", "static cache"]


def inputs(kind, heads=6, groups=2, dim=8, seed=0):
    offset, start, length, slots = layout(kind)
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, length, dim, dtype=torch.float64, generator=gen)
    k = torch.randn(2, groups, slots, dim, dtype=torch.float64, generator=gen)
    v = torch.randn(2, groups, slots, dim, dtype=torch.float64, generator=gen)
    for row in range(2):
        k[row, :, int(offset[row]) + length :] = math.nan
        v[row, :, int(offset[row]) + length :] = math.nan
    return q, k, v, offset, start


def loop(q, k, v, offset, start, keys_of, scale):
    """Softmax over the keys that keys_of(row, group, t) names, one query at a time."""
    batch, heads, length, _ = q.shape
    ratio = heads // k.shape[1]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            for t in range(length):
                keys = keys_of(row, head // ratio, t)
                if len(keys):
                    logits = k[row, head // ratio, keys] @ q[row, head, t] * scale
                    lse[row, head, t] = torch.logsumexp(logits, 0)
                    out[row, head, t] = torch.softmax(logits, 0) @ v[row, head // ratio, keys]
    return out, lse


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_attention_is_causal_softmax_and_scores_are_group_maxima(kind):
    q, k, v, offset, start = inputs(kind)
    out, lse, scores = oracle_attention(q, k, v, offset, start, block_size=BLOCK, window=WINDOW, scale=0.3)
    want_out, want_lse = loop(
        q, k, v, offset, start, lambda b, g, t: torch.arange(int(start[b, t]), int(offset[b]) + t + 1), 0.3
    )
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)
    want = torch.full_like(scores, -math.inf)
    for b in range(2):
        for g in range(2):
            for t in range(q.shape[2]):
                for slot in range(int(start[b, t]), int(offset[b]) + t - WINDOW + 1):
                    heads = range(g * 3, g * 3 + 3)
                    score = max(
                        float(torch.exp(k[b, g, slot] @ q[b, h, t] * 0.3 - lse[b, h, t])) for h in heads
                    )
                    block = (slot - int(start[b, t])) // BLOCK
                    want[b, g, t, block] = max(float(want[b, g, t, block]), score)
    torch.testing.assert_close(scores, want)
    topk = oracle_attention_topk(q, k, v, offset, start, block_size=BLOCK, window=WINDOW, topk=3, scale=0.3)
    assert torch.equal(topk[2], block_topk(scores, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_attention_sees_selected_blocks_outside_the_window(kind):
    q, k, v, offset, start = inputs(kind)
    indices = torch.randint(-1, 5, (2, 2, q.shape[2], 3), generator=torch.Generator().manual_seed(1)).int()

    def keys(b, g, t):
        first = int(start[b, t])
        slots = torch.arange(first, max(first, int(offset[b]) + t - WINDOW + 1))
        return slots[torch.isin((slots - first) // BLOCK, indices[b, g, t])]

    got = block_sparse_attention(q, k, v, indices, offset, start, block_size=BLOCK, window=WINDOW, scale=0.3)
    want = loop(q, k, v, offset, start, keys, 0.3)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("kind", KINDS)
def test_window_attention_sees_the_last_slots(kind):
    q, k, v, offset, start = inputs(kind)
    got = window_attention(q, k, v, offset, start, window=WINDOW, scale=0.3)

    def keys(b, g, t):
        slot = int(offset[b]) + t
        return torch.arange(max(int(start[b, t]), slot - WINDOW + 1), slot + 1)

    want = loop(q, k, v, offset, start, keys, 0.3)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("kind", KINDS)
def test_window_and_all_blocks_merged_are_full_attention(kind):
    q, k, v, offset, start = inputs(kind)
    every = torch.arange(8, dtype=torch.int32).expand(2, 2, q.shape[2], 8)
    sparse = block_sparse_attention(q, k, v, every, offset, start, block_size=BLOCK, window=WINDOW, scale=0.3)
    near = window_attention(q, k, v, offset, start, window=WINDOW, scale=0.3)
    full, _, _ = oracle_attention(q, k, v, offset, start, block_size=BLOCK, window=WINDOW, scale=0.3)
    torch.testing.assert_close(merge_branches(*near, *sparse, torch.zeros(())), full)


def test_empty_branches_give_zero_and_finite_gradients():
    q, k, v, offset, start = inputs("plain")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    none = torch.full((2, 2, 75, 2), -1, dtype=torch.int32)
    out_s, lse_s = block_sparse_attention(
        *leaves, none, offset, start, block_size=BLOCK, window=WINDOW, scale=1.0
    )
    assert torch.all(out_s == 0) and torch.all(lse_s == -math.inf)
    near = window_attention(*leaves, offset, start, window=WINDOW, scale=1.0)
    gate = torch.zeros(6, 1, requires_grad=True, dtype=torch.float64)
    out = merge_branches(*near, out_s, lse_s, gate)
    assert torch.equal(out, near[0])
    out.square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (*leaves, gate))
    assert torch.all(gate.grad == 0)


def test_topk_packs_left_ascending_and_breaks_ties_low():
    scores = torch.tensor([0.1, 0.5, -math.inf, 0.5, 0.5, 0.0])
    assert block_topk(scores.view(1, 1, 1, 6), 2).flatten().tolist() == [1, 3]
    assert block_topk(scores.view(1, 1, 1, 6), 8).flatten().tolist() == [0, 1, 3, 4, 5, -1, -1, -1]


@pytest.mark.parametrize("op", ["oracle", "sparse", "window", "merge"])
def test_gradients_match_finite_differences(op):
    offset, start = torch.tensor([0]), torch.zeros(1, 24, dtype=torch.long)
    start[0, 10:] = 10
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 24, 2, dtype=torch.float64, generator=gen, requires_grad=True)
    k, v = (torch.randn(1, 1, 24, 2, dtype=torch.float64, generator=gen, requires_grad=True) for _ in "kv")
    index = torch.zeros(1, 1, 24, 1, dtype=torch.int32)
    gate = torch.randn(2, 1, dtype=torch.float64, generator=gen, requires_grad=True)

    def oracle(q, k, v):
        return oracle_attention(q, k, v, offset, start, block_size=4, window=4, scale=1.0)[:2]

    def sparse(q, k, v):
        out, lse = block_sparse_attention(q, k, v, index, offset, start, block_size=4, window=4, scale=1.0)
        return out, lse.masked_fill(lse == -math.inf, 0)

    def window(q, k, v):
        return window_attention(q, k, v, offset, start, window=4, scale=1.0)

    def merge(q, k, v, gate):
        far = block_sparse_attention(q, k, v, index, offset, start, block_size=4, window=4, scale=1.0)
        return merge_branches(*window(q, k, v), *far, gate)

    function = {"oracle": oracle, "sparse": sparse, "window": window, "merge": merge}[op]
    assert torch.autograd.gradcheck(function, (q, k, v, gate) if op == "merge" else (q, k, v), fast_mode=True)


@pytest.mark.parametrize("length", [5, 40, 100])
def test_a_ring_decodes_like_the_whole_cache(length):
    gen = torch.Generator().manual_seed(length)
    whole = torch.randn(2, 2, 3, length, 8, dtype=torch.float64, generator=gen)
    source = torch.randn(2, 2, 3, length, 8, dtype=torch.float64, generator=gen)
    q, q_sparse = torch.randn(2, 2, 6, 1, 8, dtype=torch.float64, generator=gen)
    offset, start = torch.full((2,), length - 1), torch.tensor([[0], [2]])
    ring = torch.full((2, 2, 3, WINDOW, 8), math.nan, dtype=torch.float64)
    for slot in range(length):
        ring[..., slot % WINDOW, :] = whole[..., slot, :]
    indices = torch.tensor([0, 2, -1], dtype=torch.int32).expand(2, 3, 1, 3)
    gate, value_map = torch.randn(6, 1, generator=gen).double(), torch.randn(6, 8, 8, generator=gen).double()
    settings = {"block_size": BLOCK, "window": WINDOW, "scale": 0.4, "value_map": value_map}
    tail = (q_sparse, *source, indices, offset, start, gate)
    got = sparse_decode(q, *ring, *tail, **settings)
    want = sparse_decode(q, *whole, *tail, **settings, window_offset=offset, window_start=start)
    torch.testing.assert_close(got, want)


def test_the_references_need_no_triton():
    """Where torch comes without triton (CPU builds, macOS), everything but the kernels works."""
    script = (
        "import sys; sys.path.insert(0, 'kernels'); sys.modules['triton'] = None; import hyconvert_kernels"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
