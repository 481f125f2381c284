"""An evaluation as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from hyconvert.evaluate import human_bytes
from hyconvert.evaluation.svg import Axis, arc_map, bar_plot, heat_map, line_plot, short_number, span_of

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_KINDS = {"F": "full", "S": "sparse", "R": "reuse", "W": "window", "L": "sliding"}
KINDS = {
    "full": "all keys, all of them stored",
    "sparse": "its last tokens, and blocks of its source's cache",
    "reuse": "its last tokens, and blocks of its own cache",
    "window": "its last tokens alone",
    "sliding": "kept, the base's own sliding window",
}
KIND_TITLES = {
    "single": "One needle",
    "multikey": "A needle among decoys",
    "multivalue": "Two values of one key",
    "copy": "A copied passage",
}


def render_page(data: dict[str, Any]) -> str:
    """The page of an evaluation.

    Args:
        data: `Evaluation.to_dict()`, or the JSON file that was written with a page.
    """
    layers = layer_map(data["line"])
    page: str = _template().render(
        d=data,
        layers=layers,
        counts=Counter(layer["kind"] for layer in layers),
        figures=figures(data),
        short_name=short_name,
        kinds=KINDS,
        kind_titles=KIND_TITLES,
        task_rows=task_rows(data["tasks"]),
        human_bytes=human_bytes,
    )
    return page


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined, select_autoescape

    environment = Environment(
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def layer_map(line: str) -> list[dict[str, Any]]:
    """Layers of a layer-map line: index, kind, and source if there is one."""
    layers: list[dict[str, Any]] = []
    for part in line.split():
        name, _, count = part.partition("*")
        for _ in range(int(count or 1)):
            layers.append({"index": len(layers), "kind": _KINDS[name[0]], "source": name[1:], "name": name})
    return layers


def short_name(name: str) -> str:
    """What a model is called at the head of the page: the last part of a path, a Hub id as it is."""
    path = Path(name)
    return path.name if path.is_absolute() or name[:1] in ".~" or len(path.parts) > 2 else name


def figures(data: dict[str, Any]) -> dict[str, Any]:
    """Every plot as SVG by name; those without data are left out. `needles` holds one per kind and model."""
    layers = layer_map(data["line"])
    found: dict[str, Any] = {"kv": _kv_plot(data["kv"])}
    if len(layers) <= 40:
        found["arcs"] = arc_map("Layer map: arcs lead from a full layer to those that read its cache", layers)
    if data["text"]:
        found["loss"], found["kl"] = _loss_plots(data["text"]["curve"])
    if data["lookup"]:
        found["needles"] = _needle_maps(data["lookup"])
    branches = data["branches"] or {}
    shares = {int(layer): share for layer, share in (branches.get("shares") or {}).items()}
    if shares:
        found["shares"] = bar_plot(
            "Share of the sparse branch by layer",
            Axis("share of the sparse branch", 0.0, 1.0, number=lambda share: f"{share:.0%}"),
            [(layer["kind"], shares.get(layer["index"])) for layer in layers],
        )
    alone = [row for row in branches.get("ablations", ()) if row["layer"] is not None]
    if alone:
        whole = branches["ablations"][0]["nll"]
        rises = {row["layer"]: row["nll"] - whole for row in alone}
        low, high = span_of([0.0, *rises.values()])
        found["ablation"] = bar_plot(
            "Loss without the sparse branch of one layer",
            Axis("rise of the loss, nats", low if min(rises.values()) < 0 else 0.0, high),
            [(layer["kind"], rises.get(layer["index"])) for layer in layers],
        )
    return found


def _loss_plots(curve: dict[str, list[float]]) -> tuple[str, str]:
    """From the 16th token on where there are many: the first few are noise that would flatten the rest."""
    first = sum(position < 16 for position in curve["position"]) if curve["position"][-1] > 128 else 0
    positions = curve["position"][first:]
    lines = {
        name: list(zip(positions, curve[name][first:], strict=True)) for name in ("base", "converted", "kl")
    }
    divergence = lines.pop("kl")
    low, high = span_of([loss for points in lines.values() for _, loss in points])
    x = Axis("position, tokens", positions[0], max(positions[-1], positions[0] + 1), log=True)
    _, most = span_of([value for _, value in divergence], zero=True)
    return (
        line_plot("Loss by position", x, Axis("loss, nats per token", max(0.0, low), high), lines),
        line_plot(
            "KL divergence by position", x, Axis("KL, nats per token", 0.0, most),
            {"KL(base || converted)": divergence}, first=1,
        ),
    )  # fmt: skip


def _kv_plot(kv: dict[str, Any]) -> str:
    series = {name: list(zip(kv["contexts"], kv[name], strict=True)) for name in ("base", "converted")}
    values = [value for points in series.values() for _, value in points]
    x = Axis("context, tokens", kv["contexts"][0], kv["contexts"][-1], log=True)
    y = Axis("", min(values), max(values), log=True, number=_power_of_two)
    return line_plot("KV cache against context", x, y, series, dots=True)


def _power_of_two(count: float) -> str:
    return human_bytes(count).replace(".0 ", " ")


def _needle_maps(lookup: dict[str, Any]) -> list[dict[str, Any]]:
    """Heat maps by depth and length, one per kind of question, for both models.

    They show exact answers, and for copies, which are long, the probability of a token (geometric mean).
    """
    maps = []
    for kind in ("single", "multikey", "multivalue", "copy"):
        cells = [cell for cell in lookup["cells"] if cell["kind"] == kind]
        if not cells:
            continue
        lengths = sorted({cell["length"] for cell in cells})
        depths = sorted({cell["depth"] for cell in cells})
        what = "probability of a token" if kind == "copy" else "exact answers"
        entry: dict[str, Any] = {"title": f"{KIND_TITLES[kind]}: {what}", "lengths": len(lengths)}
        for model in ("base", "converted"):
            table = {
                (cell["length"], cell["depth"]): math.exp(-cell[model]["nll"])
                if kind == "copy"
                else cell[model]["exact"]
                for cell in cells
            }
            entry[model] = heat_map(
                f"{entry['title']}, {model}, by depth and length",
                [short_number(length) for length in lengths],
                [f"{depth:.0%}" for depth in depths],
                [[table.get((length, depth)) for length in lengths] for depth in depths],
            )
        maps.append(entry)
    return maps


def task_rows(tasks: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Standard tasks as rows of both models' numbers."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for model, found in (tasks or {}).items():
        for task, metrics in found.items():
            for metric, value in metrics.items():
                rows.setdefault((task, metric), {"task": task, "metric": metric})[model] = value
    return list(rows.values())
