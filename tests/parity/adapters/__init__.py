"""One module per domain: `run(fixture)` computes what the fixtures of that domain hold."""
