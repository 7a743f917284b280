"""How the page of a comparison looks and what it does: its style sheet and its script."""

from netslim.launch.compare.charts import BAR, INK, LINE, MUTED, PAPER, SERIES

_DARK_SERIES = ("#a9b4c0", "#5ab4e8", "#ff9a56", "#37c99a", "#e39acb", "#e3bd52", "#9fd4f3", "#dba07f")
_DARK = {"ink": "#e6e9ed", "muted": "#9aa5b1", "line": "#323942", "paper": "#14181d", "bar": "#434c57"}
_LIGHT = {"ink": INK, "muted": MUTED, "line": LINE, "paper": PAPER, "bar": BAR}

VARIABLES = {color: f"var(--{name})" for name, color in _LIGHT.items()} | {
    color: f"var(--series-{index})" for index, color in enumerate(SERIES)
}
"""What each colour of a chart is called on the page, so that one style sheet serves light and dark."""


def _variables(named: dict[str, str], series: tuple[str, ...]) -> str:
    pairs = [*named.items(), *((f"series-{index}", color) for index, color in enumerate(series))]
    return " ".join(f"--{name}: {color};" for name, color in pairs)


STYLE = (
    f"""
:root {{ {_variables(_LIGHT, SERIES)} --shade: #f1f3f5; --pick: #eaf3ee; --pick-edge: #00855f; --warn: #9a4b00; }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ {_variables(_DARK, _DARK_SERIES)} --shade: #1d2229; --pick: #182a24; --pick-edge: #37c99a;
    --warn: #ffb066; }}
}}
"""
    + """
:root {
  color-scheme: light dark;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria, "Liberation Serif", Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}
* { box-sizing: border-box; }
html { background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 87rem; padding: 2.5rem 1.5rem 4rem; font: 1.0625rem/1.55 var(--serif); }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 600; margin: 0 0 .35rem; text-wrap: balance; }
h2 { font-size: 1.3rem; font-weight: 600; margin: 3rem 0 .6rem; }
h3 { font-size: 1.05rem; font-weight: 600; margin: 2rem 0 .25rem; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.lead, .hint, figcaption span, .legend, .sorry { color: var(--muted); }
.lead { margin-top: 0; }
.hint, .legend { font: .875rem/1.5 var(--sans); }
code { font: .86em/1.5 var(--mono); }
ul.notes { list-style: none; margin: 1.5rem 0 0; padding: 0; }
ul.notes li { border-left: 3px solid var(--warn); padding: .15rem 0 .15rem .8rem; margin: .6rem 0; max-width: 46rem;
  overflow-wrap: anywhere; }
.choice { border: 1px solid var(--line); border-left: 4px solid var(--pick-edge); border-radius: 3px;
  padding: 1rem 1.25rem; margin: 1.5rem 0 0; }
.choice.none { border-left-color: var(--warn); }
.choice h2 { font: 600 .8125rem/1.4 var(--sans); letter-spacing: .02em; color: var(--muted); margin: 0 0 .3rem;
  overflow-wrap: anywhere; }
.choice .name { font-size: 1.25rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.choice dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .7rem 1.5rem;
  margin: .8rem 0; font-family: var(--sans); }
.choice dt { font-size: .8125rem; color: var(--muted); }
.choice dd { margin: 0; font-size: 1.25rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
.choice dd small { font-size: .8125rem; color: var(--muted); display: block; }
.choice pre { margin: .8rem 0 0; padding: .55rem .8rem; background: var(--shade); border-radius: 3px;
  white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.5 var(--mono); }
.scroll { overflow-x: auto; margin: .75rem 0; border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink);
  background: linear-gradient(to left, var(--paper) 50%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--bar), transparent) right / .8rem 100% no-repeat scroll; }
.scroll:focus-visible, svg:focus-visible, button:focus-visible {
  outline: 2px solid var(--series-1); outline-offset: 1px; }
table { border-collapse: collapse; width: 100%; font: .84375rem/1.35 var(--sans); font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .55rem; text-align: right; white-space: nowrap; }
thead th { border-bottom: 1px solid var(--ink); font-weight: 600; vertical-align: bottom; padding: 0; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody th { font-weight: 500; }
tbody th, thead th:first-child { position: sticky; left: 0; background: var(--paper); }
tbody th { min-width: min(var(--longest), 17rem); max-width: 17rem; white-space: normal; overflow-wrap: anywhere; }
.text { text-align: left; }
tbody th span { display: inline-block; max-width: 100%; }
td.text { white-space: normal; min-width: 8rem; max-width: 22rem; overflow-wrap: anywhere; }
td.done { min-width: 0; }
tr.pick > * { background: var(--pick); }
tr.pick th { box-shadow: inset 3px 0 var(--pick-edge); }
td.state-bad { color: var(--warn); min-width: 13rem; }
.dot { font-size: .8em; margin-right: .3em; }
thead button { all: unset; box-sizing: border-box; display: block; position: relative; width: 100%;
  padding: .5rem .55rem; cursor: pointer; text-align: inherit; white-space: nowrap; }
thead button:hover { background: var(--shade); }
thead button::after { position: absolute; right: .02rem; font-size: .8em; line-height: 1.7; content: ""; }
thead button:hover::after { content: "\\2195"; color: var(--muted); }
th[aria-sort=ascending] button::after { content: "\\2191" !important; }
th[aria-sort=descending] button::after { content: "\\2193" !important; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .6rem 0 0; padding: 0; list-style: none;
  max-width: none; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.5rem 2rem;
  margin: .9rem 0 0; }
figure { margin: 0; position: relative; min-width: 0; }
figcaption { font: 600 .9375rem/1.35 var(--sans); margin: 0 0 .3rem; overflow-wrap: anywhere; }
figcaption span { font-weight: 400; display: block; font-size: .8125rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; touch-action: pan-y; }
figure svg:focus:not(:focus-visible) { outline: none; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: var(--sans); }
#tip { position: absolute; z-index: 9; left: 0; top: 0; max-width: min(20rem, calc(100vw - 1rem));
  padding: .4rem .65rem; background: var(--ink); color: var(--paper);
  font: .8125rem/1.4 var(--sans); border-radius: 3px; pointer-events: none;
  white-space: pre-line; overflow-wrap: anywhere; visibility: hidden; font-variant-numeric: tabular-nums; }
#tip b { display: block; font-weight: 600; }
@media (max-width: 40rem) {
  body { padding: 1.5rem 1rem 3rem; font-size: 1rem; }
  h1 { font-size: 1.5rem; }
  tbody th { min-width: 6.5rem; max-width: 8rem; }
  .choice { padding: .85rem 1rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  table { font-size: 6.5pt; }
  th, td, thead button { padding: .2rem .25rem; white-space: normal; }
  thead button::after, .hint, #tip { display: none; }
  figure, .choice, tr { break-inside: avoid; }
  tbody th { min-width: 12em; }
  td.text, td.state-bad { min-width: 0; max-width: 14em; }
  .figures { grid-template-columns: repeat(2, 1fr); }
  tr.pick > *, .choice { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
)

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const sign = down ? -1 : 1;
    const isText = head.classList.contains("text");
    const value = (row) => row.cells[column].dataset.value;
    const compare = isText ? (a, b) => a.localeCompare(b, "en", {numeric: true}) : (a, b) => Number(a) - Number(b);
    const rows = [...table.tBodies[0].rows];
    rows.sort((one, other) => {
      const a = value(one), b = value(other);
      // what was not measured stays last, whatever the direction
      return (a === "") - (b === "") || (a === "" ? 0 : sign * compare(a, b));
    });
    table.tBodies[0].append(...rows);
    heads.forEach((each) => each.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  }));
}

const tip = document.getElementById("tip");
let owner = null;
const hide = () => {
  owner = null;
  tip.style.visibility = "hidden";
  document.querySelectorAll(".ring").forEach((ring) => ring.remove());
};
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg");
  const marks = JSON.parse(figure.querySelector("script").textContent)
    .flatMap(([label, points]) => points.map(([x, y, text]) => ({x, y, label, text})));
  let current = -1;
  const show = (index) => {
    hide();
    owner = svg;
    current = index;
    const {x, y, label, text} = marks[index];
    const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    const look = {class: "ring", cx: x, cy: y, r: 6.5, fill: "none", stroke: "currentColor"};
    Object.entries(look).forEach(([name, value]) => ring.setAttribute(name, value));
    svg.append(ring);
    const name = document.createElement("b");
    name.textContent = label;
    tip.replaceChildren(name, text);
    const at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
    const {width, height} = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.x - width / 2), document.documentElement.clientWidth - width - 8);
    const top = at.y - height - 14 < 8 ? at.y + 14 : at.y - height - 14;
    tip.style.transform = `translate(${Math.max(8, left) + scrollX}px, ${top + scrollY}px)`;
    tip.style.visibility = "visible";
  };
  const leave = () => { if (owner === svg) hide(); };
  const point = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = -1, least = 28;
    marks.forEach(({x, y}, index) => {
      const distance = Math.hypot(x - at.x, y - at.y);
      if (distance < least) { least = distance; best = index; }
    });
    if (best >= 0) show(best); else leave();
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(Math.max(0, current)); });
  // a tap shows its value before the figure that was focused until then hears that it no longer is
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (step) { event.preventDefault(); show((current + step + marks.length) % marks.length); }
    if (event.key === "Escape") hide();
  });
}
"""
