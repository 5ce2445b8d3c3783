"""What outlives every process of the cluster: predictions in a database, files in a directory or a bucket.

A prediction is written here before anybody hears of it, and belongs to one front at a time. Whatever a front writes of
it, it writes on the condition that it still owns it and that it has not ended: so it ends once, whoever tried. A front
shows that it lives by counting up its beat; the predictions of one that stopped counting are adopted by the others.

This module knows SQL and files; it knows nothing of HTTP, of Ray, or of the forms in which clients see a prediction.
"""

import asyncio
import hashlib
import mimetypes
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import Any, ParamSpec, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

import fsspec
from sqlalchemy import JSON, Text, and_, delete, event, func, make_url, or_, select, tuple_, update
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

UNFINISHED = ("starting", "processing")
# A restart of PostgreSQL takes seconds; past this the caller hears of it.
SECONDS_WITHOUT_DATABASE = 60
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
    # The front that runs it; none right after a front has left in order.
    owner: Mapped[str | None] = mapped_column(index=True)
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
    webhook_due: Mapped[bool] = mapped_column(default=False)
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
    completed_at: Mapped[str | None] = mapped_column(default=None)

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


def _lasting(verb: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
    """A verb that waits for a database which restarts. Each is one transaction that may be run again."""

    @wraps(verb)
    async def repeated(*args: P.args, **kwargs: P.kwargs) -> R:
        clock = asyncio.get_running_loop().time
        give_up = clock() + SECONDS_WITHOUT_DATABASE
        while True:
            try:
                return await verb(*args, **kwargs)
            except (OperationalError, InterfaceError):
                if clock() > give_up:
                    raise
                await asyncio.sleep(0.25)

    return repeated


class Predictions:
    """The database.

    Args:
        url: SQLAlchemy's; `sqlite:///path` and `postgresql://…` get their asynchronous drivers.
    """

    def __init__(self, url: str) -> None:
        address = make_url(url)
        driver = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
        address = address.set(drivername=driver.get(address.drivername, address.drivername))
        self.engine: AsyncEngine = create_async_engine(
            address, pool_size=16, max_overflow=0, pool_timeout=SECONDS_WITHOUT_DATABASE
        )
        if address.drivername.startswith("sqlite"):
            event.listen(self.engine.sync_engine, "connect", _share_sqlite)
        self.session = async_sessionmaker(self.engine, expire_on_commit=False)

    async def __aenter__(self) -> Self:
        """Make the tables that are missing."""
        await self._make_tables()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self.engine.dispose()

    @_lasting
    async def _make_tables(self) -> None:
        # Fronts start together, and CREATE TABLE IF NOT EXISTS is no safe race in PostgreSQL: the loser looks again.
        for attempt in range(5):
            try:
                async with self.engine.begin() as connection:
                    await connection.run_sync(Base.metadata.create_all)
                return
            except (IntegrityError, OperationalError) as error:
                if attempt == 4 or not ("exists" in str(error) or "duplicate" in str(error)):
                    raise
                await asyncio.sleep(0.1)

    @_lasting
    async def create(self, prediction: Prediction) -> tuple[Prediction, bool]:
        """Write a prediction, unless its id is known.

        Returns:
            What the database holds under its id, and whether that is this very one.
        """
        # Values, not the object: a second attempt must not find it half attached to a session that failed.
        values = {column.name: getattr(prediction, column.name) for column in Prediction.__table__.columns}
        async with self.session() as session:
            try:
                await session.execute(Prediction.__table__.insert().values(values))
                await session.commit()
                return prediction, True
            except IntegrityError:
                await session.rollback()
                known = await session.get_one(Prediction, prediction.id)
                return known, (known.owner, known.created_at) == (prediction.owner, prediction.created_at)

    @_lasting
    async def get(self, prediction_id: str) -> Prediction | None:
        """A prediction as it is now."""
        async with self.session() as session:
            return await session.get(Prediction, prediction_id)

    @_lasting
    async def page(self, cursor: str | None = None, size: int = 100) -> Page:
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
        async with self.session() as session:
            found = list(await session.scalars(query.order_by(*order).limit(size + 1)))
        more, found = len(found) > size, found[:size]
        if backwards:
            found.reverse()
        newer, older = (more, True) if backwards else (bool(cursor), more)
        return Page(
            found,
            next=f"n~{found[-1].created_at}~{found[-1].id}" if found and older else None,
            previous=f"p~{found[0].created_at}~{found[0].id}" if found and newer else None,
        )

    @_lasting
    async def record(self, prediction: Prediction, **changes: object) -> bool:
        """Write how far an unfinished prediction of ours has come.

        Returns:
            False where it is ours no more, or has ended: then it must be let go.
        """
        async with self.session.begin() as session:
            return (await session.execute(_still_ours(prediction).values(changes))).rowcount == 1

    @_lasting
    async def finish(self, prediction: Prediction, files: Collection[File], **changes: object) -> bool:
        """End a prediction of ours, once and for all, and forget what it was asked with.

        Args:
            prediction: what is to end.
            files: its output, already stored.
            changes: among them `status` and `completed_at`.

        Returns:
            False where somebody else has ended it or owns it.
        """
        async with self.session.begin() as session:
            ended = await session.execute(_still_ours(prediction).values(request=None, **changes))
            if ended.rowcount == 1:
                session.add_all([_copy(file) for file in files])
                return True
        # The connection may have broken after an earlier attempt was committed.
        known = await self.get(prediction.id)
        return known is not None and (known.owner, known.completed_at) == (prediction.owner, changes["completed_at"])

    @_lasting
    async def cancel(self, prediction_id: str) -> bool:
        """Ask for the end of a prediction; False where there is none that could end."""
        query = update(Prediction).where(Prediction.id == prediction_id, Prediction.status.in_(UNFINISHED))
        async with self.session.begin() as session:
            return (await session.execute(query.values(cancel_requested=True))).rowcount == 1

    @_lasting
    async def delivered(self, prediction: Prediction) -> None:
        """The last webhook has arrived, or has been given up."""
        query = update(Prediction).where(Prediction.id == prediction.id)
        async with self.session.begin() as session:
            await session.execute(query.values(webhook_due=False))

    @_lasting
    async def beat(self, front: str) -> tuple[dict[str, int], list[str]]:
        """Show that a front lives.

        Returns:
            The beats of all fronts, and which of its own predictions somebody wants cancelled.
        """
        async with self.session.begin() as session:
            if not (await session.execute(update(Front).where(Front.id == front).values(beat=Front.beat + 1))).rowcount:
                session.add(Front(front))
                await session.flush()
            beats = {known.id: known.beat for known in await session.scalars(select(Front))}
            cancelled = await session.scalars(
                select(Prediction.id).where(
                    Prediction.owner == front, Prediction.cancel_requested, Prediction.status.in_(UNFINISHED)
                )
            )
            return beats, list(cancelled)

    @_lasting
    async def adopt(
        self, front: str, dead: Collection[str], running: Collection[str], limit: int
    ) -> Sequence[Prediction]:
        """Take over what is not done and has nobody who runs it.

        Args:
            front: the new owner.
            dead: fronts that are to be forgotten first.
            running: what the new owner runs already; what else it owns has lost its task on the way.
            limit: how many at once, so that several fronts share them.
        """
        orphans = (
            select(Prediction.id)
            .where(or_(Prediction.status.in_(UNFINISHED), Prediction.webhook_due))
            .where(
                or_(
                    Prediction.owner.is_(None),
                    Prediction.owner.not_in(select(Front.id)),
                    and_(Prediction.owner == front, Prediction.id.not_in(running)),
                )
            )
            .order_by(Prediction.created_at)
            .limit(limit)
            # PostgreSQL: two fronts at once take different ones. SQLite has one writer at a time.
            .with_for_update(skip_locked=True)
        )
        async with self.session.begin() as session:
            if dead:
                await session.execute(delete(Front).where(Front.id.in_(dead)))
            ids = list(await session.scalars(orphans))
            if not ids:
                return []
            taken = update(Prediction).where(Prediction.id.in_(ids)).values(owner=front).returning(Prediction)
            return list(await session.scalars(taken))

    @_lasting
    async def leave(self, front: str) -> None:
        """A front ends in order: its predictions are free at once."""
        async with self.session.begin() as session:
            await session.execute(update(Prediction).where(Prediction.owner == front).values(owner=None))
            await session.execute(delete(Front).where(Front.id == front))

    @_lasting
    async def waiting(self) -> int:
        """How many predictions have not ended, on all fronts."""
        async with self.session() as session:
            query = select(func.count()).select_from(Prediction).where(Prediction.status.in_(UNFINISHED))
            return await session.scalar(query) or 0

    @_lasting
    async def secret(self, name: str) -> str:
        """What all fronts share under a name; drawn by the first that asks."""
        async with self.session() as session:
            if known := await session.get(Secret, name):
                return known.value
            session.add(Secret(name, secrets.token_urlsafe(32)))
            try:
                await session.commit()
            except IntegrityError:
                await session.rollback()
            return (await session.get_one(Secret, name)).value

    @_lasting
    async def add_file(self, file: File) -> None:
        """Make a stored file known."""
        async with self.session.begin() as session:
            await session.merge(_copy(file))

    @_lasting
    async def file(self, file_id: str) -> File | None:
        """A file that has not expired."""
        async with self.session() as session:
            file = await session.get(File, file_id)
            return file if file and file.expires_at > now() else None

    @_lasting
    async def uploads(self) -> Sequence[File]:
        """The uploaded files that have not expired, the newest first."""
        query = select(File).where(File.about.is_not(None), File.expires_at > now()).order_by(File.created_at.desc())
        async with self.session() as session:
            return list(await session.scalars(query.limit(100)))

    @_lasting
    async def expire(self) -> list[str]:
        """Forget what has been kept for its time.

        Returns:
            The ids of files whose contents may now be deleted.
        """
        async with self.session.begin() as session:
            await session.execute(
                delete(Prediction).where(
                    Prediction.status.not_in(UNFINISHED),
                    Prediction.webhook_due.is_(False),
                    Prediction.completed_at < now(-PREDICTION_LIFETIME),
                )
            )
            return list(await session.scalars(delete(File).where(File.expires_at < now()).returning(File.id)))

    @_lasting
    async def delete_file(self, file_id: str) -> None:
        """Forget a file before its time."""
        async with self.session.begin() as session:
            await session.execute(delete(File).where(File.id == file_id))


def _still_ours(prediction: Prediction) -> Any:  # noqa: ANN401 (SQLAlchemy's Update, generic in what it returns)
    return update(Prediction).where(
        Prediction.id == prediction.id, Prediction.owner == prediction.owner, Prediction.status.in_(UNFINISHED)
    )


def _copy(file: File) -> File:
    """A row of its own for each attempt: an object that a failed session knew cannot be added to another."""
    return File(**{column.name: getattr(file, column.name) for column in File.__table__.columns})


def _share_sqlite(connection: Any, _: object) -> None:  # noqa: ANN401 (aiosqlite's adapter)
    """Several processes write: readers do not wait for them, writers queue, and a commit is on the disk."""
    for pragma in ("journal_mode=WAL", "busy_timeout=30000", "synchronous=FULL"):
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA {pragma}")
        cursor.close()


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
