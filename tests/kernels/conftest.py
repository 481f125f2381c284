"""Run Triton kernels through its CPU interpreter where there is no GPU (float32 and short sequences only)."""

import os
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from triton.runtime import interpreter
    except ImportError:
        pass
    else:
        patch_tensor = interpreter._patch_lang_tensor

        def with_scalar_index(tensor, scope):
            """NumPy 2.4 no longer turns one-element arrays into integers, which the interpreter's loops rely on."""
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = with_scalar_index


@pytest.fixture
def compiling():
    """Run a script where Triton compiles, for a GPU that need not be there, and does not interpret."""

    def run(script):
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)

    return run


BEFORE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class H100:
    utils = type("", (), {"get_device_properties": lambda self, at: {"max_shared_mem": 232448}})()
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, at: 0

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        return lambda *args, **options: texts.append(self.kernel.warmup(*args, grid=grid, **options).asm["ptx"])

driver.set_active(H100())
texts = []

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")
"""
AFTER = """
assert all("setmaxnreg" in text and "wgmma.mma_async" in text for text in texts), "no warps are specialised"
print(len(texts))
"""


@pytest.fixture
def compiling_for_an_h100(compiling):
    """Run a script with `empty` tensors, where `Compiled` kernels for Hopper compile instead of being launched.

    It prints how many did.
    """
    return lambda script: compiling(BEFORE + script + AFTER)
