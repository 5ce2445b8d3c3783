"""What outlives every process of the cluster: predictions in a database, files in a directory or a bucket.

A prediction is written here before anybody hears of it, and belongs to one front at a time. Whatever a front writes of
it, it writes on the condition that it still owns it and that it has not ended: so it ends once, whoever tried. A front
shows that it lives by counting up its beat; the predictions of one that stopped counting are adopted by the others.

This module knows SQL and files; it knows nothing of HTTP, of Ray, or of the forms in which clients see a prediction.
"""

import asyncio
import contextlib
import hashlib
import mimetypes
import re
import secrets
import sqlite3
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

import fsspec
from sqlalchemy import (
    JSON,
    Text,
    and_,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    insert,
    make_url,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError, ProgrammingError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column, sessionmaker

UNFINISHED = ("starting", "processing")
# A restart of PostgreSQL takes seconds; past this the caller hears of it.
SECONDS_WITHOUT_DATABASE = 60
# Transactions of one front at a time in PostgreSQL, each with a thread and a connection of its own.
CONNECTIONS = 16
# Output and uploaded files, as long as at Replicate.
FILE_LIFETIME = timedelta(hours=1)
# Ended predictions, their redacted inputs and their logs; the span within which an id is idempotent.
PREDICTION_LIFETIME = timedelta(hours=24)


class Base(MappedAsDataclass, DeclarativeBase):
    """The tables."""


class Front(Base):
    """One process that accepts predictions; it lives as long as its beat rises."""

    __tablename__ = "fronts"

    id: Mapped[str] = mapped_column(primary_key=True)
    beat: Mapped[int] = mapped_column(default=0)


class Prediction(Base):
    """One prediction, from the moment it is accepted. Times are ISO 8601 in UTC, which sorts as text."""

    __tablename__ = "predictions"

    id: Mapped[str] = mapped_column(primary_key=True)
    # The front that runs it; none when a front that is to go has let it go.
    owner: Mapped[str | None] = mapped_column()
    created_at: Mapped[str] = mapped_column(index=True)
    # What is to be run, whole; forgotten when the prediction ends, since URLs in it may hold tokens.
    request: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    # What may be shown of it, for as long as the prediction is kept.
    input: Mapped[dict[str, Any]] = mapped_column(JSON)
    # "cog" or "replicate": the form of its webhooks.
    api: Mapped[str] = mapped_column()
    # The names by which Replicate's clients asked.
    model: Mapped[str] = mapped_column(default="")
    version: Mapped[str] = mapped_column(default="")
    # The front's address as the client wrote it: where its URLs point.
    base_url: Mapped[str] = mapped_column(default="")
    webhook: Mapped[str | None] = mapped_column(Text, default=None)
    webhook_events: Mapped[list[str]] = mapped_column(JSON, default_factory=list)
    # The last webhook is still to be delivered.
    webhook_due: Mapped[bool] = mapped_column(default=False, index=True)
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    # How many workers died while they ran it.
    deaths: Mapped[int] = mapped_column(default=0)
    status: Mapped[str] = mapped_column(default="starting", index=True)
    # Files stand in it as paths of the front, such as /files/<id>/output.webp.
    output: Mapped[Any] = mapped_column(JSON(none_as_null=True), nullable=True, default=None)
    error: Mapped[str | None] = mapped_column(Text, default=None)
    logs: Mapped[str] = mapped_column(Text, default="")
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON, default_factory=dict)
    started_at: Mapped[str | None] = mapped_column(default=None)
    completed_at: Mapped[str | None] = mapped_column(default=None, index=True)

    @property
    def finished(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.status not in UNFINISHED


class File(Base):
    """One file, uploaded or drawn. Its id cannot be guessed: whoever knows it may read the file."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column()
    content_type: Mapped[str] = mapped_column()
    size: Mapped[int] = mapped_column()
    sha256: Mapped[str] = mapped_column()
    created_at: Mapped[str] = mapped_column()
    expires_at: Mapped[str] = mapped_column(index=True)
    # An upload's own description; None for an output.
    about: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), default=None)


class Secret(Base):
    """What all fronts must share and no client may choose, such as the key that signs webhooks."""

    __tablename__ = "secrets"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str] = mapped_column()


@dataclass(frozen=True)
class Page:
    """One page of a list, the newest first, and the cursors of its neighbours."""

    predictions: Sequence[Prediction]
    next: str | None
    previous: str | None


# What a person would not want to be read by whoever may read a prediction.
_TOKEN = re.compile(r"\b(hf|r8|ghp|gho|sk|pk|api|civitai)[_-][A-Za-z0-9_-]{16,}")


def redact(value: Any) -> Any:  # noqa: ANN401 (JSON)
    """An input without what gives access: tokens, the queries and users of URLs; a data URI is named by its SHA-256."""
    if isinstance(value, dict):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("data:"):
        head = value.partition(",")[0]
        return f"{head[:80]},sha256-{hashlib.sha256(value.encode()).hexdigest()[:16]}"
    if re.match(r"[a-z][a-z0-9+.-]*://", value, re.IGNORECASE):
        parts = urlsplit(value)
        value = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return _TOKEN.sub("***", value)


def scrub(text: str, request: Any) -> str:  # noqa: ANN401 (JSON)
    """A log or an error without the queries of the URLs that were asked for."""
    for value in _strings(request):
        if "://" in value and not value.startswith("data:"):
            parts = urlsplit(value)
            for secret in filter(None, (f"?{parts.query}" if parts.query else "", parts.netloc.rpartition("@")[0])):
                text = text.replace(secret, "")
    return _TOKEN.sub("***", text)


def _strings(value: Any) -> Iterator[str]:  # noqa: ANN401 (JSON)
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def content_type(name: str) -> str:
    """What a file holds, by its name."""
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


def now(after: timedelta = timedelta()) -> str:
    """The time as it stands in the tables."""
    return (datetime.now(UTC) + after).isoformat(timespec="microseconds").replace("+00:00", "Z")


P = ParamSpec("P")
R = TypeVar("R")


def _transaction(
    verb: Callable[Concatenate["Predictions", Session, P], R],
) -> Callable[Concatenate["Predictions", P], Awaitable[R]]:
    """A verb that is one transaction, run again while the database restarts.

    It has one thread from its beginning to its end: an asynchronous driver changes threads at each statement, which
    takes more of the processor than the statements do. It ends before its caller does, even one that is cancelled.
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
            except (OperationalError, InterfaceError):
                if loop.time() > give_up:
                    raise
                await asyncio.sleep(0.25)

    return lasting


class Predictions:
    """The database.

    Args:
        url: SQLAlchemy's; `sqlite:///path` and `postgresql://…` get their asynchronous drivers.
    """

    def __init__(self, url: str) -> None:
        address = make_url(url)
        driver = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
        address = address.set(drivername=driver.get(address.drivername, address.drivername))
        sqlite = address.drivername.startswith("sqlite")
        # Of SQLite's writers one writes, and the others look again after a pause: here they queue for one connection.
        connections = 1 if sqlite else CONNECTIONS
        self.engine = create_engine(address, pool_size=connections, max_overflow=0)
        if sqlite:
            event.listen(self.engine, "connect", _share_sqlite)
        self.session = sessionmaker(self.engine, expire_on_commit=False)
        self.threads = ThreadPoolExecutor(connections, "database")

    async def __aenter__(self) -> Self:
        """Make the tables that are missing."""
        # Fronts start together, and CREATE TABLE IF NOT EXISTS is no safe race in PostgreSQL: the loser looks again.
        for attempt in range(5):
            try:
                await self._make_tables()
                break
            except (IntegrityError, ProgrammingError):
                if attempt == 4:
                    raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await asyncio.to_thread(self.threads.shutdown)
        self.engine.dispose()

    @_transaction
    def _make_tables(self, session: Session) -> None:
        Base.metadata.create_all(session.connection())

    async def create(self, prediction: Prediction) -> tuple[Prediction, bool]:
        """Write a prediction, unless its id is known.

        Returns:
            What the database holds under its id, and whether that is this very one.
        """
        try:
            await self._insert(_row(prediction))
            return prediction, True
        except IntegrityError:
            known = await self.get(prediction.id)
            return known, (known.owner, known.created_at) == (prediction.owner, prediction.created_at)

    @_transaction
    def _insert(self, session: Session, row: dict[str, Any]) -> None:
        session.execute(insert(Prediction.__table__), row)

    @_transaction
    def get(self, session: Session, prediction_id: str) -> Prediction | None:
        """A prediction as it is now."""
        return session.get(Prediction, prediction_id)

    @_transaction
    def page(self, session: Session, cursor: str | None = None, size: int = 100) -> Page:
        """A page of what Replicate's clients asked for.

        Args:
            cursor: `next` or `previous` of a neighbour; the newest page where None.
            size: how many predictions.

        Raises:
            ValueError: the cursor is none of ours.
        """
        key = tuple_(Prediction.created_at, Prediction.id)
        query = select(Prediction).where(Prediction.api == "replicate")
        backwards = False
        if cursor:
            direction, _, place = cursor.partition("~")
            time, _, prediction_id = place.partition("~")
            if direction not in ("n", "p") or not prediction_id:
                raise ValueError(f"cursor is {cursor[:80]!r}; it must be one that a page of this list gave.")
            backwards = direction == "p"
            place = tuple_(time, prediction_id)
            query = query.where(key > place if backwards else key < place)
        order = (column.asc() if backwards else column.desc() for column in (Prediction.created_at, Prediction.id))
        found = list(session.scalars(query.order_by(*order).limit(size + 1)))
        more, found = len(found) > size, found[:size]
        if backwards:
            found.reverse()
        newer, older = (more, True) if backwards else (bool(cursor), more)
        return Page(
            found,
            next=f"n~{found[-1].created_at}~{found[-1].id}" if found and older else None,
            previous=f"p~{found[0].created_at}~{found[0].id}" if found and newer else None,
        )

    @_transaction
    def record(self, session: Session, prediction: Prediction, **changes: object) -> bool:
        """Write how far an unfinished prediction of ours has come.

        Returns:
            False where it is ours no more, or has ended: then it must be let go.
        """
        return _change_ours(session, prediction, changes)

    async def finish(self, prediction: Prediction, files: Collection[File], **changes: object) -> bool:
        """End a prediction of ours, once and for all, and forget what it was asked with.

        Args:
            prediction: what is to end.
            files: its output, already stored.
            changes: among them `status` and `completed_at`.

        Returns:
            False where somebody else has ended it or owns it.
        """
        if await self._end(prediction, files, changes):
            return True
        # The connection may have broken after an earlier attempt was committed.
        known = await self.get(prediction.id)
        return known is not None and (known.owner, known.completed_at) == (prediction.owner, changes["completed_at"])

    @_transaction
    def _end(self, session: Session, prediction: Prediction, files: Collection[File], changes: dict[str, Any]) -> bool:
        if not _change_ours(session, prediction, {"request": None, **changes}):
            return False
        if files:
            session.execute(insert(File.__table__), [_row(file) for file in files])
        return True

    @_transaction
    def cancel(self, session: Session, prediction_id: str) -> bool:
        """Ask for the end of a prediction; False where there is none that could end."""
        query = update(Prediction).where(Prediction.id == prediction_id, Prediction.status.in_(UNFINISHED))
        return session.execute(query.values(cancel_requested=True)).rowcount == 1

    @_transaction
    def delivered(self, session: Session, prediction: Prediction) -> None:
        """The last webhook has arrived, or has been given up."""
        session.execute(update(Prediction).where(Prediction.id == prediction.id).values(webhook_due=False))

    @_transaction
    def beat(self, session: Session, front: str) -> tuple[dict[str, int], list[str]]:
        """Show that a front lives.

        Returns:
            The beats of all fronts, and which of its own predictions somebody wants cancelled.
        """
        if not session.execute(update(Front).where(Front.id == front).values(beat=Front.beat + 1)).rowcount:
            session.execute(insert(Front.__table__), {"id": front, "beat": 0})
        beats = {row.id: row.beat for row in session.execute(select(Front.id, Front.beat))}
        cancelled = session.scalars(
            select(Prediction.id).where(
                Prediction.owner == front, Prediction.cancel_requested, Prediction.status.in_(UNFINISHED)
            )
        )
        return beats, list(cancelled)

    @_transaction
    def adopt(
        self, session: Session, front: str, dead: Collection[str], running: Collection[str], limit: int
    ) -> Sequence[Prediction]:
        """Take over what is not done and has nobody who runs it.

        Args:
            front: the new owner.
            dead: fronts that are to be forgotten first.
            running: what the new owner runs already; what else it owns has lost its task on the way.
            limit: how many at once, so that several fronts share them.
        """
        if dead:
            session.execute(delete(Front).where(Front.id.in_(dead)))
        orphaned = and_(
            _NOT_DONE,
            or_(
                Prediction.owner.is_(None),
                Prediction.owner.not_in(select(Front.id)),
                and_(Prediction.owner == front, Prediction.id.not_in(running)),
            ),
        )
        # PostgreSQL: two fronts at once take different ones.
        orphans = select(Prediction.id).where(orphaned).order_by(Prediction.created_at).limit(limit)
        ids = list(session.scalars(orphans.with_for_update(skip_locked=True)))
        if not ids:
            return []
        # SQLite, which has locked nothing so far: another front may have been faster.
        taken = update(Prediction).where(Prediction.id.in_(ids), orphaned).values(owner=front).returning(Prediction)
        return list(session.scalars(taken))

    @_transaction
    def release(self, session: Session, front: str, running: Collection[str]) -> None:
        """What a front owns and does not run is free at once."""
        ours = and_(Prediction.owner == front, Prediction.id.not_in(running), _NOT_DONE)
        session.execute(update(Prediction).where(ours).values(owner=None))

    @_transaction
    def leave(self, session: Session, front: str) -> None:
        """A front ends in order: its predictions are free at once."""
        session.execute(delete(Front).where(Front.id == front))

    @_transaction
    def waiting(self, session: Session) -> int:
        """How many predictions have not ended, on all fronts."""
        query = select(func.count()).select_from(Prediction).where(Prediction.status.in_(UNFINISHED))
        return session.scalar(query) or 0

    async def secret(self, name: str) -> str:
        """What all fronts share under a name; drawn by the first that asks."""
        if (known := await self._secret(name)) is None:
            with contextlib.suppress(IntegrityError):  # another front was faster
                await self._add_secret(name, secrets.token_urlsafe(32))
            known = await self._secret(name)
        return known

    @_transaction
    def _secret(self, session: Session, name: str) -> str | None:
        return session.scalar(select(Secret.value).where(Secret.name == name))

    @_transaction
    def _add_secret(self, session: Session, name: str, value: str) -> None:
        session.execute(insert(Secret.__table__), {"name": name, "value": value})

    @_transaction
    def add_file(self, session: Session, file: File) -> None:
        """Make a stored file known."""
        session.merge(File(**_row(file)))

    @_transaction
    def file(self, session: Session, file_id: str) -> File | None:
        """A file that has not expired."""
        file = session.get(File, file_id)
        return file if file and file.expires_at > now() else None

    @_transaction
    def uploads(self, session: Session) -> Sequence[File]:
        """The uploaded files that have not expired, the newest first."""
        query = select(File).where(File.about.is_not(None), File.expires_at > now()).order_by(File.created_at.desc())
        return list(session.scalars(query.limit(100)))

    @_transaction
    def expire(self, session: Session) -> list[str]:
        """Forget what has been kept for its time.

        Returns:
            The ids of files whose contents may now be deleted.
        """
        session.execute(
            delete(Prediction).where(
                Prediction.completed_at < now(-PREDICTION_LIFETIME),
                # Not `is_(False)`: SQLite would look all of those up instead of the few that are old.
                Prediction.webhook_due.is_not(True),
            )
        )
        return list(session.scalars(delete(File).where(File.expires_at < now()).returning(File.id)))

    @_transaction
    def delete_file(self, session: Session, file_id: str) -> None:
        """Forget a file before its time."""
        session.execute(delete(File).where(File.id == file_id))


# What a front has to do with: a few of those that are kept for a day, found by their indexes.
_NOT_DONE = or_(Prediction.status.in_(UNFINISHED), Prediction.webhook_due)
# Made once, since making it takes longer than running it; the columns to be changed are named by its parameters.
_CHANGE_OURS = update(Prediction.__table__).where(
    Prediction.__table__.c.id == bindparam("ours"),
    Prediction.__table__.c.owner == bindparam("us"),
    Prediction.__table__.c.status.in_(UNFINISHED),
)


def _change_ours(session: Session, prediction: Prediction, changes: dict[str, Any]) -> bool:
    """Change a prediction if it is still ours and has not ended; whether it was."""
    named = {"ours": prediction.id, "us": prediction.owner}
    return session.connection().execute(_CHANGE_OURS, {**changes, **named}).rowcount == 1


def _row(entry: Prediction | File) -> dict[str, Any]:
    """Values, not the object: another attempt must not find it half attached to a session that failed."""
    return {column.name: getattr(entry, column.name) for column in entry.__table__.columns}


def _share_sqlite(connection: sqlite3.Connection, _: object) -> None:
    """Several processes write: readers do not wait for them, writers queue, and a commit is on the disk."""
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


class Files:
    """The contents of files, by id.

    Args:
        url: a directory, or anything that fsspec opens, such as `s3://bucket/prefix`; all fronts must see the same.
    """

    def __init__(self, url: str) -> None:
        self.system, self.root = fsspec.url_to_fs(url)
        self.system.makedirs(self.root, exist_ok=True)

    async def write(self, content: bytes, name: str, content_type: str, about: dict[str, Any] | None = None) -> File:
        """Store a file under an id that nobody can guess; the database does not know it yet."""
        file = File(
            id=secrets.token_urlsafe(24),
            name=name,
            content_type=content_type,
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            created_at=now(),
            expires_at=now(FILE_LIFETIME),
            about=about,
        )
        await asyncio.to_thread(self.system.pipe_file, self._path(file.id), content)
        return file

    async def read(self, file_id: str) -> bytes:
        """The content.

        Raises:
            FileNotFoundError: it has expired.
        """
        return await asyncio.to_thread(self.system.cat_file, self._path(file_id))

    async def delete(self, file_ids: Collection[str]) -> None:
        """Delete what is there of these."""
        for file_id in file_ids:
            try:
                await asyncio.to_thread(self.system.rm_file, self._path(file_id))
            except FileNotFoundError:
                continue

    def _path(self, file_id: str) -> str:
        if not re.fullmatch(r"[\w-]+", file_id):
            raise FileNotFoundError(file_id)
        return f"{self.root}/{file_id}"
