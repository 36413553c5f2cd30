"""The command line: what it prints, what it refuses, and with which exit code."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result
from tests.building import ROWS_PER_SHARD, build, grow, grown, reference
from tests.server.conftest import EXAMPLES

from logitcache.labels.label_set import Description
from logitcache.server.cli import cli
from logitcache.server.listing import labelled


def run(*arguments: str, store: Path | None = None) -> Result:
    """Run the command as a user of this store would."""
    environment = {"LOGITCACHE_STORE": str(store) if store else None, "LOGITCACHE_DEBUG": None}
    return CliRunner(env=environment).invoke(cli, list(arguments), prog_name="logitcache")


def refused(result: Result, code: int = 1) -> str:
    """What stands on stderr, after checking that it is a refusal and no traceback."""
    assert result.exit_code == code
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.stderr


def test_fetch_prints_what_the_server_answers(finished_store: Path, server: httpx.Client) -> None:
    printed = json.loads(run("fetch", "digits", "4097", "3", "3", store=finished_store).stdout)
    assert printed == server.post("/v1/label-sets/digits/fetch", json={"ids": [4097, 3, 3]}).json()


@pytest.mark.parametrize(
    ("ids", "named"),
    [(["-3"], "-3"), (["1", "10000"], "10000"), (["1.5"], "'1.5'"), (["9223372036854775808"], "9223372036854775808")],
)
def test_fetch_names_the_id_that_is_wrong(finished_store: Path, ids: list[str], named: str) -> None:
    assert named in refused(run("fetch", "digits", *ids, store=finished_store))


def test_fetch_of_many_ids_points_to_the_limit(finished_store: Path) -> None:
    assert "1,024" in refused(run("fetch", "digits", *["1"] * 1025, store=finished_store))


TEXTS = ("-draft-", "--", "--view", "a b/é", "7", "-3")


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a causal label set whose ids are texts, of two generations, and its reference."""
    store = tmp_path_factory.mktemp("store")
    first = reference(1, alignment="causal", ids="text", targets=True, short_by=ROWS_PER_SHARD - 1600)
    ids = TEXTS + first.ids[len(TEXTS) :]
    build(store / "books", replace(first, ids=ids))
    grow(store / "books", grown(replace(first, ids=ids), 3))
    return store


def test_fetch_takes_text_ids_and_after_two_dashes_any_of_them(books: Path) -> None:
    for arguments in (["a b/é", "7", "-3"], ["--", *TEXTS], ["7", "--rows", "0:1", "--", "-draft-", "--view"]):
        result = run("fetch", "books", *arguments, store=books)
        assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert rows["row_splits"] == [0, 1, 2, 3]
    one = json.loads(run("fetch", "books", "--rows", "0:1", "--", "--view", store=books).stdout)
    assert one["tokens"] == rows["tokens"][2:]


def test_fetch_names_a_text_or_a_range_that_is_not_there(books: Path) -> None:
    assert "'no/such'" in refused(run("fetch", "books", "no/such", "7", store=books))
    assert "'7'" in refused(run("fetch", "books", "7", "--rows", "0:9999", store=books))
    assert "START:STOP" in refused(run("fetch", "books", "7", "--rows", "5", store=books))
    assert "goes after --" in refused(run("fetch", "books", "-draft-", store=books), 2)
    assert "empty" in refused(run("fetch", "books", "", store=books))


def test_fetch_of_many_rows_points_to_the_limit(books: Path) -> None:
    assert "1,024" in refused(run("fetch", "books", *["7"] * 1000, store=books))


def test_fetch_reads_an_older_generation_by_its_digest(books: Path) -> None:
    described = json.loads(run("info", "books", "--json", store=books).stdout)
    first, second = [sealed["digest"] for sealed in described["generations"]]
    assert json.loads(run("fetch", "books", "7", store=books).stdout)["digest"] == second
    assert json.loads(run("fetch", "books", "7", "--digest", first, store=books).stdout)["digest"] == first
    assert "grown/0" in refused(run("fetch", "books", "grown/0", "--digest", first, store=books))


def test_info_and_ls_tell_the_shape_and_the_generations(books: Path) -> None:
    page = run("info", "books", store=books).stdout
    described = json.loads(run("info", "books", "--json", store=books).stdout)
    first, second = [sealed["digest"] for sealed in described["generations"]]
    facts = dict(line.split("  ", 1) for line in page.splitlines())
    facts = {name: fact.strip() for name, fact in facts.items()}
    assert facts["ids"] == "texts"
    assert facts["rows"] == f"{described['rows']:,} labelled; causal: a row a token"
    assert facts["targets"] == "stored, with their logits"
    assert (facts["generation"], facts["digest"]) == ("2", second)
    assert facts["generation 1"].startswith(first)
    heading, books_line = run("ls", store=books).stdout.splitlines()
    cells = dict(zip(heading.split(), books_line.split(), strict=False))
    assert (cells["ALIGNMENT"], cells["IDS"], cells["ROWS"]) == ("causal", "text", f"{described['rows']:,}")


def test_ls_aligns_its_table(finished_store: Path) -> None:
    heading, digits, half = run("ls", store=finished_store).stdout.splitlines()
    assert heading.split()[:3] == ["NAME", "EXAMPLES", "LABELLED"]
    assert digits.split()[:3] == ["digits", "10,000", "100%"]
    assert half.split()[2] == "40.9%"
    assert half.split()[-1] == "unfinished"
    assert heading.index("TEACHER") == digits.index("resnet") == half.index("resnet")


def test_ls_lists_the_others_beside_a_folder_that_is_not_ours(own_store: Path) -> None:
    (own_store / "foreign").mkdir()
    (own_store / "foreign" / "zarr.json").write_text("{}")
    result = run("ls", store=own_store)
    assert "foreign" in refused(result)
    assert "digits" in result.stdout


def test_info_reads_well_and_as_json_is_the_servers_description(finished_store: Path) -> None:
    page = run("info", "half", store=finished_store).stdout
    assert "4,096 (40.9%)" in page
    assert "top 3 of 10 classes as float16" in page
    value = json.loads(run("info", "half", "--json", store=finished_store).stdout)
    assert Description.from_json(value).labelled == 4096


def test_the_store_option_wins_over_the_environment(finished_store: Path, tmp_path: Path) -> None:
    assert "digits" in run("ls", "--store", str(finished_store), store=tmp_path / "elsewhere").stdout


def test_a_store_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    for arguments in (["ls"], ["info", "x"], ["fetch", "x", "1"], ["verify", "x"], ["serve"]):
        told = refused(run(*arguments, store=tmp_path / "nothing"))
        assert "nothing" in told
        assert "logitcache precompute" in told


def test_a_misspelt_label_set_or_subcommand_or_option_is_answered_with_the_near_one(finished_store: Path) -> None:
    assert "did you mean 'digits'" in refused(run("info", "digit", store=finished_store))
    assert "'serve'" in refused(run("sevre"), 2)
    assert "--port" in refused(run("serve", "--prot", "1"), 2)
    assert "--view" in refused(run("fetch", "digits", "1", "--veiw", "0", store=finished_store), 2)


@pytest.mark.parametrize("name", ["../digits", "Digits", "."])
def test_a_name_that_no_label_set_can_have_is_refused(finished_store: Path, name: str) -> None:
    assert "cannot be a label set's name" in refused(run("info", name, store=finished_store))


def test_verify_says_that_all_is_well(finished_store: Path) -> None:
    result = run("verify", "digits", store=finished_store)
    assert result.exit_code == 0
    assert "3 of 3 shards" in result.stdout


def test_verify_names_a_damaged_shard_and_what_to_do(own_store: Path) -> None:
    chunk = own_store / "digits" / "logits" / "c.1.0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    result = run("verify", "digits", store=own_store)
    assert "1 of 3 shards" in refused(result)
    assert "precompute again" in result.stderr
    assert result.stdout.startswith("shard 1: ")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("--debug", "ls", store=tmp_path / "nothing")
    assert type(result.exception).__name__ == "StoreNotFound"


def test_serve_refuses_an_address_that_others_reach(finished_store: Path) -> None:
    assert "--auth none" in refused(run("serve", "--host", "0.0.0.0", "--port", "0", store=finished_store))


def test_the_version_is_told() -> None:
    assert run("--version").stdout.startswith("logitcache, version 0.")


def test_every_subcommand_has_a_help_text_with_an_example() -> None:
    for name in cli.commands:
        told = run(name, "--help")
        assert told.exit_code == 0
        assert f"  logitcache {name}" in told.stdout.partition("Example:")[2]


@pytest.mark.parametrize(
    ("absent", "arguments", "extra"),
    [
        ("fastapi", ["serve"], "server"),
        ("torch", ["precompute", "x", "--teacher", "a:b", "--dataset", "a:c", "--top-k", "1"], "teacher"),
        ("sklearn", ["demo"], "demo"),
    ],
)
def test_a_subcommand_that_lacks_its_packages_names_the_extra(
    finished_store: Path, absent: str, arguments: list[str], extra: str
) -> None:
    result = without([absent], arguments, finished_store)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert absent in result.stderr
    assert f"logitcache[{extra}]" in result.stderr
    assert "Traceback" not in result.stderr


def test_reading_works_in_the_light_install(finished_store: Path) -> None:
    heavy = ["torch", "zarr", "fastapi", "pydantic", "structlog", "uvicorn", "rich", "prometheus_client", "safetensors"]
    for arguments in (["ls"], ["info", "digits"], ["fetch", "digits", "1"], ["verify", "digits"]):
        result = without(heavy, arguments, finished_store)
        assert result.returncode == 0, result.stderr


def without(packages: list[str], arguments: list[str], store: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process in which these packages cannot be imported."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({packages!r})); from logitcache.server.cli import main; main()"
    )
    command = [sys.executable, "-c", program, *arguments]
    if arguments[0] not in ("demo",):
        command += ["--store", str(store)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


TINY = """
import sys, threading, torch

def teacher():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 6)

def dataset():
    return [torch.full((4,), float(number)) for number in range(50)]

def stuck():
    print("stuck now", file=sys.stderr, flush=True)
    threading.Event().wait()
"""


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a teacher and a dataset, from which the command is run."""
    (tmp_path / "tiny_specs.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def precompute(dataset: str, *more: str) -> list[str]:
    specs = ["--teacher", "tiny_specs:teacher", "--dataset", f"tiny_specs:{dataset}"]
    return [sys.executable, "-m", "logitcache.server", "precompute", "tiny", *specs, "--top-k", "2", *more]


def test_precompute_labels_into_the_store_what_fetch_then_prints(working_folder: Path) -> None:
    command = precompute("dataset", "--temperature", "2", "--temperature", "4", "--dtype", "float32")
    planned = subprocess.run([*command, "--plan"], capture_output=True, text=True, timeout=120, check=True)
    assert "top 2 as float32" in planned.stdout
    assert not (working_folder / "label-sets").exists()
    subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    rows = json.loads(run("fetch", "tiny", "0", "49").stdout)
    assert rows["temperatures"] == [1.0, 2.0, 4.0]
    assert rows["digest"] in run("info", "tiny").stdout


def test_sigterm_ends_precompute_as_ctrl_c_does(working_folder: Path) -> None:
    with subprocess.Popen(precompute("stuck"), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert next(process.stderr) == "stuck now\n"
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.startswith("interrupted; what is committed is kept")
    assert told.count("\n") == 1


def test_all_but_one_example_is_not_called_complete(finished_store: Path) -> None:
    value = json.loads(run("info", "digits", "--json", store=finished_store).stdout)
    assert labelled(Description.from_json(value)) == "100%"
    assert labelled(Description.from_json(value | {"labelled": EXAMPLES - 1})) == "99.9%"
