"""A typical FastAPI back end: ORM sessions, `response_model`, PyJWT for every request."""

import os
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime
from typing import Annotated

import jwt
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import ARRAY, Text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import Field, SQLModel, desc, select
from sqlmodel.ext.asyncio.session import AsyncSession

engine = create_async_engine(os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+asyncpg://"))
app = FastAPI()
bearer = HTTPBearer()


class TaskBase(SQLModel):
    title: str = Field(min_length=1, max_length=200)
    description: str | None = Field(default=None, max_length=1000)
    completed: bool = False
    priority: int | None = None
    category: str | None = Field(default=None, max_length=50)
    tags: list[str] = Field(default=[], sa_type=ARRAY(Text))
    due_date: date | None = None
    due_time: str | None = None
    recurring: str | None = None
    reminder: bool = False


class Task(TaskBase, table=True):
    id: int | None = Field(default=None, primary_key=True)
    user_id: str = Field(index=True)
    completed_at: datetime | None = None
    version: int = 1
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    updated_at: datetime = Field(default_factory=lambda: datetime.now(UTC))


class TaskRead(TaskBase):
    id: int
    user_id: str
    completed_at: datetime | None
    version: int
    created_at: datetime
    updated_at: datetime


async def get_session() -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session


def get_user(user_id: str, credentials: Annotated[HTTPAuthorizationCredentials, Depends(bearer)]) -> str:
    claims = jwt.decode(credentials.credentials, os.environ["BETTER_AUTH_SECRET"], algorithms=["HS256"])
    if claims["sub"] != user_id:
        raise HTTPException(403)
    return user_id


User = Annotated[str, Depends(get_user)]
Session = Annotated[AsyncSession, Depends(get_session)]


async def find(session: AsyncSession, user_id: str, task_id: int) -> Task:
    found = await session.exec(select(Task).where(Task.id == task_id, Task.user_id == user_id))
    task = found.first()
    if task is None:
        raise HTTPException(404)
    return task


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@app.get("/api/{user_id}/tasks", response_model=list[TaskRead])
async def list_tasks(user: User, session: Session, limit: int = 200) -> object:
    statement = select(Task).where(Task.user_id == user).order_by(desc(Task.created_at)).limit(limit)
    return (await session.exec(statement)).all()


@app.post("/api/{user_id}/tasks", response_model=TaskRead, status_code=201)
async def create_task(user: User, session: Session, body: TaskBase) -> object:
    task = Task(user_id=user, **body.model_dump())
    session.add(task)
    await session.commit()
    await session.refresh(task)
    return task


@app.get("/api/{user_id}/tasks/{task_id}", response_model=TaskRead)
async def get_task(user: User, session: Session, task_id: int) -> object:
    return await find(session, user, task_id)


@app.patch("/api/{user_id}/tasks/{task_id}/complete", response_model=TaskRead)
async def complete_task(user: User, session: Session, task_id: int) -> object:
    task = await find(session, user, task_id)
    task.completed = not task.completed
    task.completed_at = datetime.now(UTC) if task.completed else None
    task.version += 1
    task.updated_at = datetime.now(UTC)
    session.add(task)
    await session.commit()
    await session.refresh(task)
    return task
