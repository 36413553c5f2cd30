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
from logitcache.server.names import near_or_all

ENVIRONMENT = "LOGITCACHE_"
"""Prefix of variables that stand above the file: ``LOGITCACHE_SERVER__PORT`` is ``port`` of ``[server]``."""

_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Spec = Annotated[str, Field(pattern=r"^[^:\s]+:[^:\s]+$")]

_SAID: Mapping[str, str] = {
    r"^[a-z0-9][a-z0-9._-]{0,63}$": (
        "a name is 1 to 64 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit (in quotes if it has a '.')"
    ),
    r"^[^:\s]+:[^:\s]+$": "a spec is module:callable, as in my_project.models:teacher",
}
"""Patterns in words."""


class ServerOptions(BaseModel):
    """What `logitcache serve` has on its command line, which wins where both say something."""

    model_config = _STRICT

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    verify: Literal["strict", "background"] = "strict"
    scrub_hours: float = Field(default=24.0, ge=0, allow_inf_nan=False)
    auth: Literal["none"] | None = None


class RegisteredTeacher(BaseModel):
    """``[teachers.NAME]``: a SPEC, and the device on which it runs (torch's word; None: a GPU if there is one)."""

    model_config = _STRICT

    spec: Spec
    device: str | None = Field(default=None, min_length=1)


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

    store: str | None = Field(default=None, min_length=1)
    server: ServerOptions = ServerOptions()
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
            text = file.read_bytes().decode()
        except OSError as error:
            raise InvalidRequest(f"the configuration {file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InvalidRequest(f"the configuration {file} is not UTF-8 text, as TOML must be") from None
        try:
            config = cls(**tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            last = f"(at line {len(text.splitlines())}, the last)"
            words = str(error).replace("(at end of document)", last)
            raise InvalidRequest(f"{file} is not TOML: {words}; mend it there", file=str(file)) from None
        except SettingsError as error:
            raise InvalidRequest(f"an environment variable {ENVIRONMENT}… cannot be read: {error}") from None
        except ValidationError as error:
            raise InvalidRequest(_told(file, text, error), file=str(file)) from None
        config._folder = file.absolute().parent
        return config

    @property
    def folder(self) -> Path:
        """Where the file stands, and jobs run."""
        return self._folder

    @property
    def store_folder(self) -> Path | None:
        """The store that the file names, if it does."""
        return None if self.store is None else self._folder / self.store


def _told(file: Path, text: str, error: ValidationError) -> str:
    """pydantic's complaints as one message, in the order of the file; unknown keys alone if there are any.

    A misspelt key is most often the very one that is then missing.
    """
    found = error.errors(include_url=False, include_context=True, include_input=False)
    unknown = [one for one in found if one["type"] == "extra_forbidden"]
    source = _Source(text)
    told = sorted((source.line_of(_keys(one["loc"])), _complaint(one)) for one in unknown or found)
    lines = [f"{file}, line {line}: {words}" for line, words in told[:SHOWN]]
    return "; ".join(lines) + (f"; and {len(told) - SHOWN} more" if len(told) > SHOWN else "")


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
    variable = ENVIRONMENT + "__".join(keys).upper()
    where = f"{name!r}, set by {variable}" if variable in os.environ else repr(name)
    if error["type"] == "model_type":
        return f"{where} must be a table, [{name}], with {' and '.join(_allowed(keys))}"
    words = _SAID.get(str(error.get("ctx", {}).get("pattern")), str(error["msg"]))
    return f"{where}: {words.replace('Input', 'it', 1).replace('a valid dictionary', 'a table')}"


def _allowed(table: Sequence[str]) -> Iterable[str]:
    """The keys that a table may have."""
    tables: dict[str, type[BaseModel]] = {
        "server": ServerOptions,
        "teachers": RegisteredTeacher,
        "datasets": RegisteredDataset,
    }
    return (tables[table[0]] if table else Config).model_fields


class _Source:
    """The text of a TOML file, to find the line of a key: the parser keeps none."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()

    def line_of(self, keys: Sequence[str]) -> int:
        """Number of the first line that names most of these keys, from 1."""
        return max(self._named, key=lambda found: (_common(found[1], keys), -found[0]), default=(1, ()))[0]

    @cached_property
    def _named(self) -> list[tuple[int, list[str]]]:
        return list(self._walk())

    def _walk(self) -> Iterator[tuple[int, list[str]]]:
        table: list[str] = []
        for number, line in enumerate(self._lines, 1):
            if line.lstrip().startswith("["):
                table = _path(line) or table
                yield number, table
            elif match := re.match(r"\s*([^=#]+?)\s*=", line):
                yield number, table + _path(f"{match[1]} = 0")


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
