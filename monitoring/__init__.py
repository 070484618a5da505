"""The eyes: metrics, health and the prequential tally, which see reports only; and what Prometheus and Grafana need."""
