"""What a fetch asks for: arguments that can be right, whatever is stored. Knows no files."""

from typing import Any, NamedTuple

from logitcache.labels.errors import InvalidRequest
from logitcache.labels.identity import Identity
from logitcache.labels.ids import Ids, as_ids, check_kind
from logitcache.labels.label_set import Limits
from logitcache.labels.ranges import Ranges, as_ranges
from logitcache.labels.soft_labels import RowSpec
from logitcache.labels.views import Views, as_views


class Asked(NamedTuple):
    """A fetch whose arguments can be right; arguments as in `labels.label_set.LabelSet.fetch`."""

    ids: Ids
    ranges: Ranges | None
    view: Views
    digest: str | None
    masked: bool
    limits: tuple[Limits, ...]


def asked_for(
    name: str,
    identity: Identity,
    spec: RowSpec,
    limits: tuple[Limits, ...],
    ids: Any,
    rows: Any,
    view: Any,
    digest: str | None,
    on_missing: str,
) -> Asked:
    """The arguments of a fetch from the label set of this name and identity, checked.

    Raises:
        InvalidIds, UnknownView, ShapeMismatch, InvalidRequest, TooManyRows: one cannot be right.
    """
    wanted = as_ids(ids)
    check_kind(wanted, identity.ids, name)
    for each in limits:
        each.check(spec, len(wanted), rows=0)
    chosen = as_views(view, wanted, identity.views, name)
    if on_missing not in ("error", "mask"):
        raise InvalidRequest(f"on_missing is {on_missing!r}; it can be 'error' or 'mask'")
    if rows is not None and not spec.ragged:
        raise InvalidRequest(f"rows={rows!r:.40}: each example of {name!r} has one row; ask for no range")
    ranges = None if rows is None else as_ranges(rows, len(wanted))
    return Asked(wanted, ranges, chosen, digest, on_missing == "mask", limits)
