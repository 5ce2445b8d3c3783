"""The variables that the predictor's process does not get: the cluster's secrets, and the ways to them.

The predictor parses files from strangers, and needs none of these. A prefix withholds some harmless variables too:
AWS_CA_BUNDLE, AWS_REGION, AWS_ENDPOINT_URL, AZURE_CLIENT_ID. This module knows names alone.
"""

from collections.abc import Iterable

# By prefixes of names: who reads them, and what they hold.
WITHHELD = {
    "API_TOKENS": "the fronts: who may ask",
    "DATABASE_URL": "the fronts: the database, with its password",
    "FILES_URL": "the fronts: everybody's files, some with a key",
    "PGPASS": "PostgreSQL's client: PGPASSWORD, and PGPASSFILE, which has some",
    "PGSERVICE": "PostgreSQL's client: a service, and PGSERVICEFILE, which may have a password",
    "PGSSLKEY": "PostgreSQL's client: its private key",
    "POSTGRES_PASSWORD": "PostgreSQL's image: the database's password, and POSTGRES_PASSWORD_FILE, which has it",
    "RAY_AUTH_TOKEN": "Ray: who may run code in the cluster; RAY_AUTH_TOKEN_PATH is where that lies",
    "RAY_REDIS_": "Ray's head: Redis's address, password and keys",
    "RAY_TLS_": "Ray: certificates and keys",
    "RAY_RUNTIME_ENV_BEARER_TOKEN": "Ray: what it downloads with",
    "REDIS_PASSWORD": "the deployment: the same as RAY_REDIS_PASSWORD",
    "REDIS_URL": "the deployment: the same, within an address",
    "REDIS_CLIENT_KEY": "Ray's head: another name of RAY_REDIS_CLIENT_KEY",
    "AWS_": "s3fs: credentials, and where they lie",
    "BOTO_CONFIG": "s3fs: a file with them",
    "GOOGLE_APPLICATION_CREDENTIALS": "gcsfs: a file with them",
    "CLOUDSDK_": "gcsfs: an account's credentials, and where they lie",
    "AZURE_": "adlfs: credentials, and where they lie",
    "IDENTITY_HEADER": "Azure: with it, a managed identity's tokens are to be had",
    "MSI_SECRET": "Azure: the same under its older name",
    "FSSPEC_": "fsspec: options of any file system, credentials among them",
}


def withheld(names: Iterable[str]) -> list[str]:
    """The names of variables that the predictor must not get."""
    return [name for name in names if name.startswith(tuple(WITHHELD))]
