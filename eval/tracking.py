"""Results of a sweep in Weights & Biases, TensorBoard, MLflow and the other trackers that accelerate knows.

Every metric of every method is a curve over the visual tokens that were kept: the tokens take the place of the step.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtc.errors import InputError, one_line, unknown_name
from vtc.eval.quiet import muted
from vtc.eval.results import Results


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that do not exist or are not installed.

    Raises:
        InputError: with the known names, or with the package to install.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(each.value) for each in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(str(unknown_name("tracker", name, LOGGER_TYPE_TO_CLASS)))
        if name not in available:
            raise InputError(f"tracker {name!r} needs its package; run `pip install {name}`")


def track(results: Results, names: Sequence[str], folder: Path) -> None:
    """Send all metrics to the trackers `names`; what they write to disk lies in ``tracking/`` of `folder`.

    Raises:
        InputError: a tracker fails; the results are stored by then, and `vtc report` shows them.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": str(folder / "tracking")} if kind.requires_logging_directory else {}
        try:
            with muted():
                PartialState()  # what accelerate asks which process of a training it runs in
                tracker = kind(folder.name, **place)
                tracker.start()
                tracker.store_init_configuration(_settings(results))
                for step, values in curves(results):
                    tracker.log(values, step=step)
                tracker.finish()
        except Exception as error:  # trackers are programs of others
            raise InputError(
                f"tracker {name!r} failed ({one_line(error)}); the results lie in {str(folder)!r} all the same"
            ) from error


def curves(results: Results) -> list[tuple[int, dict[str, float]]]:
    """Values by name (task/metric/method) at each number of visual tokens, rounded, the fewest first."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for line in results.lines:
        if line["visual_tokens_kept"] is not None:
            name = f"{line['task']}/{line['metric']}/{line['method']}"
            found[round(line["visual_tokens_kept"])][name] = float(line["value"])
    return sorted(found.items())


def _settings(results: Results) -> dict[str, Any]:
    """The settings of the last sweep, in the types that trackers take."""
    spec = results.run["sweeps"][-1]["spec"]
    plain = (str, int, float, bool)
    return {name: value if isinstance(value, plain) else json.dumps(value) for name, value in spec.items()}
