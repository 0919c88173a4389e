"""Compares the provenance of requests: LLM, software and hardware at the hand-over. Pure.

A provenance is a JSON object, made by the wrapper (deployments.wrapper.provenance); the registry adds machine and
wrapper::

    {"machine": "gpu-1", "wrapper": "gpu-1-0",
     "cpu": {"model": "…", "logical": 64},
     "gpus": [{"uuid": "GPU-…", "name": "…", "power_limit_w": 700.0, "clocks_mhz": {…}, "max_clocks_mhz": {…}}],
     "versions": {"vllm": "…", "nvidia-driver": "…", …},
     "model": {"name": "…", "revision": "…", "weights_sha256": "…"},
     "engine_args": {…}}

null means not known. ``weights_sha256`` is ``pending`` if the hash was not ready in time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from registry.core.events import LeaseRequested
from registry.core.fit import is_gpu_type
from registry.core.records import LLMSpec, Request
from registry.wire.words import Grade

PENDING: Final = "pending"
"""Stands for the hash of weights that was not ready in time."""

_THIS_ONE: Final = ("machine", "wrapper", "uuid", "clocks_mhz")
"""Fields that identify a single device or moment; ignored when two runs are compared."""


def unlike(model: Request, gpu_type: str | None, asked: LeaseRequested) -> list[str]:
    """Return how new requests differ from an earlier one, before any hand-over: ``field: was X, is Y``.

    ``gpu_type``: GPU type of the earlier request's machine, None if not known. A revision or GPU type
    that the new request does not give is not compared.
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


# D41: compared at the hand-over
def differences(was: str | None, now: str | None) -> list[str]:
    """Return how two provenances (JSON; None: not known) differ in what affects figures: ``field: was X, is Y``.

    The hash of the weights is compared only if the hash in ``was`` is known.
    """
    if now is None:
        return ["its hardware and software are not known"]
    before, after = _facts(was), _facts(now)
    if before.get("model.weights_sha256") in (None, PENDING):
        before.pop("model.weights_sha256", None)
        after.pop("model.weights_sha256", None)
    return [_difference(name, one, other) for name, one, other in _pairs(before, after) if one != other]


def _facts(provenance: str | None) -> dict[str, object]:
    """Return the compared values of a provenance, by dotted name."""
    return {} if provenance is None else dict(_leaves("", json.loads(provenance)))


def _leaves(prefix: str, value: Any) -> list[tuple[str, object]]:
    # Only lists of objects (GPUs) are expanded: a list among the engine's arguments is one value.
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
