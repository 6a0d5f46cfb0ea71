"""One-line errors for names a user got wrong."""

import difflib
from collections.abc import Iterable


def unknown_name(what: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for an unknown `name`: it says the nearest known names, or all of them when they are few."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif len(known) <= 12:
        hint = f"known: {', '.join(known)}"
    else:
        hint = f"{len(known)} names are known and none is close"
    return ValueError(f"unknown {what} '{name}': {hint}")


def choose(what: str, name: str, known: Iterable[str]) -> str:
    """Return `name` if it is among `known`, else raise the error of `unknown_name`."""
    known = tuple(known)
    if name not in known:
        raise unknown_name(what, name, known)
    return name
