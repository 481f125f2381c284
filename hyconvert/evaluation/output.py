"""Writing an evaluation: a page and the same as JSON, and the numbers for the model card."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hyconvert.checkpoint.staging import explained_os_errors
from hyconvert.errors import HyconvertError
from hyconvert.evaluation.card import update_card
from hyconvert.evaluation.report import render_page
from hyconvert.evaluation.run import Evaluation


def check_writable(path: str, report: Path | None, card: bool) -> None:
    """Refuse what could not be written later, before hours are spent on measuring.

    Raises:
        HyconvertError: the report would fall on a folder, or the card is not in a local folder.
    """
    if report is not None:
        for file in report_files(report):
            if file.is_dir():
                raise HyconvertError(
                    f"{file} is a folder; give --report the name of a file, such as {file}/eval.html"
                )
            with explained_os_errors(file):
                file.parent.mkdir(parents=True, exist_ok=True)
    if card and not Path(path).is_dir():
        raise HyconvertError(
            f"{path} is no local folder, so its model card cannot be changed; leave out --card"
        )


def report_files(report: Path) -> tuple[Path, Path]:
    """The page and the JSON file of `--report REPORT`, whichever ending was typed."""
    stem = report.with_suffix("") if report.suffix in (".html", ".json") else report
    return stem.with_name(f"{stem.name}.html"), stem.with_name(f"{stem.name}.json")


def write(result: Evaluation, path: str, report: Path | None, card: bool) -> None:
    """Write page and JSON, and update the model card, each complete or not at all.

    Args:
        result: the evaluation.
        path: the converted checkpoint.
        report: where to; None for no report.
        card: whether to put the numbers into the checkpoint's `README.md`.
    """
    data = result.to_dict()
    if report is not None:
        page, table = report_files(report)
        write_file(table, json.dumps(data, indent=1) + "\n")
        write_file(page, render_page(data))
    if card:
        file = Path(path, "README.md")
        write_file(file, update_card(file.read_text() if file.is_file() else "", data))


def write_file(file: Path, text: str) -> None:
    """Write a file aside and rename it, so that nobody ever sees half of it."""
    aside = file.with_name(f".{file.name}.partial-{os.getpid()}")
    with explained_os_errors(file):
        try:
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, file)
        finally:
            aside.unlink(missing_ok=True)
