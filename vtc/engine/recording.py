"""Recording what a plan needs of a vision encoder's layers, into the pass that is running."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.engine.encoder_pass import EncoderPass
from vtc.engine.installed import Hook
from vtc.engine.passes import Passes
from vtc.engine.taps import TapSet
from vtc.errors import UnsupportedMethod
from vtc.method.plan import PIXELS
from vtc.method.readings import AttentionCall, VisionReading, exact
from vtc.method.vision_readings import LayerOutput, Pixels

if TYPE_CHECKING:
    from vtc.adapters.base import VisionSide


class Recording:
    """Taps and hooks on the layers of `pairs`, (layer, reading) each; outside of a pass they do nothing.

    Raises UnsupportedMethod for what the encoder does not have.
    """

    def __init__(
        self, adapter: VisionSide, pairs: tuple[tuple[int, VisionReading], ...], passes: Passes[EncoderPass]
    ) -> None:
        self.adapter, self.pairs, self._passes = adapter, pairs, passes
        self._hooks: list[Any] = []
        attention = list(adapter.vision_attention)
        for layer, reading in pairs:
            if isinstance(reading, Pixels) or layer == PIXELS:
                self._check_pixels(layer, reading)
            elif not 0 <= layer < len(attention):
                raise UnsupportedMethod(
                    f"vision layer {layer} was asked for; the encoder of this {adapter.family} model has layers 0 to "
                    f"{len(attention) - 1}; choose among them"
                )
            if not isinstance(reading, VisionReading):
                raise UnsupportedMethod(
                    f"{reading.name!r} was asked for of a vision layer, but is a reading of the LLM; write "
                    "Rows.RECEIVED, for example"
                )
            if reading.needs_cls and not adapter.spec.has_cls:
                raise UnsupportedMethod(
                    f"attention of the class token was asked for, but the encoder of this {adapter.family} model has "
                    "none; use Rows.RECEIVED"
                )
        beside = LayerOutput | Pixels
        self._attention = [(n, attention[n], one) for n, one in pairs if not isinstance(one, beside)]
        tapped = self._attention if adapter.looked_up else []
        self._taps = TapSet((module, functools.partial(self._read, n, one)) for n, module, one in tapped)

    def _check_pixels(self, layer: int, reading: VisionReading) -> None:
        source, family = self.adapter.patch_source, self.adapter.family
        if layer != PIXELS or not isinstance(reading, Pixels):
            raise UnsupportedMethod(
                f"{reading.name!r} was asked for of vision layer {layer}; pixels are read in front of the layers and "
                "nothing else is: write Needs({-1: Rows.PIXELS})"
            )
        if source is None or not (self.adapter.packed or source.stride == source.kernel_size):
            raise UnsupportedMethod(
                f"the pixels of patches were asked for, but the encoder of this {family} model is not given pictures "
                "that it cuts into patches; choose a method that reads features"
            )

    def install(self) -> None:
        """Place taps and hooks."""
        self._taps.install()
        layers = list(self.adapter.vision_layers)
        for layer, reading in self.pairs:
            if isinstance(reading, LayerOutput):
                hook = Hook(self._keep_output, layer, reading)
                self._hooks.append(layers[layer].register_forward_hook(hook))
            if isinstance(reading, Pixels) and (source := self.adapter.patch_source) is not None:
                self._hooks.append(source.register_forward_pre_hook(Hook(self._keep_pixels, reading)))
        for layer, module, reading in [] if self.adapter.looked_up else self._attention:
            hook = Hook(self._read_call, layer, reading)
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take them away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._taps.remove()

    @torch.no_grad()  # scores, not features: a graph would hold a whole attention matrix per layer
    def _read(self, layer: int, reading: VisionReading, attention: AttentionCall) -> None:
        one = self._passes.current
        if one is not None:
            with exact(attention.query.device):
                one.readings.setdefault((layer, reading), []).append(reading.read(attention))

    def _read_call(self, layer: int, reading: VisionReading, module: Any, args: Any, kwargs: Any) -> None:
        if self._passes.current is not None:
            with torch.no_grad():  # no decorator, by which a copy of the model would not know the hook
                attention = self.adapter.attention_call(layer, args, kwargs)
            self._read(layer, reading, attention)

    @staticmethod
    def _cut(pixels: Tensor, projection: Any) -> Tensor:
        """[crops, channels, H, W] -> [crops, patches, channels * h * w]"""
        height, width = projection.kernel_size
        rows, columns = pixels.shape[2] // height, pixels.shape[3] // width
        cells = pixels[:, :, : rows * height, : columns * width]
        cells = cells.reshape(*pixels.shape[:2], rows, height, columns, width)
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    @staticmethod
    def _arranged(pixels: Tensor, rasters: Sequence[tuple[int, int]], order: Tensor | None) -> Tensor:
        """[P, C] pixels of a packed encoder's patches, token by token, in the sequence of its layers."""
        if order is None:
            return pixels
        tokens = pixels.view(len(order), -1)
        return torch.empty_like(tokens).index_copy(0, order.to(pixels.device), tokens).view_as(pixels)

    def _keep_pixels(self, reading: VisionReading, module: Any, args: Any) -> None:
        one = self._passes.current
        if one is not None:
            if one.packing is None:
                patches = self._cut(args[0].detach(), module)
                rows = torch.nn.functional.pad(patches, (0, 0, self.adapter.prefix_tokens(patches), 0))
            else:
                rows = self._arranged(args[0].detach(), *one.packing)[None]
            one.readings.setdefault((PIXELS, reading), []).append(rows)

    def _keep_output(self, layer: int, reading: VisionReading, module: Any, args: Any, output: Any) -> None:
        one = self._passes.current
        if one is not None:
            hidden: Tensor = (output[0] if isinstance(output, tuple) else output).detach()
            one.readings.setdefault((layer, reading), []).append(hidden[None] if self.adapter.packed else hidden)
