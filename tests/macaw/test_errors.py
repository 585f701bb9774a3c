import pickle

import pytest

from macaw import errors
from macaw.errors import (
    InternalServerError,
    InvalidRequestError,
    MacawError,
    NotFoundError,
    OverloadedError,
    RequestError,
    ServerError,
    UnauthorizedError,
    error_from_wire,
)

CODES = {
    "invalid_request": errors.InvalidRequestError,
    "unsupported_parameter": errors.InvalidRequestError,
    "request_too_large": errors.InvalidRequestError,
    "invalid_program": errors.InvalidProgramError,
    "unknown_variable": errors.InvalidProgramError,
    "cycle": errors.InvalidProgramError,
    "context_length_exceeded": errors.ContextLengthError,
    "unknown_model": errors.UnknownModelError,
    "unauthorized": errors.UnauthorizedError,
    "not_found": errors.NotFoundError,
    "upstream_failed": errors.UpstreamFailedError,
    "cancelled": errors.CancelledError,
    "deadline_exceeded": errors.DeadlineExceededError,
    "overloaded": errors.OverloadedError,
    "engine_failed": errors.EngineFailedError,
    "internal_error": errors.InternalServerError,
}

CLIENTS_OWN = {errors.ConnectionFailedError, errors.NativeFunctionError}  # never on the wire


def leaves(cls=MacawError):
    below = [sub for sub in cls.__subclasses__() if sub.__module__ == errors.__name__]  # not those of other tests
    return {leaf for sub in below for leaf in leaves(sub)} if below else {cls}


def fields(error):
    return (type(error), str(error), error.code, error.param, error.status, error.retry_after_s)


def test_every_leaf_but_the_clients_own_has_a_code():
    assert set(CODES.values()) == leaves() - CLIENTS_OWN


@pytest.mark.parametrize(("code", "cls"), CODES.items(), ids=CODES)
def test_error_survives_the_wire(code, cls):
    error = cls("seen, accepted, remedy", code=code, param="calls[2]", retry_after_s=1.5)
    assert fields(error_from_wire(error.to_wire(), status=error.status, retry_after_s=1.5)) == fields(error)
    assert set(error.to_wire()) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("cls", sorted(leaves() - CLIENTS_OWN, key=lambda cls: cls.__name__))
def test_default_code_names_its_class(cls):
    assert CODES[cls("x").code] is cls


@pytest.mark.parametrize("cls", sorted(CLIENTS_OWN, key=lambda cls: cls.__name__))
def test_clients_own_errors_have_codes_of_their_own(cls):
    assert cls("x").code not in CODES


@pytest.mark.parametrize("cls", sorted(leaves(), key=lambda cls: cls.__name__))
def test_error_survives_pickling(cls):
    error = cls("x", param="p", status=418, retry_after_s=2.0)
    assert fields(pickle.loads(pickle.dumps(error))) == fields(error)


@pytest.mark.parametrize(
    ("status", "cls"),
    [
        (301, ServerError),
        (400, RequestError),
        (401, UnauthorizedError),
        (403, UnauthorizedError),
        (404, NotFoundError),
        (429, OverloadedError),
        (500, ServerError),
        (502, ServerError),
        (None, MacawError),
    ],
)
def test_foreign_code_is_kept_and_the_status_picks_the_class(status, cls):
    error = error_from_wire({"message": "x", "code": "rate_limit_exceeded"}, status=status)
    assert type(error) is cls
    assert error.code == "rate_limit_exceeded"
    assert error.status == (status or MacawError.default_status)


def test_missing_code_becomes_the_default_of_its_class():
    error = error_from_wire({"message": "x", "code": None}, status=404)
    assert (type(error), error.code) == (NotFoundError, "not_found")


def test_callers_can_tell_what_is_worth_trying_again():
    assert issubclass(OverloadedError, ServerError)
    assert issubclass(InternalServerError, ServerError)
    assert issubclass(InvalidRequestError, RequestError)
    assert not issubclass(ServerError, RequestError)
