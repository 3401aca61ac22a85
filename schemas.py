"""Request and response bodies, built on the fields of `models.py`."""

import re
from datetime import datetime
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, StrictBool
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from models import Account, Image, Name, TaskFields, TaskKey, TaskState, Title

LIMIT_DEFAULT = 200
LIMIT_MAX = 1000
ID_MAX = 2**63 - 1  # BIGINT; both drivers fail on more

Sort = Literal[
    "created_at", "created", "updated_at", "title", "-created_at", "-created", "-updated_at", "-title"
]


class TaskCreate(TaskFields):
    """A new task."""

    model_config = {"json_schema_extra": {"examples": [{"title": "Buy milk", "description": "Two bottles"}]}}


def _without_defaults(schema: dict[str, Any]) -> None:
    for field in schema["properties"].values():
        field.pop("default", None)


class TaskUpdate(TaskFields):
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


class TaskOut(TaskState, TaskFields, TaskKey):
    """A task."""


class Health(BaseModel):
    status: Literal["ok"] = "ok"


def _true_or_false(value: object) -> bool:
    """Take `True` as well, which is how Python clients write it, and nothing else that means yes."""
    match str(value).lower():
        case "true":
            return True
        case "false":
            return False
    raise PydanticCustomError("bool_type", "must be true or false")


def digits(value: object) -> object:
    """Take a whole number as it is written in ASCII digits; Python would read `1_0` and ` 1` too."""
    if isinstance(value, str) and not re.fullmatch(r"-?[0-9]{1,4000}", value):
        raise PydanticCustomError("int_parsing", "must be a whole number")
    return value


Flag = Annotated[bool, BeforeValidator(_true_or_false)]


class Listing(NamedTuple):
    """Which tasks, by their state, and in which order."""

    states: frozenset[bool] = frozenset((False, True))
    sort_field: str = "created_at"
    descending: bool = True


class TaskListQuery(BaseModel):
    """Which tasks, in which order, and how many at once."""

    model_config = ConfigDict(frozen=True)

    status: Literal["all", "pending", "incomplete", "completed"] = Field(
        "all", description="`incomplete` is another word for `pending`."
    )
    completed: Flag | None = Field(None, description="The same filter by its other name.")
    sort: Sort | None = Field(
        None, description="Newest first without it. A leading `-` means descending. Ties break by `id`."
    )
    order: Literal["asc", "desc"] | None = Field(None, description="`asc` when `sort` is given.")
    limit: Annotated[int, BeforeValidator(digits)] = Field(LIMIT_DEFAULT, ge=1, le=LIMIT_MAX)
    cursor: str | None = Field(None, description="From the `Link` header of the page before.")
    count: Flag = Field(False, description="Answer with `X-Total-Count`.")

    @cached_property
    def listing(self) -> Listing:
        states = {"all": {False, True}, "completed": {True}}.get(self.status, {False})
        if self.completed is not None:
            states &= {self.completed}
        field = (self.sort or "created_at").removeprefix("-")
        if self.sort is None:
            descending = self.order != "asc"
        else:
            descending = self.sort.startswith("-") or self.order == "desc"
        return Listing(frozenset(states), "created_at" if field == "created" else field, descending)


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
