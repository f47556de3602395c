"""Groups of options: a dataclass of them is declared once, and a command takes it as one parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints

Command = Callable[..., None]


def grouped(**defaults: Any) -> Callable[[Command], Command]:
    """Let typer see the fields of option groups as a command's own options.

    Each parameter of the command whose type is a dataclass stands for the dataclass's fields, which are annotated as
    typer's options are, or are groups again; the command gets the object. Other parameters are options as ever. In the
    help, options that must be given come first, then the others, each in the order of the parameters.

    Args:
        defaults: Of this command, for fields of its groups, by field name.
    """

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        parameters: list[Parameter] = []
        for name, parameter in signature(command).parameters.items():
            if is_dataclass(hints[name]):
                parameters += _options(hints[name], defaults)
            else:
                parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))
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


def _options(group: Any, defaults: Mapping[str, Any]) -> Iterator[Parameter]:
    """A parameter for each option of a group."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from _options(hint, defaults)
            continue
        own = Parameter.empty if field.default is MISSING else field.default
        default = defaults.get(field.name, own)
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _value(name: str, kind: Any, given: Mapping[str, Any]) -> Any:
    """An option as given, or a group made of options."""
    if not is_dataclass(kind):
        return given[name]
    hints = get_type_hints(kind, include_extras=True)
    made: Any = kind
    return made(**{field.name: _value(field.name, hints[field.name], given) for field in fields(kind)})
