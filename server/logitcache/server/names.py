"""What to say about a label set name that nothing has: the near ones, else those that there are."""

import difflib

from logitcache.labels.errors import LabelSetNotFound, shown


def not_found(name: str, available: list[str]) -> LabelSetNotFound:
    """The error for a name that is not among those available; ``details["available"]`` lists them."""
    near = difflib.get_close_matches(name, available, n=3)
    if near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    elif available:
        hint = f"there is {shown(available)}"
    else:
        hint = "the store is empty: make one with `logitcache precompute`"
    return LabelSetNotFound(f"no label set {name!r}; {hint}", name=name, available=available)
