"""`sluice trace` and `sluice simulate`: what readers used, and what other caches would have made of it."""
