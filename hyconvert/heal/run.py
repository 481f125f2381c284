"""Healing end to end: check everything, train, write the healed checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from hyconvert.checkpoint import CheckpointWriter
from hyconvert.checkpoint.staging import explained_os_errors
from hyconvert.errors import HealError
from hyconvert.evaluate import pick_device
from hyconvert.heal.checks import Checked, check, check_processes, check_space, compute_dtype, is_fsdp
from hyconvert.heal.engine import Engine
from hyconvert.heal.models import load_student, load_teacher, merge_adapters, trained_tensors
from hyconvert.heal.objective import Healing
from hyconvert.heal.output import write_companions, write_weights
from hyconvert.heal.report import HealReport
from hyconvert.heal.states import States
from hyconvert.heal.tokens import TokenStream, build_streams, with_retrieval
from hyconvert.inspection import read_config
from hyconvert.progress import Progress, silent
from hyconvert.recipe import HealRecipe

_FREE_OF = ("log_every", "eval_every", "save_every", "micro_tokens", "tracker", "gradient_checkpointing")
"""What a resumed run may set anew: it changes no result, or only its rounding."""


def heal(
    path: str | Path,
    out: str | Path,
    recipe: HealRecipe,
    *,
    texts: Iterable[str] | None = None,
    device: str = "auto",
    force: bool = False,
    restart: bool = False,
    command: str | None = None,
    progress: Progress = silent,
) -> HealReport:
    """Heal a converted checkpoint by distillation from its base.

    While it runs, tokenised text and saved states lie in `.<out>.healing` beside `out`. Called again with the same
    arguments after it was stopped, it goes on from the last saved state, bit for bit (on the same device and the same
    number of processes; on another number but for rounding) as if it had not been. Works in one process and under
    `accelerate launch` or `torchrun`.

    Args:
        path: the converted checkpoint.
        out: the folder to write.
        recipe: data, stages, learning rates.
        texts: documents to train on, in place of `recipe.data`.
        device: where, in a single process.
        force: replace an existing `out`, once the new one is complete.
        restart: forget what an unfinished run has done.
        command: the command line to put into the model card.
        progress: told about each stage.

    Returns:
        What was done and measured.

    Raises:
        HyconvertError: the input cannot be used, the loss is no longer finite, or the disk is full. `out` is then as it
            was, and the last saved state is kept.
    """
    experts = hasattr(read_config(str(path)), "num_experts")
    accelerator = accelerator_of(recipe, device, out, may_skip=experts or recipe.layerwise is not None)
    main = accelerator.is_main_process
    check_processes(recipe, accelerator)
    checked = check(path, recipe, accelerator.device)
    out = Path(out).expanduser().resolve()
    work = out.with_name(f".{out.name}.healing")
    check_space(checked, recipe, work)
    target = (
        CheckpointWriter(
            out, force=force, base=checked.converted.path, expected_bytes=checked.converted.nbytes
        )
        if main
        else None
    )
    with target or nullcontext():
        train, held = _text(work, checked, recipe, texts, restart, accelerator, progress)
        with progress("Loading student and teacher", total=1) as step:
            healing, trained = _models(path, recipe, checked, accelerator)
            step()
        if recipe.tracker:
            accelerator.init_trackers("hyconvert")
        plan, states = checked.config.get_plan(), States(work, accelerator)
        engine = Engine(accelerator, healing, recipe, plan, train, held, states)
        try:
            record = engine.run(progress if main else silent)
        except torch.OutOfMemoryError as error:
            raise HealError(
                "the GPU's memory is full; use a smaller --micro-tokens (which changes no result but for rounding), or "
                "--gradient-checkpointing"
            ) from error
        report = HealReport(
            str(path),
            str(out),
            checked.teacher.name,
            recipe,
            record,
            accelerator.num_processes,
            str(accelerator.device),
        )
        if recipe.lora:
            merge_adapters(healing)
        state = accelerator.get_state_dict(engine.model)
        if target is not None:
            prefix = "student."
            state = {key.removeprefix(prefix): value for key, value in state.items()}
            with progress("Writing", total=1) as step:
                write_weights(target, checked, trained_tensors(state, trained), engine.student)
                write_companions(target, checked, report, command)
                target.finish()
                step()
            shutil.rmtree(work, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return report


def accelerator_of(recipe: HealRecipe, device: str, out: str | Path, may_skip: bool = False) -> Any:
    """What prepares, reduces and saves: one process, DDP or FSDP, as the environment says.

    Args:
        recipe: precision, tracker and seed.
        device: where, in a single process.
        out: beside which a tracker logs.
        may_skip: a step may leave parameters without a gradient: experts without tokens, or the stage layerwise.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed

    where = pick_device(device)
    mixed = "bf16" if compute_dtype(recipe, where) == torch.bfloat16 else "no"
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)
    # Else only the first process of a node reads weights, and the others' teachers, which are not sharded, stay empty.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    AcceleratorState._reset_state()  # a process may heal twice, with another precision
    accelerator = Accelerator(
        cpu=where.type == "cpu",
        mixed_precision=mixed,
        log_with=recipe.tracker,
        project_dir=str(Path(out).with_name(f"{Path(out).name}.log")) if recipe.tracker else None,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=may_skip, broadcast_buffers=False)
        ],
    )
    if (plugin := getattr(accelerator.state, "fsdp_plugin", None)) is not None:
        # The engine's autocast does what it does everywhere else. Accelerate's policy would round the loss, the
        # residual stream and the sums of gradients to bfloat16 besides.
        plugin.mixed_precision_policy = None
    set_seed(recipe.seed)
    return accelerator


def _text(
    work: Path,
    checked: Checked,
    recipe: HealRecipe,
    texts: Iterable[str] | None,
    restart: bool,
    accelerator: Any,
    progress: Progress,
) -> tuple[TokenStream, TokenStream]:
    """The tokenised text: made by the main process, or found where an unfinished run left it."""
    settings = recipe.model_dump(mode="json", exclude=set(_FREE_OF)) | {
        "converted": checked.converted.fingerprint,
        "teacher": checked.teacher.fingerprint,
    }
    if accelerator.is_main_process:
        if restart:
            shutil.rmtree(work, ignore_errors=True)
        if not _same_run(work, settings):
            length = max(stage.sequence_length for _, stage in recipe.stages())
            tokenizer = checked.converted.load_tokenizer()
            with progress("Tokenising", total=1) as step:
                train, held = build_streams(
                    recipe.data if texts is None else texts,
                    tokenizer,
                    tokens=recipe.tokens,
                    heldout=max(recipe.heldout_tokens, length),
                    length=length,
                    seed=recipe.seed,
                )
                if recipe.data.retrieval:
                    stages = [(stage, first) for _, stage, first in recipe.placed_stages()]
                    train = with_retrieval(train, tokenizer, recipe.data.retrieval, stages, recipe.seed)
                step(f"{len(train):,} tokens to train on, {len(held):,} held out")
            with explained_os_errors(work):
                shutil.rmtree(work, ignore_errors=True)
                train.save(work / "train")
                held.save(work / "heldout")
                (work / "run.json").write_text(json.dumps(settings))  # last: with it the text is complete
    accelerator.wait_for_everyone()
    return TokenStream.open(work / "train"), TokenStream.open(work / "heldout")


def _same_run(work: Path, settings: dict[str, Any]) -> bool:
    """Whether an unfinished run of these settings is there.

    Raises:
        HealError: one of other settings is.
    """
    try:
        found = json.loads((work / "run.json").read_text())
    except (OSError, ValueError):
        return False
    different = [key for key in settings if found.get(key) != settings[key]]
    if different:
        raise HealError(
            f"an unfinished run in {work} has another {', '.join(different)}; give the same command to go on with "
            "it, or pass --restart to forget it"
        )
    return True


def _models(
    path: str | Path, recipe: HealRecipe, checked: Checked, accelerator: Any
) -> tuple[Healing, set[str]]:
    student = load_student(str(path), recipe, accelerator.device, checked.compute)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    teacher = load_teacher(checked.teacher, student, accelerator.device, share=not is_fsdp(accelerator))
    return Healing(student, teacher), trained
