"""The methods that a test mesh serves, so that a misspelt name fails the test instead of matching nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class Methods:
    """The methods that are served, by their full names: "/package.Service/Method"."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        # All services, and those whose methods are known: a custom generic handler doesn't list its methods.
        self._services: set[str] = set()
        self._listed: set[str] = set()

    def add_service(self, service: str) -> None:
        self._services.add(service)

    def add(self, service: str, methods: Iterable[str]) -> None:
        self._listed.add(service)
        self._known.update(f"/{service}/{method}" for method in methods)

    def matching(self, name: str | None) -> Callable[[str], bool]:
        """A predicate on full names for ``name``: "Method", "package.Service/Method", the same with a leading slash, or
        None for every method. Raises ValueError if no served method matches."""
        if name is None:
            return lambda _: True
        full = "/" + name.removeprefix("/")

        def matches(method: str) -> bool:
            return method == full or method.endswith(full)

        if self._services <= self._listed and not any(map(matches, self._known)):
            served = ", ".join(sorted(known.removeprefix("/") for known in self._known)) or "none yet; serve first"
            raise ValueError(f"no method {name!r} is served; served methods: {served}")
        return matches

    def __repr__(self) -> str:
        return f"<Methods {len(self._known)}>"
