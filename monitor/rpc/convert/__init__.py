"""Protobuf <-> records, both directions, so that server and client agree by construction.

enums.py        the closed sets, value by value
requests.py     what callers send
activations.py  the same for ScoreActivations
decisions.py    what they get back
registry.py     what the server says of itself

Knows shapes only: whether a policy exists or a text may be empty is the pipeline's to say. What
the wire can leave out but a record must have (an input, a stage) is refused here.
"""
