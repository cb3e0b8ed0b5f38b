"""A log as one page for whoever answers for it: traffic, coverage, alerts, scores, evidence.

summary   decisions, one by one -> counts, in memory that does not grow with the log
heat      chosen decisions, token by token, as far as their level and the keys allow
replayed  folders of a replay -> classes, what differs, which verdicts flip
build     log, bundle, verification and what-if -> all that a report says
charts    counts -> inline SVG
page      a report -> one HTML file;  page.html.j2, page.css, page.js
plots     the same charts as PNG, by matplotlib
"""
