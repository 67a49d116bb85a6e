"""A tape that follows named tensors the way an allocator sees them: what is held now, the most that ever was, and how much was moved."""

from __future__ import annotations

from typing import NamedTuple


class Peak(NamedTuple):
    """The most bytes held at once."""

    size: float
    unpacked: float = 0.0
    """Of these a 4-bit weight while it is unpacked."""


class _Storage:
    __slots__ = ("references", "size", "viewed")

    def __init__(self, size: float, viewed: bool) -> None:
        self.size = size
        self.references = 1
        self.viewed = viewed


class Tape:
    """Bytes held by name. A storage lives until the last reference to it is dropped, be it a variable's or the backward pass's."""

    def __init__(self) -> None:
        self.now = 0.0
        """Bytes held."""
        self.marked = Peak(0.0)
        """The peak when the last adapter's input and low-rank tensor were there: running a layer again ends with the last tensor kept."""
        self.moved = 0.0
        """Bytes written to and read from memory, each new tensor counted as written once and read once."""
        self.recomputing = False
        """A backward pass over tensors made again, each of which goes when it was read; kept ones go after the function that reads them."""
        self.cuts: list[Peak] = []
        """Peaks of the stretches before each :meth:`cut`."""
        self._peak = self._peak_unpacked = self._unpacked = 0.0
        self._names: dict[str, list[_Storage]] = {}

    @property
    def peak(self) -> Peak:
        """The most bytes held at once."""
        return Peak(self._peak, self._peak_unpacked)

    def restart(self) -> None:
        """From here on the peak is that of what comes."""
        self._peak, self._peak_unpacked = self.now, self._unpacked

    def cut(self) -> None:
        """Something comes here that is counted elsewhere, a gradient of weights: the peak before and the one after are told apart."""
        self.cuts.append(self.peak)
        self.restart()

    def hold(self, name: str, size: float, viewed: bool = False) -> None:
        """A new tensor of ``size`` bytes, referred to by ``name``; ``viewed``: in another shape than it was made in."""
        self._names.setdefault(name, []).append(_Storage(size, viewed))
        self.moved += 2 * size
        self.now += size
        if self.now > self._peak:
            self._peak, self._peak_unpacked = self.now, self._unpacked

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

    def is_shared(self, name: str) -> bool:
        """Whether anything but the name itself refers to its storage."""
        return self._names[name][-1].references > 1

    def view(self, name: str) -> None:
        """The tensor is handed on in another shape."""
        self._names[name][-1].viewed = True

    def spike(self, size: float, some: float = 0.0) -> None:
        """A temporary tensor of ``size`` bytes, gone at once; ``some`` rows need so much more, which is no traffic of the others."""
        self.moved += 2 * size
        if self.now + size + some > self._peak:
            self._peak, self._peak_unpacked = self.now + size + some, self._unpacked

    def unpack(self, size: float, constants: float) -> None:
        """A 4-bit weight in full, ``size`` bytes, until :meth:`pack`; what its constants take beside it is gone at once. Their traffic is counted elsewhere."""
        self.now += size
        self._unpacked = size
        if self.now + constants > self._peak:
            self._peak, self._peak_unpacked = self.now + constants, size + constants

    def pack(self) -> None:
        """The unpacked weight goes."""
        self.now -= self._unpacked
        self._unpacked = 0.0

    def accumulate(self, name: str, size: float, viewed: bool = False) -> None:
        """A contribution of ``size`` bytes to gradient ``name``: it becomes the gradient, or is added to the one there is.

        Autograd adds in place unless somebody else holds the tensor, or it is a view, whose base does.
        """
        self.hold("contribution", size, viewed)
        self.merge(name, "contribution")

    def merge(self, name: str, contribution: str) -> None:
        """The tensor ``contribution`` becomes gradient ``name``, or is added to the one there is, as in :meth:`accumulate`."""
        if name not in self._names:
            self.share(name, contribution)
            self.drop(contribution)
            return
        storage = self._names[name][-1]
        size = self._names[contribution][-1].size
        if storage.references == 1 and not storage.viewed:
            self.drop(contribution)
            return
        self.hold("sum", size)
        self.moved -= 2 * size  # what is written here would be written there
        self.drop(contribution)
        self.drop(name)
        self.share(name, "sum")
        self.drop("sum")
