"""Groups of options: a dataclass of them is declared once, and a command takes it as one parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints

Command = Callable[..., None]


def grouped(**defaults: Any) -> Callable[[Command], Command]:
    """Let typer see the fields of option groups as a command's own options.

    Each parameter of the command whose type is a dataclass stands for the dataclass's fields, which are annotated as
    typer's options are; the command gets the object. Other parameters are options as ever. In the help, options that
    must be given come first, then the others, each in the order of the parameters.

    Args:
        defaults: Of this command, for fields of its groups, by field name.
    """

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
        parameters: list[Parameter] = []
        for name, parameter in signature(command).parameters.items():
            if name not in groups:
                parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))
                continue
            of_fields = get_type_hints(groups[name], include_extras=True)
            for field in fields(groups[name]):
                own = Parameter.empty if field.default is MISSING else field.default
                default = defaults.get(field.name, own)
                parameters.append(
                    Parameter(
                        field.name, Parameter.KEYWORD_ONLY, default=default, annotation=of_fields[field.name]
                    )
                )  # fmt: skip
        parameters.sort(key=lambda parameter: parameter.default is not Parameter.empty)
        names = [parameter.name for parameter in parameters]
        assert len(set(names)) == len(names), f"{command.__name__}: an option stands in two groups"
        assert set(defaults) <= set(names), f"{command.__name__}: a default for an option that it has not"

        @wraps(command)
        def run(**given: Any) -> None:
            made = {
                name: kind(**{field.name: given.pop(field.name) for field in fields(kind)})
                for name, kind in groups.items()
            }
            command(**made, **given)

        del run.__wrapped__
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
