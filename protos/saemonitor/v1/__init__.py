"""monitor.proto and its generated stubs; only `monitor.rpc` and `monitor.client` import them."""
