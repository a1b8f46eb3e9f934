"""What went wrong, in OpenAI's shape: a status, a sentence, and nothing of the machine or of anybody else.

A message is either written in this room, or that of a :class:`TinyModalError` about the caller's own request,
whose media are bytes and have no path. Anything else is a bug: the caller learns its request's id, and the
traceback goes to the server's log under the same id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tinymodal.core.errors import TinyModalError

REQUEST_ID = "x-request-id"
"""Header that every answer has; the official client shows it as ``request_id``."""


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one sentence or two, for a person.
        param: which field of the request is meant, ``messages.0.content``.
        code: for programs, where there is something to tell apart.
        retry: whether the same request may succeed later. The official client repeats 429 and 5xx by itself
            unless it is told not to.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}
        if status in (429, 503) and retry:
            self.headers["retry-after"] = "1"
        if not retry:
            self.headers["x-should-retry"] = "false"
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    def body(self, request_id: str) -> dict[str, Any]:
        """As it is sent."""
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(
                    self.status, "server_error" if self.status >= 500 else "invalid_request_error"
                ),
                "param": self.param,
                "code": self.code,
                "request_id": request_id,
            }
        }


TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
"""The names that OpenAI has for statuses; others are ``invalid_request_error`` and ``server_error``."""


class ClientGone(Exception):
    """Whoever asked has hung up: there is nobody to answer."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong and stays so."""
    return ApiError(400, message, param=param, code=code)


def busy() -> ApiError:
    """More is asked at once than may wait."""
    return ApiError(429, "The server has as many requests as may wait. Try again shortly.", code="queue_full")


def leaving() -> ApiError:
    """The server is being stopped and finishes what it has begun."""
    return ApiError(503, "The server is shutting down and takes no new requests.", code="shutting_down")


def too_slow(seconds: float) -> ApiError:
    """The request took longer than one may; its work was stopped."""
    return ApiError(
        503, f"The request was stopped: it took longer than {seconds:g} s.", code="timeout", retry=False
    )


def internal(request_id: str) -> ApiError:
    """A bug of ours."""
    return ApiError(500, f"The server failed on this request. Its log has the reason under {request_id}.")


def of_user(error: TinyModalError, sample_id: str) -> ApiError:
    """An error about the caller's own request, without the name that it has inside."""
    return invalid(str(error).removeprefix(f"{sample_id}: "))


def of_validation(error: ValidationError) -> ApiError:
    """What is wrong with a request's form: the first fault that lies deepest.

    The value is not repeated: it may be long, and the caller has it.
    """
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    fault = max(faults, key=lambda each: len(each["loc"]))
    # Beside the fields' names a location holds those of the alternatives that were tried.
    steps = [str(step) for step in fault["loc"]]
    place = ".".join(step for step in steps if step not in TRIED and "[" not in step)
    words = fault["msg"].removeprefix("Value error, ")
    return invalid(f"{place}: {words}" if place else words, place or None)


TRIED = frozenset(("str", "constrained-str", "user", "system", "developer", "assistant"))
"""Steps of pydantic's locations that are alternatives and no fields of ours."""
