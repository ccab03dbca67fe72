"""The page's style: light and dark, wide and narrow."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --faint: #8a94a3; --paper: #ffffff; --panel: #f4f6f9;
  --good: #1a7f45; --bad: #c0272d; --series-1: #1f6fb4; --series-2: #c2590c;
  --series-3: #7a4fb5; --series-4: #2b8a5f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9f0; --faint: #7f8a99; --paper: #14181f; --panel: #1e242e;
  --good: #5fcf8c; --bad: #ff7b7b; --series-1: #74b6f2; --series-2: #f0a05a;
  --series-3: #bf9cf0; --series-4: #6fd3a5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1rem 0 0; }
p { margin: .3rem 0; overflow-wrap: anywhere; }
.lead { color: var(--ink); }
.badge { display: inline-block; padding: .1rem .6rem; margin-right: .4rem; border-radius: 1rem; font-weight: 600;
  border: 1.5px solid currentColor; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; } .neutral { color: var(--ink); }
.note { color: var(--ink); opacity: .8; font-size: .9rem; }
.limits { list-style: none; padding: 0; margin: .6rem 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; font-size: 1.25rem; margin-bottom: .3rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid color-mix(in srgb, var(--faint) 40%, transparent); }
.numbers td, .numbers thead th { text-align: right; white-space: nowrap; }
.numbers tbody th { text-align: left; font-weight: 400; }
.numbers td:nth-of-type(2) { font-weight: 600; }
.timeline { list-style: none; margin: .3rem 0; padding: 0 0 0 .9rem; border-left: 3px solid var(--faint); }
.timeline li { margin: .35rem 0; overflow-wrap: anywhere; }
.step { opacity: .8; margin-right: .5rem; font-size: .9rem; white-space: nowrap; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--panel); border-radius: .5rem; padding: .6rem; min-width: 0; }
figcaption { font-weight: 600; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: inherit !important; }
details { margin-top: 1.5rem; } summary { cursor: pointer; font-weight: 600; font-size: 1.1rem; }
.decisions { font-size: .85rem; } .decisions td, .decisions th { text-align: left; vertical-align: top; }
.decisions td:nth-child(-n+3) { white-space: nowrap; }
.decisions td:nth-child(4) { min-width: 16rem; }
dl { margin: 0; } dl div { display: flex; gap: .5rem; } dt { opacity: .8; white-space: nowrap; }
dd { margin: 0; overflow-wrap: anywhere; min-width: 4rem; }
code { background: var(--panel); padding: .1rem .3rem; border-radius: .2rem; }
"""
