"""Healing end to end: check everything, train, write the healed checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hyconvert.checkpoint import CheckpointWriter, Source, open_source
from hyconvert.errors import CheckpointError, HealError
from hyconvert.evaluate import pick_device
from hyconvert.heal.engine import Engine
from hyconvert.heal.models import load_student, load_teacher, merge_adapters, trained_tensors
from hyconvert.heal.objective import Healing
from hyconvert.heal.report import HealReport, healed_card, plot
from hyconvert.heal.states import States
from hyconvert.heal.tokens import TokenStream, build_streams
from hyconvert.inspection import read_config
from hyconvert.progress import Progress, silent
from hyconvert.recipe import HealRecipe

_PROBE = "The quick brown fox: déjà vu, 12 345.67 — naïve\n\tdef f(x): return x ** 2\n北京 🙂"
_FREE_OF = ("log_every", "eval_every", "save_every", "micro_tokens", "tracker", "gradient_checkpointing")
"""What a resumed run may set anew: it changes no result, or only its rounding."""


@dataclass(frozen=True)
class Checked:
    """What was found to be in order before anything heavy starts.

    Attributes:
        converted: the checkpoint to heal.
        config: its config.
        teacher: its base, opened in the dtype to compute in.
        compute: bfloat16 or float32.
    """

    converted: Source
    config: Any
    teacher: Source
    compute: torch.dtype


def check(path: str | Path, recipe: HealRecipe, device: torch.device) -> Checked:
    """Check checkpoint, teacher, tokenizer and lengths, reading no more than headers.

    Raises:
        HyconvertError: something does not fit; the message says what to do.
    """
    config = read_config(str(path))
    compute = _compute_dtype(recipe, device)
    converted = open_source(path)
    plan, name = config.get_plan(), recipe.teacher or config.get_plan().base
    if name is None:
        raise CheckpointError(f"{path} does not say what it was converted from; name its base with --teacher")
    try:
        teacher = open_source(name, dtype=compute)
    except CheckpointError as error:
        if recipe.teacher:
            raise
        raise CheckpointError(
            f"the base of {path} cannot be opened: {error}; name it with --teacher"
        ) from error
    if teacher.config.model_type != config.family.model_type or any(
        teacher.shapes.get(key) != shape for key, shape in converted.shapes.items() if key in teacher.shapes
    ):
        raise CheckpointError(
            f"teacher {name} and {path} have different shapes; name the base it was converted from"
        )
    if not recipe.teacher and (known := _recorded_fingerprint(path)) and known != teacher.fingerprint:
        raise CheckpointError(
            f"{name} is no longer what {path} was converted from; name the base with --teacher (that very path, if it "
            "shall teach nevertheless)"
        )
    ours, theirs = converted.load_tokenizer(), teacher.load_tokenizer()
    if ours.get_vocab() != theirs.get_vocab() or ours(_PROBE)["input_ids"] != theirs(_PROBE)["input_ids"]:
        raise CheckpointError(
            f"teacher {name} has another tokenizer than {path}, so their logits cannot be compared; name its base"
        )
    limit = getattr(config, "max_position_embeddings", None)
    for stage_name, stage in recipe.stages():
        if limit and stage.sequence_length > limit:
            raise HealError(
                f"{stage_name}: sequences of {stage.sequence_length} tokens are longer than the {limit} that the model "
                "was made for; use a smaller --sequence-length"
            )
    if recipe.layerwise and not any(layer.kind in ("sparse", "reuse", "window") for layer in plan.layers):
        raise HealError(f"{path} has no converted layer, so there is nothing for the stage layerwise")
    return Checked(converted, config, teacher, compute)


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
    number of processes) as if it had not been. Works in one process and under `accelerate launch` or `torchrun`.

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
    accelerator = _accelerator(recipe, device, out)
    main = accelerator.is_main_process
    _check_processes(recipe, accelerator)
    checked = check(path, recipe, accelerator.device)
    out = Path(out).expanduser().resolve()
    work = out.with_name(f".{out.name}.healing")
    target = (
        CheckpointWriter(out, force=force, base=path, expected_bytes=checked.converted.nbytes)
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
        record = engine.run(progress if main else silent)
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
                _write(target, checked, trained_tensors(state, trained), engine.student)
                _write_companions(target, path, checked, report, command)
                target.finish()
                step()
            shutil.rmtree(work, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return report


def _accelerator(recipe: HealRecipe, device: str, out: str | Path) -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed

    where = pick_device(device)
    mixed = "bf16" if _compute_dtype(recipe, where) == torch.bfloat16 else "no"
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)
    AcceleratorState._reset_state()  # a process may heal twice, with another precision
    accelerator = Accelerator(
        cpu=where.type == "cpu",
        mixed_precision=mixed,
        log_with=recipe.tracker,
        project_dir=str(Path(out).with_name(f"{Path(out).name}.log")) if recipe.tracker else None,
        kwargs_handlers=[
            # The stage layerwise and experts without tokens leave parameters without a gradient.
            DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
        ],
    )
    set_seed(recipe.seed)
    return accelerator


def _compute_dtype(recipe: HealRecipe, device: torch.device) -> torch.dtype:
    mixed = recipe.precision == "bf16" or (recipe.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if mixed else torch.float32


def _check_processes(recipe: HealRecipe, accelerator: Any) -> None:
    world = accelerator.num_processes
    for name, stage in recipe.stages():
        if stage.rows % world:
            raise HealError(
                f"{name}: a step has {stage.rows} rows of {stage.sequence_length} tokens, which {world} processes "
                "cannot share evenly; change --batch-tokens"
            )
    if _is_fsdp(accelerator) and (recipe.lora or recipe.layerwise):
        raise HealError(
            "under FSDP neither --lora nor the stage layerwise is available; use DDP or leave them out"
        )


def device_name(device: torch.device) -> str:
    """What a device is called, for reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _is_fsdp(accelerator: Any) -> bool:
    return str(accelerator.distributed_type).endswith("FSDP")


def _recorded_fingerprint(path: str | Path) -> str | None:
    try:
        found = json.loads(Path(path, "conversion.json").read_text()).get("fingerprint")
    except (OSError, ValueError):
        return None
    return str(found) if found else None


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
        "processes": accelerator.num_processes,
    }
    if accelerator.is_main_process:
        if restart:
            shutil.rmtree(work, ignore_errors=True)
        if not _same_run(work, settings):
            length = max(stage.sequence_length for _, stage in recipe.stages())
            with progress("Tokenising", total=1) as step:
                train, held = build_streams(
                    recipe.data if texts is None else texts,
                    checked.converted.load_tokenizer(),
                    tokens=recipe.tokens,
                    heldout=max(recipe.heldout_tokens, length),
                    length=length,
                    seed=recipe.seed,
                )
                step(f"{len(train):,} tokens to train on, {len(held):,} held out")
            with _disk_errors(work):
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


@contextmanager
def _disk_errors(place: Path) -> Any:
    from hyconvert.checkpoint.staging import explained_os_errors

    with explained_os_errors(place):
        yield


def _models(
    path: str | Path, recipe: HealRecipe, checked: Checked, accelerator: Any
) -> tuple[Healing, set[str]]:
    student = load_student(str(path), recipe, accelerator.device, checked.compute)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    teacher = load_teacher(checked.teacher, student, accelerator.device, share=not _is_fsdp(accelerator))
    return Healing(student, teacher), trained


def _write(
    writer: CheckpointWriter, checked: Checked, changed: dict[str, torch.Tensor], student: Any
) -> None:
    """The checkpoint's tensors shard by shard: what was trained in its stored dtype, the rest byte for byte."""
    source = checked.converted
    if not changed.keys() <= set(source.tensor_names):  # fused experts are stored one by one
        from transformers.core_model_loading import revert_weight_conversion

        changed = dict(revert_weight_conversion(student, changed))
    if missing := changed.keys() - set(source.tensor_names):
        raise RuntimeError(f"trained tensors have no place in the checkpoint: {sorted(missing)}")
    if checked.config.tie_word_embeddings and "model.embed_tokens.weight" in changed:
        changed = changed | {"lm_head.weight": changed["model.embed_tokens.weight"]}
    for shard in source.shards:
        writer.start_shard(shard.name)
        for name in shard.tensor_names:
            tensor = changed[name].to(source.tensors[name].dtype) if name in changed else source.read(name)
            writer.add_tensor(name, tensor)


def _write_companions(
    writer: CheckpointWriter, path: str | Path, checked: Checked, report: HealReport, command: str | None
) -> None:
    checked.config.save_pretrained(writer.folder)
    for name, data in checked.converted.auxiliary_files().items():
        writer.write_bytes(name, data)
    if Path(path, "conversion.json").is_file():
        writer.copy_file(Path(path, "conversion.json"))
    writer.write_json("heal.json", report.to_dict())
    if (image := plot(report)) is not None:
        writer.write_bytes("heal.png", image)
    card = Path(path, "README.md")
    writer.write_text(
        "README.md",
        healed_card(card.read_text() if card.is_file() else "", report, command, image is not None),
    )
