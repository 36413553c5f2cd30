"""Jobs over HTTP, with real precomputes in processes of their own: they wait, run, end, are cancelled, asked again."""

import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.job_site import GRACE_S, Asker, Site, until, watching, written

from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.server.jobs.job import Asked, JobDetail
from logitcache.server.jobs.process import COMMAND
from logitcache.server.jobs.queue import Jobs
from logitcache.storage import LocalLabelSet


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site.make(tmp_path_factory.mktemp("site"))
    yield site
    site.clear_away()


@pytest.fixture(scope="module")
def asker(site: Site) -> Iterator[Asker]:
    """A client of a server that runs jobs; a cancelled process is given half a second."""
    jobs = Jobs(site.store, site.config, grace_s=GRACE_S)
    with running(create_app(Catalog(site.store), jobs)) as url, Asker(url) as asker:
        yield asker


@pytest.fixture(autouse=True)
def _nothing_is_held(site: Site) -> Iterator[None]:
    yield
    for teacher in ("one", "two", "stubborn", "greedy", "segfault"):
        site.release(teacher)


@pytest.fixture(scope="module")
def undisturbed(asker: Asker) -> dict[str, Any]:
    """A job that ran to its end, and its digest."""
    return asker.until_ended(asker.ask("undisturbed"))


def test_a_job_labels_its_dataset_and_the_result_is_served(asker: Asker, undisturbed: dict[str, Any]) -> None:
    assert (undisturbed["state"], undisturbed["attempt"], undisturbed["error"]) == ("succeeded", 1, None)
    until(lambda: asker.http.get("/v1/label-sets/undisturbed").status_code == 200, "the label set to be noticed")
    described = asker.http.get("/v1/label-sets/undisturbed").json()
    assert described["digest"] == undisturbed["digest"] is not None
    assert described["identity"]["k"] == 3
    assert undisturbed["progress"] == undisturbed["progress"] | {"rows_done": 9000, "rows_total": 9000}
    assert any(line.startswith("undisturbed: 9,000 rows in 3 shards") for line in undisturbed["log"])
    assert undisturbed["created"] <= undisturbed["started"] <= undisturbed["ended"]


def test_asking_for_the_same_again_gives_the_same_job_and_runs_nothing(
    asker: Asker, undisturbed: dict[str, Any]
) -> None:
    answer = asker.post("undisturbed", temperatures=[1.0], dtype="float16")
    assert answer.status_code == 200
    assert answer.headers["Location"] == f"/v1/jobs/{undisturbed['id']}"
    assert asker.job(undisturbed["id"]) == undisturbed


def test_a_job_that_succeeded_runs_again_when_told_so_and_finds_nothing_left(asker: Asker) -> None:
    id = asker.ask("twice")
    first = asker.until_ended(id)
    assert asker.ask("twice", again=True) == id
    second = asker.until_ended(id)
    assert (second["state"], second["attempt"], second["digest"]) == ("succeeded", 2, first["digest"])
    assert second["log"].index("--- attempt 2") == len(first["log"])
    assert any("nothing left to label" in line for line in second["log"])


def test_jobs_on_one_device_run_one_after_the_other_and_those_on_two_side_by_side(asker: Asker, site: Site) -> None:
    site.hold("one")
    site.hold("two")
    first, second, beside = asker.ask("first"), asker.ask("second"), asker.ask("beside", "two")
    site.until_held("one")
    site.until_held("two")
    states = {id: asker.job(id)["state"] for id in (first, second, beside)}
    assert states == {first: "running", second: "queued", beside: "running"}
    assert asker.post("second").status_code == 200
    metrics = asker.http.get("/metrics").text.splitlines()
    assert 'logitcache_jobs{state="running"} 2.0' in metrics
    assert 'logitcache_jobs{state="queued"} 1.0' in metrics
    assert sum(line.startswith("logitcache_jobs{") for line in metrics) == 5
    progress = asker.job(first)["progress"]
    assert (progress["activity"], progress["rows_total"]) == ("labelling first", 9000)
    assert 0 <= progress["rows_done"] <= 4096
    site.release("one")
    site.release("two")
    ends = {id: asker.until_ended(id) for id in (first, second, beside)}
    assert {job["state"] for job in ends.values()} == {"succeeded"}
    assert ends[second]["started"] >= ends[first]["ended"]
    listed = [job["id"] for job in asker.http.get("/v1/jobs").json()]
    assert listed[:3] == [beside, second, first]


def test_cancelled_while_labelling_it_keeps_what_is_committed_and_goes_on_when_asked_again(
    asker: Asker, site: Site, undisturbed: dict[str, Any]
) -> None:
    site.hold("one")
    running, waiting = asker.ask("stopped"), asker.ask("never-began")
    site.until_held("one")
    process = site.process(running)
    assert asker.cancel(waiting)["state"] == "cancelled"
    assert asker.cancel(running)["stop_asked"] is not None
    stopped = asker.until_ended(running)
    assert (stopped["state"], stopped["error"]) == ("cancelled", None)
    assert not process.is_alive()
    assert site.shards("stopped") == 1
    assert not (site.store / "never-began").exists()
    assert asker.cancel(running) == stopped
    site.release("one")
    assert asker.ask("stopped") == running
    resumed = asker.until_ended(running)
    assert site.contents("stopped") == site.contents("undisturbed")
    assert (resumed["state"], resumed["attempt"], resumed["digest"]) == ("succeeded", 2, undisturbed["digest"])
    assert asker.cancel(running) == resumed


def test_cancelled_while_its_process_starts_it_leaves_nothing(asker: Asker, site: Site) -> None:
    id = asker.ask("early")
    asker.until(id, "running")
    asker.cancel(id)
    assert asker.until_ended(id)["state"] == "cancelled"
    assert site.shards("early") == 0


def test_a_process_that_does_not_stop_is_killed_after_its_grace(asker: Asker, site: Site) -> None:
    site.hold("stubborn")
    id = asker.ask("stubborn", "stubborn")
    site.until_held("stubborn")
    asker.cancel(id)
    killed = asker.until_ended(id)
    assert (killed["state"], [tried["signal"] for tried in killed["attempts"]]) == ("cancelled", ["SIGKILL"])
    assert site.shards("stubborn") == 1


def test_killed_as_when_memory_runs_out_it_is_tried_again_a_few_times_and_goes_on_when_asked_again(
    asker: Asker, site: Site
) -> None:
    site.hold("greedy")
    id = asker.ask("greedy", "greedy")
    killed = asker.until_ended(id)
    assert (killed["state"], killed["error"]["code"]) == ("failed", "job-killed")
    assert "memory" in killed["error"]["message"]
    # The first attempt committed a shard, and two more did not.
    attempts = [(tried["attempt"], tried["state"], tried["signal"]) for tried in killed["attempts"]]
    assert attempts == [(number, "failed", "SIGKILL") for number in (1, 2, 3)]
    assert "while labelling examples 4,096 to 4,351" in killed["attempts"][0]["error"]["message"]
    assert killed["log"][:2] == ["labelling greedy: 9,000 rows", "--- attempt 2"]
    assert site.shards("greedy") == 1
    site.release("greedy")
    assert asker.ask("greedy", "greedy") == id
    resumed = asker.until_ended(id)
    whole = asker.until_ended(asker.ask("never-killed", "greedy"))
    assert (resumed["state"], resumed["error"], resumed["digest"]) == ("succeeded", None, whole["digest"])
    assert [tried["state"] for tried in resumed["attempts"]] == ["failed"] * 3 + ["succeeded"]


def test_a_process_that_crashes_once_is_tried_again_and_its_job_succeeds(asker: Asker, site: Site) -> None:
    site.hold("segfault")
    id = asker.ask("crashing", "segfault")
    until(lambda: bool(asker.job(id)["attempts"]), "the first attempt to crash")
    site.release("segfault")
    job = asker.until_ended(id)
    assert (job["state"], job["error"]) == ("succeeded", None)
    first, *_, last = job["attempts"]
    assert (first["state"], first["signal"], last["state"]) == ("failed", "SIGSEGV", "succeeded")
    assert "SIGSEGV while labelling examples 4,096 to 4,351" in first["error"]["message"]


ENDS = {
    "segfault": ("job-killed", "SIGSEGV", "ended by SIGSEGV while labelling examples 4,096 to 4,351"),
    "abort": ("job-killed", "SIGABRT", "ended by SIGABRT while labelling examples 4,096 to 4,351"),
    "exits": ("job-killed", None, "exit code 3 while labelling examples 4,096 to 4,351 and did not say why"),
    "hungry": ("teacher-fault", None, "raised MemoryError on examples 4,096 to 4,351"),
}
"""By teacher: the code of the job's error, the signal that ended its process, and what is said of it."""


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[JobDetail, str]]:
    """Jobs that were tried once, by teacher, and what their folders hold for whoever runs the server."""
    site = Site.make(tmp_path_factory.mktemp("crashed"), retries=0)
    site.hold("segfault")
    ids = {teacher: written(site, teacher, teacher).id for teacher in ENDS}
    with watching(Jobs(site.store, site.config)) as jobs:
        until(lambda: all(jobs.get(id).ended for id in ids.values()), "all to end")
        return {
            teacher: (jobs.get(id), (site.store / ".jobs" / id / "traceback.txt").read_text())
            for teacher, id in ids.items()
        }


@pytest.mark.parametrize("teacher", ENDS)
def test_however_a_process_ends_the_job_says_how_and_with_its_last_lines(
    crashed: dict[str, tuple[JobDetail, str]], teacher: str
) -> None:
    job, _ = crashed[teacher]
    code, signal, told = ENDS[teacher]
    assert job.error is not None
    assert (job.state, job.error.code, [tried.signal for tried in job.attempts]) == ("failed", code, [signal])
    assert told in job.error.message
    assert job.log[0] == f"labelling {teacher}: 9,000 rows"


@pytest.mark.parametrize("teacher", ["segfault", "abort", "hungry"])
def test_where_it_ended_is_written_down_for_whoever_runs_the_server_and_not_told(
    crashed: dict[str, tuple[JobDetail, str]], teacher: str
) -> None:
    job, trace = crashed[teacher]
    assert "at_the_second_shard" in trace
    for hidden in ("Traceback", "at_the_second_shard", "/"):
        assert hidden not in job.model_dump_json(include={"error", "log", "attempts"}).replace("rows/s", "")


def test_a_teacher_that_raises_is_the_jobs_error(asker: Asker, site: Site) -> None:
    failed = asker.until_ended(asker.ask("raising", "raising"))
    assert (failed["state"], failed["error"]["code"]) == ("failed", "teacher-fault")
    assert "the teacher's own trouble" in failed["error"]["message"]
    assert any("the same command goes on from there" in line for line in failed["log"])
    assert site.shards("raising") == 1


def test_another_job_for_a_label_set_that_is_there_is_refused_by_its_precompute(
    asker: Asker, undisturbed: dict[str, Any]
) -> None:
    failed = asker.until_ended(asker.ask("undisturbed", top_k=4))
    assert failed["id"] != undisturbed["id"]
    assert (failed["state"], failed["error"]["code"]) == ("failed", "identity-changed")
    assert "k was 3 and is now 4" in failed["error"]["message"]


def test_a_spec_that_names_nothing_is_told_without_where_the_server_keeps_things(asker: Asker, site: Site) -> None:
    failed = asker.until_ended(asker.ask("nowhere", "nowhere"))
    assert failed["error"]["code"] == "spec-not-found"
    assert "'elsewhere'" in failed["error"]["message"]
    assert str(site.folder) not in failed["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "status", "code", "told"),
    [
        ({"teacher": "oen"}, 404, "not-registered", "did you mean 'one'?"),
        ({"dataset": "mine:points"}, 404, "not-registered", "did you mean 'points'?"),
        ({"teacher": "mine:one"}, 404, "not-registered", "no teacher 'mine:one'"),
        ({"label_set": "../../etc"}, 422, "invalid-name", "'../../etc'"),
        ({"store": "/tmp"}, 422, "invalid-request", "store: Extra inputs"),
        ({"top_k": "3"}, 422, "invalid-request", "top_k"),
        ({"rows_per_shard": 5000}, 422, "invalid-request", "4,096"),
        ({"temperatures": [-1]}, 422, "invalid-request", "temperature"),
        ({"teacher": ["one", "wto"]}, 404, "not-registered", "no teacher 'wto'"),
        ({"teacher": ["one", "two"]}, 422, "invalid-request", "'one' cpu, 'two' cpu:0"),
        ({"teacher": []}, 422, "invalid-request", "teacher: "),
        ({"seed": 5}, 422, "invalid-request", "give views, too"),
        ({"views": 2}, 422, "invalid-request", "8,192 up to"),
        ({"views": 0}, 422, "invalid-request", "views: "),
    ],
)
def test_a_request_that_cannot_be_is_refused_and_makes_no_job(
    asker: Asker, changes: dict[str, Any], status: int, code: str, told: str
) -> None:
    before = asker.http.get("/v1/jobs").json()
    answer = asker.post(**{"label_set": "refused"} | changes)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert told in answer.json()["detail"]
    assert asker.http.get("/v1/jobs").json() == before


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"{}", "application/vnd.safetensors", 415),
        (b" " * (1 << 17), "application/json", 413),
        (b" " * (3 << 20), "application/json", 413),
    ],
)
def test_a_body_that_is_not_a_request_is_a_problem(asker: Asker, content: bytes, kind: str, status: int) -> None:
    answer = asker.http.post("/v1/jobs", content=content, headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["code"]) == (status, "request-refused")


@pytest.mark.parametrize("id", ["0123456789abcdef", "lock", "..%2Flock", "%00", "x" * 1000])
def test_an_id_of_no_job_is_not_found(asker: Asker, id: str) -> None:
    for answer in (asker.http.get(f"/v1/jobs/{id}"), asker.http.post(f"/v1/jobs/{id}/cancel", json={})):
        assert answer.status_code == 404
        assert answer.json()["code"] in ("job-not-found", "request-refused")


def test_without_a_configuration_the_routes_say_how_to_give_one(server: httpx.Client) -> None:
    for answer in (server.get("/v1/jobs"), server.get("/v1/jobs/x"), server.post("/v1/jobs", json={})):
        assert (answer.status_code, answer.json()["code"]) == (404, "not-registered")
        assert "logitcache serve --config" in answer.json()["detail"]


def test_a_job_that_cannot_be_written_down_is_none(asker: Asker, site: Site) -> None:
    asked = Asked(label_set="unwritten", teacher="one", dataset="points", top_k=3, rows_per_shard=4096)
    folder = site.store / ".jobs" / asked.request().job_id
    folder.touch()
    answer = asker.post("unwritten")
    assert (answer.status_code, answer.json()["code"]) == (500, "storage-fault")
    assert str(site.folder) not in answer.text
    assert asker.http.get(f"/v1/jobs/{folder.name}").status_code == 404
    folder.unlink()
    asker.until(asker.ask("unwritten"), "succeeded")


AUGMENTED = """
class Augmented(Points):
    def __getitem__(self, index):
        return super().__getitem__(index) + torch.rand(FEATURES)


def augmented():
    return Augmented()


def tokens():
    return [{"input_ids": torch.arange(4)}]


def negated():
    teacher = Teacher("negated")
    with torch.no_grad():
        teacher.net.weight.neg_()
    return teacher
"""

TYPED = (
    *("--teacher=mine:one", "--teacher=mine:negated", "--dataset=mine:augmented", "--device=cpu"),
    *("--views=2", "--seed=7", "--top-k=3", "--rows-per-shard=8192"),
)


def test_a_job_with_views_and_two_teachers_makes_the_bytes_that_the_command_line_makes(tmp_path: Path) -> None:
    site = Site.make(tmp_path, 4200)
    with (site.folder / "mine.py").open("a") as mine, (site.folder / "logitcache.toml").open("a") as config:
        mine.write(AUGMENTED)
        config.write('[teachers.negated]\nspec = "mine:negated"\ndevice = "cpu"\n')
        config.write('[datasets.augmented]\nspec = "mine:augmented"\n[datasets.tokens]\nspec = "mine:tokens"\n')
    wanted: dict[str, Any] = {"teacher": ["one", "negated"], "views": 2, "rows_per_shard": 8192}
    jobs = Jobs(site.store, site.config)
    with running(create_app(Catalog(site.store), jobs)) as url, Asker(url) as asker:
        refused = asker.until_ended(asker.ask("refused", **wanted | {"dataset": "tokens"}))
        job = asker.until_ended(asker.ask("asked", **wanted | {"dataset": "augmented", "seed": 7}))
    assert (refused["state"], refused["error"]["code"]) == ("failed", "invalid-request")
    assert "token sequences have one view, as they are: leave --views out" in refused["error"]["message"]
    assert (job["state"], job["request"]["teacher"]) == ("succeeded", ["negated", "one"])
    subprocess.run(
        [*COMMAND, "precompute", "typed", *TYPED, f"--store={site.store}"],
        cwd=site.folder,
        check=True,
        capture_output=True,
    )
    with closing(LocalLabelSet(site.store / "asked")) as asked, closing(LocalLabelSet(site.store / "typed")) as typed:
        identity = asked.describe().identity
        assert (identity.views, identity.seed) == (2, 7)
        assert identity.teacher.name == "mean of mine:negated, mine:one"
        assert asked.describe().digest == typed.describe().digest == job["digest"]
    chunks = [file.relative_to(site.store / "asked") for file in (site.store / "asked").glob("*/c.*")]
    assert len(chunks) >= 2 * len({"logits", "indices", "scalars", "fingerprint"})
    for chunk in chunks:
        assert (site.store / "asked" / chunk).read_bytes() == (site.store / "typed" / chunk).read_bytes()
