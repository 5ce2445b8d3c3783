"""When a prediction is cancelled, as its client has asked. Fronts of 1.2 neither read nor write it."""

import sqlalchemy as sa
from alembic import op

revision = "1.3"
down_revision = "1.2"


def upgrade() -> None:
    """Add the column, null wherever nobody names it."""
    op.add_column("predictions", sa.Column("cancel_at", sa.String()))
