"use strict";
/* The work list: rows that are marked, and their page. */
(() => {
  const { el, add, field, plural, say, rowLink, shown, textNode } = forebear.elements;
  const { server, ask, trainingRow } = forebear.records;

  const DECISIONS = ["relabel", "remove", "quarantine", "keep"];
  const NOTE = "note"; // marked, and nothing decided
  const OF_LABEL = "evidence: probability of the label";
  // The columns of work lists, as audits write them too: docs/work-lists.md.
  const fields = () => ["row", "source", "source_row", ...forebear.site.text_columns.map((name) => `text: ${name}`), "given",
    "suggested", OF_LABEL, "reason", "decision", "note"];
  // Lists that a browser kept before: other names, and the label's probability as the list's.
  function renewed(entry) {
    if (!("label" in entry)) return entry;
    const { text, label, evidence, probability, reason, decision, ...rest } = entry;
    return {
      ...rest, [`text: ${forebear.site.text_columns[0]}`]: text, given: label, [OF_LABEL]: probability,
      reason: [evidence, reason].filter(Boolean).join("; "), decision: { "wrong label": "relabel", note: "" }[decision] ?? decision,
    };
  }
  const work = {
    get key() { return `forebear-worklist:${forebear.site.digest}`; },
    problem: "",
    onchange: () => {},
    entries: new Map(), // by row
    async read() {
      try {
        const entries = forebear.site.keeps ? await ask("explorer/worklist") : JSON.parse(localStorage.getItem(this.key) ?? "[]");
        this.entries = new Map(entries.filter((entry) => Number.isInteger(entry?.row)).map((entry) => [entry.row, renewed(entry)]));
      } catch (error) {
        this.problem = forebear.site.keeps ? error.message : "This browser keeps nothing for this page: export the list before you leave.";
      }
    },
    // One after another, as they were made: each sends what the row is when its turn comes.
    last: Promise.resolve(),
    write(row) {
      this.onchange();
      this.last = this.last.then(() => this.send(row));
      return this.last;
    },
    async send(row) {
      const entry = this.entries.get(row);
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

  const ordered = (entry) => ({ ...Object.fromEntries(fields().map((name) => [name, entry[name] ?? null])), ...entry });
  const asLines = (entries) => entries.map((entry) => `${JSON.stringify(ordered(entry))}\n`).join("");

  // What a spreadsheet would take for a formula has an apostrophe before it, which is taken off where a list is read.
  const guarded = (text) => (/^'*[=+\-@\t\r]/.test(text) ? `'${text}` : text);

  function asCsv(entries) {
    const cell = (value) => {
      const text = value === null || value === undefined ? "" : typeof value === "string" ? guarded(value) : String(value);
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const columns = [...new Set(entries.map(ordered).flatMap(Object.keys))];
    return [columns, ...entries.map((entry) => columns.map((name) => (Array.isArray(entry[name]) ? entry[name].join("; ") : entry[name])))].map((line) => `${line.map(cell).join(",")}\n`).join("");
  }

  function save(name, content, type) {
    const address = URL.createObjectURL(new Blob([content], { type }));
    el("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
    say(`${name} is saved.`);
  }

  const decisionOf = (entry) => entry.decision || (entry.note ? NOTE : "undecided");

  // A form that marks a training row. ``reason``: where the reader met it.
  function markForm(record, reason, onchange) {
    const row = record.row;
    const now = () => work.entries.get(row);
    const id = (name) => `mark-${name}-${row}-${Math.random().toString(36).slice(2, 8)}`;
    const group = id("decision");
    const radios = [...DECISIONS, NOTE].map((decision) => el("label", null, el("input", {
      type: "radio", name: group, value: decision, checked: now() && decisionOf(now()) === decision, onchange: keep,
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
      const decision = form.querySelector("input:checked")?.value ?? (note.value.trim() ? NOTE : null);
      if (!decision) return;
      form.querySelector(`input[value="${decision}"]`).checked = true;
      await work.put({
        ...now(), row, source: record.source, source_row: record.source_row,
        ...Object.fromEntries(record.texts.map(([name, text]) => [`text: ${name}`, record.has_texts === false ? null : text])), given: record.label,
        suggested: names.length ? label.value || null : record.suggested, [OF_LABEL]: record.probability,
        reason: now()?.reason || [record.evidence, reason].filter(Boolean).join("; "),
        decision: decision === NOTE ? "" : decision, note: note.value,
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
      summary.textContent = entry ? `Row ${row} is marked: ${decisionOf(entry)}` : `Mark row ${row}`;
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
  function workPage(main) {
    const list = el("ul", { class: "lines" });
    const count = el("p", { class: "summary" });
    const exported = (kind, make, type) => el("button", { type: "button", onclick: () => save(`worklist.${kind}`, make(work.sorted()), type) }, `Export ${kind === "csv" ? "CSV" : "JSON Lines"}`);
    function draw() {
      const entries = work.sorted();
      count.textContent = entries.length ? `${plural(entries.length, "training row")} marked.` : "No training row is marked. Mark rows on the page of a test row or of a training row.";
      list.replaceChildren(...entries.map((entry) => el("li", null,
        el("div", null, rowLink(entry.row, true), el("span", { class: "note" }, decisionOf(entry)), el("ul", { class: "facts" },
          el("li", null, el("span", null, "label"), shown(String(entry.given))), entry.suggested ? el("li", null, el("span", null, "suggested"), shown(String(entry.suggested))) : null)),
        el("div", null, textNode("p", [[Object.keys(entry).filter((name) => name.startsWith("text: ")).map((name) => entry[name] ?? "").join("\n")]]),
          entry.note ? el("p", { class: "note-line" }, "Note: ", shown(String(entry.note))) : null,
          el("p", { class: "note-line" }, shown(entry.reason ?? "")),
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

  forebear.worklist = { work, markForm, markDetails, workPage };
})();
