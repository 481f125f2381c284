"""Text for calibrating and measuring: files, folders, Hub datasets, or what every Python carries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyconvert.errors import DataError

BUILTIN = "pydoc"
"""Name of the built-in calibration text: the Python language reference (`pydoc_data.topics`), 0.5 MB of prose."""
BUILTIN_HELDOUT = "stdlib-docstrings"
"""Name of the built-in text to measure on: module, class and function docstrings of the standard library."""
BUILTIN_TRAIN = "stdlib-packages"
"""Name of a built-in text to heal on: the same of the standard library's packages, none of which is in the other."""

_FORMATS = {
    ".jsonl": "lines",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}
_COMPRESSIONS = (".xz", ".gz", ".zst", ".bz2")


def read_texts(source: str | None, *, column: str = "text") -> Iterator[str]:
    """Documents of a text source, one by one.

    Args:
        source: a file (.txt, .md, .rst, .jsonl, .json, .parquet, also .xz, .gz, .zst, .bz2), a folder of such files, a
            Hub dataset id, `pydoc`, `stdlib-docstrings` or `stdlib-packages`; None means `pydoc`.
        column: the column that holds the text, for formats with columns.

    Raises:
        DataError: the source does not exist, is empty, or has no such column.
    """
    yield from map(str, read_rows(source, column))


def read_rows(
    source: str | None, column: str = "text", *, subset: str | None = None, split: str = "train"
) -> Iterator[Any]:
    """One column of a text source, row by row, as it is stored; empty values are left out.

    Args:
        source: as in `read_texts`. A Hub dataset is streamed: rows are fetched as they are asked for.
        column: the column, such as one of text or one of chat messages. Ignored by the built-in texts.
        subset: configuration of a Hub dataset.
        split: of a Hub dataset.

    Raises:
        DataError: the source does not exist, is empty, or has no such column.
    """
    if source is None or source == BUILTIN:
        yield from _pydoc_topics()
    elif source == BUILTIN_HELDOUT:
        yield from _stdlib_docstrings("*.py")
    elif source == BUILTIN_TRAIN:
        yield from _stdlib_docstrings("*/**/*.py")
    else:
        yield from _column(source, column, subset, split)


def check_length(length: int, config: Any) -> None:
    """Refuse sequences that are longer than a base of this config was trained for.

    Raises:
        DataError: they are.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit and length > limit:
        raise DataError(
            f"sequences of {length} tokens are longer than the {limit} that the base was trained for; use a smaller "
            "--sequence-length"
        )


def token_blocks(
    texts: Iterable[str], tokenizer: Any, *, sequences: int, length: int, name: str, cap: int = 4
) -> Tensor:
    """Tokens of documents strung together, in blocks of one length.

    Args:
        texts: documents; reading stops as soon as there are enough.
        tokenizer: a transformers tokenizer.
        sequences: blocks wanted, N.
        length: tokens per block, T.
        name: of the source, for errors.
        cap: a document gives at most this many blocks' worth of tokens, so that one long book is not all there is.

    Returns:
        [N, T] int64, with fewer rows where the source is short.

    Raises:
        DataError: the source does not fill one block.
    """
    tokens: list[int] = []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for text in texts:
        # A tokenizer's characters per token are bounded well above 1, so a long book need not be tokenised whole.
        head = text[: cap * length * 16]
        tokens += tokenizer(head, add_special_tokens=False, verbose=False)["input_ids"][: cap * length] + end
        if len(tokens) >= sequences * length:
            break
    rows = min(sequences, len(tokens) // length)
    if rows == 0:
        raise DataError(
            f"{name} holds {len(tokens)} tokens, fewer than one sequence of {length}; give more text or a smaller "
            "--sequence-length"
        )
    return torch.tensor(tokens[: rows * length]).view(rows, length)


def _pydoc_topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def _stdlib_docstrings(pattern: str) -> Iterator[str]:
    import ast
    import sysconfig

    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.glob(pattern)):
        if not {"site-packages", "dist-packages", "test", "tests"}.isdisjoint(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
        text = "\n\n".join(doc for doc in found if len(doc) > 80)
        if text:
            yield text


def _column(source: str, column: str, subset: str | None, split: str) -> Iterator[Any]:
    path = Path(source)
    if path.exists():
        files = _files(path)
        kind = _format(files[0])
        rows = _json_lines(files) if kind == "lines" else _load(kind, files)
    elif path.suffix or source.startswith(("/", ".", "~")):
        raise DataError(f"no file or folder {source}; give a text file, a folder, or a Hub dataset id")
    else:
        rows = _load_from_hub(source, subset, split)
    count = 0
    try:
        for row in rows:
            if column not in row:
                raise DataError(f"{source} has no column '{column}'; it has {', '.join(map(repr, row))}")
            if row[column]:
                count += 1
                yield row[column]
    except DataError:
        raise
    except Exception as error:
        if not _is_unreadable(error):
            raise
        raise DataError(
            f"{source} cannot be read as text ({str(error).splitlines()[0]}); check the file"
        ) from error
    if not count:
        raise DataError(f"{source} holds no text; give a source with at least one document")


def _json_lines(files: list[Path]) -> Iterator[dict[str, Any]]:
    """Rows of JSON lines, one by one: no cache on disk, and no schema that every row must share."""
    import fsspec

    for path in files:
        try:
            opened = fsspec.open(str(path), "rt", encoding="utf-8", compression=_compression(path))
        except ValueError as error:
            raise DataError(f"{path} cannot be unpacked ({error}); install zstandard for .zst") from error
        with opened as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} of {path.name} holds no JSON object")
                yield row


def _compression(path: Path) -> str | None:
    return {".xz": "xz", ".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}.get(path.suffix)


def _load(kind: str, files: list[Path]) -> Any:
    import datasets

    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    names = list(map(str, files))
    return datasets.load_dataset(kind, data_files=names, split="train", streaming=True, **options)


def _load_from_hub(source: str, subset: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source, subset, split=split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"'{source}' is no local file or folder, and not a dataset that can be reached on the Hub ({reason}); "
            f"check the name, or leave it out to use the built-in text '{BUILTIN}'"
        ) from error


def _is_unreadable(error: Exception) -> bool:
    """Whether reading failed for what the file holds, and not for a bug."""
    import lzma
    import zlib

    known = (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error)
    # By name, because neither package need be there: their files were not read then.
    return isinstance(error, known) or type(error).__name__ in ("DatasetGenerationError", "ZstdError")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file() and _format(p, strict=False))
    if not files:
        raise DataError(f"folder {path} holds no text files; known endings are {', '.join(_FORMATS)}")
    first = _format(files[0])
    return [p for p in files if _format(p) == first]


def _format(path: Path, strict: bool = True) -> str:
    suffixes = [s for s in path.suffixes if s not in _COMPRESSIONS]
    kind = _FORMATS.get(suffixes[-1] if suffixes else "", "")
    if not kind and strict:
        raise DataError(
            f"{path} has an ending that is not known; known are {', '.join(_FORMATS)}, also compressed"
        )
    return kind
