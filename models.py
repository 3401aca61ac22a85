"""Tables, and the rules of their fields, which also apply to requests."""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime
from typing import Annotated, Any, Literal, get_args

from annotated_types import MaxLen
from pydantic import (
    AfterValidator,
    BeforeValidator,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StrictBool,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    BindParameter,
    ColumnElement,
    Date,
    DateTime,
    Dialect,
    Identity,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Text,
    TypeDecorator,
    and_,
    false,
    literal_column,
    not_,
    text,
    type_coerce,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine
from sqlmodel import Field, SQLModel
from sqlmodel.sql.sqltypes import UTCDateTime

USER_ID_MAX = 255
TITLE_MAX = 200
DESCRIPTION_MAX = 1000
CATEGORY_MAX = 50
TAG_MAX = 30
TAGS_MAX = 5
IDEMPOTENCY_KEY_MAX = 255

Priority = Literal["urgent", "high", "medium", "low", "none"]
Recurring = Literal["daily", "weekly", "monthly"]
ACCOUNT_ID_LENGTH = 32
NAME_MAX = 255  # every token contains it
EMAIL_MAX = 254  # RFC 5321, section 4.5.3.1.3, without the angle brackets
IMAGE_MAX = 2048
# Better Auth's (zod's) rule. Only ASCII, so that lower case is the same for every program.
_EMAIL = re.compile(
    r"(?!\.)(?!.*\.\.)[A-Za-z0-9_'+\-.]*[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}"
)
PASSWORD_HASH_MAX = 255  # bcrypt's has 60 characters, its successors have more

# Migrations drop constraints by name, so every name must be the same on every database.
SQLModel.metadata.naming_convention = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "pk": "pk_%(table_name)s",
    }
).naming_convention

# On SQLite only INTEGER makes a rowid, and it has 64 bits anyway.
BIG_ID = BigInteger().with_variant(Integer(), "sqlite")


class _UTCText(UTCDateTime):
    """A UTC time as SQLite's text, without an offset."""

    cache_ok = True

    def result_processor(self, *_: object) -> Callable[[str | None], datetime | None]:
        # Takes a tenth of the time of SQLAlchemy's parser of times followed by `UTCDateTime`.
        return lambda text: None if text is None else datetime.fromisoformat(f"{text}Z")


# PostgreSQL's driver returns aware UTC times.
TIMESTAMP: TypeEngine[datetime] = DateTime(timezone=True).with_variant(_UTCText(), "sqlite")


# An array on PostgreSQL, JSON on SQLite.
TEXTS: TypeEngine[Any] = ARRAY(Text()).with_variant(JSON(), "sqlite")


class Ranked(TypeDecorator[str]):
    """One of a few *words*, stored by its rank, the first as 0, so that it sorts by rank."""

    impl = SmallInteger
    cache_ok = True

    def __init__(self, *words: str) -> None:
        super().__init__()
        self.words = words

    def rank(self, word: str) -> int:
        return self.words.index(word)

    def process_bind_param(self, value: str | None, _: Dialect) -> int | None:
        return None if value is None else self.rank(value)

    def process_result_value(self, value: int | None, _: Dialect) -> str | None:
        return None if value is None else self.words[value]


PRIORITY = Ranked(*get_args(Priority))


class _DayNumber(TypeDecorator[date]):
    """Days since 0001-01-01, Python's first."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: date | None, _: Dialect) -> int | None:
        return None if value is None else (value - date.min).days


class _PostgresDay(TypeDecorator[date]):
    """Sends days as numbers: the driver would make `-infinity` and `infinity` of Python's first and last.

    A cast from text would depend on the session's DateStyle: the planner would not know its value, and Citus
    refuses it within CASE.
    """

    impl = Date
    cache_ok = True

    def bind_expression(self, bindparam: BindParameter[date]) -> ColumnElement[date]:
        return literal_column("DATE '0001-01-01'", Date()) + type_coerce(bindparam, _DayNumber())


DAY: TypeEngine[date] = Date().with_variant(_PostgresDay(), "postgresql")


class Now(FunctionElement[datetime]):
    """The database's clock, for rows that are loaded without times of their own."""

    inherit_cache = True


@compiles(Now)
def _now(_element: Now, _compiler: SQLCompiler, **_: Any) -> str:
    return "now()"


@compiles(Now, "sqlite")
def _now_sqlite(_element: Now, _compiler: SQLCompiler, **_: Any) -> str:
    # With six digits of the second, like the times that we write, because they are compared as text.
    return "(strftime('%Y-%m-%d %H:%M:%f000', 'now'))"


class NoTexts(FunctionElement[list[str]]):
    """An empty list, for rows that are loaded without tags."""

    inherit_cache = True


@compiles(NoTexts)
def _no_texts(_element: NoTexts, _compiler: SQLCompiler, **_: Any) -> str:
    return "'{}'"


@compiles(NoTexts, "sqlite")
def _no_texts_sqlite(_element: NoTexts, _compiler: SQLCompiler, **_: Any) -> str:
    return "'[]'"


@dataclass(frozen=True)
class Length:
    """Marks text that both databases can store, of *shortest* to *longest* characters."""

    shortest: int
    longest: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        # Text that must not be empty is stripped before its length is checked.
        pattern = r"^[^\u0000]*[^\s\u0000][^\u0000]*$" if self.shortest else r"^[^\u0000]*$"
        limits = {"maxLength": self.longest, "pattern": pattern}
        return handler(schema) | ({"minLength": self.shortest} if self.shortest else {}) | limits

    def check(self, value: str) -> str:
        if not self.shortest <= len(value) <= self.longest:
            wanted = f"{self.shortest} to" if self.shortest else "at most"
            raise PydanticCustomError("length", f"must be {wanted} {self.longest} characters")
        if not is_storable(value):
            raise PydanticCustomError("characters", "must not contain U+0000 or unpaired surrogates")
        return value


def is_storable(value: str) -> bool:
    """Whether PostgreSQL can store *value*; the same rule applies on SQLite."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def is_email(value: str) -> bool:
    return len(value) <= EMAIL_MAX and _EMAIL.fullmatch(value) is not None


Title = Annotated[str, StringConstraints(strip_whitespace=True), Length(1, TITLE_MAX)]
Description = Annotated[str, Length(0, DESCRIPTION_MAX)]
Category = Annotated[str, Length(0, CATEGORY_MAX)]
Tag = Annotated[str, StringConstraints(strip_whitespace=True), Length(1, TAG_MAX)]


def _each_once(tags: list[str]) -> list[str]:
    return list(dict.fromkeys(tags))


def _day(value: object) -> object:
    """Accept only a day as it is written, and no time or number that pydantic would convert to one."""
    if value is None or type(value) is date:
        return value
    with contextlib.suppress(ValueError):
        if isinstance(value, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
            return date.fromisoformat(value)
    raise PydanticCustomError("day", "must be a day like 2026-02-28")


def _wall_clock(value: str) -> str:
    if not re.fullmatch(WALL_CLOCK, value):
        raise PydanticCustomError("wall_clock", "must be a time like 09:30")
    return value


WALL_CLOCK = "([01][0-9]|2[0-3]):[0-5][0-9]"

Tags = Annotated[list[Tag], MaxLen(TAGS_MAX), AfterValidator(_each_once)]
Day = Annotated[date, BeforeValidator(_day)]
WallClock = Annotated[
    str, AfterValidator(_wall_clock), WithJsonSchema({"type": "string", "pattern": f"^{WALL_CLOCK}$"})
]
Name = Annotated[str, Length(0, NAME_MAX)]
Image = Annotated[str, Length(0, IMAGE_MAX)]


class TaskKey(SQLModel):
    """The id and the owner of a task; every statement starts from the owner."""

    id: int = Field(primary_key=True, sa_type=BIG_ID, sa_column_args=[Identity()])
    user_id: str = Field(sa_type=String(USER_ID_MAX))


class TaskFields(SQLModel):
    """The fields that a client may write."""

    title: Title = Field(sa_type=String(TITLE_MAX), description="Stripped of the white space around it.")
    description: Description | None = Field(default=None, sa_type=String(DESCRIPTION_MAX))
    completed: StrictBool = Field(default=False, sa_column_kwargs={"server_default": false()})
    priority: Priority | None = Field(default=None, sa_type=PRIORITY)
    category: Category | None = Field(default=None, sa_type=String(CATEGORY_MAX))
    tags: Tags = Field(
        default=[],
        sa_type=TEXTS,
        sa_column_kwargs={"server_default": NoTexts(), "nullable": False},
        description=f"Up to {TAGS_MAX}, stripped, each once.",
    )
    due_date: Day | None = Field(default=None, sa_type=DAY, description="A day, in no time zone.")
    due_time: WallClock | None = Field(
        default=None,
        sa_type=String(5),
        description="A wall-clock time, on the day of `due_date` if there is one.",
    )
    recurring: Recurring | None = Field(
        default=None, sa_type=String(7), description="Completing a task with a `due_date` creates the next."
    )
    reminder: StrictBool = Field(
        default=False,
        sa_column_kwargs={"server_default": false()},
        description="Kept for the client; nothing is sent.",
    )


class TaskState(SQLModel):
    """The fields that the server sets."""

    completed_at: datetime | None = Field(sa_type=TIMESTAMP, description="When it was completed, if it is.")
    version: int = Field(
        sa_column_kwargs={"server_default": text("1")}, description="Changes with every change of the task."
    )
    created_at: datetime = Field(sa_type=TIMESTAMP, sa_column_kwargs={"server_default": Now()})
    updated_at: datetime = Field(sa_type=TIMESTAMP, sa_column_kwargs={"server_default": Now()})


class TaskSeries(SQLModel):
    """The fields that the server keeps for a series and never returns."""

    # The intended day of the month: after 31 January and 28 February comes 31 March.
    anchor_day: int | None = Field(default=None, sa_type=SmallInteger)
    # A task that is reopened and completed again gets no second successor.
    has_successor: bool = Field(default=False, sa_column_kwargs={"server_default": false()})


class TaskHistory(SQLModel):
    """The fields by which devices learn what has changed."""

    revision: int = Field(
        sa_type=BigInteger,
        sa_column_kwargs={"server_default": text("0")},
        description="The owner's revision in which it last changed.",
    )
    deleted_at: datetime | None = Field(sa_type=TIMESTAMP)
    erased: bool = Field(
        sa_column_kwargs={"server_default": false()},
        description="Deleted for good: what is left is a tombstone, without the contents.",
    )


class Task(TaskHistory, TaskSeries, TaskState, TaskFields, TaskKey, table=True):
    """One task of one user. There is no foreign key: the user table belongs to the issuer of the tokens."""

    __table_args__ = {"sqlite_autoincrement": True}


class TaskOwner(SQLModel, table=True):
    """What is known of all tasks of a user together. Every change of a user's tasks locks this row first."""

    __tablename__ = "task_owner"
    # Room for the next versions of a row on its page, because every change of a task changes it.
    __table_args__ = {"postgresql_with": {"fillfactor": 50}}

    user_id: str = Field(primary_key=True, sa_type=String(USER_ID_MAX))
    revision: int = Field(
        sa_type=BigInteger,
        sa_column_kwargs={"server_default": text("0")},
        description="Of the last change. Each change takes the next one, in its own transaction.",
    )
    task_count: int = Field(sa_type=BigInteger, sa_column_kwargs={"server_default": text("0")})
    forgotten_revision: int = Field(
        sa_type=BigInteger,
        sa_column_kwargs={"server_default": text("0")},
        description="The highest revision of a dropped tombstone. Older sync tokens get 410.",
    )


class IdempotencyKey(SQLModel, table=True):
    """A request that has been answered, and the answer."""

    __tablename__ = "idempotency_key"

    user_id: str = Field(primary_key=True, sa_type=String(USER_ID_MAX))
    key: str = Field(primary_key=True, sa_type=String(IDEMPOTENCY_KEY_MAX))
    fingerprint: str = Field(sa_type=String(64), description="SHA-256 of what was sent, in hexadecimal.")
    answer: str = Field(sa_type=Text, description="The body of the answer.")
    weight: int = Field(
        sa_type=SmallInteger,
        sa_column_kwargs={"server_default": text("1")},
        description="As how many keys it counts, by its size.",
    )
    created_at: datetime = Field(sa_type=TIMESTAMP)


class Account(SQLModel):
    """The fields that an account's owner may see; the names and types are Better Auth's."""

    id: str = Field(primary_key=True, sa_type=String(ACCOUNT_ID_LENGTH))
    name: Name = Field(sa_type=String(NAME_MAX))
    email: str = Field(unique=True, sa_type=String(EMAIL_MAX), description="In lower case.")
    email_verified: bool = Field(sa_column_kwargs={"server_default": false()})
    image: Image | None = Field(sa_type=String(IMAGE_MAX))
    created_at: datetime = Field(sa_type=TIMESTAMP, sa_column_kwargs={"server_default": Now()})
    updated_at: datetime = Field(sa_type=TIMESTAMP, sa_column_kwargs={"server_default": Now()})


class LocalAccount(Account, table=True):
    """An account of this service. Better Auth's tables, which may be beside this one, have other names."""

    __tablename__ = "local_account"

    password_hash: str = Field(sa_type=String(PASSWORD_HASH_MAX))
    sessions_ended_at: datetime | None = Field(
        sa_type=TIMESTAMP, description="Sessions that began at this time or before have ended."
    )


_task = Task.__table__.c  # type: ignore[attr-defined] # SQLModel adds it


def _index(name: str, *columns: Any, where: ColumnElement[bool] | None = None) -> None:
    Index(name, *columns, postgresql_where=where, sqlite_where=where)


_live, _deleted = _task.deleted_at.is_(None), _task.deleted_at.is_not(None)
_newest_first = (_task.user_id, _task.created_at.desc(), _task.id.desc())
_index("ix_task_live", *_newest_first, where=_live)
_index("ix_task_live_pending", *_newest_first, where=and_(_live, not_(_task.completed)))
_index("ix_task_live_due_date", _task.user_id, _task.due_date, _task.id, where=_live)
_index("ix_task_revision", _task.user_id, _task.revision, _task.id)
# Each has the tasks in the trash first, and then the tombstones.
_index("ix_task_deleted", _task.user_id, _task.erased, _task.deleted_at, _task.id, where=_deleted)
_index("ix_task_deleted_at", _task.erased, _task.deleted_at, where=_deleted)
_key = IdempotencyKey.__table__.c  # type: ignore[attr-defined] # SQLModel adds it
_index("ix_idempotency_key_created_at", _key.created_at)
_index("ix_idempotency_key_user_id_weight", _key.user_id, _key.weight)
