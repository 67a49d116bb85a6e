"""Everything sparklab raises on purpose.

::

    SparklabError
    ├── RecipeError     (ValueError)         a recipe that cannot be: every fault named at once
    ├── ModelError      (ValueError)         a model that cannot be read or trained
    │   ├── ModelNotFound (FileNotFoundError)
    │   └── UnknownFamily                    nobody itemised its layers
    ├── DataError       (ValueError)         records that cannot be learned from
    │   └── DataNotFound  (FileNotFoundError)
    ├── BoxError        (ValueError)         an unknown box
    ├── DoesNotFit      (RuntimeError)       the plan's peak is above the usable memory
    └── RunError        (RuntimeError)
        ├── RunNotFound   (FileNotFoundError)
        ├── RunExists     (FileExistsError)
        ├── RunBusy                          another worker advances this run
        ├── RunChanged                       what the run was started with is not what lies there now
        ├── RunFailed                        the worker stopped with an error
        ├── OutOfMemory   (MemoryError)      memory ran out, and where
        └── DiskFull      (OSError)

Each one carries the fact (with the values received) and the cheapest fix; ``str`` joins the two. Both often quote files that somebody else
wrote, and so are cleaned of what a terminal would obey.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from sparklab.text import clean

LONGEST: Final = 20_000
"""Characters of a fact or fix that are kept."""


class SparklabError(Exception):
    """Base of all errors meant for users.

    ``fact`` says what is wrong, with the values received; ``fix`` what to do about it, cheapest first ("" where the fact says it).
    """

    def __init__(self, fact: str, fix: str = "") -> None:
        self.fact = clean(fact, LONGEST)
        self.fix = clean(fix, LONGEST)
        super().__init__(self.fact, self.fix)

    def __str__(self) -> str:
        return f"{self.fact}\n  Fix: {self.fix}" if self.fix else self.fact

    def to_dict(self) -> dict[str, Any]:
        """The error as the CLI's ``--json`` prints it."""
        return {"error": type(self).__name__, "fact": self.fact, "fix": self.fix}


class RecipeError(SparklabError, ValueError):
    """A recipe with fields that cannot be; names them all."""


class ModelError(SparklabError, ValueError):
    """A model whose config or weights cannot be used."""


class ModelNotFound(ModelError, FileNotFoundError):
    """No such model: neither a file, nor a directory, nor in the local hub cache."""


class UnknownFamily(ModelError):
    """The model's family is none of those whose layers are itemised; it can still be traced."""


class DataError(SparklabError, ValueError):
    """Training records that cannot be read or learned from; names the lines."""


class DataNotFound(DataError, FileNotFoundError):
    """No such data file."""


class BoxError(SparklabError, ValueError):
    """No such box profile, or a box that cannot do what is asked."""


class DoesNotFit(SparklabError, RuntimeError):
    """The planned peak is above the usable memory."""


class RunError(SparklabError, RuntimeError):
    """Anything wrong with a run or its directory."""


class RunNotFound(RunError, FileNotFoundError):
    """The path is not a run directory."""


class RunExists(RunError, FileExistsError):
    """A new run was asked for where something already is."""


class RunBusy(RunError):
    """Another living worker holds the run."""


class RunChanged(RunError):
    """Recipe, data, model or packages are not those the run was started with; ``changed`` names them as ``accept`` takes them."""

    changed: tuple[str, ...] = ()


class RunFailed(RunError):
    """The worker ended with an error; its last words are in the fact."""


class OutOfMemory(RunError, MemoryError):
    """Memory ran out: the fact says in which phase, what was planned and what was measured; the fix the nearest plan that fits.

    ``details`` has them as figures: phase, planned_bytes, measured_bytes, changes (of the recipe).
    """

    details: Mapping[str, Any] = MappingProxyType({})


class DiskFull(RunError, OSError):
    """The disk cannot hold what the run must write."""
