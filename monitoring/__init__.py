"""The eyes: metrics, health and the prequential tally. They see reports only."""
