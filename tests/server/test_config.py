"""The configuration file: what it says reaches the server, and what is wrong with it is told with its line."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from logitcache.labels.errors import InvalidRequest
from logitcache.server.cli import cli
from logitcache.server.complaints import parse_json
from logitcache.server.config import Config
from logitcache.server.http.serve import listening
from logitcache.server.jobs.command import check_registered
from logitcache.server.jobs.job import Asked

WHOLE = """\
store = "labels"

[server]
host = "127.0.0.2"
port = 9000
verify = "background"
scrub_hours = 1
log_level = "debug"
auth = "none"
allow_host = ["labels.example.org"]
record = true
workers = 2

[jobs]
retries = 1
retry_after_s = 2
keep = 10

[teachers.resnet]
spec = "my_models:resnet"
device = "cuda:0"

[teachers."bert.large"]
spec = "my_models:bert"

[datasets.train]
spec = "my_data:train"
loader_workers = 4
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "logitcache.toml"
    file.write_text(text)
    return file


def refusal(folder: Path, text: str) -> str:
    """What reading this text is answered with."""
    with pytest.raises(InvalidRequest) as caught:
        Config.read(write(folder, text))
    return caught.value.message


def test_everything_that_it_says_is_read(tmp_path: Path) -> None:
    config = Config.read(write(tmp_path, WHOLE))
    assert dict(config.server) == {
        "host": "127.0.0.2",
        "port": 9000,
        "verify": "background",
        "scrub_hours": 1.0,
        "log_level": "debug",
        "auth": "none",
        "allow_host": ["labels.example.org"],
        "record": True,
        "workers": 2,
    }
    assert dict(config.jobs) == {"retries": 1, "retry_after_s": 2.0, "keep": 10}
    assert config.teachers["resnet"].device == "cuda:0"
    assert config.teachers["bert.large"].device is None
    assert (config.datasets["train"].spec, config.datasets["train"].loader_workers) == ("my_data:train", 4)


def test_relative_paths_are_those_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 'store = "labels"')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = Config.read(Path("../logitcache.toml"))
    assert config.folder.resolve() == tmp_path
    assert config.store_folder is not None
    assert config.store_folder.resolve() == tmp_path / "labels"


def test_an_absolute_store_stays_where_it_is(tmp_path: Path) -> None:
    assert Config.read(write(tmp_path, 'store = "/srv/labels"')).store_folder == Path("/srv/labels")


def test_an_empty_file_registers_nothing_and_keeps_every_default(tmp_path: Path) -> None:
    config = Config.read(write(tmp_path, ""))
    assert (config.store, config.teachers, config.datasets, config.server.port) == (None, {}, {}, 8000)


@pytest.mark.parametrize(
    ("text", "line", "named", "hint"),
    [
        ('store = "x"\n\n[teacher.r]\nspec = "a:b"\n', 3, "'teacher'", "'teachers'"),
        ('[teachers.r]\n# its weights\nspce = "a:b"\n', 3, "'teachers.r.spce'", "did you mean 'spec'"),
        ("[server]\nhost = '::1'\nprot = 8000\n", 3, "'server.prot'", "did you mean 'port'"),
        ('[datasets.d]\nspec = "a:b"\nworkers = 2', 3, "'datasets.d.workers'", "'loader_workers'"),
        ("zzz = 1", 1, "'zzz'", "there is 'store', 'server', 'jobs' and 2 more"),
        ("server.port = 1\nserver.hots = 'a'", 2, "'server.hots'", "'host'"),
        ("store = 'x'\n_env_file = '/etc/passwd'", 2, "'_env_file'", "'store'"),
        ("[teachers]\nr = {spec = 'a:b', devcie = 'cpu'}", 2, "'teachers.r.devcie'", "'device'"),
        ("# other ends of lines: \x85 \u2028\n[server]\nprot = 1", 3, "'server.prot'", "'port'"),
        ('[server]\n"a=b" = 1', 2, "'server.a=b'", "'host'"),
    ],
)
def test_a_typo_is_named_with_its_line_and_the_near_name(
    tmp_path: Path, text: str, line: int, named: str, hint: str
) -> None:
    told = refusal(tmp_path, text)
    assert told.startswith(f"{tmp_path / 'logitcache.toml'}, line {line}: there is no {named}")
    assert hint in told


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ('[server]\n\nport = "8000"', 3, "'server.port': it should be a valid integer"),
        ("[server]\nport = true", 2, "'server.port': it should be a valid integer"),
        ("[server]\nport = 65536", 2, "'server.port': it should be less than or equal to 65535"),
        ('[server]\nverify = "loose"', 2, "'server.verify': it should be 'strict' or 'background'"),
        ("[server]\nscrub_hours = nan", 2, "'server.scrub_hours'"),
        ("[teachers.a]\nspec = 'a:b'\n\n[teachers.b]\n", 4, "'teachers.b' lacks 'spec'"),
        ("[teachers]\nr = 'a:b'", 2, "'teachers.r' must be a table, [teachers.r], with spec and device"),
        ("teachers = 3", 1, "'teachers': it should be a table"),
        ("[teachers.a]\nspec = 'models.teacher'", 2, "a spec is module:callable"),
        ("[datasets.a]\nspec = 'm:f'\nloader_workers = -1", 3, "'datasets.a.loader_workers'"),
        ("[datasets.ok]\nspec = 'm:f'\n[datasets.'../up']\nspec = 'm:f'", 3, "'datasets.../up': a name is 1 to 64 of"),
        ("[server]\nport = 1\n[server\n", 3, "is not TOML"),
        ("[server]\nport = 1\nport = 2", 3, "is not TOML"),
        ("[teachers.a]\nspec = 'm:f'\ndevice = \"a\\u0000\"", 3, "'teachers.a.device': it must not be empty, nor hold"),
        ("[[teachers]]\nspec = 'm:f'", 1, "'teachers': it should be a table"),
        ("[teachers.'café']\nspec = 'm:f'", 1, "'teachers.café': a name is"),
    ],
)
def test_what_cannot_be_is_told_with_its_line(tmp_path: Path, text: str, line: int, told: str) -> None:
    message = refusal(tmp_path, text)
    assert told in message
    assert f"line {line}" in message


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 5000], ids=["digits", "nesting"])
def test_a_value_beyond_what_can_be_parsed_is_a_refusal(tmp_path: Path, value: str) -> None:
    assert "is not TOML" in refusal(tmp_path, f"store = {value}")


def test_several_mistakes_are_told_in_the_order_of_the_file(tmp_path: Path) -> None:
    told = refusal(tmp_path, "[server]\nhost = 1\nport = 'x'\nverify = 3\nscrub_hours = -1\nauth = 7")
    places = [told.index(f"line {line}") for line in (2, 3, 4)]
    assert places == sorted(places)
    assert told.endswith("and 2 more")


def test_a_file_that_is_not_there_or_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"nothing\.toml cannot be read: No such file"):
        Config.read(tmp_path / "nothing.toml")
    with pytest.raises(InvalidRequest, match="cannot be read: Is a directory"):
        Config.read(tmp_path)
    (tmp_path / "logitcache.toml").write_bytes(b"store = '\xff'")
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        Config.read(tmp_path / "logitcache.toml")


def test_the_environment_stands_above_the_file_and_is_named_when_it_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITCACHE_SERVER__PORT", "9001")
    monkeypatch.setenv("LOGITCACHE_DEBUG", "1")
    config = Config.read(write(tmp_path, WHOLE))
    assert (config.server.port, config.server.host) == (9001, "127.0.0.2")
    monkeypatch.setenv("LOGITCACHE_SERVER__PORT", "many")
    assert refusal(tmp_path, WHOLE).startswith("environment variable LOGITCACHE_SERVER__PORT: 'server.port': it")
    monkeypatch.setenv("LOGITCACHE_TEACHERS", "{")
    assert "environment variable LOGITCACHE_TEACHERS: it must be a table" in refusal(tmp_path, WHOLE)


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("LOGITCACHE_SERVER__PROT", "1", "there is no 'server.prot'"),
        ("LOGITCACHE_SERVER", '{"prot": 1}', "there is no 'server.prot'"),
        ("LOGITCACHE_SERVER", "3", "'server' must be a table"),
        ("logitcache_server__port", "many", "'server.port': it should be a valid integer"),
        ("LOGITCACHE_DATASETS__NEW__LOADER_WORKERS", "3", "'datasets.new' lacks 'spec'"),
        ("LOGITCACHE_STORE", "", "'store': it must not be empty"),
    ],
)
def test_what_the_environment_said_is_told_with_its_variable_and_not_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, told: str
) -> None:
    monkeypatch.setenv(variable, value)
    message = refusal(tmp_path, 'store = "x"\n[datasets.train]\nspec = "a:b"')
    assert message.startswith(f"environment variable {variable}: {told}")
    assert "line" not in message


def test_a_mistake_of_the_file_is_not_put_down_to_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITCACHE_SERVER", '{"port": 1}')
    assert "line 2: there is no 'server.prot'" in refusal(tmp_path, "[server]\nprot = 1")


def test_a_byte_order_mark_and_the_ends_of_lines_of_windows_are_read(tmp_path: Path) -> None:
    file = write(tmp_path, "")
    file.write_bytes(b"\xef\xbb\xbfstore = 'labels'\r\n[server]\r\nport = 1\r\n")
    assert (Config.read(file).store, Config.read(file).server.port) == ("labels", 1)
    assert "line 2: there is no 'server.prot'" in refusal(tmp_path, "[server]\r\nprot = 1\r\n")


def serve(store: Path | None, *arguments: str) -> str:
    """What `logitcache serve` refuses to do."""
    environment = {"LOGITCACHE_STORE": str(store) if store else None}
    result = CliRunner(env=environment).invoke(cli, ["serve", *arguments])
    assert result.exit_code == 1
    return result.stderr


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        file = write(tmp_path, f'store = "labels"\n[server]\nhost = "203.0.113.7"\nport = {port}\nauth = "none"\n')
        assert f"cannot listen on 203.0.113.7 port {port}" in serve(None, "--config", str(file))
        assert f"port {port} on 127.0.0.1 is in use" in serve(None, "--config", str(file), "--host", "127.0.0.1")


def test_the_store_is_that_of_the_command_line_then_the_environment_then_the_file(tmp_path: Path) -> None:
    file = str(write(tmp_path, 'store = "of-the-file"'))
    named, around = tmp_path / "named", tmp_path / "around"
    assert "there is no store " + str(named) in serve(around, "--store", str(named), "--config", file)
    assert "there is no store " + str(around) in serve(around, "--config", file)
    assert "there is no store " + str(tmp_path / "of-the-file") in serve(None, "--config", file)


def test_a_typo_keeps_the_server_from_starting(tmp_path: Path) -> None:
    told = serve(tmp_path, "--config", str(write(tmp_path, "[teacher.r]\nspec = 'a:b'")))
    assert "line 1: there is no 'teacher'" in told
    assert "Traceback" not in told


def test_what_the_guide_shows_is_a_configuration_and_a_request(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text()
    (toml,) = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    (body,) = re.findall(r"-d '(.*?)'", guide, re.DOTALL)
    asked = parse_json(Asked, body.encode()).request()
    check_registered(asked, Config.read(write(tmp_path, toml)))
    assert asked.temperatures == [1.0, 2.0, 4.0]
