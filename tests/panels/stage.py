"""A widget's page code in a real Chromium without Jupyter: what it draws from a state, in light and dark, narrow and wide, in a second.

The kernel's side is a :class:`RunPanel` or its like that lives in the test; the page gets its state once, and what it sends is kept.
"""

import base64
import json

LIGHT = {"--jp-ui-font-color1": "rgba(0,0,0,.87)", "--jp-ui-font-color2": "rgba(0,0,0,.54)", "--jp-layout-color1": "#fff"}
DARK = {"--jp-ui-font-color1": "#fff", "--jp-ui-font-color2": "rgba(255,255,255,.7)", "--jp-layout-color1": "#111"}
"""What JupyterLab's two themes say of the colours that panels use."""

PAGE = """<!doctype html><meta charset="utf-8"><title>stage</title>
<style>:root { %s; color-scheme: %s; --jp-ui-font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
body { margin: 0; padding: 12px; background: var(--jp-layout-color1); color: var(--jp-ui-font-color1); font: 13px/1.4 var(--jp-ui-font-family) }</style>
<style>%s</style><div id="place">%s</div>"""

# A model as anywidget hands it to the page: get, set, on, off, send, save_changes.
MOUNT = """async ([code, state, bytes]) => {
  const values = new Map(Object.entries(state)), heard = new Map();
  for (const [name, text] of Object.entries(bytes)) values.set(name, new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer));
  const call = (name, ...given) => { for (const one of heard.get(name) || []) one(...given); };
  window.sent = [];
  window.model = {
    get: (name) => values.get(name),
    set: (name, value) => { values.set(name, value); call(`change:${name}`); },
    on: (name, one) => heard.set(name, [...(heard.get(name) || []), one]),
    off: (name, one) => heard.set(name, (heard.get(name) || []).filter((each) => each !== one)),
    send: (content) => window.sent.push(content),
    save_changes: () => {},
    say: (content, text) => call("msg:custom", content, text ? [new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer)] : []),
  };
  const module = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  const { initialize, render } = module.default;
  if (initialize) window.leave = initialize({ model: window.model });
  if (render && !document.querySelector(".sparklab")) window.leave = render({ model: window.model, el: document.querySelector("#place") });
}"""


def paper(context, content="", *, css="", dark=False, width=1000, height=900):
    """A page that holds ``content`` (a twin, say) between a theme's colours."""
    page = context.new_page()
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme="dark" if dark else "light")
    theme = ";".join(f"{name}:{value}" for name, value in (DARK if dark else LIGHT).items())
    page.set_content(PAGE % (theme, "dark" if dark else "light", css, content))
    page.strangers, page.dialogs, page.faults = [], [], []
    page.on("request", lambda request: None if request.url.startswith(("data:", "blob:", "about:")) else page.strangers.append(request.url))
    page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    return page


def stage(context, widget, content="", **look):
    """``widget`` on a page of its own; ``content`` is what stands in the output before it (the twin it takes the place of)."""
    page = paper(context, content, css=str(widget._css), **look)
    tell(page, widget, first=True)
    return page


def split(widget):
    """A widget's state as plain values and as base64 of its bytes."""
    state, binary = {}, {}
    for name, value in widget.get_state().items():
        if isinstance(value, (bytes, memoryview)):
            binary[name] = base64.b64encode(bytes(value)).decode()
        elif not name.startswith("_"):
            state[name] = json.loads(json.dumps(value))
    return state, binary


def tell(page, widget, first=False):
    """Mounts the widget, or brings the page's model up to date with it."""
    state, binary = split(widget)
    if first:
        page.evaluate(MOUNT, [str(widget._esm), state, binary])
    else:
        page.evaluate("state => { for (const [name, value] of Object.entries(state)) model.set(name, value); }", state)
