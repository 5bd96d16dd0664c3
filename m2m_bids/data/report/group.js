"use strict";
// Draws the scans of the cohort from the JSON in the page. Every string is set as text, never as HTML.
(() => {
  const { scans, columns } = JSON.parse(document.getElementById("data").textContent);
  const PAGE_SIZE = 50;
  const RATINGS = ["good", "doubtful", "bad"];
  const SVG = "http://www.w3.org/2000/svg";
  const byId = (id) => document.getElementById(id);

  function element(name, attributes = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  function drawn(name, attributes, ...children) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  const shown = (value) => (typeof value === "number" ? String(Number(value.toPrecision(4))) : value ?? "-");
  // Failed scans first, then those with the most reasons.
  const urgency = (scan) => (scan.status === "failed" ? 1000 : 0) + scan.flags.length;
  // Names break between their entities.
  const broken = (name) => name.match(/[^_]+_?|_/g).flatMap((part) => [part, element("wbr")]);
  const link = (scan) => element(scan.report ? "a" : "span", scan.report ? { href: scan.report } : {}, ...broken(scan.scan));

  // Ratings are kept by the browser, for all tabs of this page and of pages of a part beside it. Of two of one scan the newer holds.
  const store = `m2m-bids ratings in ${new URL(".", location.href).pathname}`;
  const names = new Set(scans.map((scan) => scan.scan));
  const ratings = new Map();
  const ratingOf = (scan) => ratings.get(scan.scan) ?? { rating: "", note: "", time: "" };

  function merge(name, { rating, note, time }) {
    const isNewer = !ratings.has(name) || String(time) > ratings.get(name).time;
    if (isNewer) {
      ratings.set(name, { rating: RATINGS.includes(rating) ? rating : "", note: String(note ?? ""), time: String(time ?? "") });
    }
    return isNewer;
  }

  function readStore() {
    try {
      for (const [name, known] of Object.entries(JSON.parse(localStorage.getItem(store)) ?? {})) merge(name, known);
    } catch {
      // A browser may keep no storage for files: ratings then last as long as the page.
    }
  }

  function writeStore() {
    try {
      localStorage.setItem(store, JSON.stringify(Object.fromEntries(ratings)));
    } catch {
      // As above.
    }
  }

  function rate(scan, change) {
    readStore(); // another tab may have rated since
    const known = ratingOf(scan);
    // Newer than what it replaces, also if that was rated where the clock is ahead.
    const time = new Date(Math.max(Date.now(), (Date.parse(known.time) || 0) + 1)).toISOString();
    ratings.set(scan.scan, { ...known, ...change, time });
    writeStore();
    showCount();
  }

  // What brings the ratings of the rows on this page of the table up to date.
  let shownRatings = [];

  function ratingCells(scan) {
    const buttons = RATINGS.map((rating) => element("button", { type: "button", "data-rating": rating, "aria-label": `${rating}: ${scan.scan}` }, rating));
    const note = element("input", { "aria-label": `Note on ${scan.scan}`, type: "text" });
    const show = () => {
      for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.rating === ratingOf(scan).rating));
      if (document.activeElement !== note) note.value = ratingOf(scan).note;
    };
    for (const button of buttons) {
      button.addEventListener("click", () => {
        rate(scan, { rating: button.getAttribute("aria-pressed") === "true" ? "" : button.dataset.rating });
        show();
      });
    }
    note.addEventListener("change", () => rate(scan, { note: note.value }));
    show();
    shownRatings.push(show);
    return [element("td", { class: "m2m-rating" }, ...buttons), element("td", {}, note)];
  }

  function showOthers() {
    readStore();
    // Rows stay while somebody writes in one.
    if (byId("scans").contains(document.activeElement)) shownRatings.forEach((show) => show());
    else draw();
    showCount();
  }

  async function loadRatings(file) {
    const clean = (value) => (value === undefined || value === "n/a" ? "" : value);
    const [first, ...lines] = (await file.text()).replace(/^\uFEFF/, "").split(/\r?\n/).filter(Boolean).map((line) => line.split("\t"));
    const place = Object.fromEntries((first ?? []).map((name, index) => [name, index]));
    if (place.scan === undefined || place.rating === undefined) {
      byId("loaded").textContent = `${file.name} has no columns 'scan' and 'rating': choose a table that was saved here.`;
      return;
    }
    const numbers = { loaded: 0, older: 0, absent: 0, unclear: 0 };
    for (const cells of lines) {
      const [name, rating, note, time] = ["scan", "rating", "note", "time"].map((column) => clean(cells[place[column]]));
      if (!names.has(name)) numbers.absent += 1;
      else if (rating && !RATINGS.includes(rating)) numbers.unclear += 1;
      else numbers[merge(name, { rating, note, time }) ? "loaded" : "older"] += 1;
    }
    writeStore();
    const words = { older: "not newer than what is here", absent: "of scans that are not here", unclear: `not one of ${RATINGS.join(", ")}` };
    const rest = Object.entries(words).filter(([key]) => numbers[key]).map(([key, text]) => `; ${numbers[key]} left out, ${text}`);
    byId("loaded").textContent = `${numbers.loaded} ratings loaded from ${file.name}${rest.join("")}.`;
    draw();
  }

  function saveRatings() {
    const clean = (value) => String(value ?? "").replace(/\s+/g, " ").trim() || "n/a";
    const rows = [["participant_id", "session_id", "scan", "rating", "note", "time"]];
    for (const scan of scans) {
      const known = ratingOf(scan);
      if (known.rating || known.note) {
        rows.push([scan.participant_id, scan.session_id, scan.scan, known.rating, known.note, known.time].map(clean));
      }
    }
    const content = rows.map((row) => row.join("\t")).join("\n") + "\n";
    const address = URL.createObjectURL(new Blob([content], { type: "text/tab-separated-values" }));
    element("a", { href: address, download: "ratings.tsv" }).click();
    URL.revokeObjectURL(address);
  }

  // The table: all scans that are chosen, sorted, a page at a time.
  const fields = [
    { name: "rating", title: "rating", value: (scan) => ratingOf(scan).rating || null },
    { name: "note", title: "note", value: (scan) => ratingOf(scan).note || null },
    { name: "scan", title: "scan", value: (scan) => scan.scan },
    { name: "status", title: "status", value: (scan) => scan.status },
    { name: "flags", title: "why to look", value: urgency },
    ...columns.map(({ name, title, unit }) => ({
      name, title: unit ? `${title} (${unit})` : title, value: (scan) => scan.numbers[name], isNumber: true,
    })),
  ];
  let order = { name: "flags", isDown: true };
  let page = 0;

  function chosen() {
    const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const status = byId("status").value;
    const kind = byId("kind").value;
    const rated = byId("rated").value;
    return scans.filter((scan) => {
      const content = [scan.scan, scan.status, scan.reason, ...scan.flags].join(" ").toLowerCase();
      return (!status || scan.status === status) && (!kind || scan.kind === kind)
        && (!rated || (ratingOf(scan).rating || "not yet") === rated)
        && (!byId("only-flagged").checked || scan.flags.length > 0)
        && words.every((word) => content.includes(word));
    });
  }

  function sorted(rows) {
    const { value } = fields.find((field) => field.name === order.name);
    const sign = order.isDown ? -1 : 1;
    const isMissing = (x) => x === null || x === undefined;
    return [...rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (isMissing(x) || isMissing(y)) return isMissing(x) - isMissing(y);
      return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
    });
  }

  function header() {
    const row = element("tr");
    for (const { name, title } of fields) {
      const button = element("button", { type: "button" }, title);
      button.addEventListener("click", () => {
        order = { name, isDown: order.name === name ? !order.isDown : false };
        draw();
        byId("scans").querySelector(`[data-name="${CSS.escape(name)}"] button`).focus();
      });
      const cell = element("th", { scope: "col", "data-name": name }, button);
      if (order.name === name) cell.setAttribute("aria-sort", order.isDown ? "descending" : "ascending");
      row.append(cell);
    }
    return element("thead", {}, row);
  }

  function tableRow(scan) {
    const row = element("tr", {}, ...ratingCells(scan), element("th", { scope: "row" }, link(scan)));
    const reason = scan.reason ? [element("br"), element("small", {}, scan.reason)] : [];
    row.append(element("td", { class: "m2m-long" }, scan.status, ...reason));
    row.append(element("td", { class: "m2m-flags" }, scan.flags.join("; ") || "-"));
    for (const { name } of columns) {
      const css = scan.odd.includes(name) ? "m2m-value m2m-odd" : "m2m-value";
      row.append(element("td", { class: css }, shown(scan.numbers[name])));
    }
    return row;
  }

  function draw() {
    const rows = sorted(chosen());
    const nPages = Math.max(1, Math.ceil(rows.length / PAGE_SIZE));
    page = Math.min(Math.max(page, 0), nPages - 1);
    const part = rows.slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE);
    shownRatings = [];
    byId("scans").replaceChildren(header(), element("tbody", { id: "rows", tabindex: "-1" }, ...part.map(tableRow)));
    showCount();
    byId("page").textContent = `page ${page + 1} of ${nPages}`;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page === nPages - 1;
  }

  function showCount() {
    const nRated = scans.filter((scan) => ratingOf(scan).rating).length;
    byId("count").textContent = `${chosen().length} of ${scans.length} scans; ${nRated} rated`;
  }

  function drawFlagged() {
    const flagged = scans.filter((scan) => scan.flags.length > 0).sort((a, b) => urgency(b) - urgency(a));
    if (flagged.length === 0) {
      byId("flagged").append(element("p", {}, "No number asks for a look. That does not replace looking."));
      return;
    }
    const list = element("ul");
    for (const scan of flagged.slice(0, 100)) {
      list.append(element("li", {}, link(scan), ` (${scan.status}): ${scan.flags.join("; ")}`));
    }
    byId("flagged").append(element("p", {}, `${flagged.length} of ${scans.length} scans:`), list);
    if (flagged.length > 100) byId("flagged").append(element("p", {}, "The others are in the table of all scans."));
  }

  // Distributions: a panel for each number, a row in it for each kind of scan.
  const kinds = [...new Set(scans.map((scan) => scan.kind))].sort();
  const WIDTH = 460;
  const LEFT = 110;
  const ROW = 46;

  function panel(column) {
    const known = scans.filter((scan) => typeof scan.numbers[column.name] === "number");
    const values = known.map((scan) => scan.numbers[column.name]);
    const [low, high] = values.reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
    const range = high - low || Math.abs(high) || 1;
    const x = (value) => LEFT + 8 + ((value - low) / range) * (WIDTH - LEFT - 20);
    const rows = kinds.filter((kind) => known.some((scan) => scan.kind === kind));
    const height = rows.length * ROW + 24;
    const label = `${column.title}: ${values.length} scans, ${shown(low)} to ${shown(high)}. Arrow keys go from scan to scan.`;
    const svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "group", "aria-label": label });
    const points = rows.map((kind, index) => {
      const middle = index * ROW + ROW / 2;
      const own = known.filter((scan) => scan.kind === kind).sort((a, b) => a.numbers[column.name] - b.numbers[column.name]);
      const median = own[Math.floor(own.length / 2)].numbers[column.name];
      svg.append(
        drawn("line", { x1: LEFT, x2: WIDTH - 8, y1: middle, y2: middle }),
        drawn("line", { class: "m2m-median", x1: x(median), x2: x(median), y1: middle - 16, y2: middle + 16 }),
        drawn("text", { x: 2, y: middle + 4 }, kind.slice(0, 18), drawn("title", {}, kind)),
      );
      for (const limit of column.limits.filter((value) => low <= value && value <= high)) {
        svg.append(drawn("line", { class: "m2m-limit", x1: x(limit), x2: x(limit), y1: middle - 20, y2: middle + 20 }, drawn("title", {}, `limit: ${shown(limit)}`)));
      }
      const nodes = own.map((scan, number) => {
        // Spread by number, so that equal values are seen apart.
        return pointOf(scan, column, x(scan.numbers[column.name]), middle + (((number * 7) % 13) - 6) * 2.2);
      });
      svg.append(drawn("g", { role: "group", "aria-label": `${kind}: ${own.length} scans, median ${shown(median)}` }, ...nodes));
      return nodes;
    });
    for (const [value, anchor] of low < high ? [[low, "start"], [high, "end"]] : [[low, "start"]]) {
      svg.append(drawn("text", { x: x(value), y: height - 6, "text-anchor": anchor }, shown(value)));
    }
    const told = element("p", { class: "m2m-told" });
    // Chromium makes a stop of a drawing that itself listens for the focus.
    const frame = element("div", {}, svg, told);
    letKeysMove(frame, points);
    return frame;
  }

  function pointOf(scan, { name, unit }, x, y) {
    const isOdd = scan.odd.includes(name);
    const value = `${shown(scan.numbers[name])}${unit ? ` ${unit}` : ""}`;
    const words = `${scan.scan}: ${value}${isOdd ? ", to look at" : ""}${scan.report ? "" : ", without a report"}`;
    const circle = drawn("circle", { cx: x, cy: y, r: isOdd ? 5 : 3.5 }, drawn("title", {}, words));
    const role = scan.report ? { href: scan.report } : { role: "img" };
    return drawn("a", { ...role, tabindex: "-1", "aria-label": words, ...(isOdd ? { class: "m2m-odd" } : {}) }, circle);
  }

  // One stop of the tabulator for each distribution; in it, points are in order of their values, a row for each kind.
  const STEPS = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
  const placeOf = (point, axis) => Number(point.firstChild.getAttribute(axis));

  function letKeysMove(frame, rows) {
    const [svg, told] = frame.children;
    // Drawn last, since points may lie over the one that has the focus.
    const ring = drawn("circle", { class: "m2m-ring", r: 8 });
    svg.append(ring);
    let current = rows[0][0];
    current.setAttribute("tabindex", "0");
    frame.addEventListener("focusin", ({ target }) => {
      current.setAttribute("tabindex", "-1");
      current = target;
      current.setAttribute("tabindex", "0");
      ring.setAttribute("cx", placeOf(current, "cx"));
      ring.setAttribute("cy", placeOf(current, "cy"));
      told.replaceChildren(...broken(current.getAttribute("aria-label")));
    });
    frame.addEventListener("focusout", () => told.replaceChildren());
    frame.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey) return; // the browser's own
      const row = rows.findIndex((points) => points.includes(current));
      const target = event.key in STEPS ? along(rows[row], current, STEPS[event.key])
        : event.key === "ArrowUp" ? nearest(rows[row - 1], current) : event.key === "ArrowDown" ? nearest(rows[row + 1], current) : null;
      if (!target) return;
      event.preventDefault();
      target.focus();
    });
  }

  function along(points, current, step) {
    return points[Math.min(Math.max(points.indexOf(current) + step, 0), points.length - 1)];
  }

  function nearest(points, current) {
    const distance = (point) => Math.abs(placeOf(point, "cx") - placeOf(current, "cx"));
    return points ? points.reduce((best, point) => (distance(point) < distance(best) ? point : best)) : current;
  }

  function drawPanels() {
    // Each when it is scrolled to or has the focus: a thousand scans have tens of thousands of points.
    const drawIn = (box) => {
      if (!box.hasAttribute("tabindex")) return; // done
      const hasFocus = box === document.activeElement;
      box.append(panel(columns.find((column) => column.name === box.dataset.name)));
      box.removeAttribute("tabindex");
      if (hasFocus) box.querySelector('a[tabindex="0"]').focus();
    };
    const watcher = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        watcher.unobserve(target);
        drawIn(target);
      }
    }, { rootMargin: "200px" });
    for (const column of columns) {
      if (!scans.some((scan) => typeof scan.numbers[column.name] === "number")) continue;
      const title = column.unit ? `${column.title} (${column.unit})` : column.title;
      const box = element("div", { class: "m2m-panel", "data-name": column.name, tabindex: "0" }, element("h3", {}, title));
      box.addEventListener("focus", () => drawIn(box));
      byId("panels").append(box);
      watcher.observe(box);
    }
  }

  for (const status of [...new Set(scans.map((scan) => scan.status))]) byId("status").append(element("option", {}, status));
  for (const kind of kinds) byId("kind").append(element("option", {}, kind));
  for (const rating of ["not yet", ...RATINGS]) byId("rated").append(element("option", {}, rating));
  for (const id of ["find", "status", "kind", "rated", "only-flagged"]) {
    byId(id).addEventListener("input", () => { page = 0; draw(); });
  }
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("previous").addEventListener("click", () => { page -= 1; draw(); });
  byId("next").addEventListener("click", () => { page += 1; draw(); });
  byId("export").addEventListener("click", saveRatings);
  byId("import").addEventListener("change", async () => {
    const [file] = byId("import").files;
    if (file) await loadRatings(file);
    byId("import").value = ""; // so that the same file can be chosen again
  });
  window.addEventListener("storage", ({ key }) => { if (key === store) showOthers(); });
  readStore();
  drawFlagged();
  drawPanels();
  draw();
})();
