"""Tables, and the rules of their fields, which requests follow too."""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, StrictBool, StringConstraints
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from sqlalchemy import BigInteger, DateTime, Identity, Index, Integer, MetaData, String, false, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine
from sqlmodel import Field, SQLModel
from sqlmodel.sql.sqltypes import UTCDateTime

USER_ID_MAX = 255
TITLE_MAX = 200
DESCRIPTION_MAX = 1000
ACCOUNT_ID_LENGTH = 32
NAME_MAX = 255  # it stands in every token
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

# BIGINT makes no rowid on SQLite; there INTEGER has 64 bits anyway.
BIG_ID = BigInteger().with_variant(Integer(), "sqlite")

# PostgreSQL's driver gives aware UTC times by itself; SQLite stores no offset, so a decorator puts it back.
TIMESTAMP: TypeEngine[datetime] = DateTime(timezone=True).with_variant(UTCDateTime(), "sqlite")


class Now(FunctionElement[datetime]):
    """The database's clock, for rows that are loaded without times of their own."""

    inherit_cache = True


@compiles(Now)
def _now(_element: Now, _compiler: SQLCompiler, **_: Any) -> str:
    return "now()"


@compiles(Now, "sqlite")
def _now_sqlite(_element: Now, _compiler: SQLCompiler, **_: Any) -> str:
    # As long as the times that we write: they are compared as text.
    return "(strftime('%Y-%m-%d %H:%M:%f000', 'now'))"


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
        return handler(schema) | {"minLength": self.shortest, "maxLength": self.longest}

    def check(self, value: str) -> str:
        if not self.shortest <= len(value) <= self.longest:
            wanted = f"{self.shortest} to" if self.shortest else "at most"
            raise PydanticCustomError("length", f"must be {wanted} {self.longest} characters")
        if not is_storable(value):
            raise PydanticCustomError("characters", "must not contain U+0000 or unpaired surrogates")
        return value


def is_storable(value: str) -> bool:
    """Whether PostgreSQL can keep *value*; SQLite is held to the same."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def is_email(value: str) -> bool:
    return len(value) <= EMAIL_MAX and _EMAIL.fullmatch(value) is not None


Title = Annotated[str, StringConstraints(strip_whitespace=True), Length(1, TITLE_MAX)]
Description = Annotated[str, Length(0, DESCRIPTION_MAX)]
Name = Annotated[str, Length(0, NAME_MAX)]
Image = Annotated[str, Length(0, IMAGE_MAX)]


class TaskKey(SQLModel):
    """Whose task, and which; every statement starts from the owner."""

    id: int = Field(primary_key=True, sa_type=BIG_ID, sa_column_args=[Identity()])
    user_id: str = Field(sa_type=String(USER_ID_MAX))


class TaskFields(SQLModel):
    """What a client may write."""

    title: Title = Field(sa_type=String(TITLE_MAX), description="Stripped of the white space around it.")
    description: Description | None = Field(default=None, sa_type=String(DESCRIPTION_MAX))
    completed: StrictBool = Field(default=False, sa_column_kwargs={"server_default": false()})


class TaskState(SQLModel):
    """What the server keeps about a task."""

    completed_at: datetime | None = Field(sa_type=TIMESTAMP, description="When it was completed, if it is.")
    version: int = Field(
        sa_column_kwargs={"server_default": text("1")}, description="Changes with every change of the task."
    )
    created_at: datetime = Field(sa_type=TIMESTAMP, sa_column_kwargs={"server_default": Now()})
    updated_at: datetime = Field(sa_type=TIMESTAMP, sa_column_kwargs={"server_default": Now()})


class Task(TaskState, TaskFields, TaskKey, table=True):
    """One task of one user. There is no foreign key: the user table belongs to the issuer of the tokens."""

    __table_args__ = {"sqlite_autoincrement": True}


class Account(SQLModel):
    """What the owner of an account may know of it; the names and types are Better Auth's."""

    id: str = Field(primary_key=True, sa_type=String(ACCOUNT_ID_LENGTH))
    name: Name = Field(sa_type=String(NAME_MAX))
    email: str = Field(unique=True, sa_type=String(EMAIL_MAX), description="In lower case.")
    email_verified: bool = Field(sa_column_kwargs={"server_default": false()})
    image: Image | None = Field(sa_type=String(IMAGE_MAX))
    created_at: datetime = Field(sa_type=TIMESTAMP, sa_column_kwargs={"server_default": Now()})
    updated_at: datetime = Field(sa_type=TIMESTAMP, sa_column_kwargs={"server_default": Now()})


class LocalAccount(Account, table=True):
    """Somebody who signs in here. Better Auth's tables, which may stand beside it, have other names."""

    __tablename__ = "local_account"

    password_hash: str = Field(sa_type=String(PASSWORD_HASH_MAX))


_task = Task.__table__.c  # type: ignore[attr-defined] # SQLModel adds it
Index("ix_task_user_id_created_at_id", _task.user_id, _task.created_at.desc(), _task.id.desc())
