"""The widgets of panels that live where their picture stands. Importing this module loads anywidget."""

from __future__ import annotations

from typing import Any

import anywidget
import traitlets

from sparklab.panels import parts
from sparklab.panels.widget import asset, hear_every_page


class _ResidentWidget(anywidget.AnyWidget):  # type: ignore[misc]  # anywidget is not annotated well enough to be followed
    """``home`` is the class of the element whose place the panel takes; ``view`` is everything it shows, in words and figures."""

    _css = parts.css_variables() + asset("panel.css")

    home = traitlets.Unicode("").tag(sync=True)
    view = traitlets.Dict({}).tag(sync=True)

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        hear_every_page(self.comm)


class BoxWidget(_ResidentWidget):
    """The box panel's."""

    _esm = asset("parts.js", "box.js")


class RunsWidget(_ResidentWidget):
    """The runs table's; ``points`` are the curves: little-endian float32, x and y in turn, one run after the other as ``view`` says."""

    _esm = asset("parts.js", "runs.js")

    points = traitlets.Bytes(b"").tag(sync=True)


class DataWidget(_ResidentWidget):
    """The data panel's; ``page`` are the records it shows, and the page asks for others."""

    _esm = asset("parts.js", "data.js")
    _css = parts.css_variables() + asset("panel.css", "data.css")

    page = traitlets.Dict({}).tag(sync=True)
