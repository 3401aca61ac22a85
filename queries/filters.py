"""The filters of a list as SQL conditions.

A list has one of three shapes. The conditions of a filtered one take every filter, absent ones as null, so
that few statements serve all combinations that clients send.
"""

from collections.abc import Iterator
from typing import Any, Literal

from sqlalchemy import (
    Boolean,
    ColumnElement,
    SmallInteger,
    Text,
    bindparam,
    func,
    literal_column,
    not_,
    or_,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from database.arrays import AnyOf, HasAll, list_of
from models import DAY, PRIORITY
from queries.owner import LIVE, TASKS
from schemas import Filter

Shape = Literal["all", "pending", "filtered"]
PENDING = Filter(states=frozenset((False,)))


class FoldCase(FunctionElement[str]):
    """A text in lower case, beyond ASCII too.

    On PostgreSQL a migration creates the function, because `lower` folds only ASCII if LC_CTYPE is C.
    """

    type = Text()
    inherit_cache = True


@compiles(FoldCase)
def _fold_case(element: FoldCase, compiler: SQLCompiler, **options: Any) -> str:
    return f"task_fold_case({compiler.process(element.clauses, **options)})"


@compiles(FoldCase, "sqlite")
def _fold_case_sqlite(element: FoldCase, compiler: SQLCompiler, **options: Any) -> str:
    return f"lower({compiler.process(element.clauses, **options)})"


class HasWords(FunctionElement[bool]):
    """Whether a task has all words: `HasWords(title, description, words, longest, second, others)`.

    PostgreSQL may look up the two longest words in the trigram index, and compares the others with the rows
    found. Folding dominates the cost of a row, so it is done once for all the others. Absent words are null.

    SQLite calls our own function with all *words*, once for each row.
    """

    type = Boolean()
    inherit_cache = True


@compiles(HasWords)
def _has_words(element: HasWords, compiler: SQLCompiler, **options: Any) -> str:
    parts = [compiler.process(part, **options) for part in element.clauses if part.key != "words"]
    title, description, *indexed, others = parts
    # The indexed expression of the migrations. Words have no spaces, so none matches across both fields.
    text = f"task_fold_case({title} || ' ' || coalesce({description}, ''))"
    found = [f"({word} IS NULL OR {text} LIKE task_fold_case({word}))" for word in indexed]
    folded = f"ARRAY(SELECT task_fold_case(pattern) FROM unnest({others}) AS pattern)"  # noqa: S608 - SQL already
    return " AND ".join([*found, f"({others} IS NULL OR {text} LIKE ALL ({folded}))"])


@compiles(HasWords, "sqlite")
def _has_words_sqlite(element: HasWords, compiler: SQLCompiler, **options: Any) -> str:
    title, description, words, *_ = (compiler.process(part, **options) for part in element.clauses)
    # CASE, unlike OR, never calls the function without words.
    return f"CASE WHEN {words} IS NULL THEN 1 ELSE has_words({title}, {description}, {words}) END"


class PlannedFor(FunctionElement[bool]):
    """Always true. Forces a custom plan for the statement's values; *value* is one of them and never null.

    After five executions PostgreSQL would switch to a generic plan, which knows neither which filters are
    absent nor how selective the words are (180 ms, not 0.1, among 10,000 tasks). The condition folds to true
    when *value* is known and prices the generic plan out. Its expensive part never runs.
    """

    type = Boolean()
    inherit_cache = True


@compiles(PlannedFor)
def _planned_for(element: PlannedFor, compiler: SQLCompiler, **options: Any) -> str:
    value = compiler.process(element.clauses, **options)
    expensive = f"SELECT count(*) FROM generate_series(1, 1000000000) WHERE {value} IS NULL"  # noqa: S608 - SQL already
    return f"({value} IS NOT NULL OR ({expensive}) = 0)"


@compiles(PlannedFor, "sqlite")
def _planned_for_sqlite(_element: PlannedFor, _compiler: SQLCompiler, **_: Any) -> str:
    return "1"


def shape_of(filters: Filter) -> Shape:
    if filters == Filter():
        return "all"
    return "pending" if filters == PENDING else "filtered"


def values_of(filters: Filter) -> dict[str, Any]:
    """Return the values of *filters* as `conditions` names them."""
    patterns = [f"%{word.translate(_ESCAPES)}%" for word in sorted(filters.words, key=len, reverse=True)]
    longest, second = [*patterns, None, None][:2]
    return {
        "states": list(filters.states),
        "words": list(filters.words) or None,
        "longest_word": longest,
        "second_word": second,
        "other_words": patterns[2:] or None,
        "priorities": [PRIORITY.rank(word) for word in filters.priorities] or None,
        "categories": list(filters.categories) or None,
        "tags": list(filters.tags),
        "due_date_from": filters.due_date_from,
        "due_date_to": filters.due_date_to,
    }


_ESCAPES = str.maketrans({sign: f"\\{sign}" for sign in "\\%_"})


def conditions(shape: Shape) -> list[ColumnElement[bool]]:
    """Return the conditions of a list of *shape*, the owner's first."""
    match shape:
        case "all":
            return [LIVE]
        case "pending":  # a literal, so that the partial index matches
            return [LIVE, not_(TASKS.c.completed)]
    return [LIVE, *_filters()]


def _filters() -> Iterator[ColumnElement[bool]]:
    task = TASKS.c
    states = bindparam("states", type_=list_of(Boolean()))
    priorities = bindparam("priorities", type_=list_of(SmallInteger()))
    categories = bindparam("categories", type_=list_of(Text()))
    since, until = (bindparam(name, type_=DAY) for name in ("due_date_from", "due_date_to"))
    # `none` also finds tasks without a priority.
    rank = func.coalesce(task.priority, literal_column(str(PRIORITY.rank("none"))))
    yield PlannedFor(states)
    yield AnyOf(task.completed, states)
    yield or_(priorities.is_(None), AnyOf(rank, priorities))
    yield or_(categories.is_(None), AnyOf(task.category, categories))
    yield HasAll(task.tags, bindparam("tags", type_=list_of(Text())))
    yield or_(since.is_(None), task.due_date >= since)
    yield or_(until.is_(None), task.due_date <= until)
    words, others = (bindparam(name, type_=list_of(Text())) for name in ("words", "other_words"))
    longest, second = (bindparam(name, type_=Text()) for name in ("longest_word", "second_word"))
    yield HasWords(task.title, task.description, words, longest, second, others)
