"""Loading converted checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hyconvert.errors import CheckpointError
from hyconvert.evaluate import pick_device


def load(path: str | Path, *, device: str | None = None, **options: Any) -> Any:
    """Load a converted model, ready for inference.

    Args:
        path: folder that `hyconvert convert` wrote, or a Hub id of one.
        device: where to put it; `auto` is a GPU if there is one, None leaves it to `options` and the CPU.
        **options: passed on to `from_pretrained`, such as `dtype`, `device_map` or `attn_implementation`.

    Returns:
        The model in eval mode, an instance of its base's own `...ForCausalLM` class too.

    Raises:
        CheckpointError: the folder does not exist or holds no converted model.
    """
    import json

    from hyconvert.modeling import HyConvertForCausalLM

    folder = Path(path)
    config = folder / "config.json"
    if folder.exists() and not config.is_file():
        raise CheckpointError(
            f"{folder} holds no config.json, so no model; give the folder that `convert` wrote"
        )
    if config.is_file():
        try:
            kind = json.loads(config.read_text()).get("model_type")
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{config} is not valid JSON ({error}); convert again") from error
        if kind != "hyconvert":
            raise CheckpointError(
                f"{folder} holds a model of type '{kind}', not a converted one; run `hyconvert convert` first"
            )
    elif str(path).startswith((".", "/", "~")) or str(path).endswith("/"):
        raise CheckpointError(f"no folder {path}; give the folder that `hyconvert convert` wrote")
    model = HyConvertForCausalLM.from_pretrained(path, **options).eval()
    return model if device is None else model.to(pick_device(device))


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off stderr, where hyconvert's own progress stands."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
