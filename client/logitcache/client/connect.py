"""`connect`: from the place of a label set to its labels. The rest is in `target` and `label_source`."""

from pathlib import Path

from logitcache.client.label_source import Labels
from logitcache.labels.identity import TeacherId


def connect(
    target: str | Path,
    *,
    digest: str | None = None,
    teacher: str | TeacherId | None = None,
    timeout_s: float = 60.0,
    retries: int | None = None,
) -> Labels:
    """The labels at ``target``, whose description is read and checked at once.

    Args:
        target: ``"http://HOST:PORT/NAME"``, or a label set's folder, which is read in this process.
        digest: the content to train on, of any generation that the label set has; every fetch is held to it, also when
            the label set grows. None takes the newest generation, and follows to a newer one between two fetches.
        teacher: who must have labelled: a `TeacherId`, or its name or the digest of its weights.
        timeout_s: total seconds that one call may take, retries included.
        retries: attempts after the first; None means as many as fit into ``timeout_s``, 0 none. They bridge a server
            that goes away and comes back.

    Raises:
        LabelSetNotFound: nothing of that name is there.
        DigestChanged, TeacherMismatch: it is not the label set that you mean.
        InvalidRequest: the target is neither a URL with a name nor a path.
        DeadlineExceeded: nobody answered in time; chained to the last error, such as `ServerUnreachable`.
    """
    return Labels(target, digest=digest, teacher=teacher, timeout_s=timeout_s, retries=retries).open()
