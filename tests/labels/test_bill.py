"""The arithmetic of the bill, in round numbers, and what it says in words."""

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
from tests.client.rows import dense_logits, description, truncated

from logitcache.labels.bill import MOST, Bill, Served, TeacherTime, told
from logitcache.labels.errors import MalformedMessage
from logitcache.labels.label_set import Description

TEACHER = TeacherTime(90.0, 9000, "cpu")
"""10 ms a row."""


def test_each_row_served_saves_what_a_labelled_row_took() -> None:
    assert Bill(TEACHER, 27_000).saved_s == pytest.approx(270.0)
    assert Bill(TEACHER).saved_s == 0


@pytest.mark.parametrize(
    ("served", "fetch_s", "epochs"),
    [(9000, 9.0, 1 / 0.9), (100, 0.5, 2.0), (9000, 0.0, 1.0), (100, 1.0, math.inf), (100, 7.0, math.inf)],
)
def test_it_pays_for_itself_when_what_is_saved_covers_labelling_and_fetching(
    served: int, fetch_s: float, epochs: float
) -> None:
    assert Bill(TEACHER, served, fetch_s).epochs_to_pay == pytest.approx(epochs)


def test_at_the_epoch_told_it_has_paid_and_just_before_it_has_not() -> None:
    for served, is_paid in ((17_999, False), (18_000, True)):
        bill = Bill(TEACHER, served, fetch_s=0.005 * served)  # half of what a row saves
        assert bill.epochs_to_pay == pytest.approx(2)
        assert bill.is_paid is is_paid
    assert not Bill(TEACHER).is_paid
    assert Bill(TEACHER, 9000).is_paid


def test_while_fetching_costs_nobody_knows_what_no_epoch_is_told() -> None:
    for bill in (Bill(TEACHER), Bill(TEACHER, 0, 0.0), Bill(TEACHER, 9000)):
        assert bill.epochs_to_pay is None
        assert "itself" not in str(bill)


def test_shards_add_up_and_those_that_tell_nothing_are_left_out() -> None:
    times = [TeacherTime(1.5, 10, "cpu"), None, TeacherTime(2.5, 30, "H100"), TeacherTime(1.0, 10, "cpu")]
    assert TeacherTime.summed(times) == TeacherTime(5.0, 50, "H100, cpu")
    assert TeacherTime.summed([None]) is TeacherTime.summed([]) is None


def test_nothing_is_counted_beyond_the_most() -> None:
    most = Served(MOST - 1, MOST - 1.0).plus(10, 10.0)
    assert most == Served(MOST, float(MOST)) == Served.from_json(asdict(most))
    assert Served(1, 0.5).plus(2, 0.25) == Served(3, 0.75)


def test_a_teacher_that_labelled_no_row_costs_nothing_a_row() -> None:
    assert TeacherTime(0.0, 0, "cpu").seconds_a_row == 0
    assert Bill(TeacherTime(0.0, 5, "cpu"), 10, 0.1).epochs_to_pay == math.inf


@pytest.mark.parametrize(
    ("bill", "words"),
    [
        (Bill(TEACHER), "the teacher took 90 s on cpu for 9,000 rows, 10 ms a row, once"),
        (Bill(TEACHER, 1500), "once; 1,500 rows served would have taken it 15 s"),
        (
            Bill(TEACHER, 4500, 4.5),
            "4,500 rows served would have taken it 45 s, and took 4.5 s to fetch, 1 ms a row; "
            "the label set pays for itself after 1.11 passes over all rows",
        ),
        (Bill(TEACHER, 18_000, 18.0), "the label set paid for itself after 1.11 passes over all rows"),
        (Bill(TEACHER, 10, 1.0), "the label set never pays for itself: to fetch a row takes as long as to label it"),
    ],
)
def test_it_reads_as_a_sentence(bill: Bill, words: str) -> None:
    assert str(bill).endswith(words)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0 µs"),
        (4.44e-5, "44.4 µs"),
        (0.25, "250 ms"),
        (59.5, "59.5 s"),
        (150.0, "2.5 min"),
        (9000.0, "2.5 h"),
        (3600 * 999.6, "1,000 h"),
        (3600 * 12_345.0, "12,345 h"),
    ],
)
def test_a_time_has_the_unit_that_fits(seconds: float, words: str) -> None:
    assert told(seconds) == words


def described() -> Description:
    return replace(description(truncated(dense_logits(5, 10), 3)), teacher_time=TEACHER, served=Served(4500, 4.5))


def test_a_description_tells_the_teachers_time_and_one_of_an_older_server_does_not() -> None:
    value = json.loads(json.dumps(described().to_json()))
    assert value["teacher_time"] == {"seconds": 90.0, "rows": 9000, "device": "cpu"}
    assert Description.from_json(value) == described()
    del value["teacher_time"]
    assert Description.from_json(value) == replace(described(), teacher_time=None)
    assert Description.from_json(value | {"teacher_time": None}).teacher_time is None


def test_a_description_tells_what_was_served_and_one_of_an_older_server_does_not() -> None:
    value = json.loads(json.dumps(described().to_json()))
    assert value["served"] == {"rows": 4500, "seconds": 4.5}
    assert Description.from_json(value) == described()
    del value["served"]
    assert Description.from_json(value) == replace(described(), served=None)
    for other in ([1], "90 s", {"rows": 1}, {"rows": MOST + 1, "seconds": 1.0}, {"rows": 1, "seconds": math.nan}):
        with pytest.raises(MalformedMessage):
            Description.from_json(value | {"served": other})


def test_the_bill_of_a_description_is_of_what_was_served_and_none_without_the_teachers_time() -> None:
    assert described().bill == Bill(TEACHER, 4500, 4.5)
    assert replace(described(), served=None).bill == Bill(TEACHER, 0, 0.0)
    assert replace(described(), teacher_time=None).bill is None


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": -1.0},
        {"seconds": "1"},
        {"seconds": math.inf},
        {"seconds": 2**63},
        {"seconds": 1e308},
        {"seconds": math.nan},
        {"seconds": True},
        {"rows": 1.5},
        {"rows": -1},
        {"rows": 2**63},
        {"device": 3},
    ],
    ids=str,
)
def test_a_time_that_is_none_is_refused(change: dict[str, Any]) -> None:
    value = described().to_json()
    with pytest.raises(MalformedMessage):
        Description.from_json(value | {"teacher_time": value["teacher_time"] | change})
    for other in ([1], "90 s", {"seconds": 1.0}):
        with pytest.raises(MalformedMessage):
            Description.from_json(value | {"teacher_time": other})
