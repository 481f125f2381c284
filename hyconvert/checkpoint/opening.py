"""From what the user typed to a validated `Source`."""

from pathlib import Path

import torch

from hyconvert.checkpoint.folder import FolderSource
from hyconvert.checkpoint.gguf import GgufSource
from hyconvert.checkpoint.hub import download, looks_like_hub_id
from hyconvert.checkpoint.source import Source
from hyconvert.errors import CheckpointError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_source(
    base: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype = "auto",
) -> Source:
    """Open a base checkpoint and check it, reading only headers.

    Args:
        base: A local folder with `config.json` and safetensors, a local `.gguf` file, or a Hugging Face Hub id.
        revision: Branch, tag or commit of a Hub id.
        token: Hub access token; None for the one that is logged in, if any.
        trust_remote_code: Let Transformers run code that the base ships.
        dtype: `auto` keeps what is stored, and reads GGUF's quantised weights as float32; `float32`, `bfloat16` and
            `float16` convert every floating-point tensor.

    Returns:
        The source. Every shard that its index lists exists, is as long as its header says and holds what it should.

    Raises:
        CheckpointError: The base does not exist, cannot be reached, or is truncated or corrupt.
        UnsupportedModelError: It is sound but of a kind that cannot be read.
    """
    wanted = _parse_dtype(dtype)
    path = Path(base).expanduser()
    name = str(base)
    if path.is_dir():
        return FolderSource(path, name=name, dtype=wanted, trust_remote_code=trust_remote_code)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(
                f"BASE {name!r} is a file, but no .gguf; name the folder that holds config.json and the weights"
            )
        return GgufSource(path, name=name, dtype=wanted)
    if not looks_like_hub_id(name):
        raise CheckpointError(f"BASE {name!r} does not exist (looked for {path.absolute()}); check the path")
    folder = download(name, revision=revision, token=token, with_code=trust_remote_code)
    return FolderSource(folder, name=name, dtype=wanted, trust_remote_code=trust_remote_code)


def recorded_name(base: str | Path) -> str:
    """How a base is written down so that it is found again from another folder: absolute where it is a path."""
    return str(Path(base).resolve()) if Path(base).exists() else str(base)


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if dtype == "auto":
        return None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype if dtype in DTYPES.values() else None
    if found is None:
        raise CheckpointError(f"dtype {str(dtype)!r} is not known; use auto, {', '.join(DTYPES)}")
    return found
