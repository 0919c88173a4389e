"""Hostile tokenizers and chat templates: what is found in the process that tries them, and what passes."""

# ruff: noqa: E501 - a row is a line

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Change = Callable[[Path], object]


@dataclass(frozen=True)
class HostileTokenizer:
    """Files of a tokenizer. ``change`` is made to the files of a sound one.

    ``problem``: a pattern in what the trial says. None: it passes, because it ends, and vLLM or the first prompt
    reports what is wrong. ``source``: the advisory after which it is made, else the sort of attack.
    """

    name: str
    source: str
    change: Change
    problem: str | None
    quick: bool = True
    """False: the trial uses up its limits, which takes seconds."""


def template(text: str) -> Change:
    """A chat template."""

    def change(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": text}))
        (folder / "chat_template.jinja").write_text(text)

    return change


def tokenizer(**changed: Any) -> Change:
    """The fields of a ``tokenizer.json`` changed."""

    def change(folder: Path) -> None:
        file = folder / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

    return change


def settings(**changed: Any) -> Change:
    """The fields of a ``tokenizer_config.json`` changed."""

    def change(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

    return change


def text(name: str, content: str) -> Change:
    """A file with this content."""
    return lambda folder: (folder / name).write_text(content)


LOOP: Final = "{% for a in range(99999) %}{% for b in range(99999) %}{{ range(99999) | sum }}{% endfor %}{% endfor %}"
TIME, MEMORY = "more than 1 s of processor time", "GiB of memory|more than 1 s of processor time"
_TOUCH: Final = "import pathlib; pathlib.Path('executed').touch()"


def _slow(name: str, source: str, change: Change, problem: str) -> HostileTokenizer:
    return HostileTokenizer(name, source, change, problem, quick=False)


def _loop(name: str, condition: str, *, quick: bool = False) -> HostileTokenizer:
    change = template(f"{{% if {condition} %}}{LOOP}{{% endif %}}x")
    return HostileTokenizer(f"a loop {name}", "GHSA-6fvq-23cw-5628", change, TIME, quick)


def _passes(name: str, source: str, change: Change) -> HostileTokenizer:
    return HostileTokenizer(name, source, change, None)


TEMPLATES = [
    _loop("for every chat", "true"),
    _loop("for tools", "tools"),
    _loop("for many messages", "messages | length > 9", quick=True),
    _loop("for a tool's answer", "messages[-1].role == 'tool'"),
    _loop("without add_generation_prompt", "not add_generation_prompt"),
    _loop("for an argument of the template", "enable_thinking is defined and not enable_thinking"),
    _loop("for documents", "documents"),
    _loop("for parts of a message", "messages[0].content is not string"),
    _loop("for a long message", "messages[0].content | length > 5000"),
    _slow("a macro that calls itself twice", "own: recursion", template("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}"), TIME),
    _slow("a number with 10^8 digits", "own: number", template("{% if messages | length > 9 %}{{ (9 ** (9 ** (messages | length))) % 7 }}{% endif %}"), TIME),
    HostileTokenizer("a text of 6 GB", "own: memory", template("{{ ('a' * 6000000000) | length }}"), MEMORY),
    _slow("a field 6 GB wide", "own: memory", template("{{ '%6000000000d' % 1 }}"), MEMORY),
    _slow("an output of gigabytes", "own: memory", template("{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}"), MEMORY),
    _slow("a list that doubles", "own: memory", template("{% set s = namespace(x=[1]) %}{% for a in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}"), MEMORY),
    HostileTokenizer("a template of 256 KiB and more", "GHSA-6fvq-23cw-5628", template("{{ 1 }}" * 40_000), "the template has 280,000 characters"),
    _passes("a template that calls itself without an end", "own: recursion", template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")),
    _passes("a template that breaks off", "own: form", template("{% for message in messages %}")),
    _passes("a template of 2000 brackets", "own: depth", template("{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}")),
    _passes("a template that refuses every chat", "own: form", template("{{ raise_exception('no') }}")),
    _passes("a template that reads classes", "CVE-2024-34359", template("{% for x in ().__class__.__base__.__subclasses__() %}{{ x()._module.__builtins__['exec'](\"" + _TOUCH + '") }}{% endfor %}')),
    _passes("a template that reads the globals of cycler", "CVE-2024-34359", template('{{ cycler.__init__.__globals__.__builtins__.exec("' + _TOUCH + '") }}')),
    _passes("a template that keeps format for later", "CVE-2024-56326", template("{% set f = '{0.__class__.__init__.__globals__}'.format %}{{ f(cycler) }}{{ [1] | map('string') | list }}")),
    _passes("a template that finds format by a filter", "CVE-2025-27516", template("{{ ('{0.__class__.__init__.__globals__}' | attr('format'))(cycler) }}")),
    _passes("a template that includes a file", "own: path", template("{% include '/etc/passwd' %}")),
    _passes("a template that imports a file", "own: path", template("{% import '/etc/passwd' as x %}{{ x }}")),
    _passes("a range of 10^9", "own: number", template("{% for a in range(1000000000) %}{% endfor %}")),
    _passes("a template that changes the messages", "own: side effect", template("{{ messages.append({}) }}{{ messages.clear() }}")),
]  # fmt: skip

TOKENIZERS = [
    _passes("a tokenizer that is no JSON", "own: form", text("tokenizer.json", "{")),
    _passes("a tokenizer of nothing", "own: form", text("tokenizer.json", "{}")),
    _passes("a tokenizer 100000 deep", "own: depth", text("tokenizer.json", "[" * 100_000)),
    _passes("a tokenizer of an unknown model", "own: type", tokenizer(model={"type": "os.system"})),
    _passes("a token of a number below 0", "own: number", tokenizer(added_tokens=[{"id": -1, "content": "x", "special": True}])),
    _passes("a token of the number 2^64", "own: number", tokenizer(added_tokens=[{"id": 2**64, "content": "x", "special": True}])),
    _passes("an invalid regular expression", "own: regex", tokenizer(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False})),
    _passes("settings of a class of code", "own: code", settings(tokenizer_class="os.system")),
    _passes("settings of a longest text of 10^400", "own: number", settings(model_max_length=10**400)),
    _passes("settings of code that is not allowed", "GHSA-8fr4-5q9j-m8gm", lambda folder: (settings(auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")(folder), text("own.py", _TOUCH)(folder))),
    _slow("a regular expression that backtracks", "own: regex", tokenizer(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a|aa|a?a)+(?<!a)$"}, "behavior": "Isolated", "invert": False}), TIME),
    _slow("300000 added tokens", "own: size", tokenizer(added_tokens=[{"id": 1000 + number, "content": f"<t{number}>", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False} for number in range(300_000)]), TIME),
]  # fmt: skip

ROWS = [*TEMPLATES, *TOKENIZERS]
