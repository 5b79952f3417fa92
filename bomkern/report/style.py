"""The style sheet of `bomkern.report`."""

from __future__ import annotations

from .charts import DARK, LIGHT


def style() -> str:
    """Return the style sheet, with the palettes of light and dark pages."""
    light, dark = (";".join(f"--c{i}:{c}" for i, c in enumerate(palette)) for palette in (LIGHT, DARK))
    return f":root{{{ON_LIGHT};{light}}}@media(prefers-color-scheme:dark){{:root{{{ON_DARK};{dark}}}}}{CSS}"


ON_LIGHT = "color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#57606a;--rule:#d0d7de;--link:#0b62a8"
ON_DARK = "--paper:#14171a;--ink:#e8eaed;--soft:#a8b0b9;--rule:#3a4149;--link:#7cc0ff"
CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif;overflow-wrap:break-word}
.name,.more td,.legend,figcaption,.config td{overflow-wrap:anywhere}
main{max-width:1100px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:1.7rem;line-height:1.2;margin:.2em 0}h2{font-size:1.2rem;margin:2em 0 .3em}
p{margin:.4em 0}small,.lead,.axis{color:var(--soft)}small,.lead{font-size:.875rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;vertical-align:top;padding:6px 10px 6px 0}
thead th{border-bottom:2px solid var(--rule);color:var(--soft);font-weight:600}
.findings tbody{border-bottom:1px solid var(--rule)}
.findings{table-layout:fixed}.findings thead th:nth-child(1){width:2.2em}
.findings tbody th,.whole{white-space:nowrap}
.findings thead th:nth-child(2){width:34%}
.findings thead th:nth-child(4){width:7.5em}.findings thead th:nth-child(5){width:3.5em}
.findings td:nth-child(n+4),.findings strong{white-space:nowrap}
.findings .more td{padding-top:0;white-space:normal}.calm td,.calm th{color:var(--soft)}
.legend,div.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:2px 20px}
.legend{list-style:none;margin:0;padding:0}.legend li{display:flex;gap:8px;align-items:baseline}
.swatch{width:28px;height:10px;flex:none;vertical-align:middle}.swatch line{stroke-width:3}
figure{margin:0}figcaption{font-size:.875rem}.axis{text-align:center;padding-left:60px}
.lanes{position:relative;margin-left:60px;font-size:12px;line-height:16px}
.bar{position:absolute;height:4px;border-radius:2px;print-color-adjust:exact}
.tag{position:absolute;white-space:nowrap;max-width:100%;overflow:hidden;text-overflow:ellipsis}
.plot{position:relative;margin:4px 0 26px 60px}.grid .plot{margin-left:44px}
.y-name{position:absolute;right:calc(100% + 50px);top:50%;transform:translate(50%,-50%) rotate(-90deg);
white-space:nowrap;font-size:.8rem;line-height:1;color:var(--soft)}
.plot>svg{position:absolute;inset:0;width:100%;height:100%;border-bottom:1px solid var(--soft);overflow:hidden}
.line{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.area{stroke:var(--paper);stroke-width:.5;vector-effect:non-scaling-stroke}
.grid .area{opacity:.25;stroke:none}
.span{fill:var(--ink);opacity:.07}
line.grid{stroke:var(--rule);stroke-width:1;vector-effect:non-scaling-stroke}
.y,.x,.note{position:absolute;font-size:12px;line-height:1;color:var(--soft);white-space:nowrap}
.y{right:calc(100% + 6px);transform:translateY(-50%)}.x{top:calc(100% + 6px);transform:translateX(-50%)}
.note{right:2px;transform:translateY(-115%);color:var(--ink);
text-shadow:0 0 2px var(--paper),0 0 2px var(--paper),0 0 4px var(--paper)}
div.grid{gap:16px 28px}
.labelled,.lanes{margin-right:min(13rem,24%)}
.end{position:absolute;left:calc(100% + 6px);transform:translateY(-50%);font-size:12px;line-height:1;white-space:nowrap;
display:flex;gap:5px;align-items:center;width:min(13rem,31.6%)}.end .swatch{width:20px}
.end span{overflow:hidden;text-overflow:ellipsis;line-height:1.2}
nav ol{list-style:none;margin:1em 0 0;padding:0;display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.875rem}
a{color:var(--link)}nav a{text-decoration:none}nav a:hover{text-decoration:underline}
.data{font-size:.875rem;margin:.2em 0}.data summary{color:var(--soft);cursor:pointer;width:max-content}
.data pre{max-height:18em;overflow:auto;margin:.3em 0;padding:8px;border:1px solid var(--rule);border-radius:4px;
font-size:12px;line-height:1.4;user-select:all}
@media(min-width:1400px){nav{position:fixed;top:24px;left:calc(50% - 700px);width:140px}nav ol{display:block;margin:0}
nav li{margin:0 0 .5em}}
@media print{nav,.data{display:none}}
.scroll{overflow-x:auto}.numbers td,.numbers th{white-space:nowrap;padding-right:14px}
.numbers tbody th{position:sticky;left:0;background:var(--paper)}
.numbers td{font-variant-numeric:tabular-nums}.own{font-weight:700;text-decoration:underline}
.config th{width:38%;font-weight:600}img{max-width:100%;height:auto;background:#fff;border-radius:4px}
@media(max-width:480px){
.labelled,.lanes{margin-right:0}.end{display:none}
main{padding:12px 12px 40px}h1{font-size:1.4rem}table{font-size:.82rem}
.findings small,.findings br:has(+small){display:none}
.findings thead th:nth-child(1){width:1.7em}.findings thead th:nth-child(2){width:8.2em}
.findings thead th:nth-child(4){width:5.5em}
.findings thead th:nth-child(5){width:2.9em;padding-right:0}
.findings th,.findings td{padding-right:6px}.findings thead th{white-space:nowrap}
}
@media(max-width:350px){.findings tr>:nth-child(4){display:none}}
"""
