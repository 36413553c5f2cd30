"""The label sets of a store, by name: a store is a folder whose folders are label sets. Opens none of them."""

from pathlib import Path

from logitcache.labels.errors import InvalidName, StorageFault, StoreNotFound
from logitcache.labels.identity import check_name
from logitcache.storage.places import Places


def label_set_names(store: Path) -> list[str]:
    """Names of the label sets of a store, sorted; other folders are passed over.

    Raises:
        StoreNotFound: there is no such folder.
    """
    if not is_folder(store):
        raise StoreNotFound(
            f"there is no store {store}: no such folder; name another with --store or LOGITCACHE_STORE, "
            "or make it with `logitcache precompute`"
        )
    if (store / "zarr.json").is_file():
        raise StoreNotFound(f"{store} is a label set and not a store: name the folder above it, {store.parent}")
    return names_in(store)


def is_folder(path: Path) -> bool:
    """There is a folder of this path.

    Raises:
        StorageFault: this cannot be found out.
    """
    try:
        return path.is_dir()
    except OSError as error:
        raise StorageFault(f"{path} cannot be looked at: {error.strerror}", path=str(path)) from error


def names_in(store: Path) -> list[str]:
    """Names of the label sets in a folder that is there, sorted.

    Raises:
        StorageFault: it cannot be listed.
    """
    try:
        return sorted(path.name for path in store.iterdir() if _legal(path.name) and _holds_one(path))
    except OSError as error:
        raise StorageFault(f"the store {store} cannot be listed: {error.strerror}") from error


def _holds_one(path: Path) -> bool:
    try:
        return (path / "zarr.json").is_file() or Places(path).recording.is_file()
    except OSError:
        # Not ours to enter: the lost+found of a file system, say.
        return False


def _legal(name: str) -> bool:
    try:
        return bool(check_name(name))
    except InvalidName:
        return False
