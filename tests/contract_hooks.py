"""What Schemathesis has to know about the service but OpenAPI cannot express."""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import schemathesis
from schemathesis import Case, HookContext, Response

from routes.tasks import IDEMPOTENCY_KEY_PATTERN

ETAGS = ['"1"', '"2"', 'W/"1"', '"3", "1"', '"a,b"', "*"]
# Rules about several parameters or about stored data: (parameter or pointer, detail).
BEYOND_THE_DOCUMENT = {
    ("status", "or another filter must be given"),
}

_keys = itertools.count(1)


@schemathesis.hook
def before_load_schema(context: HookContext, raw_schema: dict[str, Any]) -> None:
    # Schemathesis waits for the end of a response, and a stream of events has none.
    del raw_schema["paths"]["/api/{user_id}/tasks/events"]
    for operations in raw_schema["paths"].values():
        for operation in operations.values():
            parameters = operation.get("parameters", [])
            # The service seals these; Schemathesis cannot generate a valid one.
            parameters[:] = [each for each in parameters if each["name"] not in ("cursor", "since")]
            for parameter in parameters:
                # In its coverage phase Schemathesis generates only letters and digits for a header's pattern.
                if parameter["name"] in ("If-Match", "If-None-Match"):
                    parameter["schema"] = {"type": "string", "enum": ETAGS}


@schemathesis.hook
def before_call(context: HookContext, case: "Case[Any]", kwargs: dict[str, Any]) -> None:
    """Make every Idempotency-Key unique: a reused key with another body is a 422."""
    headers: Any = case.headers or {}
    if re.fullmatch(IDEMPOTENCY_KEY_PATTERN, headers.get("Idempotency-Key", "")):
        headers["Idempotency-Key"] = str(next(_keys))


@schemathesis.hook
def filter_failure(context: HookContext, failure: Exception, case: "Case[Any]", response: Response) -> bool:
    """Ignore failures that are correct by a rule that OpenAPI cannot express."""
    match type(failure).__name__:
        case "RejectedPositiveData" if response.status_code == 422:
            errors = json.loads(response.content)["errors"]
            mistakes = {(error.get("parameter") or error.get("pointer"), error["detail"]) for error in errors}
            return not mistakes <= BEYOND_THE_DOCUMENT
        case "AcceptedNegativeData" if "maxLength" in str(failure):
            return all(text == text.strip() for text in _texts(case.body))  # maxLength counts stripped text
    return True


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
