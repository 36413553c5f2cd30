"""What to say about a name that nothing has: the near ones, else those that there are."""

import difflib
from collections.abc import Iterable

from logitcache.labels.errors import LabelSetNotFound, NotRegistered, shown


def not_found(name: str, available: list[str]) -> LabelSetNotFound:
    """The error for a name that is not among those available; ``details["available"]`` lists them."""
    hint = near_or_all(name, available) or "the store is empty: make one with `logitcache precompute`"
    return LabelSetNotFound(f"no label set {name!r}; {hint}", name=name, available=available)


def not_registered(role: str, name: str, available: list[str]) -> NotRegistered:
    """The error for a teacher or dataset that the configuration lacks; ``details["available"]`` lists those it has."""
    hint = near_or_all(name, available) or f"no {role} is"
    return NotRegistered(
        f"no {role} {name[:80]!r} is registered in the server's configuration, as [{role}s.NAME]; {hint}",
        available=available,
    )


def near_or_all(name: str, available: Iterable[str]) -> str:
    """``did you mean 'this'?``, else ``there is 'one', 'another'``, else nothing when there is none."""
    available = list(available)
    near = difflib.get_close_matches(name[:80], available, n=3)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"there is {shown(available)}" if available else ""
