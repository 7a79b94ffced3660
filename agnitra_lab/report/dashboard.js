// The dashboard's behaviour: surface, drill-down, comparison of two runs. Plain functions first: they run without a page.
const agnitra = (() => {
  const SEPARATOR = "\u0000";
  const SPECIAL = /[ :]/; // owners that are no module path: "outside the graph", "optimizer:Adam"
  const NUMBER = /^\d+$/;

  // Number as Python's "%.6g" writes it.
  function general(value) {
    if (value === null || value === undefined) return "missing";
    if (value === 0) return "0";
    const [mantissa, exponent] = value.toExponential(5).split("e");
    const power = Number(exponent);
    if (power >= -4 && power < 6) {
      const text = value.toFixed(5 - power);
      return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
    }
    const trimmed = mantissa.includes(".") ? mantissa.replace(/\.?0+$/, "") : mantissa;
    return `${trimmed}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
  }

  function milliseconds(value) {
    return `${value.toFixed(value >= 100 ? 1 : value >= 1 ? 2 : 4)} ms`;
  }

  function share(value) {
    return `${(100 * value).toFixed(1)}%`;
  }

  function change(before, after) {
    if (before === undefined || after === undefined || before === 0) return null;
    return (after - before) / Math.abs(before);
  }

  function judge(rule, before, after, isComparable) {
    if (before === undefined) return ["ok", "new in the candidate"];
    if (after === undefined) return ["missing", "the candidate does not have it"];
    if (!isComparable) return ["not_comparable", "measured on different devices"];
    const worsening = rule.is_lower_better ? after - before : before - after;
    const allowed = rule.is_absolute ? rule.tolerance : rule.tolerance * Math.abs(before);
    if (worsening <= allowed) return ["ok", "within the tolerance"];
    return ["regressed", `worse by ${general(worsening)}, at most ${general(allowed)} is allowed`];
  }

  // What `agnitra regressions` says of two runs, by the rules that it uses.
  function compareRuns(rules, baseline, candidate) {
    const isNumber = (value) => typeof value === "number";
    const before = baseline.figures, after = candidate.figures;
    const isSame = baseline.device === candidate.device;
    const names = [...new Set([...Object.keys(before), ...Object.keys(after)])]
      .filter((name) => isNumber(before[name]) || isNumber(after[name])).sort();
    const metrics = [];
    for (const name of names) {
      const rule = rules.find((one) => one.suffixes.some((suffix) => name.endsWith(suffix)));
      if (!rule || name.startsWith("baseline_")) continue;
      const first = isNumber(before[name]) ? before[name] : undefined;
      const second = isNumber(after[name]) ? after[name] : undefined;
      const [verdict, reason] = judge(rule, first, second, isSame || !rule.depends_on_device);
      metrics.push({
        metric: name, baseline: first ?? null, candidate: second ?? null, relative_change: change(first, second),
        tolerance: rule.tolerance, is_lower_better: rule.is_lower_better, verdict, reason,
      });
    }
    const verdicts = new Set(metrics.map((metric) => metric.verdict));
    let verdict = "ok";
    if (verdicts.has("regressed")) verdict = "regressed";
    else if (!isSame) verdict = "not_comparable";
    else if (!metrics.length || verdicts.has("missing")) verdict = "missing";
    let note = isSame ? null : `different devices, not comparable: ${baseline.device} and ${candidate.device}`;
    if (isSame && !metrics.length) note = "neither run has a figure that can be compared";
    return { metrics, verdict, note };
  }

  function segmentsOf(module, isFolded) {
    if (SPECIAL.test(module)) return [module];
    return module.split(".").map((part) => (isFolded && NUMBER.test(part) ? "*" : part));
  }

  function child(parent, kind, name) {
    const key = kind + SEPARATOR + name;
    let found = parent.children.get(key);
    if (!found) {
      found = { kind, name, ms: 0, calls: 0, children: new Map(), places: new Set(), parent };
      parent.children.set(key, found);
    }
    return found;
  }

  // Rows of a profile -> a tree of modules, ops and kernels. A node's time is the sum of what is below it.
  function buildTree(profile, isFolded) {
    const root = { kind: "module", name: "whole call", ms: 0, calls: 0, children: new Map(), places: new Set() };
    for (const [module, op, kernel, ms, calls] of profile.rows) {
      const name = profile.modules[module];
      const raw = SPECIAL.test(name) ? [name] : name.split(".");
      const path = [root];
      segmentsOf(name, isFolded).forEach((part, depth) => {
        const next = child(path[path.length - 1], "module", part);
        next.places.add(raw.slice(0, depth + 1).join("."));
        path.push(next);
      });
      if (profile.ops[op] !== "rest" || name !== "rest") {
        path.push(child(path[path.length - 1], "op", profile.ops[op]));
        if (kernel >= 0) path.push(child(path[path.length - 1], "kernel", profile.kernels[kernel]));
      }
      for (const node of path) {
        node.ms += ms;
        node.calls += calls;
      }
    }
    return root;
  }

  function childrenOf(node) {
    return [...node.children.values()].sort((first, second) => second.ms - first.ms);
  }

  function labelOf(node) {
    return node.kind === "module" && node.name === "*" ? `* (${node.places.size} layers)` : node.name;
  }

  // ---- the page ----

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function mountSurface(root) {
    const button = root.querySelector("[data-act=surface]");
    const page = root.querySelector(".agn");
    const isLight = () => (page.dataset.surface
      ? page.dataset.surface === "light" : matchMedia("(prefers-color-scheme: light)").matches);
    const label = () => { button.textContent = isLight() ? "Dark surface" : "Light surface"; };
    button.hidden = false;
    button.addEventListener("click", () => { page.dataset.surface = isLight() ? "dark" : "light"; label(); });
    label();
    for (const link of root.querySelectorAll(".agn nav a, .agn .skip")) {
      link.addEventListener("click", (event) => {
        const target = root.querySelector(link.getAttribute("href"));
        if (!target) return;
        event.preventDefault();
        target.scrollIntoView({ block: "start" });
        (target.querySelector("h2") || target).focus({ preventScroll: true });
      });
    }
  }

  function mountCompare(root, index) {
    const place = root.querySelector("[data-part=compare]");
    if (!place || index.runs.length < 2) return;
    const [first, second] = place.querySelectorAll("select");
    const output = place.querySelector("output");
    const show = () => {
      const baseline = index.runs[first.value], candidate = index.runs[second.value];
      const found = compareRuns(index.rules, baseline, candidate);
      output.replaceChildren(...comparison(found, baseline, candidate));
    };
    for (const select of [first, second]) select.addEventListener("change", show);
    place.querySelector("[data-act=swap]").addEventListener("click", () => {
      [first.value, second.value] = [second.value, first.value];
      show();
    });
    place.querySelector(".live").hidden = false;
    show();
  }

  function comparison(found, baseline, candidate) {
    const parts = [element("p", { class: `verdict ${found.verdict === "regressed" ? "worse" : ""}` },
      found.verdict.replace("_", " ") + (found.note ? `: ${found.note}` : ""))];
    if (found.metrics.length) {
      const head = ["Figure", "Baseline", "Candidate", "Change", "Verdict"].map((name, place) =>
        element("th", { scope: "col", class: place > 0 && place < 4 ? "n" : "" }, name));
      const rows = found.metrics.map((metric) => element("tr", {},
        element("th", { scope: "row" }, metric.metric),
        element("td", { class: "n" }, general(metric.baseline)),
        element("td", { class: "n" }, general(metric.candidate)),
        element("td", { class: "n" }, metric.relative_change === null ? "-"
          : `${metric.relative_change < 0 ? "" : "+"}${(100 * metric.relative_change).toFixed(1)}%`),
        element("td", { class: metric.verdict === "regressed" ? "worse" : "" },
          metric.verdict.replace("_", " "), element("span", { class: "note" }, metric.reason))));
      const table = element("table", {},
        element("caption", {}, `Baseline ${baseline.run_id}, candidate ${candidate.run_id}`),
        element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
      parts.push(element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Comparison" }, table));
    }
    const line = `agnitra regressions -b ${baseline.path} -c ${candidate.path}`;
    parts.push(element("p", { class: "note" }, "The same in the shell: ", element("code", {}, line)));
    return parts;
  }

  function mountLayers(root, index, load) {
    const place = root.querySelector("[data-part=layers]");
    if (!place || !index.profiles.length) return;
    const select = place.querySelector("select"), fold = place.querySelector("input");
    const state = { tree: null, total: 1, zoom: null, open: new Set() };
    const draw = () => { drawIcicle(place, state, draw); drawTree(place, state, draw); };
    const change = async () => {
      const profile = await load(Number(select.value));
      state.tree = state.zoom = buildTree(profile, fold.checked);
      state.total = profile.total_self_ms;
      state.open = new Set([state.tree]);
      let node = childrenOf(state.tree)[0];
      for (let depth = 0; node && depth < 2; depth += 1) { state.open.add(node); node = childrenOf(node)[0]; }
      place.querySelector(".about").textContent = index.profiles[select.value].about;
      draw();
    };
    const body = place.querySelector(".tree tbody");
    body.addEventListener("keydown", (event) => steer(event, body, state, draw));
    body.addEventListener("focusin", (event) => {
      const row = event.target.closest("tr");
      state.focus = row.node;
      state.hasFocus = true;
      rove(body, row);
    });
    body.addEventListener("focusout", () => { state.hasFocus = false; });
    select.addEventListener("change", change);
    fold.addEventListener("change", change);
    place.querySelector(".live").hidden = false;
    change();
  }

  function drawIcicle(place, state, draw) {
    const box = place.querySelector(".icicle");
    const parts = [];
    let depths = 0;
    const add = (node, left, width, level) => {
      if (width < 0.0015) return;
      depths = Math.max(depths, level + 1);
      const text = `${labelOf(node)}: ${milliseconds(node.ms)}, ${share(node.ms / state.total)}`;
      const block = element("div", { class: node.kind, title: text }, width > 0.03 ? labelOf(node) : "");
      block.style.left = `${100 * left}%`;
      block.style.width = `${100 * width}%`;
      block.style.top = `${30 * level}px`;
      block.addEventListener("click", () => {
        state.zoom = node === state.zoom && node.parent ? node.parent : node;
        for (let up = node; up; up = up.parent) state.open.add(up);
        draw();
      });
      parts.push(block);
      let start = left;
      for (const next of childrenOf(node)) {
        const part = node.ms ? width * (next.ms / node.ms) : 0;
        add(next, start, part, level + 1);
        start += part;
      }
    };
    const above = [];
    for (let up = state.zoom.parent; up; up = up.parent) above.unshift(up);
    above.forEach((node, level) => {
      const block = element("div", { class: node.kind, title: `Back to ${labelOf(node)}` }, `◂ ${labelOf(node)}`);
      block.style.cssText = `left:0;width:100%;top:${30 * level}px`;
      block.addEventListener("click", () => { state.zoom = node; draw(); });
      parts.push(block);
    });
    add(state.zoom, 0, 1, above.length);
    box.style.height = `${30 * depths}px`;
    box.replaceChildren(...parts);
  }

  function drawTree(place, state, draw) {
    const body = place.querySelector(".tree tbody");
    const rows = [];
    const add = (node, level) => {
      rows.push(treeRow(node, level, state, draw));
      if (state.open.has(node)) for (const next of childrenOf(node)) add(next, level + 1);
    };
    for (const node of childrenOf(state.tree)) add(node, 1);
    const focused = state.focus && rows.find((row) => row.node === state.focus);
    (focused || rows[0]).tabIndex = 0;
    const hadFocus = state.hasFocus;
    body.replaceChildren(...rows);
    // Taking the old rows away takes the focus: whether it was here is known before.
    if (focused && hadFocus) focused.focus();
  }

  function treeRow(node, level, state, draw) {
    const isOpen = state.open.has(node), hasMore = node.children.size > 0;
    const name = element("td", { role: "gridcell" },
      element("span", { class: "twist", "aria-hidden": "true" }, hasMore ? (isOpen ? "▾" : "▸") : ""),
      element("span", { class: "level" }, `${node.kind} `), labelOf(node));
    name.style.paddingLeft = `${18 * (level - 1)}px`;
    const part = node.ms / state.total;
    const bar = element("i");
    bar.style.width = `${100 * part}%`;
    const row = element("tr", { role: "row", "aria-level": String(level), tabindex: "-1" }, name,
      element("td", { role: "gridcell", class: "n" }, milliseconds(node.ms)),
      element("td", { role: "gridcell", class: "n" }, share(part)),
      element("td", { role: "gridcell", class: "n" }, general(node.calls)),
      element("td", { role: "gridcell" }, element("span", { class: "bar", "aria-hidden": "true" }, bar)));
    if (hasMore) row.setAttribute("aria-expanded", String(isOpen));
    row.node = node;
    row.addEventListener("click", () => toggle(row, state, draw));
    return row;
  }

  function rove(body, row) {
    for (const other of body.querySelectorAll("tr[tabindex='0']")) other.tabIndex = -1;
    row.tabIndex = 0;
  }

  function toggle(row, state, draw) {
    if (!row.node.children.size) return;
    if (!state.open.delete(row.node)) state.open.add(row.node);
    state.focus = row.node;
    state.hasFocus = true;
    draw();
  }

  function steer(event, body, state, draw) {
    const row = event.target.closest("tr"), rows = [...body.children], at = rows.indexOf(row);
    const go = (next) => { if (next) next.focus(); };
    const isOpen = state.open.has(row.node);
    const keys = {
      ArrowDown: () => go(rows[at + 1]),
      ArrowUp: () => go(rows[at - 1]),
      Home: () => go(rows[0]),
      End: () => go(rows[rows.length - 1]),
      Enter: () => toggle(row, state, draw),
      " ": () => toggle(row, state, draw),
      ArrowRight: () => (isOpen || !row.node.children.size ? go(rows[at + 1]) : toggle(row, state, draw)),
      ArrowLeft: () => (isOpen && row.node.children.size ? toggle(row, state, draw)
        : go(rows.find((other) => other.node === row.node.parent))),
    };
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  }

  function mount(root, index, load) {
    mountSurface(root);
    mountCompare(root, index);
    mountLayers(root, index, load);
  }

  // In a file, the data are in the page: a profile is read when it is asked for.
  function mountFile() {
    const text = (id) => JSON.parse(document.getElementById(id).textContent);
    mount(document, text("agn-index"), async (place) => text(`agn-layers-${place}`));
  }

  return { general, milliseconds, share, compareRuns, buildTree, childrenOf, mount, mountFile };
})();
