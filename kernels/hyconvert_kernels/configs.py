"""Pinned launch configurations: one table, no autotuning (it would break graph capture)."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator

import torch


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one kernel cuts its work.

    Args:
        queries: queries per tile; times the padded head count these are the rows of a tile.
        keys: keys per step.
        warps, stages: Triton's num_warps and software-pipelining depth.
        per_sm: resident programs per multiprocessor, for persistent kernels.
        registers: cap per thread, or None.
        precision: of float32 products ("ieee"; ignored for 16-bit inputs).
    """

    queries: int
    keys: int
    warps: int
    stages: int
    per_sm: int = 1
    registers: int | None = None
    precision: str = "ieee"

    def programs(self, device: torch.device) -> int:
        """Size of a persistent grid."""
        return processors(device) * self.per_sm

    def launch(self) -> dict:
        """Keyword arguments of the kernel launch."""
        extra = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **extra}


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 2 elsewhere (the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


EARLY_START = True
"""Whether kernels of a decoding step are launched before their predecessors have ended, where the GPU can do that."""


def early_start(device: torch.device, *, let_next: bool = True) -> dict:
    """Keyword arguments of a launch by CUDA's programmatic dependent launch, for kernels that `await_inputs`.

    Args:
        device: to launch on.
        let_next: whether the successor may take its place on the GPU once all programs of this kernel have begun,
            and not only as they end. It gets no time where it waits, but registers and shared memory.
    """
    if not EARLY_START or not _can_start_early(device):
        return {"EARLY": 0}
    return {"EARLY": 2 if let_next else 1, "launch_pdl": True}


@functools.cache
def _can_start_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have on a CUDA device; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


_free = contextvars.ContextVar("launches_free", default=False)


@contextlib.contextmanager
def launches_free() -> Iterator[None]:
    """Let kernels whose launch takes long take over earlier: for what becomes a CUDA graph, where it costs nothing."""
    token = _free.set(True)
    try:
        yield
    finally:
        _free.reset(token)


def takes_over_from(size: float, free: float) -> float:
    """``size``, from which on a kernel takes over another's work, or where launches are free this share of it."""
    return size * free if _free.get() else size


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Element strides of all but the last dimension, which must be contiguous."""
    return x.stride()[:3]


def queries_per_tile(rows: int, ratio: int) -> int:
    """Queries whose heads fill about ``rows`` rows: a power of two, at most 64 (a row bitmap's bits)."""
    return max(1, min(64, rows // (1 << (ratio - 1).bit_length())))


def oracle_tile(dtype: torch.dtype, dim: int, ratio: int) -> Tile:
    """Forward of oracle attention."""
    if dtype == torch.float32:
        return Tile(queries_per_tile(32, ratio), 32, 4, 1)
    if dim > 128:
        return Tile(queries_per_tile(128, ratio), 32, 8, 2)
    return Tile(queries_per_tile(128, ratio), 64, 8, 3)


HOPPER_SLOTS = 8192
"""From so many slots on the kernels for Hopper take over oracle attention; of 4096 their launch takes longer."""
FREE_SLOTS = 1 / 2
"""Share of `HOPPER_SLOTS` from which on the forward's takes over where launches are free; of 2048 it is slower."""
HOPPER_CACHED = 96 << 20
"""Bytes of keys and values of which it takes the tiles by length; of more, line by line. An H100 caches 50 MB."""


TILE_ROWS = 128
"""Rows of a tile of oracle attention on Hopper, queries times heads of a group (a power of two): 64 per warpgroup."""


def hopper_tile(ratio: int) -> Tile:
    """Forward of oracle attention on Hopper: `TILE_ROWS` for two warpgroups of ``registers`` per thread."""
    return Tile(TILE_ROWS // (1 << (ratio - 1).bit_length()), 128, 4, 2, registers=240)


def hopper_maxima(queries: int, keys: int) -> int:
    """Block maxima, float32, that oracle attention on Hopper holds at a time.

    A round of an H100's tiles takes 2^25 of them at 128k keys and blocks of 64; longer ones take what a round needs.
    Twice as many are faster where they fit easily: where the queries, of so many numbers, weigh as much, and rounds are
    short.
    """
    return 1 << 26 if keys <= 65536 and queries >= 1 << 27 else 1 << 25


def select_warps(size: int) -> int:
    """Warps of a program that chooses among so many blocks: of 512 one, which need not wait for others."""
    return max(1, min(16, size // 512))


def hopper_grad_q_tile() -> Tile:
    """dQ of oracle attention on Hopper: 64 queries for each of two warpgroups."""
    return Tile(128, 128, 4, 2, registers=240)


def hopper_grad_kv_tile() -> Tile:
    """dK and dV of oracle attention on Hopper: 64 keys for each of two warpgroups."""
    return Tile(64, 128, 4, 3, registers=240)


HOPPER_ROWS = 120_000
"""From so many queries on, times heads and batch rows, block-sparse attention has its kernel for Hopper; of fewer the
launch takes longer than the kernel saves. The decode loop's pieces of long prompts are larger."""
FREE_ROWS = 1 / 8
"""Share of `HOPPER_ROWS` from which on it takes over where launches are free."""


def hopper_sparse_tile() -> Tile:
    """Block-sparse forward on Hopper, as `hopper_tile`; the queries per tile are the union's."""
    return Tile(0, 128, 4, 2, registers=240)


def sparse_tile(dtype: torch.dtype, dim: int, ratio: int, block_size: int) -> Tile:
    """Block-sparse forward; the queries per tile are the union's."""
    if dtype == torch.float32:
        return Tile(0, min(32, block_size), 8, 1)
    if dim > 128:
        return Tile(0, 32, 8, 2)
    return Tile(0, 64, 8, 3)


def window_tile(dtype: torch.dtype, dim: int, ratio: int) -> Tile:
    """Window forward."""
    if dtype == torch.float32:
        return Tile(queries_per_tile(32, ratio), 32, 4, 1)
    if dim > 128:
        return Tile(queries_per_tile(64, ratio), 32, 8, 2)
    return Tile(queries_per_tile(128, ratio), 64, 8, 2)


def exact_grad_tile(dim: int, block_size: int = 32) -> Tile:
    """Every float32 backward: products without tensor cores are unrolled, and larger tiles take minutes to compile."""
    return Tile(16, 16, 4, 1) if dim > 128 else Tile(32, min(32, block_size), 4, 1)


def causal_grad_q_tile(dtype: torch.dtype, dim: int) -> Tile:
    """dQ of oracle attention; a tile holds one head's queries, as in all causal and window backward kernels."""
    if dtype == torch.float32:
        return exact_grad_tile(dim)
    if dim > 128:
        return Tile(64, 32, 8, 2)
    return Tile(64, 64, 4, 3) if dim <= 64 else Tile(128, 128, 8, 2)


def causal_grad_kv_tile(dtype: torch.dtype, dim: int) -> Tile:
    """dK and dV of oracle attention."""
    if dtype == torch.float32:
        return exact_grad_tile(dim)
    if dim > 128:
        return Tile(32, 64, 8, 1)
    return Tile(64, 64, 4, 3) if dim <= 64 else Tile(128, 64, 8, 2)


def window_grad_q_tile(dtype: torch.dtype, dim: int) -> Tile:
    """dQ of window attention."""
    if dtype == torch.float32:
        return exact_grad_tile(dim)
    return Tile(64, 32, 8, 1) if dim > 128 else Tile(64, 64, 4, 2)


def window_grad_kv_tile(dtype: torch.dtype, dim: int) -> Tile:
    """dK and dV of window attention."""
    if dtype == torch.float32:
        return exact_grad_tile(dim)
    return Tile(32, 64, 8, 1) if dim > 128 else Tile(64, 64, 4, 2)


def sparse_grad_q_tile(dtype: torch.dtype, dim: int, block_size: int) -> Tile:
    """dQ of block-sparse attention; ``queries`` counts rows here, all heads of the group: a part of a union's tile."""
    if dtype == torch.float32:
        return exact_grad_tile(dim, block_size)
    if dim > 128:
        return Tile(64, 32, 8, 1)
    return Tile(64, 64, 4, 3) if dim <= 64 else Tile(128, 64, 8, 3)


def sparse_grad_kv_tile(dtype: torch.dtype, dim: int, block_size: int) -> Tile:
    """dK and dV of block-sparse attention; ``queries`` as in `sparse_grad_q_tile`, ``keys`` divides the block."""
    if dtype == torch.float32:
        return exact_grad_tile(dim, block_size)
    if dim > 128:
        return Tile(32, min(64, block_size), 8, 1)
    keys = min(64, block_size)
    return Tile(64, keys, 4, 2) if dim <= 64 else Tile(128, keys, 8, 2)


def decode_tile(dtype: torch.dtype, dim: int, lines: int, device: torch.device) -> Tile:
    """Full-layer decode of so many rows times KV heads: bytes bound, so deep pipelines; small tiles for few rows."""
    if dtype == torch.float32:
        return Tile(1, 32, 4, 1)
    if dim > 128:
        return Tile(1, 32, 4, 3)
    if dim == 128 and lines >= processors(device) and shared_memory(device) >= 200 << 10:
        return Tile(1, 128, 8, 3)
    return Tile(1, 64, 4, 3)


def decode_splits(lines: int, steps: int, device: torch.device) -> int:
    """Splits of a row's keys, of which each costs a little: as few as fill the GPU with four programs per
    multiprocessor, and where the rows alone fill it, enough that none waits long for the last of them."""
    count = processors(device)
    splits = -(-4 * count // lines)
    if lines >= count:
        splits = max(splits, min(steps // 16, max(16, -(-32 * count // lines))))
    return max(1, min(128, steps, splits))


def sparse_decode_tile(dtype: torch.dtype, dim: int, keys: int, device: torch.device) -> Tile:
    """Sparse-layer decode; ``keys`` counts those of all rows and KV heads: few of them are best read at once."""
    if dtype == torch.float32 or dim > 128:
        return Tile(1, 32, 4, 1 if dtype == torch.float32 else 2)
    return Tile(1, 128, 8, 2) if keys <= 128 * processors(device) else Tile(1, 64, 4, 2)


def sparse_decode_splits(w_steps: int, s_steps: int, lines: int, device: torch.device) -> tuple[int, int]:
    """Splits of a row's window and of its blocks: about four programs per multiprocessor, of one to eight steps, and
    where one program per row and KV head is enough for that, of up to sixteen."""
    steps, programs = w_steps + s_steps, 4 * processors(device)
    most = 16 if lines >= programs else 8
    per = max(1, min(most, -(-steps * lines // programs)), -(-steps // 32))
    return -(-w_steps // per), -(-s_steps // per)


def matvec_rows(dtype: torch.dtype) -> int:
    """Most rows of a product that our own kernel takes from cuBLAS; float32 of several rows was not timed."""
    return 1 if dtype == torch.float32 else 16


def library_rows(rows: int, device: torch.device) -> int:
    """Rows that a product on cuBLAS is best given in place of so many: at 115 rows, one of 12,288 columns with a matrix
    of 4,096 rows takes 44 us, and 40 at 128."""
    return 128 if device.type == "cuda" and 96 < rows < 128 else rows


def matvec_tile(dtype: torch.dtype, rows: int, width: int) -> Tile:
    """Product of up to 16 rows with a matrix; ``queries`` counts matrix rows per program, ``keys`` columns per step.

    With tensor cores, every 16 matrix rows are one warp's.
    """
    power = max(16, 1 << (width - 1).bit_length())
    if dtype == torch.float32:
        return Tile(8 if rows == 1 else 16, min(128, power), 4, 2)
    if rows == 1:
        return Tile(8, 1024, 4, 2) if width >= 4096 else Tile(4, min(512, power), 4, 4)
    return Tile(64, 64 if width <= 1024 else 128, 4, 8)
