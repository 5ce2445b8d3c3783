"""The tables as they were before there were revisions."""

import sqlalchemy as sa
from alembic import op

revision = "1.0"
down_revision = None


def upgrade() -> None:
    """Make them all."""
    op.create_table(
        "fronts",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("beat", sa.Integer(), nullable=False),
    )
    op.create_table(
        "predictions",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("owner", sa.String()),
        sa.Column("created_at", sa.String(), nullable=False, index=True),
        sa.Column("request", sa.JSON()),
        sa.Column("input", sa.JSON(), nullable=False),
        sa.Column("api", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("base_url", sa.String(), nullable=False),
        sa.Column("webhook", sa.Text()),
        sa.Column("webhook_events", sa.JSON(), nullable=False),
        sa.Column("webhook_due", sa.Boolean(), nullable=False, index=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("deaths", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(), nullable=False, index=True),
        sa.Column("output", sa.JSON()),
        sa.Column("error", sa.Text()),
        sa.Column("logs", sa.Text(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("started_at", sa.String()),
        sa.Column("completed_at", sa.String(), index=True),
    )
    op.create_table(
        "files",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("content_type", sa.String(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("created_at", sa.String(), nullable=False),
        sa.Column("expires_at", sa.String(), nullable=False, index=True),
        sa.Column("about", sa.JSON()),
    )
    op.create_table(
        "secrets",
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("value", sa.String(), nullable=False),
    )
