"""What a user is. Pure: no clock, no chance, no storage, no gRPC."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from services.errors import AlreadyExistsError, InvalidFieldError, NotFoundError
from services.idempotency import fingerprint


class UserNotFoundError(NotFoundError):
    """No user has the id."""

    def __init__(self, user_id: str) -> None:
        super().__init__("USER_NOT_FOUND", f"no user has the id {user_id}", user_id=user_id)


class EmailTakenError(AlreadyExistsError):
    """Another user has the email."""

    def __init__(self, email: str) -> None:
        super().__init__("EMAIL_TAKEN", f"another user has the email {email}", email=email)


@dataclass(frozen=True, slots=True)
class User:
    """A user. ``email`` is as it was given; instants are aware and in UTC."""

    id: str
    name: str
    email: str
    create_time: dt.datetime
    update_time: dt.datetime

    @classmethod
    def new(cls, user_id: str, *, name: str, email: str, now: dt.datetime) -> User:
        """A user who registers ``now``. Raises InvalidFieldError for a name that no database could keep."""
        if "\0" in name:
            raise InvalidFieldError("name", "NUL_CHARACTER", "must not contain the character U+0000")
        return cls(id=user_id, name=name, email=email, create_time=now, update_time=now)

    @property
    def fingerprint(self) -> str:
        """What tells the content of one CreateUser request from another's."""
        return fingerprint([self.name, self.email])


def email_key(email: str) -> str:
    """The email as it is compared: two users' keys differ. (Addresses are ASCII, by the contract.)"""
    return email.lower()
