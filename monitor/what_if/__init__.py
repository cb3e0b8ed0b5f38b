"""Other thresholds, aggregates, fusion weights and rules on decisions of the past, without a model.

    settings    a bundle and what would be otherwise; what stored scores cannot answer
    running     many decisions' token logits -> aggregates, as `sae_core.aggregation` has them
    outcomes    a batch of traces -> which clusters and rules alert, surely or perhaps
    moments     joint rules of streams, which can hold for a moment only
    changes     two such answers -> what appears and vanishes, its interval, McNemar's test
    comparison  two bundles over batches of traces
    run         a log or an export -> the whole result

Stored scores are off by a known amount. What that amount could turn is counted as uncertain and not
claimed. No tensor library is imported.
"""
