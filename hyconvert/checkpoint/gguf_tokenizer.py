"""A GGUF file's tokenizer, with the rules that Transformers leaves out put back.

Transformers builds a byte-level BPE tokenizer from the file's vocabulary and merges, but knows the splitting rules of
only some `tokenizer.ggml.pre` values (how many depends on its version) and silently uses GPT-2's for the rest.
SmolLM2's `smollm` is among the rest: its text is first cut at every digit, so "\\n\\n2024" starts with one token for
both newlines, where GPT-2's rules leave the last newline or space to the number and give two. On documentation text
(SmolLM2-135M-Instruct, 12k tokens in windows of 2048) the missing rule costs 0.07 bits per byte: perplexity 5.29
instead of 4.92. So the rules are stated here, and a file that names others is refused.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyconvert.checkpoint.gguf_header import GgufHeader
from hyconvert.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The groups are llama.cpp's: `llama_vocab` maps each `tokenizer.ggml.pre` to the regular expressions it splits by.
_GPT2_RULES = {
    "gpt-2",
    "phi-2",
    "jina-es",
    "jina-de",
    "jina-v2-code",
    "gigachat",
    "mpt",
    "olmo",
    "jais",
    "roberta-bpe",
}
_DIGITS_THEN_GPT2_RULES = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_LLAMA3_RULES = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0"}
_QWEN2_RULES = {"qwen2", "deepseek-r1-qwen", "megrez", "kormo"}
_TEKKEN_RULES = {"tekken"}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    rf"|{_SPACE}"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace("{1,3}", "")  # each digit on its own
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"
)
_SPLITS = {
    **dict.fromkeys(_LLAMA3_RULES, _LLAMA3_SPLIT),
    **dict.fromkeys(_QWEN2_RULES, _QWEN2_SPLIT),
    **dict.fromkeys(_TEKKEN_RULES, _TEKKEN_SPLIT),
}
_LLAMA3_OR_TEKKEN = _LLAMA3_RULES | _TEKKEN_RULES
"""Text that is a vocabulary entry becomes that token even where the merges would not get there; a text begins with the
begin token unless the file says otherwise."""


def load_gguf_tokenizer(path: Path, header: GgufHeader) -> "PreTrainedTokenizerBase":
    """Build the tokenizer that a GGUF file describes.

    Args:
        path: The file.
        header: Its header.

    Returns:
        A fast tokenizer with the file's special tokens and chat template.

    Raises:
        UnsupportedModelError: The file's tokenizer splits text by rules that are not known.
    """
    from transformers import PreTrainedTokenizerFast

    # Not AutoTokenizer: it parses the whole file twice more (6 s against 0.5 s) to arrive at this same class.
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
        path.parent, gguf_file=path.name
    )
    if header.metadata.get("tokenizer.ggml.model") == "gpt2":
        _set_splitting_rules(path, header.metadata.get("tokenizer.ggml.pre"), tokenizer)
    _set_special_tokens(header.metadata, tokenizer)
    architecture = header.metadata.get("general.architecture")
    tokenizer.model_max_length = header.metadata[f"{architecture}.context_length"]
    for leftover in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(leftover, None)
    return tokenizer


def _set_splitting_rules(path: Path, pre: str | None, tokenizer: Any) -> None:
    """Make a byte-level tokenizer split text as llama.cpp does for this `tokenizer.ggml.pre`."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    first: pre_tokenizers.PreTokenizer | None
    if pre in _SPLITS:
        first = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
    elif pre in _DIGITS_THEN_GPT2_RULES:
        first = pre_tokenizers.Digits(individual_digits=True)
    elif pre in _GPT2_RULES:
        first = None
    else:
        raise UnsupportedModelError(
            f"{path} splits text by rules (tokenizer.ggml.pre = {pre!r}) that hyconvert does not know; convert the "
            "safetensors checkpoint, whose tokenizer.json states them"
        )
    backend = tokenizer.backend_tokenizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _SPLITS)
    backend.pre_tokenizer = last if first is None else pre_tokenizers.Sequence([first, last])
    backend.normalizer = normalizers.NFC() if pre in _QWEN2_RULES else None
    backend.model.ignore_merges = pre in _LLAMA3_OR_TEKKEN


def _set_special_tokens(metadata: dict[str, Any], tokenizer: Any) -> None:
    """Set the special tokens by their ids; Transformers before 5.23 takes Llama's or none instead of the file's."""
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    for name, key in keys.items():
        index = metadata.get(f"tokenizer.ggml.{key}")
        setattr(tokenizer, name, None if index is None else tokenizer.convert_ids_to_tokens(index))
    begins = (
        metadata.get("tokenizer.ggml.model") == "llama"
        or metadata.get("tokenizer.ggml.pre") in _LLAMA3_OR_TEKKEN
    )
    tokenizer.add_bos_token = metadata.get("tokenizer.ggml.add_bos_token", begins)
    tokenizer.add_eos_token = metadata.get("tokenizer.ggml.add_eos_token", False)
    tokenizer.clean_up_tokenization_spaces = False
