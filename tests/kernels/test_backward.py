"""The Triton kernels' gradients equal the float64 reference's, repeat themselves, and pass PyTorch's compiler."""

import math

import pytest
import torch
import torch.utils.checkpoint

pytest.importorskip("triton")

import hyconvert_kernels as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = ("oracle", "sparse", "window", "merge")

pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning",  # NumPy's, in the interpreter, for -inf - -inf under a mask
    "ignore:All-NaN slice:RuntimeWarning",
    "ignore:overflow encountered:RuntimeWarning",  # and for weights under a mask
)


@pytest.fixture(autouse=True)
def _interpret(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


class Case:
    """Inputs of every op; ``kind`` says how sequences lie in the batch."""

    def __init__(self, kind="plain", heads=6, groups=2, length=45, dim=16, block=16, window=9, topk=2):
        offset, slots = torch.zeros(1, dtype=torch.int64), length
        start = torch.zeros(1, length, dtype=torch.int64)
        if kind == "packed":  # two documents meet within a block
            start[:, 21:], start[:, 29:] = 21, 29
        elif kind == "left padded":
            start = torch.arange(length).clamp(max=5)[None].contiguous()
        elif kind == "static cache":
            offset, slots = offset + 30, length + 50
            start += 3
        gen = torch.Generator().manual_seed(0)
        shapes = {"q": (heads, length), "q_far": (heads, length)} | dict.fromkeys(
            ("k", "v", "k_near", "v_near"), (groups, slots)
        )
        self.tensors = {name: torch.randn(1, *shape, dim, generator=gen) for name, shape in shapes.items()}
        for name in ("k", "v", "k_near", "v_near"):
            self.tensors[name][:, :, int(offset) + length :] = math.nan
        self.tensors["gate"] = torch.randn(heads, 1, generator=gen)
        self.outer = torch.randn(1, heads, length, dim, generator=gen)
        self.outer_lse = torch.randn(1, heads, length, generator=gen)
        self.place = offset.to(DEVICE), start.to(DEVICE)
        self.near = {"window": window, "scale": 0.3}
        self.far = {**self.near, "block_size": block}
        double = (self.tensors[name].double().to(DEVICE) for name in ("q", "k", "v"))
        self.indices = kernels.oracle_attention_topk(
            *double, *self.place, topk=topk, **self.far, implementation="reference"
        )[2]

    def gradients(self, op, implementation, dtype=torch.float32, indices=None):
        """Of a random projection of the op's output and log-sum-exp; for the merge, of a whole sparse layer's."""
        leaves = {
            name: x.detach().clone().to(DEVICE, dtype).requires_grad_() for name, x in self.tensors.items()
        }
        q, q_far, k, v, k_near, v_near, gate = leaves.values()
        indices = self.indices if indices is None else indices
        by = {"implementation": implementation}
        if op == "oracle":
            outputs = kernels.oracle_attention(q, k, v, *self.place, with_scores=False, **self.far, **by)[:2]
        if op in ("sparse", "merge"):
            outputs = far = kernels.block_sparse_attention(
                q_far, k, v, indices, *self.place, **self.far, **by
            )
        if op in ("window", "merge"):
            outputs = near = kernels.window_attention(q, k_near, v_near, *self.place, **self.near, **by)
        if op == "merge":
            outputs = (kernels.merge_branches(*near, *far, gate, **by),)
        outer = [x.to(DEVICE, dtype) for x in (self.outer, self.outer_lse)]
        found = torch.autograd.grad(outputs, list(leaves.values()), outer[: len(outputs)], allow_unused=True)
        return dict(zip(leaves, found, strict=True))


def assert_close(got, want):
    """Relative RMS of at most 1e-5, no NaN, for every gradient; where it is zero, rounding may show."""
    assert [name for name, x in got.items() if x is None] == [name for name, x in want.items() if x is None]
    for name, x in got.items():
        if x is not None:
            assert (x.double() - want[name]).norm() <= 1e-5 * want[name].norm() + 1e-6, name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "case",
    [
        {"kind": "packed"},
        {"kind": "left padded"},
        {"kind": "static cache"},
        {"length": 75, "heads": 2, "dim": 24, "window": 20, "topk": 3},
        {"length": 70, "heads": 7, "groups": 1, "block": 64, "window": 12, "kind": "packed"},
        {"length": 1},
    ],
    ids=str,
)
def test_gradients_equal_the_float64_reference(op, case):
    case = Case(**case)
    got, want = case.gradients(op, "triton"), case.gradients(op, "reference", torch.float64)
    if op == "sparse":  # where no block is selected the gradient is zero, and the norms are too
        assert all(torch.isfinite(x).all() for x in got.values() if x is not None)
    assert_close(got, want)


@pytest.mark.parametrize("op", ["oracle", "merge"])  # the latter runs through sparse and window too
def test_the_backward_repeats_itself_bit_for_bit(op):
    case = Case("packed", heads=2, groups=1, length=35)
    first, second = (case.gradients(op, "triton") for _ in range(2))
    assert all(x is None or torch.equal(x, second[name]) for name, x in first.items())


def test_an_empty_selection_has_zero_gradients():
    case = Case(length=20)
    none = torch.full_like(case.indices, -1)
    for name, x in case.gradients("sparse", "triton", indices=none).items():
        assert x is None or torch.all(x == 0), name
    assert_close(
        case.gradients("merge", "triton", indices=none),
        case.gradients("merge", "reference", torch.float64, indices=none),
    )


def test_a_shared_union_gives_the_same_gradients():
    case = Case("packed")
    q, k, v = (case.tensors[name].to(DEVICE).requires_grad_() for name in ("q", "k", "v"))
    shape = {"slots": k.shape[2], "block_size": 16, "window": 9, "ratio": 3}
    found = []
    for union in (None, kernels.tile_union(case.indices, *case.place, **shape, transposed=True)):
        out, _ = kernels.block_sparse_attention(
            q, k, v, case.indices, *case.place, **case.far, union=union, implementation="triton"
        )
        found.append(torch.autograd.grad(out, (q, k, v), case.outer.to(DEVICE)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def registered(case):
    """Every differentiable op with arguments for it."""
    q, q_far, k, v, *_, gate = (x.to(DEVICE).requires_grad_() for x in case.tensors.values())
    window = case.near["window"]
    shape = {"slots": k.shape[2], "block_size": 16, "window": window, "ratio": 2}
    union = kernels.tile_union(case.indices, *case.place, **shape, transposed=True)
    lse = case.outer_lse.to(DEVICE)
    ops = torch.ops.hyconvert
    return [
        (ops.oracle_attention, (q, k, v, *case.place, 16, window, True, 0.3)),
        (ops.oracle_attention_topk, (q, k, v, *case.place, 16, window, 1, 0.3)),
        (ops.block_sparse_attention, (q, k, v, *union, *case.place, 16, window, 0.3)),
        (ops.window_attention, (q, k, v, *case.place, window, 0.3)),
        (ops.merge_branches, (q, lse, q_far, lse, gate.detach().expand(lse.shape).clone().requires_grad_())),
    ]


@pytest.mark.parametrize("at", range(5), ids=("oracle", "oracle topk", "sparse", "window", "merge"))
def test_ops_are_registered_as_pytorch_wants_them(at):
    op, arguments = registered(Case(length=7, heads=2, groups=1, window=3, topk=1))[at]
    torch.library.opcheck(op.default, arguments)


def test_a_layer_compiles_whole():
    case = Case(length=9, heads=2, groups=1, window=3)
    q, q_far, k, v, k_near, v_near, gate = (x.to(DEVICE).requires_grad_() for x in case.tensors.values())

    def layer(q, q_far, k, v, k_near, v_near, gate):
        by = {"implementation": "triton"}
        dense, _, indices = kernels.oracle_attention_topk(q, k, v, *case.place, topk=2, **case.far, **by)
        far = kernels.block_sparse_attention(q_far, k, v, indices, *case.place, **case.far, **by)
        near = kernels.window_attention(q, k_near, v_near, *case.place, **case.near, **by)
        return dense + kernels.merge_branches(*near, *far, gate, **by)

    leaves = (q, q_far, k, v, k_near, v_near, gate)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(layer(*leaves).square().sum(), leaves)
    got = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("at", range(5), ids=("oracle", "oracle topk", "sparse", "window", "merge"))
def test_ops_run_under_gradient_checkpointing(at):
    op, arguments = registered(Case(length=7, heads=2, groups=1, window=3, topk=1))[at]
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]

    def first(*leaves):
        rest = iter(leaves)
        out = op(*(next(rest) if isinstance(x, torch.Tensor) and x.requires_grad else x for x in arguments))
        return (out if isinstance(out, torch.Tensor) else out[0]).square().sum()

    want = torch.autograd.grad(first(*leaves), leaves, allow_unused=True)
    again = torch.utils.checkpoint.checkpoint(first, *leaves, use_reentrant=False)
    got = torch.autograd.grad(again, leaves, allow_unused=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_decoding_step_that_wants_a_gradient_gets_the_references():
    case = Case("static cache", length=1)
    found = []
    for implementation in ("triton", "reference"):
        q, q_far, k, v, k_near, v_near, gate = (x.to(DEVICE).requires_grad_() for x in case.tensors.values())
        out = kernels.sparse_decode(
            q, k_near, v_near, q_far, k, v, case.indices, *case.place, gate, **case.far,
            window_offset=case.place[0], window_start=case.place[1], implementation=implementation,
        )  # fmt: skip
        found.append(torch.autograd.grad(out.sum(), (q, q_far, v, gate)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
