"""What oracle attention on Hopper leaves becomes the reference's scores and blocks."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from hyconvert_kernels.configs import hopper_tile
from hyconvert_kernels.oracle import hopper, maxima
from hyconvert_kernels.oracle.reference import oracle_attention
from hyconvert_kernels.tiles import LOG2E
from hyconvert_kernels.topk.reference import block_topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKED = [0] * 45 + [45] * 37 + [82] * 29


def left_behind(logits, offset, start, span, queries, window, block):
    """Maxima as the kernel lays them out, of logits ``[B,G,R,T,S]`` in log2 units; NaN where it writes nothing."""
    batch, groups, ratio = logits.shape[:3]
    padded, half = 1 << (ratio - 1).bit_length(), queries // 2
    shape = batch, groups, span.tiles, 2, span.positions, half, padded
    found = torch.full(shape, torch.nan, device=logits.device)
    for row in range(batch):
        for i, t in enumerate(range(span.begin, span.end)):
            edge = int(offset[row]) + t - window + 1  # first slot of the window
            for position, first in enumerate(range(int(start[row, t]), edge, block)):
                best = logits[row, :, :, t, first : min(first + block, edge)].amax(-1)
                found[row, :, i // queries, i % queries // half, position, i % half, :ratio] = best
    return found


@pytest.mark.parametrize(
    ("ratio", "starts", "before", "window", "most"),
    [
        pytest.param(4, [0] * 104, 0, 20, 1 << 20, id="in one go"),
        pytest.param(4, [0] * 104, 0, 20, 2 * 128 * 6 * 3, id="three tiles at a time"),
        pytest.param(3, [37] * 110, 0, 5, 2 * 128 * 6 * 2, id="three heads, left padding"),
        pytest.param(2, PACKED, 0, 20, 1 << 20, id="packed documents"),
        pytest.param(1, [0] * 100, 60, 20, 1 << 20, id="behind a cache"),
    ],
)
def test_scores_and_blocks_are_the_references(ratio, starts, before, window, most):
    batch, groups, dim, block, topk, length = 1, 2, 16, 16, 4, len(starts)
    queries, slots = hopper_tile(ratio).queries, length + before
    gen = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, n, size, dim, generator=gen).to(DEVICE)
        for n, size in ((groups * ratio, length), (groups, slots), (groups, slots))
    )
    offset, start = torch.tensor([before], device=DEVICE), torch.tensor([starts], device=DEVICE)
    settings = {"block_size": block, "window": window, "scale": dim**-0.5}
    _, lse, want = oracle_attention(q.double(), k.double(), v.double(), offset, start, **settings)
    logits = torch.einsum("bghtd,bgsd->bghts", q.view(batch, groups, ratio, length, dim), k) * dim**-0.5
    scores = torch.full_like(want, torch.nan, dtype=torch.float32)
    indices = torch.full((batch, groups, length, topk), -7, dtype=torch.int32, device=DEVICE)
    reach = slots - length - window
    spans = list(hopper.spans(0, length, queries, batch * groups, reach, block, programs=4, most=most))
    for span in spans:
        left = left_behind(logits * LOG2E.value, offset, start, span, queries, window, block)
        maxima.read(
            left, lse.float(), offset, start, scores, indices, first=0, begin=span.begin, end=span.end,
            tiles=span.tiles, positions=span.positions, queries=queries, ratio=ratio, window=window, block_size=block,
        )  # fmt: skip
    torch.testing.assert_close(scores, want.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(indices, block_topk(want.float(), topk))
    assert (len(spans) > 1) == (most < 1 << 20)


def read_one_tile(ratio, positions, lse_of, topk=4, block=64):
    """Blocks of one tile's queries, which see all of ``positions`` random maxima, and the scores they should have."""
    queries = hopper_tile(ratio).queries
    padded, offset = 1 << (ratio - 1).bit_length(), torch.tensor([(positions - 1) * block + 1], device=DEVICE)
    gen = torch.Generator().manual_seed(1)
    left = torch.randn(1, 2, positions, queries // 2, padded, generator=gen).to(DEVICE)
    lse = lse_of(torch.full((1, ratio, queries), 3.0, device=DEVICE))
    start = torch.zeros(1, queries, dtype=torch.int64, device=DEVICE)
    guarded = torch.full((queries + 40, topk), -7, dtype=torch.int32, device=DEVICE)
    indices = guarded[:queries].view(1, 1, queries, topk)
    maxima.read(
        left, lse, offset, start, None, indices, first=0, begin=0, end=queries, tiles=1, positions=positions,
        queries=queries, ratio=ratio, window=1, block_size=block,
    )  # fmt: skip
    assert bool((guarded[queries:] == -7).all())
    logits = left.permute(0, 1, 3, 4, 2).reshape(queries, padded, positions)[:, :ratio]
    return indices[0, 0], (logits - lse[0].T[:, :, None] * LOG2E.value).amax(1).exp2()


@pytest.mark.parametrize(("ratio", "positions"), [(4, 1100), (16, 1100), (11, 1100)])
def test_more_heads_and_blocks_than_registers_take_are_read_in_turn(ratio, positions):
    indices, scores = read_one_tile(ratio, positions, lambda lse: lse)
    assert torch.equal(indices.long(), scores.topk(4).indices.sort(-1).values)


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value", "ignore:overflow")
def test_what_is_not_a_number_chooses_few_blocks_and_only_its_own():
    def spoilt(lse):
        lse[:, :, 3] = torch.nan
        return lse

    indices, scores = read_one_tile(2, 50, spoilt)
    fine = torch.arange(len(indices), device=DEVICE) != 3
    assert torch.equal(indices[fine].long(), scores[fine].topk(4).indices.sort(-1).values)
    assert indices[3].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("lines", [1, 8, 64, 1000])
@pytest.mark.parametrize("first", [0, 100])
@pytest.mark.parametrize("most", [1 << 25, 1 << 20], ids=["room for a round", "too little room"])
def test_spans_cover_all_queries_once_in_whole_rounds(lines, first, most):
    end, queries, programs = 20000, 32, 132
    spans = list(hopper.spans(first, end, queries, lines, 110_000, 64, programs, most))
    assert [s.end for s in spans] == [end, *(s.begin for s in spans[:-1])]
    assert spans[-1].begin == first
    for span in spans:
        assert span.tiles == -(-(span.end - span.begin) // queries)
        assert span.positions >= (span.end - 1 + 110_000) // 64 + 1
        if span.tiles > 1:
            room = max(most, programs * span.positions * hopper.TILE_ROWS)
            assert span.tiles * span.positions * lines * hopper.TILE_ROWS <= room
    for span in spans[:-1]:
        rounds = span.tiles * lines / programs
        assert rounds > 1 - lines / programs
        assert lines > programs or -rounds % 1 < lines / programs
