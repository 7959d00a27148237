"""The look of the report: one style sheet and the shell of the page. No script, no external resource.

shell(title, body) -> a complete HTML document that follows the reader's light or dark setting.
"""

from __future__ import annotations

import base64
from html import escape

STYLE = """
:root { color-scheme: light dark;
  --paper:#faf9f6; --card:#ffffff; --ink:#1c1c1e; --quiet:#66666c; --line:#e3e1da; --soft:#f1efe8;
  --good:#1a7f4b; --good-soft:#e4f4ea; --bad:#b3361e; --bad-soft:#fbe9e4; --accent:#2f5fd0;
  --c0:#2f5fd0; --c1:#d9662c; --c2:#1a7f4b; --c3:#8a4fc7; --c4:#b8872b; --c5:#2a93a5;
  --c6:#c2407f; --c7:#6d7020; }
@media (prefers-color-scheme: dark) { :root {
  --paper:#141416; --card:#1d1d20; --ink:#ececea; --quiet:#a0a0a6; --line:#333338; --soft:#26262a;
  --good:#5fce92; --good-soft:#183326; --bad:#ff8f73; --bad-soft:#3b211b; --accent:#8fb0ff;
  --c0:#8fb0ff; --c1:#ff9d66; --c2:#5fce92; --c3:#c79bff; --c4:#e3bb62; --c5:#6fd0e0;
  --c6:#ff9cc7; --c7:#c5c96b; } }
* { box-sizing: border-box }
body { margin:0; background:var(--paper); color:var(--ink);
  font:16px/1.55 -apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust:100% }
main { max-width:1120px; margin:0 auto; padding:40px 20px 80px }
h1 { font-size:1.05rem; font-weight:600; margin:0 0 6px; letter-spacing:.01em }
h2 { font-size:1.3rem; line-height:1.25; margin:56px 0 6px; letter-spacing:-.01em }
h3 { font-size:.95rem; margin:0 0 8px }
p { margin:0 0 12px; max-width:72ch } .quiet, figcaption, small { color:var(--quiet) } small { font-size:.78em }
.mark { display:inline-block; padding:1px 9px; margin-left:8px; border-radius:99px; background:var(--c4);
  color:var(--paper);
  font-weight:700; font-size:.8rem; vertical-align:1px }
.verdict { display:grid; grid-template-columns:auto 1fr; gap:20px; align-items:center; margin:16px 0; padding:24px;
  border-radius:16px; background:var(--bad-soft) }
.verdict.worked { background:var(--good-soft) }
.verdict b { font-size:1.5rem; line-height:1.25; letter-spacing:-.015em; display:block }
.verdict p { margin:6px 0 0; color:var(--ink) }
.seal { width:60px; height:60px; border-radius:50%; display:grid; place-items:center; font-size:30px; font-weight:700;
  color:var(--paper); background:var(--bad) } .worked .seal { background:var(--good) }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px; margin:0 0 24px }
.tile,.card { background:var(--card); border:1px solid var(--line); border-radius:12px; padding:14px 16px;
  min-width:0 }
.tile span { display:block; font-size:.82rem; color:var(--quiet) }
.tile b { display:block; font-size:1.55rem; line-height:1.3; letter-spacing:-.02em } .tile small { font-size:.8rem }
.aims { display:grid; grid-template-columns:repeat(auto-fit,minmax(330px,1fr)); gap:12px; margin-top:14px }
.aims ul { list-style:none; margin:0; padding:0 } .aims li { display:grid; grid-template-columns:26px 1fr;
  padding:7px 0;
  border-top:1px solid var(--line); font-size:.93rem; line-height:1.4 } .aims li small { display:block;
  font-size:.86em }
.yes { color:var(--good); font-weight:700 } .no { color:var(--bad); font-weight:700 } .unknown { color:var(--quiet) }
.scroll { overflow-x:auto; border:1px solid var(--line); border-radius:12px; background:var(--card); margin-top:14px }
table { border-collapse:collapse; width:100%; font-size:.86rem } th,td { padding:7px 10px; text-align:right;
  white-space:nowrap }
thead th { font-weight:600; vertical-align:bottom; border-bottom:1px solid var(--line); line-height:1.25;
  white-space:normal }
tbody tr+tr>* { border-top:1px solid var(--line) } tbody th { text-align:left; font-weight:500; position:sticky;
  left:0;
  background:var(--card) } td small { display:block; line-height:1.2 } .key { background:var(--soft);
  font-weight:600 }
.ceiling { color:var(--quiet) } .charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(300px,1fr));
  gap:12px;
  margin-top:14px } figure { margin:14px 0 0 } figure img, figure video { width:100%; height:auto;
  border-radius:12px; display:block;
  border:1px solid var(--line); background:var(--soft) } figcaption { font-size:.88rem; margin-top:6px } figcaption
  b { color:var(--ink) }
.films { display:grid; grid-template-columns:repeat(auto-fit,minmax(330px,1fr)); gap:4px 16px }
svg { width:100%; height:auto; display:block; overflow:visible } svg text { font-size:12px;
  fill:var(--quiet) }
svg .grid { stroke:var(--line) } svg .axis { font-size:12px } svg text.strong { fill:var(--ink); font-weight:600 }
svg .whisker { stroke:var(--quiet); stroke-width:2 } svg .whisker.strong { stroke:var(--accent); stroke-width:3 }
svg .dot { fill:var(--quiet) } svg .dot.strong { fill:var(--accent) } svg .ideal { stroke:var(--quiet);
  stroke-dasharray:3 3 }
svg .band { fill:var(--good-soft) } svg .box { fill:var(--card); stroke:var(--line) } svg .elbow { fill:none;
  stroke:var(--quiet) }
.legend { display:flex; flex-wrap:wrap; gap:2px 16px; font-size:.82rem; color:var(--quiet) }
.legend i { display:inline-block; width:14px; height:3px; margin-right:6px; vertical-align:3px; border-radius:2px }
.tree { max-width:720px }
.stages { padding-left:0; list-style:none; margin:12px 0 0 } .stages li { padding:10px 0; border-top:1px solid
  var(--line); max-width:80ch }
.bars { display:grid; grid-template-columns:max-content minmax(60px,1fr) max-content; gap:6px 12px;
  align-items:center; margin-top:14px;
  max-width:760px; font-size:.92rem } .bars i { height:9px; border-radius:3px; background:var(--c0); display:block;
  min-width:2px }
pre { overflow-x:auto; font-size:.85rem }
@media (max-width:560px) { main { padding:24px 14px 60px } .verdict { padding:18px; gap:14px } .verdict b {
  font-size:1.2rem }
  .seal { width:44px; height:44px; font-size:22px } .tile b { font-size:1.3rem } .aims,.films {
  grid-template-columns:1fr } }
"""


def shell(title: str, body: str) -> str:
    """A complete document."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def data_uri(content: bytes, kind: str) -> str:
    """Bytes of a png, jpeg or mp4 as an address that needs no file."""
    mime = {"png": "image/png", "jpeg": "image/jpeg", "mp4": "video/mp4"}[kind]
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"
