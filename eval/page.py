"""Self-contained HTML pages: a template, Vega-Lite charts and the code that draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtc.eval import charts
from vtc.eval.tables import nominal, significant, tokens

TEMPLATES = Path(__file__).parent / "templates"


class Page:
    """A page made of a template, and of charts that are drawn when they come into view."""

    def __init__(self) -> None:
        self.charts: list[charts.Spec] = []

    def chart(self, spec: charts.Spec) -> int:
        """Add a chart; the number by which the template names its place."""
        self.charts.append({name: part for name, part in spec.items() if name != "config"})
        return len(self.charts) - 1

    def render(self, template: str, **context: Any) -> str:
        """The page."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.globals.update(significant=significant, tokens=tokens, plain=_plain, nominal=nominal)
        return environment.get_template(template).render(
            specs=self.charts, config=charts.CONFIG, library=charts.library(), **context
        )


def _plain(value: Any) -> str:
    """A setting as text: lists and mappings without brackets and quotes."""
    if isinstance(value, dict):
        if value.get("parts"):
            return str(value["name"])
        rest = ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items() if key != "name")
        return f"{value['name']}({rest})" if "name" in value and rest else str(value.get("name", rest))
    if isinstance(value, list):
        return ", ".join(_plain(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
