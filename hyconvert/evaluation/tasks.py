"""Standard tasks through lm-evaluation-harness, `pip install 'hyconvert[tasks]'`.

A converted model is a Transformers model with left padding and batches like any other, so the harness's own `hf` model
takes it as it is, and `lm_eval --model hf --model_args pretrained=OUT,trust_remote_code=True` works as well.
Of RULER, `niah_single_1`, `niah_multikey_2`, `niah_multikey_3`, `ruler_vt`, `ruler_cwe` and `ruler_fwe` make their
prompts up and need no download. That of nltk's data, which the others need, is tried all the same; without a network it
fails, and that is no matter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hyconvert.errors import HyconvertError
from hyconvert.evaluation.models import Pair

RULER_LENGTH = 4096
"""Tokens of RULER's prompts, the fewest that the harness reports."""


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse what cannot be run before anything is loaded.

    Raises:
        HyconvertError: the harness is not installed, or no task is named.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise HyconvertError(
            "--tasks needs lm-evaluation-harness, which is not installed; pip install 'hyconvert[tasks]'"
        )
    if not tasks:
        raise HyconvertError("--tasks names no task; give some, such as --tasks niah_single_1,ruler_vt")


def run_tasks(
    pair: Pair,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    length: int = RULER_LENGTH,
    on_model: Callable[[str], None] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Results of tasks for both models.

    Args:
        pair: the models.
        tasks: names of tasks, groups or tags of the harness.
        limit: examples per task; None for all.
        batch_size: prompts per batch, padded on the left.
        length: tokens of prompts, for tasks that make them (RULER's): 4,096, 8,192, ... or 131,072.
        on_model: called with the name of each model that is done.

    Returns:
        Metrics by model and task.

    Raises:
        HyconvertError: the harness is not installed, a task cannot be had, or the model is too short for it.
    """
    check_tasks(tasks)
    limited = getattr(pair.base.config, "max_position_embeddings", None) or length
    ruler = [task for task in tasks if task.startswith(("niah_", "ruler"))]
    if ruler and limited < RULER_LENGTH:  # shorter prompts are not reported, and some are sought for ever
        raise HyconvertError(
            f"{ruler[0]} has prompts of {RULER_LENGTH:,} tokens, but this model ends at {limited:,}; leave it out"
        )
    options = {
        "tasks": list(tasks),
        "limit": limit,
        "batch_size": batch_size,
        "bootstrap_iters": 0,
        "log_samples": False,
    }
    metadata = {"pretrained": pair.path, "max_seq_lengths": [min(length, limited)]}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, model in pair.models.items():
        try:
            if "task_manager" not in options:  # reading its index takes seconds
                options["task_manager"] = _task_manager(metadata)
            found[name] = _run(model, pair.tokenizer, options)
        except (KeyError, ValueError, OSError, ImportError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise HyconvertError(
                f"the tasks {', '.join(tasks)} cannot be run ({type(error).__name__}: {reason}); check their names "
                "with lm_eval ls tasks, and whether their data must be downloaded"
            ) from error
        if on_model:
            on_model(name)
    return found


def _task_manager(metadata: dict[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(metadata=metadata)


def _run(model: Any, tokenizer: Any, options: dict[str, Any]) -> dict[str, dict[str, float]]:
    with contextlib.redirect_stdout(sys.stderr):  # tasks print; stdout is for the result
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options["batch_size"], backend="causal")
        return metrics_of(lm_eval.simple_evaluate(model=lm, **options))


def metrics_of(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Numbers by task from what the harness returns; errors and lengths that were not run (-1) are left out."""
    tasks = {}
    for task, metrics in results["results"].items():
        numbers = {
            key.removesuffix(",none"): float(value)
            for key, value in metrics.items()
            if isinstance(value, int | float)
            and not isinstance(value, bool)
            and "stderr" not in key
            and key not in ("alias", "sample_len", "name")
            and value != -1
        }
        tasks[task] = numbers
    return tasks
