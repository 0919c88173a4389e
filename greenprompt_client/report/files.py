"""Writes the report of a measurement to files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter

from registry.accounting.report import MeasurementReport
from registry.accounting.report_csv import windows_csv
from registry.errors import BadSettings


def write_report(
    report: MeasurementReport, *, html: Path | None = None, csv: Path | None = None, json: Path | None = None
) -> Iterator[Path]:
    """Write a report with its windows to the given files; yield each path once it is written.

    Raises:
        BadSettings: A file can't be written.
    """
    if json is not None:
        yield _written(json, TypeAdapter(MeasurementReport).dump_json(report, indent=2).decode())
    if csv is not None:
        yield _written(csv, windows_csv(report.windows))
    if html is not None:
        from greenprompt_client.report.html import report_html  # matplotlib takes a second to load

        yield _written(html, report_html(report))


def _written(path: Path, text: str) -> Path:
    try:
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise BadSettings(str(path), f"can't be written ({error.strerror})") from error
    return path
