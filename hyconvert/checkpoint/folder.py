"""A base stored as a folder: `config.json` and safetensors, in one file or sharded."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hyconvert.checkpoint.safetensors_header import HeaderEntry, read_header
from hyconvert.checkpoint.source import Shard, Source, TensorInfo, hash_samples, majority_dtype
from hyconvert.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import hashlib

    from transformers import PretrainedConfig, PreTrainedTokenizerBase

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
AUXILIARY_PATTERNS = (
    "tokenizer*.json",
    "tokenizer.model*",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""What a converted checkpoint takes over from its base's folder unchanged."""


class FolderSource(Source):
    """A local folder with `config.json` and safetensors; see `hyconvert.checkpoint.open_source`."""

    format = "safetensors"

    def __init__(self, path: Path, *, name: str, dtype: torch.dtype | None, trust_remote_code: bool) -> None:
        """Validate the folder's config and the headers of all its shards.

        Args:
            path: The folder.
            name: What the user typed.
            dtype: Convert floating-point tensors to this; None keeps each tensor's own.
            trust_remote_code: Passed to Transformers for the config and the tokenizer.

        Raises:
            CheckpointError: A file is missing, truncated or corrupt.
            UnsupportedModelError: Transformers does not know the model type, or the weights are quantised.
        """
        self.name = name
        self.path = path
        self._trust_remote_code = trust_remote_code
        self.config = _load_config(path, trust_remote_code)
        self._headers = _read_headers(path)
        self.tensors = {
            tensor: TensorInfo(entry.shape, _converted(entry.dtype, dtype), shard)
            for shard, header in self._headers.items()
            for tensor, entry in header.items()
        }
        self.shards = tuple(
            Shard(shard, tuple(header), sum(self.tensors[tensor].nbytes for tensor in header))
            for shard, header in self._headers.items()
        )
        self.dtype = dtype or majority_dtype(self.tensors)

    def read(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        entry = self._headers[info.shard][name]
        path = self.path / info.shard
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        with path.open("rb") as file:
            file.seek(entry.start)
            if file.readinto(raw.numpy().data) != entry.nbytes:
                raise CheckpointError(
                    f"{path} ended inside tensor {name!r}: it has shrunk since it was opened"
                )
        return raw.view(entry.dtype).reshape(entry.shape).to(info.dtype)

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.path, trust_remote_code=self._trust_remote_code
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"the tokenizer in {self.path} cannot be loaded ({_first_line(error)}); "
                "put the base's tokenizer files beside its weights"
            ) from error
        return tokenizer

    def auxiliary_files(self) -> dict[str, bytes]:
        files = {file for pattern in AUXILIARY_PATTERNS for file in self.path.glob(pattern) if file.is_file()}
        return {file.relative_to(self.path).as_posix(): file.read_bytes() for file in sorted(files)}

    def _hash(self, digest: "hashlib._Hash") -> None:
        config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        digest.update(json.dumps(config, sort_keys=True).encode())
        for shard, header in self._headers.items():
            layout = [(name, str(entry.dtype), entry.shape, entry.start) for name, entry in header.items()]
            digest.update(json.dumps([shard, layout]).encode())
            path = self.path / shard
            start = min((entry.start for entry in header.values()), default=0)
            with path.open("rb") as file:
                hash_samples(digest, file, start, path.stat().st_size)


def _load_config(path: Path, trust_remote_code: bool) -> "PretrainedConfig":
    from transformers import AutoConfig

    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no config.json, so it is no Hugging Face checkpoint; name the folder that holds config.json"
        )
    raw = _read_json(file)
    model_type = raw.get("model_type")
    if quantization := raw.get("quantization_config"):
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        )
        raise UnsupportedModelError(
            f"{path} holds quantised weights (quant_method {method!r}); convert the unquantised checkpoint"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        import transformers

        raise UnsupportedModelError(
            f"Transformers {transformers.__version__} cannot load the config of model type {model_type!r} in {file} "
            f"({_first_line(error)})"
        ) from error
    return config


def _read_headers(path: Path) -> dict[str, dict[str, HeaderEntry]]:
    """Headers by shard name, in the shards' order, checked against the index and each other."""
    # A single file wins over an index, as it does in Transformers.
    if (path / SINGLE_FILE).is_file():
        return {SINGLE_FILE: read_header(path / SINGLE_FILE)}
    if not (path / INDEX_FILE).is_file():
        raise CheckpointError(_no_weights(path))
    weight_map = _read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX_FILE} has no weight_map; download it again")
    headers: dict[str, dict[str, HeaderEntry]] = {}
    owner: dict[str, str] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard:
            raise CheckpointError(
                f"{path / INDEX_FILE} names the shard {shard!r}, which is no plain file name"
            )
        if not (path / shard).is_file():
            raise CheckpointError(f"{path / shard} is missing, but {INDEX_FILE} lists it; download it again")
        headers[shard] = read_header(path / shard)
        for tensor in headers[shard]:
            if tensor in owner:
                raise CheckpointError(
                    f"tensor {tensor!r} is in both {owner[tensor]} and {shard} of {path}; save the checkpoint again"
                )
            owner[tensor] = shard
    for tensor, shard in weight_map.items():
        if owner.get(tensor) != shard:
            raise CheckpointError(
                f"{path / shard} does not hold tensor {tensor!r}, which {INDEX_FILE} promises; download both again"
            )
    return headers


def _no_weights(path: Path) -> str:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickles:
        return (
            f'{path} has its weights only as {pickles[0]}; convert them first: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{path}', dtype='auto').save_pretrained('{path}')\""
        )
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if ggufs:
        return f"{path} has no {SINGLE_FILE}; to convert {ggufs[0]}, name that file itself: {path / ggufs[0]}"
    return f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}; name a folder with safetensors weights"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file} must hold a JSON object, not a {type(value).__name__}; download it again"
        )
    return value


def _converted(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype a stored tensor is read as; only ordinary floats are converted."""
    ordinary = stored.is_floating_point and stored.itemsize > 1
    return wanted if wanted is not None and ordinary else stored


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
