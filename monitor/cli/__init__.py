"""The command line, one file a group of commands; `app` joins them.

app        serve, demo, health, and the groups below
score      texts to verdicts, without a server
replay     decisions made again, and compared with those on record
export     a bundle and its model as one ONNX graph
bundle     check, show, compare and seal bundles
audit      verify and query the audit log
what_if    other settings on decisions of the past
report     an audit log as one page
build      train-sae, discover, calibrate, evaluate
common     what the commands share: consoles, exit codes, where the default bundle is
"""
