"""One self-contained HTML page: it opens offline and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import re
from collections.abc import Mapping
from typing import Any

from backtest_kit.report.heatmap import HeatMap
from backtest_kit.report.tables import Table


def render_page(name: str, title: str, content: Mapping[str, Any]) -> str:
    """The page whose body and script are `pages/{name}.html` and `pages/{name}.js`, filled from `content`.

    The chart library in `pages/vendor` is TradingView's lightweight-charts, as published.
    """
    library = _asset("vendor/lightweight-charts.standalone.production.js")
    library = library.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    own = "\n" + _asset("common.js") + _asset(f"{name}.js")
    scripts = " ".join(f"'sha256-{_digest(script)}'" for script in (library, own))
    # Only these two scripts may run, by their digest: no text of a strategy can become a script.
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
    return importlib.resources.files("backtest_kit.report.render").joinpath("pages", name).read_text(encoding="utf-8")


def _json(content: Mapping[str, Any]) -> str:
    """JSON that an HTML parser cannot mistake for markup."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
