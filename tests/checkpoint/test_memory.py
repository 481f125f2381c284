"""Copying a checkpoint needs memory for about one shard, however many there are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyconvert.checkpoint import CheckpointWriter

SHARD = 40_000_000
SHARDS = 8

COPY = """
import resource, sys, json
from hyconvert.checkpoint import CheckpointWriter, open_source

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

source = open_source(sys.argv[1])
warm_up = source.read(source.tensor_names[0])[:1].clone()
before = peak()
with CheckpointWriter(sys.argv[2], max_shard_bytes=int(sys.argv[3])) as writer:
    if sys.argv[4] == "tensors":
        for shard, name, tensor in source.iter_tensors():
            writer.add_tensor(name, tensor)
    else:
        for shard, tensors in source.iter_shards():
            writer.start_shard(shard)
            for name in list(tensors):
                writer.add_tensor(name, tensors.pop(name))
    writer.finish()
print(json.dumps({"grown": peak() - before, "total": writer.total_bytes}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux only")
@pytest.mark.parametrize("by", ["tensors", "shards"])
def test_peak_memory_of_a_copy_is_about_one_shard(tiny_base, tmp_path: Path, by: str) -> None:
    base = tmp_path / "base"
    with CheckpointWriter(base, max_shard_bytes=SHARD) as writer:
        for index in range(SHARDS * 4):
            writer.add_tensor(f"t{index:02}", torch.full((SHARD // 16,), float(index)))
        writer.copy_file(tiny_base("llama") / "config.json")
        writer.finish()
    result = subprocess.run(
        [sys.executable, "-c", COPY, str(base), str(tmp_path / "out"), str(SHARD), by],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    measured = json.loads(result.stdout)
    assert measured["total"] == SHARDS * SHARD
    # With `iter_shards` one shard waits in the writer while the next is read.
    assert measured["grown"] < SHARD * (1.5 if by == "tensors" else 2.5), measured
    for file in base.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
