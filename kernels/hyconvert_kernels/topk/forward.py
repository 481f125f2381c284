"""Triton block selection: the k-th largest score by bisection over float bits, then a prefix sum packs the winners.

The bisection ends as soon as k entries are left, most often after half of the bits.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def select_blocks(scores, valid, k, BITS: tl.constexpr, TWO: tl.constexpr = False):
    """Which of ``scores [N]`` are among the k largest (ties to the lower index), and how many winners precede each.

    Args:
        scores: float32 ``[N]``.
        valid: entries that may win.
        k: winners wanted.
        BITS: 30 if all valid scores lie in [0, 1] (NaN would win beyond k), 32 for any float.
        TWO: with BITS 30, settle two bits per step: half the reductions, for a program that waits for each, at more
            arithmetic, for which many programs would wait.

    Returns:
        bool ``[N]`` and int32 ``[N]``.
    """
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)  # -0 equals 0
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    if BITS == 30:
        order = tl.where(valid, bits, -1)
        bound = tl.zeros([], tl.int32)
        top: tl.constexpr = 29
    else:
        order = tl.where(valid, order, -2147483648)
        many = tl.sum((order >= 0).to(tl.int32)) >= k
        bound = tl.where(many, 0, -2147483648).to(tl.int32)
        top: tl.constexpr = 30
    left = tl.sum((order >= bound).to(tl.int32))  # entries that are left; k of them are the answer
    if TWO:
        i = 0
        while (i < 15) & (left > k):
            low = 1 << (28 - 2 * i)
            one = (order >= bound + low).to(tl.int64)
            two = (order >= bound + 2 * low).to(tl.int64) << 20
            three = (order >= bound + 3 * low).to(tl.int64) << 40
            counts = tl.sum(one + two + three)  # each at most 2^20
            for part in tl.static_range(3):
                count = (counts >> (20 * part) & 0xFFFFF).to(tl.int32)
                bound += low * (count >= k).to(tl.int32)
                left = tl.where(count >= k, count, left)
            i += 1
    else:
        i = top
        while (i >= 0) & (left > k):
            trial = bound + (1 << i)
            count = tl.sum((order >= trial).to(tl.int32))
            bound = tl.where(count >= k, trial, bound)
            left = tl.where(count >= k, count, left)
            i -= 1
    win = valid & (order >= bound)
    if left > k:  # ties at the k-th place
        above = valid & (order > bound)
        room = k - tl.sum(above.to(tl.int32))
        win = above | ((win != above) & (tl.cumsum((win != above).to(tl.int32), 0) <= room))
    return win, tl.cumsum(win.to(tl.int32), 0) - 1


@triton.jit
def _block_topk(
    SCORES, INDICES, START, OFFSET, NB, T, T0, TC, GT, window, K,
    BLOCK: tl.constexpr, KP: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, N)
    blocks = NB
    if UNIT:  # scores of one query chunk: only the first few blocks can be eligible, so read no more
        row = line // GT
        t = T0 + line % TC
        last = tl.load(OFFSET + row) + t - window - tl.load(START + row * T + t)
        blocks = tl.minimum(NB, tl.where(last < 0, 0, last // BLOCK + 1)).to(tl.int32)
        out = INDICES + ((line // TC) * T + t) * K
    else:
        out = INDICES + line * K
    scores = tl.load(SCORES + line * NB + block, mask=block < blocks, other=float("-inf"))
    valid = scores > float("-inf")
    win, place = select_blocks(scores, valid, K, 30 if UNIT else 32)
    count = tl.sum(win.to(tl.int32))
    tl.store(out + place, block, mask=win)
    slot = tl.arange(0, KP)
    tl.store(out + slot, tl.full([KP], -1, tl.int32), mask=(slot >= count) & (slot < K))


def forward(scores: torch.Tensor, k: int, indices: torch.Tensor, *, chunk=None) -> None:
    """Fill int32 ``indices [B,G,T,k]``.

    Args:
        scores: float32 ``[B,G,TC,NB]``.
        k: blocks to choose.
        indices: output.
        chunk: None for arbitrary scores of all queries, or ``(first, q_offset, start, window, block_size)`` for
            probabilities of the queries from ``first`` on.
    """
    batch, groups, count, blocks = scores.shape
    size = max(32, triton.next_power_of_2(blocks))
    first, q_offset, start, window, block_size = chunk or (0, indices, indices, 0, 1)
    _block_topk[(batch * groups * count,)](
        scores, indices, start, q_offset, blocks, indices.shape[2], first, count, groups * count, window, k,
        BLOCK=block_size, KP=triton.next_power_of_2(k), N=size, UNIT=chunk is not None,
        num_warps=max(1, min(16, size // 2048)),
    )  # fmt: skip
