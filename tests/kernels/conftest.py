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
