"""Block-sparse attention's kernel for Hopper, as far as a machine without one can tell."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from hyconvert_kernels import dispatch
from hyconvert_kernels.configs import launches_free
from hyconvert_kernels.dispatch import BLOCK_SIZES
from hyconvert_kernels.sparse import forward, hopper
from hyconvert_kernels.sparse.union import build_union, union_queries

COMPILE = """
from hyconvert_kernels.sparse import hopper
from hyconvert_kernels.sparse.union import BlockUnion, union_queries

zeros = torch.zeros
torch.zeros = lambda *shape, **options: zeros(*shape, **options | {"device": "meta"})
hopper._hopper_sparse, hopper.processors = Compiled(hopper._hopper_sparse), lambda device: 132
for ratio, dim, block, bits in ((4, 128, 64, torch.int32), (2, 64, 128, torch.int64)):
    tiles = -(-4096 // union_queries(ratio))
    q = empty(1, 4096, 2 * ratio, dim).transpose(1, 2)
    k, lists = empty(1, 2, 4096, dim), empty(1, 2, tiles, 96, dtype=torch.int32)
    union = BlockUnion(lists, lists.to(bits), empty(1, 2, tiles, dtype=torch.int32))
    hopper.forward(
        q, k, k, union, empty(1, dtype=torch.int64), empty(1, 2 * ratio, 4096, dim),
        empty(1, 2 * ratio, 4096, dtype=torch.float32), block_size=block, window=128, scale=0.1,
    )
"""
FAR = hopper.FAR.value


def test_it_compiles_for_an_h100(compiling_for_an_h100):
    done = compiling_for_an_h100(COMPILE)
    assert done.stdout == "2\n", done.stderr[-2000:]


def plain(monkeypatch, memory):
    """Let the kernel's helpers run on tensors; pointers are places in ``memory``."""

    def load(at, mask, other):
        return torch.where(mask, memory[torch.where(mask, at, 0)], other)

    words = SimpleNamespace(
        load=load, where=torch.where, sum=torch.sum, int32=torch.int32, int64=torch.int64,
        arange=lambda first, end, layout: torch.arange(first, end), BlockedLayout=lambda *of: None,
    )  # fmt: skip
    monkeypatch.setattr(hopper, "gl", words)
    monkeypatch.setattr(hopper, "FAR", FAR)
    monkeypatch.setattr(hopper, "BOX", 64)


@pytest.mark.parametrize(("tiles", "lines"), [(7, 6), (1, 3), (64, 1)])
def test_every_tile_has_its_list(monkeypatch, tiles, lines):
    plain(monkeypatch, torch.zeros(1))
    places = hopper._place.fn(torch.arange(tiles * lines), tiles).view(lines, tiles)
    assert torch.equal(places.flip(1).flatten(), torch.arange(tiles * lines))


def documents(length, every):
    return (torch.arange(length) // every * every)[None]


@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("ratio", [2, 4, 16])
@pytest.mark.parametrize(
    ("offset", "window", "start"),
    [
        (0, 1, torch.zeros(1, 333, dtype=torch.int64)),
        (40, 100, documents(333, 60)),
        (5, 7, documents(333, 11)),
        (0, 1, documents(333, 1)),
        (0, 500, torch.zeros(1, 333, dtype=torch.int64)),
    ],
    ids=["one document", "packed", "short documents", "every query a document", "no blocks"],
)
def test_the_walk_meets_every_key_of_the_union_once(monkeypatch, offset, window, start, ratio, block, keys):
    choice = torch.randint(-1, 4, (1, 1, 333, 4), generator=torch.Generator().manual_seed(0))
    place = torch.tensor([offset])
    union = build_union(
        choice.int(), place, start, slots=333 + offset, block_size=block, window=window, ratio=ratio
    )
    queries, parts, boxes_per_step = union_queries(ratio), block // 64, keys // 64
    edge = hopper.edge_entries(block, queries)
    for tile, count in enumerate(union.counts[0, 0].tolist()):
        slots, bits = union.slots[0, 0, tile], union.bits[0, 0, tile]
        plain(monkeypatch, torch.cat([slots.long(), bits.long()]))
        boxes = count * parts
        steps = max(-(-boxes // boxes_per_step), 1)
        box = torch.arange(steps * boxes_per_step - 1, -1, -1)  # of all steps, in the order of the walk
        wanted, begins = hopper._words.fn(0, len(slots), box, boxes, parts)
        spare = len(box) - boxes
        assert (wanted[:spare] == 0).all() and (begins[:spare] == FAR).all()
        expected = [
            (slot + part * 64, word)
            for slot, word in zip(slots[:count].tolist(), bits[:count].tolist(), strict=True)
            for part in range(parts)
        ]
        met = list(zip(begins[spare:].tolist(), wanted[spare:].tolist(), strict=True))
        assert met == expected[::-1]
        # All that reaches into a window is among the entries that are masked key by key.
        edges = int(hopper._edges.fn(0, count, offset, tile, window, edge, queries, block))
        limit = offset + tile * queries - window
        assert edges == int((slots[:count] + block - 1 > limit).sum()) < edge
        assert (slots[: count - edges] + block - 1 <= limit).all()


@pytest.mark.parametrize("ratio", [2, 3, 16])
@pytest.mark.parametrize("layout", ["dense", "heads inside", "fused", "one KV head"])
def test_bulk_copies_find_the_heads_of_a_group(ratio, layout):
    groups = 1 if layout == "one KV head" else 2
    heads, length = groups * ratio, 5
    x = {
        "dense": lambda: torch.randn(2, heads, length, 64, dtype=torch.bfloat16),
        "fused": lambda: torch.randn(2, length, heads + 4, 64, dtype=torch.bfloat16)[:, :, 2:-2].transpose(1, 2),
    }.get(layout, lambda: torch.randn(2, length, heads, 64, dtype=torch.bfloat16).transpose(1, 2))()  # fmt: skip
    queries, padded = union_queries(ratio), 1 << (ratio - 1).bit_length()
    tiles = hopper._by_group(x, groups, padded, queries // 2)
    assert tiles.block_shape == [1, 1, padded, queries // 2, 64] and 2 * padded * (queries // 2) == 128
    assert tiles.shape == [2, groups, ratio, length, 64]
    found = x.as_strided(tiles.shape, tiles.strides)
    assert torch.equal(found.reshape(2, heads, length, 64), x)


def tensors(ratio=4, dim=128, dtype=torch.bfloat16):
    q, k = torch.zeros(1, 2 * ratio, 5, dim, dtype=dtype), torch.zeros(1, 2, 5, dim, dtype=dtype)
    return q, k, k, torch.zeros_like(q)


def test_what_fits(monkeypatch):
    monkeypatch.setattr(hopper, "capable", lambda device: True)
    for block_size in BLOCK_SIZES:
        assert hopper.fits(*tensors(), 0.1, block_size) == (block_size in (64, 128))
    for ratio in (1, 2, 3, 16, 64, 65):
        assert hopper.fits(*tensors(ratio), 0.1, 64) == (1 < ratio <= 64)
    for dim in (32, 64, 96, 128, 256):
        assert hopper.fits(*tensors(dim=dim), 0.1, 64) == (dim in (64, 128))
    assert not hopper.fits(*tensors(dtype=torch.float16), 0.1, 64)
    assert not hopper.fits(*tensors(), -0.1, 64)
    for at, x in enumerate(tensors()):  # strides that bulk copies cannot take
        odd = [*tensors()]
        odd[at] = torch.zeros(*x.shape[:3], 132, dtype=x.dtype)[..., 4:]
        assert not hopper.fits(*odd, 0.1, 64)


def test_it_takes_over_earlier_where_launches_are_free(monkeypatch):
    def taken_over(rows):
        q = torch.empty(2, 5, rows // 10, 64, device="meta")
        return forward.on_hopper(q, q, q, q, 0.1, 64) is not None

    monkeypatch.setattr(forward, "hopper_kernels", lambda *_: hopper)
    assert [taken_over(rows) for rows in (15_000, 119_990, 120_000)] == [False, False, True]
    with launches_free():
        assert [taken_over(rows) for rows in (14_990, 15_000)] == [False, True]
    assert not taken_over(15_000)
    for always, edge in ((True, 0), (False, float("inf"))):  # as benchmarks force it
        monkeypatch.setattr(forward, "HOPPER_ROWS", edge)
        with launches_free():
            assert taken_over(10) == taken_over(1_000_000) == always


def test_it_is_for_hopper_alone(monkeypatch):
    def unwanted(name):
        raise AssertionError(f"{name} was imported")

    assert not hopper.fits(*tensors(), 0.1, 64)
    monkeypatch.setattr(dispatch, "_hopper_module", unwanted)
    monkeypatch.setattr(forward, "HOPPER_ROWS", 0)
    assert forward.on_hopper(*tensors(), 0.1, 64) is None
