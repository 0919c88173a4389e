"""A tool for tests. If ``tool_choice`` names it, even an LLM with random weights calls it with valid arguments."""

from __future__ import annotations

from typing import Any

GREEN: dict[str, Any] = {
    "type": "object",
    "properties": {"green": {"type": "boolean"}, "grid": {"enum": ["DEU", "FRA"]}},
    "required": ["green", "grid"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "report_grid", "parameters": GREEN, "strict": True}}
NAMED: Any = {"type": "function", "function": {"name": "report_grid"}}
"""The ``tool_choice`` that names the tool."""
