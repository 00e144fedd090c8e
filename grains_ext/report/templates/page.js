"use strict";
(() => {
  // Rows of one explorer: the first ones stand on the page, the others are drawn when asked for.
  function explore(root) {
    const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    const body = root.querySelector(".rows");
    const token = document.querySelector("template.token");
    const controls = root.querySelector(".controls");
    const status = root.querySelector(".status");
    const [more, all] = root.querySelectorAll(".more button");
    const first = [...body.children];
    const rows = data.rows.map((row, place) => ({
      ...row, place, text: row.text.toLowerCase(), node: first[place],
    }));
    let shown = data.step;

    function drawn(row) {
      if (row.node) return row.node;
      // Markup that the report's templates made, with every text in it escaped.
      const holder = document.createElement("template");
      holder.innerHTML = row.html;
      row.node = holder.content.firstElementChild;
      if (row.tokens) {
        const list = row.node.querySelector(".tokens");
        for (const [text, score, alpha] of row.tokens) {
          const item = token.content.firstElementChild.cloneNode(true);
          item.classList.toggle("neg", alpha < 0);
          item.style.setProperty("--a", alpha);
          item.firstChild.data = text;
          item.lastChild.textContent = " " + score;
          list.append(item);
        }
      }
      prepare(row.node);
      return row.node;
    }

    const value = (name) => controls.querySelector(`[name$="${name}"]:is(select, :checked)`)?.value;

    // Which of the filters' names a row goes by.
    function kinds(row, judge, after) {
      const found = ["all"];
      if (row.same) {
        if (row.same[after] === false) found.push("changed");
        if (judge) {
          const [before, now] = [row.right[judge][0], row.right[judge][after]];
          found.push(before ? (now ? "right" : "lost") : now ? "gained" : "wrong");
        }
      } else {
        found.push(row.converged ? "converged" : "failed");
      }
      return found;
    }

    const orders = {
      gain: (row, after) => row.margin[0] - row.margin[after],
      loss: (row, after) => row.margin[after] - row.margin[0],
      change: (row) => -row.change,
      residual: (row) => -row.residual,
    };

    function update() {
      const words = controls.querySelector("input[type=search]").value.toLowerCase().split(/\s+/)
        .filter(Boolean);
      const [judge, filter, order] = [value("judge"), value("filter") ?? "all", value("order")];
      const after = Number(value("after") ?? 1);
      const counts = {};
      const found = rows.filter((row) => {
        if (!words.every((word) => row.text.includes(word))) return false;
        const names = kinds(row, judge, after);
        for (const name of names) counts[name] = (counts[name] ?? 0) + 1;
        return names.includes(filter);
      });
      for (const input of controls.querySelectorAll("fieldset input")) {
        input.nextElementSibling.lastElementChild.textContent = counts[input.value] ?? 0;
      }
      if (orders[order]) {
        found.sort((a, b) => orders[order](a, after) - orders[order](b, after));
      }
      const seen = found.slice(0, shown);
      body.replaceChildren(...seen.map(drawn));
      body.classList.toggle("many", seen.length > 5 * data.step);
      for (const cell of root.querySelectorAll("tr > :not(.asked)")) {
        cell.hidden = ![1, 1 + after].includes(cell.cellIndex);
      }
      status.textContent = rows.length < 2 ? "" : found.length
        ? `${seen.length.toLocaleString("en")} of ${found.length.toLocaleString("en")} shown`
        : "Nothing matches.";
      more.hidden = all.hidden = seen.length === found.length;
      highlight(root, body, seen.length <= 200 ? words : []);
    }

    controls.hidden = rows.length < 2;
    // Not every driver of a browser sends both for a choice from a list.
    for (const kind of ["input", "change"]) {
      controls.addEventListener(kind, () => {
        shown = data.step;
        update();
      });
    }
    function extend(count) {
      const last = body.lastElementChild;
      shown = count;
      update();
      // The button may be gone: the focus goes to the first row that is new.
      const next = last?.nextElementSibling;
      if (next) {
        next.tabIndex = -1;
        next.focus({ preventScroll: true });
      }
    }
    more.addEventListener("click", () => extend(shown + data.step));
    all.addEventListener("click", () => extend(rows.length));
    update();
  }

  // What was searched for, without a change to the page's nodes.
  const found = new Map();
  function highlight(root, body, words) {
    if (!globalThis.CSS?.highlights || !globalThis.Highlight) return;
    const ranges = [];
    const walker = document.createTreeWalker(body, NodeFilter.SHOW_TEXT);
    while (words.length && walker.nextNode()) {
      const text = walker.currentNode.data.toLowerCase();
      // Lower case may be longer (İ): then places do not fit, and nothing is marked.
      if (text.length !== walker.currentNode.data.length) continue;
      for (const word of words) {
        for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) {
          const range = new Range();
          range.setStart(walker.currentNode, at);
          range.setEnd(walker.currentNode, at + word.length);
          ranges.push(range);
        }
      }
    }
    found.set(root, ranges);
    // One by one: a call takes only so many arguments.
    const marks = new Highlight();
    for (const each of found.values()) each.forEach((range) => marks.add(range));
    CSS.highlights.set("found", marks);
  }

  // Lists of marks are one stop of the Tab key each; arrows go on inside.
  const LISTS = "ul.tokens, ul.marks";
  function prepare(root) {
    for (const list of root.querySelectorAll(LISTS)) {
      if (list.firstElementChild) list.firstElementChild.tabIndex = 0;
    }
    for (const layer of root.querySelectorAll(".under")) {
      layer.tabIndex = 0;
      layer.setAttribute("role", "group");
      layer.setAttribute("aria-roledescription", "map of patches, arrow keys move");
      for (const patch of layer.children) {
        patch.dataset.words = patch.title;
        patch.removeAttribute("title");
        patch.setAttribute("aria-hidden", "true");
      }
      const readout = document.createElement("output");
      readout.className = "readout note";
      layer.closest(".pictures").after(readout);
    }
  }

  const STEPS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 };
  function walk(event, item) {
    const items = [...item.parentElement.children];
    const here = items.indexOf(item);
    const right = getComputedStyle(item.parentElement).direction === "rtl" ? -1 : 1;
    const sideways = event.key === "ArrowRight" || event.key === "ArrowLeft";
    const there = event.key === "Home" ? 0 : event.key === "End" ? items.length - 1
      : here + STEPS[event.key] * (sideways ? right : 1);
    if (!items[there] || Number.isNaN(there)) return;
    event.preventDefault();
    item.tabIndex = -1;
    items[there].tabIndex = 0;
    items[there].focus();
  }

  function centre(patch) {
    const [left, top, width, height] = ["left", "top", "width", "height"].map(
      (name) => parseFloat(patch.style[name]));
    return [left + width / 2, top + height / 2];
  }

  // The nearest patch whose centre lies in the direction of the key.
  function neighbour(layer, from, key) {
    const along = key === "ArrowLeft" || key === "ArrowRight" ? 0 : 1;
    const here = centre(from);
    let [best, nearest] = [null, Infinity];
    for (const patch of layer.children) {
      const there = centre(patch);
      const ahead = STEPS[key] * (there[along] - here[along]);
      const far = ahead + 2 * Math.abs(there[1 - along] - here[1 - along]);
      if (ahead > 0.01 && far < nearest) [best, nearest] = [patch, far];
    }
    return best;
  }

  function read(layer, patch) {
    layer.querySelector(".at")?.classList.remove("at");
    patch?.classList.add("at");
    const readout = layer.closest(".pictures").nextElementSibling;
    if (readout?.matches(".readout")) readout.textContent = patch?.dataset.words ?? "";
  }

  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const target = event.target;
    if (target.matches(".under") && event.key in STEPS) {
      const at = target.querySelector(".at");
      const next = at ? neighbour(target, at, event.key) : target.firstElementChild;
      if (next) read(target, next);
      event.preventDefault();
    } else if (target.parentElement?.matches(LISTS)
      && (event.key in STEPS || event.key === "Home" || event.key === "End")) {
      walk(event, target);
    } else if (event.key === "Escape" && target.parentElement?.matches(LISTS)) {
      target.blur();
    }
  });
  document.addEventListener("focusin", ({ target }) => {
    if (target.matches(".under")) read(target, target.querySelector(".at") ?? target.firstElementChild);
  });
  document.addEventListener("focusout", ({ target }) => {
    if (target.matches(".under")) read(target, null);
  });
  document.addEventListener("pointerover", ({ target }) => {
    const layer = target.closest?.(".under");
    if (layer) read(layer, target.closest(".patch"));
  });

  prepare(document);
  document.querySelectorAll(".explorer").forEach(explore);
  // What is folded away is printed too.
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
