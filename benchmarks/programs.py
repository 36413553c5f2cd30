"""Programs that we compare with and that pip does not install: where they are, or how to get them, and how they run.

They run without any configuration of this machine: their settings, port and files are those that are given here.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.servers import Server, free_port, listening


@dataclass(frozen=True)
class Program:
    """A program by its name, and the package that has it on Debian and Ubuntu."""

    name: str
    package: str

    @property
    def path(self) -> str | None:
        """Where it is, or None. Debian keeps nginx where only root's PATH leads."""
        return shutil.which(self.name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")

    @property
    def advice(self) -> str:
        """What to say where it is not installed."""
        return f"there is no {self.name} here; on Debian or Ubuntu: apt-get install {self.package}"

    @property
    def version(self) -> str:
        """Its own number."""
        told = subprocess.run([str(self.path), "-v"], capture_output=True, text=True, check=True)
        found = re.search(r"\d+\.\d+\.\d+", told.stdout + told.stderr)
        return found.group() if found else ""


REDIS = Program("redis-server", "redis-server")
NGINX = Program("nginx", "nginx-light")

_SENDFILE = "sendfile on; tcp_nopush on; sendfile_max_chunk 512k;"

NGINX_SENDING = {
    "nginx range": _SENDFILE,
    "nginx range, copied": "sendfile off; output_buffers 2 128k;",
    "nginx range, raw reader": _SENDFILE,
}
"""By method: how nginx sends. Which of the two ways is faster depends on what else uses the memory."""

NEEDED = {"Redis": REDIS, "HTTP, raw reader": NGINX, **dict.fromkeys(NGINX_SENDING, NGINX)}
"""By method: what it cannot be measured without. The raw reader is there to be compared with nginx."""

NGINX_CONFIGURATION = """
daemon off;
master_process off;  # one process, whose processor time can be read, as this user
pid nginx.pid;
error_log stderr;
events {{ worker_connections 64; }}
http {{
  access_log off;
  {sending}
  keepalive_requests 1000000000;
  keepalive_timeout 1h;
  default_type application/octet-stream;
  client_body_temp_path temp;
  proxy_temp_path temp;
  fastcgi_temp_path temp;
  uwsgi_temp_path temp;
  scgi_temp_path temp;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@contextmanager
def redis(folder: Path) -> Iterator[Server]:
    """An empty Redis on a port of loopback that writes nothing to disk."""
    port = free_port()
    where = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder))
    command = (str(REDIS.path), *where, "--save", "", "--appendonly", "no", "--daemonize", "no")
    with listening(command, port, folder / "redis.log") as server:
        yield server


@contextmanager
def nginx(folder: Path, root: Path, sending: str) -> Iterator[Server]:
    """nginx on a port of loopback, serving the files of ``root``; its own go into ``folder``, which it makes."""
    folder.mkdir()
    port = free_port()
    (folder / "nginx.conf").write_text(NGINX_CONFIGURATION.format(port=port, root=root, sending=sending))
    command = (str(NGINX.path), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr")
    with listening(command, port, folder / "nginx.log") as server:
        yield server
