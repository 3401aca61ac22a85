"""Request and response bodies, built on the fields of `models.py`."""

import re
from collections.abc import Iterable
from datetime import date, datetime
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    StrictBool,
    ValidationInfo,
    field_validator,
)
from pydantic import Tag as Tagged
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from models import (
    Account,
    Category,
    Day,
    Image,
    Length,
    Name,
    Priority,
    Tag,
    TaskFields,
    TaskKey,
    TaskState,
    Title,
)

LIMIT_MAX = 1000  # also the default: a front end without paging would miss what a shorter list leaves out
CHANGES_DEFAULT = 500
SEARCH_MAX = 200
WORDS_MAX = 8  # each is looked for in every task of the user
REPEATED_MAX = 100
OPERATIONS_MAX = 100
STATS_TAGS_MAX = 100
ID_MAX = 2**63 - 1  # BIGINT; both drivers fail on more

Sort = Literal[
    "created_at", "created", "updated_at", "title", "priority", "due_date",
    "-created_at", "-created", "-updated_at", "-title", "-priority", "-due_date",
]  # fmt: skip


def _true_or_false(value: object) -> bool:
    """Accept true and false in any case, as Python clients send `True`, and no other word for them."""
    match str(value).lower():
        case "true":
            return True
        case "false":
            return False
    raise PydanticCustomError("bool_type", "must be true or false")


def digits(value: object) -> object:
    """Accept a whole number only in ASCII digits; Python would read `1_0` and ` 1` too."""
    if isinstance(value, str) and not re.fullmatch(r"-?[0-9]{1,4000}", value):
        raise PydanticCustomError("int_parsing", "must be a whole number")
    return value


Flag = Annotated[bool, BeforeValidator(_true_or_false)]


class _Sent(TaskFields):
    """Fields from a request. SQLModel's constructor, which tables need, takes as long as the validation."""

    __init__ = BaseModel.__init__


class TaskCreate(_Sent):
    """A new task."""

    model_config = {
        "json_schema_extra": {
            "examples": [
                {
                    "title": "Buy milk",
                    "description": "Two bottles",
                    "priority": "high",
                    "tags": ["home"],
                    "due_date": "2026-12-24",
                }
            ],
        }
    }


def _without_defaults(schema: dict[str, Any]) -> None:
    for field in schema["properties"].values():
        field.pop("default", None)


class TaskUpdate(_Sent):
    """Any subset of the writable fields: what is absent keeps its value, null clears."""

    model_config = {"json_schema_extra": _without_defaults}

    title: Title = Field(default="", examples=["Buy oat milk"])  # the default is never read

    def changes(self) -> dict[str, Any]:
        """Return what was sent."""
        return self.model_dump(exclude_unset=True)


class Completion(BaseModel):
    """The state to set; without it the state is toggled."""

    completed: StrictBool = Field(default=False, examples=[True])  # the default is never read

    model_config = {"json_schema_extra": _without_defaults}

    def changes(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


def _without_fraction(value: object) -> object:
    """JSON has one kind of number: 7.0 is 7."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


BulkId = Annotated[int, Field(ge=1, le=ID_MAX, strict=True), BeforeValidator(_without_fraction)]
BulkVersion = Annotated[
    Annotated[int, Field(strict=True), BeforeValidator(_without_fraction)] | None,
    Field(description="Only if the task has this version, as with `If-Match`."),
]


class Create(BaseModel):
    """Create a task."""

    op: Literal["create"]
    task: TaskCreate


class Update(BaseModel):
    """Set the fields in `changes`."""

    op: Literal["update"]
    id: BulkId
    changes: TaskUpdate
    version: BulkVersion = None


class Complete(BaseModel):
    """Set `completed`."""

    op: Literal["complete"]
    id: BulkId
    completed: StrictBool = True
    version: BulkVersion = None


class Delete(BaseModel):
    """Move a task to the trash."""

    op: Literal["delete"]
    id: BulkId
    version: BulkVersion = None


def _tag(operation: object) -> str:
    # Validation passes a dict; serialisation, for the fingerprint of an Idempotency-Key, passes a model.
    name = operation.get("op") if isinstance(operation, dict) else getattr(operation, "op", None)
    return f"<{name}>" if isinstance(name, str) else ""


# The tags appear in the place of a mistake, where web/problems.py drops the parts in angle brackets.
Operation = Annotated[
    Annotated[Create, Tagged("<create>")]
    | Annotated[Update, Tagged("<update>")]
    | Annotated[Complete, Tagged("<complete>")]
    | Annotated[Delete, Tagged("<delete>")],
    Discriminator(
        _tag,
        custom_error_type="operation",
        custom_error_message="must have an op: create, update, complete or delete",
    ),
]


class Bulk(BaseModel):
    """Operations, done in their order."""

    model_config = {
        "json_schema_extra": {
            "examples": [
                {
                    "operations": [
                        {"op": "create", "task": {"title": "Buy milk"}},
                        {"op": "create", "task": {"title": "Bake a cake", "due_date": "2026-12-24"}},
                    ]
                }
            ]
        }
    }

    operations: list[Operation] = Field(min_length=1, max_length=OPERATIONS_MAX)


def _absent_rather_than_null(schema: dict[str, Any]) -> None:
    for name, field in schema["properties"].items():
        match field.pop("anyOf", None):
            case [kind, {"type": "null"}]:
                schema["properties"][name] = {**field, **kind}
        field.pop("default", None)


class Done(BaseModel):
    """What became of one operation, with the status that it would have had alone."""

    model_config = {"json_schema_extra": _absent_rather_than_null}

    status: int
    task: "TaskOut | None" = None
    detail: str | None = Field(None, description="What was wrong, if anything was.")
    etag: str | None = Field(None, description="The task's, if the operation expected another version.")


class BulkQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    atomic: Flag = Field(
        True,
        description="All or nothing. `false`: each by itself, 207 with a status for each; a body with a "
        "mistake in it is refused whole all the same.",
    )


class BulkDone(BaseModel):
    """One result for each operation, in the same order."""

    results: list[Done]


class AllCompleted(BaseModel):
    """The state to set for all."""

    completed: StrictBool = Field(examples=[True])


class Counted(BaseModel):
    """How many tasks were changed or deleted."""

    count: int


class CountedIds(Counted):
    """The ids of the tasks that were deleted or restored, and how many they are."""

    ids: list[int]


class Deleted(BaseModel):
    """What `DELETE_STATUS=200` answers."""

    ok: Literal[True] = True


class Stats(BaseModel):
    """How many tasks there are of each kind."""

    total: int
    pending: int
    completed: int
    overdue: int | None = Field(description="Pending and due before `today`; null when no day is named.")
    priorities: dict[Priority, int] = Field(description="`none` counts tasks without a priority too.")
    tags: dict[str, int] = Field(description=f"The {STATS_TAGS_MAX} most used, the most used first.")


class ChangesQuery(BaseModel):
    model_config = ConfigDict(frozen=True)

    since: str | None = Field(None, description="`next` of a page before. Without it, all tasks come first.")
    limit: Annotated[int, BeforeValidator(digits)] = Field(CHANGES_DEFAULT, ge=1, le=LIMIT_MAX)


class EventsQuery(BaseModel):
    model_config = ConfigDict(frozen=True)

    since: str | None = Field(None, description="Begin after this token; `Last-Event-ID` wins.")


class TaskChanged(BaseModel):
    """A task that was created, changed or restored, as it is now."""

    type: Literal["changed"]
    task: "TaskOut"


class TaskDeleted(BaseModel):
    """A task that was deleted."""

    type: Literal["deleted"]
    id: int
    deleted_at: datetime


class ChangesOut(BaseModel):
    """Each task that has changed, in the order of its last change. `next` goes on where this page ends."""

    changes: list[Annotated[TaskChanged | TaskDeleted, Field(discriminator="type")]]
    next: str
    has_more: bool


class StatsQuery(BaseModel):
    model_config = ConfigDict(frozen=True)

    today: Day | None = Field(None, description="The day that it is where the person is.")


_TASK: dict[str, JsonValue] = {
    "id": 7,
    "user_id": "alice",
    "title": "Buy milk",
    "description": "Two bottles",
    "completed": True,
    "priority": "high",
    "category": "shopping",
    "tags": ["home"],
    "due_date": "2026-12-24",
    "due_time": "18:00",
    "recurring": "weekly",
    "reminder": False,
    "completed_at": "2026-11-20T10:00:00.123456Z",
    "version": 2,
    "created_at": "2026-11-20T09:30:00.123456Z",
    "updated_at": "2026-11-20T10:00:00.123456Z",
}


class TaskOut(TaskState, TaskFields, TaskKey):
    """A task."""

    model_config = {
        "title": "Task",
        "json_schema_serialization_defaults_required": True,  # every member is always there
        "json_schema_extra": {"examples": [_TASK]},
    }


class TrashedTask(TaskOut):
    """A deleted task, which can be restored."""

    model_config = {
        "title": "Task in the trash",
        "json_schema_extra": {"examples": [_TASK | {"deleted_at": "2026-11-20T10:00:00.123456Z"}]},
    }

    deleted_at: datetime


class TrashQuery(BaseModel):
    model_config = ConfigDict(frozen=True)

    limit: Annotated[int, BeforeValidator(digits)] = Field(LIMIT_MAX, ge=1, le=LIMIT_MAX)
    cursor: str | None = Field(None, description="From the `Link` header of the page before.")


class NoQuery(BaseModel):
    """No parameters. A filter, which would not narrow anything down, is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskIds(BaseModel):
    """The tasks to restore."""

    ids: list[BulkId] = Field(min_length=1, max_length=LIMIT_MAX, examples=[[7, 8]])


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Filter(NamedTuple):
    """The filters of a list. An empty one, or None, filters nothing."""

    states: frozenset[bool] = frozenset((False, True))
    words: tuple[str, ...] = ()
    priorities: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    due_date_from: date | None = None
    due_date_to: date | None = None


class Order(NamedTuple):
    """The field to sort by; ties break by id. Null comes last in either direction."""

    field: str = "created_at"
    descending: bool = True


class Position(NamedTuple):
    """A place in a list: the sort key and the id of a task."""

    key: Any
    task_id: int


class SyncPosition(NamedTuple):
    """A place among the changes of a user's tasks: after the task *task_id*, which changed in *revision*.

    *first* is the owner's newest revision when an initial sync began, 0 once it has finished. Until then
    tombstones up to *first* are skipped: the client never had those tasks.
    """

    revision: int
    task_id: int
    first: int


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _words(*texts: str) -> tuple[str, ...]:
    return _distinct(" ".join(texts).split())


class TaskFilter(BaseModel):
    """Which tasks. Several filters narrow one another down."""

    model_config = ConfigDict(frozen=True)

    status: Literal["all", "pending", "incomplete", "completed"] = Field(
        "all", description="`incomplete` is another word for `pending`."
    )
    completed: Flag | None = Field(None, description="The same filter by its other name.")
    search: Annotated[str, Length(0, SEARCH_MAX)] = Field(
        "", description=f"Up to {WORDS_MAX} words that are all in the title or the description, in any case."
    )
    q: Annotated[str, Length(0, SEARCH_MAX)] = Field("", description="The same as `search`.")
    priority: tuple[Priority, ...] = Field(
        (), max_length=REPEATED_MAX, description="Any of these. `none` finds tasks without a priority too."
    )
    category: tuple[Category, ...] = Field((), max_length=REPEATED_MAX, description="Any of these.")
    tags: tuple[Tag, ...] = Field((), max_length=REPEATED_MAX, description="All of these.")
    due_date_from: Day | None = Field(None, description="The first day.")
    due_date_to: Day | None = Field(None, description="The last day.")

    @field_validator("search", "q")
    @classmethod
    def _of_few_words(cls, value: str, info: ValidationInfo) -> str:
        if len(_words(info.data.get("search", ""), value)) > WORDS_MAX:
            raise PydanticCustomError("words", f"must have at most {WORDS_MAX} words")
        return value

    @cached_property
    def filter(self) -> Filter:
        states = {"all": {False, True}, "completed": {True}}.get(self.status, {False})
        if self.completed is not None:
            states &= {self.completed}
        return Filter(
            frozenset(states),
            _words(self.search, self.q),
            _distinct(self.priority),
            _distinct(self.category),
            _distinct(self.tags),
            self.due_date_from,
            self.due_date_to,
        )


class TaskSelection(TaskFilter):
    """The tasks to change or delete. A misspelt filter is refused, because it would select too many."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskListQuery(TaskFilter):
    """Which tasks, in which order, and how many at once."""

    sort: Sort | None = Field(
        None,
        description="Newest first without it. A leading `-` means descending. Ties break by `id`, and what "
        "has no value comes last. By `priority`, urgent comes first.",
    )
    sort_by: Sort | None = Field(None, description="The same as `sort`.")
    order: Literal["asc", "desc"] | None = Field(None, description="`asc` when `sort` is given.")
    limit: Annotated[int, BeforeValidator(digits)] = Field(LIMIT_MAX, ge=1, le=LIMIT_MAX)
    cursor: str | None = Field(None, description="From the `Link` header of the page before.")
    count: Flag = Field(False, description="Answer with `X-Total-Count`.")

    @cached_property
    def ordering(self) -> Order:
        sort = self.sort or self.sort_by
        if sort is None:
            return Order(descending=self.order != "asc")
        field = sort.removeprefix("-")
        descending = sort.startswith("-") or self.order == "desc"
        return Order("created_at" if field == "created" else field, descending)


_ALICE: dict[str, JsonValue] = {"email": "alice@example.com", "password": "correct horse battery"}


class SignUp(BaseModel):
    """A new account. Further members, which Better Auth knows, are ignored."""

    model_config = {"json_schema_extra": {"examples": [{"name": "Alice", **_ALICE}]}}

    name: Name
    email: str
    password: str = Field(description="8 to 128 characters.")
    image: Image | None = None


class SignIn(BaseModel):
    """What opens an account. Further members, which Better Auth knows, are ignored."""

    model_config = {"json_schema_extra": {"examples": [_ALICE]}}

    email: str
    password: str


class AccountOut(Account):
    """An account, its members named as Better Auth names them."""

    model_config = {"alias_generator": to_camel, "validate_by_name": True}


class Token(BaseModel):
    token: str = Field(description="For `Authorization: Bearer`.")


class SignedUp(Token):
    user: AccountOut


class SignedIn(SignedUp):
    redirect: Literal[False] = False


class SignedOut(BaseModel):
    success: Literal[True] = True


class SessionsRevoked(BaseModel):
    status: Literal[True] = True


class SessionOut(BaseModel):
    """What a token stands for, in the shape of Better Auth's sessions."""

    model_config = {"alias_generator": to_camel, "validate_by_name": True}

    id: str
    user_id: str
    token: str
    expires_at: datetime
    created_at: datetime
    updated_at: datetime
    ip_address: str
    user_agent: str


class CurrentSession(BaseModel):
    session: SessionOut
    user: AccountOut


class AccessToken(BaseModel):
    """RFC 6749, section 5.1."""

    access_token: str
    token_type: Literal["bearer"] = "bearer"  # noqa: S105 - a scheme
    expires_in: int = Field(description="In seconds.")
