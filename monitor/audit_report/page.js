"use strict";
(() => {
  const { decisions } = JSON.parse(document.getElementById("data").textContent);
  const SOURCES = ["fused", "dense", "sae"];
  const number = (value) => (value === null ? "–" : value.toFixed(2));

  function element(name, text, kind) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function table(head, rows) {
    const made = element("table");
    const line = (cells, tag) => {
      const row = element("tr");
      cells.forEach((cell, at) => row.append(element(tag, cell, at ? "n isolate" : "isolate")));
      return row;
    };
    made.append(line(head, "th"), ...rows.map((cells) => line(cells, "td")));
    return made;
  }

  function describe(decision, token, chosen) {
    const parts = [];
    const head = element("div");
    head.append(element("strong", `Token ${token.position}`));
    if (token.text) head.append(" ", element("code", token.text.trim() || "blank", "isolate"));
    head.append(token.stage ? `, ${token.stage}` : ", read and not scored");
    parts.push(head);
    const order = decision.clusters.map((_, at) => at);
    order.sort((a, b) => (b === chosen) - (a === chosen) || (token.fused[b] ?? -1e9) - (token.fused[a] ?? -1e9));
    const rows = order.slice(0, 5).map((at) => [
      decision.clusters[at], ...SOURCES.map((source) => number(token[source][at])),
    ]);
    parts.push(table(["logits of the token", ...SOURCES], rows));
    for (const found of decision.latents) {
      const here = found.tokens.find(({ position }) => position === token.position);
      if (!here) continue;
      const rows = here.latents.map(([name, label, share, over]) => [
        `${name} ${label || "(no label)"}`, number(share), number(over),
      ]);
      if (here.others) rows.push(["its other latents", number(here.others), ""]);
      parts.push(table([`latents of ${found.cluster} here, and what each gave`, "to this token", "to the alert"], rows));
    }
    const known = new Set(decision.latents.map(({ cluster }) => cluster));
    for (const why of decision.explained) {
      if (known.has(why.cluster)) continue;
      const here = why.latents.filter(([, , , positions]) => positions.includes(token.position));
      if (!here.length) continue;
      parts.push(table(
        [`latents active here, and what each gave to the alert of ${why.cluster}`, "contribution"],
        here.map(([name, label, share]) => [`${name} ${label || "(no label)"}`, number(share)]),
      ));
    }
    return parts;
  }

  document.querySelectorAll(".decision").forEach((section, index) => {
    const decision = decisions[index];
    const tokens = [...section.querySelectorAll(".t")];
    const detail = section.querySelector(".detail");
    const select = section.querySelector("select");
    if (!tokens.length) return;
    let pinned = null;
    const chosen = () => Number(select.value);
    const show = (at) => detail.replaceChildren(...describe(decision, decision.tokens[at], chosen()));
    const pin = (at) => {
      tokens.forEach((token, other) => {
        token.classList.toggle("at", other === at);
        token.setAttribute("aria-pressed", String(other === at));
        token.tabIndex = other === at ? 0 : -1;
      });
      pinned = at;
      show(at);
    };
    select.addEventListener("change", () => {
      tokens.forEach((token, at) => {
        for (let level = 0; level <= 6; level += 1) token.classList.remove(`h${level}`);
        token.classList.add(`h${decision.tokens[at].levels[chosen()]}`);
      });
      if (pinned !== null) show(pinned);
    });
    tokens.forEach((token, at) => {
      token.tabIndex = at ? -1 : 0;
      token.setAttribute("role", "button");
      token.addEventListener("click", () => pin(at));
      token.addEventListener("mouseenter", () => show(at));
      token.addEventListener("mouseleave", () => (pinned === null ? detail.replaceChildren() : show(pinned)));
      token.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1, Home: -tokens.length, End: tokens.length }[event.key];
        if (event.key === "Enter" || event.key === " ") {
          pin(at);
        } else if (step) {
          const next = Math.min(Math.max(at + step, 0), tokens.length - 1);
          pin(next);
          tokens[next].focus();
        } else {
          return;
        }
        event.preventDefault();
      });
    });
  });

  const openers = [...document.querySelectorAll("button[aria-controls]")];
  const open = (wanted) => openers.forEach((button) => {
    const is = button === wanted && button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(is));
    document.getElementById(button.getAttribute("aria-controls")).hidden = !is;
  });
  openers.forEach((button) => {
    button.disabled = false;
    button.addEventListener("click", () => open(button));
  });
  if (openers.length) open(openers.find((button) => button.dataset.alerts !== "0") ?? openers[0]);
})();
