"use strict";
/* Texts that the server explains. */
(() => {
  const { el, add, field, missingPage, shown } = forebear.elements;
  const { server, ask, fromServer } = forebear.records;
  const { predictionParts } = forebear.predictions;

  const asking = { last: null }; // the text that was asked about last: its record, and what was filled in

  function askPage(main) {
    const { site } = forebear;
    const asked = asking.last;
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
        asking.last = { record: fromServer(answers[0]), texts: given, methods: chosen, top: Number(top.value) };
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
    const asked = asking.last;
    if (!asked) return missingPage(main, "No text was asked about yet.");
    add(main, el("nav", { class: "pager", "aria-label": "Back" }, el("a", { href: "#/ask" }, "Explain another text")),
      el("h1", { tabindex: -1 }, shown(asked.record.title)), el("p", { class: "summary" }, shown(asked.record.summary)));
    predictionParts(main, asked.record, `\u201c${asked.texts.join(" ").slice(0, 80)}\u201d`);
    return "A text explained";
  }

  forebear.asking = { asking, askPage, askedPage };
})();
