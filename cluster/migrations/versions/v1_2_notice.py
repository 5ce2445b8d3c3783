"""What a front says of a request in its log. Fronts of 1.1 neither read nor write it."""

import sqlalchemy as sa
from alembic import op

revision = "1.2"
down_revision = "1.1"


def upgrade() -> None:
    """Add the column, null wherever nobody names it."""
    op.add_column("predictions", sa.Column("notice", sa.Text()))
