"""Servers that are killed while a run records or clients fetch: what was acknowledged stays, and no row is wrong.

The default suite kills a server four times; `make proof` kills it two hundred times.
"""

import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tests.e2e.recorded import (
    EXAMPLES,
    OPTIONS,
    TABLE,
    all_of,
    all_of_folder,
    batches,
    rows_of,
    served,
    undisturbed,
    whole,
)
from tests.e2e.test_kills import PROOF_KILLS

from logitcache.client import DeadlineExceeded, connect, record
from logitcache.client.recorder import Recorder
from logitcache.labels.errors import ServerUnreachable
from logitcache.labels.soft_labels import SoftLabels


def test_a_server_that_is_away_is_waited_for_and_then_told_and_nothing_is_lost(tmp_path: Path) -> None:
    with served(tmp_path / "store") as server:
        first = record(f"{server.url}/run-1", **OPTIONS, examples=EXAMPLES, timeout_s=2.0)
        first.add(range(100), TABLE[:100])
        first.flush()
        server.kill()
        first.add(range(100, 200), TABLE[100:200])
        with pytest.raises((DeadlineExceeded, ServerUnreachable), match=str(server.port)):
            first.flush()
        server.start()
        first.flush()
        with connect(f"{server.url}/run-1") as labels:
            assert labels.missing(range(EXAMPLES)) == list(range(200, EXAMPLES))
        first.close()
        with record(f"{server.url}/run-1", **OPTIONS, examples=EXAMPLES) as patient:
            server.kill()
            patient.add(range(200, EXAMPLES), TABLE[200:])
            back = threading.Timer(0.3, server.start)
            back.start()
            patient.flush()  # within its deadline the server is back
            back.join()
        assert patient.digest == whole(tmp_path)


class Client(threading.Thread):
    """Records all examples in random order, and knows which were acknowledged."""

    def __init__(self, recorder: Recorder, examples: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.recorder, self.examples, self.seed = recorder, examples, seed
        self.acknowledged: list[np.ndarray] = []
        self.go_on = threading.Semaphore(0)
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for batch in batches(self.seed, 256, self.examples):
                self.recorder.add(batch, rows_of(batch), step=1)
                self.recorder.flush()
                self.acknowledged.append(batch)
        except BaseException as error:
            self.error = error


def killed(tmp_path: Path, examples: int, kills: int, seed: int) -> list[int]:
    """Kill a server at random moments of a recording's progress: how many batches were acknowledged at each kill."""
    rng, found = random.Random(seed), []
    total = len(batches(seed, 256, examples))
    expected = all_of_folder(tmp_path / "expected", examples)
    digest = undisturbed(tmp_path / "other" / "run-1", examples, seed + 2)
    assert digest == expected[1]
    with served(tmp_path / "store") as server:
        recorder = record(f"{server.url}/run-1", **OPTIONS, examples=examples, timeout_s=120)
        client = Client(recorder, examples, seed)
        client.start()
        for part in range(kills):
            after = rng.randrange(part * total // kills, (part + 1) * total // kills)
            while client.is_alive() and len(client.acknowledged) < after:
                time.sleep(0.0005)
            deadline = time.perf_counter() + rng.uniform(0, 0.01)
            while time.perf_counter() < deadline:
                pass
            server.kill()
            acknowledged = list(client.acknowledged)
            found.append(len(acknowledged))
            server.start()
            if acknowledged:
                ids = np.concatenate(acknowledged)
                soft = all_of(f"{server.url}/run-1", ids)
                for name in ("indices", "logits", "logit_max", "tail_logsumexp"):
                    kept = getattr(expected[0], name)[ids]
                    assert getattr(soft, name).tobytes() == kept.tobytes(), (part, name)
        client.join()
        assert client.error is None
        assert recorder.finish() == digest
        recorder.close()
    return found


def test_a_server_killed_while_a_run_records_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    killed(tmp_path, 20_000, 3, seed=7)


PROOF_SEED = 20262
"""Seed of the random moments, written down before the run."""


@pytest.mark.proof
@pytest.mark.timeout(7200)
def test_killed_at_random_moments_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    found = killed(tmp_path, 200_000, PROOF_KILLS, PROOF_SEED)
    assert len(set(found)) >= PROOF_KILLS * 4 // 5
    told = f"{PROOF_KILLS} kills, with {found} batches of 256 acknowledged"
    print(f"\nseed {PROOF_SEED}: {told}; the same digest as undisturbed")


LOAD_SEED = 20263
"""Seed of the random moments of a server under load, written down before the run."""


class Load(threading.Thread):
    """Fetches random batches until it is told to stop, and compares each with what was stored, bit for bit."""

    def __init__(self, url: str, expected: SoftLabels, seed: int) -> None:
        super().__init__(daemon=True)
        self.url, self.expected, self.seed = url, expected, seed
        self.fetched = 0
        self.stop = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        rng = np.random.default_rng(self.seed)
        try:
            with connect(self.url, digest=self.expected.digest, timeout_s=120) as labels:
                while not self.stop.is_set():
                    ids = rng.integers(0, len(self.expected.indices), 512)
                    soft = labels.fetch(ids)
                    for name in ("indices", "logits", "logit_max", "tail_logsumexp", "fingerprint"):
                        assert getattr(soft, name).tobytes() == getattr(self.expected, name)[ids].tobytes(), name
                    self.fetched += 1
        except BaseException as error:
            self.error = error


def killed_under_load(tmp_path: Path, kills: int, seed: int, clients: int = 4) -> list[int]:
    """Kill a server at random moments while several clients fetch: how many batches they had before each kill."""
    rng, found = random.Random(seed), []
    expected, digest = all_of_folder(tmp_path / "store", 100_000)
    with served(tmp_path / "store") as server:
        load = [Load(f"{server.url}/run-1", expected, seed + number) for number in range(clients)]
        for client in load:
            client.start()
        for _ in range(kills):
            before = sum(client.fetched for client in load)
            # A moment of the load, not of the clock.
            after = before + rng.randrange(1, 200)
            while sum(client.fetched for client in load) < after:
                assert [client.error for client in load if client.error] == []
                time.sleep(0.0005)
            server.kill()
            found.append(sum(client.fetched for client in load) - before)
            server.start()
        for client in load:
            client.stop.set()
        for client in load:
            client.join()
            assert client.error is None
        with connect(f"{server.url}/run-1") as labels:
            assert labels.describe().digest == digest
    return found


def test_a_server_killed_while_clients_fetch_gives_no_wrong_row_and_is_found_again(tmp_path: Path) -> None:
    assert len(killed_under_load(tmp_path, 1, seed=8)) == 1


@pytest.mark.proof
@pytest.mark.timeout(7200)
def test_a_server_killed_at_random_moments_under_load_gives_no_wrong_row(tmp_path: Path) -> None:
    found = killed_under_load(tmp_path, PROOF_KILLS, LOAD_SEED)
    told = f"{PROOF_KILLS} kills, {sum(found):,} batches of 512 rows fetched by 4 clients"
    print(f"\nseed {LOAD_SEED}: {told}, each the same bits; the same digest")
