"""One HTML page that needs nothing but itself: it opens offline and asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from backtest_kit.errors import UserError
from backtest_kit.report.heatmap import HeatMap
from backtest_kit.report.tables import Table

_LIBRARY: Final = "vendor/lightweight-charts.standalone.production.js"


def render_page(name: str, title: str, content: Mapping[str, Any]) -> str:
    """The page whose body and script are `pages/{name}.html` and `pages/{name}.js`, filled from `content`.

    Raises:
        UserError: lwcharts is not installed, whose chart library the page takes in.
    """
    library = _chart_library()
    own = "\n" + _asset("common.js") + _asset(f"{name}.js")
    scripts = " ".join(f"'sha256-{_digest(script)}'" for script in (library, own))
    # The page's only scripts are these two, known by their digest: no text of a strategy can become another.
    policy = f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    parts = {
        "policy": policy,
        "title": html.escape(title),
        "style": _asset("style.css"),
        "body": _asset(f"{name}.html"),
        "data": _json(content),
        "library": library,
        "script": own,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("shell.html"))


def table_content(table: Table) -> dict[str, Any]:
    return {"header": table.header, "rows": table.rows, "total": table.total}


def heat_content(heat: HeatMap) -> dict[str, Any]:
    return table_content(heat.table) | {"tones": heat.tones}


def _asset(name: str) -> str:
    return importlib.resources.files("backtest_kit.report").joinpath("pages", name).read_text(encoding="utf-8")


def _json(content: Mapping[str, Any]) -> str:
    """JSON that no HTML parser can take for markup."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _chart_library() -> str:
    # Found without an import: lwcharts would import pandas only to say where it keeps a file.
    package = importlib.util.find_spec("lwcharts")
    folders = package.submodule_search_locations if package else None
    for folder in folders or ():
        file = Path(folder) / _LIBRARY
        if file.is_file():
            script = file.read_text(encoding="utf-8")
            return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    raise UserError(f"lwcharts is not installed, or brings no {_LIBRARY}: pip install --upgrade 'lwcharts>=0.3'")
