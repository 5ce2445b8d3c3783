"""The cluster's database: predictions, files, and the fronts that are alive.

A prediction is written here before its client gets an answer, and one front at a time owns it. Every later write is
conditional on that owner and on the prediction not having ended, so it ends once, however many fronts try. A front
counts up its heartbeat; when the beat stops, other fronts adopt its predictions.
This module knows SQL; it knows nothing of HTTP, of Ray, or of how clients see a prediction.
"""

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert  # SQLite takes its ON CONFLICT too
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column, sessionmaker, undefer

from cluster.database import Unusable, empty_log, may_pass, migrate, open_engine, unusable

UNFINISHED = ("starting", "processing")
# A restart of PostgreSQL takes seconds; after this long the caller gets the error.
SECONDS_WITHOUT_DATABASE = 60
# Ended predictions, their redacted inputs and their logs; the span within which an id is idempotent.
PREDICTION_LIFETIME = timedelta(hours=24)


class QueueFull(Exception):  # noqa: N818 (a state, not an accident)
    """Another prediction cannot be taken now, but perhaps soon; a sentence."""


class Base(MappedAsDataclass, DeclarativeBase):
    """The tables."""


class Heartbeat(Base):
    """One front, a process that accepts predictions; it is alive while its beat rises."""

    __tablename__ = "fronts"

    id: Mapped[str] = mapped_column(primary_key=True)
    beat: Mapped[int] = mapped_column(default=0)


class Prediction(Base):
    """One prediction, from the moment it is accepted. Times are ISO 8601 in UTC, which sorts as text."""

    __tablename__ = "predictions"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str | None] = mapped_column()  # the front that runs it; null: any front may take it
    created_at: Mapped[str] = mapped_column(index=True)
    # The whole input, for the worker; erased at the end, since URLs in it may hold tokens. It may have 100 MB of files,
    # so only `adopt` reads it.
    secret_input: Mapped[dict[str, Any] | None] = mapped_column(
        "request", sa.JSON(none_as_null=True), deferred=True, repr=False, compare=False
    )
    shown_input: Mapped[dict[str, Any]] = mapped_column("input", sa.JSON)  # without its secrets
    api: Mapped[str] = mapped_column()  # "cog" or "replicate": the form of its webhooks
    # As Replicate's clients named them.
    model: Mapped[str] = mapped_column(default="")
    version: Mapped[str] = mapped_column(default="")
    # The front's address as the client wrote it: URLs in webhooks begin with it.
    base_url: Mapped[str] = mapped_column(default="")
    # It may hold a token: erased when the prediction has ended and no webhook is due.
    webhook: Mapped[str | None] = mapped_column(sa.Text, default=None, repr=False)
    webhook_events: Mapped[list[str]] = mapped_column(sa.JSON, default_factory=list)
    webhook_due: Mapped[bool] = mapped_column(default=False, index=True)  # the last one is still to be delivered
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    cancel_at: Mapped[str | None] = mapped_column(default=None)  # the client's deadline
    deaths: Mapped[int] = mapped_column(default=0)  # how many workers died while running it
    adoptions: Mapped[int] = mapped_column(default=0, server_default="0")  # how many fronts died while owning it
    status: Mapped[str] = mapped_column(default="starting", index=True)
    # Files stand in it as paths of the front, such as /files/<id>/output.webp.
    output: Mapped[Any] = mapped_column(sa.JSON(none_as_null=True), nullable=True, default=None)
    error: Mapped[str | None] = mapped_column(sa.Text, default=None)
    notice: Mapped[str | None] = mapped_column(sa.Text, default=None)  # the front's line at the top of the log
    logs: Mapped[str] = mapped_column(sa.Text, default="")  # the current worker's
    metrics: Mapped[dict[str, Any]] = mapped_column(sa.JSON, default_factory=dict)
    started_at: Mapped[str | None] = mapped_column(default=None)
    completed_at: Mapped[str | None] = mapped_column(default=None, index=True)

    @property
    def whole_log(self) -> str:
        """The log as clients read it."""
        return (self.notice or "") + self.logs

    @property
    def finished(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.status not in UNFINISHED


class File(Base):
    """One file, uploaded or drawn. Its id cannot be guessed, and gives access to it."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column()
    content_type: Mapped[str] = mapped_column()
    size: Mapped[int] = mapped_column()
    sha256: Mapped[str] = mapped_column()
    created_at: Mapped[str] = mapped_column()
    expires_at: Mapped[str] = mapped_column(index=True)
    # An upload's own description; None for an output.
    about: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True), default=None)


class Secret(Base):
    """A random value that all fronts share, such as the key that signs webhooks."""

    __tablename__ = "secrets"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str] = mapped_column()


@dataclass(frozen=True)
class Page:
    """One page of a list, the newest first, and the cursors of its neighbours."""

    predictions: Sequence[Prediction]
    next: str | None
    previous: str | None


def now(after: timedelta = timedelta()) -> str:
    """The time as it stands in the tables."""
    return (datetime.now(UTC) + after).isoformat(timespec="microseconds").replace("+00:00", "Z")


P = ParamSpec("P")
R = TypeVar("R")


def _transaction(
    verb: Callable[Concatenate["Predictions", Session, P], R],
) -> Callable[Concatenate["Predictions", P], Awaitable[R]]:
    """Make a method one transaction in a thread, run again while the database restarts.

    One thread runs all its statements: an asynchronous driver switches threads at each statement, which takes more CPU
    time than the statements do. A caller that is cancelled waits until the transaction has ended.
    """

    @wraps(verb)
    async def lasting(self: "Predictions", *args: P.args, **kwargs: P.kwargs) -> R:
        def attempt() -> R:
            with self.session.begin() as session:
                return verb(self, session, *args, **kwargs)

        loop = asyncio.get_running_loop()
        give_up = loop.time() + SECONDS_WITHOUT_DATABASE
        while True:
            trying = loop.run_in_executor(self.threads, attempt)
            try:
                return await asyncio.shield(trying)
            except asyncio.CancelledError:
                await asyncio.wait([trying])
                raise
            except DBAPIError as error:
                if not may_pass(error) or loop.time() > give_up:
                    raise
                await asyncio.sleep(0.25)

    return lasting


class Predictions:
    """The database, at a URL of SQLAlchemy's: `sqlite:///path` or `postgresql://…`."""

    def __init__(self, url: str) -> None:
        self.engine = open_engine(url)
        self.session = sessionmaker(self.engine, expire_on_commit=False)
        self.threads = ThreadPoolExecutor(self.engine.pool.size(), "database")

    async def __aenter__(self) -> Self:
        """Bring the tables to our revision; Unusable where that cannot be."""
        try:
            await self._migrate()
        except (DBAPIError, Unusable) as error:
            await self.__aexit__()
            raise (error if isinstance(error, Unusable) else unusable(error)) from None
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await asyncio.to_thread(self.threads.shutdown)
        self.engine.dispose()

    @_transaction
    def _migrate(self, session: Session) -> None:
        migrate(session.connection())

    @_transaction
    def create(self, session: Session, prediction: Prediction) -> tuple[Prediction, bool]:
        """The prediction that has this id, and whether it is the one given: it is written if the id is new."""
        while not session.connection().scalar(_CREATE, _row(prediction)):
            if known := session.get(Prediction, prediction.id):  # else it was deleted just now
                return known, (known.owner, known.created_at) == (prediction.owner, prediction.created_at)
        return prediction, True

    @_transaction
    def get(self, session: Session, prediction_id: str) -> Prediction | None:
        """A prediction as it is now, without its secret input."""
        return session.get(Prediction, prediction_id)

    @_transaction
    def page(self, session: Session, cursor: str | None = None, size: int = 100) -> Page:
        """A page of the predictions of Replicate's clients, without their secret inputs.

        The cursor is `next` or `previous` of a neighbour, else a ValueError is raised; None leads to the newest page.
        """
        backwards, place = _parse_cursor(cursor) if cursor else (False, None)
        query = sa.select(Prediction).where(Prediction.api == "replicate")
        if place is not None:
            key = sa.tuple_(Prediction.created_at, Prediction.id)
            query = query.where(key > place if backwards else key < place)
        order = (column.asc() if backwards else column.desc() for column in (Prediction.created_at, Prediction.id))
        found = list(session.scalars(query.order_by(*order).limit(size + 1)))
        more, found = len(found) > size, found[:size]
        if backwards:
            found.reverse()
        if not found:
            return Page([], None, None)
        newer, older = (more, True) if backwards else (bool(cursor), more)
        first, last = found[0], found[-1]
        following = f"n~{last.created_at}~{last.id}" if older else None
        return Page(found, following, f"p~{first.created_at}~{first.id}" if newer else None)

    @_transaction
    def record(self, session: Session, prediction: Prediction, **changes: object) -> bool:
        """Write the progress of a prediction of ours; False where another front owns it now, or it has ended."""
        return _change_ours(session, prediction, changes)

    @_transaction
    def finish(self, session: Session, prediction: Prediction, files: Collection[File], **changes: object) -> bool:
        """End a prediction of ours, and erase its secret input; False where another front has ended it or owns it.

        Its webhook is erased too, unless the changes say that it is due. The files of its output are stored already;
        `status` and `completed_at` are among the changes.
        """
        # "request" is the column of the secret input.
        erased = {"request": None} if changes.get("webhook_due") else {"request": None, "webhook": None}
        if not _change_ours(session, prediction, erased | changes):
            # The connection may have broken after an earlier attempt was committed.
            known = session.get(Prediction, prediction.id)
            return bool(known) and (known.owner, known.completed_at) == (prediction.owner, changes["completed_at"])
        if files:
            session.execute(sa.insert(File.__table__), [_row(file) for file in files])
        return True

    @_transaction
    def cancel(self, session: Session, prediction_id: str) -> bool:
        """Ask for a prediction to be cancelled; False where none of this id is unfinished."""
        query = sa.update(Prediction).where(Prediction.id == prediction_id, Prediction.status.in_(UNFINISHED))
        return session.execute(query.values(cancel_requested=True)).rowcount == 1

    @_transaction
    def delivered(self, session: Session, prediction: Prediction) -> None:
        """The last webhook has arrived, or has been given up: erase its URL."""
        ours = sa.update(Prediction).where(Prediction.id == prediction.id)
        session.execute(ours.values(webhook_due=False, webhook=None))

    @_transaction
    def beat(self, session: Session, front: str) -> tuple[dict[str, int], list[str]]:
        """Count up a front's beat: the beats of all fronts, and which of its own predictions are to be cancelled."""
        first = insert(Heartbeat).values(id=front, beat=0)
        session.execute(first.on_conflict_do_update(index_elements=["id"], set_={"beat": Heartbeat.beat + 1}))
        beats = {row.id: row.beat for row in session.execute(sa.select(Heartbeat.id, Heartbeat.beat))}
        unwanted = sa.or_(Prediction.cancel_requested, Prediction.cancel_at < now())
        ours = sa.and_(Prediction.owner == front, unwanted, Prediction.status.in_(UNFINISHED))
        return beats, list(session.scalars(sa.select(Prediction.id).where(ours)))

    @_transaction
    def adopt(
        self, session: Session, front: str, dead: Collection[str], running: Collection[str], limit: int
    ) -> Sequence[Prediction]:
        """Take over unfinished predictions that no front runs, with their secret inputs.

        Those with the fewest adoptions come first, then the oldest, and the new owner's own last: so one that cannot be
        run does not block the others. The fronts in `dead` are deleted before. What the new owner, `front`, owns
        already and is not in `running` has lost its task.
        """
        if dead:
            session.execute(sa.delete(Heartbeat).where(Heartbeat.id.in_(dead)))
        orphaned = sa.and_(
            _NOT_DONE,
            sa.or_(
                Prediction.owner.is_(None),
                Prediction.owner.not_in(sa.select(Heartbeat.id)),
                sa.and_(Prediction.owner == front, Prediction.id.not_in(running)),
            ),
        )
        ours = sa.case((Prediction.owner == front, 1), else_=0)
        orphans = sa.select(Prediction.id).where(orphaned).order_by(ours, Prediction.adoptions, Prediction.created_at)
        # In PostgreSQL, two fronts at once lock different rows.
        ids = list(session.scalars(orphans.limit(limit).with_for_update(skip_locked=True)))
        if not ids:
            return []
        # SQLite locks nothing until now: another front may have been faster, so check the condition again.
        outlived = sa.case((Prediction.owner != front, 1), else_=0)  # the owner of a released one is null: 0
        taken = sa.update(Prediction).where(Prediction.id.in_(ids), orphaned).returning(Prediction)
        taken = taken.values(owner=front, adoptions=Prediction.adoptions + outlived)
        return sorted(session.scalars(taken.options(undefer(Prediction.secret_input))), key=lambda p: ids.index(p.id))

    @_transaction
    def release(self, session: Session, front: str, running: Collection[str]) -> None:
        """Leave what a front owns and does not run to the other fronts."""
        _release(session, front, running)

    @_transaction
    def leave(self, session: Session, front: str) -> None:
        """Delete a front that shuts down, and leave its predictions to the others."""
        _release(session, front, [])
        session.execute(sa.delete(Heartbeat).where(Heartbeat.id == front))

    @_transaction
    def secret(self, session: Session, name: str) -> str:
        """The value that all fronts share under a name; the first that asks draws it."""
        drawn = {"name": name, "value": secrets.token_urlsafe(32)}
        session.execute(insert(Secret.__table__).on_conflict_do_nothing(), drawn)
        return session.scalars(sa.select(Secret.value).where(Secret.name == name)).one()

    @_transaction
    def add_file(self, session: Session, file: File) -> None:
        """Make a stored file known."""
        session.merge(file)

    @_transaction
    def file(self, session: Session, file_id: str) -> File | None:
        """A file that has not expired."""
        file = session.get(File, file_id)
        return file if file and file.expires_at > now() else None

    @_transaction
    def uploads(self, session: Session) -> Sequence[File]:
        """The uploaded files that have not expired, the newest first."""
        query = sa.select(File).where(File.about.is_not(None), File.expires_at > now()).order_by(File.created_at.desc())
        return list(session.scalars(query.limit(100)))

    async def expire(self) -> list[str]:
        """Delete expired predictions and files: the ids of the files, whose contents are to be deleted too."""
        expired = await self._expire()
        await asyncio.get_running_loop().run_in_executor(self.threads, empty_log, self.engine)
        return expired

    @_transaction
    def _expire(self, session: Session) -> list[str]:
        old = Prediction.completed_at < now(-PREDICTION_LIFETIME)
        # Not `is_(False)`: SQLite would look all of those up instead of the few that are old.
        session.execute(sa.delete(Prediction).where(old, Prediction.webhook_due.is_not(True)))
        return list(session.scalars(sa.delete(File).where(File.expires_at < now()).returning(File.id)))

    @_transaction
    def delete_file(self, session: Session, file_id: str) -> None:
        """Delete a file before it expires."""
        session.execute(sa.delete(File).where(File.id == file_id))


# Of the predictions of a day, the few that a front still has work with; found by indexes.
_NOT_DONE = sa.or_(Prediction.status.in_(UNFINISHED), Prediction.webhook_due)
# Built once, since that takes longer than running them; parameters name the columns to be changed.
_column = Prediction.__table__.c
_CREATE = insert(Prediction.__table__).on_conflict_do_nothing(index_elements=["id"]).returning(_column.id)
_CHANGE_OURS = sa.update(Prediction.__table__).where(
    _column.id == sa.bindparam("ours"), _column.owner == sa.bindparam("us"), _column.status.in_(UNFINISHED)
)


def _change_ours(session: Session, prediction: Prediction, changes: dict[str, Any]) -> bool:
    """Whether a prediction was still ours and had not ended; then it is changed."""
    named = {"ours": prediction.id, "us": prediction.owner}
    return session.connection().execute(_CHANGE_OURS, {**changes, **named}).rowcount == 1


def _release(session: Session, front: str, running: Collection[str]) -> None:
    """Clear the owner: that does not count as the front's death."""
    ours = sa.and_(Prediction.owner == front, Prediction.id.not_in(running), _NOT_DONE)
    session.execute(sa.update(Prediction).where(ours).values(owner=None))


def _row(entry: Prediction | File) -> dict[str, Any]:
    """Values by column. Not the object itself is added: a failed session may leave it half attached for a retry."""
    columns = sa.inspect(type(entry)).column_attrs
    return {column.expression.name: getattr(entry, column.key) for column in columns}


def _parse_cursor(cursor: str) -> tuple[bool, sa.ColumnElement[Any]]:
    """Whether a cursor leads to newer predictions, and the time and id from which it leads."""
    found = re.fullmatch(r"([np])~([0-9TZ:.-]{1,40})~([ -~]{1,1000})", cursor)
    if not found:
        raise ValueError(f"cursor is {cursor[:80]!r}; it must be one that a page of this list gave.")
    return found[1] == "p", sa.tuple_(found[2], found[3])
