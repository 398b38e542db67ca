"""Style and script of the page, in the page itself: it loads nothing."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root { --ink: #26323d; --soft: #5d6973; --line: #dfe4e8; --accent: #2c5f8a; --paper: #fbfcfd; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif; }
main, header, footer { max-width: 1160px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 32px; }
.eyebrow { margin: 0; color: var(--soft); font-size: 14px; overflow-wrap: anywhere; }
h1 { font-size: 26px; line-height: 1.3; font-weight: 600; margin: 6px 0 12px; max-width: 46em; text-wrap: pretty; }
h2 { font-size: 20px; font-weight: 600; margin: 0 0 4px; }
h3 { font-size: 16px; font-weight: 600; margin: 20px 0 2px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 20px 22px; margin: 18px 0; }
p { margin: 6px 0; max-width: 70em; }
p.note, li.note { color: var(--soft); font-size: 14.5px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 18px 0; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 22px; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: 14px; }
.tile small { display: block; color: var(--soft); font-size: 13px; }
dl.why { margin: 14px 0 0; display: grid; grid-template-columns: 9.5em 1fr; gap: 6px 14px; }
dl.why dt { font-weight: 600; } dl.why dd { margin: 0; max-width: 62em; }
ul.warnings { margin: 14px 0 0; padding: 10px 14px 10px 32px; background: #fdf6e3; border: 1px solid #ecdcae;
  border-radius: 8px; font-size: 14.5px; }
.wide { overflow-x: auto; margin: 10px -4px 0; padding: 0 4px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 9px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
td.n, th.n { text-align: right; } td.n { white-space: nowrap; }
td.k { white-space: nowrap; }
td small { display: block; color: var(--soft); font-size: 13px; }
td.words { min-width: 13em; }
td .unit, th .unit { color: var(--soft); font-weight: 400; }
tbody tr:hover { background: #f4f7f9; }
tr.first td { background: #eef4f9; }
th button { all: unset; cursor: pointer; } th button:hover { color: var(--accent); }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
figure { margin: 8px 0 0; } .plot { width: 100%; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(430px, 100%), 1fr)); gap: 4px 22px; }
ul.keys { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 8px 0 0; padding: 0;
  font-size: 14px; }
ul.keys i { display: inline-block; width: 26px; margin-right: 7px; vertical-align: middle; }
details { margin-top: 14px; border-top: 1px solid var(--line); padding-top: 10px; }
summary { cursor: pointer; font-weight: 600; }
.tag { display: inline-block; border-radius: 4px; padding: 0 7px; font-size: 12.5px; background: #e9eef2; }
.tag.fitted { background: #dcebdd; } .tag.assumed, .tag.carried { background: #fbe9c6; }
footer { color: var(--soft); font-size: 13.5px; padding-bottom: 40px; }
@media (max-width: 640px) {
  main, header, footer { padding-left: 12px; padding-right: 12px; } header { padding-top: 18px; }
  h1 { font-size: 20px; } section { padding: 14px 12px; }
  .tiles { grid-template-columns: 1fr 1fr; } .tile b { font-size: 19px; }
  dl.why { grid-template-columns: 1fr; gap: 2px; } dl.why dd { margin-bottom: 8px; }
}
@media print { section { break-inside: avoid; border: 0; padding: 0; } }
"""

SCRIPT = """
(() => {
  const narrow = () => window.innerWidth < 640;
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  const fit = (layout, data) => {
    if (!narrow()) return layout;
    const named = new Set(data.filter(t => t.name && t.showlegend !== false).map(t => t.name)).size;
    layout.font.size = 11;
    for (const [name, axis] of Object.entries(layout)) {
      if (!/^[xy]axis/.test(name)) continue;
      axis.tickfont = { size: 10 };
      if (axis.title) axis.title.font = { size: 11 };
    }
    layout.margin = { l: 8, r: 8, t: 8, b: 40 };
    if (named > 1) {
      layout.legend.font = { size: 11 };
      layout.height += 9 * named;
    }
    if (layout.yaxis && layout.yaxis.scaleanchor) layout.height = Math.min(layout.height, window.innerWidth);
    return layout;
  };
  const draw = root => root.querySelectorAll('.plot:not([data-drawn])').forEach(div => {
    if (div.closest('details:not([open])')) return;
    div.dataset.drawn = '1';
    const spec = JSON.parse(document.getElementById(div.dataset.figure).textContent);
    const layout = fit(spec.layout, spec.data);
    div.style.minHeight = layout.height + 'px';
    Plotly.newPlot(div, spec.data, layout, config);
  });
  draw(document);
  document.querySelectorAll('details').forEach(d => d.addEventListener('toggle', () => draw(d)));
  document.querySelectorAll('table.sortable th button').forEach(button => button.addEventListener('click', () => {
    const th = button.closest('th'), body = th.closest('table').tBodies[0];
    const at = [...th.parentNode.children].indexOf(th);
    const down = th.getAttribute('aria-sort') === 'ascending';
    th.parentNode.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
    th.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const key = row => row.children[at].dataset.v ?? '';
    const compare = (a, b) => {
      const x = key(a), y = key(b);
      if (x === '' || y === '') return (x === '') - (y === '');
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    };
    [...body.rows].sort(compare).forEach(row => body.append(row));
  }));
})();
"""
