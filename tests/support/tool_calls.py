"""A tool that even an LLM of random weights calls with arguments of its schema, if it is named."""

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
"""As ``tool_choice``."""
