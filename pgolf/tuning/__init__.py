"""Settings of test-time training for a budget of seconds, found on training documents alone: `pgolf tune-ttt`.

Validation text is out of reach: a search is given training shards, and of the stream that its seconds are for no more
than the length.
"""
