"use strict";
/* The explorer. Texts of rows come to the page as text nodes alone: nothing here makes HTML of a string. */
(() => {
  const loading = new Map(); // promises of chunks of records, by name
  const arrived = new Map(); // what resolves them
  const forebear = { site: null, served: false, add: (kind, number, records) => arrived.get(`${kind}-${number}`)?.(records) };
  window.forebear = forebear;

  const PAGE_LINES = 50;
  const FOLDED = 600; // characters of a text that are shown at first
  const FOLDED_AGAIN = 160; // of a text that stands on the page already
  const DECISIONS = ["wrong label", "remove", "keep", "note"];
  const FIELDS = ["row", "source", "source_row", "text", "label", "suggested", "evidence", "probability", "reason", "decision", "note"];

  /* ---- elements ---- */

  // Children are nodes or texts; what is null is left out. Attributes that begin with "on" are listeners.
  function el(name, attributes, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes ?? {})) {
      if (value === null || value === undefined || value === false) continue;
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else node.setAttribute(key, value === true ? "" : String(value));
    }
    return add(node, ...children);
  }

  function add(node, ...children) {
    for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) node.append(child);
    return node;
  }

  let n_fields = 0;

  // A control under its name.
  function field(name, control, kind = "field") {
    control.id = `field-${++n_fields}`;
    return el("div", { class: kind }, el("label", { for: control.id }, name), control);
  }

  const minus = (number) => number.replaceAll("-", "\u2212");
  const grouped = (number) => number.toLocaleString("en");
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const plural = (n, one) => `${grouped(n)} ${one}${n === 1 ? "" : "s"}`;
  const testLink = (number) => el("a", { href: `#/test/${number}` }, `Test row ${grouped(number)}`);
  const say = (message) => { document.getElementById("said").textContent = message; };

  /* ---- texts ---- */

  // Characters that show nothing, or turn the direction of what follows: shown by their numbers.
  const HIDDEN = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u00ad\u200b\u2028-\u202e\u2060-\u2069\ufeff]/g;

  function shown(text) {
    const nodes = [];
    let end = 0;
    for (const { 0: found, index } of text.matchAll(HIDDEN)) {
      if (index > end) nodes.push(text.slice(end, index));
      const code = `U+${found.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
      nodes.push(el("span", { class: "code", title: "a character that shows nothing" }, code));
      end = index + 1;
    }
    if (end < text.length) nodes.push(text.slice(end));
    return nodes;
  }

  function pieceNode([text, facts]) {
    if (!facts) return shown(text);
    if (facts.asked) return el("mark", { class: "asked" }, el("span", null, shown(text)));
    if (facts.unread) return el("span", { class: "unread" }, "[not read by the model: ", shown(text), "]");
    const short = text.length <= 30 ? " short" : "";
    const title = `${minus(facts.value)}, ${facts.sign}`;
    const note = facts.note ? el("sup", null, minus(facts.note)) : null;
    return el("mark", { class: `${facts.sign} s${facts.level}${short}`, title }, el("span", null, shown(text)), note);
  }

  function cut(pieces, most) {
    const kept = [];
    for (const [text, facts] of pieces) {
      if (most <= 0) break;
      let end = Math.min(most, text.length);
      if (end < text.length && /[\ud800-\udbff]/.test(text[end - 1])) end -= 1; // never within a character
      kept.push(facts ? [text.slice(0, end), facts] : [text.slice(0, end)]);
      most -= text.length;
    }
    return kept;
  }

  // Fills a node with the pieces of a text; a long one is folded behind a button.
  function fill(node, pieces, most) {
    const length = pieces.reduce((sum, [text]) => sum + text.length, 0);
    if (!pieces.some(([text]) => text.trim())) {
      node.append(el("em", { class: "empty" }, length ? "(white space alone)" : "(empty)"));
      return node;
    }
    if (length <= most) {
      node.append(...pieces.map(pieceNode).flat());
      return node;
    }
    const holder = el("span");
    let open = false;
    const button = el("button", { type: "button", class: "plain", "aria-expanded": "false", onclick: () => { open = !open; draw(); } });
    function draw() {
      holder.replaceChildren(...(open ? pieces : cut(pieces, most)).map(pieceNode).flat(), open ? " " : "\u2026 ");
      button.textContent = open ? "Show less" : `Show all ${grouped(length)} characters`;
      button.setAttribute("aria-expanded", String(open));
    }
    draw();
    node.append(holder, button);
    return node;
  }

  const textNode = (name, pieces, more) => fill(el(name, { dir: "auto", class: `text${more ? ` ${more}` : ""}` }), pieces, more ? FOLDED_AGAIN : FOLDED);

  function textList(texts, { again = false } = {}) {
    return texts.map(([name, pieces]) => {
      const marked = typeof pieces === "string" ? [[pieces]] : pieces;
      return [el("dt", null, again ? `query: ${name}` : name), textNode("dd", marked, again ? "again" : "")];
    });
  }

  /* ---- records ---- */

  const server = { index: "", token: "" };

  // Asks the server, where there is one: the value of its JSON.
  async function ask(place, { method = "GET", body } = {}) {
    const headers = server.token ? { authorization: `Bearer ${server.token}` } : {};
    if (body !== undefined) headers["content-type"] = "application/json";
    const address = server.index && place.startsWith("explorer/") ? `${place}?index=${encodeURIComponent(server.index)}` : place;
    const answer = await fetch(address, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
    if (answer.status === 204) return null;
    const value = await answer.json().catch(() => ({ error: `The server answered with status ${answer.status}.` }));
    if (answer.ok) return value;
    throw Object.assign(new Error(value.error), { status: answer.status });
  }

  function load(kind, number) {
    const name = `${kind}-${number}`;
    if (forebear.served && !loading.has(name)) {
      loading.set(name, ask(`explorer/records/${kind}/${number}`).catch((error) => { loading.delete(name); throw error; }));
    }
    if (!loading.has(name)) {
      loading.set(name, new Promise((resolve, reject) => {
        const missing = () => {
          if (!script.done) loading.delete(name); // so that it is tried again
          reject(new Error(`data/${name}.js is missing or damaged.`)); // does nothing where the records have arrived
        };
        arrived.set(name, (records) => { script.done = true; resolve(records); });
        const script = el("script", { src: `data/${name}.js`, onerror: missing, onload: missing });
        document.head.append(script);
      }));
    }
    return loading.get(name);
  }

  const chunkOf = (kind, number) => Math.floor(number / forebear.site.chunks[kind]);

  async function testLines() {
    const chunks = [];
    for (let i = 0; i * forebear.site.chunks.tests < forebear.site.n_tests; i++) chunks.push(load("tests", i));
    return (await Promise.all(chunks)).flat();
  }

  async function prediction(number) {
    if (!(number < forebear.site.n_tests)) return null;
    return (await load("predictions", chunkOf("predictions", number))).find((record) => record.number === number);
  }

  // The record of a training row; null where no prediction here lists it, and there is no server to ask.
  async function trainingRow(row) {
    const place = forebear.site.first_rows.findLastIndex((first) => first <= row);
    const listed = place < 0 ? null : (await load("rows", place)).find((record) => record.row === row);
    return listed ?? (forebear.served ? ask(`explorer/rows/${row}`) : null);
  }

  // What the server says of one text, as the record of a prediction.
  function fromServer(found) {
    const piece = ({ text, value, level, note, read, asked }) => {
      const facts = value === null ? {} : { sign: value > 0 ? "supports" : value < 0 ? "opposes" : "zero", level, note, value: `${value > 0 ? "+" : ""}${Number(value.toPrecision(4))}` };
      if (!read) facts.unread = true;
      if (asked) facts.asked = true;
      return Object.keys(facts).length ? [text, facts] : [text];
    };
    const texts = (marked) => marked.map(({ name, pieces }) => [name, pieces.map(piece)]);
    const words = (list) => list.map(({ text, number, where }) => [text, number, where]);
    const again = (marked) => (marked.some(({ pieces }) => pieces.some(({ value }) => value !== null)) ? texts(marked) : []);
    const role = (name) => [name === found.prediction ? "predicted" : null, name === found.target ? "explained" : null].filter(Boolean).join(", ");
    return {
      ...found, number: null, label: null, wrong: null, duplicate: null, numbers: forebear.site.numbers,
      texts: texts(found.texts), words: words(found.words), probabilities: found.probabilities.map(([name, value, shown]) => [name, value, shown, role(name)]),
      answers: found.answers.map((answer) => ({ ...answer, asked: texts(answer.asked), sides: answer.sides.map((side) => ({
        ...side, rows: side.rows.map((row) => ({ ...row, hub_share: null, texts: texts(row.texts), query_texts: again(row.query_texts), words: words(row.words) })),
      })) })),
    };
  }

  /* ---- the work list ---- */

  const work = {
    get key() { return `forebear-worklist:${forebear.site.digest}`; },
    problem: "",
    entries: new Map(), // by row
    async read() {
      try {
        const entries = forebear.site.keeps ? await ask("explorer/worklist") : JSON.parse(localStorage.getItem(this.key) ?? "[]");
        this.entries = new Map(entries.filter((entry) => Number.isInteger(entry?.row)).map((entry) => [entry.row, entry]));
      } catch (error) {
        this.problem = forebear.site.keeps ? error.message : "This browser keeps nothing for this page: export the list before you leave.";
      }
    },
    async write(row) {
      const entry = this.entries.get(row);
      drawPages();
      try {
        if (!forebear.site.keeps) localStorage.setItem(this.key, JSON.stringify(this.sorted()));
        else if (entry) await ask(`explorer/worklist/${row}`, { method: "PUT", body: ordered(entry) });
        else await ask(`explorer/worklist/${row}`, { method: "DELETE" });
        this.problem = "";
      } catch (error) {
        this.problem = `Row ${row} could not be kept (${error.message}): export the list before you leave.`;
        say(this.problem);
      }
    },
    sorted() { return [...this.entries.values()].sort((a, b) => a.row - b.row); },
    put(entry) { this.entries.set(entry.row, entry); return this.write(entry.row); },
    drop(row) { this.entries.delete(row); return this.write(row); },
  };

  const ordered = (entry) => Object.fromEntries(FIELDS.map((name) => [name, entry[name] ?? null]));
  const asLines = (entries) => entries.map((entry) => `${JSON.stringify(ordered(entry))}\n`).join("");

  function asCsv(entries) {
    const cell = (value) => {
      const text = value === null || value === undefined ? "" : String(value);
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    return [FIELDS, ...entries.map((entry) => FIELDS.map((name) => entry[name]))].map((line) => `${line.map(cell).join(",")}\n`).join("");
  }

  function save(name, content, type) {
    const address = URL.createObjectURL(new Blob([content], { type }));
    el("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
    say(`${name} is saved.`);
  }

  // A form that marks a training row. ``reason``: where the reader met it.
  function markForm(record, reason, onchange) {
    const row = record.row;
    const now = () => work.entries.get(row);
    const id = (name) => `mark-${name}-${row}-${Math.random().toString(36).slice(2, 8)}`;
    const group = id("decision");
    const radios = DECISIONS.map((decision) => el("label", null, el("input", {
      type: "radio", name: group, value: decision, checked: now()?.decision === decision, onchange: keep,
    }), ` ${decision}`));
    const note = el("textarea", { rows: 2, onchange: keep }, now()?.note ?? "");
    const names = forebear.site.one_label ? forebear.site.label_names : [];
    const chosen = now() ? now().suggested : record.suggested;
    const label = el("select", { onchange: keep }, ["", ...names].map((name) => el("option", { value: name, selected: name === (chosen ?? "") }, name || "not known")));
    const off = el("button", { type: "button", onclick: async () => {
      const dropped = work.drop(row);
      form.querySelectorAll("input").forEach((input) => { input.checked = false; });
      note.value = "";
      await dropped;
      changed(`Row ${row} is off the work list.`);
    } }, "Take off the list");
    const state = el("p", { class: "said", role: "status" });
    const form = el("div", { class: "marking", role: "group", "aria-label": `Mark row ${row}` },
      el("fieldset", null, el("legend", null, `Row ${row} goes on the work list as`), radios),
      names.length ? field("Right label", label) : null, field("Note", note), el("div", { class: "actions" }, off, state));
    async function keep() {
      const decision = form.querySelector("input:checked")?.value ?? (note.value.trim() ? "note" : null);
      if (!decision) return;
      form.querySelector(`input[value="${decision}"]`).checked = true;
      await work.put({
        row, source: record.source, source_row: record.source_row, text: record.texts.map(([, text]) => text).join("\n"),
        label: record.label, suggested: names.length ? label.value || null : record.suggested, evidence: record.evidence,
        probability: record.probability, reason: now()?.reason || reason, decision, note: note.value,
      });
      changed(`Row ${row} is on the work list: ${decision}.`);
    }
    function changed(message) {
      off.disabled = !now();
      state.textContent = work.problem || (message ?? "");
      onchange?.(now());
    }
    changed();
    state.textContent = "";
    return form;
  }

  // The same, folded: the record of the row is loaded when it is opened.
  function markDetails(row, reason, onchange) {
    const summary = el("summary");
    const name = () => {
      const entry = work.entries.get(row);
      summary.textContent = entry ? `Row ${row} is marked: ${entry.decision}` : `Mark row ${row}`;
      onchange?.(entry);
    };
    name();
    const details = el("details", { ontoggle: async () => {
      if (!details.open || details.querySelector(".marking")) return;
      try {
        details.append(markForm(await trainingRow(row), reason, name));
      } catch (error) {
        details.append(el("p", { class: "said" }, error.message));
      }
    } }, summary);
    return details;
  }

  /* ---- pages ---- */

  const filter = { text: "", show: "all", label: "", predicted: "", least: 0.9, page: 0 };

  function passes(line) {
    const sure = line.probability !== null && line.probability >= filter.least;
    const fits = {
      all: true, wrong: line.wrong === true, right: line.wrong === false, sure: line.wrong === true && sure, duplicate: line.duplicate,
    }[filter.show];
    const text = filter.text.trim().toLocaleLowerCase();
    return fits && (!filter.label || line.label === filter.label) && (!filter.predicted || line.prediction === filter.predicted)
      && (!text || line.texts.some((one) => one.toLocaleLowerCase().includes(text)));
  }

  function verdict(record) {
    if (record.wrong === null) return null;
    return el("span", { class: record.wrong ? "note wrong" : "note" }, record.wrong ? "wrong" : "right");
  }

  function outcome(record) {
    return el("ul", { class: "facts" },
      record.label === null ? null : el("li", null, el("span", null, "label"), shown(record.label)),
      el("li", null, el("span", null, "predicted"), shown(record.prediction)),
      record.probability === null ? null : el("li", null, el("span", null, "probability"), record.probability.toFixed(4)));
  }

  async function listPage(main) {
    const { site } = forebear;
    if (forebear.served && !site.n_tests) return askPage(main);
    const lines = await testLines();
    const n_wrong = lines.filter((line) => line.wrong).length;
    const single = site.one_label;
    const list = el("ul", { class: "lines" });
    const count = el("p", { class: "count", role: "status" });
    const pager = el("nav", { class: "pager", "aria-label": "Parts of the list" });
    const change = (name, read) => (event) => { filter[name] = read(event.target.value); filter.page = 0; draw(); };
    const choice = (title, name, values) => field(title, el("select", { onchange: change(name, String) },
      values.map(([value, words]) => el("option", { value, selected: filter[name] === value }, words))));
    const names = (held) => [["", "any"], ...[...new Set(lines.map((line) => line[held]).filter((name) => name !== null))].sort().map((name) => [name, name])];
    const shows = [["all", "all"], ...(site.labelled ? [["wrong", "wrong"], ...(single ? [["sure", "confident and wrong"]] : []), ["right", "right"]] : []), ["duplicate", "also a training row"]];
    const kinds = names("label").length <= 101 && !site.numbers;
    add(main,
      el("h1", { tabindex: -1 }, "Test rows"),
      el("p", { class: "summary" }, `${plural(site.n_tests, "test row")} of ${site.test}${site.labelled && !site.numbers ? `, ${grouped(n_wrong)} predicted wrongly` : ""}.`),
      el("form", { class: "filters", role: "search", "aria-label": "Filter test rows", onsubmit: (event) => event.preventDefault() },
        field("Text contains", el("input", { type: "search", value: filter.text, oninput: change("text", String) }), "field wide"),
        choice("Show", "show", shows),
        single ? field("Confident from", el("input", { type: "number", min: 0, max: 1, step: 0.01, value: filter.least, oninput: change("least", Number) })) : null,
        kinds && site.labelled ? choice("Label", "label", names("label")) : null,
        kinds ? choice("Predicted", "predicted", names("prediction")) : null),
      count, list, pager);
    function draw() {
      const found = lines.filter(passes);
      const n_pages = Math.max(1, Math.ceil(found.length / PAGE_LINES));
      filter.page = Math.min(filter.page, n_pages - 1);
      const first = filter.page * PAGE_LINES;
      count.textContent = found.length === lines.length ? `All ${plural(lines.length, "test row")}.` : `${grouped(found.length)} of ${plural(lines.length, "test row")}.`;
      list.replaceChildren(...found.slice(first, first + PAGE_LINES).map((line) => el("li", null,
        el("div", null, testLink(line.number), verdict(line),
          line.duplicate ? el("span", { class: "note" }, "also a training row") : null, outcome(line)),
        el("div", null, line.texts.map((text) => textNode("p", cut([[text]], 300).concat(text.length > 300 ? [["\u2026"]] : [])))))));
      const turn = (by, words) => el("button", { type: "button", disabled: filter.page + by < 0 || filter.page + by >= n_pages, onclick: () => {
        filter.page += by;
        draw();
        list.querySelector("a").focus();
      } }, words);
      pager.replaceChildren(...(n_pages > 1 ? [turn(-1, "Previous"), `Part ${filter.page + 1} of ${n_pages}`, turn(1, "Next")] : []));
    }
    draw();
    return "Test rows";
  }

  function probabilities(record) {
    const head = record.numbers ? ["output", "number"] : ["class", "probability"];
    return el("table", { class: "probabilities" },
      el("thead", null, el("tr", null, el("th", { scope: "col" }, head[0]), el("th", { scope: "col", class: "n" }, head[1]), el("th", { scope: "col" }, "role"))),
      el("tbody", null, record.probabilities.map(([name, , written, remark]) => el("tr", null,
        el("th", { scope: "row" }, shown(name)), el("td", { class: "n" }, written), el("td", null, remark)))));
  }

  function wordsTable(record) {
    const several = record.texts.length > 1;
    return el("table", null,
      el("thead", null, el("tr", null, el("th", { scope: "col" }, "word"), several ? el("th", { scope: "col" }, "in") : null, el("th", { scope: "col", class: "n" }, "saliency"))),
      el("tbody", null, record.words.map(([text, number, where]) => el("tr", null,
        el("th", { scope: "row", dir: "auto" }, shown(text)), several ? el("td", null, where) : null, el("td", { class: "n" }, minus(number))))));
  }

  function legend(target) {
    const one = (sign, level, words, note) => el("mark", { class: `${sign} s${level}` }, el("span", null, words), el("sup", null, note));
    return el("aside", { class: "legend", "aria-label": "Legend" }, el("ul", null,
      el("li", null, one("supports", 3, "word", "+"), ` solid line: supports \u201c${target}\u201d`),
      el("li", null, one("opposes", 3, "word", "\u2212"), " dashed line: opposes it"),
      el("li", null, "strength: ", one("supports", 3, "strong", "+"), one("supports", 2, "medium", "+"), one("supports", 1, "light", "+"))));
  }

  function rowCard(found, place, others) {
    const link = el("a", { href: `#/row/${found.row}` }, `row ${found.row}`);
    const effects = [found.effect ? ` \u00b7 effect ${minus(found.effect)}` : "", found.effect_probability ? ` \u00b7 probability ${minus(found.effect_probability)}` : ""];
    const card = el("article", { class: "passage" },
      el("h4", null, `${found.rank} \u00b7 `, link, ` \u00b7 score ${minus(found.score)}`, effects,
        found.label === found.prediction ? null : el("span", { class: "note" }, "label and prediction differ")),
      el("dl", { class: "texts" }, textList(found.texts), textList(found.query_texts, { again: true })),
      found.total ? el("ul", { class: "sum", "aria-label": "Contributions of the shared words to the score" },
        found.words.map(([text, number]) => el("li", null, el("span", { class: "token", dir: "auto" }, shown(text)), ` ${minus(number)}`)),
        el("li", { class: "total" }, `${found.words.length ? "sum" : "no shared word"} ${minus(found.total)}`)) : null,
      el("ul", { class: "facts" },
        el("li", null, el("span", null, "label"), shown(found.label)),
        el("li", null, el("span", null, "prediction"), shown(found.prediction)),
        el("li", null, el("span", null, "loss"), found.loss.toPrecision(3)),
        found.hub_share === null ? null : el("li", null, el("span", null, "hub share"), percent(found.hub_share)),
        others.length ? el("li", null, el("span", null, "also"), others.join(", ")) : null));
    card.append(markDetails(found.row, place, (entry) => card.classList.toggle("marked", Boolean(entry))));
    return card;
  }

  function sides(record, side, of) {
    const places = new Map(); // rows: where each stands, by method
    for (const answer of record.answers) for (const one of answer.sides) for (const found of one.rows) {
      if (!places.has(found.row)) places.set(found.row, []);
      places.get(found.row).push([answer.method, `${one.name} ${found.rank} by ${answer.method}`]);
    }
    return el("div", { class: "methods" }, record.answers.map((answer) => {
      const half = answer.sides.find((one) => one.name === side);
      const id = `${side}-${answer.method}`.replace(/[^a-z0-9-]/gi, "-");
      return el("section", { "aria-labelledby": id }, el("h3", { id }, answer.method),
        answer.asked.length ? el("dl", { class: "texts" }, textList(answer.asked)) : null,
        half.notes.map((note) => el("p", { class: "note-line" }, note)),
        answer.effect_note ? el("details", null, el("summary", null, "What the effects mean"), el("p", { class: "note-line" }, answer.effect_note)) : null,
        half.rows.map((found) => rowCard(found, `${side} ${found.rank} by ${answer.method} of ${of}`,
          [...new Set(places.get(found.row).filter(([method]) => method !== answer.method).map(([, words]) => words))])));
    }));
  }

  // All of a prediction below its heading. ``of``: what it is called where a row is marked.
  function predictionParts(main, record, of) {
    add(main,
      record.duplicate ? el("p", { class: "note-line" }, el("span", { class: "note" }, "also a training row"), " ", rowLink(record.duplicate.row, true),
        `, ${record.duplicate.kind}, similarity ${record.duplicate.jaccard.toFixed(2)}`) : null,
      el("section", { "aria-labelledby": "its-text" }, el("h2", { id: "its-text" }, "The text and its words"),
        legend(record.target),
        el("article", { class: "passage query saliency" }, el("dl", { class: "texts" }, textList(record.texts))),
        el("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": record.numbers ? "Numbers" : "Probabilities" }, probabilities(record)),
        el("details", null, el("summary", null, `Saliency of ${plural(record.words.length, "word")}`),
          el("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": "Saliency" }, wordsTable(record)),
          el("p", { class: "table-note" }, `Saliency by ${record.form}: ${record.formula}. Start and end tokens together: ${minus(record.ends)}.`))),
      el("section", { "aria-labelledby": "proponents" }, el("h2", { id: "proponents" }, "Proponents: training rows that support \u201c", shown(record.target), "\u201d most"), sides(record, "proponent", of)),
      el("section", { "aria-labelledby": "opponents" }, el("h2", { id: "opponents" }, "Opponents: training rows that oppose it most"), sides(record, "opponent", of)));
  }

  async function testPage(main, number) {
    const record = await prediction(number);
    if (!record) return missingPage(main, `There is no test row ${number} here.`);
    const found = (await testLines()).filter(passes).map((line) => line.number);
    const at = found.indexOf(number);
    const step = (to, words) => (to === undefined ? null : el("a", { href: `#/test/${to}` }, words));
    add(main,
      el("nav", { class: "pager", "aria-label": "Test rows" }, el("a", { href: "#/" }, "List of test rows"),
        at > 0 ? step(found[at - 1], "Previous") : null, at >= 0 ? step(found[at + 1], "Next") : null),
      el("h1", { tabindex: -1 }, `Test row ${grouped(number)}: `, shown(record.title), verdict(record)),
      el("p", { class: "summary" }, record.label === null ? "" : `Labelled \u201c${record.label}\u201d. `, shown(record.summary)));
    predictionParts(main, record, `test row ${number}`);
    return `Test row ${number}`;
  }

  function rowLink(row, capital) {
    return el("a", { href: `#/row/${row}` }, `${capital ? "Training row" : "row"} ${row}`);
  }

  async function rowPage(main, row) {
    const record = await trainingRow(row);
    if (!record) return missingPage(main, `Training row ${row} is listed for no test row here, so this site holds nothing on it.`);
    const { duplicates } = record;
    const fact = (name, ...value) => el("li", null, el("span", null, name), value);
    const tests = new Set(record.drives.map((drive) => drive.test));
    const lines = await testLines();
    const drives = (side) => {
      const held = record.drives.filter((drive) => drive.side === side);
      const by = new Map();
      for (const drive of held) by.set(drive.test, [...(by.get(drive.test) ?? []), drive]);
      return el("section", { "aria-labelledby": `drives-${side}` }, el("h3", { id: `drives-${side}` }, `As ${side}: ${plural(by.size, "test row")}`),
        by.size ? el("ul", { class: "lines" }, [...by].map(([number, places]) => {
          const line = lines[number];
          return el("li", null, el("div", null, testLink(number), verdict(line), outcome(line), el("ul", { class: "facts" }, places.map((one) => el("li", null,
            `${one.method}: rank ${one.rank}, score ${minus(one.score)}${one.effect ? `, effect ${minus(one.effect)}` : ""}`)))),
            el("div", null, line.texts.map((text) => textNode("p", cut([[text]], 300).concat(text.length > 300 ? [["\u2026"]] : [])))));
        })) : null);
    };
    const marking = el("div");
    const article = el("article", { class: "passage query" }, el("dl", { class: "texts" }, textList(record.texts)));
    marking.append(markForm(record, "", (entry) => article.classList.toggle("marked", Boolean(entry))));
    add(main,
      el("nav", { class: "pager", "aria-label": "Back" }, forebear.site.n_tests ? el("a", { href: "#/" }, "List of test rows") : null, asked ? el("a", { href: "#/asked" }, "The text that was explained") : null, el("a", { href: "#/work" }, "Work list")),
      el("h1", { tabindex: -1 }, `Training row ${record.row}`),
      el("p", { class: "summary" }, !forebear.site.n_tests ? "" : `Listed for ${grouped(tests.size)} of ${plural(forebear.site.n_tests, "test row")} among the ${forebear.site.top} at either end, by any method.`),
      article,
      el("ul", { class: "facts" }, fact("label", shown(record.label)), fact("prediction", shown(record.prediction)), fact("loss", record.loss.toPrecision(3)),
        record.probability === null ? null : fact("probability of the label", record.probability.toFixed(4)),
        record.suggested === null ? null : fact("suggested", shown(record.suggested)),
        fact("from", shown(record.source), record.source_row === null ? "" : `, row ${record.source_row} (from 0)`),
        record.columns.map(([name, value]) => fact(name, el("bdi", null, shown(value))))),
      el("div", { class: "two" },
        el("div", null,
          el("h2", null, "What speaks against its label"), el("p", null, `${shownText(record.evidence)}.`),
          duplicates ? [el("h2", null, `Duplicates: ${plural(duplicates.n_rows, "row")}, ${duplicates.kind}${duplicates.conflict ? ", of different labels" : ""}`),
            el("ul", { class: "facts" }, duplicates.rows.map((other) => el("li", null, rowLink(other))), duplicates.n_rows > duplicates.rows.length ? el("li", null, "and more") : null)] : null),
        el("div", null, el("h2", null, "Mark it"), marking)),
      forebear.site.n_tests ? [el("h2", null, "Predictions that it drives"), drives("proponent"), drives("opponent")] : null);
    return `Training row ${row}`;
  }

  const shownText = (text) => text.replace(HIDDEN, "");

  function missingPage(main, words) {
    add(main, el("h1", { tabindex: -1 }, "Nothing here"), el("p", null, words), el("p", null, el("a", { href: "#/" }, "To the first page")));
    return "Nothing here";
  }

  function workPage(main) {
    const list = el("ul", { class: "lines" });
    const count = el("p", { class: "summary" });
    const exported = (kind, make, type) => el("button", { type: "button", onclick: () => save(`worklist.${kind}`, make(work.sorted()), type) }, `Export ${kind === "csv" ? "CSV" : "JSON Lines"}`);
    function draw() {
      const entries = work.sorted();
      count.textContent = entries.length ? `${plural(entries.length, "training row")} marked.` : "No training row is marked. Mark rows on the page of a test row or of a training row.";
      list.replaceChildren(...entries.map((entry) => el("li", null,
        el("div", null, rowLink(entry.row, true), el("span", { class: "note" }, entry.decision), el("ul", { class: "facts" },
          el("li", null, el("span", null, "label"), shown(String(entry.label))), entry.suggested ? el("li", null, el("span", null, "suggested"), shown(String(entry.suggested))) : null)),
        el("div", null, textNode("p", [[String(entry.text ?? "")]]),
          entry.note ? el("p", { class: "note-line" }, "Note: ", shown(String(entry.note))) : null,
          el("p", { class: "note-line" }, shown([entry.evidence, entry.reason].filter(Boolean).join("; "))),
          el("button", { type: "button", "aria-label": `Take row ${entry.row} off the list`, onclick: async () => {
            await work.drop(entry.row);
            draw();
            say(work.problem || `Row ${entry.row} is off the work list.`);
            (list.querySelector("button") ?? document.querySelector("h1")).focus();
          } }, "Take off the list")))));
    }
    add(main, el("h1", { tabindex: -1 }, "Work list"), count,
      work.problem ? el("p", { class: "note-line" }, work.problem) : null,
      el("div", { class: "actions" }, exported("csv", asCsv, "text/csv"), exported("jsonl", asLines, "application/jsonl")),
      el("p", { class: "note-line" }, forebear.site.keeps ? "The server keeps the list, for all who use it." : "This browser keeps the list for this index, also when it is closed."), list);
    draw();
    return "Work list";
  }

  let asked = null; // the last text that was asked about: its record, and what was filled in

  function askPage(main) {
    const { site } = forebear;
    const texts = site.text_columns.map((name, i) => [name, el("textarea", { rows: 4, dir: "auto", required: true }, asked?.texts[i] ?? "")]);
    const methods = site.known_methods.map((name) => [name, el("input", { type: "checkbox", value: name, checked: asked?.methods.includes(name) })]);
    const top = el("input", { type: "number", min: 1, max: 100, value: asked?.top ?? 5, required: true });
    const state = el("p", { class: "said", role: "status" });
    const button = el("button", { type: "submit" }, "Explain");
    async function send(event) {
      event.preventDefault();
      const given = texts.map(([, area]) => area.value);
      const chosen = methods.filter(([, box]) => box.checked).map(([name]) => name);
      const body = { text: given.length === 1 ? given[0] : given, top: Number(top.value), ...(chosen.length ? { methods: chosen } : {}), ...(server.index ? { index: server.index } : {}) };
      button.disabled = true;
      state.textContent = "The server is asked\u2026";
      try {
        const { answers } = await ask("v1/explain", { method: "POST", body });
        asked = { record: fromServer(answers[0]), texts: given, methods: chosen, top: Number(top.value) };
        location.hash = "#/asked";
      } catch (error) {
        state.textContent = error.message;
      } finally {
        button.disabled = false;
      }
    }
    add(main, el("h1", { tabindex: -1 }, "Explain a text"),
      el("form", { class: "marking", onsubmit: send }, texts.map(([name, area]) => field(name, area)), field("Rows at each end", top),
        el("details", null, el("summary", null, "Methods"), el("fieldset", null, el("legend", null, "None chosen: those of forebear explain"), methods.map(([name, box]) => el("label", null, box, ` ${name}`)))),
        el("div", { class: "actions" }, button, state)));
    return "Explain a text";
  }

  function askedPage(main) {
    if (!asked) return missingPage(main, "No text was asked about yet.");
    add(main, el("nav", { class: "pager", "aria-label": "Back" }, el("a", { href: "#/ask" }, "Explain another text")),
      el("h1", { tabindex: -1 }, shown(asked.record.title)), el("p", { class: "summary" }, shown(asked.record.summary)));
    predictionParts(main, asked.record, `\u201c${asked.texts.join(" ").slice(0, 80)}\u201d`);
    return "A text explained";
  }

  function aboutPage(main) {
    const { site } = forebear;
    add(main, el("h1", { tabindex: -1 }, "About these pages"),
      el("p", null, !site.n_tests ? "Texts are explained when they are asked about. Test rows are listed where the server was started with --site, the folder of forebear export-site." : `For each test row: the ${site.top} training rows of highest score (proponents) and the ${site.top} of lowest (opponents), by each method. The larger a score, the more training on the row supports what is explained.`),
      el("h2", null, "Methods"), el("dl", { class: "provenance" }, site.methods.map(([name, formula]) => [el("dt", null, name), el("dd", null, formula)])),
      el("h2", null, "Numbers"), el("ul", null,
        el("li", null, "Effect: predicted change of the loss, and of the probability, without the row."),
        el("li", null, site.hubs ? "Hub share: of the reference queries of an audit of hubs, the share that the row came up for. A row that comes up for most explains none." : "Hub shares are shown where an audit of hubs is given when the site is written."),
        el("li", null, "Also a training row: equal texts, equal words, or word sets of a Jaccard similarity of at least 0.8."),
        el("li", null, "Probability of the label: what the model gives a training row\u2019s own label."),
        el("li", null, "Suggested: another label that the model predicts, or most of the 10 nearest rows have.")),
      el("h2", null, "Provenance"), el("dl", { class: "provenance" }, site.provenance.map(([name, value]) => [el("dt", null, name), el("dd", null, shown(value))])));
    return "About";
  }

  /* ---- the frame ---- */

  function drawPages() {
    const here = location.hash.split("/")[1] ?? "";
    const page = (address, words, held) => el("li", null, el("a", { href: address, "aria-current": held.includes(here) ? "page" : null }, words));
    const { site } = forebear;
    const first = site.n_tests || !forebear.served ? page("#/", "Test rows", ["", "test"]) : page("#/", "Explain a text", ["", "ask", "asked"]);
    const choice = site.indexes?.length > 1 ? el("li", null, el("select", { "aria-label": "Index", onchange: (event) => choose(event.target.value) },
      site.indexes.map((name) => el("option", { value: name, selected: name === site.index }, name)))) : null;
    document.getElementById("pages").replaceChildren();
    add(document.getElementById("pages"), first, site.n_tests && forebear.served ? page("#/ask", "Explain a text", ["ask", "asked"]) : null,
      page("#/work", `Work list (${grouped(work.entries.size)})`, ["work"]), page("#/about", "About", ["about"]), choice);
  }

  let turn = 0;
  async function show(first) {
    const mine = ++turn;
    const [, name = "", number] = location.hash.split("/");
    const holder = el("div");
    const pages = { "": listPage, test: testPage, row: rowPage, work: workPage, about: aboutPage, ...(forebear.served ? { ask: askPage, asked: askedPage } : {}) };
    let title;
    try {
      const known = Object.hasOwn(pages, name) && (number === undefined || /^\d{1,15}$/.test(number));
      title = known ? await pages[name](holder, Number(number)) : missingPage(holder, "There is no such page.");
    } catch (error) {
      holder.replaceChildren(el("h1", { tabindex: -1 }, "This page could not be read"), el("p", null, String(error.message)));
      title = "Not read";
    }
    if (mine !== turn) return; // the reader has gone on
    const main = document.getElementById("main");
    main.replaceChildren(...holder.childNodes);
    document.title = `${title} \u00b7 forebear explorer`;
    drawPages();
    if (first) return;
    window.scrollTo(0, 0);
    main.querySelector("h1")?.focus({ preventScroll: true });
  }

  // Goes over to another index of the server.
  async function choose(index) {
    server.index = index;
    asked = null;
    loading.clear();
    work.entries = new Map();
    await open();
    if (location.hash !== "#/") location.hash = "#/";
    else show(false);
  }

  async function open() {
    if (forebear.served) {
      forebear.site = await ask("explorer/site");
      server.index = forebear.site.index;
    }
    await work.read();
  }

  // Asks for the server's token; the tab keeps it.
  function tokenForm(main, start) {
    const input = el("input", { type: "password", autocomplete: "off", required: true });
    const state = el("p", { class: "said", role: "status" }, server.token ? "The server has another token." : null);
    main.replaceChildren(el("h1", { tabindex: -1 }, "This server asks for its token"), el("form", { class: "marking", onsubmit: (event) => {
      event.preventDefault();
      server.token = input.value.trim();
      try { sessionStorage.setItem("forebear-token", server.token); } catch { /* it is asked for again */ }
      start();
    } }, field("Token", input), el("div", { class: "actions" }, el("button", { type: "submit" }, "Go on"), state)));
    input.focus();
  }

  async function start() {
    const main = document.getElementById("main");
    try {
      await open();
    } catch (error) {
      if (error.status === 401) tokenForm(main, start);
      else main.replaceChildren(el("h1", { tabindex: -1 }, "The server does not answer"), el("p", null, error.message));
      return;
    }
    window.addEventListener("hashchange", () => show(false));
    window.addEventListener("storage", async (event) => { if (event.key === work.key) { await work.read(); drawPages(); } });
    show(true);
  }

  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("skip").addEventListener("click", () => document.getElementById("main").focus());
    if (!forebear.site && !forebear.served) {
      document.getElementById("main").append(el("p", null, "data/site.js is missing or damaged: write the site again."));
      return;
    }
    try { server.token = sessionStorage.getItem("forebear-token") ?? ""; } catch { /* it is asked for */ }
    start();
  });
})();
