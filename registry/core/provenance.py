"""What an LLM was handed over with, and how that of two requests differs. Pure.

A provenance is a JSON object. The wrapper makes it (deployments.wrapper.provenance), the registry adds machine and
wrapper::

    {"machine": "gpu-1", "wrapper": "gpu-1-0",
     "cpu": {"model": "…", "logical": 64},
     "gpus": [{"uuid": "GPU-…", "name": "…", "power_limit_w": 700.0, "clocks_mhz": {…}, "max_clocks_mhz": {…}}],
     "versions": {"vllm": "…", "nvidia-driver": "…", …},
     "model": {"name": "…", "revision": "…", "weights_sha256": "…"},
     "engine_args": {…}}

What is not known is null. ``weights_sha256`` is ``pending`` where it was wanted and not known in time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from registry.core.fit import is_gpu_type
from registry.core.records import Grade, LeaseRequested, LLMSpec, Request

PENDING: Final = "pending"
"""The hash of weights that were not read to the end in time."""

_THIS_ONE: Final = ("machine", "wrapper", "uuid", "clocks_mhz")
"""What tells one machine from another of its kind, and one moment from another: no difference between two runs."""


def unlike(model: Request, gpu_type: str | None, asked: LeaseRequested) -> list[str]:
    """How what is asked differs from an earlier request, as far as it can be told at once: ``field: was X, is Y``.

    ``gpu_type`` is that of the earlier one's machine. A revision that is not named is no difference.
    """
    found = []
    if gpu_type is not None and asked.gpu_type is not None and not is_gpu_type(asked.gpu_type, gpu_type):
        found.append(_difference("gpuType", gpu_type, asked.gpu_type))
    if model.grade is Grade.MEASUREMENT and asked.grade is not Grade.MEASUREMENT:
        found.append(_difference("grade", model.grade.value, asked.grade.value))
    for n, new in enumerate(asked.requests):
        same_commit = new.spec.revision in (None, model.spec.revision, model.model_revision)
        found += [
            _difference(f"llms[{n}].{name}", was, now)
            for name, was, now in _pairs(_of_spec(model.spec), _of_spec(new.spec))
            if was != now and not (name == "revision" and same_commit)
        ]
    return found


def differences(was: str | None, now: str | None) -> list[str]:
    """How two provenances (JSON; None: not known) differ in what decides figures: ``field: was X, is Y``.

    Weights count where the hash of the first is known.
    """
    if now is None:
        return ["nothing is known of what it would run on"]
    before, after = _facts(was), _facts(now)
    if before.get("model.weights_sha256") in (None, PENDING):
        before.pop("model.weights_sha256", None)
        after.pop("model.weights_sha256", None)
    return [_difference(name, one, other) for name, one, other in _pairs(before, after) if one != other]


def _facts(provenance: str | None) -> dict[str, object]:
    """What counts of a provenance, by dotted name."""
    return {} if provenance is None else dict(_leaves("", json.loads(provenance)))


def _leaves(prefix: str, value: Any) -> list[tuple[str, object]]:
    # The engine's arguments are compared as they are: a list of them is one value.
    if isinstance(value, list) and all(isinstance(item, dict) for item in value) and value:
        value = {str(n): item for n, item in enumerate(value)}
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [
        leaf
        for name, inner in value.items()
        if name not in _THIS_ONE
        for leaf in _leaves(f"{prefix}.{name}" if prefix else name, inner)
    ]


def _of_spec(spec: LLMSpec) -> dict[str, object]:
    arguments = {f"deployment.{name}": value for name, value in json.loads(spec.engine_args).items()}
    return {"model": spec.model, "modeltyp": spec.modeltyp, "revision": spec.revision, "gpus": spec.gpus, **arguments}


def _pairs(was: Mapping[str, object], now: Mapping[str, object]) -> list[tuple[str, object, object]]:
    return [(name, was.get(name), now.get(name)) for name in sorted(was.keys() | now.keys())]


def _difference(name: str, was: object, now: object) -> str:
    return f"{name}: was {_shown(was)}, is {_shown(now)}"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
