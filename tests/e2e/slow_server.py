"""``python tests/e2e/slow_server.py STORE SERVICE_S``: a server whose every fetch takes a thread for so long.

It prints its URL.
"""

import sys
import time
from pathlib import Path
from typing import Any

from logitcache.server import logs
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.storage import LocalLabelSet


def main(store: Path, service_s: float) -> None:
    """Serve until stdin ends."""
    logs.configure(level="warning")
    fetch_body = LocalLabelSet.fetch_body

    def slow(self: LocalLabelSet, *arguments: Any, **options: Any) -> Any:
        time.sleep(service_s)
        return fetch_body(self, *arguments, **options)

    LocalLabelSet.fetch_body = slow  # type: ignore[method-assign]
    LocalLabelSet.is_at_hand = lambda self, examples: False  # type: ignore[method-assign]
    with running(create_app(Catalog(store))) as url:
        print(url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
