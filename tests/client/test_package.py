"""What the package shows, and what importing it costs."""

import subprocess
import sys
import textwrap

import pytest

import logitcache.client


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_name_is_there_and_nothing_else_is_listed() -> None:
    assert sorted(logitcache.client.__all__) == dir(logitcache.client) == list(logitcache.client.__all__)
    for name in logitcache.client.__all__:
        assert getattr(logitcache.client, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        _ = logitcache.client.conect


def test_importing_the_client_loads_no_torch_zarr_or_fastapi() -> None:
    heavy = {"torch", "zarr", "fastapi", "pydantic", "logitcache.storage", "logitcache.server"}
    loaded = set(run("import sys, logitcache.client; print(' '.join(sys.modules))").split())
    assert loaded & heavy == set()
    assert "logitcache.client.http" in loaded


def test_without_torch_fetching_works_and_losses_say_what_to_install() -> None:
    told = run(
        """
        import sys
        sys.modules["torch"] = None  # what an import of something absent finds
        import logitcache.client as client
        import numpy as np
        soft = client.FetchedLabels(
            np.zeros((1, 1), np.uint16), np.zeros((1, 1), np.float16), np.zeros(1, np.float32),
            np.zeros((1, 1), np.float32), np.zeros(1, np.uint64), (1.0,),
        )
        for need in (lambda: soft.to("cpu"), lambda: client.distillation_loss):
            try:
                need()
            except client.MissingExtra as error:
                print(error)
        """
    )
    assert told.splitlines() == ["losses and tensors need torch: pip install 'logitcache[torch]'"] * 2
