"""Ensembles: several teachers as one, whose distribution is the mean of theirs.

The mean is taken of probabilities at temperature 1, in float32: ``log(mean(softmax(logits)))`` are the ensemble's
logits, so that what is stored of them is what would be stored of any teacher. Labels that are stored already cannot be
averaged: their stored classes differ.
"""

import hashlib
import math
from collections.abc import Sequence

import torch

from logitcache.labels.errors import InvalidRequest, TeacherFault
from logitcache.labels.identity import TeacherId, canonical_json
from logitcache.server.labelling.batches import Batch
from logitcache.server.labelling.teachers import Teacher, load_teacher


class Ensemble(Teacher):
    """The mean of several teachers on one device; their order does not matter.

    Raises:
        InvalidRequest: two of them are the same teacher.
    """

    def __init__(self, members: Sequence[Teacher]) -> None:
        self._members = sorted(members, key=_key)
        for one, next_one in zip(self._members, self._members[1:], strict=False):
            if one.id == next_one.id:
                raise InvalidRequest(f"the teacher {one.id.name!r} is given twice: an ensemble takes each teacher once")
        self.id = _id([member.id for member in self._members])
        self.device = members[0].device
        self.dtype = ", ".join(dict.fromkeys(member.dtype for member in self._members))

    def logits(self, batch: Batch, classes: int | None) -> torch.Tensor:
        """See `Teacher.logits`; float32, normalised: the logarithms of the mean probabilities.

        Raises:
            TeacherFault: as there, naming the member; or its classes are not as many as the others'.
        """
        first, *others = self._members
        with torch.inference_mode():
            total = _asked(first, batch, classes).float().log_softmax(-1)
            for member in others:
                logits = _asked(member, batch, total.shape[-1])
                torch.logaddexp(total, logits.float().log_softmax(-1), out=total)
            return total.sub_(math.log(len(self._members)))


def _asked(member: Teacher, batch: Batch, classes: int | None) -> torch.Tensor:
    try:
        return member.logits(batch, classes)
    except TeacherFault as fault:
        raise TeacherFault(f"of the ensemble, {member.id.name!r}: {fault.message}", **fault.details) from fault


def load_teachers(specs: Sequence[str], device: str | None) -> Teacher:
    """The teacher that these SPECs name: one alone, or the mean of several.

    Raises:
        SpecNotFound, TeacherFault, InvalidRequest: as `load_teacher`, or one is given twice.
    """
    members = [load_teacher(spec, device) for spec in specs]
    return members[0] if len(members) == 1 else Ensemble(members)


def _key(teacher: Teacher) -> tuple[str, str, str]:
    return teacher.id.name, teacher.id.weights, teacher.id.preprocessing


def _id(ids: Sequence[TeacherId]) -> TeacherId:
    """Names in words, and one digest over what the members' ids say, preprocessing included."""
    content = canonical_json([[id.name, id.weights, id.preprocessing] for id in ids])
    preprocessing = hashlib.sha256(canonical_json([id.preprocessing for id in ids])).hexdigest()
    return TeacherId(
        f"mean of {', '.join(id.name for id in ids)}",
        f"sha256:{hashlib.sha256(content).hexdigest()}",
        f"sha256:{preprocessing}" if any(id.preprocessing for id in ids) else "",
    )
