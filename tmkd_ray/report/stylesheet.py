"""How the report looks: one style sheet for light and dark, wide and narrow, screen and paper."""

STYLE_SHEET = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1b1f24; --quiet: #57606a; --grid: #dde1e6; --panel: #f5f6f8; --accent: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171c; --ink: #e6e9ed; --quiet: #a3acb7; --grid: #343b45; --panel: #1d2128; --accent: #56b4e9;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 66rem; padding: 1.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; padding-top: .75rem; font-size: 1.3rem; border-top: 1px solid var(--grid); }
h3 { margin: 1.25rem 0 .5rem; font-size: 1rem; }
p { max-width: 46rem; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
section:first-child h2 { margin-top: 1.5rem; }
.summary { font-size: 1.1rem; }
.note, figcaption, dt { color: var(--quiet); font-size: .875rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { padding-left: 0; }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; font-size: .875rem; }
tbody th { font-weight: 600; }
.word { min-width: 6rem; overflow-wrap: break-word; }
th.word:first-child { min-width: 10rem; }
.number { text-align: right; white-space: nowrap; }
thead .number { white-space: normal; }
tbody + tbody th, tbody + tbody td { color: var(--quiet); font-weight: 400; }
.times { width: 100%; max-width: 46rem; }
.times .wide { width: 55%; vertical-align: middle; }
.bar { display: block; height: .5rem; background: var(--grid); border-radius: .25rem; overflow: hidden; }
.bar span { display: block; height: 100%; }
.grid {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem 2rem;
  margin: 1rem 0;
}
figure { margin: 0; }
figcaption { margin-top: .25rem; }
figure svg { display: block; width: 100%; max-width: 32rem; height: auto; }
.full figure svg { max-width: none; min-width: 40rem; }
svg text { font-family: inherit !important; }
.legend { display: flex; flex-wrap: wrap; gap: .35rem 1.5rem; margin: .75rem 0; padding: 0; }
.legend, .gallery { list-style: none; }
.legend li { display: flex; align-items: center; gap: .5rem; }
.legend svg { flex: none; }
.square { display: inline-block; width: .9rem; height: .9rem; border-radius: .15rem; }
.gallery {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); gap: 1rem;
  margin: 0; padding: 0;
}
.gallery li { padding: .75rem; background: var(--panel); border-radius: .5rem; }
.gallery h4 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.gallery.wide { grid-template-columns: 1fr; }
.gallery.wide .views { grid-template-columns: repeat(auto-fit, minmax(6rem, 9rem)); }
.views { display: grid; grid-template-columns: repeat(auto-fit, minmax(4.5rem, 1fr)); gap: .5rem; }
.views img { display: block; width: 100%; border-radius: .25rem; }
.views figcaption { margin-top: .4rem; font-size: .8rem; line-height: 1.3; }
.views figcaption span { display: block; }
.crisp { image-rendering: pixelated; }
dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 12rem), 1fr)); gap: .75rem 1.5rem;
  margin: 0;
}
dt { line-height: 1.3; }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin: 1rem 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; padding: 1rem; background: var(--panel); border-radius: .5rem; font-size: .875rem; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre code { overflow-wrap: normal; }
article > header { margin-top: 4rem; padding-top: 1.5rem; border-top: 3px solid var(--ink); }
@media (max-width: 30rem) { th.word:first-child { min-width: 5.5rem; } th, td { padding: .4rem .5rem; } }
@media print { body { max-width: none; } section, figure { break-inside: avoid; } }
"""
