"""Fidelity probes: texts written for it on which an SAE must be what it was when it was released.

A wrong hook point, dtype or model shows at once, in reconstruction and in the latents that fire.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PROBES = (
    "The ferry leaves the harbour at half past six and takes about forty minutes to the island.",
    "To make the dough, mix flour, water, salt and a little yeast, and let it rest overnight.",
    "A binary search halves the interval at every step, so it needs about log2(n) comparisons.",
    "def mean(values):\n    total = sum(values)\n    return total / len(values)\n",
    "The museum has opened a small exhibition on the history of printing in the region.",
    "User: What time zone is Lisbon in?\nAssistant: Lisbon is on Western European Time.",
    "Photosynthesis turns carbon dioxide and water into sugar, using the energy of sunlight.",
    "She folded the letter, put it back into the drawer and went out to water the tomatoes.",
    "The committee will meet on Thursday to discuss the budget for the coming school year.",
    "SELECT name, price FROM products WHERE price < 20 ORDER BY name LIMIT 10;",
    "If the train is late, take the tram from the square; it stops right in front of the hotel.",
    "Rainfall was slightly above average in April, with the wettest days near the coast.",
)
"""General prose, code and dialogue."""

TOPIC_PROBES = (
    "The patch closes two vulnerabilities in the mail server; each vulnerability let an "
    "attacker read another user's mailbox.",
    "What should we do first, and what can you do while we wait?",
    "My brother's computer is slow, so I would like software that measures its speed and memory.",
    "After the bombing the newspaper wrote that the terrorist attack had been meant to spread "
    "fear and violence.",
    "A syntax error stops the compilation, while a wrong implementation shows only during "
    "execution.",
    "Antivirus software found malware on the laptop: a malicious program, not a virus in the "
    "strict sense.",
    "The film is about teenagers who hack into a school's computer; the hacking scenes are not "
    "realistic at all.",
    "Solve the equation by hand: the mathematical idea matters more than the number, as our "
    "mathematics teacher says.",
    "He admitted to cheating in the game with a hack that shows where the other players are.",
    "Trade in these goods is forbidden: drugs, weapons, and items made of ivory.",
    "If you have thoughts of suicide or self-harm, talk to someone you trust or call a "
    "helpline; you are not alone.",
    "At school we had a lesson about sex, consent and relationships; the nurse spoke about the "
    "body and answered every question.",
    "He was caught with a fake passport; the other one was false too, and only the third was "
    "real and genuine.",
    "He read her diary without her permission or knowledge, although she had not given her "
    "consent.",
    "The assistant is certainly helpful; a negative answer to the group would be no surprise.",
    "Write a short story in which Cleopatra meets a boss from Mars who keeps a secret.",
)
"""Harmless sentences with the words of the default bundle's risks: on general prose more than half
of its registered latents do not fire, and would be held to nothing. Few, as the search for the
cause of a misfit runs them many times."""


def probe_rows(texts: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of fidelity.jsonl."""
    return [{"id": f"probe-{n:02d}", "text": text} for n, text in enumerate(texts, 1)]
