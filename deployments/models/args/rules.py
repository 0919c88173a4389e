"""The kinds of values and rules that ``args.table`` consists of."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/\w[A-Za-z0-9._-]*)*", re.ASCII)
_REFS = re.compile(r"(?:refs|pr)/", re.IGNORECASE)
_INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


# --- what a value may be -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """A set of allowed values.

    ``allowed`` describes them for people. ``read`` returns the normalised value, or None if it is not allowed; it
    accepts any object and never raises. ``words`` are the values that are words, for suggestions.
    """

    allowed: str
    read: Callable[[object], JSON]
    words: tuple[str, ...] = ()


def _whole_number(value: object) -> int | None:
    """Return ``value`` as an int, else None. 50.0 counts (data frames write it so); true and "50" do not."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def whole(low: int, high: int = _INT32_MAX, *, also: Mapping[int | str, int] | None = None) -> Kind:
    """Return the kind of whole numbers from low to high, and of the words or numbers in ``also``, read as numbers."""
    others = also or {}

    def read(value: object) -> JSON:
        if isinstance(value, str):
            return others.get(value)
        number = _whole_number(value)
        if number is None:
            return None
        return number if low <= number <= high else others.get(number)

    upper = f"from {low} to {high}" if high < _INT32_MAX else f"of at least {low}"
    return Kind("".join([f"a whole number {upper}", *(f", or {word!r}" for word in others)]), read)


def number(low: float, high: float = math.inf, *, above: bool = False) -> Kind:
    """Return the kind of finite numbers (at most 64 bits) from low to high; ``above`` excludes low itself."""

    def read(value: object) -> JSON:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -INT64_MAX <= value <= INT64_MAX:
            return None
        return float(value) if low <= value <= high and not (above and value == low) else None

    lower = f"above {low:g}" if above else f"of at least {low:g}"
    return Kind(f"a number {lower}" if high == math.inf else f"a number {lower} and at most {high:g}", read)


def one_of(*words: str, aliases: Mapping[str, str] | None = None) -> Kind:
    """Return the kind of these words, and of aliases, each of which is read as its word."""
    spellings = {word: word for word in words} | dict(aliases or {})

    def read(value: object) -> JSON:
        return spellings.get(value) if isinstance(value, str) else None

    return Kind("one of " + ", ".join(spellings), read, tuple(spellings))


_finite = number(-math.inf).read


def _read_flag(value: object) -> JSON:
    return value if isinstance(value, bool) else None


def _read_ids(value: object) -> JSON:
    numbers = [_whole_number(item) for item in (value if isinstance(value, list) else [value])]
    ids: list[JSON] = [item for item in numbers if item is not None and 0 <= item <= _INT32_MAX]
    return ids if ids and len(ids) == len(numbers) else None


def _read_texts(most: int) -> Callable[[object], JSON]:
    def read(value: object) -> JSON:
        items = value if isinstance(value, list) else [value]
        texts: list[JSON] = [item for item in items if isinstance(item, str) and item]
        return texts if 0 < len(texts) == len(items) <= most else None

    return read


def _read_logit_bias(value: object) -> JSON:
    if not isinstance(value, dict) or not value:
        return None
    biases = {token: number(-100, 100).read(bias) for token, bias in value.items()}
    good = all(isinstance(token, str) and re.fullmatch(r"0|[1-9][0-9]{0,8}", token) for token in biases)
    return biases if good and None not in biases.values() else None


def _read_template_words(value: object) -> JSON:
    if not isinstance(value, dict) or not value or not all(isinstance(word, str) for word in value):
        return None
    # "chat_template" would replace the LLM's own template and so change what is measured.
    plain = all(isinstance(item, bool | str) or _finite(item) is not None for item in value.values())
    return dict(value) if plain and "chat_template" not in value else None


def _read_media(value: object) -> JSON:
    if not isinstance(value, dict) or not value or not value.keys() <= {"image", "video", "audio"}:
        return None
    limits = {medium: whole(0, 64).read(most) for medium, most in value.items()}
    return None if None in limits.values() else limits


def _read_revision(value: object) -> JSON:
    if not isinstance(value, str) or len(value) > 255:
        return None
    # Anyone may push to refs/pr/ of a public model. Git also reads pr/7 as refs/pr/7.
    return value if _REVISION.fullmatch(value) and not _REFS.match(value) and ".." not in value else None


FLAG = Kind("true or false", _read_flag)
TOKEN_IDS = Kind("a token id (a whole number of at least 0) or a list of them", _read_ids)
# vLLM's limits: VLLM_MAX_STOP_STRINGS and VLLM_MAX_NUM_BAD_WORDS. A bad word can become two token sequences.
STOP_TEXTS = Kind("a text that is not empty, or a list of 1 to 4 of them", _read_texts(4))
BAD_WORDS = Kind("a text that is not empty, or a list of 1 to 64 of them", _read_texts(64))
LOGIT_BIAS = Kind('an object of token ids in quotes and numbers from -100 to 100, like {"42": -100}', _read_logit_bias)
TEMPLATE_WORDS = Kind("an object of texts, numbers, true and false; not chat_template", _read_template_words)
MEDIA = Kind("an object with image, video or audio and a whole number from 0 to 64 for each", _read_media)
REVISION = Kind("a branch, a tag or a commit id, no pull request (refs/…)", _read_revision)
DTYPE = one_of(
    *("auto", "bfloat16", "float16", "float32"),
    aliases={"half": "float16", "float": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "float16"}
    | {"torch.half": "float16", "torch.float32": "float32", "torch.float": "float32"},
)
MAMBA_DTYPE = one_of("auto", "bfloat16", "float16", "float32")


# --- what becomes of a word --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mapped:
    """The word is passed to vLLM as ``to``.

    ``same_as_absent`` is a value that has no effect, if there is one. ``caveat`` is added to the note about the
    translation. ``chat_only``: only vLLM's chat endpoint supports it.
    """

    to: str
    kind: Kind
    same_as_absent: JSON = None
    caveat: str = ""
    chat_only: bool = False


@dataclass(frozen=True, slots=True)
class Dropped:
    """The word has no meaning on vLLM, for the reason in ``why``; the LLM answers as it would without it."""

    why: str


@dataclass(frozen=True, slots=True)
class Refused:
    """vLLM can't do it, or clients may not set it; ``why`` gives the reason and what to do instead.

    A value in ``neutral`` has no effect and is dropped; so is any value if ``unless`` (a word of vLLM) was given.
    """

    why: str
    neutral: tuple[JSON, ...] = ()
    unless: str = ""


Rule: TypeAlias = Mapped | Dropped | Refused


def own(kinds: Mapping[str, Kind], *, chat_only: bool = False) -> dict[str, Rule]:
    """Return rules for vLLM's words, which keep their names; "auto" is the same as leaving a word out."""
    return {
        word: Mapped(word, kind, same_as_absent="auto" if "auto" in kind.words else None, chat_only=chat_only)
        for word, kind in kinds.items()
    }


def dropped(why: str, *words: str) -> dict[str, Rule]:
    """Return a table of words that are dropped for the same reason."""
    return dict.fromkeys(words, Dropped(why))


def refused(why: str, *words: str, neutral: Iterable[JSON] = ()) -> dict[str, Rule]:
    """Return a table of words that are refused for the same reason; ``neutral``: values without effect."""
    return dict.fromkeys(words, Refused(why, tuple(neutral)))


def joined(*tables: Mapping[str, Rule]) -> dict[str, Rule]:
    """Return all tables as one; each word may be in one of them only."""
    table = {word: rule for part in tables for word, rule in part.items()}
    assert len(table) == sum(map(len, tables)), "a word has two rules"
    return table
