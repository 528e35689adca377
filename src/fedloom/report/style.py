"""Style of the pictures, and how a figure becomes an SVG text that is the same on every day.

Colours are written as variables of the page's style sheet, which has each for light and for dark pages. Behind each stands the colour
itself, for a page without that sheet. A picture can be drawn for a wide page, and for a narrow one with its panels below each
other.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch

T = TypeVar("T")
Box: TypeAlias = tuple[float, float, float, float]

WIDTH, NARROW = 9.0, 4.0
"""Inches of a picture on a wide page, and on one as narrow as a telephone."""
INK, MUTED, FAINT = "#1f2430", "#5f6773", "#e3e6ea"
# Okabe and Ito: distinct with every common colour blindness
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Paul Tol, muted: nine kinds side by side
KINDS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499")
OTHER, PALE, PAPER = "#c4c8ce", "#b4bac2", "#ffffff"
VARIABLES: Mapping[str, str] = {
    **{colour.lower(): f"series-{k}" for k, colour in enumerate(SERIES, 1)},
    **{colour.lower(): f"kind-{k}" for k, colour in enumerate(KINDS, 1)},
    INK: "ink",
    MUTED: "muted",
    FAINT: "line",
    OTHER: "other",
    PALE: "pale",
    PAPER: "card",
}
"""Variables of `page.css` by the colour that pictures are drawn in. A picture has no other colours, and shades by transparency."""
DASHES = ("-", "--", ":", "-.")

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": PALE,
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


def picture(height: float) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Turn a function that draws on a figure and returns its alternative text into one that returns the SVG.

    With `narrow=True` that one draws for a narrow page.
    """

    def wrap(draw: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(draw)
        def render(*args: Any, narrow: bool = False) -> str:
            import matplotlib
            from matplotlib.figure import Figure
            from matplotlib.layout_engine import ConstrainedLayoutEngine

            with matplotlib.rc_context(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph")  # a reader's browser has the font that we lack
                matplotlib.rcdefaults()
                settings: Any = _STYLE | {"svg.hashsalt": f"fedloom {draw.__name__}{' narrow' if narrow else ''}"}
                matplotlib.rcParams.update(settings)
                kind, width = (stacked_figure(), NARROW) if narrow else (Figure, WIDTH)
                figure = kind(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.06))
                alt = draw(figure, *args)
                if narrow:
                    _raise_titles(figure)
                return _svg(figure, alt)

        return render

    return wrap


@functools.cache
def stacked_figure() -> type[Figure]:
    """Return a class of figures whose panels stand below each other, whatever columns were asked for."""
    from matplotlib.figure import Figure

    class StackedFigure(Figure):
        """A figure of one column."""

        def subplots(self, nrows: int = 1, ncols: int = 1, **options: Any) -> Any:
            """Return panels in the shape that was asked for."""
            options.pop("width_ratios", None)
            if ncols == 1:
                return super().subplots(nrows, **options)
            self.set_figheight(self.get_figheight() * ncols * 0.85)
            panels = super().subplots(nrows * ncols, **options).reshape(nrows, ncols)
            return panels[0] if nrows == 1 else panels

        def subplot_mosaic(self, mosaic: Any, **options: Any) -> Any:
            """Return panels by the names that were given to them."""
            options.pop("width_ratios", None)
            names = list(dict.fromkeys(name for row in mosaic for name in row))
            self.set_figheight(self.get_figheight() * len(names) / len(mosaic))
            return super().subplot_mosaic([[name] for name in names], **options)

        def legend(self, *args: Any, ncols: int = 1, **options: Any) -> Any:
            """Return a legend of two columns at most, and of one where it names much."""
            legend = super().legend(*args, **options)
            longest = max((len(text.get_text()) for text in legend.get_texts()), default=0)
            legend.set_ncols(1 if longest > 20 else min(ncols, 2))
            return legend

    return StackedFigure


def _raise_titles(figure: Figure) -> None:
    """Put a title above the legend where both stand above their panel: a narrow one has no room for them side by side."""
    for axes in figure.axes:
        legend = axes.get_legend()
        anchor = axes.bbox if legend is None else legend.get_bbox_to_anchor()
        if anchor is not axes.bbox and 0.9 < (anchor.y0 - axes.bbox.y0) / axes.bbox.height < 1.05:
            axes.set_title(axes.get_title(), pad=20)


def _svg(figure: Figure, alt: str) -> str:
    """Return the figure as an `<svg>` element: no prolog, no date, no element names that two pictures would share."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"#[0-9a-f]{6}\b", _variable, text)
    text = re.sub(r' d="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    opening = f'<svg {view[0]} role="img" aria-label="{escape(alt)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return opening + text[text.index(">", view.end()) + 1 :]


def _variable(colour: re.Match[str]) -> str:
    """The variable of a colour; a name that is no colour, and a colour of nobody, stay as they are."""
    name = VARIABLES.get(colour[0])
    return f"var(--{name},{colour[0]})" if name else colour[0]


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
