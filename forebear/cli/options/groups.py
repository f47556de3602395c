"""Groups of options: a dataclass of them is declared once, and a command takes it as one parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, get_annotations, isclass, signature
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

from typer.models import OptionInfo, ParameterInfo

Command = Callable[..., None]
OWN_PANEL = "Of this command"  # heading in the help for options that a command declares itself


class Options:
    """Base of the groups, which are frozen dataclasses; fields are annotated as typer's options, or are groups.

    Attributes:
        panel: Heading of the group's options in the help, given as ``class RowOptions(Options, panel="Rows")``.
    """

    panel: ClassVar[str] = OWN_PANEL

    def __init_subclass__(cls, *, panel: str | None = None) -> None:
        """Keep the heading; a subclass without one has its parent's."""
        if panel is not None:
            cls.panel = panel


@dataclass(frozen=True)
class Shown:
    """A default that the help describes in words, because its value is decided when the command runs.

    Attributes:
        words: What the help shows as the default.
        value: The value that the command gets by default.
    """

    words: str
    value: Any = None


def grouped(**defaults: Any) -> Callable[[Command], Command]:
    """Let typer see the fields of option groups as a command's own options.

    Each parameter of the command whose type is a group stands for the group's fields; the command gets the object.
    Other parameters are options as in any typer command. In the help, options stand under the headings of their
    groups: required options first, then the others, both in the order of the parameters.

    Args:
        defaults: Defaults of this command, by name of the field or parameter; a :class:`Shown` is described in words.
    """

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        parameters: list[Parameter] = []
        for name, parameter in signature(command).parameters.items():
            if _is_group(hints[name]):
                parameters += _options(hints[name], defaults)
            else:
                parameters.append(_option(name, hints[name], parameter.default, OWN_PANEL, defaults))
        parameters.sort(key=lambda parameter: parameter.default is not Parameter.empty)
        names = [parameter.name for parameter in parameters]
        assert len(set(names)) == len(names), f"{command.__name__}: an option stands in two groups"
        assert set(defaults) <= set(names), f"{command.__name__}: a default for an option that it has not"

        @wraps(command)
        def run(**given: Any) -> None:
            command(**{name: _value(name, kind, given) for name, kind in hints.items() if name != "return"})

        del run.__wrapped__
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def flag_of(group: type[Options], field: str) -> str:
    """The flag of a group's field, such as ``--words-top``."""
    (info,) = (
        annotation
        for annotation in get_args(get_type_hints(group, include_extras=True)[field])
        if _is_option(annotation)
    )
    flags = [info.default, *(info.param_decls or [])]  # typer takes an Annotated option's first flag for its default
    return next(flag for flag in flags if isinstance(flag, str))


def values_of(*groups: Options) -> dict[str, Any]:
    """The options of groups by name, those of groups within them too."""
    values: dict[str, Any] = {}
    for group in groups:
        for field in fields(group):  # type: ignore[arg-type]  # every group is a dataclass
            value = getattr(group, field.name)
            values |= values_of(value) if isinstance(value, Options) else {field.name: value}
    return values


def _is_group(kind: Any) -> bool:
    is_group = isclass(kind) and issubclass(kind, Options)
    assert is_group or not is_dataclass(kind), f"{kind} is no group of options: it does not extend Options"
    return is_group


def _is_option(annotation: Any) -> bool:
    return isinstance(annotation, OptionInfo)


def _options(group: type[Options], defaults: Mapping[str, Any]) -> Iterator[Parameter]:
    """A parameter for each option of a group; what a group adds comes before what it extends."""
    hints = get_type_hints(group, include_extras=True)
    declared: Any = group
    for field in sorted(fields(declared), key=lambda field: group.__mro__.index(_owner(group, field.name))):
        hint = hints[field.name]
        if _is_group(hint):
            yield from _options(hint, defaults)
            continue
        default = Parameter.empty if field.default is MISSING else field.default
        yield _option(field.name, hint, default, _owner(group, field.name).panel, defaults)


def _owner(group: type[Options], field: str) -> type[Options]:
    """The class that declares a field: the group or one that it extends."""
    return next(base for base in group.__mro__ if issubclass(base, Options) and field in get_annotations(base))


def _option(name: str, hint: Any, default: Any, panel: str, defaults: Mapping[str, Any]) -> Parameter:
    """A parameter as typer reads it, under the heading ``panel`` unless its declaration names another."""
    given = defaults.get(name, default)
    kind, *notes = get_args(hint) if get_args(hint) and hasattr(hint, "__metadata__") else (hint,)
    for i, note in enumerate(notes):
        if isinstance(note, ParameterInfo):
            notes[i] = info = copy(note)
            info.rich_help_panel = info.rich_help_panel or (panel if _is_option(info) else None)
            if isinstance(given, Shown):
                info.show_default = given.words
            elif name in defaults and info.show_default is not True:
                info.show_default = given is not None
    annotation = Annotated[(kind, *notes)] if notes else kind
    value = given.value if isinstance(given, Shown) else given
    return Parameter(name, Parameter.KEYWORD_ONLY, default=value, annotation=annotation)


def _value(name: str, kind: Any, given: Mapping[str, Any]) -> Any:
    """An option as given, or a group made of options."""
    if not _is_group(kind):
        return given[name]
    hints = get_type_hints(kind, include_extras=True)
    made: Any = kind
    return made(**{field.name: _value(field.name, hints[field.name], given) for field in fields(kind)})
