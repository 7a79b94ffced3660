"""Style sheet and script of the HTML page, as text: they are inlined, so that the page makes no request."""

from __future__ import annotations

from agnitra_lab.report import palette

STYLE = f"""
:root {{ color-scheme: dark; --surface: {palette.SURFACE}; --panel: {palette.PANEL}; --text: {palette.TEXT};
  --muted: {palette.MUTED}; --accent: {palette.ACCENT}; --warning: {palette.WARNING}; --edge: {palette.EDGE};
  --grid: {palette.GRID}; --pad: clamp(14px, 2.2vw, 24px); }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--surface); color: var(--text); line-height: 1.55; font-size: 15px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; -webkit-font-smoothing: antialiased; }}
main {{ max-width: 1240px; margin: 0 auto; padding: clamp(16px, 4vw, 56px) clamp(14px, 4vw, 40px) 72px; }}
.skip {{ position: absolute; left: -999px; }}
.skip:focus {{ left: 16px; top: 12px; background: var(--accent); color: var(--surface); padding: 8px 14px;
  border-radius: 8px; z-index: 1; }}
.brand {{ color: var(--muted); font-size: 14px; margin: 0 0 20px; }}
.brand strong {{ color: var(--accent); letter-spacing: .02em; }}
.pill {{ display: inline-block; border-radius: 99px; padding: 3px 13px; font-size: 13px; font-weight: 700;
  color: var(--surface); background: var(--warning); }}
.pill.faster {{ background: var(--accent); }}
h1 {{ font-size: clamp(24px, 3.4vw, 38px); line-height: 1.2; letter-spacing: -.018em; font-weight: 650;
  margin: 14px 0 12px; max-width: 26em; text-wrap: balance; overflow-wrap: anywhere; }}
h2 {{ font-size: 17px; font-weight: 620; margin: 0 0 12px; letter-spacing: -.005em; }}
.lead {{ color: var(--muted); margin: 0 0 8px; max-width: 65ch; }}
.rival {{ margin: 0 0 10px; font-size: 16px; }}
.banner {{ border: 1px solid var(--grid); border-left: 4px solid var(--warning); background: var(--panel);
  color: var(--warning); border-radius: 10px; padding: 12px 18px; margin: 18px 0 0; }}
.metrics {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(200px, 100%), 1fr)); gap: 14px;
  margin: 28px 0 14px; padding: 0; list-style: none; }}
.panel, .metrics li {{ background: var(--panel); border: 1px solid var(--grid); border-radius: 12px; min-width: 0;
  padding: var(--pad); }}
.metrics li {{ padding: 18px 20px; }}
.metrics p {{ margin: 0; overflow-wrap: anywhere; }}
.label, .note, dt, th[scope=col] {{ color: var(--muted); }}
.label {{ font-size: 13px; font-weight: 550; }}
.value {{ font-size: 26px; font-weight: 640; line-height: 1.25; letter-spacing: -.015em; padding: 6px 0 4px;
  font-variant-numeric: tabular-nums; }}
.value.long {{ font-size: 20px; line-height: 1.625; }}
.better .value {{ color: var(--accent); }}
.absent .value {{ color: var(--muted); }}
.note {{ font-size: 13px; line-height: 1.45; }}
.metrics .note {{ padding-top: 6px; }}
.two {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 14px; }}
section {{ margin-top: 14px; }}
figure {{ margin: 0; }}
figure.panel {{ padding: 0; overflow: hidden; }}
figure img {{ display: block; width: 100%; max-width: 600px; padding: 18px var(--pad) 14px; }}
figure .live {{ width: 100%; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
caption {{ text-align: left; font-size: 17px; font-weight: 620; padding-bottom: 10px; }}
th, td {{ text-align: left; padding: 10px 18px 10px 0; vertical-align: top; border-top: 1px solid var(--grid);
  font-variant-numeric: tabular-nums; }}
th[scope=col] {{ border-top: 0; font-weight: 500; font-size: 13px; padding: 0 18px 8px 0; white-space: nowrap; }}
th[scope=row] {{ font-weight: 600; min-width: 9em; }}
.scroll + .note {{ margin: 12px 0 0; }}
.lead + .scroll {{ margin-top: 22px; }}
td.number, th.number {{ text-align: right; white-space: nowrap; }}
tr.kept th, tr.kept td:nth-child(2) {{ color: var(--accent); }}
th:last-child, td:last-child {{ padding-right: 0; }}
td {{ min-width: 7em; }}
td:nth-child(2) {{ white-space: nowrap; }}
td.number {{ min-width: 0; }}
td:last-child {{ min-width: 15em; overflow-wrap: anywhere; }}
dl {{ display: grid; grid-template-columns: minmax(8.5em, max-content) 1fr; margin: 0; font-size: 14px; }}
dt, dd {{ padding: 9px 18px 9px 0; margin: 0; border-top: 1px solid var(--grid); overflow-wrap: anywhere; }}
details {{ border-top: 1px solid var(--grid); padding: 10px 0; }}
summary {{ cursor: pointer; font-weight: 600; color: var(--accent); }}
pre {{ background: var(--surface); border: 1px solid var(--grid); border-radius: 8px; padding: 16px; margin: 12px 0 0;
  overflow: auto; max-height: 420px; font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }}
.artifact {{ display: grid; grid-template-columns: 1fr auto auto; gap: 10px; align-items: start;
  border-top: 1px solid var(--grid); padding: 12px 0; }}
.artifact details {{ border: 0; padding: 6px 0; min-width: 0; }}
.artifact details[open] {{ grid-column: 1 / -1; order: 1; }}
.artifact summary span {{ color: var(--muted); font-weight: 400; }}
button {{ font: inherit; font-size: 14px; font-weight: 550; color: var(--text); cursor: pointer;
  background: transparent; border: 1px solid var(--edge); border-radius: 8px; padding: 5px 14px; min-height: 36px; }}
button:hover {{ border-color: var(--accent); color: var(--accent); }}
:focus-visible {{ outline: 3px solid var(--accent); outline-offset: 3px; border-radius: 6px; }}
output {{ display: block; min-height: 1.6em; color: var(--accent); font-size: 14px; }}
footer {{ color: var(--muted); font-size: 13px; margin-top: 28px; }}
@media (max-width: 560px) {{ td:last-child {{ min-width: 22em; }}
  dl {{ grid-template-columns: 1fr; }} dt {{ padding-bottom: 0; }}
  dd {{ border-top: 0; padding-top: 0; }} .artifact {{ grid-template-columns: 1fr 1fr; }}
  .artifact details {{ grid-column: 1 / -1; }} }}
@media print {{ button, .skip, output {{ display: none; }} .panel {{ break-inside: avoid; }} }}
"""

CHARTS_SCRIPT = """
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  for (const [name, figure] of Object.entries(figures)) {
    const place = document.getElementById("figure-" + name);
    const picture = place.querySelector(".static");
    // On a narrow screen the labels would leave no room for the bars; the picture has them above.
    if (place.clientWidth < 440) continue;
    const live = document.createElement("div");
    live.className = "live";
    place.append(live);
    // The static picture stays until the live chart is drawn: nothing is lost where scripts are blocked.
    Plotly.newPlot(live, figure.data, figure.layout, figure.config)
      .then(() => picture.remove(), () => live.remove());
  }
})();
"""

BUTTONS_SCRIPT = """
(() => {
  const status = document.getElementById("status");
  const say = (text) => { status.textContent = ""; requestAnimationFrame(() => { status.textContent = text; }); };
  const textOf = (button) => document.getElementById(button.dataset.source).textContent;
  const select = (button) => {
    const source = document.getElementById(button.dataset.source);
    source.closest("details").open = true;
    const range = document.createRange();
    range.selectNodeContents(source);
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
  };
  const copy = async (button) => {
    try {
      await navigator.clipboard.writeText(textOf(button));
      return "copied to the clipboard.";
    } catch {
      select(button);
      if (document.execCommand("copy")) return "copied to the clipboard.";
      return "selected: press Ctrl+C or Cmd+C to copy it.";
    }
  };
  const download = (button) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([textOf(button)], { type: "application/json" }));
    link.download = button.dataset.file;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    return "download started.";
  };
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button[data-act]");
    if (!button) return;
    const outcome = button.dataset.act === "copy" ? await copy(button) : download(button);
    button.focus();
    say(button.dataset.file + " " + outcome);
  });
})();
"""
