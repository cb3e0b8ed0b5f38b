"""What `engine.py` is made of.

measuring   medians, spreads, sides that take turns
setting     the model, SAE and bundle that both sides load; sizes, full and quick
ours        one backend and dtype of ours, behind its engine
peers       processes of other libraries; peer_worker is what runs in them
products    matrix products: how fast this machine can be at best
throughput  prefill against peers and against the limit; overhead; mixed lengths
streams     many streams, open-loop load, flat cost, shared prefixes
service     a real server: overhead of a call, memory
"""

from monitor.config import wait_briefly

wait_briefly()  # as every command does
