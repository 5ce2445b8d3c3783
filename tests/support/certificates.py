"""Self-signed certificates."""

import ssl
import subprocess
from pathlib import Path

import pytest


def self_signed(folder: Path) -> tuple[Path, Path]:
    """The files of a certificate for `localhost` and of its key; skips the test if they cannot be made."""
    certificate, key = folder / "certificate", folder / "key"
    made = subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout {key} "
        f"-out {certificate} -subj /CN=localhost -addext subjectAltName=DNS:localhost".split(),
        capture_output=True,
        check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl to make a certificate with")
    return certificate, key


def serving(folder: Path) -> ssl.SSLContext:
    """A server's TLS context with such a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*self_signed(folder))
    return context
