"""The command line that a job is: registered names in, the words of `logitcache precompute` out."""

from pathlib import Path

from logitcache.server.config import Config
from logitcache.server.jobs.job import JobRequest
from logitcache.server.names import not_registered


def check_registered(request: JobRequest, config: Config) -> None:
    """Refuse names that the configuration lacks.

    Raises:
        NotRegistered: the teacher's or the dataset's; near names are told.
    """
    if request.teacher not in config.teachers:
        raise not_registered("teacher", request.teacher, sorted(config.teachers))
    if request.dataset not in config.datasets:
        raise not_registered("dataset", request.dataset, sorted(config.datasets))


def arguments(request: JobRequest, config: Config, store: Path) -> list[str]:
    """What follows ``logitcache`` on the command line.

    Raises:
        NotRegistered: as `check_registered`.
    """
    check_registered(request, config)
    teacher, dataset = config.teachers[request.teacher], config.datasets[request.dataset]
    options = {
        "teacher": teacher.spec,
        "device": teacher.device,
        "dataset": dataset.spec,
        "loader-workers": dataset.loader_workers,
        "store": store,
        "top-k": request.top_k,
        "dtype": request.dtype,
        "batch-size": request.batch_size,
        "rows-per-shard": request.rows_per_shard,
    }
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    if request.targets is not None:
        words.append("--targets" if request.targets else "--no-targets")
    words += [f"--temperature={temperature!r}" for temperature in request.temperatures]
    return ["precompute", request.label_set, *words]
