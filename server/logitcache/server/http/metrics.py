"""Metrics in Prometheus' format: what the app answered, and how label sets and jobs stand at the moment of the scrape.

Where several processes serve together, `SHARED` names the folder in which prometheus_client keeps their counters, and
each tells the sum of all.

Label values are bounded whatever clients send: routes are templates, methods a fixed few, label sets those that exist.
"""

import os
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from logitcache.labels.errors import LogitcacheError
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.load import Load
from logitcache.server.http.record import Record
from logitcache.server.jobs.queue import Jobs

SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable, to be set before prometheus_client is imported."""

METHODS = frozenset({"GET", "POST", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"})
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the latency histogram; a warm batch takes one to ten milliseconds."""


class Metrics:
    """Counters of one app, in a registry of its own, so that two apps in a process do not mix.

    ``registry`` is what a scrape is told.
    """

    def __init__(self, catalog: Catalog, load: Load, jobs: Jobs | None = None) -> None:
        own = CollectorRegistry()
        self.registry = CollectorRegistry() if SHARED in os.environ else own
        if SHARED in os.environ:
            MultiProcessCollector(self.registry)  # type: ignore[no-untyped-call]
        self._load = load
        self._requests = Counter(
            "logitcache_requests", "Requests answered", ("method", "route", "status"), registry=own
        )
        self._seconds = Histogram(
            "logitcache_request_seconds", "Time to the last byte", ("route",), buckets=SECONDS, registry=own
        )
        self._rows = Counter("logitcache_rows_served", "Rows sent", ("label_set",), registry=own)
        self._bytes = Counter("logitcache_response_bytes", "Bytes of bodies sent", ("label_set",), registry=own)
        self._fetched = Counter(
            "logitcache_fetch_seconds",
            "Time from a fetch's arrival to its answer being given to be sent",
            ("label_set",),
            registry=own,
        )
        self._misses = Counter("logitcache_misses", "Ids asked for that have no labels", ("label_set",), registry=own)
        self._errors = Counter("logitcache_errors", "Problems answered", ("code",), registry=own)
        self._routes: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._label_sets: dict[str, tuple[Counter, Counter, Counter, Counter]] = {}
        self._under_way = Gauge(
            "logitcache_bytes_under_way",
            "Bytes of requests and answers that are under way, as of the last answer",
            registry=own,
            multiprocess_mode="livesum",
        )
        self.registry.register(LabelSetGauges(catalog))
        if jobs is not None:
            self.registry.register(JobGauges(jobs))

    def observe(self, record: Record) -> None:
        """Count one request that was answered."""
        method = record.method if record.method in METHODS else "other"
        requests, seconds = self._of_route(method, record.route, record.status)
        requests.inc()
        seconds.observe(record.seconds)
        self._under_way.set(self._load.bytes)
        if record.code is not None:
            self._errors.labels(record.code).inc()
        if record.label_set is not None:
            rows, sent, fetched, misses = self._of_label_set(record.label_set)
            rows.inc(record.rows)
            misses.inc(record.misses)
            sent.inc(record.body_bytes)
            if record.tally is not None and record.code is None:
                fetched.inc(record.ready_s)
                record.tally.count(record.rows, record.ready_s)

    # Finding a labelled counter costs several times what counting does.
    def _of_route(self, method: str, route: str, status: int) -> tuple[Counter, Histogram]:
        key = method, route, status
        if key not in self._routes:
            self._routes[key] = self._requests.labels(*key), self._seconds.labels(route)
        return self._routes[key]

    def _of_label_set(self, name: str) -> tuple[Counter, Counter, Counter, Counter]:
        if name not in self._label_sets:
            every = (self._rows, self._bytes, self._fetched, self._misses)
            rows, sent, fetched, misses = (counter.labels(name) for counter in every)
            self._label_sets[name] = rows, sent, fetched, misses
        return self._label_sets[name]


class LabelSetGauges(Collector):
    """Gauges that are read from the label sets when Prometheus asks."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Examples, shards and bill of every label set that can be opened; none without the store.

        What was saved is a gauge: while shards are labelled, the time of a row changes, and with it what all rows would
        have taken. It goes on after a restart, unlike the counters.
        """
        examples = GaugeMetricFamily(
            "logitcache_label_set_examples", "Examples by state", labels=("label_set", "state")
        )
        shards = GaugeMetricFamily("logitcache_label_set_shards", "Shards by state", labels=("label_set", "state"))
        spent = GaugeMetricFamily(
            "logitcache_teacher_seconds", "Time that the teacher took to label, once", labels=("label_set",)
        )
        saved = GaugeMetricFamily(
            "logitcache_teacher_seconds_saved", "Time that it would have taken for the rows sent", labels=("label_set",)
        )
        passes = GaugeMetricFamily(
            "logitcache_passes_to_pay",
            "Passes over all rows after which what is saved makes up for labelling and fetching",
            labels=("label_set",),
        )
        try:
            for label_set in self._catalog.descriptions():
                examples.add_metric((label_set.name, "total"), label_set.examples)
                examples.add_metric((label_set.name, "labelled"), label_set.labelled)
                for state in ("total", "committed", "verified", "damaged"):
                    shards.add_metric((label_set.name, state), getattr(label_set.shards, state))
                if (bill := label_set.bill) is not None:
                    spent.add_metric((label_set.name,), bill.teacher.seconds)
                    saved.add_metric((label_set.name,), bill.saved_s)
                    if bill.epochs_to_pay is not None:
                        passes.add_metric((label_set.name,), bill.epochs_to_pay)
        except LogitcacheError:
            return
        yield from (examples, shards, spent, saved, passes)


class JobGauges(Collector):
    """How many jobs are in each state when Prometheus asks."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One number a state, zeros too."""
        jobs = GaugeMetricFamily("logitcache_jobs", "Jobs by state", labels=("state",))
        for state, count in self._jobs.counts().items():
            jobs.add_metric((state,), count)
        yield jobs
