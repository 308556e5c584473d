"""Users. Pure: no clock, randomness, storage or gRPC."""

from __future__ import annotations

import dataclasses
import datetime as dt
from dataclasses import dataclass
from typing import Any

from services.common.errors import AlreadyExistsError, FailedPreconditionError, InvalidFieldError, NotFoundError
from services.common.idempotency import fingerprint

MAX_NAME = 100
"""Characters of a full name, at most."""


class UserNotFoundError(NotFoundError):
    """There is no user with this id."""

    def __init__(self, user_id: str) -> None:
        super().__init__("USER_NOT_FOUND", f"user {user_id} not found", user_id=user_id)


class EmailTakenError(AlreadyExistsError):
    """Another user has the email."""

    def __init__(self, email: str) -> None:
        # Not in the message, as that is logged.
        super().__init__("EMAIL_TAKEN", "another user has this email", email=email)


class UserDeletedError(FailedPreconditionError):
    """The user is deleted."""

    def __init__(self, user_id: str) -> None:
        super().__init__("USER_DELETED", f"user {user_id} is deleted", user_id=user_id)


class UserNotDeletedError(AlreadyExistsError):
    """The user to be undeleted is not deleted."""

    def __init__(self, user_id: str) -> None:
        super().__init__("USER_NOT_DELETED", f"user {user_id} is not deleted", user_id=user_id)


@dataclass(frozen=True, slots=True)
class Name:
    """A full name, as in v1, and its parts, as in v2, if it was set that way.

    Each API version returns the name as it was set through it.
    """

    full: str
    parts: tuple[str, str] | None = None

    @classmethod
    def of_full(cls, full: str) -> Name:
        """A name set through v1. Raises InvalidFieldError."""
        return cls(_validated("name", full))

    @classmethod
    def of_parts(cls, given: str, family: str) -> Name:
        """A name set through v2. Raises InvalidFieldError."""
        _validated("name.given", given)
        return cls(_validated("name.family", f"{given} {family}" if family else given), (given, family))

    @property
    def given(self) -> str:
        return self._split[0]

    @property
    def family(self) -> str:
        """The family name, empty if there is none: the last word of a full name that has several."""
        return self._split[1]

    @property
    def _split(self) -> tuple[str, str]:
        if self.parts is not None:
            return self.parts
        given, _, family = self.full.strip().rpartition(" ")
        return (given.rstrip(), family) if given else (family, "")


@dataclass(frozen=True, slots=True)
class User:
    """A user. ``email`` is as it was entered. Times are in UTC. ``version``: grows with every change."""

    id: str
    name: Name
    email: str
    create_time: dt.datetime
    update_time: dt.datetime
    version: int = 1
    delete_time: dt.datetime | None = None

    @classmethod
    def new(cls, user_id: str, *, name: Name, email: str, now: dt.datetime) -> User:
        """A user created ``now``."""
        return cls(id=user_id, name=name, email=email, create_time=now, update_time=now)

    @property
    def fingerprint(self) -> str:
        """A hash of the content of a CreateUser request."""
        return fingerprint([self.name.full if self.name.parts is None else list(self.name.parts), self.email])

    @property
    def etag(self) -> str:
        """Identifies this state of the user (AIP-154)."""
        return str(self.version)

    def changed(self, now: dt.datetime, *, name: Name | None = None, email: str | None = None) -> User:
        """The user with a new name or email; the same user if nothing changes.

        Raises UserDeletedError, and InvalidFieldError for an empty email.
        """
        if self.delete_time is not None:
            raise UserDeletedError(self.id)
        if email == "":
            raise InvalidFieldError("user.email", "EMPTY", "must not be empty")
        name, email = self.name if name is None else name, self.email if email is None else email
        return self if (name, email) == (self.name, self.email) else self._with(now, name=name, email=email)

    def deleted(self, now: dt.datetime, *, allow_deleted: bool = False) -> User:
        """The user, deleted. Raises UserNotFoundError if it is deleted already, unless ``allow_deleted``."""
        if self.delete_time is None:
            return self._with(now, delete_time=now)
        if not allow_deleted:
            raise UserNotFoundError(self.id)
        return self

    def undeleted(self, now: dt.datetime) -> User:
        """The user, undeleted. Raises UserNotDeletedError."""
        if self.delete_time is None:
            raise UserNotDeletedError(self.id)
        return self._with(now, delete_time=None)

    def _with(self, now: dt.datetime, **changes: Any) -> User:
        # Replicas' clocks differ; a user's history must not go backwards.
        return dataclasses.replace(self, update_time=max(now, self.update_time), version=self.version + 1, **changes)


def email_key(email: str) -> str:
    """The email as it is compared; unique among users. (The API only accepts ASCII addresses.)"""
    return email.lower()


def _validated(field: str, name: str) -> str:
    if not name:
        raise InvalidFieldError(field, "EMPTY", "must not be empty")
    if len(name) > MAX_NAME:
        raise InvalidFieldError(field, "TOO_LONG", f"must have at most {MAX_NAME} characters")
    if "\0" in name:
        # PostgreSQL can't store it.
        raise InvalidFieldError(field, "NUL_CHARACTER", "must not contain U+0000")
    return name
