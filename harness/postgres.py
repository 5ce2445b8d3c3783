"""A PostgreSQL server for tests and benchmarks, in a temporary directory, on loopback."""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from local_cog.server import LOOPBACK, free_port


def find_programs() -> Path | None:
    """The folder of initdb and pg_ctl; Debian does not have them in PATH."""
    places = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    if found := shutil.which("initdb"):
        places.append(Path(found).parent)
    return next((place for place in places if (place / "initdb").exists()), None)


class Postgres:
    """A server; a context manager.

    Args:
        programs: the folder of PostgreSQL's programs.
    """

    def __init__(self, programs: Path) -> None:
        self.programs, self.port = programs, free_port()
        self.url = f"postgresql://postgres@{LOOPBACK}:{self.port}/postgres"
        # PostgreSQL refuses to run as root.
        self.user = "postgres" if os.getuid() == 0 else None

    def __enter__(self) -> Self:
        """Make a database and start the server."""
        self.directory = Path(tempfile.mkdtemp(prefix="flux-sprites-postgres-"))
        if self.user:
            account = pwd.getpwnam(self.user)
            os.chown(self.directory, account.pw_uid, account.pw_gid)
        self._run("initdb", "-A", "trust", "-U", "postgres", "--no-sync")
        self.start()
        return self

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = f"-p {self.port} -k {self.directory} -c listen_addresses={LOOPBACK}"
        self._run("pg_ctl", "-w", "-o", options, "-l", str(self.directory / "log"), "start")

    def stop(self, mode: str = "immediate") -> None:
        """Stop it; "immediate" is like a crash."""
        self._run("pg_ctl", "-w", "-m", mode, "stop")

    def __exit__(self, *_: object) -> None:
        """Stop the server and delete the database."""
        self.stop()
        shutil.rmtree(self.directory)

    def _run(self, program: str, *arguments: str) -> None:
        command = [self.programs / program, "-D", self.directory / "data", *arguments]
        subprocess.run(command, user=self.user, cwd=self.directory, check=True, stdout=subprocess.DEVNULL)
