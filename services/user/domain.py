"""What a user is. Pure: no clock, no chance, no storage, no gRPC."""

from __future__ import annotations

import dataclasses
import datetime as dt
from dataclasses import dataclass
from typing import Any

from services.common.errors import AlreadyExistsError, FailedPreconditionError, InvalidFieldError, NotFoundError
from services.common.idempotency import fingerprint

LONGEST_NAME = 100
"""Characters of a whole name, at the most."""


class UserNotFoundError(NotFoundError):
    """No user has the id."""

    def __init__(self, user_id: str) -> None:
        super().__init__("USER_NOT_FOUND", f"no user has the id {user_id}", user_id=user_id)


class EmailTakenError(AlreadyExistsError):
    """Another user has the email."""

    def __init__(self, email: str) -> None:
        # Not in the message, which is logged.
        super().__init__("EMAIL_TAKEN", "another user has this email", email=email)


class UserDeletedError(FailedPreconditionError):
    """The user is deleted."""

    def __init__(self, user_id: str) -> None:
        super().__init__("USER_DELETED", f"the user {user_id} is deleted", user_id=user_id)


class UserNotDeletedError(AlreadyExistsError):
    """The user who is to be brought back is there."""

    def __init__(self, user_id: str) -> None:
        super().__init__("USER_NOT_DELETED", f"the user {user_id} is not deleted", user_id=user_id)


@dataclass(frozen=True, slots=True)
class Name:
    """A name: whole, as v1 has it, and in its parts, as v2 does, if it was given so.

    Either way of giving it comes back as it was given.
    """

    whole: str
    parts: tuple[str, str] | None = None

    @classmethod
    def of_whole(cls, whole: str) -> Name:
        """The name that v1 gives. Raises InvalidFieldError."""
        return cls(_checked("name", whole))

    @classmethod
    def of_parts(cls, given: str, family: str) -> Name:
        """The name that v2 gives. Raises InvalidFieldError."""
        _checked("name.given", given)
        return cls(_checked("name.family", f"{given} {family}" if family else given), (given, family))

    @property
    def given(self) -> str:
        return self._split[0]

    @property
    def family(self) -> str:
        """The family name; empty when there is none. Of a whole name, it is the last word of several."""
        return self._split[1]

    @property
    def _split(self) -> tuple[str, str]:
        if self.parts is not None:
            return self.parts
        given, _, family = self.whole.strip().rpartition(" ")
        return (given.rstrip(), family) if given else (family, "")


@dataclass(frozen=True, slots=True)
class User:
    """A user. ``email`` is as it was given; instants are aware and in UTC. ``version``: grows with every change."""

    id: str
    name: Name
    email: str
    create_time: dt.datetime
    update_time: dt.datetime
    version: int = 1
    delete_time: dt.datetime | None = None

    @classmethod
    def new(cls, user_id: str, *, name: Name, email: str, now: dt.datetime) -> User:
        """A user who registers ``now``."""
        return cls(id=user_id, name=name, email=email, create_time=now, update_time=now)

    @property
    def fingerprint(self) -> str:
        """What tells the content of one CreateUser request from another's."""
        return fingerprint([self.name.whole if self.name.parts is None else list(self.name.parts), self.email])

    @property
    def etag(self) -> str:
        """Which state of the user this is (AIP-154)."""
        return str(self.version)

    def changed(self, now: dt.datetime, *, name: Name | None = None, email: str | None = None) -> User:
        """The user with what is given changed; the same one when that changes nothing.

        Raises UserDeletedError, and InvalidFieldError for an empty email.
        """
        if self.delete_time is not None:
            raise UserDeletedError(self.id)
        if email == "":
            raise InvalidFieldError("user.email", "EMPTY", "must not be empty")
        name, email = self.name if name is None else name, self.email if email is None else email
        return self if (name, email) == (self.name, self.email) else self._with(now, name=name, email=email)

    def deleted(self, now: dt.datetime, *, again: bool = False) -> User:
        """The user, deleted. ``again``: it may be so already. Raises UserNotFoundError otherwise."""
        if self.delete_time is None:
            return self._with(now, delete_time=now)
        if not again:
            raise UserNotFoundError(self.id)
        return self

    def undeleted(self, now: dt.datetime) -> User:
        """The user, no longer deleted. Raises UserNotDeletedError."""
        if self.delete_time is None:
            raise UserNotDeletedError(self.id)
        return self._with(now, delete_time=None)

    def _with(self, now: dt.datetime, **changes: Any) -> User:
        # Replicas' clocks differ; a user's history shall not run backwards for that.
        return dataclasses.replace(self, update_time=max(now, self.update_time), version=self.version + 1, **changes)


def email_key(email: str) -> str:
    """The email as it is compared: two users' keys differ. (Addresses are ASCII, by the contract.)"""
    return email.lower()


def _checked(field: str, name: str) -> str:
    if not name:
        raise InvalidFieldError(field, "EMPTY", "must not be empty")
    if len(name) > LONGEST_NAME:
        raise InvalidFieldError(field, "TOO_LONG", f"a name has {LONGEST_NAME} characters at the most")
    if "\0" in name:
        # No database could keep it.
        raise InvalidFieldError(field, "NUL_CHARACTER", "must not contain the character U+0000")
    return name
