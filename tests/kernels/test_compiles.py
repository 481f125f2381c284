"""Kernels compile for an H100 on a machine without one: the interpreter takes what the compiler refuses."""

import pytest

pytest.importorskip("triton")

SCRIPT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hyconvert_kernels.decode import full, sparse
from hyconvert_kernels.oracle import maxima
from hyconvert_kernels.step import forward, matvec

def check(kernel, types, early=2, **constants):
    names = [parameter.name for parameter in kernel.params]
    constants = ({"EARLY": early} if "EARLY" in names else {}) | constants
    constants |= {name: None for name in SCALES if name in names and name not in types}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})

SCALES = "K_SCALE V_SCALE SLOTS W_K_SCALE W_V_SCALE".split()
pointers = "X Q_NORM K_NORM MAP Q QS K_OUT V_OUT RESIDUAL WEIGHT OUT W BIAS".split()
types = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(("COS", "SIN"), "*fp32") | {"eps": "fp32"}
types |= dict.fromkeys(("OFFSET", "START"), "*i64")
check(
    forward._split_heads, types, H=4, G=2, D=64, DH=32, BR=16, NORM=True, MAPPED=True, SPARSE=True, ROTATE=True,
    ROTATE_S=True, RING=True, PREC="ieee",
)
scaled = dict.fromkeys(("K_SCALE", "V_SCALE", "W_K_SCALE", "W_V_SCALE"), "*fp32") | {"SLOTS": "i32"}
check(
    forward._split_heads, types | scaled | dict.fromkeys(("K_OUT", "V_OUT"), "*fp8e4nv"), H=4, G=2, D=64, DH=32, BR=16,
    NORM=True, MAPPED=False, SPARSE=False, ROTATE=True, ROTATE_S=True, RING=False, PREC="ieee",
)
decode = types | dict.fromkeys("Q QS K V KW VW GATE".split(), "*bf16") | dict.fromkeys(("INDICES", "COUNTER"), "*i32")
decode |= dict.fromkeys("PART PART_LSE RAW".split(), "*fp32") | {"W_OFFSET": "*i64", "W_START": "*i64"}
decode |= {"scale_log2": "fp32"}
size = {"G": 2, "R": 2, "RM": 16, "D": 64, "DP": 64, "BN": 64, "BLOCK": 64, "PREC": "ieee", "STAGES": 2}
fp8 = decode | scaled | dict.fromkeys(("K", "V", "KW", "VW"), "*fp8e4nv")
for kind in (decode, fp8):
    check(full._split, kind, SCORE=True, **size)
    for splits in ((1, 0), (1, 2)):
        parts = {"W_SPLITS": splits[0], "S_SPLITS": splits[1], "DIRECT": splits[1] == 0}
        check(sparse._sparse_split, kind, early=1, RP=2, RING=False, **parts, **size)
check(full._split, decode, SCORE=True, **(size | {"D": 128, "DP": 128, "BN": 128, "STAGES": 3}))  # many rows
join = {"G": 2, "R": 2, "RP": 2, "D": 64, "DP": 64}
check(full._join, decode | {"LSE": "*fp32"}, BLOCK=64, SP=4, KP=8, N=128, **join)
parts = {"W_SPLITS": 1, "S_SPLITS": 2, "WP": 1, "SP": 2, "DC": 32, "PREC": "ieee"}
for rows in (1, 16):
    check(sparse._sparse_join, decode, early=1, MAPPED=True, MERGE=True, BR=rows, **parts, **join)
check(sparse._sparse_join, decode, early=1, MAPPED=False, MERGE=True, BR=1, **parts, **join)
left = decode | dict.fromkeys("MAXIMA LSE SCORES".split(), "*fp32") | {"K": "i32"}
for heads in (4, 16):  # side by side, and in turn
    shape = {"G": 2, "R": heads, "RP": heads, "WQ": 64 // heads, "BLOCK": 64}
    check(maxima._scores, left, N=512, **shape)
    check(maxima._select, left, N=2048, KP=16, **shape)
rings = types | dict.fromkeys("K V RING_K RING_V".split(), "*bf16") | {"LAST": "*i64"}
check(forward._fill_rings, rings, G=3, D=96, DP=128, BS=16)
check(forward._add_norm, types, D=96, DP=128, ADD=True, AFTER=False)
for rows in (1, 16):
    check(matvec._matvec, types, M=rows, BN=16, BK=64, BIASED=True, GATED=True, PREC="ieee", STAGES=2)
"""


def test_kernels_of_a_step_compile_for_an_h100(compiling):
    done = compiling(SCRIPT)
    assert done.returncode == 0, done.stderr[-2000:]
