"""Which methods a test mesh serves, so that a name that is misspelt fails the test and doesn't just match nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class Methods:
    """The methods that are served, by their full names: "/package.Service/Method"."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        # Services, and those of them whose methods are known: a generic handler of one's own doesn't list them.
        self._services: set[str] = set()
        self._listed: set[str] = set()

    def add_service(self, service: str) -> None:
        self._services.add(service)

    def add(self, service: str, methods: Iterable[str]) -> None:
        self._listed.add(service)
        self._known.update(f"/{service}/{method}" for method in methods)

    def matching(self, name: str | None) -> Callable[[str], bool]:
        """Whether a method's full name is one that ``name`` means: "Method", "package.Service/Method", the same with a
        slash before it, or None for every method. Raises ValueError when no method is served that is called so."""
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
