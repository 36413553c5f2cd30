"""`connect`: from the place of a label set to its labels, or from several places to those of several teachers.

The rest is in `target`, `label_source` and `several`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, overload

from logitcache.client.label_source import Labels
from logitcache.client.several import Combine, Member, Route, SeveralLabels
from logitcache.client.target import parse_target
from logitcache.labels.errors import InvalidRequest
from logitcache.labels.identity import TeacherId


@overload
def connect(
    target: str | Path,
    *,
    digest: str | None = None,
    teacher: str | TeacherId | None = None,
    timeout_s: float = 60.0,
    retries: int | None = None,
    key: str | None = None,
) -> Labels: ...


@overload
def connect(
    target: Sequence[str | Path],
    *,
    combine: Combine,
    seed: int = 0,
    route: Route | None = None,
    digest: Sequence[str | None] | None = None,
    teacher: Sequence[str | TeacherId | None] | None = None,
    timeout_s: float = 60.0,
    retries: int | None = None,
    key: str | None = None,
) -> SeveralLabels: ...


def connect(
    target: Any,
    *,
    combine: Any = None,
    seed: int = 0,
    route: Route | None = None,
    digest: Any = None,
    teacher: Any = None,
    timeout_s: float = 60.0,
    retries: int | None = None,
    key: str | None = None,
) -> Any:
    """The labels at ``target``, whose description is read and checked at once.

    Of a list of targets, the label sets that several teachers made of the same examples. Their rows may differ in k,
    dtype and temperatures, unless they are routed; they must agree in ids, number of examples, classes, views and
    alignment. Where ids are ordinals, some examples are compared as well: a data set in another order is refused.

    Args:
        target: ``"http://HOST:PORT/NAME"``, or a label set's folder, which is read in this process. Or a list of at
            least two of them.
        combine: of a list, what is made of its teachers: ``"random"`` asks one a step of the optimizer (as in
            arXiv 2211.00683), ``"mean"`` all of them, for the mean of their losses, ``"routed"`` one an example.
        seed: with ``"random"``: it and the step alone decide who is asked.
        route: with ``"routed"``: a function from ids, an int64 array or a list of texts, to the numbers of their
            teachers, counted from 0 in the order of the list. It must depend on the ids alone.
        digest: the content to train on, of any generation that the label set has; every fetch is held to it, also when
            the label set grows. None takes the newest generation, and follows to a newer one between two fetches. Of a
            list, one for each target.
        teacher: who must have labelled: a `TeacherId`, or its name or the digest of its weights. Of a list, one for
            each target.
        timeout_s: total seconds that one call may take, retries included; of a list, that each label set may take.
        retries: attempts after the first; None means as many as fit into ``timeout_s``, 0 none. They bridge a server
            that goes away and comes back.
        key: of the server, if it wants one; else that of the environment's ``LOGITCACHE_KEY``. It is sent as it is, so
            use https where others can listen.

    Raises:
        KeyRefused, ScopeTooSmall: the server wants a key, or one that may do more.
        LabelSetNotFound: nothing of that name is there.
        DigestChanged, TeacherMismatch: it is not the label set that you mean.
        InvalidRequest: the target is neither a URL with a name nor a path; or several do not belong together.
        LabelMismatch: several teachers were shown other inputs under the same ordinals.
        DeadlineExceeded: nobody answered in time; chained to the last error, such as `ServerUnreachable`.
    """
    if not isinstance(target, list | tuple):
        if combine is not None or route is not None:
            raise InvalidRequest("combine and route are for several teachers: give a list of their targets")
        return Labels(target, digest=digest, teacher=teacher, timeout_s=timeout_s, retries=retries, key=key).open()
    if combine not in get_args(Combine):
        raise InvalidRequest(
            f"combine={combine!r} is not known: several teachers are asked one a step ('random'), all for the mean "
            "of their losses ('mean'), or one an example ('routed')"
        )
    if len(target) < 2:
        raise InvalidRequest(f"{len(target)} targets in a list: give at least two, or the target itself")
    if (combine == "routed") != callable(route):
        raise InvalidRequest(
            "route is a function that says which teacher each example has: combine='routed' needs it, the others do not"
        )
    digests, teachers = (
        _one_each(name, value, len(target)) for name, value in (("digest", digest), ("teacher", teacher))
    )
    members = [
        Member(
            str(parse_target(each)),
            Labels(each, digest=pin, teacher=who, timeout_s=timeout_s, retries=retries, key=key),
        )
        for each, pin, who in zip(target, digests, teachers, strict=True)
    ]
    return SeveralLabels(members, combine=combine, seed=seed, route=route).open()


def _one_each(name: str, values: Any, targets: int) -> Sequence[Any]:
    """What is expected of each target; None expects nothing of any."""
    if values is None:
        return [None] * targets
    if not isinstance(values, list | tuple) or len(values) != targets:
        raise InvalidRequest(f"{name}={values!r} is not a list of {targets}, one for each target, None for none")
    return values
