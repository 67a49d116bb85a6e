"""A tape that follows named tensors the way an allocator sees them: what is held now, the most that ever was, and how much was moved."""

from __future__ import annotations


class _Storage:
    __slots__ = ("references", "size")

    def __init__(self, size: float) -> None:
        self.size = size
        self.references = 1


class Tape:
    """Bytes held by name. A storage lives until the last reference to it is dropped, be it a variable's or the backward pass's."""

    def __init__(self) -> None:
        self.now = 0.0
        """Bytes held."""
        self.peak = 0.0
        """The most bytes held at once."""
        self.marked = 0.0
        """The peak when the last adapter's input and low-rank tensor were there: running a layer again ends with the last tensor kept."""
        self.moved = 0.0
        """Bytes written to and read from memory, each new tensor counted as written once and read once."""
        self._names: dict[str, list[_Storage]] = {}

    def hold(self, name: str, size: float) -> None:
        """A new tensor of ``size`` bytes, referred to by ``name``."""
        self._names.setdefault(name, []).append(_Storage(size))
        self.moved += 2 * size
        self.now += size
        self.peak = max(self.peak, self.now)

    def share(self, name: str, old: str) -> None:
        """One more reference, called ``name``, to the storage of ``old``."""
        storage = self._names[old][-1]
        storage.references += 1
        self._names.setdefault(name, []).append(storage)

    def drop(self, name: str) -> None:
        """Give up one reference called ``name``."""
        names = self._names[name]
        storage = names.pop()
        if not names:
            del self._names[name]
        storage.references -= 1
        if storage.references == 0:
            self.now -= storage.size

    def replace(self, name: str, size: float) -> None:
        """A new tensor of ``size`` bytes takes the name; the old one goes once the new one is there."""
        self.hold("replacing", size)
        self.drop(name)
        self.share(name, "replacing")
        self.drop("replacing")

    def drop_any(self, *names: str) -> None:
        """Give up one reference of each of those names that are held."""
        for name in names:
            if name in self._names:
                self.drop(name)

    def has(self, name: str) -> bool:
        return name in self._names

    def spike(self, size: float) -> None:
        """A temporary tensor of ``size`` bytes, gone at once."""
        self.moved += 2 * size
        self.peak = max(self.peak, self.now + size)

    def accumulate(self, name: str, size: float) -> None:
        """A contribution of ``size`` bytes to gradient ``name``: it becomes the gradient, or is added into it and goes."""
        if self.has(name):
            self.spike(size)
        else:
            self.hold(name, size)
