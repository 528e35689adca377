"""Style of the pictures, and how a figure becomes an SVG text that is the same on every day."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeAlias, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch

P = ParamSpec("P")
T = TypeVar("T")
Box: TypeAlias = tuple[float, float, float, float]

WIDTH = 9.0
INK, MUTED, FAINT = "#1f2430", "#5f6773", "#e3e6ea"
# Okabe and Ito: distinct with every common colour blindness
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Paul Tol, muted: nine kinds side by side
KINDS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499")
OTHER, PALE = "#c4c8ce", "#b4bac2"
DASHES = ("-", "--", ":", "-.")

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#b4bac2",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.03,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.7,
    "path.simplify": True,
}


def picture(height: float) -> Callable[[Callable[Concatenate[Figure, P], str]], Callable[P, str]]:
    """Turn a function that draws on a figure and returns its alternative text into one that returns the SVG."""

    def wrap(draw: Callable[Concatenate[Figure, P], str]) -> Callable[P, str]:
        @functools.wraps(draw)
        def render(*args: P.args, **kwargs: P.kwargs) -> str:
            import matplotlib
            from matplotlib.figure import Figure
            from matplotlib.layout_engine import ConstrainedLayoutEngine

            with matplotlib.rc_context(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph")  # a reader's browser has the font that we lack
                matplotlib.rcdefaults()
                settings: Any = _STYLE | {"svg.hashsalt": f"fedloom {draw.__name__}"}
                matplotlib.rcParams.update(settings)
                figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(wspace=0.06))
                alt = draw(figure, *args, **kwargs)
                return _svg(figure, alt)

        return render

    return wrap


def _svg(figure: Figure, alt: str) -> str:
    """Return the figure as an `<svg>` element: no prolog, no date, no element names that two pictures would share."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' d="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    opening = f'<svg {view[0]} role="img" aria-label="{escape(alt)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return opening + text[text.index(">", view.end()) + 1 :]


def thinned(items: Sequence[T], most: int = 300) -> list[T]:
    """Choose at most `most` of the items, evenly over their order, the first and the last among them.

    >>> thinned(range(10), 4)
    [0, 3, 6, 9]
    """
    steps = max(1, min(most, len(items)) - 1)
    return [items[k * (len(items) - 1) // steps] for k in range(min(most, len(items)))]


def draw_curve(axes: Axes, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """Draw a line with a dot at each point while the dots do not touch, and of as many points as can be seen."""
    points = thinned(list(zip(x, y, strict=True)))
    dots = {"marker": "o"} if len(points) <= 60 else {}
    axes.plot([at for at, _ in points], [value for _, value in points], **(dots | style))


def line_style(index: int) -> dict[str, Any]:
    """Style of the line of the n-th series: colours first, then the same colours dashed."""
    return {"color": SERIES[index % len(SERIES)], "linestyle": DASHES[index // len(SERIES) % len(DASHES)]}


def legend_text(text: str) -> str:
    """Return a legend entry; matplotlib would drop one that starts with an underscore."""
    return text if not text.startswith("_") else "\u200b" + text


def percent_axis(axes: Axes) -> None:
    """Write shares on the y axis as percent with no more digits than they need."""
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")


def draw_boxes(axes: Axes, rectangles: Iterable[Box], **style: Any) -> PathPatch:
    """Draw many rectangles (x, y, width, height) as one shape: the page stays small with thousands of them."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    vertices: list[tuple[float, float]] = []
    codes: list[int] = []
    for x, y, width, height in rectangles:
        vertices += [(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)]
        codes += [int(Path.MOVETO), *[int(Path.LINETO)] * 3, int(Path.CLOSEPOLY)]
    if not vertices:
        vertices, codes = [(0, 0)], [int(Path.MOVETO)]
    patch = PathPatch(Path(vertices, codes), **({"linewidth": 0} | style))
    axes.add_patch(patch)
    axes.autoscale_view()
    return patch
