"use strict";
/* Elements and texts of the explorer's pages. Texts of rows come to the page as text nodes alone: nothing makes HTML of a string. */
(() => {
  window.forebear = { site: null, served: false };

  const FOLDED = 600; // characters of a text that are shown at first
  const FOLDED_AGAIN = 160; // of a text that stands on the page already

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

  function rowLink(row, capital) {
    return el("a", { href: `#/row/${row}` }, `${capital ? "Training row" : "row"} ${row}`);
  }

  function missingPage(main, words) {
    add(main, el("h1", { tabindex: -1 }, "Nothing here"), el("p", null, words), el("p", null, el("a", { href: "#/" }, "To the first page")));
    return "Nothing here";
  }

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

  const shownText = (text) => text.replace(HIDDEN, "");

  forebear.elements = { el, add, field, minus, grouped, percent, plural, say, testLink, rowLink, missingPage, shown, shownText, cut, textNode, textList };
})();
