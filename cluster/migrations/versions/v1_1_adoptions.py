"""How often a prediction has outlived its front. Fronts of 1.0 neither read nor write it."""

import sqlalchemy as sa
from alembic import op

revision = "1.1"
down_revision = "1.0"


def upgrade() -> None:
    """Add the column, 0 wherever nobody names it."""
    op.add_column("predictions", sa.Column("adoptions", sa.Integer(), nullable=False, server_default="0"))
