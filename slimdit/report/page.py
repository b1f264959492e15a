"""How the HTML report looks, and the few lines of script that draw its plot."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f6f7f9; --ink: #1b1f24; --quiet: #5b6470; --line: #dfe3e8; --accent: #2a78d6;
  --good: #116633; --good-paper: #e3f4e8; --bad: #a12622; --bad-paper: #fbe7e6; --plain-paper: #eceff3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --panel: #1c2026; --ink: #e7eaee; --quiet: #9aa4b0; --line: #323840; --accent: #5b9ded;
    --good: #7fd69b; --good-paper: #17301f; --bad: #f29a95; --bad-paper: #3a1d1c; --plain-paper: #2a3038;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .9rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .2rem; }
h4 { font-size: .85rem; margin: 1.2rem 0 .3rem; color: var(--quiet); }
h3 + p { margin: 0 0 .6rem; color: var(--quiet); font-size: .9rem; }
.quiet { color: var(--quiet); font-size: .9rem; }
.summary { list-style: none; margin: 1.2rem 0 0; padding: 1rem 1.2rem; background: var(--panel); border-radius: 8px;
  border-left: 4px solid var(--accent); }
.summary li + li { margin-top: .35rem; color: var(--quiet); font-size: .95rem; }
.summary li:first-child { font-size: 1.1rem; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .5rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--quiet); font-weight: 600; font-size: .8rem; vertical-align: bottom; border-bottom-width: 2px; }
tbody th { font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
thead .number { white-space: normal; }
td small, th small { display: block; color: var(--quiet); font-size: .78rem; font-weight: 400; white-space: nowrap; }
tbody th { white-space: nowrap; }
.badge { display: inline-block; padding: .05rem .5rem; border-radius: .7rem; font-size: .8rem; }
td:last-child { min-width: 9.5rem; }
.bars td:last-child, details td:last-child, .facts td:last-child { min-width: 0; }
.good { color: var(--good); background: var(--good-paper); }
.bad { color: var(--bad); background: var(--bad-paper); }
.plain { background: var(--plain-paper); }
label { font-size: .9rem; color: var(--quiet); }
select { font: inherit; color: var(--ink); background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: .2rem .5rem; }
#plot { width: 100%; min-height: 460px; }
#plot text { fill: var(--ink) !important; }
#plot .hoverlayer text { fill: #fff !important; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1.5rem 2.5rem; }
figure { margin: 0; }
figcaption { color: var(--quiet); font-size: .85rem; padding: .3rem 0; }
.bars th, .bars td { border: 0; padding: .18rem .4rem .18rem 0; font-size: .85rem; vertical-align: middle; }
.bars th { font-weight: 400; white-space: nowrap; }
.bars .bar { width: 55%; }
.bar span { display: block; height: .7rem; min-width: 1px; background: var(--accent); border-radius: 2px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 1rem; }
.pair img { width: 100%; max-width: 560px; height: auto; image-rendering: pixelated; border: 1px solid var(--line);
  border-radius: 4px; display: block; }
details { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem; margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; }
details table { width: auto; min-width: 50%; margin-top: .6rem; }
pre { background: var(--panel); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; }
code { font-size: .82rem; overflow-wrap: anywhere; }
.facts th { font-weight: 400; color: var(--quiet); white-space: nowrap; width: 1%; }
@media print { main { max-width: none; } .pair { break-inside: avoid; } }
"""

SCRIPT = """
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plot = document.getElementById("plot");
  const quality = document.getElementById("quality");
  const draw = (name) => Plotly.react(plot, figures[name].data, figures[name].layout,
    {responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]});
  if (quality) quality.addEventListener("change", () => draw(quality.value));
  draw(Object.keys(figures)[0]);
})();
"""
