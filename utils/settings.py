"""Settings of classes as flags: what a class takes besides its data is a flag by itself, and reaches it again.

A registry is a plain dict, name -> class. A setting is an annotated keyword of the class's __init__:

    def __init__(self, channels, height, width, gem_grid: Annotated[int, "cells a side"] = 1)

becomes `--gem_grid` of that type, told in --help with its default; Literal["before", "after"] is a choice. Keywords
without Annotated are no flags. Two classes may share a setting: it is one flag, and each has its own default. The
fields of a dataclass are keywords, too.
"""

import argparse
import inspect
import typing


def settings_of(cls: type) -> dict[str, tuple]:
    """-> {name: (type, default, help)} of a class's settings, in the order of its __init__."""
    hints = typing.get_type_hints(cls.__init__, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        hint = hints.get(name)
        if typing.get_origin(hint) is typing.Annotated:
            kind, text = typing.get_args(hint)[:2]
            if type(None) in typing.get_args(kind):  # int | None -> int
                kind = next(each for each in typing.get_args(kind) if each is not type(None))
            found[name] = (kind, parameter.default, text)
    return found


def add_settings(group: argparse._ActionsContainer, registry: dict[str, type], **defaults) -> None:
    """Adds a flag for every setting of the registry's classes, with other defaults where given.

    Where several classes share one and it is not given, its value is None: each class has its own default.
    """
    flags = {}
    for choice, cls in registry.items():
        for name, (kind, default, text) in settings_of(cls).items():
            known, uses = flags.setdefault(name, (kind, []))
            if known is not kind:
                raise TypeError(f"--{name} is {known} for one class and {kind} for {cls.__name__}")
            uses.append((choice, text, default))
    for name, (kind, uses) in flags.items():
        choices = typing.get_args(kind) or None
        (choice, text, default), *others = uses
        if others:
            default, text = None, "; ".join(f"{choice}: {text} (default: {default})" for choice, text, default in uses)
        elif len(registry) > 1:
            text = f"{choice}: {text}"
        default, kind = defaults.get(name, default), type(choices[0]) if choices else kind
        group.add_argument(f"--{name}", type=kind, choices=choices, default=default, help=text)


def chosen_settings(args: argparse.Namespace, cls: type) -> dict:
    """Parsed flags -> {name: value} for cls: what was given, and the class's own defaults."""
    given = {name: getattr(args, name, None) for name in settings_of(cls)}
    return {name: default if given[name] is None else given[name] for name, (_, default, _) in settings_of(cls).items()}


def require_at_least(least: float, **settings: float | None) -> None:
    """ValueError at the first setting that is less; None is a default, which fits."""
    for name, value in settings.items():
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: must be at least {least}")


def make(cls: type, settings: dict, **known) -> object:
    """cls(**settings), with those of the `known` values that its __init__ takes."""
    taken = inspect.signature(cls.__init__).parameters
    return cls(**{name: value for name, value in known.items() if name in taken}, **settings)
