"""Every error that logitcache raises on purpose, grouped by what you do next.

    LogitcacheError
    ├── NotFound                 you named something that is not there: check the name
    │   ├── LabelSetNotFound         no label set of that name in the store or on the server
    │   ├── StoreNotFound            the folder that should hold label sets does not exist
    │   ├── SpecNotFound             no such module, callable or file behind a teacher or dataset SPEC
    │   ├── NotRegistered            the server's configuration has no teacher or dataset of that name
    │   ├── JobNotFound              the server has no job of that id
    │   ├── HostNotFound             no host has the name in the address
    │   └── RowsMissing              some ids are unknown, or not labelled yet
    ├── InvalidRequest           an argument cannot be right: fix the call
    │   ├── InvalidName              not a legal label set name
    │   ├── InvalidIds               empty, of two kinds or another than the label set's, or beyond bounds
    │   ├── UnknownView              the label set has fewer views
    │   ├── RangeOutside             some examples have fewer rows than were asked for
    │   ├── UndeclaredTemperature    no tail was stored for that temperature
    │   ├── TooManyRows              above the limit of one request: split it
    │   ├── ShapeMismatch            two arrays disagree about rows, k or classes
    │   ├── RequestRefused           refused by HTTP itself: route, method, media type, body
    │   └── UntrustedServer          its certificate is refused, or it speaks no TLS
    ├── NotAllowed               the server does not let you: ask who runs it
    │   ├── KeyRefused               no key was sent, or none that the server knows
    │   └── ScopeTooSmall            the key may do less than this
    ├── WrongLabels              these labels are not the ones that you mean: do not train on them
    │   ├── DigestChanged            the digest you pinned is not what is served
    │   ├── TeacherMismatch          labelled by another teacher than you asked for
    │   ├── LabelMismatch            the inputs you hold are not the inputs the teacher was shown
    │   ├── IdentityChanged          a resumed precompute or recording differs from what began the label set
    │   ├── RecorderReplaced         another recorder took this one's place
    │   └── DatasetChanged           the dataset is not the one that was labelled, or changes while it is read
    ├── Unavailable              nothing is wrong with the call: try again later
    │   ├── ServerUnreachable        no connection, or it broke
    │   ├── ServerBusy               overloaded or shutting down
    │   ├── DeadlineExceeded         the total time you allowed is over
    │   ├── LabelSetLocked           another process is writing this label set
    │   └── JobKilled                a job's process ended before it was done and without a word
    ├── StorageFault             the disk or the bytes on it: look at the machine
    │   ├── NotALabelSet             a folder that logitcache did not write
    │   ├── NewerFormat              written by a newer logitcache: upgrade
    │   ├── StoreNotWritable         read-only or not permitted
    │   ├── DiskFull                 no space left, or too little to begin
    │   └── ShardDamaged             stored bytes do not match their commit
    ├── TeacherFault             the teacher raised, or returned what cannot be stored
    ├── DatasetFault             the dataset raised, or returned what cannot be labelled
    ├── MalformedMessage         bytes on the wire that do not follow the format
    ├── MissingExtra             a part that this installation was made without
    └── ServerFault              the server failed; its log knows more

``code`` is stable and is the same locally, in a response's problem+json and in the log. ``status`` is the HTTP status
that it travels under, ``retry`` says whether the same call can succeed later without a change.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

Id = int | str
"""An example's id."""

SHOWN = 3
"""How many offending ids, names or fields a message spells out; ``details`` holds them all."""


class LogitcacheError(Exception):
    """The root: catch it to catch everything that logitcache raises on purpose.

    ``details`` are JSON values that travel with the error over HTTP; ``request_id`` is set on what a server answered.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    retry: ClassVar[bool] = False

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = details
        self.request_id: str | None = None
        self.retry_after_s: float | None = None

    def __reduce__(self) -> Any:
        # Exceptions cross process borders (DataLoader workers): keyword details must survive pickling.
        return _rebuild, (type(self), self.message, self.details, self.request_id, self.retry_after_s)


def _rebuild(
    kind: type[LogitcacheError],
    message: str,
    details: dict[str, Any],
    request_id: str | None,
    retry_after_s: float | None,
) -> LogitcacheError:
    error = kind(message, **details)
    error.request_id, error.retry_after_s = request_id, retry_after_s
    return error


class NotFound(LogitcacheError):
    """You named something that is not there."""

    code, status = "not-found", 404


class LabelSetNotFound(NotFound):
    """Catch it to fall back to another label set, or to precompute this one."""

    code = "label-set-not-found"


class StoreNotFound(NotFound):
    """The folder that should hold label sets does not exist."""

    code = "store-not-found"


class SpecNotFound(NotFound):
    """A teacher or dataset SPEC names nothing that can be imported."""

    code = "spec-not-found"


class NotRegistered(NotFound):
    """The server's configuration registers no teacher or dataset of this name; ``details["available"]`` lists those."""

    code = "not-registered"


class JobNotFound(NotFound):
    """No job of this id was asked for on this store, or it ended so long ago that it was removed."""

    code = "job-not-found"


class HostNotFound(NotFound):
    """No host has the name in the address. Where one had it before, `ServerUnreachable` says that it is away."""

    code = "host-not-found"


class RowsMissing(NotFound):
    """Some of the ids asked for have no labels; nothing was returned for the others either.

    Catch it to label them, or ask with ``on_missing="mask"``.
    """

    code = "rows-missing"

    @property
    def unknown(self) -> list[Id]:
        """Ids that the label set does not contain, in the order asked for."""
        return list(self.details.get("unknown", []))

    @property
    def unlabelled(self) -> list[Id]:
        """Ids of the label set whose shard is not committed, or was withdrawn as damaged."""
        return list(self.details.get("unlabelled", []))

    @property
    def ids(self) -> list[Id]:
        """All ids without labels: the unknown ones, then the unlabelled ones."""
        return self.unknown + self.unlabelled


class InvalidRequest(LogitcacheError):
    """An argument cannot be right, whatever is stored."""

    code, status = "invalid-request", 422


class InvalidName(InvalidRequest):
    """A label set's name is 1 to 64 of ``a-z 0-9 . _ -`` and begins with a letter or digit."""

    code = "invalid-name"


class InvalidIds(InvalidRequest):
    """Ids are empty, of two kinds, of another kind than the label set's, or beyond 64 bits or 4,096 bytes."""

    code = "invalid-ids"


class UnknownView(InvalidRequest):
    """The label set has fewer views than asked for."""

    code = "unknown-view"


class RangeOutside(InvalidRequest):
    """A range of rows reaches beyond its example; ``ids`` names the examples."""

    code = "range-outside"

    @property
    def ids(self) -> list[Id]:
        """Ids of the examples that have fewer rows."""
        return list(self.details.get("ids", []))


class UndeclaredTemperature(InvalidRequest):
    """No tail was stored for this temperature, so the normaliser would be a guess."""

    code = "undeclared-temperature"


class TooManyRows(InvalidRequest):
    """One request asked for more than the label set's ``limits`` allow; the SDK splits by itself."""

    code, status = "too-many-rows", 413


class ShapeMismatch(InvalidRequest):
    """Two arrays that belong together disagree about rows, k or classes."""

    code = "shape-mismatch"


class RequestRefused(InvalidRequest):
    """HTTP itself refused: no such route, another method or media type, a body that does not parse."""

    code, status = "request-refused", 400


class UntrustedServer(InvalidRequest):
    """The server at an https address cannot prove that it is the one you mean; nothing was sent to it."""

    code = "untrusted-server"


class NotAllowed(LogitcacheError):
    """The server does not let you."""

    code, status = "not-allowed", 403


class KeyRefused(NotAllowed):
    """The server wants a key, and was sent none that it knows; keys are made with ``logitcache keys make``."""

    code, status = "key-refused", 401


class ScopeTooSmall(NotAllowed):
    """The key is known and may do less than this; ``details["needed"]`` is the scope that may."""

    code = "scope-too-small"


class WrongLabels(LogitcacheError):
    """Labels exist, but not those you mean. Do not train on them."""

    code, status = "wrong-labels", 409


class DigestChanged(WrongLabels):
    """The label set is not at the digest you pinned."""

    code = "digest-changed"


class TeacherMismatch(WrongLabels):
    """The label set was made by another teacher than you asked for."""

    code = "teacher-mismatch"


class LabelMismatch(WrongLabels):
    """The inputs you hold are not those that the teacher was shown; ``ids`` names the examples."""

    code = "label-mismatch"

    @property
    def ids(self) -> list[Id]:
        """Ids of the examples whose fingerprints differ."""
        return list(self.details.get("ids", []))


class IdentityChanged(WrongLabels):
    """A precompute would continue a label set that was begun with something else; ``details["fields"]`` says what."""

    code = "identity-changed"


class RecorderReplaced(WrongLabels):
    """Another recorder of the same rank began since; what this one has recorded is kept, and no more of it is taken."""

    code = "recorder-replaced"


class DatasetChanged(WrongLabels):
    """The dataset is not the one that was labelled, or gives other inputs each time it is read."""

    code = "dataset-changed"


class Unavailable(LogitcacheError):
    """The same call can succeed later."""

    code, status, retry = "unavailable", 503, True


class ServerUnreachable(Unavailable):
    """No connection to the server, or it broke on the way."""

    code = "server-unreachable"


class ServerBusy(Unavailable):
    """The server is overloaded, starting or shutting down."""

    code = "server-busy"


class DeadlineExceeded(Unavailable):
    """The total time allowed for the call, retries included, is over."""

    code, status = "deadline-exceeded", 504


class LabelSetLocked(Unavailable):
    """Another process is writing this label set."""

    code, status = "label-set-locked", 409


class JobKilled(Unavailable):
    """A job's process was killed, out of memory most often; ask again, and it goes on from what is committed."""

    code = "job-killed"


class StorageFault(LogitcacheError):
    """The disk, or the bytes on it."""

    code, status = "storage-fault", 500


class NotALabelSet(StorageFault):
    """A folder or Zarr group that logitcache did not write; it is left alone."""

    code = "not-a-label-set"


class NewerFormat(StorageFault):
    """Written by a newer logitcache than this one."""

    code = "newer-format"


class StoreNotWritable(StorageFault):
    """The store is read-only, or this user may not write to it."""

    code = "store-not-writable"


class DiskFull(StorageFault):
    """No space left, or too little to begin. What is committed is kept."""

    code, status = "disk-full", 507


class ShardDamaged(StorageFault):
    """Stored bytes do not match the hashes of their commit."""

    code = "shard-damaged"


class TeacherFault(LogitcacheError):
    """The teacher raised, or returned something that cannot be stored."""

    code, status = "teacher-fault", 422


class DatasetFault(LogitcacheError):
    """The dataset raised, or returned something that cannot be labelled."""

    code = "dataset-fault"


class MalformedMessage(LogitcacheError):
    """Bytes on the wire do not follow the format; nothing of them was used."""

    code, status = "malformed-message", 400


class MissingExtra(LogitcacheError):
    """This installation was made without a part that the call needs."""

    code = "missing-extra"


class ServerFault(LogitcacheError):
    """The server failed in a way it has no word for; give its ``request_id`` to whoever runs it."""

    code = "server-fault"


def _subclasses(kind: type[LogitcacheError]) -> Iterable[type[LogitcacheError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


_KINDS: list[type[LogitcacheError]] = [LogitcacheError, *_subclasses(LogitcacheError)]
BY_CODE: Mapping[str, type[LogitcacheError]] = {kind.code: kind for kind in _KINDS}
"""The one table between a ``code`` on the wire and a class to catch, used in both directions."""


def shown(values: Iterable[Any], total: int | None = None) -> str:
    """The first few values for a message, as ``3, 17, 20 and 5 more``."""
    values = list(values)
    total = len(values) if total is None else total
    text = ", ".join(repr(value) for value in values[:SHOWN])
    return text if total <= SHOWN else f"{text} and {total - SHOWN:,} more"
