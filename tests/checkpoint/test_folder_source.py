"""A folder of safetensors is read as it is."""

import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyconvert.checkpoint import open_source
from hyconvert.errors import CheckpointError


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def assert_same_bytes(left: torch.Tensor, right: torch.Tensor) -> None:
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("max_shard_size", ["1GB", "100KB"])
def test_every_tensor_of_every_family_is_read_as_stored(tiny_base, family: str, max_shard_size: str) -> None:
    folder = tiny_base(family, max_shard_size=max_shard_size)
    source = open_source(folder)
    expected = stored(folder)
    assert set(source.tensor_names) == set(expected)
    for name, value in expected.items():
        assert_same_bytes(source.read(name), value)
        assert source.shapes[name] == tuple(value.shape)
    assert source.nbytes == sum(value.nbytes for value in expected.values())
    assert source.config.model_type == family
    assert len(source.shards) == (1 if max_shard_size == "1GB" else len(list(folder.glob("*.safetensors"))))


def test_shards_come_in_order_with_their_own_tensors(tiny_base) -> None:
    folder = tiny_base("llama", max_shard_size="100KB")
    source = open_source(folder)
    seen = dict(source.iter_shards())
    assert list(seen) == sorted(file.name for file in folder.glob("*.safetensors"))
    for name, tensors in seen.items():
        assert set(tensors) == set(load_file(folder / name))
    assert [name for _, name, _ in source.iter_tensors()] == list(source.tensor_names)


def test_a_shard_is_freed_when_its_tensors_are_dropped(tiny_base) -> None:
    source = open_source(tiny_base("llama", max_shard_size="100KB"))
    references = []
    for _, tensors in source.iter_shards():
        assert all(reference() is None for reference in references)
        references = [weakref.ref(tensor) for tensor in tensors.values()]
        del tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_keeps_the_stored_dtype(tiny_base, dtype: torch.dtype) -> None:
    folder = tiny_base("qwen2", dtype=dtype)
    source = open_source(folder)
    assert source.dtype == dtype
    for name, value in stored(folder).items():
        assert_same_bytes(source.read(name), value)


def test_an_explicit_dtype_converts_floats_and_nothing_else(tiny_base, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base("llama"), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["counts"] = torch.arange(3)
    tensors["eighths"] = torch.ones(3).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(folder, dtype="bfloat16")
    assert source.dtype == torch.bfloat16
    assert source.read("counts").dtype == torch.int64
    assert source.read("eighths").dtype == torch.float8_e4m3fn
    name = "model.norm.weight"
    assert_same_bytes(source.read(name), tensors[name].to(torch.bfloat16))
    assert source.tensors[name].nbytes == 2 * tensors[name].numel()


def test_mixed_dtypes_are_kept_and_the_most_frequent_one_is_the_dtype(tiny_base, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base("llama", dtype=torch.bfloat16), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(folder)
    assert source.dtype == torch.bfloat16
    assert source.read("model.norm.weight").dtype == torch.float32


def test_scalars_and_empty_tensors_are_read(tiny_base, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base("llama"), tmp_path / "base")
    save_file({"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}, folder / "model.safetensors")
    source = open_source(folder)
    assert source.read("scalar").item() == 3.0
    assert source.read("empty").shape == (0, 4)


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'float8' is not known; use auto, float32, bfloat16, float16"):
        open_source("anything", dtype="float8")


def test_fingerprint_names_the_contents_not_the_place(tiny_base, tmp_path: Path) -> None:
    folder = tiny_base("llama", max_shard_size="100KB")
    copy = shutil.copytree(folder, tmp_path / "copy")
    fingerprint = open_source(folder).fingerprint
    assert fingerprint.startswith("sha256:")
    assert len(fingerprint) == 71
    assert open_source(copy).fingerprint == fingerprint
    assert open_source(copy, dtype="bfloat16").fingerprint == fingerprint
    assert open_source(tiny_base("llama", max_shard_size="100KB", seed=1)).fingerprint != fingerprint
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))
    assert open_source(copy).fingerprint != fingerprint


def test_auxiliary_files_are_taken_verbatim_and_nothing_else_is(tiny_base, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base("llama"), tmp_path / "base")
    (folder / "additional_chat_templates").mkdir()
    wanted = {
        "LICENSE.txt": b"terms",
        "vocab.json": b"{}",
        "merges.txt": b"#version\r\n",
        "tokenizer.model": bytes(range(256)),
        "additional_chat_templates/tools.jinja": b"{{ x }}",
    }
    unwanted = [
        "README.md",
        "pytorch_model.bin",
        "modeling_x.py",
        "training_args.bin",
        "model.safetensors.index.json",
    ]
    for name, data in wanted.items():
        (folder / name).write_bytes(data)
    for name in unwanted:
        (folder / name).write_text("x")
    files = open_source(folder).auxiliary_files()
    assert wanted.items() <= files.items()
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= set(files)
    assert not set(unwanted) & set(files)
    assert not {"config.json", "model.safetensors"} & set(files)
    assert files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()


def test_tokenizer_is_the_folders(tiny_base) -> None:
    tokenizer = open_source(tiny_base("llama")).load_tokenizer()
    text = "Hello\n\tworld {}~"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    ) == ("user: hi\nassistant: ")


def test_a_single_file_wins_over_an_index(tiny_llama: Path, tiny_base) -> None:
    shutil.copyfile(tiny_base("llama", seed=1) / "model.safetensors", tiny_llama / "model.safetensors")
    assert [shard.name for shard in open_source(tiny_llama).shards] == ["model.safetensors"]
