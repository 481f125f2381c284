"""What the commands share: options, how errors and results are shown, and how lists and ratios are read."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from hyconvert.errors import HyconvertError, PlanError


def user_facing(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a user's mistake into one line and exit code 2, and Ctrl-C into exit code 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except HyconvertError as error:
            print(f"hyconvert: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
            print(f"hyconvert: {error.filename}: {error.strerror}; choose another path", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("hyconvert: interrupted; nothing was written", file=sys.stderr)
            raise typer.Exit(130) from None

    return wrapped


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, ...")]


def show(result: Any, as_json: bool) -> None:
    """Print a result that has `to_dict()` and `render(console)`."""
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    from rich.console import Console

    result.render(Console())


def warn(warnings: Iterable[str]) -> None:
    """Print warnings on stderr, a line each."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def parse_ratio(text: str | None, option: str = "--uniform") -> int | None:
    """N of `1:N`.

    Raises:
        PlanError: it is not of that form.
    """
    if text is None:
        return None
    head, _, tail = text.partition(":")
    if head != "1" or not tail.isdigit() or int(tail) < 1:
        raise PlanError(f"{option} {text} is not a ratio; write 1:N with N of at least 1, such as 1:3")
    return int(tail)


def parse_layers(text: str | None, option: str = "--full-layers") -> tuple[int, ...] | None:
    """Layer numbers such as `0,1,7` or `0-2,7`.

    Raises:
        PlanError: it is no such list.
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise PlanError(f"'{part}' in {option} is no layer number; write layers such as 0,1,7 or 0-2,7")
        layers.extend(range(int(first), int(last or first) + 1))
    return tuple(dict.fromkeys(layers))


def parse_share(text: str | None, option: str) -> float | None:
    """A share such as `25%` or `0.25`.

    Raises:
        PlanError: it is neither, or not above 0 and at most 1.
    """
    if text is None:
        return None
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise PlanError(f"{option} {text} is no share; write one such as 25% or 0.25")
    return share


def parse_count(text: str, option: str) -> int:
    """A number of tokens such as `32768`, `32k` (32,768) or `8M` (8,000,000).

    Raises:
        PlanError: it is none.
    """
    from hyconvert.recipe import parse_count as parse

    try:
        count: int = parse(text)
    except ValueError:
        count = 0
    if count < 1:
        raise PlanError(f"{option} {text} is no number of tokens; write one such as 32768, 32k or 8M")
    return count


def parse_pins(pins: list[str]) -> dict[int, Any]:
    """Kinds by layer from `0=full`, `3-5=window`, ...

    Raises:
        PlanError: a pin is not of that form.
    """
    found: dict[int, Any] = {}
    for pin in pins:
        layers, equals, kind = pin.partition("=")
        if not equals or not kind:
            raise PlanError(f"--pin {pin} is not of the form LAYER=KIND, such as 0=full or 3-5=window")
        found |= dict.fromkeys(parse_layers(layers, "--pin") or (), kind)
    return found


def parse_tasks(tasks: list[str] | None) -> frozenset[str] | None:
    """Names from `copy`, `needle,copy`, ...; None if the option was not given."""
    if not tasks:
        return None
    return frozenset(name.strip() for part in tasks for name in part.split(",") if name.strip())
