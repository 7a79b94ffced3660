// The controls of a workbench and of a run's files. State comes in two traits: `state` when a step begins or ends,
// `tick` while one runs; what the user does goes out as messages, each answered by an "ack". No request leaves the page.
const PAGE = (globalThis.__agnitra_page ??= Math.random().toString(36).slice(2));
const ANSWER_MS = 4000;
const FOCUSABLE = ["button", "select", "input", "summary", "textarea"];
const CSS = `
.agn{--bg:#0B1220;--panel:#111A2E;--fg:#E6F1FF;--dim:#9FB3C8;--on:#2EE6D6;--warn:#FFD166;--edge:#5B7499;
background:var(--bg);color:var(--fg);font:14px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;
padding:18px 28px;border-radius:14px;max-width:1040px;box-sizing:border-box;margin:0 20px 6px 0}
.agn *{box-sizing:border-box}
.agn h2{font-size:15px;font-weight:600;margin:0 0 10px;color:var(--fg)}
.agn h2 b{color:var(--on)}
.agn button,.agn select,.agn input{font:inherit;font-size:13px;color:var(--fg);background:var(--panel);
border:1px solid var(--edge);border-radius:8px;padding:5px 12px;min-height:32px}
.agn button{cursor:pointer;font-weight:600}
.agn button.main{background:var(--on);border-color:var(--on);color:var(--bg)}
.agn button[aria-disabled=true]{background:var(--bg);border:1px dashed var(--edge);color:var(--dim);cursor:default}
.agn button:focus-visible,.agn select:focus-visible,.agn input:focus-visible,.agn summary:focus-visible,
.agn textarea:focus-visible{outline:3px solid var(--warn);outline-offset:2px}
.agn .row{display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin:0 0 10px}
.agn ol{list-style:none;display:grid;grid-template-columns:repeat(7,minmax(104px,1fr));gap:6px;padding:0;margin:10px 0}
.agn li{background:var(--panel);border:1px solid var(--edge);border-radius:10px;padding:8px 10px;min-height:96px;
font-size:12px;color:var(--dim);display:flex;flex-direction:column;gap:1px}
.agn li b{font-size:13px;color:var(--fg)}
.agn li.running{border:2px solid var(--on)}
.agn li.done b,.agn li.fallback b{color:var(--on)}
.agn li.failed,.agn li.cancelled{border:2px dashed var(--warn);color:var(--warn)}
.agn li button{margin-top:auto;padding:1px 8px;min-height:26px;font-size:12px;align-self:flex-start}
.agn progress{flex:1 1 160px;height:10px;accent-color:var(--on);min-width:120px}
.agn .line,.agn output{color:var(--dim);font-size:13px}
.agn output{display:block;min-height:20px}
.agn .why{color:var(--warn);margin:0 0 8px}
.agn details{border-top:1px solid #2A3B57;padding:8px 0 2px}
.agn summary{cursor:pointer;color:var(--on);font-size:13px;font-weight:600}
.agn fieldset{border:0;padding:8px 0 0;margin:0;display:flex;flex-wrap:wrap;gap:8px 18px;font-size:13px}
.agn legend{color:var(--dim);padding:0}
.agn label{display:inline-flex;gap:6px;align-items:center;color:var(--fg)}
.agn input[type=number]{width:88px}
.agn input[type=checkbox]{min-height:0;width:16px;height:16px;accent-color:var(--on)}
.agn textarea{width:100%;height:120px;background:var(--panel);color:var(--fg);border:1px solid var(--edge);
font:12px ui-monospace,Menlo,Consolas,monospace}
.agn [hidden]{display:none!important}
/* Notebook 7 puts long outputs into a low box of their own: seven steps do not fit. */
.jp-mod-outputsScrolled .jp-Cell-outputArea:has(.agn-steps){max-height:none;overflow:visible}
@media (max-width:820px){.agn ol{grid-template-columns:repeat(auto-fill,minmax(120px,1fr))}}`;

function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key in made && key !== "list" && key !== "form") made[key] = value;
    else made.setAttribute(key, value);
  }
  // JupyterLab's and Notebook's keys (a, b, x, Enter, ...) act on whatever has the focus, unless it says otherwise itself.
  if (FOCUSABLE.includes(tag)) made.setAttribute("data-lm-suppress-shortcuts", "true");
  made.append(...children);
  return made;
}
const set = (node, text) => { if (node.textContent !== text) node.textContent = text; };

function render({ model, el: root }) {
  root.addEventListener("keydown", (event) => event.stopPropagation());
  root.append(el("style", { textContent: CSS }));
  const body = el("section", { className: "agn", "aria-label": "Agnitra Lab controls" });
  root.append(body);
  const waiting = new Map();
  let next_id = 0;
  let heard = (model.get("state").announcement || {}).number;

  function send(what) {
    const id = `${PAGE}-${next_id++}`;
    waiting.set(id, setTimeout(() => no_answer(id), ANSWER_MS));
    model.send({ ...what, id, page: PAGE });
    return id;
  }
  function no_answer(id) {
    if (!waiting.has(id)) return;
    set(why, "No answer from the kernel yet. While a cell runs, the answer comes when it has ended (the notebook's " +
      "stop button ends it). If the kernel was restarted, run this cell again.");
    why.hidden = false;
  }
  function answered(id) {
    clearTimeout(waiting.get(id));
    waiting.delete(id);
    if (!waiting.size && why.textContent.startsWith("No answer")) why.hidden = true;
  }
  // A button that cannot be used now keeps its place and the focus.
  function button(label, act, props = {}) {
    const made = el("button", { type: "button", textContent: label, ...props });
    made.addEventListener("click", () => { if (made.getAttribute("aria-disabled") !== "true") act(); });
    return made;
  }
  const enable = (node, is_on) => node.setAttribute("aria-disabled", String(!is_on));

  const title = el("h2");
  const why = el("p", { className: "why", hidden: true, role: "alert" });
  const next = button("Run the next step", () => send({ do: "next", options: options() }), { className: "main" });
  const all = button("Run all steps", () => send({ do: "all", options: options() }));
  const cancel = button("Cancel", () => { set(line, "cancelling"); send({ do: "cancel" }); });
  const back = button("Roll back", () => send({ do: "rollback" }));
  const bar = el("progress", { max: 7, value: 0, "aria-label": "steps that have ended" });
  const line = el("span", { className: "line" });
  const steps = el("ol");
  const said = el("output", { "aria-live": "polite" });
  const stepper = el("div", { className: "agn-steps" }, el("div", { className: "row" }, next, all, cancel, back),
    el("div", { className: "row" }, bar, line), said, steps);
  const cells = new Map();

  const source = el("select");
  const sampler = el("select");
  const budget = el("input", { type: "number", min: 1, step: 1 });
  const timing = el("input", { type: "number", min: 0.1, step: "any" });
  const trials = el("input", { type: "number", min: 1, step: 1 });
  const accepted = el("fieldset", {}, el("legend", { textContent: "Suggestions to take up" }));
  const named = (text, field) => el("label", {}, text, field);
  const settings = el("details", {}, el("summary", { textContent: "Options of the steps to come, and of a redo" }),
    el("fieldset", {}, named("Suggestions from", source), named("Sampler", sampler), named("Trials", trials),
      named("Budget, s", budget), named("Timing, s", timing)), accepted);

  const file = el("select", { "aria-label": "File" });
  let chosen_file = false;
  file.addEventListener("change", () => { chosen_file = true; });
  const copy = button("Copy", () => fetch_file("copy"));
  const download = button("Download", () => fetch_file("download"));
  const copied = el("output", { "aria-live": "polite" });
  const text = el("textarea", { readOnly: true, hidden: true, "aria-label": "Text of the file" });
  const files = el("details", { open: true }, el("summary", { textContent: "JSON artifacts" }),
    el("div", { className: "row", style: "margin-top:8px" }, file, copy, download), copied, text);
  const again = el("div", { hidden: true });
  body.append(title, why, stepper, settings, files, again);

  let touched = false;
  for (const node of [source, sampler, budget, timing, trials]) node.addEventListener("change", () => { touched = true; });
  function options() {
    if (!touched) return {};
    const given = { suggest: source.value, sampler: sampler.value, max_trials: Number(trials.value),
      budget_s: Number(budget.value), timing_s: Number(timing.value) };
    const boxes = [...accepted.querySelectorAll("input")];
    if (boxes.length) given.accept = boxes.every((box) => box.checked) ? null
      : boxes.filter((box) => box.checked).map((box) => box.value);
    return given;
  }

  function fill(node, values, chosen) {
    if (node.dataset.values !== values.join("\n")) {
      node.replaceChildren(...values.map((value) => el("option", { value, textContent: value })));
      node.dataset.values = values.join("\n");
    }
    if (chosen !== undefined) node.value = chosen;
  }

  function show_steps(state) {
    for (const step of state.steps) {
      if (!cells.has(step.stage)) {
        const redo = button("Redo", () => send({ do: "redo", stage: step.stage, options: options() }),
          { "aria-label": `Redo ${step.stage}` });
        const parts = { name: el("b"), word: el("span"), time: el("span"), redo };
        parts.item = el("li", {}, parts.name, parts.word, parts.time, redo);
        cells.set(step.stage, parts);
        steps.append(parts.item);
      }
      const parts = cells.get(step.stage);
      parts.item.className = step.status;
      set(parts.name, step.stage);
      set(parts.word, `${step.mark} ${step.word}`);
      set(parts.time, step.time);
      const has_focus = document.activeElement === parts.redo;
      parts.redo.hidden = !step.can_redo && !has_focus;
      enable(parts.redo, step.can_redo && !state.is_busy);
    }
  }

  function show_options(state) {
    fill(source, state.choices.suggest, state.options.suggest);
    fill(sampler, state.choices.sampler, state.options.sampler);
    trials.value = state.options.max_trials;
    budget.value = state.options.budget_s;
    timing.value = state.options.timing_s;
    const key = JSON.stringify(state.suggestions);
    if (accepted.dataset.key !== key) {
      accepted.dataset.key = key;
      accepted.replaceChildren(accepted.firstChild, ...state.suggestions.map((each) => {
        const box = el("input", { type: "checkbox", value: each.action, checked: each.is_accepted });
        box.addEventListener("change", () => { touched = true; });
        return el("label", { title: each.why }, box, `${each.action} (${each.source})`);
      }));
    }
    accepted.hidden = !state.suggestions.length;
    touched = false;
  }

  function show() {
    const state = model.get("state");
    title.replaceChildren(el("b", { textContent: "Agnitra Lab" }), ` · ${state.title || ""}`);
    const has_steps = Boolean(state.steps);
    stepper.hidden = settings.hidden = !has_steps;
    if (has_steps) {
      show_steps(state);
      set(next, state.next ? `Run ${state.next}` : "All steps have ended");
      enable(next, Boolean(state.next) && !state.is_busy);
      enable(all, Boolean(state.next) && !state.is_busy);
      enable(cancel, state.is_busy);
      enable(back, state.can_rollback && !state.is_busy);
      if (!touched) show_options(state);
    }
    why.hidden = !state.problem;
    set(why, state.problem || "");
    const names = (state.files || []).map((each) => each.name);
    const kept = chosen_file && names.includes(file.value) ? file.value : names[0];
    fill(file, names, kept);
    files.hidden = !names.length;
    const spoken = state.announcement || {};
    if (spoken.number !== heard) {
      heard = spoken.number;
      set(said, spoken.text);
      touched = false;
    }
    // Updates of the card reach the page that ran the cell; a page that was loaded later shows it here.
    again.hidden = !(state.page && state.page !== PAGE && state.card);
    if (!again.hidden && again.dataset.card !== state.card) {
      again.dataset.card = state.card;
      again.innerHTML = state.card;
    }
    tick();
  }
  function tick() {
    const now = model.get("tick");
    if (now.value !== undefined) bar.value = now.value;
    set(line, now.text || "");
  }

  function fetch_file(how) {
    const id = send({ do: "file", name: file.value, how });
    wanted.set(id, how);
    set(copied, `Reading ${file.value}`);
  }
  const wanted = new Map();
  async function got_file(message, bytes) {
    const told = `${message.name}, ${message.size_bytes.toLocaleString("en")} bytes, sha256 ${message.sha256}`;
    if (wanted.get(message.id) === "download") {
      const url = URL.createObjectURL(new Blob([bytes], { type: "application/json" }));
      const link = el("a", { href: url, download: message.name.split("/").pop() });
      document.body.append(link);
      link.click();
      link.remove();
      setTimeout(() => URL.revokeObjectURL(url), 10000);
      set(copied, `Downloaded ${told}. On disk: ${message.path}`);
    } else {
      const content = new TextDecoder().decode(bytes);
      set(copied, (await copy_text(content)) ? `Copied ${told}. On disk: ${message.path}`
        : `The browser refused the clipboard. The text is selected below: copy it. ${told}`);
    }
    wanted.delete(message.id);
  }
  async function copy_text(content) {
    text.hidden = true;
    try { await navigator.clipboard.writeText(content); return true; } catch { /* next way */ }
    text.value = content;
    text.hidden = false;
    text.select();
    if (document.execCommand("copy")) { text.hidden = true; copy.focus(); return true; }
    text.focus();
    return false;
  }

  const on_message = (message, buffers) => {
    if (message.page && message.page !== PAGE) return;
    if (message.id) answered(message.id);
    if (message.kind === "file") got_file(message, buffers[0]);
    if (message.kind === "refused") {
      if (wanted.delete(message.id)) set(copied, message.text);
      else { set(why, message.text); why.hidden = false; }
    }
  };
  model.on("msg:custom", on_message);
  model.on("change:state", show);
  model.on("change:tick", tick);
  show();
  send({ do: "hello" });
  return () => {
    model.off("msg:custom", on_message);
    model.off("change:state", show);
    model.off("change:tick", tick);
    waiting.forEach(clearTimeout);
  };
}
export default { render };
