"""Runs the revisions over the connection that `cluster.database` has opened and locked, in its transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
