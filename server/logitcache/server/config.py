"""The configuration file of `logitcache serve`: its options, and the teachers and datasets that jobs may name.

TOML, checked before anything runs: what is wrong with it is told with its line. A job's request names what is
registered here and nothing else, so code is imported for whoever wrote this file and never for a request.
"""

import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from logitcache.labels.errors import SHOWN, InvalidRequest
from logitcache.labels.identity import NAME_PATTERN, NAME_RULE
from logitcache.server.names import near_or_all

ENVIRONMENT = "LOGITCACHE_"
"""Prefix of variables that stand above the file: ``LOGITCACHE_SERVER__PORT`` is ``port`` of ``[server]``."""

_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)

_SPEC, _WORD = r"^[^:\s\x00]+:[^:\s\x00]+$", r"^[^\x00]+$"
_SAID: Mapping[str, str] = {
    NAME_PATTERN: f"a name is {NAME_RULE} (in quotes if it has a '.')",
    _SPEC: "a spec is module:callable, as in my_project.models:teacher",
    _WORD: "it must not be empty, nor hold NUL",
}
"""Patterns in words."""

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Spec = Annotated[str, Field(pattern=_SPEC)]
Word = Annotated[str, Field(pattern=_WORD)]


class ServerOptions(BaseModel):
    """What `logitcache serve` has on its command line, which wins where both say something."""

    model_config = _STRICT

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    verify: Literal["strict", "background"] = "strict"
    scrub_hours: float = Field(default=24.0, ge=0, allow_inf_nan=False)
    log_level: Literal["debug", "info", "warning"] = "info"
    auth: Literal["keys", "none"] | None = None
    allow_host: list[Word] = []
    record: bool = False
    workers: int = Field(default=1, ge=1, le=256)


class JobOptions(BaseModel):
    """``[jobs]``: what becomes of jobs whose process dies, and of those that ended.

    ``retries`` attempts follow by themselves on one that died without committing anything; the first begins after
    ``retry_after_s`` seconds, each other after twice as long. ``keep`` ended jobs are kept, older ones removed.
    """

    model_config = _STRICT

    retries: int = Field(default=2, ge=0, le=100)
    retry_after_s: float = Field(default=5.0, ge=0, le=3600, allow_inf_nan=False)
    keep: int = Field(default=1000, ge=1)


class RegisteredTeacher(BaseModel):
    """``[teachers.NAME]``: a SPEC, and the device on which it runs (torch's word; None: a GPU if there is one)."""

    model_config = _STRICT

    spec: Spec
    device: Word | None = None


class RegisteredDataset(BaseModel):
    """``[datasets.NAME]``: a SPEC, and how many processes read it."""

    model_config = _STRICT

    spec: Spec
    loader_workers: int = Field(default=0, ge=0)


class Config(BaseSettings):
    """A configuration that was read: relative paths in it are those of the file's folder.

    That folder is also where jobs run, so modules beside the file are importable in a SPEC.
    """

    model_config = SettingsConfigDict(
        strict=True, extra="forbid", frozen=True, env_prefix=ENVIRONMENT, env_nested_delimiter="__"
    )

    store: Word | None = None
    server: ServerOptions = ServerOptions()
    jobs: JobOptions = JobOptions()
    teachers: dict[Name, RegisteredTeacher] = {}
    datasets: dict[Name, RegisteredDataset] = {}
    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @classmethod
    def settings_customise_sources(  # noqa: D102
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings

    @classmethod
    def read(cls, file: Path) -> "Config":
        """Read a configuration file.

        Raises:
            InvalidRequest: it is not there, is not TOML, or says something that cannot be; with the line and the key.
        """
        try:
            # Editors of Windows begin a file with a byte order mark.
            text = file.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise InvalidRequest(f"the configuration {file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InvalidRequest(f"the configuration {file} is not UTF-8 text, as TOML must be") from None
        try:
            values = tomllib.loads(text)
        # Beside its own errors the parser raises what Python says of a number of thousands of digits, or of nesting.
        except (ValueError, RecursionError) as error:
            last = f"(at line {len(_lines(text))}, the last)"
            words = str(error).replace("(at end of document)", last)
            raise InvalidRequest(f"{file} is not TOML: {words}; mend it there", file=str(file)) from None
        # pydantic-settings would take these for options of its own.
        if options := [{"type": "extra_forbidden", "loc": (key,)} for key in values if key.startswith("_")]:
            raise InvalidRequest(_told(file, text, options), file=str(file))
        try:
            config = cls(**values)
        except SettingsError as error:
            variable = ENVIRONMENT + str(error).partition('field "')[2].partition('"')[0].upper()
            raise InvalidRequest(f"environment variable {variable}: it must be a table, as JSON") from None
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=True, include_input=False)
            raise InvalidRequest(_told(file, text, found), file=str(file)) from None
        # As the system names it to a job that runs there, so that it can be taken out of messages.
        config._folder = file.absolute().parent.resolve()
        return config

    @property
    def folder(self) -> Path:
        """Where the file stands, and jobs run."""
        return self._folder

    @property
    def store_folder(self) -> Path | None:
        """The store that the file names, if it does."""
        return None if self.store is None else self._folder / self.store


def _told(file: Path, text: str, found: Sequence[Mapping[str, Any]]) -> str:
    """pydantic's complaints as one message, in the order of the file; unknown keys alone if there are any.

    A misspelt key is most often the very one that is then missing. What the environment said is told with its variable.
    """
    source = _Source(text)

    def place(error: Mapping[str, Any]) -> tuple[int, str]:
        keys = _keys(error["loc"][:-1] if error["type"] == "missing" else error["loc"])
        line, whole = source.line_of(keys)
        variable = _variable(keys, whole)
        return (0, f"environment variable {variable}") if variable else (line, f"{file}, line {line}")

    unknown = [one for one in found if one["type"] == "extra_forbidden"]
    told = sorted((*place(one), _complaint(one)) for one in unknown or found)
    lines = [f"{where}: {words}" for _, where, words in told[:SHOWN]]
    return "; ".join(lines) + (f"; and {len(told) - SHOWN} more" if len(told) > SHOWN else "")


def _variable(keys: Sequence[str], in_file: bool) -> str | None:
    """The environment variable that says this; where the file does not say it, one that says a part of it or more."""
    wanted = f"{ENVIRONMENT}{'__'.join(keys)}".upper()
    for name in sorted(os.environ):
        said = name.upper()
        part = said.startswith(f"{wanted}__") or wanted.startswith(f"{said}__")
        if said == wanted or (part and not in_file):
            return name
    return None


def _keys(place: Sequence[int | str]) -> list[str]:
    """Where something stands, as keys; pydantic marks a dictionary's own key with one of its own."""
    return [str(part) for part in place if part != "[key]"]


def _complaint(error: Mapping[str, Any]) -> str:
    keys = _keys(error["loc"])
    name = ".".join(keys)
    if error["type"] == "extra_forbidden":
        return f"there is no {name!r} in a configuration; {near_or_all(keys[-1], _allowed(keys[:-1]))}"
    if error["type"] == "missing":
        return f"{'.'.join(keys[:-1])!r} lacks {keys[-1]!r}"
    if error["type"] == "model_type":
        return f"{name!r} must be a table, [{name}], with {' and '.join(_allowed(keys))}"
    words = _SAID.get(str(error.get("ctx", {}).get("pattern")), str(error["msg"]))
    return f"{name!r}: {words.replace('Input', 'it', 1).replace('a valid dictionary', 'a table')}"


def _allowed(table: Sequence[str]) -> Iterable[str]:
    """The keys that a table may have."""
    tables: dict[str, type[BaseModel]] = {
        "server": ServerOptions,
        "jobs": JobOptions,
        "teachers": RegisteredTeacher,
        "datasets": RegisteredDataset,
    }
    return (tables[table[0]] if table else Config).model_fields


class _Source:
    """The text of a TOML file, to find the line of a key: the parser keeps none."""

    def __init__(self, text: str) -> None:
        self._lines = _lines(text)

    def line_of(self, keys: Sequence[str]) -> tuple[int, bool]:
        """Number of the first line that names most of these keys, from 1, and whether it names all of them."""
        nothing: tuple[int, list[str]] = (1, [])
        number, path = max(self._named, key=lambda found: (_common(found[1], keys), -found[0]), default=nothing)
        return number, _common(path, keys) == len(keys)

    @cached_property
    def _named(self) -> list[tuple[int, list[str]]]:
        return list(self._walk())

    def _walk(self) -> Iterator[tuple[int, list[str]]]:
        table: list[str] = []
        for number, line in enumerate(self._lines, 1):
            if line.lstrip().startswith("["):
                table = _path(line) or table
                yield number, table
            else:
                # A quoted key may hold an equals sign itself.
                keys = (_path(f"{line[: sign.start()]}= 0") for sign in re.finditer("=", line))
                yield number, table + next(filter(None, keys), [])


def _lines(text: str) -> list[str]:
    """Its lines as TOML counts them: `str.splitlines` knows more ends of lines."""
    return [line.removesuffix("\r") for line in text.rstrip("\n").split("\n")]


def _path(line: str) -> list[str]:
    """The keys of a line such as ``[teachers."a.b"]`` or ``server.port = 0``; none if it is no such line."""
    try:
        found: Any = tomllib.loads(line)
    except tomllib.TOMLDecodeError:
        return []
    path = []
    while isinstance(found, dict) and found:
        key, found = next(iter(found.items()))
        path.append(key)
    return path


def _common(found: Sequence[str], keys: Sequence[str]) -> int:
    """How many keys two paths share from the beginning; a path that goes on elsewhere shares nothing more."""
    shared = 0
    for one, other in zip(found, keys, strict=False):
        if one != other:
            break
        shared += 1
    return shared
