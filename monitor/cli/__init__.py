"""The command line, one file a group of commands; `app` joins them.

app        serve, demo, health, and the groups below
score      texts to verdicts, without a server
bundle     check, show and seal bundles
audit      verify and query the audit log
build      train-sae, discover, calibrate, evaluate
common     what the commands share: consoles, exit codes, where the default bundle is
"""
