"""Progress for people: a bar on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol


class Progress(Protocol):
    """Opens a stage of known length; the stage's value is called once per step, with an optional description."""

    def __call__(self, title: str, total: int) -> AbstractContextManager[Callable[..., None]]: ...


@contextmanager
def silent(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Says nothing; for library use."""
    yield lambda *_: None


@contextmanager
def on_stderr(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar with time left on a terminal, one line per step elsewhere."""
    show: Any = _bar if sys.stderr.isatty() else _lines
    with show(title, total) as step:
        yield step


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=total, note="")
        yield lambda note="": bars.update(task, advance=1, note=note)


@contextmanager
def _lines(title: str, total: int) -> Iterator[Callable[..., None]]:
    began, done = time.monotonic(), 0

    def step(note: str = "") -> None:
        nonlocal done
        done += 1
        left = (time.monotonic() - began) / done * (total - done)
        print(
            f"{title} {done}/{total}{': ' + note if note else ''} ({left:.0f} s left)",
            file=sys.stderr,
            flush=True,
        )

    yield step
