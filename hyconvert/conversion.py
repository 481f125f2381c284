"""Conversion of a base checkpoint, end to end: plan, align, write."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyconvert.align import FitSettings, LayerFit, align
from hyconvert.checkpoint import CheckpointWriter, Source, open_source, recorded_name
from hyconvert.data import BUILTIN, check_length, read_texts, token_blocks
from hyconvert.errors import PlanError
from hyconvert.evaluate import perplexity, pick_device
from hyconvert.kv import head_dim
from hyconvert.loading import quiet_loading
from hyconvert.modeling.attention import HyConvertAttention
from hyconvert.modeling.configuration import HyConvertConfig
from hyconvert.modeling.families import base_window, family_of_base
from hyconvert.modeling.model import model_class_of
from hyconvert.plan import LayerPlan, Plan, nearest_sources, parse_line, uniform_full_layers
from hyconvert.progress import Progress, silent
from hyconvert.retrieval import REPEATED, Mixed, mix_in
from hyconvert_kernels.dispatch import attention_problem

HELDOUT_SEQUENCES = 2
LENGTH = 2048
"""Tokens per sequence of calibration text, where the base was trained for so many."""


@dataclass(frozen=True)
class Calibration:
    """Where calibration text comes from and how much of it is read.

    Attributes:
        source: as `hyconvert.data.read_texts` takes it; None is the built-in text.
        tokens: tokens to fit on.
        sequence_length: tokens per sequence, T; None is 2,048, or the base's positions if those are fewer.
        column: the text column of formats with columns.
        retrieval: share of the sequences that have facts, questions and repeats strewn in (`hyconvert.retrieval`).
        repeats: share of such a sequence that repeats passages of it.
    """

    source: str | None = None
    tokens: int = 65_536
    sequence_length: int | None = None
    column: str = "text"
    retrieval: float = 1.0
    repeats: float = REPEATED

    def suited_to(self, config: Any) -> Calibration:
        """The same with a sequence length, for a base of this config.

        Raises:
            DataError: its sequences are longer than the base was trained for.
        """
        limit = getattr(config, "max_position_embeddings", None) or LENGTH
        length = self.sequence_length or min(LENGTH, limit)
        check_length(length, config)
        return replace(self, sequence_length=length)


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        base, out: where from, where to.
        plan: the plan.
        fingerprint: of the base's contents.
        calibration: what the layers were aligned on; None without alignment.
        fits: one `LayerFit` per converted layer; empty without alignment.
        planning: why the plan was chosen, as `PlanReport.to_dict` gives it; None for a plan that was given.
        perplexity: of `base` and `converted` on sequences of the calibration text that no fit has seen; empty without
            alignment.
        warnings: what the user should know of the plan.
        seconds: wall-clock time.
    """

    base: str
    out: str
    plan: Plan
    fingerprint: str
    calibration: Calibration | None = None
    fits: list[LayerFit] = field(default_factory=list)
    planning: dict[str, Any] | None = None
    perplexity: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self) | {"plan": self.plan.model_dump(exclude_none=True), "line": self.plan.line}


def make_plan(
    config: Any,
    *,
    plan: Plan | str | Path | None = None,
    uniform: int | None = None,
    full_layers: Sequence[int] | None = None,
    **settings: Any,
) -> Plan:
    """The plan that a user's options describe, checked against the base.

    Args:
        config: the base's config.
        plan: a plan, a `plan.json`, or a layer-map line such as `F*3 S2*4 F`.
        uniform: N of a uniform 1:N plan.
        full_layers: indices of the full layers; the others read the nearest full layer before them.
        **settings: `block_size`, `topk`, `window`, `gate`, `sinks`, `maps`; None leaves the plan's own or the default.

    Raises:
        PlanError: not exactly one way to choose the layers was given, or the plan does not fit the base.
    """
    given = [
        name
        for name, value in (("--plan", plan), ("--uniform", uniform), ("--full-layers", full_layers))
        if value
    ]
    if len(given) != 1:
        raise PlanError(
            f"{' and '.join(given)} contradict each other; give one of them"
            if given
            else "say which layers stay full: --uniform 1:N, --full-layers 0,1,7 or --plan plan.json"
        )
    count = config.num_hidden_layers
    sliding = [i for i in range(count) if base_window(config, i)]
    if len(sliding) == count:
        raise PlanError(
            f"every layer of this {config.model_type} model already has a sliding window of {config.sliding_window} "
            "tokens, so no layer can be an oracle; convert a model with full-attention layers"
        )
    if isinstance(plan, Plan):
        result = plan
    elif plan is not None:
        text = str(plan)
        is_line = not Path(text).exists() and not text.endswith(".json") and text[:1] in "FSRWL"
        result = Plan.from_dict({"layers": _layers(parse_line(text))}) if is_line else Plan.load(plan)
    else:
        full = uniform_full_layers(count, uniform, sliding) if uniform else tuple(full_layers or ())
        result = Plan.from_dict({"layers": _layers(nearest_sources(count, full, sliding))})
    result = result.with_settings(**settings)
    limit = getattr(config, "max_position_embeddings", None)
    for name in ("block_size", "window"):
        if limit and getattr(result, name) > limit:
            raise PlanError(
                f"{name} {getattr(result, name)} is longer than the {limit} tokens the base was trained for"
            )
    HyConvertConfig.from_base(config, result)
    return result


def kernel_warnings(config: Any, plan: Plan) -> list[str]:
    """What of a plan for this base the GPU kernels do not run; the references, slower, run all of it.

    Args:
        config: the base's config.
        plan: fitting it.
    """
    heads = config.num_attention_heads, config.num_key_value_heads
    q, k = (torch.empty(1, count, 1, head_dim(config), device="meta") for count in heads)
    selects = {"block_size": plan.block_size, "topk": plan.topk} if plan.sources else {"block_size": None}
    problem = attention_problem(q, k, k, window=plan.window, **selects)
    if problem is None:
        return []
    return [
        f'the GPU kernels refuse this model: {problem}; it runs with attn_implementation="hyconvert_reference", slower'
    ]


def _layers(layers: tuple[LayerPlan, ...]) -> list[dict[str, Any]]:
    return [layer.model_dump(exclude_none=True) for layer in layers]


def convert(
    base: str | Path,
    out: str | Path,
    *,
    plan: Plan | str | Path | None = None,
    uniform: int | None = None,
    full_layers: Sequence[int] | None = None,
    kv_budget: float | None = None,
    costs: str | Path | None = None,
    align_layers: bool = True,
    calibration: Calibration | None = None,
    fit: FitSettings | None = None,
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
    revision: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    command: str | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> ConversionReport:
    """Convert a base checkpoint into a HySparse model.

    Args:
        base: a Hugging Face id, a folder with safetensors, or a `.gguf` file.
        out: the folder to write.
        plan, uniform, full_layers, **settings: which layers become what; see `make_plan`. Without any of them the
            layers are measured and chosen.
        kv_budget: with measured layers, the share of the base's KV at 32k tokens that the plan may keep; 0.25 if None.
        costs: folder of `hyconvert measure`; None measures into `<out>.costs`, or goes on with what is there.
        align_layers: fit the new parameters in closed form; otherwise they start as identities.
        calibration: text to align on; the built-in text by default.
        fit: ridge strengths and sample sizes of the alignment.
        dtype: `auto` keeps the checkpoint's (float32 for `.gguf`); or a torch dtype's name.
        device: where to align; `auto` takes a GPU if there is one.
        force: replace an existing `out`, once the new one is complete.
        revision: of a Hub id.
        max_shard_bytes: for bases that are not sharded themselves.
        command: the command line to put into the model card.
        progress: told about each stage.

    Returns:
        What was done and measured.

    Raises:
        HyconvertError: the input cannot be used; `out` is then as it was.
    """
    began = time.monotonic()
    where = pick_device(device)
    source = open_source(base, revision=revision, dtype=dtype)
    family_of_base(source)
    calibration = (calibration or Calibration()).suited_to(source.config) if align_layers else None
    chosen: Plan | None = None
    if plan or uniform or full_layers:
        if kv_budget is not None or costs is not None:
            raise PlanError(
                "a plan is given, so --kv-budget and --costs have nothing to choose; drop one of them"
            )
        chosen = make_plan(source.config, plan=plan, uniform=uniform, full_layers=full_layers, **settings)
    with CheckpointWriter(
        Path(out),
        force=force,
        base=source.path,
        expected_bytes=source.nbytes,
        max_shard_bytes=max_shard_bytes,
    ) as writer:
        planning = None
        if chosen is None:
            folder, text = Path(costs or f"{out}.costs"), calibration or Calibration()
            measured, planning = measured_plan(
                base,
                source,
                folder,
                revision=revision,
                kv_budget=kv_budget,
                text=text,
                device=device,
                progress=progress,
                **settings,
            )
            chosen = make_plan(source.config, plan=measured)
        if chosen.base is None:
            chosen = chosen.with_settings(base=recorded_name(base))
        config = HyConvertConfig.from_base(source.config, chosen)
        config.dtype = source.dtype
        report = ConversionReport(str(base), str(out), chosen, source.fingerprint, planning=planning)
        report.warnings = kernel_warnings(source.config, chosen)
        if calibration is not None:
            report.calibration = calibration
            fitted, heldout = read_calibration(source, calibration)
            fit = fit or FitSettings()
            changed, added = _align(source, config, fitted, heldout, fit, where, report, progress)
        else:
            changed, added = {}, initial_tensors(config)
        _write_weights(writer, source, changed, added, progress)
        config.save_pretrained(writer.folder)
        for name, data in source.auxiliary_files().items():
            writer.write_bytes(name, data)
        report.seconds = time.monotonic() - began
        from hyconvert.card import model_card

        writer.write_json("conversion.json", report.to_dict())
        writer.write_text("README.md", model_card(report, config, source, command))
        writer.finish()
    return report


def measured_plan(
    base: str | Path,
    source: Source,
    folder: Path,
    *,
    revision: str | None = None,
    kv_budget: float | None = None,
    text: Calibration,
    device: str = "auto",
    progress: Progress = silent,
    **settings: Any,
) -> tuple[Plan, dict[str, Any]]:
    """Measure what is not measured yet, and solve.

    Args:
        base, source: the base.
        folder: costs, kept there; an interrupted or complete measurement in it is used.
        revision: of a Hub id.
        kv_budget: share of the base's KV that the plan may keep; the default if None.
        text: what to measure on.
        device: where.
        progress: told about each candidate.
        **settings: as in `make_plan`.

    Returns:
        The plan, and why it was chosen.
    """
    from hyconvert.measure import Costs, MeasureSettings, measure
    from hyconvert.planning import DEFAULT_BUDGET, choose, make_budget

    given = {k: v for k, v in settings.items() if v is not None and k in MeasureSettings.model_fields}
    if (folder / "costs.json").exists():
        found = Costs.load(folder, unfinished=True).settings
        wanted = MeasureSettings.create(**(found.model_dump() | given))
    else:
        wanted = None
    costs = measure(
        base, folder, settings=wanted, revision=revision, device=device, progress=progress, calibration=text.source,
        column=text.column, **given,
    )  # fmt: skip
    report = choose(costs, source.config, make_budget(source.config, kv_budget=kv_budget or DEFAULT_BUDGET))
    return report.solution.plan, report.to_dict()


def read_calibration(source: Source, calibration: Calibration) -> tuple[Mixed, Tensor]:
    """Text to fit on, and [n, T] tokens to measure on, `HELDOUT_SEQUENCES` rows if there are as many.

    Args:
        source: the base.
        calibration: suited to it.
    """
    length = calibration.sequence_length
    assert length is not None
    wanted = max(1, calibration.tokens // length) + HELDOUT_SEQUENCES
    texts = read_texts(calibration.source, column=calibration.column)
    name = f"the calibration text {calibration.source or BUILTIN}"
    tokenizer = source.load_tokenizer()
    blocks = token_blocks(texts, tokenizer, sequences=wanted, length=length, name=name)
    held = min(HELDOUT_SEQUENCES, len(blocks) - 1)
    fitted, heldout = blocks[: len(blocks) - held], blocks[len(blocks) - held :]
    return mix_in(fitted, tokenizer, calibration.retrieval, repeats=calibration.repeats), heldout


def dense_plan(config: Any, **settings: Any) -> Plan:
    """The plan that keeps every layer of a base; `settings` are those of `Plan`."""
    kinds = ("sliding" if base_window(config, i) else "full" for i in range(config.num_hidden_layers))
    return Plan.from_dict({"layers": [{"kind": kind} for kind in kinds]} | settings)


def load_base_as(config: Any, source: Source, device: torch.device) -> Any:
    """A converted model with the base's weights and identity parameters, in memory once."""
    model_class = model_class_of(config.family)
    with quiet_loading():  # the new parameters are missing from the base, as they must be
        if source.path.is_dir():
            model = model_class.from_pretrained(source.path, config=config, dtype=source.dtype)
        else:
            state = {name: tensor for _, name, tensor in source.iter_tensors()}
            model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=source.dtype)
    return model.eval().requires_grad_(False).to(device)


def _align(
    source: Source,
    config: Any,
    text: Mixed,
    heldout: Tensor,
    fit: FitSettings,
    device: torch.device,
    report: ConversionReport,
    progress: Progress,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Align, and give the base tensors that changed and the tensors that are new."""
    with progress("Loading the base", total=1):
        model = load_base_as(config, source, device)
    if len(heldout):
        with progress("Measuring the base", total=len(heldout)) as step:
            report.perplexity["base"] = perplexity(model, heldout, as_base=True, on_sequence=step)
    with progress("Aligning", total=config.num_hidden_layers) as step:
        report.fits = align(
            model, text.tokens, fit, text.asked, on_layer=lambda layer, fitted: step(describe(layer, fitted))
        )
    if len(heldout):
        with progress("Measuring the conversion", total=len(heldout)) as step:
            report.perplexity["converted"] = perplexity(model, heldout, on_sequence=step)
    changed, added = {}, {}
    for layer, attention in enumerate(model.model.layers):
        prefix = f"model.layers.{layer}.self_attn."
        module = attention.self_attn
        added.update({prefix + name: tensor.cpu() for name, tensor in new_parameters(module).items()})
        if fit.refit_output and module.kind in ("sparse", "reuse", "window"):
            changed[f"{prefix}o_proj.weight"] = module.o_proj.weight.detach().cpu()
    return changed, added


def describe(layer: int, fit: LayerFit | None) -> str:
    """One layer's alignment for a progress line."""
    if fit is None:
        return f"layer {layer} full"
    source = "" if fit.source is None else f" from {fit.source}"
    share = "" if fit.explained is None else f", explains {fit.explained:.0%} of {fit.outside_mass:.0%} mass"
    return f"layer {layer} {fit.kind}{source}{share}, error {fit.error:.1%}"


def new_parameters(attention: HyConvertAttention) -> dict[str, Tensor]:
    """Parameters that conversion added to a layer, by their name within it."""
    names = ("query_map", "value_map", "window_sink", "sparse_sink", "gate.")
    return {name: p.detach() for name, p in attention.named_parameters() if name.startswith(names)}


def initial_tensors(config: Any) -> dict[str, Tensor]:
    """The new parameters of an unaligned model, made without its weights."""
    with torch.device("meta"):
        model = model_class_of(config.family)(config)
    tensors = {}
    for layer, block in enumerate(model.model.layers):
        attention = block.self_attn
        for name, parameter in new_parameters(attention).items():
            owner, _, leaf = name.rpartition(".")
            module = attention.get_submodule(owner) if owner else attention
            setattr(module, leaf, torch.nn.Parameter(torch.empty(parameter.shape, dtype=config.dtype)))
        attention.reset_parameters()
        prefix = f"model.layers.{layer}.self_attn."
        tensors.update({prefix + name: tensor for name, tensor in new_parameters(attention).items()})
    return tensors


def _write_weights(
    writer: CheckpointWriter,
    source: Source,
    changed: dict[str, Tensor],
    added: dict[str, Tensor],
    progress: Progress,
) -> None:
    with progress("Writing", total=len(source.shards)) as step:
        for shard in source.shards:
            writer.start_shard(shard.name)
            for name in shard.tensor_names:
                info = source.tensors[name]
                tensor = changed[name].to(info.dtype) if name in changed else source.read(name)
                writer.add_tensor(name, tensor)
            step(shard.name)
        for name, tensor in added.items():
            writer.add_tensor(name, tensor.to(source.dtype))
