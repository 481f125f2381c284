"""What oracle attention on Hopper leaves becomes the reference's scores and blocks."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from hyconvert_kernels.configs import hopper_tile
from hyconvert_kernels.oracle import hopper, maxima
from hyconvert_kernels.oracle.reference import oracle_attention
from hyconvert_kernels.tiles import LOG2E
from hyconvert_kernels.topk.reference import block_topk

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted, where there is no GPU")

PACKED = [0] * 77 + [77] * 53 + [130] * 70


def left_behind(logits, offset, start, span, queries, window, block):
    """Maxima as the kernel lays them out, of logits ``[B,G,R,T,S]`` in log2 units; NaN where it writes nothing."""
    batch, groups, ratio = logits.shape[:3]
    padded, half = 1 << (ratio - 1).bit_length(), queries // 2
    found = torch.full((batch, groups, span.tiles, 2, span.positions, half, padded), torch.nan)
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
        pytest.param(4, [0] * 200, 0, 20, 1 << 20, id="in one go"),
        pytest.param(4, [0] * 200, 0, 20, 2 * 128 * 12 * 3, id="three tiles at a time"),
        pytest.param(3, [37] * 150, 0, 5, 2 * 128 * 9 * 2, id="three heads, left padding"),
        pytest.param(2, PACKED, 0, 20, 1 << 20, id="packed documents"),
        pytest.param(1, [0] * 100, 60, 20, 1 << 20, id="behind a cache"),
    ],
)
def test_scores_and_blocks_are_the_references(ratio, starts, before, window, most):
    batch, groups, dim, block, topk, length = 1, 2, 16, 16, 4, len(starts)
    queries, slots = hopper_tile(ratio).queries, length + before
    gen = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, n, size, dim, generator=gen)
        for n, size in ((groups * ratio, length), (groups, slots), (groups, slots))
    )
    offset, start = torch.tensor([before]), torch.tensor([starts])
    settings = {"block_size": block, "window": window, "scale": dim**-0.5}
    _, lse, want = oracle_attention(q.double(), k.double(), v.double(), offset, start, **settings)
    logits = torch.einsum("bghtd,bgsd->bghts", q.view(batch, groups, ratio, length, dim), k) * dim**-0.5
    scores = torch.full_like(want, torch.nan, dtype=torch.float32)
    indices = torch.full((batch, groups, length, topk), -7, dtype=torch.int32)
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


@pytest.mark.parametrize("lines", [1, 8, 64, 1000])
@pytest.mark.parametrize("first", [0, 100])
def test_spans_cover_all_queries_once_in_whole_rounds(lines, first):
    end, queries, programs, most = 20000, 32, 132, 1 << 25
    spans = list(hopper.spans(first, end, queries, lines, 110_000, 64, programs, most))
    assert [s.end for s in spans] == [end, *(s.begin for s in spans[:-1])]
    assert spans[-1].begin == first
    for span in spans:
        assert span.tiles == -(-(span.end - span.begin) // queries)
        assert span.positions >= (span.end - 1 + 110_000) // 64 + 1
        if span.tiles > 1:
            assert span.tiles * span.positions * lines * hopper.ROWS <= most
    for span in spans[:-1]:
        rounds = span.tiles * lines / programs
        assert rounds < 1 or lines > programs or rounds % 1 == 0 or -rounds % 1 < lines / programs
