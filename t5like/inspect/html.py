"""Pages: one self-contained HTML document from text, tables and charts.

A page has its style inside, follows the light or dark setting of the browser, fits a phone, and loads nothing: no
script, no font, no address. Its content security policy forbids all of that, so that a page of untrusted documents is
safe to open. All text is escaped; `Markup`, which the functions of this module and of `inspect.charts` return, is
inserted as it is.

    page("tiny", [("Losses", [paragraph("Nats per target token."), table(["step", "loss"], [[10, 4.81]])])])
"""

import html
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from t5like.errors import printable

VOID = ("br", "meta", "hr")  # elements without an end tag
KEPT = "\n\t\u00a0\u3000"  # spaces that are not escaped
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class Markup(str):
    """HTML that is inserted as it is; every other value is escaped."""

    __slots__ = ()


Content = Any  # Markup, or a value that is shown as text, or a sequence of both


# ---- Elements ----


def escape(text: str) -> str:
    """Return text as HTML. Control, bidirectional and undecodable characters become visible escapes, as ``\\u202e``."""
    return html.escape(printable(text, kept=KEPT))


def markup(content: Content) -> Markup:
    """Return content as HTML: markup unchanged, the parts of a sequence joined, other values as text; None is empty."""
    if isinstance(content, Markup):
        return content
    if content is None:
        return Markup("")
    if isinstance(content, Iterable) and not isinstance(content, str | Mapping):
        return Markup("".join(map(markup, content)))
    return Markup(escape(number(content) if isinstance(content, numbers.Real) else str(content)))


def element(tag: str, /, *content: Content, **attributes: str | float) -> Markup:
    """Return an element. Attributes are escaped; ``class_`` is the class, and ``_`` in a name is ``-``."""
    text = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    return Markup(f"<{tag}{text}>" if tag in VOID else f"<{tag}{text}>{markup(content)}</{tag}>")


def number(value: float) -> str:
    """Return a number for readers: whole ones with commas, others with four significant digits."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, numbers.Integral):
        return f"{value:,}"
    if abs(value) >= 1e3:
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.3g}"
    return f"{value:.4g}"


# ---- Parts of a page ----


def paragraph(*content: Content) -> Markup:
    """Return a paragraph."""
    return element("p", *content)


def preformatted(text: Content) -> Markup:
    """Return text with its line ends and spaces, in a font of equal widths; long lines wrap."""
    return element("pre", text)


def notice(kind: str, *content: Content) -> Markup:
    """Return a box. `kind` is ``good``, ``warning`` or ``bad``; the box also says it in a word, not by colour alone."""
    word = {"good": "Good", "warning": "Warning", "bad": "Problem"}[kind]
    return element("div", element("strong", word), " ", *content, class_=f"notice {kind}")


def facts(pairs: Iterable[tuple[str, Content]]) -> Markup:
    """Return names with their values, one pair per line."""
    return element("dl", [(element("dt", name), element("dd", value)) for name, value in pairs])


def table(header: Sequence[Content], rows: Iterable[Sequence[Content]]) -> Markup:
    """Return a table. Numbers are aligned to the right; a table wider than the page scrolls on its own."""
    head = element("tr", [element("th", cell, scope="col") for cell in header])
    body = [element("tr", map(_cell, row)) for row in rows]
    return element("div", element("table", element("thead", head), element("tbody", body)), class_="wide")


def _cell(value: Content) -> Markup:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return element("td", value, class_="number") if is_number else element("td", value)


def grid(*charts: Markup) -> Markup:
    """Return charts side by side, as many as the page is wide."""
    return element("div", *charts, class_="grid")


def details(summary: Content, *content: Content) -> Markup:
    """Return content that is hidden until its summary is clicked."""
    return element("details", element("summary", summary), *content)


# ---- The page ----


def page(title: str, sections: Iterable[tuple[str, Content]], *, style: str = "") -> str:
    """Return a whole document.

    Args:
        title: of the page and of its first heading.
        sections: heading and content of each section; a section with an empty heading has none. With more than three
            headings the page begins with links to them.
        style: additional CSS, which must come from the program and never from data.
    """
    sections = list(sections)
    headings = [heading for heading, _ in sections if heading]
    links = [element("a", heading, href=f"#{index}") for index, heading in enumerate(headings)]
    body = [
        element("section", element("h2", heading, id=headings.index(heading)) if heading else "", content)
        for heading, content in sections
    ]
    document = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", title),
            element("style", Markup(STYLE + style)),
        ),
        element(
            "body",
            element("header", element("h1", title), element("nav", *links) if len(links) > 3 else ""),
            element("main", *body),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{document}\n"


# Colours after Okabe and Ito, which colour-blind readers can tell apart, darker on white and lighter on black.
STYLE = """
:root { --page: #fff; --text: #1b1f24; --soft: #5b6470; --line: #d5dae0; --panel: #f5f7f9; --link: #0a5ea8;
  --good: #e3f4ea; --warning: #fff3d6; --bad: #fde5e1; --good-edge: #0b7a4b; --warning-edge: #a66a00;
  --bad-edge: #b8321a;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b5488a; --c4: #a07800; --c5: #3aa0dc; --c6: #6b7280;
  --c7: #5b3fa0; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --text: #e6e9ec; --soft: #a0a9b3; --line: #363c43;
  --panel: #1d2125; --link: #7cc0ff; --good: #12301f; --warning: #362a0c; --bad: #3d1a14; --good-edge: #4cc38a;
  --warning-edge: #e5ad3d; --bad-edge: #ff8a73; --c0: #56b4e9; --c1: #ff8a4c; --c2: #2cc79a; --c3: #e59ac4;
  --c4: #e8c33c; --c5: #9ad4ff; --c6: #aab2bc; --c7: #b9a3f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem clamp(.75rem, 3vw, 2rem) 3rem; background: var(--page);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--line); }
a { color: var(--link); } nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .9rem; }
p { margin: .5rem 0; max-width: 48rem; } .soft { color: var(--soft); font-size: .9rem; }
pre { background: var(--panel); padding: .6rem .8rem; border-radius: .3rem; white-space: pre-wrap; font-size: .85rem;
  margin: .5rem 0; }
pre, code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem; margin: .5rem 0; }
dt { color: var(--soft); } dd { margin: 0; }
.wide { overflow-x: auto; margin: .5rem 0; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; }
th { color: var(--soft); font-weight: 600; } .number { text-align: right; font-variant-numeric: tabular-nums; }
.notice { border-left: .3rem solid; border-radius: .3rem; padding: .5rem .8rem; margin: .5rem 0; }
.notice.good { background: var(--good); border-color: var(--good-edge); }
.notice.warning { background: var(--warning); border-color: var(--warning-edge); }
.notice.bad { background: var(--bad); border-color: var(--bad-edge); }
.grid { margin-top: 1rem; display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: 1rem 1.5rem; }
summary { cursor: pointer; color: var(--link); }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .15rem; }
svg { display: block; width: 100%; max-width: 44rem; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
.axis, .gridline { stroke: var(--line); stroke-width: 1; fill: none; } .gridline { opacity: .6; }
.series { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; color: var(--soft); }
.legend svg { display: inline-block; width: 1.6rem; height: .7rem; margin-right: .35rem; }
.share { max-width: 48rem; display: flex; height: 1.4rem; border-radius: .3rem; overflow: hidden; gap: 2px; }
.share div { min-width: 1px; }
""" + "".join(
    f".s{index} {{ stroke: var(--c{index}); }} .f{index} {{ fill: var(--c{index}); background: var(--c{index}); }}\n"
    for index in range(8)
)
