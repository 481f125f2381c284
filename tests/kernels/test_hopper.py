"""The kernels for Hopper, as far as a machine without one can tell: they compile, and find their tiles and keys."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from hyconvert_kernels import hopper as shared
from hyconvert_kernels.oracle import forward, hopper

COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from hyconvert_kernels.oracle import hopper

class H100:
    utils = type("", (), {"get_device_properties": lambda self, at: {"max_shared_mem": 232448}})()
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, at: 0

class Compiled:
    def __getitem__(self, grid):
        return lambda *args, **options: texts.append(kernel.warmup(*args, grid=grid, **options).asm["ptx"])

driver.set_active(H100())
kernel, texts = hopper._hopper_forward, []
hopper._hopper_forward, hopper.processors = Compiled(), lambda device: 132

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

for heads, dim, block, length, scored in ((8, 128, 64, 40960, True), (6, 64, 16, 256, False)):
    keys, scores = empty(1, 2, length, dim), empty(1, 2, length, length // block, dtype=torch.float32)
    hopper.forward(
        empty(1, heads, length, dim), keys, keys, empty(1, dtype=torch.int64), empty(1, length, dtype=torch.int64),
        empty(1, heads, length, dim), empty(1, heads, length, dtype=torch.float32), scores if scored else None,
        block_size=block, window=128, scale=0.1, first=0, end=length,
    )
assert all("setmaxnreg" in text and "wgmma.mma_async" in text for text in texts), "no warps are specialised"
print(len(texts))
"""


def test_it_compiles_for_an_h100(compiling):
    done = compiling(COMPILE)
    assert done.stdout == "2\n", done.stderr[-2000:]


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


def test_they_are_for_hopper_alone():
    q, k = torch.randn(1, 4, 5, 64, dtype=torch.bfloat16), torch.randn(1, 2, 5, 64, dtype=torch.bfloat16)
    assert forward.on_hopper(q, k, k, 0.1) is None
    assert not shared.capable(torch.device("cpu"))
