"""The kernels for Hopper, as far as a machine without one can tell: they compile, and find their tiles and keys."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from hyconvert_kernels import hopper as shared
from hyconvert_kernels.configs import launches_free
from hyconvert_kernels.oracle import backward, forward, hopper, hopper_backward

COMPILE = """
from hyconvert_kernels.oracle import hopper
hopper.read = lambda *_, **__: None
hopper._hopper_forward, hopper.processors = Compiled(hopper._hopper_forward), lambda device: 132

for heads, dim, block, length, scored in ((8, 128, 64, 16384, True), (6, 64, 16, 256, False)):
    keys, scores = empty(1, 2, length, dim), empty(1, 2, length, length // block, dtype=torch.float32)
    hopper.forward(
        empty(1, heads, length, dim), keys, keys, empty(1, dtype=torch.int64), empty(1, length, dtype=torch.int64),
        empty(1, heads, length, dim), empty(1, heads, length, dtype=torch.float32), scores if scored else None,
        block_size=block, window=128, scale=0.1, first=0, end=length,
    )
from hyconvert_kernels.oracle import hopper_backward
for name in ("_hopper_grad_q", "_hopper_grad_kv"):
    setattr(hopper_backward, name, Compiled(getattr(hopper_backward, name)))
for heads, dim in ((8, 128), (6, 64)):
    q, k, of_query = empty(1, heads, 4096, dim), empty(1, 2, 4096, dim), empty(1, heads, 4096, dtype=torch.float32)
    hopper_backward.backward(
        q, k, k, empty(1, dtype=torch.int64), empty(1, 4096, dtype=torch.int64), q, of_query, q, of_query, q, k, k,
        scale=0.1, window=1 << 30,
    )
"""


def test_they_compile_for_an_h100(compiling_for_an_h100):
    done = compiling_for_an_h100(COMPILE)
    assert done.stdout == "6\n", done.stderr[-2000:]


@pytest.mark.parametrize("even", [False, True], ids=["by line", "by length"])
@pytest.mark.parametrize(("tiles", "lines", "programs"), [(7, 6, 4), (256, 8, 132), (3, 2, 5), (1, 1, 1)])
def test_every_tile_is_dealt_once(monkeypatch, tiles, lines, programs, even):
    monkeypatch.setattr(hopper, "gl", SimpleNamespace(where=lambda condition, a, b: a if condition else b))
    total, groups = tiles * lines, 2 if lines % 2 == 0 else 1
    dealt, work = [], [0] * programs
    for program in range(programs):
        for i in range(-(-total // programs)):
            tile, row, group, at = hopper._locate.fn(i, program, programs, tiles, total, groups, even)
            if at < total:
                dealt.append((int(tile), int(row), int(group)))
                work[program] += tile + 1
    assert sorted(dealt) == [
        (tile, row, group)
        for tile in range(tiles)
        for row in range(lines // groups)
        for group in range(groups)
    ]
    if even and total > 10 * programs:
        assert max(work) <= 1.01 * min(work)


@pytest.mark.parametrize(
    ("before", "masked", "free"), [(1, 1, 0), (2, 3, 5), (0, 0, 4), (0, 2, 1), (0, 0, 0)]
)
def test_every_query_and_key_is_met_once(monkeypatch, before, masked, free):
    plain = SimpleNamespace(where=lambda condition, a, b: a if condition else b, maximum=max)
    monkeypatch.setattr(hopper_backward, "gl", plain)
    heads, wide, inside = 3, 64, range(before, before + free)  # of a head's tiles, those that need no mask
    met = [
        hopper_backward._kv_item.fn(step, (100, before, masked, free), heads, wide)
        for step in range(heads * (masked + free))
    ]
    tiles = [(head, (at - 100) // wide) for head, at in met]
    assert sorted(tiles) == [(head, tile) for head in range(heads) for tile in range(masked + free)]
    assert all((tile in inside) == (step >= heads * masked) for step, (_, tile) in enumerate(tiles))
    keys = [
        hopper_backward._q_item.fn(step, (7, before, masked, free), wide) for step in range(masked + free)
    ]
    tiles = [(at - 7) // wide for at in keys]
    assert sorted(tiles) == list(range(masked + free))
    assert all((tile in inside) == (step >= masked) for step, tile in enumerate(tiles))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 3, 5, 16),
        lambda: torch.randn(2, 5, 3, 16).transpose(1, 2),
        lambda: torch.randn(2, 5, 9, 16)[:, :, 3:6].transpose(1, 2),  # the keys in a fused projection
        lambda: torch.randn(2, 3, 8, 16)[:, :, :5],
        lambda: torch.randn(1, 1, 5, 16),
        lambda: torch.randn(4, 1, 5, 16),
    ],
    ids=["dense", "heads inside", "fused", "static cache", "one head", "one head, several rows"],
)
def test_bulk_copies_take_the_keys_as_they_lie(make):
    x = make()
    steps = shared.bulk_strides(x)
    assert steps is not None and all(step % 8 == 0 for step in steps)
    assert torch.equal(x.as_strided(x.shape, (*steps, 1)), x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 3, 5, 20),  # rows of 40 bytes
        lambda: torch.randn(2, 3, 1, 16).expand(2, 3, 5, 16),
        lambda: torch.randn(2 * 3 * 5 * 16 + 1)[1:].view(2, 3, 5, 16),
        lambda: torch.randn(2, 3, 16, 5).transpose(2, 3),
    ],
    ids=["odd rows", "expanded", "unaligned", "columns apart"],
)
def test_other_layouts_are_copied_first_or_left_to_the_portable_kernel(make):
    assert shared.bulk_strides(make()) is None


def test_the_forward_takes_over_earlier_where_launches_are_free(monkeypatch):
    def taken_over(slots):
        k = torch.empty(1, 2, slots, 64, device="meta")
        return forward.on_hopper(k, k, k, 0.1) is not None, backward.on_hopper(k, k) is not None

    for module in (forward, backward):
        monkeypatch.setattr(module, "hopper_kernels", lambda *_: hopper)
    assert [taken_over(slots) for slots in (4096, 8191, 8192)] == [(False,) * 2, (False,) * 2, (True,) * 2]
    with launches_free():
        assert [taken_over(slots) for slots in (4095, 4096)] == [(False, False), (True, False)]
    for always, edge in ((True, 0), (False, float("inf"))):  # as benchmarks force it
        monkeypatch.setattr(forward, "HOPPER_SLOTS", edge)
        with launches_free():
            assert taken_over(16)[0] == taken_over(1 << 20)[0] == always


def test_they_are_for_hopper_alone(monkeypatch):
    monkeypatch.setattr(forward, "HOPPER_SLOTS", 0)
    q, k = torch.randn(1, 4, 5, 64, dtype=torch.bfloat16), torch.randn(1, 2, 5, 64, dtype=torch.bfloat16)
    assert forward.on_hopper(q, k, k, 0.1) is None
    assert not shared.capable(torch.device("cpu"))
