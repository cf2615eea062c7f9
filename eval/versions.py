"""What answers, metrics and times were made with."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("visual-token-compression", "torch", "transformers", "lmms-eval", "datasets", "numpy", "scipy", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that answers and metrics depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
