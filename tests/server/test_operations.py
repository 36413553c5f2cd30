"""What whoever runs the server relies on: health, readiness, metrics, logs, request ids, and faults that stay apart."""

import asyncio
import io
import json
import logging
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.conftest import write_label_set

from logitcache.labels import wire
from logitcache.labels.errors import LabelSetNotFound, RowsMissing, ServerFault, StoreNotFound
from logitcache.labels.problem import from_problem
from logitcache.server import logs
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.load import Load
from logitcache.server.http.middleware import Observed
from logitcache.server.http.serve import running
from logitcache.storage.shards import Shards


def events(log: io.StringIO, event: str | None = None) -> list[dict[str, Any]]:
    """The lines of one event, or all."""
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def metric(client: httpx.Client, start: str) -> float:
    """Value of the one sample whose line starts so."""
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith(start)]
    return float(line.rpartition(" ")[2])


def test_a_fit_request_id_is_kept_and_another_is_replaced(server: httpx.Client) -> None:
    assert server.get("/healthz", headers={"X-Request-Id": "run-7.step_3"}).headers["x-request-id"] == "run-7.step_3"
    for unfit in ("a b", "x" * 129, 'a"b', ""):
        made = server.get("/healthz", headers={"X-Request-Id": unfit}).headers["x-request-id"]
        assert made != unfit
        assert len(made) == 32


def asked(store: Path, headers: dict[str, str]) -> tuple[httpx.Response, httpx.Response]:
    """The answers to a batch and to a refused one, after a probe, by a server that has stopped by now: it writes a line
    after the answer.
    """
    with running(create_app(Catalog(store))) as url:
        httpx.get(f"{url}/healthz")
        answer = httpx.post(f"{url}/v1/label-sets/digits/fetch", json={"ids": [1, 2]}, headers=headers)
        return answer, httpx.post(f"{url}/v1/label-sets/digits/fetch", json={"ids": [-9]}, headers=headers)


def test_what_is_refused_is_one_line_in_the_log_and_a_batch_or_probe_that_succeeds_is_none(
    own_store: Path, log: io.StringIO
) -> None:
    asked(own_store, {"X-Request-Id": "mine"})
    (line,) = events(log, "request")
    assert (line["status"], line["code"], line["level"]) == (404, "rows-missing", "info")
    assert line["timestamp"].endswith("Z")


def test_at_debug_level_each_request_is_one_line(own_store: Path, log: io.StringIO) -> None:
    logs.configure(log, level="debug")
    answer, _ = asked(own_store, {"Accept": wire.MEDIA_TYPE, "X-Request-Id": "mine"})
    probe, line, _ = events(log, "request")
    assert probe["route"] == "/healthz"
    assert line["request_id"] == "mine"
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/label-sets/{name}/fetch", 200)
    assert (line["rows"], line["bytes"], line["label_set"]) == (2, len(answer.content), "digits")
    assert line["ms"] > 0
    assert line["level"] == "debug"


def test_lines_of_other_loggers_are_json_like_ours(log: io.StringIO) -> None:
    logging.getLogger("logitcache.storage").error("shard %d is damaged", 7)
    (line,) = events(log, "shard 7 is damaged")
    assert (line["logger"], line["level"]) == ("logitcache.storage", "error")


def test_lines_of_all_loggers_name_the_request_that_they_belong_to(
    own_store: Path, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that it is the request in whose thread the damage is found.
    monkeypatch.setattr(Shards, "_start_verifier", lambda self: None)
    chunk = own_store / "digits" / "logits" / "c.1.0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with running(create_app(Catalog(own_store))) as url:
        fetch = f"{url}/v1/label-sets/digits/fetch"
        assert httpx.post(fetch, json={"ids": [5000]}, headers={"X-Request-Id": "found-it"}).status_code == 404
    (line,) = [line for line in events(log) if "withdrawn" in line["event"]]
    assert (line["logger"], line["request_id"]) == ("logitcache.storage", "found-it")
    (line,) = events(log, "label set opened")
    assert line["request_id"] == "found-it"


def test_the_id_of_a_request_is_forgotten_after_it(log: io.StringIO) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        logs.logger("logitcache.tests").info("inside")
        logs.logger("logitcache.tests").info("of another", request_id="theirs")

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    async def answer() -> None:
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"x-request-id", b"mine")]}
        await Observed(app, create_app(Catalog(Path("nowhere"))).state.metrics, Load())(scope, nothing, nothing)
        logs.logger("logitcache.tests").info("after")

    asyncio.run(answer())
    told = {line["event"]: line.get("request_id") for line in events(log)}
    assert told == {"inside": "mine", "of another": "theirs", "request": "mine", "after": None}


def test_at_a_terminal_a_log_line_is_for_a_person(log: io.StringIO) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    logs.configure(terminal)
    logs.logger("logitcache.tests").info("label set opened", label_set="digits")
    logging.getLogger("uvicorn.error").error("from uvicorn")
    first, second = terminal.getvalue().splitlines()
    assert "label set opened" in first
    assert not first.startswith("{")
    assert "from uvicorn" in second
    assert log.getvalue() == ""


def test_metrics_count_requests_rows_bytes_and_errors(own_server: httpx.Client) -> None:
    answer = own_server.post("/v1/label-sets/digits/fetch", json={"ids": [1, 2, 3]})
    own_server.post("/v1/label-sets/digits/fetch", json={"ids": []})
    assert metric(own_server, 'logitcache_rows_served_total{label_set="digits"}') == 3
    assert metric(own_server, 'logitcache_response_bytes_total{label_set="digits"}') > len(answer.content)
    assert metric(own_server, 'logitcache_errors_total{code="invalid-ids"}') == 1
    route = 'route="/v1/label-sets/{name}/fetch"'
    assert metric(own_server, f'logitcache_requests_total{{method="POST",{route},status="200"}}') == 1
    assert metric(own_server, f"logitcache_request_seconds_count{{{route}}}") == 2


def test_requests_are_counted_apart_by_method_route_status_and_label_set(own_server: httpx.Client) -> None:
    fetch = "/v1/label-sets/{}/fetch"
    for name, ids in (("digits", [1]), ("half", [1, 2]), ("digits", [3, 4, 5]), ("half", [9999])):
        own_server.post(fetch.format(name), json={"ids": ids})
    own_server.get(fetch.format("digits"))
    own_server.post("/v1/label-sets/digits/missing", json={"ids": [1]})
    assert metric(own_server, 'logitcache_rows_served_total{label_set="digits"}') == 4
    assert metric(own_server, 'logitcache_rows_served_total{label_set="half"}') == 2
    for method, route, status, count in (
        ("POST", "fetch", 200, 3),
        ("POST", "fetch", 404, 1),
        ("GET", "fetch", 405, 1),
        ("POST", "missing", 200, 1),
    ):
        labels = f'method="{method}",route="/v1/label-sets/{{name}}/{route}",status="{status}"'
        assert metric(own_server, f"logitcache_requests_total{{{labels}}}") == count
    assert metric(own_server, 'logitcache_request_seconds_count{route="/v1/label-sets/{name}/fetch"}') == 5


def test_gauges_tell_how_the_label_sets_stand(own_server: httpx.Client) -> None:
    own_server.post("/v1/label-sets/digits/fetch", json={"ids": [0, 5000, 9000]})
    half = 'label_set="half"'
    assert metric(own_server, f'logitcache_label_set_examples{{{half},state="total"}}') == 10_000
    assert metric(own_server, f'logitcache_label_set_examples{{{half},state="labelled"}}') == 4096
    assert metric(own_server, f'logitcache_label_set_shards{{{half},state="committed"}}') == 1
    assert metric(own_server, 'logitcache_label_set_shards{label_set="digits",state="verified"}') == 3
    assert metric(own_server, 'logitcache_label_set_shards{label_set="digits",state="damaged"}') == 0


def test_what_clients_make_up_never_becomes_a_label(own_server: httpx.Client) -> None:
    own_server.get("/made-up-path")
    own_server.get("/v1/label-sets/made-up-name")
    own_server.request("PROPFIND", "/healthz")
    text = own_server.get("/metrics").text.lower()
    assert "made" not in text
    assert "propfind" not in text
    assert metric(own_server, 'logitcache_requests_total{method="GET",route="unmatched",status="404"}') == 1
    assert metric(own_server, 'logitcache_requests_total{method="other",route="/healthz",status="405"}') == 1


def test_an_unforeseen_failure_tells_the_client_nothing_and_the_log_everything(
    own_store: Path, log: io.StringIO
) -> None:
    app = create_app(Catalog(own_store))

    @app.get("/broken")
    def broken() -> None:
        raise KeyError("a secret of the server")

    with running(app) as url:
        answer = httpx.get(f"{url}/broken", headers={"X-Request-Id": "find-me"})
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert isinstance(from_problem(answer.json(), 500), ServerFault)
    assert "secret" not in answer.text
    assert "KeyError" not in answer.text
    (line,) = events(log, "request failed")
    assert "a secret of the server" in line["exception"]
    assert line["request_id"] == "find-me" == answer.json()["request_id"]


def test_where_the_store_is_is_told_by_no_error_and_ids_are_told_as_they_are(own_store: Path) -> None:
    app = create_app(Catalog(own_store))
    photo = str(own_store / "photo.jpg")

    @app.get("/away")
    def away() -> None:
        raise StoreNotFound(f"the store {own_store} cannot be made: {own_store.parent} does not exist")

    @app.get("/elsewhere")
    def elsewhere() -> None:
        raise LabelSetNotFound(f"no {own_store}/a", available=[f"{own_store}/b"], fields={"a": [str(own_store)]})

    @app.get("/missing")
    def missing() -> None:
        raise RowsMissing("no rows", unknown=[photo], unlabelled=[])

    with running(app) as url, httpx.Client(base_url=url) as client:
        for path in ("/away", "/elsewhere"):
            answer = client.get(path)
            assert answer.status_code == 404
            assert str(own_store.parent) not in answer.text
        assert client.get("/elsewhere").json()["available"] == ["label-sets/b"]
        assert client.get("/missing").json()["unknown"] == [photo]


def test_a_label_set_that_appears_is_served_and_one_that_goes_is_not_found(
    own_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.server.http.catalog.LOOK_AGAIN_S", 0.0)
    with running(create_app(Catalog(own_store))) as url, httpx.Client(base_url=url) as client:
        assert client.get("/v1/label-sets/late").status_code == 404
        write_label_set(own_store / "late")
        assert client.post("/v1/label-sets/late/fetch", json={"ids": [9999]}).json()["logit_max"] == [9999.0]
        (own_store / "late").rename(tmp_path / "gone")
        assert client.get("/v1/label-sets/late").status_code == 404
        write_label_set(own_store / "late", shards=1)
        assert client.get("/v1/label-sets/late").json()["labelled"] == 4096


def test_a_folder_that_is_not_ours_answers_for_itself_alone(own_store: Path, log: io.StringIO) -> None:
    (own_store / "foreign").mkdir()
    (own_store / "foreign" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    newer = json.loads((own_store / "half" / "zarr.json").read_text())
    newer["attributes"]["logitcache"]["format_version"] = 99
    (own_store / "half" / "zarr.json").write_text(json.dumps(newer))
    with running(create_app(Catalog(own_store))) as url, httpx.Client(base_url=url) as client:
        assert client.get("/v1/label-sets/foreign").json()["code"] == "not-a-label-set"
        assert client.get("/v1/label-sets/half").json()["code"] == "newer-format"
        assert [found["name"] for found in client.get("/v1/label-sets").json()] == ["digits"]
        assert client.get("/readyz").status_code == 200
        client.get("/v1/label-sets")
    complaints = events(log, "label set cannot be served")
    assert sorted(line["label_set"] for line in complaints) == ["foreign", "half"]


def test_without_its_store_the_server_is_healthy_and_not_ready(own_store: Path, tmp_path: Path) -> None:
    catalog = Catalog(own_store)
    own_store.rename(tmp_path / "away")
    with running(create_app(catalog)) as url, httpx.Client(base_url=url) as client:
        assert client.get("/healthz").text == "ok\n"
        refused = client.get("/readyz")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert "there is no store label-sets: no such folder" in refused.json()["detail"]
        assert client.get("/v1/label-sets").json()["retry"] is True
        assert client.get("/metrics").status_code == 200


def test_health_is_answered_while_every_worker_thread_is_busy(own_store: Path) -> None:
    app = create_app(Catalog(own_store))
    busy, done = threading.Semaphore(0), threading.Event()

    @app.get("/slow")
    def slow() -> None:
        busy.release()
        done.wait()

    with running(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        threads = [threading.Thread(target=client.get, args=("/slow",)) for _ in range(40)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert busy.acquire(timeout=30)
        assert client.get("/healthz").text == "ok\n"
        done.set()
        for thread in threads:
            thread.join()
