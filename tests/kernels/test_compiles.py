"""Kernels compile for an H100 on a machine without one: the interpreter takes what the compiler refuses."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hyconvert_kernels.step import forward, matvec

def check(kernel, types, **constants):
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})

pointers = "X Q_NORM K_NORM MAP Q QS K_OUT V_OUT RESIDUAL WEIGHT OUT W BIAS".split()
types = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(("COS", "SIN"), "*fp32") | {"eps": "fp32"}
types |= dict.fromkeys(("OFFSET", "START"), "*i64")
check(
    forward._split_heads, types, H=4, G=2, D=64, DH=32, BR=16, NORM=True, MAPPED=True, SPARSE=True, ROTATE=True,
    ROTATE_S=True, RING=True, PREC="ieee",
)
check(forward._add_norm, types, D=96, DP=128, ADD=True, AFTER=False)
for rows in (1, 16):
    check(matvec._matvec, types, M=rows, BN=16, BK=64, BIASED=True, GATED=True, PREC="ieee", STAGES=2)
"""


def test_kernels_around_attention_compile_for_an_h100():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
