"""Style sheet of the page. Nothing is loaded from elsewhere, and elements have no inline styles: a strict content
security policy allows only this text, by its digest."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfbf9; --card: #fff; --ink: #1d2127; --soft: #5d6672; --line: #dfe2e6; --accent: #2f5fb3;
  --prompt: #dbe8fb; --template: #ececea; --template-ink: #6b7079; --response: #d9f0dc; --end: #1d7a3c;
  --end-ink: #fff;
  --kept: #4f86c6; --dropped: #d4553f; --chosen: #2f9455; --rejected: #d98324; --between: #9aa3ad; --mark: #1d2127;
  --warn: #a33423; --warn-paper: #fbeae6; --hover: #ffd84d; --hover-ink: #1d2127; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171b; --card: #1c2026; --ink: #e4e7eb; --soft: #9aa4b0; --line: #31373f; --accent: #8db4f2;
  --prompt: #1f3557; --template: #292d33; --template-ink: #98a1ac; --response: #1d4229; --end: #6fd48e;
  --end-ink: #0d1a11;
  --kept: #6c9fdc; --dropped: #e2705c; --chosen: #58b87a; --rejected: #e3a04f; --between: #77818c; --mark: #e4e7eb;
  --warn: #f29a8a; --warn-paper: #3a2320; --hover: #ffd84d; --hover-ink: #14171b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2rem 1.25rem 5rem; }
h1, h2, h3, p { margin: 0; }
h1 { font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .9rem; }
h3 { font-size: .95rem; overflow-wrap: anywhere; }
.mono { overflow-wrap: anywhere; font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono",
  monospace; }
.over { color: var(--accent); font-size: .85rem; font-weight: 600; }
.soft { color: var(--soft); }
.small { font-size: .85rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem; margin-top: 1.4rem; }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.share { display: block; width: 100%; height: 12px; border-radius: 6px; margin: .3rem 0 1rem; }
.share .kept { fill: var(--kept); } .share .dropped { fill: var(--dropped); }
.reasons { display: grid; gap: .8rem; }
.reason { display: grid; grid-template-columns: 7.5rem 1fr; gap: .2rem .9rem; }
.reason b { color: var(--warn); font-variant-numeric: tabular-nums; text-align: right; }
.reason div { overflow-wrap: anywhere; }
ul.remarks { margin: 1rem 0 0; padding: .9rem 0 0 1.1rem; border-top: 1px solid var(--line); }
ul.remarks li { overflow-wrap: anywhere; margin: .2rem 0; }
.notice { background: var(--warn-paper); color: var(--warn); border-radius: 8px; padding: .55rem .8rem;
  margin-top: .7rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .8rem; }
figure { margin: 0; display: flex; flex-direction: column; }
figure svg { display: block; width: 100%; height: auto; margin-top: auto; padding-top: .6rem; }
figure text { font: 12px system-ui, sans-serif; fill: var(--soft); }
figure .grid { stroke: var(--line); } figure .axis { stroke: var(--soft); }
figure .mark { stroke: var(--mark); stroke-dasharray: 4 3; } figure text.mark { fill: var(--mark); stroke: none; }
.s-kept { fill: var(--kept); background: var(--kept); } .s-dropped { fill: var(--dropped); background: var(--dropped); }
.s-chosen { fill: var(--chosen); background: var(--chosen); }
.s-rejected { fill: var(--rejected); background: var(--rejected); }
.s-between { fill: var(--between); background: var(--between); }
.keys { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; margin: 0 0 .8rem; align-items: center; }
.keys span.k { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px; margin-right: .4rem;
  vertical-align: -1px; }
.tools { position: sticky; top: 0; z-index: 1; background: var(--paper); padding: .55rem 0; margin: 0 0 .4rem;
  border-bottom: 1px solid var(--line); }
.tools label { cursor: pointer; white-space: nowrap; }
.row { margin-top: 1rem; }
.row > header { display: flex; flex-wrap: wrap; gap: .2rem .8rem; align-items: baseline; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: .9rem;
  margin-top: .9rem; align-items: start; }
.part { min-width: 0; margin-top: .9rem; } .answers .part { margin-top: 0; }
.sample { padding: .05rem .45rem; font-size: .85rem; border-radius: 2px; }
.head { display: flex; flex-wrap: wrap; gap: .15rem .6rem; align-items: baseline; margin-bottom: .35rem;
  font-size: .85rem; }
.head b { font-size: .9rem; }
.head .sample { font-size: .75rem; font-weight: 500; white-space: nowrap; }
.badge { border-radius: 99px; padding: 0 .55rem; font-size: .78rem; font-weight: 600; color: var(--card); }
.badge.chosen { background: var(--chosen); } .badge.rejected { background: var(--rejected); }
.badge.left, .badge.cut { background: var(--soft); }
.text { font: 13px/1.65 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .7rem; max-height: 24rem; overflow: auto; tab-size: 4; }
.text.out { color: var(--template-ink); border-style: dashed; }
.text span { border-radius: 2px; }
.p { background: var(--prompt); } .t { background: var(--template); color: var(--template-ink); }
.r { background: var(--response); }
.e { background: var(--end); color: var(--end-ink); font-weight: 600; }
.text i { font-style: normal; opacity: .45; } .text i::before { content: "\\21B5"; }
.text span:hover { background: var(--hover); color: var(--hover-ink); }
.text span[data-t]:hover::after { content: attr(data-t); position: fixed; left: 50%; bottom: 1rem; z-index: 2;
  transform: translateX(-50%); max-width: calc(100vw - 2rem); background: var(--ink); color: var(--paper);
  font-weight: 400; padding: .4rem .8rem; border-radius: 8px; white-space: pre-wrap; pointer-events: none; }
body:has(#borders:checked) .text span { box-shadow: inset -1px 0 var(--soft); }
body:has(#whole:checked) .text { max-height: none; }
table { border-collapse: collapse; width: 100%; }
td { padding: .28rem .8rem .28rem 0; vertical-align: top; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
tr:first-child td { border-top: 0; }
td:first-child { width: 15rem; color: var(--soft); }
details { margin-top: .7rem; } summary { cursor: pointer; color: var(--soft); }
@media (max-width: 600px) { main { padding: 1.2rem .8rem 4rem; } h1 { font-size: 1.35rem; } .card { padding: .8rem; }
  td { display: block; border: 0; padding: 0; } td:first-child { width: auto; padding-top: .5rem; font-size: .85rem; }
  .reason { grid-template-columns: 1fr; } .reason b { text-align: left; } .text { max-height: 60vh; }
  .tiles { grid-template-columns: 1fr 1fr; gap: .6rem; } .tiles b { font-size: 1.2rem; } }
@media print { .tools { display: none; } .text { max-height: none; } }
"""
