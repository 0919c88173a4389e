"""The pages of docs/ that are made from the code and from other files."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from typer.main import get_command

import deployments.serve.proxy_guard
import deployments.wrapper.prompt_errors  # noqa: F401 - their errors are listed
from deployments.engine.warm.patches import PYTHON, VLLM
from deployments.launch.haproxy import _ANSWERS
from deployments.launch.patches import HAPROXY, RAY
from deployments.patch import Patch
from greenprompt_client.cli.app import EXIT_STATUSES
from greenprompt_client.cli.main import app
from registry.errors import RegistryError
from tests.docs.decisions import decisions_page
from tests.docs.flags import flags_page
from tests.docs.http_page import http_page
from tests.docs.markdown import MADE, cell, code, sentence, table, text
from tests.docs.modules import ROOT, modules
from tests.docs.settings_page import settings_page

DOCS: Final = ROOT / "docs"

OTHER_ERRORS: Final[Mapping[str, tuple[str, str, str]]] = {
    "method_not_allowed": ("405", "no", "The path does not take this method; the header `Allow` names those it takes."),
    "http_error": ("4xx", "no", "Another error of HTTP itself; the text says which."),
    "prompt_refused": ("4xx", "no", "vLLM refuses the prompt; the text is its own."),
}
"""Codes that belong to no error of the tree: HTTP status, whether to try again, meaning."""


class Metric(NamedTuple):
    """A metric as the code makes it: ``name`` without Ray's prefix."""

    kind: str
    name: str
    meaning: str
    tags: tuple[str, ...]


def errors() -> list[type[RegistryError]]:
    """Every error that the registry or a wrapper raises, by HTTP status and code."""
    found, todo = list[type[RegistryError]](), [RegistryError]
    while todo:
        below = todo.pop().__subclasses__()
        todo += below
        found += [error for error in below if not error.__module__.startswith("greenprompt_client")]
    return sorted(found, key=lambda error: (error.http_status, error.code))


def errors_page() -> str:
    """Return the page of error codes."""
    head = ("code", "HTTP", "try again", "meaning")
    raised = [
        (code(error.code), str(error.http_status), "yes" if error.retryable else "no", sentence(error.__doc__))
        for error in errors()
        if "tests." not in error.__module__
    ]
    other = [(code(name), *told) for name, told in OTHER_ERRORS.items()]
    proxy = [
        (code(answer.code), str(status), "yes" if answer.retryable else "no", cell(answer.message))
        for status, answer in _ANSWERS.items()
    ]
    return (
        f"""\
# Errors

{MADE}
Every error is `{{"code", "message", "retryable"}}`, with `field` if a field is invalid. `code` never changes its
meaning; `message` is for people. A 422 also has a list of all invalid fields: `errors`, or FastAPI's own `detail`.

Where "try again" is yes, the same call can succeed later without any change. `Retry-After` says after how many
seconds. Other errors need a change first. So do `budget_used` and `tenant_budget_used`, though they are 429.

Below `/v1` of a lease's `url`, errors have OpenAI's format, `{{"error": {{"message", "type", "param", "code"}}}}`. The
registry's and the wrapper's have the codes of this page. vLLM's own have the HTTP status as `code`, a number, and its
word for the kind of error in `type`: [OpenAI API](../how-to/openai-api.md#errors).

## Of the registry and the wrappers

{table(head, raised)}\
## Of HTTP and of vLLM

{table(head, other)}\
## Of the proxy

These errors come from the proxy in front of registry and wrappers, not from the registry.

{table(head, proxy)}""".rstrip()
        + "\n"
    )


def metrics() -> Iterator[Metric]:
    """Every metric that the code makes for Ray."""
    for _, tree in modules():
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id in ("Counter", "Gauge", "Histogram") and len(node.args) == 2:
                tags = next((word.value for word in node.keywords if word.arg == "tag_keys"), ast.Tuple([]))
                if isinstance(tags, ast.Name):
                    tags = constants[tags.id]
                name, meaning = map(ast.literal_eval, node.args)
                yield Metric(node.func.id, name, meaning, ast.literal_eval(tags))


def metrics_page() -> str:
    """Return the page of metrics."""
    rows = [
        (
            code(f"ray_{metric.name}" + ("_total" if metric.kind == "Counter" else "")),
            metric.kind.lower(),
            ", ".join(map(code, metric.tags)),
            cell(metric.meaning),
        )
        for metric in sorted(metrics(), key=lambda metric: metric.name)
    ]
    return f"""\
# Metrics

{MADE}
Ray exports these for Prometheus on each node, besides its own metrics. [Monitor a registry](../how-to/monitor.md)
says at which port.

{table(("name", "type", "labels", "meaning"), rows)}\
Counters begin at 0 when the registry starts. `kind` is the use of the energy: `prompt`, `idle`, `load` or `wake`; the
kinds add up. Measured and modeled joules have names of their own, so that no sum mixes them by accident. A prompt's
share of measured joules counts as measured.
"""


def patches_page() -> str:
    """Return the page of what is replaced or privately read in other libraries."""
    return (
        f"""\
# Patches

{MADE}
Parts of other libraries are replaced here, or read although they are private. A new version of such a library can
change them without notice. So each has a guard, which is checked at a start.

## vLLM and Python

These guards are checked when a wrapper starts. If a guard fails, LLMs start cold, and the log says which guard. If the
task that checks a running LLM for hangs fails, the LLM is restarted.

{_patches((*VLLM, *PYTHON))}\
## HAProxy

Serve writes HAProxy's configuration from a template. `greenprompt up` and each node check that the template has these
lines; if one is missing, the command fails and says which. HAProxy does not start if its edited configuration would
still log requests, or open its statistics or metrics to other machines.

{_patches(HAPROXY)}\
## Ray

`greenprompt up` and each node check the environment variables and the header. The head of a cluster checks the
provider. If a guard fails, the command fails and says which. HEAD_NODE_RESOURCE_NAME has no separate check: if it is
missing, `greenprompt up` ends with an ImportError that names it.

{_patches(RAY)}""".rstrip()
        + "\n"
    )


def _patches(patches: Iterable[Patch]) -> str:
    rows = [
        (
            cell(f"{patch.library}: {patch.name}"),
            patch.how.value,
            cell(patch.why),
            "; ".join(cell(str(guard)) for guard in patch.guards),
            cell(patch.put_back),
        )
        for patch in patches
    ]
    return table(("what", "how", "why", "guard", "put back"), rows)


def command_line_page() -> str:
    """Return the page of commands."""
    page = f"""\
# Command line

{MADE}
`greenprompt --help` and `greenprompt <command> --help` say the same. {EXIT_STATUSES}
More in [Exit statuses](exit-statuses.md).

`greenprompt --version` prints the version; `greenprompt --install-completion` installs completion for your shell.

"""
    for name, command in _commands(get_command(app), ""):
        usage = [f"<{each.name}>" for each in command.params if each.param_type_name == "argument"]
        page += f"## greenprompt {name}\n\n```\ngreenprompt {' '.join([name, *usage, '[options]'])}\n```\n\n"
        page += f"{text(command.help)}\n\n"
        rows = [
            (_names(each), _default(each), cell(each.help) + _variable(each))
            for each in command.params
            if each.name != "help"
        ]
        page += table(("argument or option", "default", "meaning"), rows) if rows else ""
    return page.rstrip() + "\n"


def _commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the commands of a group with their full names, by name; a group is replaced by its commands."""
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _names(param: Any) -> str:
    if param.param_type_name == "argument":
        return code(f"<{param.name}>")
    names = ", ".join(map(code, (*param.opts, *param.secondary_opts)))
    kind = str(getattr(param.type_descriptor.annotation, "__name__", "text")).lower()
    value = {"str": "text", "list": "text", "int": "integer", "float": "number"}.get(kind, kind)
    return names if param.is_flag else f"{names} {code(param.metavar or f'<{value}>')}"


def _default(param: Any) -> str:
    default = param.default
    if param.required:
        return "required"
    if isinstance(param.show_default, str):
        return code(param.show_default)
    if default is None or default is False or default in ([], "") or "Sentinel" in type(default).__name__:
        return ""
    return code(str(default.relative_to(ROOT) if isinstance(default, Path) else default))


def _variable(param: Any) -> str:
    return f" Variable: {code(param.envvar)}." if param.envvar else ""


PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "reference/settings.md": settings_page,
    "reference/errors.md": errors_page,
    "reference/flags.md": flags_page,
    "reference/metrics.md": metrics_page,
    "reference/command-line.md": command_line_page,
    "reference/http.md": http_page,
    "reference/patches.md": patches_page,
    "decisions/index.md": decisions_page,
}
"""How each generated page is made, by its path in docs/."""
