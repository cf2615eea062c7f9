"""For mkdocstrings: `vtc.adapters` and `vtc.eval`, which lie beside the folder vtc, become its members."""

from __future__ import annotations

from typing import Any

import griffe


class Rooms(griffe.Extension):
    """Puts the packages in the folders `adapters` and `eval` where an installation has them."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Called once for every top-level package that is loaded."""
        if pkg.name == "vtc":
            for name in ("adapters", "eval"):
                room = loader.load(name)
                assert isinstance(room, griffe.Module)
                pkg.set_member(name, room)
