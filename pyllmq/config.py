"""Settings of a compression method: a frozen dataclass whose fields say what they allow, and what the command line offers."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from types import MappingProxyType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Between:
    """The range of a number, for `Annotated[float, Between(0, 1)]`."""

    low: float
    high: float = math.inf


@dataclass(frozen=True)
class Word:
    """The option of a field where that is not the field's name, for `Annotated[int, Word("tune")]`."""

    word: str


class MethodConfig:
    """Base of the settings of a method, which are a frozen dataclass.

    Each field says by its type what is allowed: bool, int, float (both with `Between`), str, tuple[int, ...], `Literal`, or one of
    them or None. The string below a field is its help.
    """

    def __post_init__(self) -> None:
        """Raises ValueError for the first field that is not what its type says."""
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            if not _fits(kind, value):
                raise ValueError(f"{name} is {value!r}; allowed: {_allowed(kind)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; missing keys take their defaults.

        Raises:
            ValueError: unknown keys (the allowed ones are named), a missing one without a default, or a value out of range.
        """
        own = fields(cls)  # type: ignore[arg-type]
        allowed = [field.name for field in own]
        if unknown := sorted(set(values) - set(allowed), key=str):
            raise ValueError(
                f"{cls.__name__} does not know {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed)}"
            )
        missing = [
            f.name for f in own if f.default is MISSING and f.default_factory is MISSING and f.name not in values
        ]
        if missing:
            raise ValueError(f"{cls.__name__} needs {', '.join(map(repr, missing))}, given: {sorted(values)}")
        return cls(**values)


def _parts(kind: Any) -> tuple[Any, Between, bool]:
    """(the type itself, its range, whether None is allowed)."""
    limits, optional = Between(-math.inf), False
    while True:
        if get_origin(kind) is Annotated:
            kind, *notes = get_args(kind)
            limits = next((note for note in notes if isinstance(note, Between)), limits)
        elif get_origin(kind) in (Union, UnionType):
            optional = True
            (kind,) = (part for part in get_args(kind) if part is not type(None))
        else:
            return kind, limits, optional


def _fits(kind: Any, value: Any) -> bool:
    kind, limits, optional = _parts(kind)
    if value is None:
        return optional
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(get_args(kind)[0], item) for item in value)
    if isinstance(value, bool) and kind is not bool:
        return False
    if kind in (int, float):
        whole = isinstance(value, int | float if kind is float else int)
        return whole and limits.low <= value <= limits.high and not math.isinf(value)
    return not isinstance(kind, type) or isinstance(value, kind)


def _allowed(kind: Any) -> str:
    kind, limits, optional = _parts(kind)
    if get_origin(kind) is Literal:
        text = ", ".join(map(repr, get_args(kind)))
        return f"None, {text}" if optional else text
    if kind is bool:
        text = "True, False"
    elif get_origin(kind) is tuple:
        text = f"a tuple, each {_allowed(get_args(kind)[0])}"
    elif kind is int:
        text = f">= {limits.low:g}" if math.isinf(limits.high) else f"from {limits.low:g} to {limits.high:g}"
        text = f"an integer {text}"
    elif kind is float:
        infinite = math.isinf(limits.high)
        text = f"a number, finite and >= {limits.low:g}" if infinite else f"a number, {limits.low:g} to {limits.high:g}"
    else:
        return f"None or a {kind.__name__}" if optional else f"a {kind.__name__}"
    return f"{text}, or None" if optional else text


# ---- what the command line offers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """An option of the command line that sets `field`; `values`: bool (a switch), int, float, str or tuple[int, ...]."""

    word: str
    field: str
    values: Any
    help: str
    metavar: str = ""
    switch_to: bool = True

    def parse(self, text: str) -> Any:
        """Raises ValueError for text that is no such value. Which values are allowed is the config's business."""
        several = get_origin(self.values) is tuple
        kind = get_args(self.values)[0] if several else self.values
        try:
            found = [kind(float(part) if kind is int else part) for part in (text.split(",") if several else [text])]
            if kind is int and any(float(part) != number for part, number in zip(text.split(","), found, strict=True)):
                raise ValueError(f"{text} is no integer")
        except ValueError as error:
            what = {int: "an integer", float: "a number"}[kind]
            each = "integers separated by commas" if several else what
            raise ValueError(f"{self.word} is {text!r}; give {each}: {self.help}") from error
        return tuple(found) if several else found[0]


def options_of(
    config: type, without: Collection[str] = (), defaults: Mapping[str, Any] = MappingProxyType({})
) -> list[Option]:
    """An option for each field of a config; `defaults` are of the command line alone. A switch has the one form that changes it."""
    helps, hints = _docstrings(config), get_type_hints(config, include_extras=True)
    found = []
    for field in fields(config):
        if field.name in without:
            continue
        kind, _, _ = _parts(hints[field.name])
        notes = get_args(hints[field.name])[1:] if get_origin(hints[field.name]) is Annotated else ()
        name = next((note.word for note in notes if isinstance(note, Word)), field.name.replace("_", "-"))
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        metavar = f"{{{','.join(choices)}}}" if choices else {int: "N", float: "X"}.get(kind, "TEXT")
        default = defaults.get(field.name, None if field.default is MISSING or kind is bool else field.default)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = helps.get(field.name, "").rstrip(".") + ("" if shown in (None, "") else f"; default {shown}")
        on = not (kind is bool and field.default is True)
        word = f"--{name}" if on else f"--no-{name}"
        text = text if on else f"without: {text}"
        found.append(Option(word, field.name, str if choices else kind, text, metavar, on))
    return found


def _docstrings(config: type) -> dict[str, str]:
    """Field -> the string below it in the source; nothing where there is no source."""
    found: dict[str, str] = {}
    for each in reversed(config.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        except (OSError, TypeError):
            continue
        assert isinstance(body, ast.ClassDef)
        for above, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(above.target, ast.Name):
                found[above.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found
