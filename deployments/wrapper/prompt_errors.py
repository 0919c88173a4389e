"""The errors of a wrapper's HTTP side, except those of the lease."""

from __future__ import annotations

from registry.errors import RegistryError


class PromptTooLong(RegistryError):
    """A prompt was cut because it took longer than allowed."""

    code = "prompt_too_long"
    http_status = 504

    limit_s: float

    def __str__(self) -> str:
        return f"the answer took longer than {self.limit_s} s and was cut; ask for fewer tokens"


class NoSuchPath(RegistryError):
    """A path below a lease's URL that is not served, not with this method, or not for the task of the LLM."""

    code = "no_such_path"
    http_status = 404

    method: str
    path: str

    def __str__(self) -> str:
        known = "GET get_status, POST process_prompt and vLLM's /v1/… for the task of this LLM are served here"
        return f"{self.method} {self.path}: {known}"


class WritesNoText(RegistryError):
    """``process_prompt`` was called for an LLM that answers with vectors or scores."""

    code = "writes_no_text"
    http_status = 422

    modeltyp: str
    paths: str

    def __str__(self) -> str:
        return f"this LLM is for {self.modeltyp} and writes no text; POST to {self.paths} of its url"


class NotJSON(RegistryError):
    """A body for vLLM's own API has a Content-Type other than JSON, or none."""

    code = "unsupported_media_type"
    http_status = 415

    content_type: str

    def __str__(self) -> str:
        given = f"Content-Type {self.content_type!r} is not served here" if self.content_type else "no Content-Type"
        return f"{given}; send JSON with Content-Type: application/json"


class EngineFailed(RegistryError):
    """The engine's app failed while answering; the wrapper's log has the traceback."""

    code = "engine_failed"
    http_status = 500

    kind: str

    def __str__(self) -> str:
        return f"the engine failed: {self.kind}"
