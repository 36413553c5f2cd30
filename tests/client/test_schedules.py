"""Schedules: which steps distil, the same for every rank and every run; nothing is fetched for the others."""

import json
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.client.faulty_server import FaultyServer
from tests.client.test_attach import Inputs, assert_labels_belong, loader_of
from torch import distributed
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader, DistributedSampler

from logitcache.client import Decay, EveryNth, FirstSteps, Labels, Schedule, WithProbability, connect, with_ids
from logitcache.labels.derived import derived, uniform
from logitcache.labels.errors import InvalidRequest, RowsMissing
from logitcache.labels.soft_labels import SoftLabels


@pytest.fixture
def labels(server: FaultyServer) -> Iterator[Labels]:
    with connect(server.url, retries=0) as connected:
        yield connected


def steps_of(schedule: Schedule, until: int = 20) -> list[int]:
    return [step for step in range(until) if schedule(step)]


def fetches(server: FaultyServer) -> int:
    return sum(path.endswith("/fetch") for path in server.requests)


def test_the_first_steps_distil_and_none_after_them() -> None:
    assert steps_of(FirstSteps(3)) == [0, 1, 2]
    assert steps_of(FirstSteps.fraction(0.21, of=10)) == [0, 1, 2]  # rounded up
    assert FirstSteps.fraction(1.0, of=7).steps == 7
    for fraction, of, steps in ((0.07, 100, 7), (0.55, 100, 55), (0.14, 50, 7), (1e-7, 10**8, 10)):
        assert FirstSteps.fraction(fraction, of=of).steps == steps  # of the decimal fraction that was written


def test_every_nth_step_distils_from_its_offset_on() -> None:
    assert steps_of(EveryNth(6)) == [0, 6, 12, 18]
    assert steps_of(EveryNth(6, offset=5)) == [5, 11, 17]
    assert steps_of(EveryNth(1)) == [*range(20)]


def test_a_probability_is_that_of_each_step_and_drawn_from_seed_and_step_alone() -> None:
    schedule = WithProbability(0.3, seed=7)
    drawn = steps_of(schedule, 20_000)
    assert abs(len(drawn) - 6000) < 5 * math.sqrt(20_000 * 0.3 * 0.7)
    pairs = sum(schedule(step) * schedule(step + 1) for step in range(20_000))
    assert abs(pairs - 1800) < 5 * math.sqrt(20_000 * 0.09 * 0.91)  # a step does not depend on the one before
    assert steps_of(WithProbability(0.3, seed=7), 20_000) == drawn
    assert steps_of(WithProbability(0.3, seed=8), 20_000) != drawn
    assert steps_of(WithProbability(1.0, seed=1)) == [*range(20)]


def test_numbers_that_are_derived_are_pinned() -> None:
    """Whoever resumes a run with a later version must draw what was drawn before."""
    assert derived(0) == 0xC77B3ABB6F87ACD9
    assert derived(7, 3) == derived(7 + 2**64, 3 - 2**64)
    assert derived(np.int64(-7), torch.tensor(3)) == derived(-7, 3)
    assert (derived(7, 3), derived(-1, 2**63)) == (8675069503831562643, 13411454656186895)
    assert 0.0 <= min(uniform(3, step) for step in range(10_000)) < 0.001
    assert 0.999 < max(uniform(3, step) for step in range(10_000)) < 1.0


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_decay_falls_from_one_to_where_it_stays(shape: Any) -> None:
    falling, kept = Decay(10, shape=shape), Decay(10, to=0.2, shape=shape)
    weights = [falling(step) for step in range(15)]
    assert weights[0] == kept(0) == 1.0
    assert weights[5] == pytest.approx(0.5)
    assert weights == sorted(weights, reverse=True)
    assert weights[10:] == [0.0] * 5
    assert kept(5) == pytest.approx(0.6)
    assert kept(1000) == pytest.approx(0.2)
    assert Decay(10, shape="cosine")(2) > Decay(10)(2)


def test_schedules_multiply() -> None:
    schedule = FirstSteps(9) * EveryNth(4) * Decay(10)
    assert [schedule(step) for step in (0, 1, 4, 8, 12)] == pytest.approx([1.0, 0.0, 0.6, 0.2, 0.0])
    assert repr(schedule) == "FirstSteps(steps=9) * EveryNth(n=4, offset=0) * Decay(steps=10, to=0.0, shape='linear')"
    assert schedule.ends == 9
    assert (EveryNth(2) * Decay(5, to=0.1)).ends is None
    again = pickle.loads(pickle.dumps(schedule))
    assert [again(step) for step in range(20)] == [schedule(step) for step in range(20)]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FirstSteps(0), r"steps=0.*at least 1"),
        (lambda: FirstSteps(True), r"steps=True.*whole number"),
        (lambda: FirstSteps.fraction(0.0, of=10), r"fraction\(0.0\).*above 0"),
        (lambda: FirstSteps.fraction(1.5, of=10), r"fraction\(1.5\).*up to 1"),
        (lambda: FirstSteps.fraction(math.nan, of=10), r"fraction\(nan\)"),
        (lambda: FirstSteps.fraction(0.5, of=0), r"of=0.*at least 1"),
        (lambda: EveryNth(0), r"n=0.*at least 1"),
        (lambda: EveryNth(3, offset=3), r"offset=3.*from 0 to 2"),
        (lambda: WithProbability(0.0, seed=1), r"\(0.0\).*above 0"),
        (lambda: WithProbability(1.1, seed=1), r"\(1.1\).*up to 1"),
        (lambda: Decay(0), r"steps=0.*at least 1"),
        (lambda: Decay(5, to=1.0), r"to=1.0"),
        (lambda: FirstSteps(3) * EveryNth(4, offset=3), r"EveryNth.*none of its first 3 steps"),
        (lambda: EveryNth(2) * EveryNth(2, offset=1), r"none of its first 100,000 steps"),
        (lambda: FirstSteps(10**12) * EveryNth(4) * EveryNth(4, offset=1), r"none of its first 100,000 steps"),
        (lambda: FirstSteps(1) * WithProbability(1e-9, seed=1), r"none of its first 1 steps"),
    ],
)
def test_a_schedule_that_cannot_be_or_never_distils_is_refused(make: Any, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        make()


def test_a_product_that_draws_lots_is_not_judged_by_its_first_steps() -> None:
    assert not any(WithProbability(1e-6, seed=1)(step) for step in range(100_000))
    for other in (Decay(100, to=0.1), FirstSteps(10**12)):
        assert (WithProbability(1e-6, seed=1) * other)(5) == 0


@pytest.mark.parametrize("depth", [0, 1, 3, None])
def test_steps_that_do_not_distil_fetch_nothing_and_the_others_get_their_labels(
    labels: Labels, server: FaultyServer, soft: SoftLabels, depth: int | None
) -> None:
    schedule = EveryNth(3)
    attached = labels.attach(loader_of(shuffle=True), ids="id", depth=depth, schedule=schedule)
    distilled = []
    for _epoch in range(2):
        for batch, found in attached:
            distilled.append(found is not None)
            if found is not None:
                assert_labels_belong(batch, found, soft)
    assert distilled == [schedule(step) > 0 for step in range(10)]
    assert fetches(server) == sum(distilled) == labels.stats.steps == 4
    assert attached.step == 10


def test_batches_that_are_accumulated_share_their_step_and_an_epoch_ends_one(labels: Labels) -> None:
    attached = labels.attach(loader_of(), ids="id", schedule=EveryNth(2), accumulate=2)
    for expected in ([True, True, False, False, True], [False, False, True, True, False]):
        assert [found is not None for _, found in attached] == expected  # steps 0 0 1 1 2, then 3 3 4 4 5
    assert attached.step == 5  # until the next epoch begins, the last one could go on
    iter(attached)
    assert attached.step == 6


def test_batches_that_were_pulled_and_not_delivered_do_not_count(labels: Labels) -> None:
    attached = labels.attach(loader_of(), ids="id", depth=4, schedule=FirstSteps(3))
    for count, _ in enumerate(attached, 1):
        if count == 2:
            break
    assert attached.step == 2
    assert [found is not None for _, found in attached] == [True, False, False, False, False]


def test_a_run_that_resumes_says_at_which_step(labels: Labels, server: FaultyServer) -> None:
    attached = labels.attach(loader_of(), ids="id", schedule=FirstSteps(3), first_step=2)
    assert [found is not None for _, found in attached] == [True, False, False, False, False]
    attached.step = 1
    assert [found is not None for _, found in attached] == [True, True, False, False, False]
    assert fetches(server) == 3
    with pytest.raises(InvalidRequest, match="first_step=-1 is below 0"):
        labels.attach(loader_of(), ids="id", first_step=-1)
    with pytest.raises(InvalidRequest, match="accumulate=0: at least 1"):
        labels.attach(loader_of(), ids="id", accumulate=0)


def test_a_step_is_not_set_while_batches_of_other_steps_are_pulled_already(labels: Labels) -> None:
    attached = labels.attach(loader_of(), ids="id", depth=2)
    steps = iter(attached)
    next(steps)
    with pytest.raises(InvalidRequest, match=r"step=100: \d batches .* already.*between epochs"):
        attached.step = 100
    assert attached.step == 1
    steps.close()  # type: ignore[attr-defined]
    attached.step = 100
    assert attached.step == 100


def test_an_error_of_a_fetch_comes_at_the_step_that_distils(labels: Labels) -> None:
    attached = labels.attach(loader_of(length=104), ids="id", schedule=EveryNth(5))
    steps = iter(attached)
    for _ in range(25):
        next(steps)
    with pytest.raises(RowsMissing):
        next(steps)  # step 25: ids 100 to 103 are unknown


def train(rank: int, ranks: int, url: str, folder: Path) -> None:
    """One rank: a model under DDP, distilling at some steps; what it did is written down."""
    options = {"init_method": (folder / "meeting").as_uri(), "rank": rank, "world_size": ranks}
    distributed.init_process_group("gloo", **options)  # type: ignore[arg-type]
    sampler: DistributedSampler[Any] = DistributedSampler(Inputs(80), ranks, rank)  # type: ignore[arg-type]
    loader: Any = DataLoader(with_ids(Inputs(80)), batch_size=4, sampler=sampler)
    student = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    distilled = []
    with connect(url, retries=0) as labels:
        attached = labels.attach(loader, ids="id", schedule=WithProbability(0.4, seed=11))
        for epoch in range(3):
            attached.set_epoch(epoch)
            for _batch, found in attached:
                distilled.append(found is not None)
                student(torch.ones(2, 4)).sum().backward()
        requests = labels.stats.requests - 1  # the first was for the description
    flags = torch.tensor(distilled)
    gathered = [torch.empty_like(flags) for _ in range(ranks)]
    distributed.all_gather(gathered, flags)
    agreed = all(torch.equal(flags, other) for other in gathered)
    told = {"distilled": distilled, "requests": requests, "agreed": agreed}
    (folder / f"{rank}.json").write_text(json.dumps(told))
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # threads of gloo and autograd that outlive an interpreter abort its process now and then


def test_two_ranks_distil_at_the_same_steps_and_fetch_nothing_at_others(server: FaultyServer, tmp_path: Path) -> None:
    spawn(train, (2, server.url, tmp_path), nprocs=2)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    schedule = WithProbability(0.4, seed=11)
    for rank in told:
        assert rank["distilled"] == [schedule(step) > 0 for step in range(30)]
        assert rank["requests"] == sum(rank["distilled"]) > 0
        assert rank["agreed"]
    assert fetches(server) == 2 * sum(told[0]["distilled"])
