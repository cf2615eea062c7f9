"""The documentation for a browser: built without a warning, without anything of another server, links that lead on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import vtc
from vtc.method.registry import METHODS

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocs")


class Page(HTMLParser):
    """Addresses that a page names, those it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        self.loaded += [given[name] for name in ("src", "href") if name in given and tag in ("script", "link", "img")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for file, page in pages.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto") or (file.name == "404.html" and link.startswith("/")):
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            there = target.is_file() or (target / "index.html").is_file()
            anchors = pages[target].anchors if target in pages else {parts.fragment}
            if not there or (parts.fragment and unquote(parts.fragment) not in anchors):
                broken.append(f"{file.relative_to(site)}: {link}")
    assert broken == []
    assert len(pages) > 40


def test_nothing_comes_from_another_server(site: Path, pages: dict[Path, Page]) -> None:
    assert [link for page in pages.values() for link in page.loaded if urlsplit(link).netloc] == []
    styles = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))
    assert re.findall(r"url\(\s*[\"']?(?:https?:)?//", styles) == []


def test_the_reference_holds_every_public_name(pages: dict[Path, Page], site: Path) -> None:
    anchors = pages[site / "api" / "vtc.html"].anchors | pages[site / "api" / "methods.html"].anchors
    assert {f"vtc.{name}" for name in vtc.__all__} <= anchors
    classes = (METHODS.get(name) for name in METHODS.names())
    known = (cls for cls in classes if cls.__module__.startswith("vtc.methods"))
    assert {f"{cls.__module__}.{cls.__qualname__}" for cls in known} <= anchors


def test_links_in_the_repository_lead_somewhere() -> None:
    """As they are read there: README and what lies beside it are no pages of the site."""
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        found = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8"))
        assert [link for link in found if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_citation_and_templates_can_be_read() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == vtc.__version__
    for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        template = yaml.safe_load(file.read_text())
        assert template.keys() >= {"name", "description", "body"} or file.name == "config.yml"
