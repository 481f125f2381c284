"""A base that cannot be read is refused in one line that names the file and the remedy, before anything heavy."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyconvert.checkpoint import open_source
from hyconvert.errors import CheckpointError, HyconvertError, UnsupportedModelError

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-"


def second_shard(folder: Path) -> Path:
    return next(folder.glob(f"{SECOND}*"))


def missing_shard(folder: Path) -> None:
    second_shard(folder).unlink()


def truncated_data(folder: Path) -> None:
    shard = second_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])


def truncated_header(folder: Path) -> None:
    shard = second_shard(folder)
    shard.write_bytes(shard.read_bytes()[:60])


def nearly_empty_shard(folder: Path) -> None:
    second_shard(folder).write_bytes(b"\x01\x02")


def trailing_bytes(folder: Path) -> None:
    shard = second_shard(folder)
    shard.write_bytes(shard.read_bytes() + b"more")


def corrupt_json_header(folder: Path) -> None:
    shard = second_shard(folder)
    data = bytearray(shard.read_bytes())
    data[8:12] = b"\xff\xfe{{"
    shard.write_bytes(data)


def absurd_header_length(folder: Path) -> None:
    shard = second_shard(folder)
    shard.write_bytes(struct.pack("<Q", 1 << 60) + shard.read_bytes()[8:])


def git_lfs_pointer(folder: Path) -> None:
    second_shard(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")


def edited_header(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        shard = second_shard(folder)
        data = shard.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        change(header)
        raw = json.dumps(header).encode()
        shard.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])

    return edit


def wrong_shape(header: dict) -> None:
    next(iter(header.values()))["shape"][0] += 1


def unknown_dtype(header: dict) -> None:
    next(iter(header.values()))["dtype"] = "F3"


def overlap(header: dict) -> None:
    first, second = sorted(header.values(), key=lambda entry: entry["data_offsets"])[:2]
    second |= {key: first[key] for key in ("dtype", "shape", "data_offsets")}


def tensor_not_in_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = second_shard(folder).name
    (folder / INDEX).write_text(json.dumps(index))


def duplicate_tensor(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(second) | dict([next(iter(load_file(first).items()))]), second)


def escaping_shard_name(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))


def index_no_json(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def index_without_map(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("model_type: llama")


def config_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def no_weights(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()


def only_pickled_weights(folder: Path) -> None:
    no_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def only_gguf_beside(folder: Path) -> None:
    no_weights(folder)
    (folder / "model.Q4_0.gguf").write_bytes(b"GGUF")


CASES = [
    (missing_shard, [SECOND, "is missing", INDEX, "download it again"]),
    (truncated_data, [SECOND, "is truncated", "promises", "download it again"]),
    (truncated_header, [SECOND, "is truncated", "download it again"]),
    (nearly_empty_shard, [SECOND, "is truncated", "only 2 bytes"]),
    (trailing_bytes, [SECOND, "4 bytes after its last tensor", "download it again"]),
    (corrupt_json_header, [SECOND, "corrupt safetensors header"]),
    (absurd_header_length, [SECOND, "corrupt safetensors header", f"{1 << 60:,}"]),
    (git_lfs_pointer, [SECOND, "Git LFS pointer", "git lfs pull"]),
    (edited_header(wrong_shape), [SECOND, "corrupt safetensors header", "bytes, but has"]),
    (edited_header(unknown_dtype), [SECOND, "corrupt safetensors header", "'F3'"]),
    (edited_header(overlap), [SECOND, "corrupt safetensors header", "starts at byte"]),
    (edited_header(dict.clear), [SECOND, "after its last tensor"]),
    (tensor_not_in_shard, [SECOND, "model.layers.9.mlp.up_proj.weight", INDEX]),
    (duplicate_tensor, ["is in both", "model-00001-of-", SECOND]),
    (escaping_shard_name, [INDEX, "../elsewhere.safetensors"]),
    (index_no_json, [INDEX, "not valid JSON"]),
    (index_without_map, [INDEX, "no weight_map"]),
    (no_config, ["has no config.json"]),
    (config_no_json, ["config.json", "not valid JSON"]),
    (config_no_object, ["config.json", "must hold a JSON object, not a list"]),
    (no_weights, ["neither model.safetensors nor", INDEX]),
    (only_pickled_weights, ["only as pytorch_model.bin", "convert them first", "save_pretrained"]),
    (only_gguf_beside, ["model.Q4_0.gguf", "name that file itself"]),
]


@pytest.mark.parametrize(("spoil", "expected"), CASES)
def test_spoilt_folder_is_refused_in_one_line(tiny_llama: Path, spoil, expected: list[str]) -> None:
    spoil(tiny_llama)
    with pytest.raises(CheckpointError) as caught:
        open_source(tiny_llama)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tiny_llama) in message
    for part in expected:
        assert part in message


def test_quantised_weights_are_refused_with_their_method(tiny_llama: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    (tiny_llama / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(UnsupportedModelError, match=r"quantised weights .*'gptq'.* convert the unquantised"):
        open_source(tiny_llama)


def test_model_type_that_transformers_does_not_know_is_refused_by_name(tiny_llama: Path) -> None:
    (tiny_llama / "config.json").write_text('{"model_type": "warp_drive"}')
    with pytest.raises(UnsupportedModelError, match="model type 'warp_drive'") as caught:
        open_source(tiny_llama)
    assert "\n" not in str(caught.value)


def test_missing_tokenizer_is_a_clear_error(tiny_llama: Path) -> None:
    for file in tiny_llama.glob("*token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer in .* cannot be loaded"):
        open_source(tiny_llama).load_tokenizer()


def test_a_file_that_shrinks_while_open_is_noticed(tiny_llama: Path) -> None:
    source = open_source(tiny_llama)
    truncated_data(tiny_llama)
    with pytest.raises(CheckpointError, match="it has shrunk since it was opened"):
        list(source.iter_tensors())


@pytest.mark.parametrize("base", ["./nowhere", "/no/such/place", "~/no/such/place", "missing.gguf"])
def test_path_that_does_not_exist_is_refused(base: str) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist .* check the path"):
        open_source(base)


def test_file_that_is_no_gguf_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a file, but no .gguf; name the folder"):
        open_source(second_shard(tiny_llama))


def test_hub_id_that_cannot_be_reached_says_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_source("nobody/no-such-model")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "'nobody/no-such-model'",
        str(tmp_path),
        "Hub cache",
        "could not be reached",
        "local folder",
    ):
        assert part in message


def test_hub_id_is_downloaded_without_pickles_or_code(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def snapshot(repo: str, **options: object) -> str:
        calls.append((repo, options))
        return str(tiny_llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    source = open_source("owner/model", revision="v1", token="secret")
    assert source.name == "owner/model"
    assert source.path == tiny_llama
    ((repo, options),) = calls
    assert (repo, options["revision"], options["token"]) == ("owner/model", "v1", "secret")
    patterns = options["allow_patterns"]
    assert {"config.json", INDEX, "model-*.safetensors", "tokenizer*.json", "generation_config.json"} <= set(
        patterns
    )
    assert not any(pattern.endswith((".py", ".bin")) for pattern in patterns)


def test_every_error_is_one_the_command_line_turns_into_a_line() -> None:
    assert issubclass(CheckpointError, HyconvertError)
    assert issubclass(UnsupportedModelError, HyconvertError)


def test_base_is_not_changed_by_opening_it(tiny_base, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base("llama"), tmp_path / "base")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    source = open_source(folder)
    for _, _, tensor in source.iter_tensors():
        tensor.zero_()
    source.load_tokenizer()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
