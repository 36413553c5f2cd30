"""The command line that a job is: registered names in, the words of `logitcache precompute` out."""

from pathlib import Path

from logitcache.labels.errors import SHOWN, InvalidRequest, NotRegistered
from logitcache.server.config import Config
from logitcache.server.jobs.job import JobRequest
from logitcache.server.names import not_registered


def check_registered(request: JobRequest, config: Config) -> None:
    """Refuse names that the configuration lacks, and teachers that cannot run together.

    Raises:
        NotRegistered: a teacher's or the dataset's; near names are told.
        InvalidRequest: the teachers of an ensemble are registered with different devices.
    """
    registered = sorted(config.teachers)
    if lacking := [not_registered("teacher", name, registered) for name in request.teachers if name not in registered]:
        more = f"; and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
        raise NotRegistered("; ".join(error.message for error in lacking[:SHOWN]) + more, available=registered)
    if request.dataset not in config.datasets:
        raise not_registered("dataset", request.dataset, sorted(config.datasets))
    devices = {name: config.teachers[name].device for name in request.teachers}
    if len(set(devices.values())) > 1:
        told = ", ".join(f"{name!r} {device or 'none'}" for name, device in list(devices.items())[:SHOWN])
        raise InvalidRequest(
            f"the teachers of an ensemble run on one device, and these are registered with several ({told}): register "
            "them with the same one"
        )


def arguments(request: JobRequest, config: Config, store: Path) -> list[str]:
    """What follows ``logitcache`` on the command line.

    Raises:
        NotRegistered, InvalidRequest: as `check_registered`.
    """
    check_registered(request, config)
    teachers, dataset = [config.teachers[name] for name in request.teachers], config.datasets[request.dataset]
    options = {
        "device": teachers[0].device,
        "dataset": dataset.spec,
        "loader-workers": dataset.loader_workers,
        "store": store,
        "top-k": request.top_k,
        "dtype": request.dtype,
        "batch-size": request.batch_size,
        "rows-per-shard": request.rows_per_shard,
        "views": request.views,
        "seed": request.seed,
    }
    words = [f"--teacher={teacher.spec}" for teacher in teachers]
    words += [f"--{name}={value}" for name, value in options.items() if value is not None]
    if request.targets is not None:
        words.append("--targets" if request.targets else "--no-targets")
    words += [f"--temperature={temperature!r}" for temperature in request.temperatures]
    return ["precompute", request.label_set, *words]
