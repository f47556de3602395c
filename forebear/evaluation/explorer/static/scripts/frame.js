"use strict";
/* The frame: which page is shown, of which index. */
(() => {
  const { el, add, field, grouped, missingPage, shown } = forebear.elements;
  const { server, loading, ask } = forebear.records;
  const { work, workPage } = forebear.worklist;
  const { listPage, testPage } = forebear.tests;
  const { rowPage } = forebear.rows;
  const { asking, askPage, askedPage } = forebear.asking;

  function aboutPage(main) {
    const { site } = forebear;
    add(main, el("h1", { tabindex: -1 }, "About these pages"),
      el("p", null, !site.n_tests ? "Texts are explained when they are asked about. Test rows are listed where the server was started with --test, a file of them, or with --site, the folder of forebear export-site." : `For each test row: the ${site.top} training rows of highest score (proponents) and the ${site.top} of lowest (opponents), by each method. The larger a score, the more training on the row supports what is explained.`),
      el("h2", null, "Methods"), el("dl", { class: "provenance" }, site.methods.map(([name, formula]) => [el("dt", null, name), el("dd", null, formula)])),
      el("h2", null, "Numbers"), el("ul", null,
        el("li", null, "Effect: predicted change of the loss, and of the probability, without the row."),
        el("li", null, `Hub share: of ${site.hubs ? "the reference queries of an audit of hubs" : "the test rows that are explained, from 20 on"}, the share that the row is a proponent of. A row that comes up for most explains none.`),
        el("li", null, "Also a training row: equal texts, equal words, or word sets of a Jaccard similarity of at least 0.8."),
        el("li", null, "Probability of the label: what the model gives a training row\u2019s own label."),
        el("li", null, "Suggested: another label that the model predicts, or most of the 10 nearest rows have.")),
      el("h2", null, "Provenance"), el("dl", { class: "provenance" }, site.provenance.map(([name, value]) => [el("dt", null, name), el("dd", null, shown(value))])));
    return "About";
  }

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
    const pages = { "": forebear.served && !forebear.site.n_tests ? askPage : listPage, test: testPage, row: rowPage, work: workPage, about: aboutPage, ...(forebear.served ? { ask: askPage, asked: askedPage } : {}) };
    let title;
    const main = document.getElementById("main");
    main.setAttribute("aria-busy", "true");
    try {
      const known = Object.hasOwn(pages, name) && (number === undefined || /^\d{1,15}$/.test(number));
      title = known ? await pages[name](holder, Number(number)) : missingPage(holder, "There is no such page.");
    } catch (error) {
      holder.replaceChildren(el("h1", { tabindex: -1 }, "This page could not be read"), el("p", null, String(error.message)));
      title = "Not read";
    }
    if (mine !== turn) return; // the reader has gone on
    main.setAttribute("aria-busy", "false");
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
    asking.last = null;
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

  work.onchange = drawPages; // which shows how many rows are marked

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
