"""The decode loop on the kernels writes what transformers' generate writes on the references."""

import pytest
import torch

pytest.importorskip("triton")

from hyconvert.generation import generate
from tests.modeling.tiny import base_model, converted, plan_of, tokens

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks.check_model checks kernels on a GPU"),
    pytest.mark.filterwarnings(
        "ignore:invalid value encountered:RuntimeWarning",  # NumPy's, in the interpreter, for -inf - -inf under a mask
        "ignore:All-NaN slice:RuntimeWarning",
    ),
]


# A window of 40 is more than there are tokens.
@pytest.mark.parametrize(
    ("window", "length", "kv_dtype"), [(5, 26, None), (40, 8, None), (5, 26, "fp8"), (40, 8, "fp8")]
)
def test_kernels_write_the_same_tokens(monkeypatch, window, length, kv_dtype):
    """With scales of keys and values too, in float32: the interpreter does not round to float8."""
    monkeypatch.setattr("hyconvert.generation.caches.FP8", torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    base = base_model("qwen3", hidden_size=64, head_dim=16, num_hidden_layers=5)
    model = converted(base, plan_of("F S0 W R0 F", block_size=16, topk=1, window=window))
    ids = tokens(2, length)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    want = model.generate(ids, attention_mask=mask, **options)
    got = generate(
        model, ids, mask, max_new_tokens=3, eos_token_id=[], kv_dtype=kv_dtype, implementation="triton"
    )
    assert torch.equal(got, want)
