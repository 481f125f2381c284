"""The written checkpoint is byte for byte what was given, loads everywhere, and is complete or absent."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hyconvert.checkpoint import CheckpointWriter, open_source
from hyconvert.checkpoint.safetensors_header import DTYPES
from hyconvert.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def write_tiny(out: Path, value: float = 1.0, **options) -> Path:
    with CheckpointWriter(out, **options) as writer:
        writer.write_json("config.json", {"value": value})
        writer.add_tensor("a", torch.full((4,), value))
        return writer.finish()


def copy(source, out: Path, *, keep_shards: bool = False, **options) -> Path:
    with CheckpointWriter(out, base=source.path, expected_bytes=source.nbytes, **options) as writer:
        for shard in source.shards:
            if keep_shards:
                writer.start_shard(shard.name)
            for name in shard.tensor_names:
                writer.add_tensor(name, source.read(name))
        for name, data in source.auxiliary_files().items():
            writer.write_bytes(name, data)
        source.config.save_pretrained(writer.folder)
        return writer.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 100_000])
def test_copy_is_byte_identical_and_loads_in_transformers(
    tiny_base, family: str, dtype: torch.dtype, max_shard_bytes: int, tmp_path: Path
) -> None:
    folder = tiny_base(family, dtype=dtype, max_shard_size="150KB")
    out = copy(open_source(folder), tmp_path / "out", max_shard_bytes=max_shard_bytes)
    before, after = stored(folder), stored(out)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert after[name].shape == value.shape
        assert bytes_of(after[name]) == bytes_of(value), name

    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    original = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_of_the_format_round_trips_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randint(0, 2 if dtype == torch.bool else 256, (16 * 24,), dtype=torch.uint8).view(dtype)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add_tensor("flat", values)
        writer.add_tensor("scalar", values[0])
        writer.add_tensor("empty", values[:0].reshape(0, 5))
        writer.finish()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert bytes_of(file.get_tensor("flat")) == bytes_of(values)
        assert file.get_tensor("flat").dtype == dtype
        assert bytes_of(file.get_tensor("scalar")) == bytes_of(values[0])
        assert file.get_tensor("scalar").shape == ()
        assert file.get_tensor("empty").shape == (0, 5)


def test_views_are_written_as_the_values_they_show(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {
        "transposed": base.T,
        "strided": base[:, ::2],
        "tail": base[2:],
        "expanded": base[:1].expand(3, 6),
    }
    with CheckpointWriter(tmp_path / "out") as writer:
        for name, view in views.items():
            writer.add_tensor(name, view.requires_grad_(False))
        writer.finish()
    for name, value in stored(tmp_path / "out").items():
        assert torch.equal(value, views[name])


def test_one_shard_has_no_index_and_several_have_a_right_one(tmp_path: Path) -> None:
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    for out, size in ((single, 10**6), (sharded, 100)):
        with CheckpointWriter(out, max_shard_bytes=size) as writer:
            for name in "cbaed":
                writer.add_tensor(name, torch.full((10,), ord(name), dtype=torch.int32))
            assert writer.total_bytes == 200
            writer.finish()
    assert names_in(single) == ["model.safetensors"]
    shards = [f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)]
    assert names_in(sharded) == [*shards, INDEX]
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"] == {"total_size": 200}
    assert list(index["weight_map"]) == sorted("abcde")
    for name, shard in index["weight_map"].items():
        assert name in load_file(sharded / shard)
    for shard in shards:
        assert sum(value.nbytes for value in load_file(sharded / shard).values()) <= 100


def test_the_sources_own_shards_can_be_kept(tiny_base, tmp_path: Path) -> None:
    folder = tiny_base("llama", max_shard_size="100KB")
    out = copy(open_source(folder), tmp_path / "out", keep_shards=True, max_shard_bytes=10)
    for file in folder.glob("*.safetensors"):
        assert load_file(out / file.name).keys() == load_file(file).keys()
    assert (
        json.loads((out / INDEX).read_text())["weight_map"]
        == json.loads((folder / INDEX).read_text())["weight_map"]
    )


def test_a_lone_shard_of_another_name_gets_an_index(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.start_shard("model-00001-of-00001.safetensors")
        writer.add_tensor("a", torch.zeros(1))
        writer.finish()
    assert names_in(tmp_path / "out") == ["model-00001-of-00001.safetensors", INDEX]


def test_files_are_written_verbatim_and_may_lie_in_subfolders(tmp_path: Path) -> None:
    original = tmp_path / "LICENSE"
    original.write_bytes(b"a\r\n\xff")
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.copy_file(original)
        writer.copy_file(original, "NOTICE")
        writer.write_text("templates/chat.jinja", "é\n")
        writer.write_json("plan.json", {"b": [1], "a": "é"})
        writer.finish()
    out = tmp_path / "out"
    assert (out / "LICENSE").read_bytes() == (out / "NOTICE").read_bytes() == b"a\r\n\xff"
    assert (out / "templates/chat.jinja").read_bytes() == "é\n".encode()
    assert (out / "plan.json").read_text("utf-8") == '{\n  "b": [\n    1\n  ],\n  "a": "é"\n}\n'


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../escaped"])
def test_no_file_is_written_outside_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leads out"), CheckpointWriter(tmp_path / "out") as writer:
        writer.write_text(name, "x")
    assert not (tmp_path / "escaped").exists()


def test_a_tensor_is_added_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a' was added twice"), CheckpointWriter(tmp_path / "out") as writer:
        writer.add_tensor("a", torch.zeros(1))
        writer.add_tensor("a", torch.zeros(1))


def test_a_shard_is_started_once(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="not a new plain file name"),
        CheckpointWriter(tmp_path / "out") as writer,
    ):
        writer.start_shard("a.safetensors")
        writer.start_shard("a.safetensors")


def test_existing_checkpoint_is_refused_without_force(tmp_path: Path) -> None:
    out = write_tiny(tmp_path / "out", 1.0)
    with pytest.raises(CheckpointError, match=r"already exists and is not empty; .* --force"):
        CheckpointWriter(out)
    assert stored(out)["a"][0] == 1.0
    assert names_in(tmp_path) == ["out"]


def test_force_replaces_the_old_checkpoint_and_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    out = write_tiny(tmp_path / "out", 1.0)
    (out / "stale.txt").write_text("of the old one")
    with CheckpointWriter(out, force=True) as writer:
        writer.write_json("config.json", {})
        writer.add_tensor("a", torch.full((4,), 2.0))
        assert stored(out)["a"][0] == 1.0
        writer.finish()
    assert stored(out)["a"][0] == 2.0
    assert names_in(out) == ["config.json", "model.safetensors"]
    assert names_in(tmp_path) == ["out"]


def test_force_does_not_delete_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint .* --force will not replace it"):
        CheckpointWriter(out, force=True)
    assert (out / "thesis.tex").exists()


def test_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert names_in(write_tiny(tmp_path / "out")) == ["config.json", "model.safetensors"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    assert (write_tiny(tmp_path / "a" / "b" / "out") / "config.json").is_file()


def test_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(CheckpointError, match="exists and is no folder"):
        CheckpointWriter(tmp_path / "out", force=True)


@pytest.mark.parametrize("out", ["base", "base/out", "base/../base", "."])
def test_out_must_not_overlap_the_base(tmp_path: Path, out: str) -> None:
    base = write_tiny(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"OUT .* BASE .*; choose a folder outside"):
        CheckpointWriter(tmp_path / out, base=base, force=True)
    assert stored(base)["a"][0] == 1.0


def test_out_must_not_contain_a_gguf_base(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="contains BASE"):
        CheckpointWriter(tmp_path, base=tmp_path / "model.gguf", force=True)


def test_two_writers_of_one_out_do_not_overwrite_each_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="already exists"), CheckpointWriter(out) as writer:
        writer.add_tensor("a", torch.zeros(1))
        out.mkdir()
        (out / "config.json").write_text("another process was faster")
        writer.finish()
    assert names_in(out) == ["config.json"]
    assert names_in(tmp_path) == ["out"]
