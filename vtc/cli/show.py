"""`vtc show`: kept and merged tokens on the pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtc.app.options import PluginOption, use_plugins
from vtc.cli.shared import clip
from vtc.errors import InputError

app = typer.Typer()


@app.command()
def show(
    prompt: Annotated[str, typer.Option(help="The question.")],
    method: Annotated[list[str], typer.Option(help="Compression method, such as vtc_cls; repeat it for several.")],
    image: Annotated[list[str] | None, typer.Option(help="Image file or URL; repeat the option for several.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="Video or animation; repeat the option for several.")] = None,
    retention: Annotated[str | None, typer.Option(help="Fractions of visual tokens kept, such as 0.5,0.25.")] = None,
    keep: Annotated[str | None, typer.Option(help="Visual tokens kept per image, such as 64,32.")] = None,
    out: Annotated[Path, typer.Option(help="A .png, a .webp, or a .html with a slider over the budgets.")] = Path(
        "show.png"
    ),
    scores: Annotated[bool, typer.Option("--scores", help="Also draw what stages ranked by.")] = False,
    side: Annotated[int, typer.Option(min=32, max=2048, help="Pixels of a picture's longer side.")] = 240,
    frames: Annotated[int, typer.Option(min=1, help="Frames read of each video, at most.")] = 8,
    fps: Annotated[float | None, typer.Option(help="Frames per second, instead of even distances.")] = None,
    model: Annotated[str, typer.Option(help="Embedded model, checkpoint folder or hub name.")] = "tiny-llava",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the answers.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ..., balanced over all GPUs.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    plugin: PluginOption = None,
) -> None:
    """Draw what every stage of a method kept or merged on the pixels, beside the model's answers."""
    from vtc.app.images import open_image
    from vtc.app.loading import load
    from vtc.app.show import Shown, cells_of, ending
    from vtc.app.show.look import look

    use_plugins(plugin or [])
    ending(out)
    shares = None if retention is None else [_number(each, float, "--retention") for each in retention.split(",")]
    counts = None if keep is None else [int(_number(each, int, "--keep")) for each in keep.split(",")]
    cells = cells_of(method, shares, counts)
    media = [*map(open_image, image or []), *(clip(path, frames, fps) for path in video or [])]
    if not media:
        raise InputError("no --image and no --video given; there is nothing to show")
    loaded = load(model, device=device, dtype=dtype)
    print(Shown(look(loaded, media, prompt, cells, max_new_tokens=max_new_tokens), side=side, scores=scores).save(out))


def _number(text: str, kind: type[int] | type[float], option: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{option} holds {text!r}, which is no number; write them as 0.5,0.25 or 64,32") from None
